"""The serving folder with real INT8 engines: proved, switched at once, asked, switched back; and Triton's."""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipes.build import Build, Export
from recipes.compress import Quantize
from recipes.schema import Deploy, Triton
from tasks import deploy, load, store, triton
from tasks.artifacts import Checkpoint, Dataset, Engine
from tasks.build import build, host
from tasks.calibrate import calibrate
from tasks.engines.lowering.split import WEIGHTS, WEIGHTS_INDEX, sha256
from tasks.errors import InputError
from tasks.export import export
from tasks.predictor import Predictor

MODEL, PLAIN = "tiny", Deploy()


def engine_of(checkpoint: Checkpoint, dataset: Dataset) -> Engine:
    candidate = calibrate.fn(checkpoint, dataset, Quantize(format="int8"))
    model = export.fn(candidate, dataset, Export(), "fp32")
    return build.fn(model, candidate, dataset, Build(), "onnxruntime", host("onnxruntime"))


@pytest.fixture(scope="session")
def engines(image: Any) -> list[Engine]:
    """Two trainings of one network: the same plan, other weights."""
    data = (image.model, image.data, "image-classification", "content")
    checkpoints = [load.load_model.fn(*data, seed) for seed in (0, 1)]
    return [engine_of(checkpoint, image.dataset) for checkpoint in checkpoints]


@pytest.fixture(scope="session")
def of_texts(text: Any) -> Engine:
    return engine_of(text.checkpoint, text.dataset)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENGINEHOUSE_SERVING", str(tmp_path / "serving"))
    return tmp_path / "serving"


def put(version: str, engine: Engine, section: Deploy = PLAIN) -> deploy.Switched:
    deploy.prepare(MODEL, version, engine, 64, section, None)
    return deploy.switch(MODEL, version, section)


def answer() -> list[float]:
    return [row["score"] for row in deploy.predict(MODEL, [np.linspace(0, 16, 64), np.zeros((8, 8))])]


def test_a_version_is_laid_out_proved_and_switched_to(engines: list[Engine], folder: Path) -> None:
    with pytest.raises(InputError, match="no version of tiny is deployed"):
        deploy.predict(MODEL, [np.zeros(64)])
    deploy.prepare(MODEL, "1", engines[0], 64, PLAIN, None)
    assert deploy.current(MODEL) is None
    assert not (folder / "triton" / MODEL / "config.pbtxt").exists()
    done = deploy.switch(MODEL, "1", PLAIN)
    assert (done.before, done.after, deploy.current(MODEL)) == (None, "1", "1")
    first = answer()
    assert put("2", engines[1]).before == "1"
    assert answer() != first
    assert deploy.switch(MODEL, "1", PLAIN).after == "1"
    assert answer() == first
    assert os.readlink(folder / MODEL / "current") == "versions/1"
    with pytest.raises(InputError, match="input 0: "):
        deploy.predict(MODEL, ["text"])


def test_only_the_last_versions_are_kept(engines: list[Engine], folder: Path) -> None:
    for version in ("1", "2", "3"):
        put(version, engines[0], Deploy(keep=2))
    assert {p.name for p in (folder / MODEL / "versions").iterdir()} == {"2", "3"}
    assert {p.name for p in (folder / "triton" / MODEL).iterdir()} >= {"2", "3", "config.pbtxt", "warmup"}
    assert not (folder / "triton" / MODEL / "1").exists()
    assert not list((folder / "triton" / MODEL / "warmup").glob("1-*"))
    put("2", engines[0], Deploy(keep=2))
    put("4", engines[0], Deploy(keep=2))
    assert {p.name for p in (folder / MODEL / "versions").iterdir()} == {"2", "4"}  # those that served last


def test_a_failing_smoke_request_brings_the_last_version_back(engines: list[Engine], folder: Path) -> None:
    put("1", engines[0])
    before, config = answer(), (folder / "triton" / MODEL / "config.pbtxt").read_text()
    deploy.prepare(MODEL, "2", engines[1], 64, PLAIN, None)
    smoke = folder / MODEL / "versions" / "2" / deploy.SMOKE
    smoke.write_text(json.dumps((np.asarray(json.loads(smoke.read_text())) + 1).tolist()))
    with pytest.raises(deploy.Unfit, match="a smoke request through .* was answered"):
        deploy.switch(MODEL, "2", PLAIN)
    assert deploy.current(MODEL) == "1"
    assert answer() == before
    assert (folder / "triton" / MODEL / "config.pbtxt").read_text() == config
    weights = folder / MODEL / "versions" / "2" / "weights" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    assert not deploy.intact(MODEL, "2", engines[1].digests)
    put("2", engines[1])  # laid out again
    assert deploy.current(MODEL) == "2"


