"""A language model's key/value cache: in the graph, in the engine, in what the registered model answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import recipes
from recipes.build import Build, Export
from recipes.compress import Quantize
from tasks import batches, checkpoints, load, store, types
from tasks.agreement import agreement
from tasks.artifacts import Checkpoint, Dataset, OnnxModel
from tasks.build import build
from tasks.cache import with_cache
from tasks.calibrate import calibrate
from tasks.engines import onnxruntime
from tasks.engines.common import PAST, PRESENT
from tasks.errors import InputError
from tasks.evaluate import run
from tasks.export import export
from tasks.predictor import Runner

TASK = "causal-lm"
KIND: Any = types.load(TASK)
CACHED = Export(opset=21, kv_cache=True)


@pytest.fixture(scope="module")
def case(lm_recipe: Path) -> tuple[Dataset, Checkpoint]:
    """The rows, and the network as it starts, in INT8."""
    recipe = recipes.load(str(lm_recipe))
    dataset = load.load_data.fn(recipe.data, TASK, "content")
    start = load.load_model.fn(recipe.model, recipe.data, TASK, "content", 0)
    return dataset, calibrate.fn(start, dataset, Quantize(format="int8", exclude=("lm_head",)))


@pytest.fixture(scope="module")
def graph(case: tuple[Dataset, Checkpoint]) -> OnnxModel:
    dataset, checkpoint = case
    return export.fn(checkpoint, dataset, CACHED, "fp32")


def opened(model: OnnxModel) -> Any:
    return onnxruntime.open(store.path(model.blob), None, level="disabled")


def texts(case: tuple[Dataset, Checkpoint]) -> list[types.Example]:
    return KIND.encode(batches.preprocessor(case[1]), ["a good", "very bad film and plot", "the"])


def test_the_cache_is_named_and_of_any_length(graph: OnnxModel) -> None:
    with opened(graph) as session:
        past = {name: shape for name, shape in session.inputs.items() if name.startswith(PAST)}
        assert past == {
            f"{PAST}{layer}.{part}": ("float32", (None, 2, None, 32))
            for layer in range(2)
            for part in ("key", "value")
        }
        assert session.outputs == ["logits", *(PRESENT + name.removeprefix(PAST) for name in past)]


def test_several_steps_compute_what_pytorch_does_with_and_without_a_cache(
    case: tuple[Dataset, Checkpoint], graph: OnnxModel
) -> None:
    """Texts of unlike length: the padding in their middle changes nothing."""
    network, _ = checkpoints.restore(case[1])
    ids = [example["input_ids"] for example in texts(case)]
    feed = KIND.collate(texts(case))
    new = np.array([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])
    with opened(graph) as session:
        found = session.run(feed)
        for row, text in enumerate(ids):
            np.testing.assert_allclose(
                found["logits"][row, : len(text)], whole(network, text), rtol=1e-3, atol=1e-4
            )
        for step in range(new.shape[1]):
            past = {PAST + n.removeprefix(PRESENT): a for n, a in found.items() if n.startswith(PRESENT)}
            mask = np.concatenate([feed["attention_mask"], np.ones((3, 1), np.int64)], axis=1)
            feed = {"input_ids": new[:, step : step + 1], "attention_mask": mask, **past}
            found = session.run(feed)
            assert found["present.0.key"].shape[2] == mask.shape[1]
            for row, text in enumerate(ids):
                wanted = whole(network, np.concatenate([text, new[row, : step + 1]]))
                np.testing.assert_allclose(found["logits"][row, 0], wanted[-1], rtol=1e-3, atol=1e-4)
    with_torch_s_own_cache(network, ids[1], new[1], found["logits"][1, 0])


def whole(network: Any, ids: np.ndarray) -> np.ndarray:
    """PyTorch, without a cache, one text at a time."""
    with torch.no_grad():
        return network(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()


def with_torch_s_own_cache(network: Any, ids: np.ndarray, new: np.ndarray, wanted: np.ndarray) -> None:
    with torch.no_grad():
        found = network(input_ids=torch.from_numpy(ids)[None], use_cache=True)
        for token in new:
            found = network(
                input_ids=torch.tensor([[token]]), past_key_values=found.past_key_values, use_cache=True
            )
    np.testing.assert_allclose(found.logits[0, 0].numpy(), wanted, rtol=1e-3, atol=1e-4)


def test_the_losses_are_those_of_the_graph_without_a_cache(
    case: tuple[Dataset, Checkpoint], graph: OnnxModel
) -> None:
    dataset, checkpoint = case
    plain = export.fn(checkpoint, dataset, Export(opset=21), "fp32")
    encoded, _ = batches.examples(dataset, "test", batches.preprocessor(checkpoint))
    with opened(graph) as ours, opened(plain) as theirs:
        for one, other in zip(run(ours, TASK, encoded[:40]), run(theirs, TASK, encoded[:40]), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_the_engine_goes_on_with_pytorch_s_tokens(case: tuple[Dataset, Checkpoint], graph: OnnxModel) -> None:
    """The built engine reads a text once, then token by token, and says what the network says."""
    dataset, checkpoint = case
    engine = build.fn(graph, checkpoint, dataset, Build(), "onnxruntime", "")
    assert engine.proved == "executed"
    told = agreement.fn(engine, checkpoint, dataset, "")
    assert told.values["greedy_agreement"] > 0.5  # of an untrained network, whose logits are nearly equal
    assert told.facts["tokens"] == 32
    network, _ = checkpoints.restore(checkpoint)
    with opened(graph) as session:
        found = KIND.generate(texts(case), Runner(session, KIND))
    for example, tokens in zip(texts(case), found, strict=True):
        ids = torch.from_numpy(example["input_ids"])[None]
        with torch.no_grad():
            wanted = network.generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=None)
        assert tokens.tolist() == wanted[0, ids.shape[1] :].tolist()
    plan, weights = store.path(engine.plan.blob), engine.weights and store.path(engine.weights)
    with onnxruntime.open(plan, weights) as session:
        lengths: list[int] = []

        class Counting(Runner):
            def step(self, feed: types.Example) -> types.Example:
                lengths.append(feed["input_ids"].shape[1])
                return super().step(feed)

        rows = KIND.answer(batches.preprocessor(checkpoint), texts(case), Counting(session, KIND))
    longest = max(len(example["input_ids"]) for example in texts(case))
    assert lengths == [longest] + [1] * 31
    assert [row["truncated"] for row in rows] == [False] * 3


@pytest.mark.long
def test_tokens_that_differ_are_counted(case: tuple[Dataset, Checkpoint]) -> None:
    """An engine of another network agrees with this one by chance at most."""
    dataset, checkpoint = case
    network, config = checkpoints.restore(checkpoint)
    with torch.no_grad():
        network.lm_head.weight.copy_(network.lm_head.weight.roll(1, dims=0))
    with store.staging() as folder:
        (folder / "preprocessor").mkdir()
        for file in batches.preprocessor(checkpoint).iterdir():
            (folder / "preprocessor" / file.name).write_bytes(file.read_bytes())
        other = checkpoints.save(network, config, folder, TASK, checkpoint.facts)
    model = export.fn(other, dataset, CACHED, "fp32")
    engine = build.fn(model, other, dataset, Build(), "onnxruntime", "")
    assert agreement.fn(engine, checkpoint, dataset, "").values["greedy_agreement"] < 0.5


def test_a_cache_that_cannot_be_exported_is_told(case: tuple[Dataset, Checkpoint]) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sample = KIND.collate(texts(case))
    sliding = MistralForCausalLM(
        MistralConfig(
            vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, sliding_window=4,
        )
    )  # fmt: skip
    with pytest.raises(InputError, match="MistralForCausalLM has a cache of DynamicSlidingWindowLayer"):
        with_cache(sliding, KIND, sample)
    with pytest.raises(InputError, match="not a language model of transformers"):
        with_cache(torch.nn.Linear(2, 2), KIND, sample)


@pytest.mark.parametrize(
    ("recipe", "overrides", "words"),
    [
        ("digits-cnn-int8-ptq", ["export.kv_cache=true"], "export.kv_cache is for task causal-lm"),
        ("digits-cnn-int8-ptq", ["export.huggingface=true"], "export.huggingface is for task causal-lm"),
        (
            "bytes-llama-int4-cache",
            ["build.also=[tensorrt-rtx]"],
            "only ONNX Runtime's engine is fed a cache",
        ),
        ("bytes-llama-int4-cache", ["deploy={}"], "set deploy.triton: null"),
        ("bytes-llama-fp8-ptq", ["quantize={format: w4a8}", "export.opset=21"], "are fp8, int4, int8"),
        ("bytes-llama-fp8-ptq", ["quantize.embeddings=true"], "set quantize.embeddings: false"),
    ],
)
def test_a_recipe_that_cannot_be_exported_so_is_told(recipe: str, overrides: list[str], words: str) -> None:
    with pytest.raises(recipes.RecipeError, match=words):
        recipes.load(recipe, overrides)
