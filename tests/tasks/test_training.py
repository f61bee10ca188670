"""Training itself: validation, early stopping, accumulation, a teacher, killed and resumed, processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipes import load as recipe
from recipes.compress import Distill, Finetune, Lora, Quantize, Sparsify
from tasks import batches, checkpoints, load, resume, stage, store, training, types
from tasks.artifacts import Checkpoint, Dataset
from tasks.calibrate import calibrate
from tasks.errors import InputError
from tasks.finetune import check_training, finetune
from tasks.sparsify import sparsify

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent.parent
Told = list[tuple[str, str, int, dict[str, float]]]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    data = recipe("digits-cnn-int8-ptq", ["data.split.validation=100", "data.split.test=600"]).data
    return load.load_data.fn(data, "image-classification", "content")


@pytest.fixture(scope="module")
def texts(tiny_recipe: Path) -> Dataset:
    data = recipe(str(tiny_recipe), ["data.split.validation=40"]).data
    return load.load_data.fn(data, "text-classification", "content")


@pytest.fixture(scope="module")
def compressed(text: Any, texts: Dataset) -> Checkpoint:
    """2:4 and INT8, not trained."""
    pruned = sparsify.fn(text.checkpoint, texts, Sparsify(exclude=("classifier",)))
    return calibrate.fn(pruned, texts, Quantize(format="int8", exclude=("classifier",)))


@pytest.fixture
def told() -> Iterator[Told]:
    heard: Told = []
    listener = lambda *words: heard.append(words)  # noqa: E731
    stage.listeners.append(listener)
    yield heard
    stage.listeners.remove(listener)


def state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return checkpoints.restore(checkpoint)[0].state_dict()


def validation_loss(checkpoint: Checkpoint, dataset: Dataset) -> float:
    """The mean over the validation rows, computed apart from the Trainer."""
    model, _ = checkpoints.restore(checkpoint)
    kind = types.load(dataset.type)
    encoded, labels = batches.examples(dataset, "validation", batches.preprocessor(checkpoint))
    batch = kind.collate(encoded)
    with torch.no_grad():
        found = model(**batches.tensors(batch))
    return float(kind.loss(found, torch.from_numpy(kind.targets(batch, labels))))


def test_the_validation_loss_is_taken_on_the_way_and_told(image: Any, digits: Dataset, told: Told) -> None:
    section = Finetune(epochs=2, batch_size=50, learning_rate=2e-3, evaluations=4)
    trained = finetune.fn(image.checkpoint, digits, section)
    seen = {p["step"]: p["validation_loss"] for p in trained.facts["curve"] if "validation_loss" in p}
    assert sorted(seen) == [0, 10, 20, 30, 40]
    assert seen[0] == pytest.approx(validation_loss(image.checkpoint, digits), rel=1e-5)
    assert seen[40] == pytest.approx(validation_loss(trained, digits), rel=1e-5)
    assert seen[40] < seen[0] / 2
    assert trained.facts["training"]["kept"] == "last"
    key = finetune.key(image.checkpoint, digits, section)
    assert {words[:2] for words in told} == {(key, "dense")}
    losses = [(step, values) for *_, step, values in told if "validation_loss" in values]
    assert losses == [(step, {"validation_loss": value}) for step, value in seen.items()]
    assert told[-1][2:] == (40, {})
    assert not list(resume.root().glob(f"{key}*"))


def test_early_stopping_ends_the_training_and_keeps_the_best(image: Any, digits: Dataset) -> None:
    """A learning rate that destroys what it learns first."""
    section = Finetune(
        epochs=6, batch_size=50, learning_rate=5e-2, warmup_ratio=0.5, evaluations=24, early_stopping=2
    )
    trained = finetune.fn(image.checkpoint, digits, section)
    facts = trained.facts["training"]
    assert facts["steps"] < facts["planned_steps"] == 120
    assert facts["kept"] == "best"
    assert facts["best"]["step"] == facts["steps"] - 2 * 5
    assert facts["best"]["validation_loss"] < facts["validation_loss"]["last"]
    assert validation_loss(trained, digits) == pytest.approx(facts["best"]["validation_loss"], rel=1e-5)


def test_accumulated_batches_are_one_large_batch(image: Any, digits: Dataset) -> None:
    large = Finetune(epochs=1, batch_size=40, learning_rate=2e-3)
    small = large.model_copy(update={"batch_size": 10, "accumulate": 4})
    one, other = (state(finetune.fn(image.checkpoint, digits, section)) for section in (large, small))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-5)


def test_half_precision_trains_and_keeps_full_weights(compressed: Checkpoint, texts: Dataset) -> None:
    section = Finetune(epochs=0.2, batch_size=8, learning_rate=1e-3, precision="bf16")
    half = state(finetune.fn(compressed, texts, section))
    full = state(finetune.fn(compressed, texts, section.model_copy(update={"precision": "fp32"})))
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert half[name].dtype == torch.float32
    assert not torch.equal(half[name], full[name])
    torch.testing.assert_close(half[name], full[name], rtol=0, atol=1e-2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_this_machine_cannot_train_is_said_first() -> None:
    with pytest.raises(InputError, match="fp16 needs a GPU.*bf16"):
        check_training([None, Finetune(epochs=1, precision="fp16")])
    check_training([Finetune(epochs=1, precision="bf16"), Finetune(epochs=1, processes=2)])


def inverted(checkpoint: Checkpoint) -> Checkpoint:
    """A network that says the opposite."""
    model, config = checkpoints.restore(checkpoint)
    with torch.no_grad():
        for tensor in model.get_submodule("classifier").parameters():
            tensor.neg_()
    with store.staging() as folder:
        shutil.copytree(batches.preprocessor(checkpoint), folder / "preprocessor")
        return checkpoints.save(model, config, folder, checkpoint.type, {})


def test_a_teacher_is_believed_more_than_the_labels_and_leaves_nothing_behind(
    text: Any, texts: Dataset, compressed: Checkpoint
) -> None:
    steps = Finetune(epochs=4, batch_size=8, learning_rate=2e-3)
    taught = steps.model_copy(update={"distill": Distill()})
    teacher = inverted(finetune.fn(text.checkpoint, texts, steps))
    alone, student = finetune.fn(compressed, texts, steps), finetune.fn(compressed, texts, taught, teacher)
    rows = batches.tensors(batches.samples(texts, batches.preprocessor(teacher), count=1)[0])
    with torch.no_grad():
        said = [checkpoints.restore(c)[0](**rows).logits.argmax(dim=1) for c in (alone, student, teacher)]
    assert torch.equal(said[1], said[2])
    assert torch.equal(said[1], 1 - said[0])
    assert {name: t.shape for name, t in state(student).items()} == {
        name: t.shape for name, t in state(alone).items()
    }
    counts = checkpoints.sparsity(checkpoints.restore(student)[0])
    assert counts["valid_groups"] == counts["groups"] > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lora_trains_the_adapters_alone_and_adds_them_to_the_weights(
    text: Any, texts: Dataset, precision: Any
) -> None:
    """That the merged network says what the adapted one said is checked in the training itself."""
    lora = Lora(rank=4, alpha=8, targets=("*.attention.*", "*.output.dense"), also=("classifier",))
    section = Finetune(epochs=6, batch_size=8, learning_rate=1e-2, lora=lora, precision=precision)
    trained = finetune.fn(text.checkpoint, texts, section)
    before, after = state(text.checkpoint), state(trained)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = [f"bert.encoder.layer.{k}" for k in (0, 1)]
    parts = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
    wanted = {f"{layer}.{part}.weight" for layer in layers for part in [*parts, "output.dense"]}
    assert changed == wanted | {"classifier.weight", "classifier.bias"}
    delta = after[f"{layers[0]}.output.dense.weight"] - before[f"{layers[0]}.output.dense.weight"]
    assert torch.linalg.matrix_rank(delta, rtol=1e-3) == 4
    assert validation_loss(trained, texts) < validation_loss(text.checkpoint, texts) / 2


def test_lora_that_names_no_layer_is_an_error(text: Any, texts: Dataset) -> None:
    for lora, words in (
        (Lora(targets=("*.LayerNorm",)), r"finetune.lora.targets: '\*.LayerNorm' matches no module"),
        (Lora(targets=("*",), also=("classifier",)), "classifier stands in targets and in also"),
    ):
        with pytest.raises(InputError, match=words):
            finetune.fn(text.checkpoint, texts, Finetune(epochs=1, lora=lora))


def test_adapters_that_do_not_add_up_are_an_error(
    text: Any, texts: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora.layer import Linear

    monkeypatch.setattr(Linear, "merge", lambda self, **_: None)
    lora = Lora(targets=("*.attention.*",))
    with pytest.raises(RuntimeError, match="the merged network is off by"):
        finetune.fn(text.checkpoint, texts, Finetune(epochs=0.5, batch_size=8, learning_rate=1e-2, lora=lora))


@pytest.mark.parametrize(("task", "grouped"), [("text-classification", True), ("image-text", False)])
def test_texts_of_like_length_share_a_batch_and_pairs_do_not(task: str, grouped: bool) -> None:
    from types import SimpleNamespace

    from tasks import trainer, types

    plan = SimpleNamespace(section=Finetune(epochs=1, batch_size=8))
    rows = [{"input_ids": [0] * (1 + k % 16)} for k in range(320)]
    state = SimpleNamespace(epoch=0)
    tuner: Any = SimpleNamespace(plan=plan, kind=types.load(task), train_dataset=rows, state=state)
    order = list(trainer.Order(tuner))
    assert sorted(order) == list(range(320))
    spans = [
        max(lengths) - min(lengths)
        for start in range(0, 320, 8)
        for lengths in [[len(rows[k]["input_ids"]) for k in order[start : start + 8]]]
    ]
    assert (sum(spans) / len(spans) < 4) == grouped


def test_training_that_changes_a_range_is_an_error(
    compressed: Checkpoint, texts: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks import trainer

    def spoil(self: Any) -> Any:
        self.model.bert.encoder.layer[0].intermediate.dense.input_quantizer._amax *= 2
        return trainer.Order(self)

    monkeypatch.setattr(trainer.Tuner, "_get_train_sampler", lambda self, *_: spoil(self))
    with pytest.raises(RuntimeError, match="changed the 2:4 mask, a range"):
        finetune.fn(compressed, texts, Finetune(epochs=0.1, batch_size=8))


KILLED = """
import json, sys
import flows
from recipes.compress import Finetune
from tasks.artifacts import Blob, Checkpoint, Dataset
from tasks.finetune import finetune

