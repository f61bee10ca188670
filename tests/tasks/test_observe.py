"""Calibration rows run once: what was seen of them serves every format that goes by it, and is ModelOpt's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recipes.compress import Quantize
from tasks import batches, checkpoints, layers
from tasks import calibrate as calibrate_module
from tasks.artifacts import Checkpoint
from tasks.calibrate import calibrate, needs, quant_config
from tasks.observe import observe, read

RANGES = ({"format": "int8"}, {"format": "fp8"}, {"format": "w4a8", "block_size": 32})
HISTOGRAMS = (
    {"format": "int8", "algorithm": "percentile", "percentile": 99.0},
    {"format": "int8", "algorithm": "percentile", "percentile": 99.9},
)
ITSELF = (
    {"format": "int8", "algorithm": "smoothquant"},
    {"format": "fp8", "attention": True},
    {"format": "int4", "algorithm": "awq"},
    {"format": "int4"},
    {"format": "int8-weight-only"},
)


def ends(model: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name in checkpoints.quantizers(model):
        quantizer = model.get_submodule(name)
        for k, part in enumerate(list(quantizer.children()) or [quantizer]):
            found[f"{name}.{k}"] = part.amax
    return found


def of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return ends(checkpoints.restore(checkpoint)[0])


@pytest.mark.parametrize("given", RANGES, ids=lambda given: given["format"])
def test_ranges_are_those_of_modelopts_own_calibration(text: Any, given: dict[str, Any]) -> None:
    import modelopt.torch.quantization as mtq

    section = Quantize(**given)
    seen = observe.fn(text.checkpoint, text.dataset, section.batch_size, "ranges")
    found = of(calibrate.fn(text.checkpoint, text.dataset, section, seen))
    model, _ = checkpoints.restore(text.checkpoint)
    loop = batches.forward_loop(text.dataset, batches.preprocessor(text.checkpoint), 32, "own")
    with torch.no_grad():
        own = ends(mtq.quantize(model, quant_config(section, layers.quantizable(model)), loop))
    assert found.keys() == own.keys()
    assert sum(name.endswith("input_quantizer.0") for name in found) >= 10
    for name, end in found.items():
        assert torch.equal(end, own[name]), name


def test_what_was_seen_once_serves_every_format(text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {
        kind: observe.fn(text.checkpoint, text.dataset, 32, kind)  # type: ignore[arg-type]
        for kind in ("ranges", "histograms")
    }
    alone = [of(calibrate.fn(text.checkpoint, text.dataset, Quantize(**given))) for given in HISTOGRAMS]

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("the rows ran again")

    monkeypatch.setattr(calibrate_module.batches, "forward_loop", lambda *_a, **_k: forbidden)
    monkeypatch.setattr(calibrate_module.observe, "observed", forbidden)
    for given in (*RANGES, *HISTOGRAMS):
        section = Quantize(**given)
        kind = needs(section)
        assert kind
        found = of(calibrate.fn(text.checkpoint, text.dataset, section, seen[kind]))
        if given in HISTOGRAMS:
            assert all(torch.equal(end, alone[HISTOGRAMS.index(given)][name]) for name, end in found.items())
    lower, higher = alone
    cut = [n for n in lower if n.endswith("input_quantizer.0") and lower[n] < higher[n]]
    assert cut, "99 % and 99.9 % of the values end somewhere else"


@pytest.mark.parametrize("given", ITSELF, ids=str)
def test_who_needs_more_or_nothing_is_not_served_by_it(given: dict[str, Any]) -> None:
    assert needs(Quantize(**given)) is None


def test_weights_alone_need_no_rows(text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_model: Any) -> None:
        raise AssertionError("the rows ran")

    monkeypatch.setattr(calibrate_module.batches, "forward_loop", lambda *_a, **_k: forbidden)
    found = of(calibrate.fn(text.checkpoint, text.dataset, Quantize(format="int8-weight-only")))
    assert found
    assert all(end is not None for end in found.values())


def test_observations_of_padded_and_folded_layers_name_them(image: Any) -> None:
    found = read(observe.fn(image.checkpoint, image.dataset, 16, "ranges"))
    model, _ = checkpoints.restore(image.checkpoint)
    assert set(found) == set(layers.quantizable(model))
    assert all(end.shape == () and end > 0 for end in found.values())
