from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from tasks import store
from tasks.artifacts import Blob
from tasks.errors import InputError
from tasks.store import Damaged


def put(text: str = "hello", name: str = "file.txt") -> Blob:
    with store.staging() as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / name).write_text(text)
        return store.commit(folder)


def test_what_was_stored_is_read_back(fresh_home: Path) -> None:
    blob = put()
    assert (store.path(blob) / "deep" / "file.txt").read_text() == "hello"
    assert blob.bytes == 5


def test_equal_content_is_stored_once_and_names_count(fresh_home: Path) -> None:
    assert put() == put()
    assert put(name="other.txt").sha256 != put().sha256
    assert len(list((fresh_home / "store").glob("??/*"))) == 2


@pytest.mark.parametrize("harm", ["change", "truncate", "remove file", "add file", "remove all"])
def test_a_damaged_artifact_is_never_an_input(fresh_home: Path, harm: str) -> None:
    blob = put()
    file = store.path(blob) / "deep" / "file.txt"
    if harm == "change":
        file.write_text("jello")
    elif harm == "truncate":
        os.truncate(file, 2)
    elif harm == "add file":
        (file.parent / "more.txt").write_text("x")
    else:
        file.unlink()
        if harm == "remove all":
            file.parent.rmdir()
            file.parent.parent.rmdir()
    assert not store.intact(blob)
    with pytest.raises(Damaged, match=blob.sha256[:12]):
        store.path(blob)
    assert put() == blob
    assert store.intact(blob)


def test_what_is_used_is_young_again(fresh_home: Path) -> None:
    blob = put()
    folder = store.path(blob)
    os.utime(folder, (0, 0))
    assert store.intact(blob)
    assert time.time() - folder.stat().st_mtime < 60


def test_staging_leaves_nothing_behind(fresh_home: Path) -> None:
    with pytest.raises(RuntimeError), store.staging() as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list((fresh_home / "store").iterdir()) == []


def test_a_full_disk_is_told_in_words() -> None:
    full = Path("/dev/full")
    with pytest.raises(InputError, match="the disk is full.*ENGINEHOUSE_HOME"), store.explained(full):
        full.write_text("x" * 100_000)


def test_a_store_that_cannot_be_written_is_told_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ENGINEHOUSE_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(InputError, match="cannot write"):
        store.prepare()
    with pytest.raises(InputError, match="cannot write"), store.staging():
        pass


def test_other_system_errors_stay_what_they_are() -> None:
    with pytest.raises(OSError, match="Interrupted") as caught, store.explained(Path("/x")):
        raise OSError(errno.EINTR, "Interrupted")
    assert not isinstance(caught.value, InputError)
