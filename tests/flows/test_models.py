"""Kinds of models through the whole pipeline, and what the registered version says to good and bad inputs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tasks import registry
from tasks.errors import InputError

if TYPE_CHECKING:
    from flows.judge import Outcome

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent.parent
Optimize = Callable[..., "Outcome"]


def served(name: str) -> tuple[Any, Callable[[Any], tuple[int, Any]]]:
    """The champion as pyfunc, and a function that posts to the app of `mlflow models serve`."""
    import mlflow
    from mlflow.pyfunc import scoring_server
    from starlette.testclient import TestClient

    registry.client()
    model = mlflow.pyfunc.load_model(f"models:/{name}@champion")
    client = TestClient(scoring_server.init(model))

    def post(inputs: Any) -> tuple[int, Any]:
        answer = client.post("/invocations", json={"inputs": inputs})
        return answer.status_code, answer.json()

    return model, post


def logged(outcome: Outcome, name: str) -> Path:
    """An artifact of the run, fetched from MLflow."""
    from mlflow.artifacts import download_artifacts

    registry.client()
    return Path(download_artifacts(f"runs:/{outcome.version.run_id}/{name}"))


@pytest.fixture(scope="module")
def embedding(embedding_recipe: Path, optimize: Optimize) -> Outcome:
    return optimize(str(embedding_recipe))


def test_embeddings_are_judged_against_the_baseline_without_a_label(embedding: Outcome) -> None:
    assert embedding.verdict == "promoted", embedding.reasons
    assert embedding.metrics["baseline_cosine"] == pytest.approx(1)
    assert 0.9 < embedding.metrics["candidate_cosine"] < 1
    rules = {rule.name for rule in embedding.attempt.verdict.rules}  # type: ignore[union-attr]
    assert "cosine_vs_baseline" in rules


def test_a_metric_of_neighbours_runs_only_what_it_affects(embedding: Outcome, optimize: Optimize) -> None:
    recipe = next(Path(embedding.attempt.dataset.facts["source"].removeprefix("path:")).parent.glob("*.yaml"))
    again = optimize(str(recipe), "gate={metric: neighbours@5, max_drop: 0.9}", "promote=manual")
    fresh = {timing.stage for timing in again.attempt.timeline if not timing.reused}
    assert fresh == {"evaluate", "gate"}
    assert again.metrics["baseline_neighbours@5"] == 1


def test_an_embedding_model_answers_one_and_many_and_names_what_is_bad(embedding: Outcome) -> None:
    import mlflow

    model, post = served("tiny-embedding")
    (one,) = model.predict(["a good film"])
    assert len(one["embedding"]) == 32
    assert np.linalg.norm(one["embedding"]) == pytest.approx(1, abs=1e-4)
    many = model.predict(["a good film"] * 150)
    np.testing.assert_allclose(many[149]["embedding"], one["embedding"], atol=1e-3)
    assert [row["truncated"] for row in model.predict(["a good film", "good " * 50])] == [False, True]

    status, content = post(["a good film"])
    assert status == 200
    np.testing.assert_allclose(content["predictions"][0]["embedding"], one["embedding"], atol=1e-3)
    with pytest.raises(InputError, match="input 1: the text is empty"):
        model.predict(["a good film", " "])
    status, content = post(["a good film", " "])
    assert (status, "input 1: the text is empty" in content["message"]) == (400, True)
    with pytest.raises(mlflow.MlflowException, match="string"):
        model.predict([1.5])
    status, content = post([])
    assert status == 400
    assert "Traceback" not in json.dumps(content["message"])


def test_a_version_holds_its_tokenizer_its_signature_and_an_example(embedding: Outcome) -> None:
    from mlflow.artifacts import download_artifacts
    from mlflow.models import get_model_info

    registry.client()
    address = f"models:/{embedding.version.model}/{embedding.version.version}"
    folder = Path(download_artifacts(address))
    assert (folder / "artifacts" / "engine" / "preprocessor" / "tokenizer.json").is_file()
    info = get_model_info(address)
    assert info.signature is not None
    assert info.signature.outputs.input_names() == ["embedding", "truncated"]
    assert info.metadata["preprocessing"]["max_length"] == 16
    assert info.saved_input_example_info is not None
    assert json.loads((folder / "input_example.json").read_text()) == ["a text of a few words"]


def test_an_image_model_names_what_is_no_image(digits: Outcome) -> None:
    import mlflow

    model, post = served("digits-cnn")
    assert len(model.predict(np.zeros((150, 1, 8, 8), np.float32))) == 150
    status, content = post(np.zeros((2, 1, 8, 8)).tolist())
    assert (status, len(content["predictions"])) == (200, 2)
    with pytest.raises(InputError, match="input 1: the image is empty or holds values that are not finite"):
        bad = np.zeros((2, 1, 8, 8), np.float32)
        bad[1, 0, 0, 0] = np.nan
        model.predict(bad)
    for value in (np.zeros((1, 3, 9, 9), np.float32), ["a cat"], np.zeros((1, 8, 8), np.float32)):
        with pytest.raises(mlflow.MlflowException, match="Failed to enforce schema"):
            model.predict(value)
    status, content = post("a cat")
    assert status == 400
    assert "Traceback" not in json.dumps(content["message"])


def test_the_example_of_a_model_of_your_own_is_promoted_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimize: Optimize
) -> None:
    """The very text of docs/models.md, with a tokenizer and reviews."""
    from tests.conftest import bert_folder, sentences

    page = (ROOT / "docs" / "models.md").read_text().split("## A model of your own")[1]
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(code.splitlines()) + len(recipe.splitlines()) < 50
    (tmp_path / "bag.py").write_text(code)
    (tmp_path / "bag.yaml").write_text(recipe)
    bert_folder(tmp_path / "tokenizer")
    sentences(tmp_path / "reviews.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    outcome = optimize("bag.yaml")
    assert outcome.verdict == "promoted", outcome.reasons
    assert outcome.metrics["candidate_accuracy"] > 0.9
    model, post = served("bag")
    texts = ["the plot was good 7", "the plot was bad 8"]
    assert [row["label"] for row in model.predict(texts)] == ["good", "bad"]
    assert [row["label"] for row in post(texts)[1]["predictions"]] == ["good", "bad"]


def test_a_language_model_is_judged_by_perplexity_and_goes_on(lm_recipe: Path, optimize: Optimize) -> None:
    """With a key/value cache, and the checkpoint for other runtimes beside it."""
    more = ("export.kv_cache=true", "export.huggingface=true", "deploy.triton=null")
    outcome = optimize(str(lm_recipe), *more)
    assert outcome.verdict == "promoted", outcome.reasons
    assert outcome.metrics["candidate_greedy_agreement"] > 0.5
    folder = logged(outcome, "huggingface")
    told = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert told["quant_algo"] == "W8A8_SQ_PER_CHANNEL"
    assert 1 < outcome.metrics["baseline_perplexity"] < 30  # of 256 bytes
    model, post = served("tiny-lm")
    told = model.predict(["the plot was", "good " * 20])
    assert [row["truncated"] for row in told] == [False, True]
    assert all(isinstance(row["text"], str) and row["text"] for row in told)
    assert post(["the plot was"])[1]["predictions"][0]["text"] == told[0]["text"]
    with pytest.raises(InputError, match="input 0: the text is empty"):
        model.predict([" "])


def test_a_diffusion_model_draws_what_its_baseline_does(optimize: Optimize) -> None:
    from PIL import Image

    outcome = optimize(
        "digits-dit-int8-ptq", "data.split={train: 128, calibration: 64, test: 64}", "gate.on_coarse=warn"
    )
    assert outcome.verdict == "promoted", outcome.reasons
    assert outcome.metrics["candidate_cosine"] > 0.99
    assert outcome.metrics["candidate_picture_error"] < 0.1
    with Image.open(logged(outcome, "pictures") / "pair.png") as pair:
        assert pair.size == (600, 196)
    model, post = served("digits-dit")
    noise = np.random.default_rng(0).normal(0.5, 0.5, (2, 1, 8, 8)).astype(np.float32) * 16
    told = model.predict(noise)
    assert [len(row["image"]) for row in told] == [64, 64]
    np.testing.assert_allclose(
        post(noise.tolist())[1]["predictions"][1]["image"], told[1]["image"], atol=1e-3
    )
    noise[1, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="input 1: the image is empty or holds values that are not finite"):
        model.predict(noise)
