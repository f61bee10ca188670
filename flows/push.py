"""A git push: the recipes that it touches, one run each, once per commit, in a clean checkout of that commit.

python -m flows push REPOSITORY COMMIT --branch BRANCH [--before COMMIT]
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prefect.runtime
from prefect import Flow, flow, task
from prefect.client.schemas.objects import State
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed, Failed
from prefect.variables import Variable

from flows import keyed
from flows.commit import mirror, optimize_commit, printable, tags
from flows.keyed import Keyed
from tasks import checkout, git, repositories
from tasks.repositories import Repository
from tasks.stage import NETWORK, say
from tasks.status import tell

heads = task(name="ask for branches", persist_result=False, **NETWORK)(checkout.heads)


def _name() -> str:
    asked = prefect.runtime.flow_run.parameters
    return f"{printable(asked['branch'])} @ {asked['commit'][:7]}"


@flow(name="push", flow_run_name=_name, persist_result=False)
def push(repository: str, commit: str, before: str | None = None, branch: str = "main") -> State[Any]:
    """Start what the push of `before`..`commit` to the branch touches; the state's message says what."""
    commit, branch = git.commit_id(commit), git.branch_name(branch)
    before = git.commit_id(before) if before and before != git.ZEROS else None
    allowed = repositories.find(repository)
    if not allowed.allows(branch):
        return _done(
            f"{allowed.name}: pushes to {branch} start nothing (allowed: {', '.join(allowed.branches)})"
        )
    place = mirror(allowed)
    if not checkout.holds(place, branch, commit):
        return _done(f"{commit[:7]} is not on {branch}: deleted, or replaced by a force push, since")
    base = checkout.base(place, allowed, commit, before, branch)
    found = git.touched(place, base, commit)
    lines = [start(place, allowed, recipe, base, commit, branch) for recipe in found.recipes]
    return _done("; ".join([*lines, *found.notes]) or f"{commit[:7]} touches no recipe")


@flow(name="poll", persist_result=False)
def poll(repository: str | None = None, branch: str | None = None) -> State[Any]:
    """Ask the repository (or every allowed one) for branches that moved, and hand those to `push`."""
    wanted = [repositories.find(repository)] if repository else list(repositories.configured())
    words, problems = [], []
    for each in wanted:  # one that is away keeps nobody else waiting
        try:
            said, failed = _look(each, branch)
        except git.GitError as error:
            said, failed = [], [str(error)]
        words += [f"{each.name}: {line}" for line in said]
        problems += [f"{each.name}: {line}" for line in failed]
    if problems:
        return Failed(message="; ".join([*problems, *words]))
    return _done("; ".join(words) or f"{repositories.file()} allows none")


def _look(repository: Repository, branch: str | None) -> tuple[list[str], list[str]]:
    """What the branches have to say, and what went wrong with some."""
    now = {name: tip for name, tip in heads(repository.url, branch).items() if repository.allows(name)}
    first = _seen(repository, "") is None
    found = [_follow(repository, name, tip, first) for name, tip in sorted(now.items())]
    _remember(repository, "", "known")
    if first:
        return ["seen for the first time, remembered"], []
    failed = [each.words for each in found if each.failed]
    moved = ", ".join(each.words for each in found if each.words and not each.failed)
    return [moved or "nothing moved"] if moved or not failed else [], failed


@dataclass(frozen=True)
class Followed:
    """What a poll says of a branch, where it says anything."""

    words: str = ""
    failed: bool = False


def _follow(repository: Repository, branch: str, tip: str, first: bool) -> Followed:
    """Hand a branch that moved to `push`, and remember its tip once that has done its work."""
    before = _seen(repository, branch)
    if before == tip:
        return Followed()
    found, name = Followed(), printable(branch)
    if not first:
        values = {"repository": repository.name, "commit": tip, "before": before, "branch": branch}
        key = git.push_key(repository.name, tip, before, branch)
        run = _run(push, "push/commit", values, f"{name} @ {tip[:7]}", key, ["push"])
        if run and run.failed:
            return Followed(f"{name} @ {tip[:7]}: {run.words}", failed=True)
        if run and not run.done:
            return Followed(name if run.fresh else f"{name} ({run.words})")
        found = Followed("" if run else name)
    # Last, so that a poll that dies before it, or a push that fails, is not the end of it.
    _remember(repository, branch, tip)
    return found


def start(place: Path, repository: Repository, recipe: str, base: str, commit: str, branch: str) -> str:
    """Start one recipe at one commit, unless it was; returns what happened in words."""
    name = f"{printable(recipe)} @ {commit[:7]}"
    # A poll sees several pushes as one: what an earlier one started is not started again, if nothing changed.
    earlier = git.untouched_since(place, base, commit, recipe)
    taken = keyed.taken([_key(repository, each, recipe) for each in (commit, *earlier)])
    if taken:
        return f"{name}: already started as {taken}"
    tell(repository, commit, recipe, "pending", "waits for a worker")
    parameters = {"repository": repository.name, "recipe": recipe, "commit": commit, "branch": branch}
    key = _key(repository, commit, recipe)
    _run(optimize_commit, "optimize-commit/recipe", parameters, name, key, tags(recipe, commit, branch))
    return f"{name}: started"


def _key(repository: Repository, commit: str, recipe: str) -> str:
    return f"{repository.name}:{commit}:{recipe}"


def _run(
    flow: Flow[..., Any], deployment: str, parameters: dict[str, Any], name: str, key: str, tags: list[str]
) -> Keyed | None:
    """Through the deployment where a server keeps one, else here and now: then there is no other run."""
    if not PREFECT_API_URL.value():
        flow(**parameters)
        return None
    return keyed.start(deployment, parameters, key, tags, name)


def _remember(repository: Repository, branch: str, commit: str) -> None:
    Variable.set(_memory(repository, branch), commit, overwrite=True)


def _seen(repository: Repository, branch: str) -> str | None:
    found = Variable.get(_memory(repository, branch))
    return str(found) if found else None


def _memory(repository: Repository, branch: str) -> str:
    return "enginehouse_seen_" + hashlib.sha256(f"{repository.name}\0{branch}".encode()).hexdigest()[:24]


def _done(words: str) -> State[Any]:
    say(words)
    return Completed(message=words)
