"""A clean checkout of a pushed commit: HOME/checkouts/COMMIT, made from a mirror in HOME/mirrors/NAME.git."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from tasks import store
from tasks.errors import InputError
from tasks.git import GitError, git, known
from tasks.git import base as git_base
from tasks.repositories import Repository

KEPT = 8  # checkouts; ENGINEHOUSE_CHECKOUTS changes it
_INSTALLED = Path(__file__).resolve().parent.parent


def mirror(repository: Repository) -> Path:
    """The repository's branches as they are now, in a bare repository of ours."""
    place = store.prepare() / "mirrors" / f"{repository.name}.git"
    place.parent.mkdir(exist_ok=True)
    with FileLock(f"{place}.lock"):
        if not (place / "HEAD").is_file():
            shutil.rmtree(place, ignore_errors=True)
            git("init", "--quiet", "--bare", "--template=", "--", str(place))
        heads = "+refs/heads/*:refs/heads/*"
        options = ("--quiet", "--no-tags", "--no-write-fetch-head", "--prune", "--force")
        git("fetch", *options, "--", repository.url, heads, folder=place)
    return place


def holds(place: Path, branch: str, commit: str) -> bool:
    """Whether the commit is on the branch now; a force push or a deletion may have taken it away."""
    if not known(place, commit):
        return False
    try:
        git("merge-base", "--is-ancestor", commit, f"refs/heads/{branch}", folder=place)
    except GitError:
        return False
    return True


def base(place: Path, repository: Repository, commit: str, before: str | None, branch: str) -> str:
    """What to compare a pushed commit with: what the branch held before; for a new one the default branch."""
    if before:
        _recall(place, repository, before)
        return git_base(place, commit, before)
    main = default(repository.url)
    return git_base(place, commit, f"refs/heads/{main}" if main and main != branch else None)


def _recall(place: Path, repository: Repository, commit: str) -> None:
    """Try to get a commit that no branch holds any more, to compare with; it goes without, too."""
    if known(place, commit):
        return
    try:
        git(
            "fetch",
            "--quiet",
            "--no-tags",
            "--no-write-fetch-head",
            "--",
            repository.url,
            commit,
            folder=place,
        )
    except GitError:
        return


def heads(url: str, branch: str | None = None) -> dict[str, str]:
    """Every branch (or the one named) and its commit, asked of the repository without fetching."""
    lines = git("ls-remote", "--heads", "--", url, timeout=60).decode(errors="replace").splitlines()
    pairs = [line.split("\t", 1) for line in lines]
    found = {name.removeprefix("refs/heads/"): commit for commit, name in pairs}
    return {name: commit for name, commit in found.items() if branch in (None, name)}


def default(url: str) -> str | None:
    """The name of the default branch; None where the repository does not say."""
    for line in (
        git("ls-remote", "--symref", "--", url, "HEAD", timeout=60).decode(errors="replace").splitlines()
    ):
        if line.startswith("ref: refs/heads/"):
            return line.removeprefix("ref: refs/heads/").split("\t", 1)[0]
    return None


@contextmanager
def checkout(place: Path, commit: str) -> Iterator[Path]:
    """The commit's files, exactly; it appears whole or not at all and stays while somebody is in it."""
    folder = store.home() / "checkouts" / commit
    folder.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{folder}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        while not _clean(folder, commit):
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _clean(folder, commit):
                _make(place, commit, folder)
            fcntl.flock(lock, fcntl.LOCK_SH)
        os.utime(folder)
        _forget(folder.parent)
        yield folder


def _make(place: Path, commit: str, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with (
        store.explained(folder),
        tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as scratch,
    ):
        made = Path(scratch) / "checkout"
        git("clone", "--quiet", "--shared", "--no-checkout", "--template=", "--", str(place), str(made))
        git("checkout", "--quiet", "--detach", commit, folder=made)
        if not (made / "flows" / "__main__.py").is_file():
            raise InputError(f"commit {commit[:7]} has no flows/__main__.py: push a clone of Enginehouse")
        _lend_data(made)
        made.rename(folder)


def _lend_data(made: Path) -> None:
    """A link to `.data`, which `make` fills and git does not carry."""
    if (_INSTALLED / ".data").is_dir() and not (made / ".data").exists():
        (made / ".data").symlink_to((_INSTALLED / ".data").resolve())
        (made / ".git" / "info").mkdir(exist_ok=True)
        (made / ".git" / "info" / "exclude").write_text("/.data\n")


def _clean(folder: Path, commit: str) -> bool:
    if not (folder / ".git").is_dir():
        return False
    try:
        head = git("rev-parse", "HEAD", folder=folder).decode().strip()
        return head == commit and not git("status", "--porcelain", "--untracked-files=all", folder=folder)
    except GitError:
        return False


def _forget(folder: Path) -> None:
    """Remove all but the newest checkouts; one that is in use stays."""
    keep = int(os.environ.get("ENGINEHOUSE_CHECKOUTS", KEPT))
    found = sorted((p for p in folder.iterdir() if p.is_dir() and len(p.name) == 40), key=_age, reverse=True)
    for old in found[keep:]:
        with Path(f"{old}.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(old, ignore_errors=True)


def _age(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0
