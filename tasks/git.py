"""Git, by its command line: which recipes a push touches. Argument lists, `-z` and `--`; never a shell.

python -m flows touched COMMIT [--before COMMIT] [--repository FOLDER]
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import yaml

from tasks.errors import InputError

EMPTY_TREE = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
ZEROS = "0" * 40
LARGEST_RECIPE = 1 << 20  # bytes
MOST_BETWEEN = 200  # commits of one push that are looked at one by one
_SAFE = ("core.hooksPath=/dev/null", "core.fsmonitor=false", "protocol.ext.allow=never", "gc.auto=0")
_KEPT = (
    "GIT_SSH",
    "GIT_SSL",
    "GIT_HTTP",
    "GIT_ASKPASS",
    "GIT_PROXY",
    "GIT_CONFIG_GLOBAL",
    "GIT_CONFIG_SYSTEM",
)
_GLOB = re.compile(r"\.?[^/:.](\.?[^.])*\.?")  # what the schema takes: nothing that leaves the repository
_AWAY = re.compile(
    r"could not (resolve|connect|read from remote)|connection (refused|reset|timed out)|timed out|"
    r"unable to access|returned error: 5\d\d|early EOF|hung up|network is unreachable",
    re.IGNORECASE,
)


class GitError(Exception):
    """A git command failed."""


class Unreachable(GitError, ConnectionError):
    """The repository's host did not answer; trying again may help."""


@dataclass(frozen=True)
class Touched:
    """Recipes that a push asks to run, and what it says about the others."""

    recipes: tuple[str, ...]
    notes: tuple[str, ...]


def commit_id(text: str) -> str:
    """The commit's full name: 40 hex digits, or InputError (SHA-256 repositories are not supported)."""
    if re.fullmatch(r"[0-9a-f]{40}", text):
        return text
    hint = "SHA-256 repositories are not supported" if re.fullmatch(r"[0-9a-f]{64}", text) else "a full SHA-1"
    raise InputError(f"{text[:80]!r} is not a commit: write its 40 hex digits ({hint})")


