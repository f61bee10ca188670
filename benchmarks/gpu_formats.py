"""FP8, NVFP4 and MXFP8 on a GPU through the pipeline's own stages: calibrated, trained, restored, exported.

python -m benchmarks.gpu_formats OUT_FOLDER [--small] [--only PART …]     parts: nvfp4, mxfp8, fp8, handover
python -m benchmarks.gpu_formats OUT_FOLDER --plans     on what was brought back, with TensorRT-RTX and no GPU

A BERT with random weights (335 million parameters, or some 5 million) over bytes: no accuracy, but whether
what was saved computes the same, how far each format moves the logits, whether the codes that are exported
are those that the GPU's kernels compute with, what the ONNX holds. OUT_FOLDER gets `report.json`, and for
each format FORMAT.onnx (FP16) and FORMAT.npz: a batch, and the network's logits before and after.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import gpu
from recipes.build import Export
from recipes.compress import Finetune, Quantize
from tasks import batches, calibrate, checkpoints, finetune, handover, microscaled, store
from tasks.artifacts import Checkpoint, Dataset, OnnxModel
from tasks.engines import microscale, tensorrt, tensorrt_parity
from tasks.export import export

PARTS = ("nvfp4", "mxfp8", "handover", "fp8")
SMALL = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 1024}
LAYER = "bert.encoder.layer.0.intermediate.dense"


def small(labels: int) -> Any:
    """A BERT over bytes whose ONNX file is some megabytes."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=256, num_labels=labels, attn_implementation="eager", **SMALL)
    return BertForSequenceClassification(config)


def large(labels: int) -> Any:
    """The other benchmarks' BERT."""
    return gpu.network(labels)


