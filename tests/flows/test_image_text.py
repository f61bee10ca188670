"""A tiny CLIP through the whole pipeline: two graphs, two engines, one version, one gate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tasks import deploy, drift, load, registry, store
from tasks.artifacts import Engine
from tasks.build import host, machine
from tasks.engines import module
from tasks.engines.together import parts_of
from tasks.errors import InputError
from tasks.refit import refit

if TYPE_CHECKING:
    from flows.judge import Outcome

pytestmark = pytest.mark.slow
Optimize = Callable[..., "Outcome"]


@pytest.fixture(scope="module")
def clip(clip_recipe: Path, optimize: Optimize) -> Outcome:
    return optimize(str(clip_recipe))


def engine_of(outcome: Outcome) -> Engine:
    assert outcome.attempt is not None
    return outcome.attempt.engines["candidate"]


def sides(count: int) -> list[np.ndarray]:
    """Bright on the left, then on the right, and so on."""
    pictures = np.full((count, 1, 8, 8), 50.0)
    pictures[0::2, :, :, :4] = 170
    pictures[1::2, :, :, 4:] = 170
    return list(pictures)


def test_one_gate_judges_both_engines(clip: Outcome) -> None:
    assert clip.verdict == "promoted", clip.reasons
    assert clip.metrics["candidate_image-to-text@1"] > 0.9
    engine = engine_of(clip)
    assert engine.proved == "executed"
    assert engine.weights is not None
    for blob in (engine.plan.blob, engine.weights, clip.attempt.onnx["candidate"].blob):  # type: ignore[union-attr]
        assert parts_of(store.path(blob)) == ["image", "text"]
    shares = [facts["proof"]["quantized_share"] for facts in engine.facts["parts"].values()]
    assert engine.facts["proof"]["quantized_share"] == min(shares) > 0.5
    sizes = [sum(f.stat().st_size for f in store.path(b).rglob("*") if f.is_file()) for b in
             (engine.plan.blob, engine.weights)]  # fmt: skip
    assert clip.metrics["candidate_bytes"] == sum(sizes)


def test_every_layer_of_the_vision_tower_is_quantized(clip: Outcome) -> None:
    """ModelOpt's own defaults leave vision towers out by name."""
    from safetensors import safe_open

    counts = clip.attempt.checkpoints["candidate"].facts["quantizers"]  # type: ignore[union-attr]
    assert not [name for name in counts["left_out"] if "vision" in name and "position" not in name]
    weights = engine_of(clip).weights
    assert weights is not None
    (file,) = (store.path(weights) / "image").glob("*.safetensors")
    with safe_open(file, "numpy") as held:
        kinds = {name: held.get_slice(name).get_dtype() for name in held.keys()}  # noqa: SIM118
    integers = [name for name, kind in kinds.items() if kind in ("I8", "U8") and "weight" in name]
    assert len(integers) >= 14  # patches, 2 layers of 6, projection


def test_parity_is_that_of_the_worse_engine(clip: Outcome) -> None:
    from tasks.evaluate import evaluate

    assert clip.attempt is not None
    recipe, onnx = clip.attempt.recipe, clip.attempt.onnx

    def parity(image: str, text: str) -> float:
        with store.staging() as folder:
            for part, source in (("image", image), ("text", text)):
                shutil.copytree(store.path(onnx[source].blob) / part, folder / part)
            model = replace(onnx["candidate"], blob=store.commit(folder))
        here = machine("onnxruntime")
        args = (clip.attempt.dataset, recipe.gate.metric, "", here)  # type: ignore[union-attr]
        return evaluate.fn(engine_of(clip), model, *args).values["parity"]

    image, text = parity("baseline", "candidate"), parity("candidate", "baseline")
    assert image != text
    assert parity("baseline", "baseline") == min(image, text) < parity("candidate", "candidate")


def test_the_version_answers_images_texts_and_pairs(clip: Outcome) -> None:
    import mlflow

    registry.client()
    model = mlflow.pyfunc.load_model("models:/tiny-clip@champion")
    left, right = sides(2)
    rows = [
        {"image": left.tolist(), "text": "a photo of a left"},
        {"image": right.tolist(), "text": None},
        {"image": None, "text": "a photo of a right " * 5},
    ]
    both, image, text = model.predict(rows)
    assert [both["label"], image["label"]] == ["left", "right"]
    assert both["similarity"] == pytest.approx(both["score"], abs=1e-3)
    assert np.linalg.norm(image["image_embedding"]) == pytest.approx(1, abs=1e-3)
    assert (both["truncated"], text["truncated"]) == (False, True)
    assert set(text) == {"text_embedding", "truncated"}
    assert len(model.predict([{"image": x.tolist(), "text": None} for x in sides(150)])) == 150

    many = deploy.predict("tiny-clip", [{"image": left}, {"text": "a photo of a left"}])
    np.testing.assert_allclose(many[0]["image_embedding"], both["image_embedding"], atol=2e-2)
    for bad, words in (
        ("a cat", 'input 0: expected {"image": …, "text": …}'),
        ({"image": None, "text": None}, "input 0: neither an image nor a text"),
        ({"image": "a cat"}, "input 0: expected an image as an array of numbers"),
        ({"image": np.zeros((3, 9, 9))}, "input 0: expected an image of shape"),
        ({"text": " "}, "input 0: the text is empty"),
        ({"picture": left}, "input 0: expected"),
    ):
        with pytest.raises(InputError, match=words):
            deploy.predict("tiny-clip", [bad])


