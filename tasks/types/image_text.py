"""An image and its text in, a vector of length 1 of each out: CLIP, two graphs of one version.

The text is the image's own caption, or made of its label by `data.prompt`; a metric asks whether the two find
each other. At prediction a value has an image, a text, or both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks import types
from tasks.errors import InputError
from tasks.types import Example, Graph, Run, images, texts

if TYPE_CHECKING:
    from torch import Tensor, nn

HALVES: dict[str, Any] = {"image": images, "text": texts}
COLUMN = "pair"
REFERENCES = "inputs"
INPUTS = {**images.INPUTS, **texts.INPUTS}
OUTPUTS = {"embeddings": {0: "batch"}}
AUTO = "AutoModel"
TAKES = ("pair",)
ANSWER = {
    "image_embedding": "doubles",
    "label": "string",
    "score": "double",
    "text_embedding": "doubles",
    "truncated": "boolean",
    "similarity": "double",
}


def check(value: Any, settings: dict[str, Any]) -> None:
    """Raise InputError unless `value` is a mapping with an image, a text, or both."""
    if not isinstance(value, dict) or not value or set(value) - set(HALVES):
        raise InputError(f'expected {{"image": …, "text": …}} or one of the two, got {value!r:.80}')
    given = {name: half for name, half in value.items() if half is not None}
    if not given:
        raise InputError("neither an image nor a text is given")
    for name, half in given.items():
        HALVES[name].check(half, settings)


def encode(folder: Path, values: Sequence[Any]) -> list[Example]:
    """`pixel_values` where there is an image; `input_ids`, `attention_mask`, `truncated` where a text is."""
    examples: list[Example] = [{} for _ in values]
    for name, half in HALVES.items():
        given = [k for k, value in enumerate(values) if value.get(name) is not None]
        for k, found in zip(given, half.encode(folder, [values[k][name] for k in given]), strict=True):
            examples[k] |= found
    return examples


def collate(examples: Sequence[Example]) -> Example:
    """One batch of examples that all have the same halves."""
    batch: Example = {}
    for half in HALVES.values():
        if all(name in examples[0] for name in half.INPUTS):
            batch |= half.collate(examples)
    return batch


def size(example: Example) -> float:
    """The image's mean, after scaling; without an image, how many tokens the text has."""
    return images.size(example) if "pixel_values" in example else texts.size(example)


def example(settings: dict[str, Any]) -> dict[str, Any]:
    """Black, and any text."""
    return {name: half.example(settings) for name, half in HALVES.items()}


def smoke(folder: Path) -> list[dict[str, Any]]:
    """Two images, each with a text."""
    pairs = zip(*(half.smoke(folder) for half in HALVES.values()), strict=True)
    return [dict(zip(HALVES, pair, strict=True)) for pair in pairs]


def forward(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Both vectors, the image's before the text's: (batch, 2 * width)."""
    import torch

    return torch.cat([part.forward(model, inputs) for part in PARTS.values()], dim=1)


def image_vector(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The image's vector, of length 1."""
    return _unit(model.get_image_features(**{name: inputs[name] for name in images.INPUTS}))


def text_vector(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The text's vector, of length 1."""
    return _unit(model.get_text_features(**{name: inputs[name] for name in texts.INPUTS}))


def _unit(found: Any) -> Tensor:
    vector: Tensor = types.result(found, "pooler_output")
    unit: Tensor = vector / vector.norm(dim=1, keepdim=True).clamp(min=1e-6)
    return unit


PARTS = {
    "image": Graph(images.INPUTS, {"image_embedding": {0: "batch"}}, image_vector),
    "text": Graph(texts.INPUTS, {"text_embedding": {0: "batch"}}, text_vector),
}


def wrong(shape: tuple[int, ...], settings: dict[str, Any]) -> str:
    """Two vectors per pair."""
    return "" if len(shape) == 2 else f"the network gives {shape}, not two vectors per image and text"


def targets(batch: Example, labels: np.ndarray) -> np.ndarray:
    """The number of each text, the same for the same text."""
    return np.unique(batch["input_ids"], axis=0, return_inverse=True)[1].reshape(-1)


def scores(found: Any, targets: Tensor) -> Tensor:
    """The scaled similarity of each image and each text of the batch."""
    logits: Tensor = found.logits_per_image
    return logits


def loss(found: Any, targets: Tensor) -> Tensor:
    """CLIP's: cross entropy over the batch's texts and over its images; equal texts share a target."""
    from torch.nn.functional import cross_entropy

    same = (targets[:, None] == targets[None]).to(found.logits_per_image.dtype)
    share = same / same.sum(dim=1, keepdim=True)
    both: Tensor = cross_entropy(found.logits_per_image, share) + cross_entropy(found.logits_per_text, share)
    return both / 2


def row(output: np.ndarray, example: Example) -> np.ndarray:
    """Both vectors in one."""
    return output


def predictions(rows: Sequence[np.ndarray], takes: str) -> np.ndarray:
    """Both vectors of each pair, side by side."""
    return np.stack(rows)


def references(
    examples: Sequence[Example], labels: np.ndarray, baseline: Sequence[np.ndarray] | None
) -> np.ndarray:
    """The number of each pair's text, the same for the same text."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(e["input_ids"].tobytes(), len(numbers)) for e in examples])


def trial(labels: int) -> tuple[list[np.ndarray], np.ndarray]:
    """A few pairs, all of them right."""
    return list(np.tile(np.eye(8), (1, 2))), np.arange(8)


def traits(row: np.ndarray) -> dict[str, float]:
    """Nothing: what drifts is seen in sizes and ranges."""
    return {}


def answer(folder: Path, examples: Sequence[Example], run: Run) -> list[dict[str, Any]]:
    """Vectors; of an image also the label whose prompt is nearest, and the cosine to it as `score`."""
    told: list[dict[str, Any]] = [types.truncated(example) for example in examples]
    for name, half in HALVES.items():
        given = [k for k, found in enumerate(examples) if all(key in found for key in half.INPUTS)]
        if not given:
            continue
        vectors = np.asarray(run([_only(examples[k], half) for k in given]), dtype=np.float64)
        for k, vector in zip(given, vectors, strict=True):
            told[k][f"{name}_embedding"] = vector.tolist()
        if name == "image":
            for k, found in zip(given, _labelled(folder, vectors, run), strict=True):
                told[k] |= found
    for found in told:
        if "image_embedding" in found and "text_embedding" in found:
            found["similarity"] = float(np.dot(found["image_embedding"], found["text_embedding"]))
    return told


def _only(example: Example, half: Any) -> Example:
    return {name: example[name] for name in half.INPUTS}


def _labelled(folder: Path, vectors: np.ndarray, run: Run) -> list[dict[str, Any]]:
    """Each image's nearest label, where the version has labels."""
    settings = types.settings(folder)
    labels = settings["labels"]
    if not labels:
        return [{} for _ in vectors]
    prompts = texts.encode(folder, [prompt(settings["prompt"], label) for label in labels])
    similar = vectors @ np.asarray(run([_only(found, texts) for found in prompts]), dtype=np.float64).T
    nearest = similar.argmax(axis=1)
    return [{"label": labels[k], "score": float(found[k])} for k, found in zip(nearest, similar, strict=True)]


def prompt(template: str, label: str) -> str:
    """The text of a label: `a photo of a {label}`."""
    return template.replace("{label}", label)