def test_a_folder_of_the_same_number_and_another_engine_is_laid_out_again(engines: list[Engine]) -> None:
    put("1", engines[1])
    wanted = answer()
    put("1", engines[0])
    assert answer() != wanted
    assert deploy.intact(MODEL, "1", engines[0].digests)
    assert not deploy.intact(MODEL, "1", engines[1].digests)
    put("1", engines[1])
    assert answer() == wanted


def test_what_is_laid_out_is_on_the_disk(
    engines: list[Engine], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync = set(), os.fsync

    def noting(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noting)
    put("1", engines[0])
    for place in (folder / MODEL / "versions", folder / "triton" / MODEL / "1"):
        found = [place, *place.rglob("*")]
        assert len(found) > 2
        assert not [path for path in found if path.stat().st_ino not in synced]


def test_an_engine_that_answers_nonsense_is_never_switched_to(engines: list[Engine], tmp_path: Path) -> None:
    put("1", engines[0])
    weights = engines[1].weights
    assert weights is not None
    broken = tmp_path / "weights"
    shutil.copytree(store.path(weights), broken)
    content = bytearray((broken / WEIGHTS).read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start : start + 4096] = np.full(1024, np.nan, np.float32).tobytes()  # wide types come first
    (broken / WEIGHTS).write_bytes(content)
    index = json.loads((broken / WEIGHTS_INDEX).read_text())
    (broken / WEIGHTS_INDEX).write_text(json.dumps({**index, "sha256": sha256(broken / WEIGHTS)}))
    poor = replace(engines[1], weights=store.commit(broken))
    with pytest.raises(deploy.Unfit, match="nan"):
        deploy.prepare(MODEL, "2", poor, 64, PLAIN, None)
    assert deploy.current(MODEL) == "1"
    assert not list((deploy.root() / MODEL / "versions").glob("*2*"))


def test_an_engine_of_another_runtime_version_does_not_serve(engines: list[Engine], tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    shutil.copytree(store.path(engines[0].plan.blob), plan)
    index = json.loads((plan / "plan.json").read_text())
    (plan / "plan.json").write_text(json.dumps({**index, "version": "1.0.0"}))
    old = replace(engines[0], plan=replace(engines[0].plan, blob=store.commit(plan)))
    with pytest.raises(deploy.Unfit, match=r"made by ONNX Runtime 1\.0\.0"):
        deploy.prepare(MODEL, "1", old, 64, PLAIN, None)


def test_whoever_reads_current_always_finds_a_whole_version(engines: list[Engine], folder: Path) -> None:
    put("1", engines[0])
    put("2", engines[1])
    over, seen, failed = threading.Event(), set(), []

    def read() -> None:
        while not over.is_set():
            try:
                seen.add(
                    json.loads((folder / MODEL / "current" / "engine.json").read_text())["weights"]["sha256"]
                )
                assert "version_policy" in (folder / "triton" / MODEL / "config.pbtxt").read_text()
            except Exception as error:
                failed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(200):
        for version in ("1", "2"):
            deploy._link(MODEL, version)
    over.set()
    reader.join()
    assert not failed
    assert len(seen) == 2


def parsed(folder: Path) -> Any:
    """Triton's configuration as Triton's own client parses it."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    text = (folder / "triton" / MODEL / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_tritons_repository_is_what_triton_takes(engines: list[Engine], folder: Path) -> None:
    from tritonclient.grpc import model_config_pb2

    section = Deploy(triton=Triton(instances=2, max_queue_delay_us=500, preferred_batch_sizes=(8, 16)))
    deploy.prepare(MODEL, "7", engines[0], 32, section, 4)
    deploy.switch(MODEL, "7", section)
    config = parsed(folder)
    assert (config.name, config.backend, config.max_batch_size) == (MODEL, "onnxruntime", 32)
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [
        ("pixel_values", model_config_pb2.TYPE_FP32, [1, 8, 8])
    ]
    assert [(o.name, list(o.dims)) for o in config.output] == [("logits", [10])]
    assert list(config.version_policy.specific.versions) == [7]
    assert (config.instance_group[0].count, config.instance_group[0].kind) == (
        2, model_config_pb2.ModelInstanceGroup.KIND_CPU,
    )  # fmt: skip
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 16]
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert config.parameters["intra_op_thread_count"].string_value == "4"
    (warm,) = config.model_warmup
    held = warm.inputs["pixel_values"]
    sample = folder / "triton" / MODEL / "warmup" / held.input_data_file
    assert sample.stat().st_size == int(np.prod(held.dims)) * 4
    put("8", engines[1], Deploy(triton=None))
    assert not (folder / "triton" / MODEL).exists()  # rather than go on serving 7
    put("7", engines[0], section)
    assert list(parsed(folder).version_policy.specific.versions) == [7]


def test_tritons_model_answers_like_the_engine_in_plain_onnx_runtime(
    engines: list[Engine], of_texts: Engine, folder: Path
) -> None:
    """Opened as Triton's backend does it: by path, with the level of config.pbtxt and no other option."""
    import onnxruntime as ort

    of_triton = {number: level for level, number in triton.LEVELS.items()}
    for engine in (*engines, of_texts):
        put("1", engine)
        level = of_triton[parsed(folder).optimization.graph.level]
        options = ort.SessionOptions()
        name = "ORT_DISABLE_ALL" if level == "disabled" else f"ORT_ENABLE_{level.upper()}"
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, name)
        place = folder / "triton" / MODEL / "1"
        assert sorted(p.name for p in place.iterdir()) == ["model.onnx", WEIGHTS]
        session = ort.InferenceSession(str(place / "model.onnx"), options)
        predictor = Predictor(folder / MODEL / "current")
        for feed in triton.batches(predictor):
            wanted = predictor.session.run(feed)["logits"]
            found = session.run(["logits"], feed)[0]
            assert np.abs(found - wanted).max() <= 1e-3 * np.abs(wanted).max()
        shutil.rmtree(folder)


def test_a_text_models_length_is_dynamic(of_texts: Engine, folder: Path) -> None:
    put("1", of_texts)
    config = parsed(folder)
    assert {i.name: list(i.dims) for i in config.input} == {"input_ids": [-1], "attention_mask": [-1]}
    assert [list(o.dims) for o in config.output] == [[2]]
    assert set(config.model_warmup[0].inputs) == {"input_ids", "attention_mask"}


def test_a_level_that_changes_the_answers_is_not_taken(engines: list[Engine], folder: Path) -> None:
    """With outputs that no level gives, it says so instead of writing a repository that answers wrongly."""
    put("1", engines[0])
    predictor = Predictor(folder / MODEL / "current")
    feeds = triton.batches(predictor)
    outputs = [predictor.session.run(feed) for feed in feeds]
    place = folder / "triton" / MODEL / "1"
    assert triton._level(place, feeds, outputs) in triton.LEVELS
    wrong = [{name: array + 1 for name, array in run.items()} for run in outputs]
    limits = predictor.about["facts"]["limits"]
    with pytest.raises(InputError, match="gives other outputs"):
        triton._level(place, feeds, wrong, limits)
    rounded = [{name: array.copy() for name, array in run.items()} for run in outputs]
    rounded[0]["logits"][0, 0] += 0.005  # one value that rounded the other way
    with pytest.raises(InputError, match="gives other outputs: .*off by 0.0"):
        triton._level(place, feeds, rounded)
    assert triton._level(place, feeds, rounded, limits) in triton.LEVELS


def test_a_tensorrt_engine_gets_its_backend_and_the_gpu(engines: list[Engine], folder: Path) -> None:
    """The text only: no TensorRT engine runs here."""
    put("1", engines[0])
    predictor = Predictor(folder / MODEL / "current")
    feeds = triton.batches(predictor)
    outputs = [predictor.session.run(feed) for feed in feeds]
    fields = triton._fields(predictor.session, 64, "1", "tensorrt", feeds, outputs, Triton())
    (folder / "triton" / MODEL / "config.pbtxt").write_text(triton.text({"name": MODEL, **fields}))
    config = parsed(folder)
    assert (config.backend, config.instance_group[0].kind) == ("tensorrt", 1)