content = json.loads(sys.argv[1])
checkpoint, dataset = (
    kind(**{**content[name], "blob": Blob(**content[name]["blob"])})
    for kind, name in ((Checkpoint, "checkpoint"), (Dataset, "dataset"))
)
finetune.fn(checkpoint, dataset, Finetune(**content["section"]))
"""


def test_a_killed_training_goes_on_and_ends_as_if_nothing_had_been(
    compressed: Checkpoint, texts: Dataset, told: Told
) -> None:
    """Killed in the second epoch; mask and quantizers on, dropout, early stopping's memory."""
    section = Finetune(epochs=3, batch_size=8, learning_rate=1e-3, early_stopping=9, save_steps=15)
    whole = finetune.fn(compressed, texts, section)
    place = resume.root() / finetune.key(compressed, texts, section)
    assert not place.exists()
    values = {"save_steps": 15, **section.model_dump(mode="json")}
    content = {"checkpoint": asdict(compressed), "dataset": asdict(texts), "section": values}
    running = subprocess.Popen([sys.executable, "-c", KILLED, json.dumps(content)], cwd=ROOT)
    end = time.monotonic() + 120
    while not (place / "checkpoint-60.complete").exists():
        assert running.poll() is None, "training ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.002)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert place.is_dir()
    told.clear()
    again = finetune.fn(compressed, texts, section)
    assert again.facts["training"]["resumed_from_step"] >= 60
    assert min(step for *_, step, _ in told) > 60
    assert again.identity == whole.identity
    assert again.facts["curve"] == whole.facts["curve"]
    assert not place.exists()