def test_the_server_answers_and_refuses(clip: Outcome) -> None:
    import mlflow
    from mlflow.pyfunc import scoring_server
    from starlette.testclient import TestClient

    registry.client()
    client = TestClient(scoring_server.init(mlflow.pyfunc.load_model("models:/tiny-clip@champion")))
    (left,) = sides(1)
    good = client.post("/invocations", json={"dataframe_records": [{"image": left.tolist()}]})
    assert (good.status_code, good.json()["predictions"][0]["label"]) == (200, "left")
    bad = client.post("/invocations", json={"dataframe_records": [{"image": [[[1.0]]]}]})
    assert bad.status_code == 400
    assert "input 0: expected an image of shape (1, 8, 8)" in bad.json()["message"]
    assert "Traceback" not in json.dumps(bad.json()["message"])


def test_triton_gets_a_model_for_each_part(clip: Outcome) -> None:
    place = deploy.root() / "triton"
    version = clip.version.version
    for part, name in (("image", "pixel_values"), ("text", "input_ids")):
        folder = place / f"tiny-clip~{part}"
        text = (folder / "config.pbtxt").read_text()
        assert f'name: "tiny-clip~{part}"' in text
        assert f'name: "{name}"' in text
        assert f'name: "{part}_embedding"' in text
        assert (folder / version / "model.onnx").is_file()
    assert not (place / "tiny-clip").exists()
    folder = deploy.root() / "tiny-clip" / "versions" / version
    assert deploy.damage(folder) is None


def test_the_champions_plans_take_new_weights(clip: Outcome) -> None:
    assert clip.attempt is not None
    attempt = clip.attempt
    tried = refit.fn(
        attempt.onnx["candidate"], attempt.checkpoints["candidate"], attempt.dataset, engine_of(clip),
        host("onnxruntime"),
    )  # fmt: skip
    assert tried.engine is not None, tried.why
    assert tried.engine.weights == engine_of(clip).weights
    other = refit.fn(
        attempt.onnx["baseline"], attempt.checkpoints["candidate"], attempt.dataset, engine_of(clip),
        host("onnxruntime"),
    )  # fmt: skip
    assert other.engine is None
    assert "the graph is another one" in other.why


def test_drift_counts_in_both(clip: Outcome) -> None:
    assert clip.attempt is not None
    seen = drift.survey.fn(engine_of(clip), None, clip.attempt.dataset, "calibration", "here")
    found = drift.loaded(seen)
    assert len(found["size"]) == 32
    assert any("vision_model" in name for name in found["overflow"])
    assert any("text_model" in name for name in found["overflow"])


def test_drift_is_seen_in_images_that_come_alone(clip: Outcome, tmp_path: Path) -> None:
    assert clip.attempt is not None
    bright = [{"image": picture[0].tolist()} for picture in sides(40)]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, bright)))
    section = clip.attempt.recipe.data.model_copy(update={"source": f"path:{tmp_path / 'new.jsonl'}"})
    new = load.load_inputs.fn(section, "image-text", "content")
    found = drift.loaded(drift.survey.fn(engine_of(clip), None, new, "inputs", "here"))
    assert len(found["size"]) == 40
    assert not [name for name in found["overflow"] if "text_model" in name]


@pytest.mark.long
@pytest.mark.skipif(module("tensorrt-rtx").version("tensorrt_rtx") is None, reason="TensorRT-RTX")
def test_fp8_captions_and_tensorrt(clip_recipe: Path, optimize: Optimize) -> None:
    """FP8 by captions of their own; the plan is built and waits for a GPU."""
    if module("tensorrt-rtx").executes("tensorrt_rtx"):
        pytest.skip("this GPU runs it")
    captions = ("data.text=caption", "data.prompt=null", "data.label=null", "data.labels=[]")
    outcome = optimize(
        str(clip_recipe), "model.name=tiny-clip-fp8", "quantize.format=fp8", "build.runtime=tensorrt-rtx",
        *captions,
    )  # fmt: skip
    assert outcome.verdict == "built"
    assert parts_of(store.path(engine_of(outcome).plan.blob)) == ["image", "text"]
    assert outcome.attempt is not None
    facts = outcome.attempt.onnx["candidate"].facts
    assert facts["tensors"]["FLOAT8E4M3FN"] >= 28