def logits(model: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Of a batch, on this machine's device."""
    import torch

    model.to(checkpoints.device()).eval()
    with torch.no_grad():
        found = model(**{key: value.to(model.device) for key, value in batches.tensors(batch).items()})
    return np.asarray(found.logits.float().cpu())


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Of all logits as one vector."""
    return float((one * other).sum() / (np.linalg.norm(one) * np.linalg.norm(other)))


class Report(dict[str, Any]):
    """What was found so far, written down at every step: a crash of the process takes nothing along."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self.file.write_text(json.dumps(self, indent=1, default=str))
        print(name, json.dumps(value, default=str)[:1500], flush=True)


def timed(report: Report, name: str, work: Callable[[], Any]) -> Any:
    """What `work` returns; its seconds and peak device memory go into the report."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    found = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        report[f"{name}_peak_bytes"] = torch.cuda.max_memory_allocated()
    report[f"{name}_seconds"] = time.perf_counter() - start
    return found


def one(format: str, start: Checkpoint, data: Dataset, out: Path, report: Report) -> None:
    """Every step of one format; the report holds what was found so far."""
    section = Quantize(format=format, batch_size=gpu.BATCH, exclude=("classifier",))
    batch = batches.samples(data, batches.preprocessor(start), count=1)[0]
    plain = logits(checkpoints.restore(start)[0], batch)
    saved = timed(report, "calibrate", lambda: calibrate.calibrate.fn(start, data, section))
    restored = checkpoints.restore(saved)[0]
    report["quantizers"] = checkpoints.counted(checkpoints.quantizers(restored))
    model = timed(report, "export", lambda: export.fn(saved, data, Export(opset=23), "fp16"))
    report["onnx"] = described(model, out / f"{format}.onnx")
    after = timed(report, "forward", lambda: logits(restored, batch))
    arrays: dict[str, Any] = {**batch, "plain": plain, "quantized": after}
    np.savez(out / f"{format}.npz", **arrays)
    report["cosine"] = cosine(plain, after)
    report["largest_difference"] = float(np.abs(plain - after).max())

    # Calibrated again without saving: the same numbers, or the checkpoint lost something.
    again = checkpoints.restore(start)[0].to(checkpoints.device())
    loop = batches.forward_loop(data, batches.preprocessor(start), gpu.BATCH, "calibrate")
    kept = logits(calibrate.quantized(again, section, loop), batch)
    report["restored_bit_equal"] = bool((kept == after).all())
    if format != "fp8":
        attempt(report, "codes", lambda: codes(restored))
    attempt(report, "evaluated", lambda: evaluated(model, batch, after))
    attempt(report, "qat", lambda: trained(report, saved, data, batch))


def handed_over() -> dict[str, Any]:
    """A small language model in NVFP4 as a Hugging Face checkpoint, compared tensor by tensor."""
    start, data = gpu.prepared("recipes.tiny_llama:build", task="causal-lm")
    section = Quantize(format="nvfp4", exclude=("lm_head", "model.embed_tokens"))
    made = handover.handover.fn(calibrate.calibrate.fn(start, data, section), data)
    return {**made.values, **made.facts}


def codes(model: Any) -> dict[str, Any]:
    """How many values the GPU's kernels and the exported codes disagree on, of weights and of one input."""
    import torch

    apart, count, most = 0, 0, 0.0
    taken = {}
    for name, module in model.named_modules():
        if (
            microscaled.scale_bits(getattr(module, "weight_quantizer", None))
            and module.weight_quantizer.is_enabled
        ):
            with torch.no_grad():
                taken[name] = module.weight_quantizer(module.weight).float().cpu().numpy()
    quantizer = model.get_submodule(LAYER).input_quantizer
    values = torch.randn(64, model.get_submodule(LAYER).in_features, device=checkpoints.device())
    with torch.no_grad():
        given = quantizer(values).float().cpu().numpy()
    wanted = dequantized(values.cpu().numpy(), quantizer)
    for name, layer in microscaled.lift(model).items():
        meant = microscaled.values(layer)
        apart, count = apart + int((meant != taken[name]).sum()), count + meant.size
        most = max(most, float(np.abs(meant - taken[name]).max() / np.abs(taken[name]).max()))
    inputs = {"values": given.size, "apart": int((given != wanted).sum())}
    return {"layers": len(taken), "weights": count, "apart": apart, "most": most, "inputs": inputs}


def dequantized(values: np.ndarray, quantizer: Any) -> np.ndarray:
    """What the exported graph makes of an input."""
    if microscaled.scale_bits(quantizer) == microscaled.E8M0_SCALES:
        return microscale.mxfp8_values(*microscale.mxfp8(values))
    scale = microscale.global_scale(float(quantizer.amax))
    return microscale.nvfp4_values(*microscale.nvfp4(values, scale), scale)


def described(model: OnnxModel, copy: Path) -> dict[str, Any]:
    """Bytes, operators and stored types; the file is copied."""
    import onnx

    source = store.path(model.blob) / "model.onnx"
    shutil.copy(source, copy)
    graph = onnx.load(source)
    kinds = Counter(f"{node.domain or 'ai.onnx'}::{node.op_type}" for node in graph.graph.node)
    stored: Counter[str] = Counter()
    for tensor in graph.graph.initializer:
        stored[onnx.TensorProto.DataType.Name(tensor.data_type)] += int(np.prod(tensor.dims))
    return {
        "bytes": source.stat().st_size,
        "opsets": {entry.domain: entry.version for entry in graph.opset_import},
        "nodes": dict(kinds),
        "values": dict(stored),
        "facts": model.facts,
    }


def evaluated(model: OnnxModel, batch: dict[str, np.ndarray], wanted: np.ndarray) -> dict[str, float]:
    """The exported graph by ONNX's own evaluator on the CPU, beside the network on the GPU."""
    got = tensorrt_parity.reference(store.path(model.blob) / "model.onnx", [batch])[0]["logits"]
    return {"cosine": cosine(got, wanted), "largest_difference": float(np.abs(got - wanted).max())}


def trained(report: Report, saved: Checkpoint, data: Dataset, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """A short QAT, restored and exported."""
    section = Finetune(epochs=1, batch_size=8, learning_rate=1e-4)
    after = timed(report, "train", lambda: finetune.finetune.fn(saved, data, section))
    values = logits(checkpoints.restore(after)[0], batch)
    model = export.fn(after, data, Export(opset=23), "fp16")
    losses = [row["loss"] for row in after.facts["curve"] if "loss" in row]
    return {"losses": losses[:3] + losses[-3:], "evaluated": evaluated(model, batch, values)}


def attempt(report: Report, name: str, work: Callable[[], Any]) -> None:
    """The part's result, or its traceback: the others go on."""
    try:
        report[name] = work()
    except Exception:
        report[name] = {"error": traceback.format_exc()[-4000:]}


def here(part: str, out: Path, size: str) -> None:
    """One format, or the handover, in this process."""
    faulthandler.enable()
    if size == "small":
        os.environ["BENCHMARK_SMALL"] = "1"  # few rows, too
    os.environ["ENGINEHOUSE_HOME"] = tempfile.mkdtemp()
    store.prepare()
    report = Report(out / f"{part}.json")
    if part == "handover":
        attempt(report, part, handed_over)
        return
    start, data = gpu.prepared(f"benchmarks.gpu_formats:{size}")
    report["device"], report["parameters"] = gpu.device(), start.facts["parameters"]
    attempt(report, "failed", lambda: one(part, start, data, out, report))


def apart(part: str, out: Path, size: str, limit: float) -> dict[str, Any]:
    """The same in a process of its own: what it wrote down, and its last words if it did not end well."""
    written, log = out / f"{part}.json", out / f"{part}.log"
    command = [sys.executable, "-m", "benchmarks.gpu_formats", str(out), "--part", part, "--size", size]
    with log.open("w") as file:
        try:
            ended: Any = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            ended = f"took more than {limit:g} s"
    found: dict[str, Any] = json.loads(written.read_text()) if written.exists() else {}
    return found if ended == 0 else {**found, "ended": ended, "log": log.read_text()[-4000:]}


def elsewhere(out: Path) -> dict[str, Any]:
    """What was brought back, on a machine that may have no GPU: evaluated, and a TensorRT-RTX plan built."""
    found: dict[str, Any] = {}
    for file in sorted(out.glob("*.npz")):
        arrays, model = dict(np.load(file)), file.with_suffix(".onnx")
        plain, quantized = arrays.pop("plain"), arrays.pop("quantized")
        got = tensorrt_parity.reference(model, [arrays])[0]["logits"]
        built = tensorrt.build(
            model, out / f"{file.stem}.rtx", samples=[arrays], flavor="tensorrt_rtx", refit="never"
        )
        found[file.stem] = {
            "moved": cosine(plain, quantized),
            "evaluated": cosine(got, quantized),
            "onnx_bytes": model.stat().st_size,
            "plan_bytes": (out / f"{file.stem}.rtx/plan/engine.plan").stat().st_size,
            "proved": f"{built.proved}, {built.runtime} {built.version}",
        }
    return found


def main() -> None:
    """Each part in turn; the report is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_const", const="small", default="large", dest="size")
    parser.add_argument("--only", nargs="*", default=PARTS)
    parser.add_argument("--limit", type=float, default=600, help="seconds for each part")
    parser.add_argument("--plans", action="store_true", help="build what OUT_FOLDER holds; needs no GPU")
    parser.add_argument("--size", help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.plans:
        print(json.dumps(elsewhere(given.out), indent=1))
        return
    if given.part:
        here(given.part, given.out, given.size)
        return
    report: dict[str, Any] = {}
    for part in given.only:
        report[part] = apart(part, given.out, given.size, given.limit)
        (given.out / "report.json").write_text(json.dumps(report, indent=1))
        told = {name: value for name, value in report[part].items() if name != "onnx"}
        print(part, json.dumps(told)[-3500:], flush=True)


if __name__ == "__main__":
    main()