def test_a_checkpoint_that_was_cut_off_is_not_loaded(fresh_home: Path) -> None:
    with resume.held("key") as place:
        for step in (10, 20, 30):
            folder = place / f"checkpoint-{step}"
            folder.mkdir()
            (folder / "model.safetensors").write_text(f"weights {step}")
            if step < 30:
                (place / f"checkpoint-{step}.complete").write_text(store.digest(folder))
        assert resume.last(place) == place / "checkpoint-20"
        assert not (place / "checkpoint-30").exists()
        (place / "checkpoint-20" / "model.safetensors").write_text("cut")
        assert resume.last(place) == place / "checkpoint-10"
        (place / "checkpoint-40").mkdir()
        resume.finish(place / "checkpoint-40")
        assert [p.name for p in sorted(place.iterdir())] == ["checkpoint-40", "checkpoint-40.complete"]
    assert not list(resume.root().iterdir())


@pytest.mark.parametrize("shard", ["fsdp2", pytest.param("ddp", marks=pytest.mark.long)])
def test_two_processes_train_as_one_and_keep_mask_and_ranges(
    compressed: Checkpoint, texts: Dataset, told: Told, shard: Any
) -> None:
    section = Finetune(epochs=0.5, batch_size=8, learning_rate=1e-3, processes=2, shard=shard, evaluations=2)
    trained = finetune.fn(compressed, texts, section)
    before, after = state(compressed), state(trained)
    assert before.keys() == after.keys()
    fixed = [name for name in before if name.endswith(training.FIXED)]
    assert len([name for name in fixed if name.endswith("_weight_mask")]) == 13
    assert len([name for name in fixed if name.endswith("_amax")]) > 20
    assert all(torch.equal(before[name], after[name]) for name in fixed)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert not torch.equal(before[name], after[name])
    counts = checkpoints.sparsity(checkpoints.restore(trained)[0])
    assert counts["valid_groups"] == counts["groups"] == compressed.facts["sparsity"]["groups"]
    assert [step for *_, step, values in told if "validation_loss" in values] == [0, 10, 20]
    assert trained.facts["curve"][-1]["validation_loss"] == pytest.approx(
        validation_loss(trained, texts), rel=1e-4
    )


