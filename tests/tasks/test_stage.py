from __future__ import annotations

import gc
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock, Timeout
from prefect.context import TaskRunContext

from recipes.schema import Benchmark
from tasks import stage as stages
from tasks import store
from tasks.artifacts import Blob, Checkpoint, Dataset, Engine, Metrics, OnnxModel, Plan
from tasks.engines import tensorrt_api
from tasks.stage import cache_key, source_digest


def work(value: object) -> None:
    """Only its key matters here."""


def key(value: object) -> str:
    return cache_key(work, ("numpy", "not-installed"), {"value": value})


def test_a_key_follows_content_and_nothing_else() -> None:
    blob, other = Blob("a" * 64, 3), Blob("b" * 64, 3)
    assert key(blob) == key(Blob("a" * 64, 3)) != key(other)
    assert key(Benchmark()) == key(Benchmark(rounds=30)) != key(Benchmark(rounds=21))
    assert key({"x": blob}) != key({"y": blob})
    plan = Plan(blob, "g", "onnxruntime", "1", "cpu")
    assert key(Engine(plan, None, blob, "int8", "built")) != key(Engine(plan, other, blob, "int8", "built"))


def test_what_stands_beside_an_artifact_s_file_counts_but_not_how_it_came_about() -> None:
    blob = Blob("a" * 64, 3)
    rows = Dataset(blob, "text-classification", ("no", "yes"), {"test": 2}, {"source": "path:here"})
    assert key(rows) == key(replace(rows, facts={"source": "path:moved"}))
    assert key(rows) != key(replace(rows, labels=("yes", "no")))
    assert key(Metrics({"parity": 0.9}, blob)) == key(Metrics({"parity": 0.9}, blob, {"load": 1}))
    assert key(Metrics({"parity": 0.9}, blob)) != key(Metrics({"parity": 0.8}, blob))
    assert key(OnnxModel(blob, "fp32")) != key(OnnxModel(blob, "int8"))


def test_a_checkpoint_counts_by_config_and_weights() -> None:
    first = Checkpoint(Blob("a" * 64, 3), "text-classification", "same")
    second = Checkpoint(Blob("b" * 64, 4), "text-classification", "same")
    assert key(first) == key(second)


def test_a_key_follows_the_versions_of_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(1)
    monkeypatch.setattr(stages, "_version", lambda name: "0.0.1")
    assert key(1) != before


def test_a_key_follows_the_source_of_what_a_stage_imports() -> None:
    root = Path(stages.__file__).parent
    assert root / "checkpoints.py" in stages._imports(root / "calibrate.py")
    assert root / "engines" / "lowering" / "gemm.py" in _reached(root / "build.py")
    assert root / "types" / "text_classification.py" in _reached(root / "evaluate.py")
    assert root / "stage.py" not in _reached(root / "gate.py")
    assert source_digest(root / "gate.py") != source_digest(root / "calibrate.py")


def test_a_training_is_kept_when_an_engine_s_source_changes() -> None:
    """It takes one module of that package; a build takes what chooses among them."""
    root = Path(stages.__file__).parent
    trained, built = (stages.sources(root / name) for name in ("finetune.py", "build.py"))
    engines = root / "engines"
    assert engines / "microscale.py" in trained
    assert not {engines / "tensorrt_build.py", engines / "lowering" / "gemm.py"} & trained
    assert {engines / "tensorrt_build.py", engines / "lowering" / "gemm.py"} < built
    assert root / "types" / "text_classification.py" in trained


def _reached(file: Path) -> set[Path]:
    seen: set[Path] = set()
    waiting = [file]
    while waiting:
        current = waiting.pop()
        if current not in seen and current.name != "stage.py":
            seen.add(current)
            waiting += stages._imports(current)
    return seen


def test_the_seconds_of_a_build_are_not_part_of_an_engine() -> None:
    blob = Blob("a" * 64, 3)
    plan = Plan(blob, "g", "onnxruntime", "1", "cpu")
    slow, quick = (Engine(plan, None, blob, "int8", "executed", {"build_seconds": k}) for k in (1, 2))
    assert key(slow) == key(quick)
    proved = Engine(plan, None, blob, "int8", "executed", {"proof": {"quantized_share": 0.9}})
    assert key(proved) != key(slow)


@pytest.mark.slow
def test_a_kept_result_serves_until_its_artifact_is_damaged() -> None:
    store.prepare()
    runs = []

    @stages.stage(name="probe")
    def probe(text: str) -> Blob:
        runs.append(text)
        with store.staging() as folder:
            (folder / "out").write_text(text)
            return store.commit(folder)

    stages.timeline.clear()
    blob = probe("one")
    assert probe("one") == blob
    assert runs == ["one"]
    (store.path(blob) / "out").write_text("harm")
    assert probe("one") == blob
    assert store.intact(blob)
    assert runs == ["one", "one"]
    assert [timing.reused for timing in stages.timeline] == [False, True, False]


