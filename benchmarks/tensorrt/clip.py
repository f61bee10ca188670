"""CLIP ViT-L/14's encoders as ONNX, from configuration with random weights: size and speed only."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

IMAGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "projection_dim": 768,
}
TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
LARGER_TEXT = {**TEXT, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
LARGER_TEXT |= {"num_attention_heads": 20, "projection_dim": 1280}


class _Image(torch.nn.Module):
    """Pixels (float32) to embeddings (float32), whatever the weights' type."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        made = CLIPVisionConfig(**config)
        made._attn_implementation = "eager"
        self.model = CLIPVisionModelWithProjection(made)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        kind = self.model.visual_projection.weight.dtype
        found: torch.Tensor = self.model(pixel_values=pixels.to(kind)).image_embeds.float()
        return found


class _Text(torch.nn.Module):
    """Token ids and mask (int64) to embeddings (float32)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        made = CLIPTextConfig(**config)
        made._attn_implementation = "eager"
        self.model = CLIPTextModelWithProjection(made)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask
        ).text_embeds.float()
        return found


def build(kind: str, config: dict[str, Any], seed: int = 0) -> torch.nn.Module:
    """The encoder with random weights of this seed.

    Biases and norms are random too: the exporter merges equal tensors, so that an untrained model's
    zeros and ones would give another graph than a trained one's.
    """
    torch.manual_seed(seed)
    model = (_Image(config) if kind == "image" else _Text(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def inputs(kind: str, config: dict[str, Any], batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    """One batch of random pixels, or of random token ids under a full mask."""
    random = np.random.default_rng(seed)
    if kind == "image":
        side = config["image_size"]
        return {"pixels": random.standard_normal((batch, 3, side, side), dtype=np.float32)}
    length = config["max_position_embeddings"]
    ids = random.integers(1, config["vocab_size"] - 1, (batch, length))
    return {"input_ids": ids, "attention_mask": np.ones((batch, length), np.int64)}


def export(
    model: torch.nn.Module, feed: dict[str, np.ndarray], path: Path, opset: int, *, dynamic: bool = True
) -> None:
    """Write ONNX (TorchScript exporter, dynamic batch), constants folded."""
    where = next(model.parameters()).device
    args = tuple(torch.from_numpy(array).to(where) for array in feed.values())
    axes = {name: {0: "batch"} for name in (*feed, "embeds")} if dynamic else None
    with torch.no_grad():
        torch.onnx.export(
            model,
            args,
            str(path),
            input_names=list(feed),
            output_names=["embeds"],
            dynamic_axes=axes,
            opset_version=opset,
            dynamo=False,
        )


def run(model: torch.nn.Module, feed: dict[str, np.ndarray]) -> np.ndarray:
    """What PyTorch computes."""
    where = next(model.parameters()).device
    with torch.no_grad():
        out: np.ndarray = model(*(torch.from_numpy(array).to(where) for array in feed.values())).cpu().numpy()
    return out


def calibrate(model: torch.nn.Module, feed: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest input of each Linear, under the name its MatMul or Gemm has in the exported graph."""
    amax: dict[str, float] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            hooks.append(module.register_forward_pre_hook(_watch(name, amax)))
    run(model, feed)
    for hook in hooks:
        hook.remove()
    return {f"/{name.replace('.', '/')}": value for name, value in amax.items()}


def _watch(name: str, amax: dict[str, float]) -> Callable[..., None]:
    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        amax[name] = max(amax.get(name, 0.0), float(args[0].abs().max()))

    return hook


def by_node(amax: dict[str, float], nodes: list[str]) -> dict[str, float]:
    """The calibration under full node names: "/model/…/layers.3/…/q_proj/MatMul"."""
    plain = {name.replace(".", "/").rsplit("/", 1)[0]: name for name in nodes}
    return {plain[name]: value for name, value in amax.items() if name in plain}


def evidence(folder: Path, batch: int, layers: int) -> None:
    """What the H100 evidence needs: two trainings in FP32 and FP16 (opset 17), inputs, references."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**IMAGE, "num_hidden_layers": layers}
    where = "cuda" if torch.cuda.is_available() else "cpu"
    feed = inputs("image", config, batch)
    for seed, name in ((0, "first"), (1, "second")):
        model = build("image", config, seed).to(where)
        np.savez(folder / f"{name}.npz", embeds=run(model, feed))
        (folder / f"amax-{name}.json").write_text(json.dumps(calibrate(model, feed)))
        _export_to(model, config, folder / f"fp32-{name}")
        _export_to(model.half(), config, folder / name)
    np.savez(folder / "inputs.npz", pixels=feed["pixels"])
    (folder / "done").write_text(f"{torch.__version__} {where} {batch} {layers}")


def _export_to(model: torch.nn.Module, config: dict[str, Any], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    export(model, inputs("image", config, 2), folder / "model.onnx", 17)


if __name__ == "__main__":
    evidence(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
