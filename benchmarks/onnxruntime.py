"""ONNX Runtime on a CPU: FP32, ModelOpt's INT8 as exported and lowered, and the runtime's own quantizers.

python -m benchmarks.onnxruntime FP32.onnx INT8.onnx INPUTS.npz [THREADS]    the tables of docs/onnxruntime.md

INPUTS.npz holds real inputs, one array an input with one row an example: they calibrate the static
quantizer and are repeated or cut to each batch and length. All engines take turns in one process.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.preprocess import quant_pre_process

from tasks.artifacts import Facts
from tasks.engines import onnxruntime as engine
from tasks.engines.onnxruntime_session import OrtSession

SHAPES = ((1, 32), (8, 32), (32, 64))
ROUNDS, SECONDS = 31, 0.05
COLUMNS = [
    "ms, median",
    "5 to 95 %",
    "processor ms",
    "FP32 / this",
    "by processor",
    "this / lowered",
    "by processor",
]
Inputs = dict[str, np.ndarray]


def main(fp32: Path, int8: Path, inputs: Inputs, threads: int) -> None:
    """Build every engine, then print sizes and errors, latencies, and the profile of the lowered one."""
    print(f"onnxruntime {engine.version()}, {engine.device()}, {threads} threads\n")
    with tempfile.TemporaryDirectory() as name:
        sessions, facts = engines(fp32, int8, inputs, Path(name), threads)
        show(
            ["engine", "MB", "of FP32", "open ms", "max error to FP32", "mean error"],
            sizes(sessions, facts, inputs),
        )
        for batch, length in SHAPES if "attention_mask" in inputs else ((1, 0), (8, 0), (32, 0)):
            sample = cut(inputs, batch, length)
            about = f"batch {batch}" + (f", length {length}" if length else "")
            show(
                [about, *COLUMNS],
                race(sessions, sample),
            )
        for label in ("FP32", "lowered"):
            plan, weights = facts[label]["folders"]
            profile = engine.proof(plan, weights, cut(inputs, *SHAPES[-1]), threads=threads)
            show(
                [f"{label}: operator", "ms of the last shape"],
                ([k, f"{v:.2f}"] for k, v in profile["milliseconds"].items()),
            )
            print(f"products in integers: {profile['quantized_share']:.1%} of operations\n")


def engines(
    fp32: Path, int8: Path, inputs: Inputs, folder: Path, threads: int
) -> tuple[dict[str, OrtSession], dict[str, Facts]]:
    """Sessions by label (FP32 first) and what is known of each: its bytes and how long it took to open."""
    sessions: dict[str, OrtSession] = {}
    facts: dict[str, Facts] = {}
    samples = [cut(inputs, 4, 32)]
    for label, file in (("FP32", fp32), ("lowered", int8)):
        built = engine.build(file, folder / label, samples=samples, threads=threads)
        began = time.perf_counter()
        sessions[label] = engine.open(folder / label / "plan", folder / label / "weights", threads=threads)
        opened = time.perf_counter() - began
        size = built.facts["plan_bytes"] + built.facts["weights_bytes"]
        facts[label] = {
            "bytes": size,
            "open": opened,
            "folders": (folder / label / "plan", folder / label / "weights"),
        }
        print(label, {key: value for key, value in built.facts.items() if "error" in key})
    for label, file in (("as exported", int8), *quantizers(fp32, inputs, folder)):
        began = time.perf_counter()
        sessions[label] = plain(file, threads)
        facts[label] = {"bytes": file.stat().st_size, "open": time.perf_counter() - began}
    return sessions, facts


def plain(file: Path, threads: int) -> OrtSession:
    """Just what a user of the runtime gets: every default, all optimizations."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return OrtSession(ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"]))