class Failed:
    """A task's state, as Prefect hands it to a retry condition."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def result(self, raise_on_failure: bool) -> Exception:
        return self.error


def test_only_what_may_pass_by_itself_is_tried_again() -> None:
    from tasks.errors import InputError

    away = RuntimeError("API request failed")
    away.__context__ = ConnectionError("refused")  # as MLflow tells it
    told = InputError("MLflow is not there")
    told.__cause__ = away
    found = [stages.passing(None, None, Failed(e)) for e in (away, ConnectionError(), told, ValueError())]
    assert found == [True, True, False, False]


class Network:
    """In a cycle with itself, as torch's are with their hooks."""

    def __init__(self) -> None:
        self.itself = self


def test_what_a_stage_leaves_in_cycles_is_freed_and_libraries_are_not_looked_through_again() -> None:
    for _ in range(2):
        left = weakref.ref(Network())
        assert left() is not None
        stages._free()
        assert left() is None
    assert gc.get_freeze_count() > 10_000
    assert not gc.get_objects()[100:]


@pytest.fixture
def gpu(fresh_home: Path, monkeypatch: pytest.MonkeyPatch) -> FileLock:
    """A GPU; its lock."""
    monkeypatch.setattr(tensorrt_api, "gpu", lambda: tensorrt_api.Gpu("NVIDIA H100 80GB HBM3", (9, 0)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    return FileLock(store.prepare() / "gpu-0.lock")


@pytest.fixture
def busy_gpu(gpu: FileLock) -> FileLock:
    """A GPU that another process works on; its lock."""
    gpu.acquire()
    return gpu


def test_the_wait_for_a_gpu_counts_neither_for_the_timeout_nor_for_the_time(
    busy_gpu: FileLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefect's timeout ends what runs inside the task."""
    clock = [0.0]
    inside = []

    def in_task() -> bool:
        return TaskRunContext.get() is not None

    def hours_later(line: str) -> None:
        if "gpu-0: another process works on it; waiting" in line:
            inside.append(in_task())
            clock[0] = 6 * 3600
            busy_gpu.release()

    @stages.stage(name="probe", gpu=True, timeout_seconds=3600)
    def probe(text: str) -> str:
        inside.append(in_task())
        with pytest.raises(Timeout):
            busy_gpu.acquire(timeout=0)
        return text

    monkeypatch.setattr(stages, "say", hours_later)
    monkeypatch.setattr(stages, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert probe("waits") == "waits"
    assert inside == [False, True]
    assert stages.timeline[-1].seconds == 0
    busy_gpu.acquire(timeout=0)


def test_a_stage_that_waited_for_its_gpu_takes_what_was_made_meanwhile(
    busy_gpu: FileLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []

    @stages.stage(name="probe", gpu=True)
    def probe(text: str) -> str:
        runs.append(text)
        return text

    def made_by_the_other(line: str) -> None:
        if "waiting" in line:
            probe.task("shared")
            busy_gpu.release()

    monkeypatch.setattr(stages, "say", made_by_the_other)
    assert probe("shared") == "shared"
    assert runs == ["shared"]
    assert stages.timeline[-1].reused
    busy_gpu.acquire(timeout=0)
    assert probe("shared") == "shared", "what is kept needs no GPU"


def test_what_another_process_makes_is_waited_for_and_not_made_again(
    fresh_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, told = [], []

    @stages.stage(name="probe")
    def probe(text: str) -> str:
        runs.append(text)
        return text

    other = FileLock(fresh_home / "making" / probe.key("at once"))
    other.acquire()

    def made_by_the_other(line: str) -> None:
        told.append(line)
        if "waiting" in line:
            probe.task("at once")
            other.release()

    monkeypatch.setattr(stages, "say", made_by_the_other)
    assert probe("at once") == "at once"
    assert runs == ["at once"]
    assert stages.timeline[-1].reused
    assert told[1] == (
        "probe: another process makes this very result; waiting for it to end (Ctrl-C to give up)"
    )
    assert probe("another") == "another"
    assert not any("waiting" in line for line in told[2:])
    assert list((fresh_home / "making").iterdir()) == []


def test_a_stage_gives_the_gpu_s_memory_back_before_its_slot(
    gpu: FileLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[weakref.ref[Network]] = []
    emptied = []

    def empty_cache() -> None:
        with pytest.raises(Timeout):
            gpu.acquire(timeout=0)
        emptied.append(left[0]() is None)

    @stages.stage(name="probe", gpu=True)
    def probe(text: str) -> str:
        left.append(weakref.ref(Network()))
        return text

    cuda = SimpleNamespace(is_initialized=lambda: True, empty_cache=empty_cache)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    probe("trains")
    assert emptied == [True]
    cuda.is_initialized = lambda: False
    probe("uses no GPU")
    assert emptied == [True]
    monkeypatch.delitem(sys.modules, "torch")
    probe("uses no torch")
    assert "torch" not in sys.modules
