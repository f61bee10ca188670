"""Real versions of the quick recipe, the alias moved as MLflow's UI moves it, and what follows."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from flows import pending, promote
from flows.__main__ import main
from tasks import deploy, ledger, registry, registry_alias, store
from tasks.artifacts import Version
from tasks.errors import InputError

if TYPE_CHECKING:
    from flows.optimize import Outcome

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent.parent
QUICK = "digits-cnn-int8-ptq"
MODEL = "digits-promote"
Optimize = Callable[..., "Outcome"]


@pytest.fixture(scope="module")
def first(optimize: Optimize) -> Version:
    """Version 1: promoted and deployed by the pipeline."""
    return optimize(QUICK, f"model.name={MODEL}").version


@pytest.fixture(scope="module")
def second(first: Version, optimize: Optimize) -> Version:
    """Version 2: passed, its promotion left to a person."""
    return optimize(QUICK, f"model.name={MODEL}", "finetune.seed=1", "promote=manual").version


@pytest.fixture(scope="module")
def refused(second: Version, optimize: Optimize) -> Version:
    """Version 3: refused for its size."""
    return optimize(QUICK, f"model.name={MODEL}", "gate.max_size_ratio=0.01").version


@pytest.fixture(autouse=True)
def from_the_first(first: Version) -> None:
    """Every test starts with version 1 as champion."""
    registry_alias.set_alias(MODEL, first.version)
    promote.agree(MODEL)
    assert state() == (first.version,) * 3


def set_alias(version: str) -> None:
    registry.client().set_registered_model_alias(MODEL, "champion", version)


def state() -> tuple[str | None, str | None, str | None]:
    """The champion by MLflow, by the ledger, and by the serving folder."""
    lines = ledger.lines(MODEL)
    assert ledger.broken(lines) is None
    return registry_alias.alias_of(MODEL), ledger.champion(lines), deploy.current(MODEL)


def events(after: int = 0) -> list[str]:
    return [line.event for line in ledger.lines(MODEL)[after:]]


def answer() -> dict[str, object]:
    """What the deployed engine says to a ramp."""
    return deploy.predict(MODEL, [np.linspace(0, 16, 64)])[0]


def test_the_pipelines_promotion_is_deployed_and_does_not_loop(first: Version) -> None:
    assert events()[:3] == ["promoting", "promoted", "deployed"]
    before = len(ledger.lines(MODEL))
    assert promote.agree(MODEL).action == "nothing"
    assert promote.reconcile()[0].action == "nothing"
    assert len(ledger.lines(MODEL)) == before


def test_an_alias_moved_by_a_person_is_verified_and_deployed(second: Version, first: Version) -> None:
    old, known = answer(), len(ledger.lines(MODEL))
    set_alias(second.version)
    done = promote.promote(MODEL)
    assert (done.action, done.champion) == ("promoted", second.version)
    assert state() == (second.version,) * 3
    assert answer()["score"] != old["score"]
    assert events(known) == ["promoting", "promoted", "deployed"]
    version = registry.registered(MODEL, second.version)
    assert version.tags["promoted_by"] == promote.PERSON
    assert version.tags["deployed"] == deploy.place()
    assert version.description.startswith("Passed:")
    assert "Champion since" in version.description
    before = registry.registered(MODEL, first.version)
    assert f"Champion until {version.tags['promoted_at'][:10]}" in before.description
    assert "deployed" not in before.tags
    assert promote.agree(MODEL).action == "nothing"


def test_a_version_that_did_not_pass_is_put_back_with_the_reason(refused: Version, first: Version) -> None:
    for _ in range(2):
        known = len(ledger.lines(MODEL))
        set_alias(refused.version)
        done = promote.agree(MODEL)
        assert (done.action, done.champion) == ("refused", first.version)
        assert state() == (first.version,) * 3
        assert events(known) == ["refused"]
    version = registry.registered(MODEL, refused.version)
    assert "size" in version.tags["promotion_refused"]
    assert version.description.startswith("Refused:")
    assert version.description.count("Not promoted") == 1


def test_an_override_by_name_lets_it_through(refused: Version, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["override", MODEL, refused.version, "--by", "Ada", "--reason", "size is fine here"]) == 0
    set_alias(refused.version)
    assert promote.agree(MODEL).action == "promoted"
    assert state() == (refused.version,) * 3
    line = next(line for line in reversed(ledger.lines(MODEL)) if line.event == "promoted")
    assert (line.actor, line.reason) == ("Ada", "override: size is fine here")
    assert "promotion_refused" not in registry.registered(MODEL, refused.version).tags
    capsys.readouterr()
    assert main(["verify", f"{MODEL}@champion"]) == 0
    assert "override by Ada" in capsys.readouterr().out


def test_a_forged_tag_does_not_help(second: Version, optimize: Optimize, first: Version) -> None:
    """Another refused version, for which there is no override."""
    other = optimize(QUICK, f"model.name={MODEL}", "gate.max_size_ratio=0.02").version
    client = registry.client()
    client.set_model_version_tag(MODEL, other.version, "gate", "passed")
    set_alias(other.version)
    done = promote.agree(MODEL)
    assert (done.action, done.champion) == ("refused", first.version)
    assert "its gate tag says passed, and its measurements do not" in done.reason
    assert "size" in done.reason


def test_a_pending_version_waits_for_a_worker_that_has_the_runtime(
    second: Version, optimize: Optimize, first: Version
) -> None:
    waiting = optimize(QUICK, f"model.name={MODEL}", "build.runtime=tensorrt-rtx").version
    set_alias(waiting.version)
    done = promote.agree(MODEL)
    assert (done.action, done.champion) == ("refused", first.version)
    assert "a worker that has the runtime must judge it" in done.reason


def test_a_pending_version_is_judged_where_its_runtime_is_and_then_promoted(
    first: Version, optimize: Optimize, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "digits-pending"
    waiting = unjudged(optimize, name, monkeypatch)
    done = promote.agree(name)
    assert done.action == "promoted"
    assert done.champion not in (None, waiting.version)
    judged = registry.registered(name, str(done.champion))
    assert (judged.tags["gate"], judged.tags["proved"]) == ("passed", "executed")
    tags = registry.registered(name, waiting.version).tags
    assert tags["gated_as"] == done.champion
    assert registry_alias.alias_of(name) == done.champion
    assert promote.agree(name).action == "nothing"


def unjudged(optimize: Optimize, name: str, monkeypatch: pytest.MonkeyPatch) -> Version:
    """A version that waits for its gate, with the alias on it."""
    from tasks import build

    with monkeypatch.context() as elsewhere:  # a machine without the runtime: the engine is only checked
        elsewhere.setattr(build, "installed", lambda runtime: None)
        version = optimize(QUICK, f"model.name={name}").version
    assert version.gate == "pending"
    registry.client().set_registered_model_alias(name, "champion", version.version)
    return version


def test_judging_that_was_ended_goes_on_at_the_next_look_and_one_error_ends_it(
    first: Version, optimize: Optimize, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "digits-ended"
    version = unjudged(optimize, name, monkeypatch).version
    judge, begun = pending.judge_pending, []

    def killed(*_: str) -> None:
        raise KeyboardInterrupt

    def poor(*_: str) -> None:
        raise InputError("its rows are gone")

    def judging(*asked: str) -> Outcome:
        """While it lasts, another starter looks: it has nothing to judge."""
        begun.append(asked)
        with ThreadPoolExecutor(1) as other:
            assert other.submit(promote.agree, name).result().action == "nothing"
        return judge(*asked)

    monkeypatch.setattr(pending, "judge_pending", killed)
    with pytest.raises(KeyboardInterrupt):
        promote.agree(name)
    assert registry_alias.alias_of(name) is None
    monkeypatch.setattr(pending, "judge_pending", poor)
    done = promote.agree(name)
    assert (done.action, done.champion) == ("refused", None)
    assert "its rows are gone" in done.reason
    assert "its rows are gone" in registry.registered(name, version).tags["promotion_refused"]
    assert promote.agree(name).action == "nothing", "an error ends it"
    registry.client().set_registered_model_alias(name, "champion", version)
    monkeypatch.setattr(pending, "judge_pending", killed)
    with pytest.raises(KeyboardInterrupt):
        promote.agree(name)
    monkeypatch.setattr(pending, "judge_pending", judging)
    done = promote.agree(name)
    assert begun == [(name, version)]
    assert (done.action, registry.registered(name, version).tags["gated_as"]) == ("promoted", done.champion)
    assert promote.agree(name).action == "nothing"


def test_judging_that_never_ends_is_given_up(
    first: Version, optimize: Optimize, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: str) -> None:
        raise MemoryError

    name = "digits-never"
    unjudged(optimize, name, monkeypatch)
    monkeypatch.setattr(pending, "judge_pending", out_of_memory)
    for _ in range(3):
        with pytest.raises(MemoryError):
            promote.agree(name)
    done = promote.agree(name)
    assert done.action == "refused"
    assert "was begun 3 times and never finished" in done.reason
    assert promote.agree(name).action == "nothing"


def stored(version: Version) -> Path:
    """Where MLflow keeps the version's engine."""
    uri = registry.client().get_model_version_download_uri(version.model, version.version)
    return Path(uri.removeprefix("file://")) / "artifacts" / "engine"