def quantizers(fp32: Path, inputs: Inputs, folder: Path) -> Iterator[tuple[str, Path]]:
    """The runtime's static quantizer (u8 by s8, per channel, all operators) and its dynamic one."""

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        rows = iter(
            [{name: array[[k]] for name, array in inputs.items()} for k in range(min(64, size(inputs)))]
        )

        def get_next(self) -> Any:
            return next(self.rows, None)

    whole = folder / "preprocessed.onnx"
    quant_pre_process(str(fp32), str(whole), skip_symbolic_shape=True)
    static, dynamic = folder / "static.onnx", folder / "dynamic.onnx"
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(str(whole), str(static), Reader(), per_channel=True, **kinds)
    yield "ORT static", static
    # Its convolutions take unsigned weights only.
    kind = QuantType.QInt8 if "attention_mask" in inputs else QuantType.QUInt8
    quantize_dynamic(str(whole), str(dynamic), weight_type=kind)
    yield "ORT dynamic", dynamic


def size(inputs: Inputs) -> int:
    """Rows of the inputs."""
    return len(next(iter(inputs.values())))


def cut(inputs: Inputs, batch: int, length: int) -> Inputs:
    """So many rows, and for texts so many tokens; both are repeated where there are too few."""
    rows = np.resize(np.arange(size(inputs)), batch)
    chosen = {name: array[rows] for name, array in inputs.items()}
    if "attention_mask" not in inputs:
        return chosen
    repeats = -(-length // chosen["attention_mask"].shape[1])
    return {name: np.tile(array, (1, repeats))[:, :length] for name, array in chosen.items()}


def sizes(sessions: dict[str, OrtSession], facts: dict[str, Facts], inputs: Inputs) -> Iterator[list[str]]:
    """A row an engine; errors are those of the first output on 32 rows."""
    sample = cut(inputs, 32, 32)
    want = [next(iter(sessions["FP32"].run(sample).values()))]
    for label, session in sessions.items():
        error = engine.parity([{"y": want[0]}], [{"y": next(iter(session.run(sample).values()))}])
        about = facts[label]
        share = about["bytes"] / facts["FP32"]["bytes"]
        row = [label, f"{about['bytes'] / 1e6:.2f}", f"{share:.3f}", f"{1e3 * about['open']:.0f}"]
        yield [*row, f"{error['max_error']:.4f}", f"{error['mean_error']:.4f}"]


def race(sessions: dict[str, OrtSession], sample: Inputs) -> Iterator[list[str]]:
    """Rounds in which every engine runs in turn; ratios are medians of each round's own ratio.

    Processor time is what other programs on the machine disturb least; with several threads it
    counts their waiting too, so read it at one thread.
    """
    calls = {label: max(1, int(SECONDS / once(session, sample, 2)[0])) for label, session in sessions.items()}
    rounds = np.array(
        [[once(session, sample, calls[label]) for label, session in sessions.items()] for _ in range(ROUNDS)]
    )
    ours = rounds[:, list(sessions).index("lowered")]
    for column, label in enumerate(sessions):
        times = rounds[:, column] * 1e3
        low, high = np.quantile(times[:, 0], (0.05, 0.95))
        wall, processor = np.median(times, axis=0)
        faster = np.median(rounds[:, 0] / rounds[:, column], axis=0)
        ahead = np.median(rounds[:, column] / ours, axis=0)
        row = [label, f"{wall:.2f}", f"{low:.2f} to {high:.2f}", f"{processor:.2f}"]
        yield [*row, *(f"{ratio:.2f}" for pair in (faster, ahead) for ratio in pair)]


def once(session: OrtSession, sample: Inputs, calls: int) -> tuple[float, float]:
    """Seconds a call: on the clock, and of processor time."""
    clock, processor = time.perf_counter(), time.process_time()
    for _ in range(calls):
        session.run(sample)
    return (time.perf_counter() - clock) / calls, (time.process_time() - processor) / calls


def show(head: list[str], rows: Iterator[list[str]]) -> None:
    """A Markdown table."""
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
    print()


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    with np.load(sys.argv[3]) as arrays:
        main(Path(sys.argv[1]), Path(sys.argv[2]), dict(arrays), int(sys.argv[4]) if len(sys.argv) > 4 else 2)