FSDP_ON_A_CPU = """
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
print(Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2)).distributed_type)
"""


def test_upstream_accelerate_takes_ddp_for_fsdp_on_cpus() -> None:
    """When this fails, `shards.accelerate_takes_ddp_for_fsdp_on_cpus` may go."""
    alone = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    command = [sys.executable, "-c", FSDP_ON_A_CPU]
    done = subprocess.run(command, env=os.environ | alone, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "DistributedType.MULTI_CPU", done.stderr


def test_upstream_kdtrainer_drops_a_classifier_s_last_row() -> None:
    """When this fails, ModelOpt's trainer may do what `Tuner` does with a teacher."""
    from modelopt.torch.distill.losses import LogitsDistillationLoss
    from modelopt.torch.distill.plugins.huggingface import KDTrainer

    def loss(last: float) -> float:
        student, teacher = torch.zeros(4, 2), torch.ones(4, 2)
        student[-1, 0] = last
        trainer = SimpleNamespace(
            _kd_criterion=LogitsDistillationLoss(reduction="none"),
            _last_teacher_outputs=SimpleNamespace(logits=teacher),
        )
        found = SimpleNamespace(logits=student)
        return float(KDTrainer._standard_kd_loss(trainer, found, torch.zeros(4, dtype=torch.long)))

    assert loss(0.0) == loss(100.0)


def test_a_training_that_goes_on_keeps_its_run_in_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks import registry
    from tasks.registry_training import live

    def losses(run: Any) -> dict[int, float]:
        history = registry.client().get_metric_history(run.info.run_id, "loss")
        assert len(history) == len({point.step for point in history})
        return {point.step: point.value for point in history}

    with pytest.raises(KeyboardInterrupt), live("on and off"):
        for step in (1, 2, 3):
            stage.tell("a key", "2:4", step, {"loss": 1 / step})
        raise KeyboardInterrupt
    place = registry.client().get_experiment_by_name("enginehouse-training").experiment_id
    (run,) = registry.client().search_runs([place], "tags.training = 'a key'")
    assert run.info.status == "FAILED"
    with live("on and off"):
        for step in (2, 3, 4):
            stage.tell("a key", "2:4", step, {"loss": 1 / step})
        assert registry.client().get_run(run.info.run_id).info.status == "RUNNING"
        stage.tell("a key", "2:4", 4, {})
    (run,) = registry.client().search_runs([place], "tags.training = 'a key'")
    assert run.info.status == "FINISHED"
    assert losses(run) == {step: 1 / step for step in (1, 2, 3, 4)}

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with live("nobody answers"):
        stage.tell("another key", "2:4", 1, {"loss": 1.0})
        assert not stage.listeners