@pytest.mark.parametrize("part", ["weights/weights.safetensors", "preprocessor/settings.json", "engine.json"])
def test_a_damaged_artifact_is_refused_even_with_an_override(
    part: str, second: Version, first: Version
) -> None:
    """The version was never deployed here: its files come from MLflow."""
    shutil.rmtree(deploy.root() / MODEL / "versions" / second.version, ignore_errors=True)
    promote.override(MODEL, second.version, "Ada", "whatever it is")
    file = stored(second) / part
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    try:
        set_alias(second.version)
        done = promote.agree(MODEL)
    finally:
        file.write_bytes(good)
    assert (done.action, done.champion) == ("refused", first.version)
    assert state() == (first.version,) * 3
    set_alias(second.version)
    assert promote.agree(MODEL).action == "promoted"


def test_a_smoke_request_that_fails_after_the_switch_puts_all_back(
    second: Version, first: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are damaged between the proof and the switch."""
    prepare = deploy.prepare

    def damaging(model: str, version: str, *rest: object) -> None:
        prepare(model, version, *rest)  # type: ignore[arg-type]
        with (deploy.root() / model / "versions" / version / "weights" / "weights.safetensors").open(
            "ab"
        ) as f:
            f.write(b"x")

    shutil.rmtree(deploy.root() / MODEL / "versions" / second.version, ignore_errors=True)
    monkeypatch.setattr(deploy, "prepare", damaging)
    known, before = len(ledger.lines(MODEL)), answer()
    set_alias(second.version)
    done = promote.agree(MODEL)
    assert (done.action, done.champion) == ("refused", first.version)
    assert state() == (first.version,) * 3
    assert answer() == before
    assert events(known) == ["promoting", "promoted", "deploy-failed", "promoting", "put-back"]
    assert "not what its digest says" in registry.registered(MODEL, second.version).tags["promotion_refused"]
    assert promote.agree(MODEL).action == "nothing"


def test_a_pipelines_champion_that_cannot_serve_gives_way_to_the_one_before(
    first: Version, optimize: Optimize, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploy, "prepare", unfit)
    done = optimize(QUICK, f"model.name={MODEL}", "finetune.seed=2")
    assert done.verdict == "refused"
    assert done.reasons == (f"version {done.version.version} cannot serve: it answers nonsense",)
    assert state() == (first.version,) * 3


def test_without_a_deploy_section_nothing_is_deployed(first: Version, optimize: Optimize) -> None:
    done = optimize(QUICK, "model.name=digits-nowhere", "deploy=null")
    assert done.verdict == "promoted"
    assert deploy.current("digits-nowhere") is None
    assert promote.agree("digits-nowhere").action == "nothing"


def test_an_alias_taken_off_withdraws_the_champion_and_goes_on_serving(first: Version) -> None:
    registry.client().delete_registered_model_alias(MODEL, "champion")
    assert promote.agree(MODEL).action == "withdrawn"
    assert state() == (None, None, first.version)
    assert promote.agree(MODEL).action == "nothing"


def test_rollback_restores_engine_and_alias(
    first: Version, second: Version, capsys: pytest.CaptureFixture[str]
) -> None:
    old = answer()
    set_alias(second.version)
    promote.agree(MODEL)
    assert answer() != old
    assert main(["rollback", MODEL, "--by", "Ada", "--reason", "odd answers"]) == 0
    assert state() == (first.version,) * 3
    assert answer() == old
    line = next(line for line in reversed(ledger.lines(MODEL)) if line.event == "rolled-back")
    assert (line.actor, line.before, line.after, line.reason) == (
        "Ada", second.version, first.version, "odd answers",
    )  # fmt: skip
    assert main(["rollback", MODEL, "--to", second.version]) == 0
    assert state() == (second.version,) * 3
    assert main(["rollback", MODEL, "--to", second.version]) == 2
    assert main(["rollback", MODEL, "--to", "99"]) == 2
    assert "there is no version 99" in capsys.readouterr().err


def test_rollback_fetches_a_version_that_no_longer_lies_here(first: Version, second: Version) -> None:
    set_alias(second.version)
    promote.agree(MODEL)
    shutil.rmtree(deploy.root() / MODEL / "versions" / first.version)
    assert promote.back(MODEL, first.version, "Ada", "test").action == "rolled-back"
    assert state() == (first.version,) * 3


def test_a_damaged_serving_folder_is_laid_out_again(first: Version) -> None:
    """By whatever looks next: no alias tells of it."""
    wanted, known = answer(), len(ledger.lines(MODEL))
    file = deploy.root() / MODEL / "current" / "weights" / "weights.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    done = next(done for done in promote.reconcile() if done.model == MODEL)
    assert (done.action, done.champion) == ("deployed", first.version)
    assert (file.read_bytes(), answer()) == (good, wanted)
    assert events(known) == ["deployed"]
    assert promote.agree(MODEL).action == "nothing"


def test_another_version_of_the_same_number_is_laid_out_anew(
    first: Version, second: Version, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model is deleted in MLflow and made again: its version 1 has another engine."""
    name = "digits-again"
    copied(first, name)
    assert promote.agree(name).action == "promoted"
    registry.client().delete_registered_model(name)
    copied(second, name)
    assert main(["verify", name]) == 1
    assert "is of another engine than the one that is registered" in capsys.readouterr().out
    done = promote.agree(name)
    assert (done.action, done.champion) == ("deployed", "1")
    assert (wanted := registry.engine_of(MODEL, second.version).weights)
    assert served(name) == wanted.sha256
    assert main(["verify", name]) == 0
    assert promote.agree(name).action == "nothing"


def copied(version: Version, name: str) -> str:
    """The version registered again under another model, with its alias there; returns its number."""
    client = registry.client()
    source = client.get_model_version(version.model, version.version)
    if name not in registry_alias.models():
        client.create_registered_model(name)
    made = client.create_model_version(name, source.source, run_id=source.run_id, tags=dict(source.tags))
    client.set_registered_model_alias(name, "champion", str(made.version))
    return str(made.version)


def served(name: str) -> str:
    """The digest of the weights that serve."""
    return store.digest(deploy.root() / name / "current" / "weights")


def test_a_champion_that_cannot_serve_gives_way_to_one_that_is_still_there(
    first: Version, second: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "digits-deleted"
    for version in (first, second, first):
        copied(version, name)
        promote.agree(name)
    registry.client().delete_model_version(name, "2")
    shutil.rmtree(deploy.root() / name)
    monkeypatch.setattr(deploy, "prepare", unfit)
    done = promote.agree(name)
    assert (done.action, done.champion) == ("refused", "1")
    monkeypatch.undo()
    assert promote.agree(name).action == "deployed"
    assert promote.agree(name).action == "nothing"
    with pytest.raises(InputError, match="no other champion that is still there"):
        promote.back(name, None, "Ada", "test")


def test_a_champion_that_cannot_serve_does_not_bring_back_one_that_was_withdrawn(
    first: Version, second: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "digits-withdrawn"
    copied(first, name)
    promote.agree(name)
    registry.client().delete_registered_model_alias(name, "champion")
    assert promote.agree(name).action == "withdrawn"
    copied(second, name)
    assert promote.agree(name).action == "promoted"
    shutil.rmtree(deploy.root() / name)
    monkeypatch.setattr(deploy, "prepare", unfit)
    done = promote.agree(name)
    assert (done.action, done.champion) == ("refused", None)
    assert registry_alias.alias_of(name) is ledger.champion(ledger.lines(name)) is None
    assert promote.agree(name).action == "nothing"


def unfit(*_: object) -> None:
    raise deploy.Unfit("it answers nonsense")


def test_a_store_that_cannot_be_written_demotes_nobody(
    first: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tempfile.mkdtemp

    def denied(suffix: str | None = None, prefix: str | None = None, dir: Path | None = None) -> str:
        if dir == store.home() / "store":
            raise PermissionError(errno.EACCES, "Permission denied", str(dir))
        return made(suffix, prefix, dir)

    (deploy.root() / MODEL / "current").unlink()
    known = len(ledger.lines(MODEL))
    with monkeypatch.context() as here:
        here.setattr(tempfile, "mkdtemp", denied)
        with pytest.raises(InputError, match="cannot write .*/store: Permission denied"):
            promote.agree(MODEL)
    assert events(known) == []
    assert registry_alias.alias_of(MODEL) == first.version
    assert promote.agree(MODEL).action == "deployed"


CRASH = """
import os, signal, sys
from flows import promote
from tasks import deploy, ledger, registry_alias

def die(*_a, **_k):
    os.kill(os.getpid(), signal.SIGKILL)

where = sys.argv[2]
if where == "before the alias":
    registry_alias.set_alias = die
elif where == "after the alias":
    registry_alias._settled = die
elif where == "before the switch":
    deploy.switch = die
elif where == "after the switch":
    switch = deploy.switch
    deploy.switch = lambda *a: die(switch(*a))
promote.agree(sys.argv[1])
"""


@pytest.mark.parametrize(
    "where", ["before the alias", "after the alias", "before the switch", "after the switch"]
)
def test_a_crash_in_the_middle_is_finished_by_the_next_run(where: str, second: Version) -> None:
    """The process is killed at the place named; the alias may be set back by nobody."""
    known = len(ledger.lines(MODEL))
    if where == "before the alias":  # the pipeline's way: the alias is not yet on the new version
        code = CRASH.replace(
            "promote.agree(sys.argv[1])",
            "from tasks import registry\n"
            "from tasks.artifacts import Version\n"
            "registry.promote.fn(Version(sys.argv[1], sys.argv[3], '', 'passed', None, ''), '1')",
        )
    else:
        code = CRASH
        set_alias(second.version)
    done = subprocess.run(
        [sys.executable, "-c", code, MODEL, where, second.version], cwd=ROOT, check=False, timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    assert promote.agree(MODEL).champion == second.version
    assert state() == (second.version,) * 3
    found = events(known)
    assert found.count("promoting") == found.count("promoted") == found.count("deployed") == 1
    assert promote.agree(MODEL).action == "nothing"


CONTENDER = """
import sys
from concurrent.futures import ThreadPoolExecutor
from tasks import registry
from tasks.artifacts import Version
from tasks.errors import InputError

def promote(pair):
    mine, against = pair.split(":")
    try:
        registry.promote.fn(Version(sys.argv[1], mine, "", "passed", None, ""), against)
        return mine + " won"
    except InputError as error:
        return mine + " " + str(error)

registry.client().search_registered_models()
print("ready", flush=True)
sys.stdin.readline()
with ThreadPoolExecutor(10) as pool:
    print(*pool.map(promote, sys.argv[2:]), sep="\\n")
"""


def test_of_twenty_promotions_at_once_one_wins_and_the_others_say_why(first: Version) -> None:
    """Two processes of ten threads, a version each; three in four were judged against the champion."""
    client = registry.client()
    source = client.get_model_version(MODEL, first.version)
    name = "digits-contended"
    client.create_registered_model(name)
    for _ in range(21):
        client.create_model_version(name, source.source, run_id=source.run_id, tags=dict(source.tags))
    client.set_registered_model_alias(name, "champion", "1")
    promote.agree(name)
    pairs = [f"{k}:{1 if k % 4 else 7}" for k in range(2, 22)]
    said = dict(line.split(" ", 1) for line in contend(name, pairs))
    assert len(said) == 20
    (winner,) = [k for k, words in said.items() if words == "won"]
    assert int(winner) % 4
    lost = {words for k, words in said.items() if k != winner}
    assert all("took the alias meanwhile" in words for words in lost)
    assert all("version 1 took" in words or f"version {winner} took" in words for words in lost)
    lines = ledger.lines(name)
    assert ledger.broken(lines) is None
    assert registry_alias.alias_of(name) == ledger.champion(lines) == winner
    assert [line.event for line in lines][3:] == ["promoting", "promoted"]


def contend(name: str, pairs: list[str]) -> list[str]:
    """What the processes print, let go at the same moment."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CONTENDER, name, *pairs[k::2]],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for k in range(2)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return [line for p in processes for line in p.communicate(timeout=300)[0].splitlines()]


def test_the_pipeline_first_puts_back_an_alias_that_a_person_moved(
    refused: Version, first: Version, optimize: Optimize
) -> None:
    """`refused` has an override by now, so another refused version is taken."""
    other = optimize(QUICK, f"model.name={MODEL}", "gate.max_size_ratio=0.03").version
    set_alias(other.version)
    again = optimize(QUICK, f"model.name={MODEL}")
    assert (again.verdict, again.version.version) == ("promoted", first.version)
    assert state() == (first.version,) * 3


def test_models_of_others_are_left_alone_and_a_strange_version_is_put_back(
    first: Version, tmp_path: Path
) -> None:
    """A version made by hand: no run, no tags; with an override it still has no engine."""
    client = registry.client()
    source = client.get_model_version(MODEL, first.version).source
    client.create_registered_model("someone-elses")
    client.create_model_version("someone-elses", source)
    client.set_registered_model_alias("someone-elses", "champion", "1")
    assert promote.agree("someone-elses").action == "nothing"
    assert registry_alias.alias_of("someone-elses") == "1"
    strange = str(client.create_model_version(MODEL, tmp_path.as_uri()).version)
    set_alias(strange)
    assert "its gate says nothing" in promote.agree(MODEL).reason
    promote.override(MODEL, strange, "Ada", "because")
    set_alias(strange)
    done = promote.agree(MODEL)
    assert (done.action, done.champion) == ("refused", first.version)
    assert "its artifacts do not open" in done.reason


def test_verify_finds_what_was_altered(first: Version, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", f"{MODEL}@champion"]) == 0
    file = deploy.root() / MODEL / "current" / "weights" / "weights.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    try:
        assert main(["verify", f"{MODEL}@champion"]) == 1
        assert "FAIL" in capsys.readouterr().out
    finally:
        file.write_bytes(good)
    set_alias("2")
    assert main(["verify", f"{MODEL}@champion"]) == 1
    assert "the ledger's champion is version 1, the alias is on version 2" in capsys.readouterr().out


def test_history_is_a_table_and_an_artifact_in_prefect(
    first: Version, second: Version, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["history", MODEL]) == 0
    out = capsys.readouterr().out
    assert "promoted" in out
    assert "lines, each with the sha256 of the one before" in out
    set_alias(second.version)
    promote.promote(MODEL)
    from prefect.artifacts import Artifact

    artifact = Artifact.get(f"history-{MODEL}")
    assert artifact is not None
    rows = json.loads(str(artifact.data))
    assert rows[0]["event"] == "deployed"
    assert rows[0]["to"] == second.version


def test_a_lost_race_in_one_process_says_who_won(second: Version, first: Version) -> None:
    with pytest.raises(InputError, match=f"version {first.version} took the alias meanwhile"):
        registry.promote.fn(second, "77")
