"""What each verb of `python -m flows` does, once its arguments are parsed; heavy imports are inside."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import store
from tasks.errors import InputError

if TYPE_CHECKING:
    from flows.judge import Outcome

STATUS = {"promoted": 0, "registered": 0, "unchanged": 0, "built": 4, "refused": 3}
BAD_INPUT, FAILED, ASKS = 2, 1, 5


def _optimize(options: argparse.Namespace) -> int:
    store.prepare()
    from flows import artifacts
    from flows.optimize import optimize

    with artifacts.tags():
        outcome = optimize(options.recipe, options.set)
    return _told(outcome, options.json)


def _retrain(options: argparse.Namespace) -> int:
    store.prepare()
    _registered(options.model)
    from flows import artifacts
    from flows.retrain import retrain

    with artifacts.tags():
        outcome = retrain(
            options.model, options.data, options.checkpoint, options.recipe, options.set, options.rebuild
        )
    return _told(outcome, options.json)


def _prune(options: argparse.Namespace) -> int:
    store.prepare(room=False)
    from flows.prune import prune, table

    run = prune.fn if store.full() else prune  # Prefect would write of it in its database
    print(table(run(options.delete, options.days), options.delete))
    return 0


def _watch(options: argparse.Namespace) -> int:
    store.prepare()
    _registered(options.model)
    from flows.watch import table, watch

    found = watch(options.model, options.data)
    print(table(options.model, found))
    if options.json:
        print(json.dumps(asdict(found)))
    return ASKS if found.asks else 0


def _told(outcome: Outcome, as_json: bool) -> int:
    from flows import summary

    print(summary.table(outcome))
    if as_json:
        print(json.dumps(summary.as_json(outcome)))
    return STATUS[outcome.verdict]


def _registered(model: str) -> None:
    """A misspelt model is told with the names that there are, before Prefect starts its server."""
    from tasks import registry_alias

    registry_alias.check_model(model)


def _verdict(options: argparse.Namespace) -> int:
    from flows.verdict import recompute

    content, same = recompute(options.run_id)
    sys.stdout.buffer.write(content + b"\n")
    print(
        "the verdict that was logged" if same else "error: NOT the verdict that was logged", file=sys.stderr
    )
    return 0 if same else FAILED


def _promote(options: argparse.Namespace) -> int:
    _registered(options.model)
    from flows import promote
    from tasks import registry_alias

    if options.to:
        registry_alias.set_alias(options.model, options.to)
    done = promote.agree(options.model)
    print(f"{done.model}: {done.action}, champion {done.champion} ({done.seconds:.1f} s)")
    return STATUS["refused"] if done.action == "refused" else 0


def _reconcile(_options: argparse.Namespace) -> int:
    from flows import promote
    from tasks import registry_alias

    for model in registry_alias.models():
        done = promote.agree(model)
        print(f"{done.model}: {done.action}, champion {done.champion} ({done.seconds:.1f} s)")
    return 0


def _rollback(options: argparse.Namespace) -> int:
    _registered(options.model)
    from flows import promote

    done = promote.back(options.model, options.to, options.by or _user(), options.reason)
    print(f"{done.model}: {done.action}, champion {done.champion} ({done.seconds:.1f} s)")
    return 0 if done.action == "rolled-back" else FAILED


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return f"user {os.getuid()}"


def _override(options: argparse.Namespace) -> int:
    if not (options.by.strip() and options.reason.strip()):
        raise InputError("override: --by and --reason must say who answers for it, and why")
    from flows import promote

    line = promote.override(options.model, options.version, options.by, options.reason)
    print(
        f"line {line.number}: version {line.after} of {line.model} may be promoted; now set the alias on it"
    )
    return 0


def _history(options: argparse.Namespace) -> int:
    from flows import history

    print(history.table(options.model))
    return 0


def _verify(options: argparse.Namespace) -> int:
    _registered(options.address.partition("@")[0])
    from flows import verify

    lines, whole = verify.report(options.address)
    print("\n".join(lines))
    return 0 if whole else FAILED


def _predict(options: argparse.Namespace) -> int:
    from tasks import deploy

    for row in deploy.predict(options.model, [_value(text) for text in options.values]):
        print(json.dumps(row))
    return 0


def _value(text: str) -> Any:
    """An image's JSON array or a pair's JSON object, else the text itself."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    pair = isinstance(found, dict) and set(found) <= {"image", "text"}
    return found if pair or isinstance(found, list) else text


def _touched(options: argparse.Namespace) -> int:
    from tasks import git

    folder, commit = Path(options.repository), git.commit_id(options.commit)
    before = git.commit_id(options.before) if options.before and options.before != git.ZEROS else None
    found = git.touched(folder, git.base(folder, commit, before), commit)
    for note in found.notes:
        print(note, file=sys.stderr)
    for recipe in found.recipes:
        print(recipe)
    return 0


def _push(options: argparse.Namespace) -> int:
    from tasks import git, repositories

    git.commit_id(options.commit)
    repositories.find(options.repository)
    store.prepare()
    from flows.push import push

    push(options.repository, options.commit, options.before, options.branch)
    return 0


VERBS = {
    "optimize": _optimize,
    "retrain": _retrain,
    "verdict": _verdict,
    "prune": _prune,
    "watch": _watch,
    "promote": _promote,
    "reconcile": _reconcile,
    "rollback": _rollback,
    "override": _override,
    "history": _history,
    "verify": _verify,
    "predict": _predict,
    "touched": _touched,
    "push": _push,
}

_MLFLOW = ("MLFLOW_TRACKING_URI",)
_BOTH = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL")
SERVICES = {
    **dict.fromkeys(("optimize", "retrain", "watch", "push"), _BOTH),
    **dict.fromkeys(("prune", "verdict", "promote", "reconcile", "rollback", "override", "verify"), _MLFLOW),
}
"""Whose addresses a verb needs; the others ask neither server."""
