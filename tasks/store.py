"""The content-addressed store: every artifact is a folder named by the digest of what is in it.

    ENGINEHOUSE_HOME/store/<first two hex digits>/<sha256>/…

A folder appears whole or not at all (written beside, synced, renamed); its digest is checked on every
read, so that a truncated or altered file is an error (`Damaged`) and never an input.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tasks.artifacts import Blob
from tasks.errors import InputError

LEAST_FREE = 64 << 20  # bytes


class Damaged(Exception):
    """An artifact is missing from the store or is not what its digest says."""


class Unusable(InputError):
    """This machine's disk is full or does not let us write: nobody's fault but the machine's."""


def home() -> Path:
    """The folder that holds all state: artifacts, MLflow's and Prefect's databases."""
    return Path(os.environ.get("ENGINEHOUSE_HOME", "~/.enginehouse")).expanduser().absolute()


def database() -> str:
    """The address of the one database, SQLite, where no other is named: MLflow's tables and the ledger."""
    return f"sqlite:///{home() / 'mlflow.db'}"


def prepare(room: bool = True) -> Path:
    """Make the state folder; raises InputError when it cannot be written or, asked for `room`, has none."""
    with explained(home()):
        home().mkdir(parents=True, exist_ok=True)
        if room and full():
            raise OSError(errno.ENOSPC, "less than 64 MB are free", str(home()))
        with tempfile.TemporaryFile(dir=home()):
            return home()


def full() -> bool:
    """Whether the state folder's disk has less room than the databases alone may need."""
    return shutil.disk_usage(home()).free < LEAST_FREE


def at_fault(error: Exception) -> bool:
    """Whether this machine's disk, and not what was opened, may be why an error was raised."""
    return isinstance(error, Unusable) or full()


def path(blob: Blob) -> Path:
    """Where the artifact lies, checked: raises `Damaged` when it is not there or not itself.

    Its age is from now on: `prune` goes by the last use.
    """
    folder = _place(blob.sha256)
    if not folder.is_dir():
        raise Damaged(f"artifact {blob.sha256[:12]} is not in the store ({folder})")
    if digest(folder) != blob.sha256:
        raise Damaged(f"artifact {blob.sha256[:12]} was altered: {folder} no longer matches its digest")
    with suppress(OSError):  # a store that may only be read
        os.utime(folder)
    return folder


def intact(blob: Blob) -> bool:
    """Whether the artifact can be read."""
    try:
        path(blob)
    except (Damaged, OSError):
        return False
    return True


@contextmanager
def staging() -> Iterator[Path]:
    """A scratch folder on the store's file system, removed at the end."""
    root = home() / "store"
    with explained(root):
        root.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".staging-", dir=root))
    try:
        with explained(root):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def commit(folder: Path) -> Blob:
    """Move a finished folder into the store; raises InputError when the disk is full or not writable."""
    with explained(folder):
        blob = Blob(digest(folder), sum(file.stat().st_size for file in _files(folder)))
        place = _place(blob.sha256)
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists() and not intact(blob):
            shutil.rmtree(place)
        try:
            rename(folder, place)
        except OSError as error:  # someone else stored the same content first
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(folder)
    return blob


def rename(folder: Path, place: Path) -> None:
    """Move a finished folder to its place, where it is whole or not at all, even after a power cut."""
    for target in (*folder.rglob("*"), folder):
        if target.is_file() or target.is_dir():
            _sync(target)
    folder.rename(place)
    _sync(place.parent)


def digest(folder: Path) -> str:
    """sha256 over the sorted names and sha256 of all files below a folder."""
    lines = [f"{file_digest(file)}  {file.relative_to(folder).as_posix()}\n" for file in _files(folder)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def file_digest(file: Path) -> str:
    """sha256 of one file, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def explained(where: Path) -> Iterator[None]:
    """Turn a full disk or a folder that cannot be written into words: `Unusable`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Unusable(
                f"the disk is full: {where} (free space there, or set ENGINEHOUSE_HOME to another disk)"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise Unusable(
                f"cannot write {error.filename or where}: {error.strerror} "
                "(make it writable, or set ENGINEHOUSE_HOME to a folder that is)"
            ) from error
        raise


def _place(sha256: str) -> Path:
    return home() / "store" / sha256[:2] / sha256


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _sync(target: Path) -> None:
    handle = os.open(target, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
