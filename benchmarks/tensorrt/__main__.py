"""Two tables that the field knows, for whatever TensorRT is here: `python -m benchmarks.tensorrt [FOLDER]`.

1. full against weight-stripped plan bytes, and seconds to refit: CLIP text, a larger CLIP text, a UNet.
2. FP8 against FP16, bytes and latency at batch 128: CLIP image and text.

Models have random weights. What a runtime cannot do is said in its cell: TensorRT for RTX builds without
a GPU and then measures bytes alone; TensorRT 8.6 has no FP8 (INT8 stands in) and no stripped plans (its
refittable plan is whole). Exports are kept in FOLDER (default .data/tensorrt); only they need PyTorch, and
`--export OPSET` makes them where it is, for a host where it is not (17 for TensorRT 8.6, 20 for all later).
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.tensorrt import qdq
from tasks.engines import tensorrt, tensorrt_parity
from tasks.engines import tensorrt_api as api
from tasks.errors import InputError

BATCH = 128
CHECKED = 2  # batch whose outputs are compared with PyTorch's
STRIPPED = ("clip-text", "clip-text-larger", "unet")
QUANTIZED = ("clip-image", "clip-text")


def export(name: str, folder: Path, opset: int, layers: int | None) -> Path:
    """The FP16 ONNX of a model with its calibration beside it, made if it is not there."""
    path = folder / (f"{name}-{opset}" if layers is None else f"{name}-{layers}-layers-{opset}")
    if (path / "amax.json").exists():
        return path
    import torch

    from benchmarks.tensorrt import clip, unet

    path.mkdir(parents=True, exist_ok=True)
    feed, model = inputs(name, CHECKED), torch.nn.Module()
    if name == "unet":
        torch.manual_seed(0)
        model = unet.UNet().eval()
    else:
        kind, config = ("image", clip.IMAGE) if name == "clip-image" else ("text", clip.TEXT)
        config = clip.LARGER_TEXT if name == "clip-text-larger" else config
        model = clip.build(kind, config if layers is None else {**config, "num_hidden_layers": layers})
    where = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(where)
    amax = clip.calibrate(model, feed)
    np.savez(path / "right.npz", embeds=clip.run(model, feed))
    clip.export(model.half(), inputs(name, 1), path / "model.onnx", opset)
    (path / "amax.json").write_text(json.dumps(amax))
    return path


def inputs(name: str, batch: int) -> dict[str, np.ndarray]:
    """One batch for a model."""
    random = np.random.default_rng(0)
    if name == "unet":
        return {
            "latents": random.standard_normal((batch, 4, 32, 32), dtype=np.float32),
            "time": random.standard_normal((batch, 1280), dtype=np.float32),
        }
    if name == "clip-image":
        return {"pixels": random.standard_normal((batch, 3, 224, 224), dtype=np.float32)}
    ids = random.integers(1, 49407, (batch, 77))
    return {"input_ids": ids, "attention_mask": np.ones((batch, 77), np.int64)}


def quantized(path: Path, kind: str) -> Path:
    """FP8 beside the FP16 model, weights and tables stored in eight bits; INT8 for TensorRT 8.6.

    That one is of an FP32 graph, tables left alone: its parser misreads FP16 scales, and FP16 is a flag.
    """
    out = path.parent / f"{path.name}-{kind}"
    if (out / "model.onnx").exists():
        return out
    model, amax = onnx.load(path / "model.onnx"), json.loads((path / "amax.json").read_text())
    plain = {name.replace(".", "/").rsplit("/", 1)[0]: name for name in qdq.weights_of(model)}
    named = {plain[name]: value for name, value in amax.items() if name in plain}
    out.mkdir(exist_ok=True)
    source = tensorrt_parity.widened(model) if kind == "int8" else model
    onnx.save(qdq.insert(source, named, kind, fold=True, tables=kind == "fp8"), out / "model.onnx")
    return out


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The work's row, or why there is none."""
    try:
        return work()
    except (InputError, RuntimeError) as error:
        return {"why": str(error).split(": ", 1)[-1][:300]}


def stripped_row(name: str, path: Path, level: int | None) -> dict[str, Any]:
    """Plain and refittable plan of one model, the seconds of a refit, and the full build's."""
    with tempfile.TemporaryDirectory() as folder:
        policy = "always" if api.gpu() else "never"
        built = _build(name, path, Path(folder), CHECKED, refit=policy, level=level)
    row = {"onnx": (path / "model.onnx").stat().st_size, "proved": built.proved}
    refit = built.facts["refit"]
    if not refit["safe"]:
        return {**row, "full": built.facts["bytes"], "why": refit["reason"]}
    row |= {"full": refit["plain"]["bytes"], "refittable": built.facts["bytes"], "kind": refit["kind"]}
    return {**row, "refit_seconds": refit["refit_seconds"], "build_seconds": refit["build_seconds"]}