def branch_name(text: str) -> str:
    """A branch's name by git's own rules (git check-ref-format), or InputError."""
    parts = text.split("/")
    right = (
        not re.search(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{", text)
        and not any(not part or part.startswith(".") or part.endswith(".lock") for part in parts)
        and not text.endswith(".")
        and len(text) < 1000
    )
    if not right:
        raise InputError(f"{text[:80]!r} is not a branch's name")
    return text


def push_key(repository: str, commit: str, before: str | None, branch: str) -> str:
    """What makes a push one push, whichever way it is told."""
    return f"push:{repository}:{branch}:{before or ZEROS}:{commit}"


def git(*arguments: str, folder: Path | None = None, timeout: float = 600) -> bytes:
    """What a git command prints; raises `Unreachable` or `GitError` with git's own last words."""
    done = _call(*arguments, folder=folder, timeout=timeout)
    if done.returncode == 0:
        return done.stdout
    words = done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}"
    kind = Unreachable if _AWAY.search(words) else GitError
    raise kind(f"git {arguments[0]}: {_without_credentials(words)[-600:]}")


def known(folder: Path, commit: str, path: str | None = None) -> bool:
    """Whether the repository holds the commit, and in it the file."""
    what = f"{commit}:{path}" if path else f"{commit}^{{commit}}"
    return _call("cat-file", "-e", what, folder=folder).returncode == 0


def base(folder: Path, commit: str, other: str | None) -> str:
    """The merge base with `other`; without one, the commit's own first parent, or the empty tree."""
    if other and known(folder, other):
        done = _call("merge-base", other, commit, folder=folder)
        if done.returncode == 0:
            return done.stdout.decode().strip()
    done = _call("rev-parse", "--verify", "--quiet", f"{commit}^1", folder=folder)
    return done.stdout.decode().strip() if done.returncode == 0 else EMPTY_TREE


def untouched_since(folder: Path, base: str, commit: str, recipe: str) -> list[str]:
    """The commits between the two, newest first, since which nothing that starts the recipe changed."""
    if base == EMPTY_TREE:
        return []
    count = f"--max-count={MOST_BETWEEN}"
    between = (
        git("rev-list", "--first-parent", count, commit, f"^{base}", "--", folder=folder).decode().split()
    )
    path = f"recipes/{recipe}.yaml"
    globs = (
        _globs(git("cat-file", "blob", f"{commit}:{path}", folder=folder))
        if known(folder, commit, path)
        else None
    )
    paths = [f":(top,literal){path}", *(f":(top,glob){glob}" for glob in globs or ())]
    return list(itertools.takewhile(lambda each: not _differs(folder, each, commit, paths), between[1:]))


def touched(folder: Path, base: str, commit: str) -> Touched:
    """The recipes that differ between two commits, and those whose `watch:` names a path that differs."""
    fields = git(
        "diff", "--name-status", "-z", "--no-renames", "--no-ext-diff", base, commit, "--", folder=folder
    )
    parts = fields.split(b"\0")[:-1]
    recipes, notes = set(), []
    for status, path in zip(parts[::2], parts[1::2], strict=True):
        name = _recipe(path)
        if name is None:
            continue
        if status == b"D":
            notes.append(f"{name}: deleted by this push; nothing is started")
        else:
            recipes.add(name)
    if parts:
        recipes |= _watching(folder, base, commit, recipes, notes)
    return Touched(tuple(sorted(recipes)), tuple(notes))


def _recipe(path: bytes) -> str | None:
    """The recipe's name, its odd bytes escaped; None for any other path."""
    place = PurePosixPath(path.decode(errors="backslashreplace"))
    inside = place.parts[:-1] == ("recipes",) and place.suffix == ".yaml"
    return place.stem if inside else None


def _watching(folder: Path, base: str, commit: str, already: set[str], notes: list[str]) -> set[str]:
    found = set()
    for line in git("ls-tree", "-z", "-l", commit, "--", "recipes/", folder=folder).split(b"\0")[:-1]:
        about, path = line.split(b"\t", 1)
        _, kind, blob, size = about.split()
        name = _recipe(path)
        if name is None or name in already or kind != b"blob" or int(size) > LARGEST_RECIPE:
            continue
        globs = _globs(git("cat-file", "blob", blob.decode(), folder=folder))
        if globs is None:
            notes.append(f"{name}: its `watch` cannot be read; nothing is started")
        elif globs and _differs(folder, base, commit, [f":(top,glob){glob}" for glob in globs]):
            found.add(name)
    return found


def _globs(content: bytes) -> list[str] | None:
    """A recipe's `watch:`, read without the rest of its schema, which is the commit's own matter."""
    try:
        recipe = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        return None
    globs = recipe.get("watch", []) if isinstance(recipe, dict) else None
    right = isinstance(globs, list) and all(isinstance(glob, str) and _GLOB.fullmatch(glob) for glob in globs)
    return globs if right else None


def _differs(folder: Path, base: str, commit: str, paths: Sequence[str]) -> bool:
    done = _call(
        "diff", "--quiet", "--no-renames", "--no-ext-diff", base, commit, "--", *paths, folder=folder
    )
    return done.returncode == 1


def _call(
    *arguments: str, folder: Path | None = None, timeout: float = 600
) -> subprocess.CompletedProcess[bytes]:
    where = ["-C", str(folder)] if folder else []
    options = [part for option in _SAFE for part in ("-c", option)]
    try:
        return subprocess.run(
            ["git", *where, *options, *arguments],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError:
        raise InputError("git is not installed here (apt-get install git)") from None
    except subprocess.TimeoutExpired:
        raise Unreachable(f"git {arguments[0]}: no answer in {timeout:.0f} s") from None


def _environment() -> dict[str, str]:
    """Ours, without what a surrounding hook or user set about another repository; git asks nobody."""
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GIT_") or name.startswith(_KEPT)
    }
    return own | {"GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}


def _without_credentials(words: str) -> str:
    return re.sub(r"(\w+://)[^/@\s]+@", r"\1", words)