def quantized_row(name: str, path: Path, batch: int, level: int | None) -> dict[str, Any]:
    """Plan bytes and, where it runs, latency and cosine of one model."""
    with tempfile.TemporaryDirectory() as folder:
        half = path.name.endswith("-int8")  # FP32 there, so FP16 kernels are asked for
        built = _build(name, path, Path(folder), batch, refit="never", level=level, half=half)
        row = {"onnx": (path / "model.onnx").stat().st_size, "plan": built.facts["bytes"]}
        row |= {"proved": built.proved, "parity": built.facts.get("parity")}
        if built.proved == "executed":
            with tensorrt.open(Path(folder) / "plan", None) as session:
                row["ms"] = statistics.median(session.latencies(inputs(name, batch)))
    return row


def _build(name: str, path: Path, folder: Path, batch: int, **options: Any) -> Any:
    """A build for batches from the one that is checked to the one that is timed."""
    low, high = inputs(name, CHECKED), inputs(name, batch)
    shapes = {k: {"min": low[k].shape, "opt": high[k].shape, "max": high[k].shape} for k in low}
    with np.load(path.parent / path.name.removesuffix("-fp8").removesuffix("-int8") / "right.npz") as found:
        right = [{"embeds": found["embeds"]}]
    return tensorrt.build(path, folder, samples=[low], reference=right, profiles=[shapes], **options)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tensorrt",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", nargs="?", type=Path, default=Path(".data/tensorrt"))
    add("--batch", type=int, default=BATCH, help="of the second table (default 128)")
    add("--models", nargs="*", default=[*STRIPPED, "clip-image"], help="leave the others out")
    add("--level", type=int, help="builder optimization level (default: the builder's own)")
    add("--layers", type=int, help="of the CLIP models: a quick try that is no evidence")
    add("--export", type=int, metavar="OPSET", help="only write the ONNX files, in this opset")
    return parser.parse_args()


def main() -> int:
    """Print both tables and write their numbers beside the models."""
    options = _arguments()
    if options.export:
        for name in options.models:
            print(export(name, options.folder, options.export, options.layers))
        return 0
    flavor = api.installed()
    if flavor is None:
        print(
            "no TensorRT is installed: pip install tensorrt-rtx, which builds without a GPU", file=sys.stderr
        )
        return 2
    version = api.version_of(flavor) or ""
    weak = api.weakly_typed(flavor, version)
    opset, kind = (17, "int8") if weak else (20, "fp8")
    print(f"{flavor} {version} on {tensorrt.device()}; random weights\n")
    report: dict[str, Any] = {"runtime": flavor, "version": version, "device": tensorrt.device()}
    paths = {name: export(name, options.folder, opset, options.layers) for name in options.models}
    _first_table(paths, options, report)
    _second_table(paths, kind, options, report)
    return 0


def _first_table(paths: dict[str, Path], options: argparse.Namespace, report: dict[str, Any]) -> None:
    print("model             | ONNX MB | full plan MB | refittable MB | refit s | build s")
    for name, path in paths.items():
        if name not in STRIPPED:
            continue
        row = attempt(lambda p=path, n=name: stripped_row(n, p, options.level))  # type: ignore[misc]
        _keep(report, name, row, options.folder)
        print(
            f"{name:17} | {_mb(row, 'onnx')} | {_mb(row, 'full')} | {_mb(row, 'refittable')} | {_rest(row)}",
            flush=True,
        )


def _second_table(
    paths: dict[str, Path], kind: str, options: argparse.Namespace, report: dict[str, Any]
) -> None:
    print(f"\nmodel, batch {options.batch:4}   | ONNX MB | plan MB | ms      | of FP16: ONNX, plan, ms")
    for name in (name for name in QUANTIZED if name in paths):
        rows = {}
        for label, path in (("fp16", paths[name]), (kind, quantized(paths[name], kind))):
            row = attempt(lambda p=path, n=name: quantized_row(n, p, options.batch, options.level))  # type: ignore[misc]
            rows[label] = row
            _keep(report, f"{name} {label}", row, options.folder)
            shares = ", ".join(_share(row, rows["fp16"], key) for key in ("onnx", "plan", "ms"))
            print(
                f"{name:11} {label:5} | {_mb(row, 'onnx')} | {_mb(row, 'plan')} | {_ms(row)} | {shares}",
                flush=True,
            )


def _keep(report: dict[str, Any], name: str, row: dict[str, Any], folder: Path) -> None:
    """Written after every row, so that a run cut short leaves what it had."""
    report[name] = row
    (folder / "report.json").write_text(json.dumps(report, indent=1))


def _mb(row: dict[str, Any], key: str) -> str:
    return f"{row[key] / 1e6:7.1f}" if row.get(key) else "      –"


def _ms(row: dict[str, Any]) -> str:
    return f"{row['ms']:7.3f}" if row.get("ms") else row.get("why", "needs a GPU that runs it")


def _rest(row: dict[str, Any]) -> str:
    if "refit_seconds" in row:
        return f"{row['refit_seconds']:.2f} | {row['build_seconds']:.1f}"
    return f"– | – {row.get('why', '')}"


def _share(row: dict[str, Any], half: dict[str, Any], key: str) -> str:
    return f"{row[key] / half[key]:.1%}" if row.get(key) and half.get(key) else "–"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(124))  # so that a build under way is ended too
    sys.exit(main())
