"""python -m flows VERB: arguments and recipe are checked before Prefect or anything heavy is imported."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import recipes
from tasks import store
from tasks.errors import InputError

if TYPE_CHECKING:
    from flows.judge import Outcome

STATUS = {"promoted": 0, "registered": 0, "unchanged": 0, "built": 4, "refused": 3}
BAD_INPUT, FAILED, ASKS = 2, 1, 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, check, run; the exit status says how it ended (see --help)."""
    options = _parser().parse_args(arguments)
    try:
        if options.verb == "recipes":
            print("\n".join(recipes.names()))
            return 0
        if options.verb == "verdict":
            return _verdict(options)
        if options.verb == "touched":
            return _touched(options)
        if options.verb == "push":
            return _push(options)
        if options.verb == "prune":
            return _prune(options)
        if options.verb == "watch":
            return _watch(options)
        if options.recipe:
            recipes.load(options.recipe, options.set)
        return _retrain(options) if options.verb == "retrain" else _optimize(options)
    except (recipes.RecipeError, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("stopped; the finished stages are kept", file=sys.stderr)
        return 130
    except Exception as error:
        if store.full():  # whoever noticed first: a database tells it in words of its own
            print(f"error: the disk is full: {store.home()} (free space and run again)", file=sys.stderr)
            return BAD_INPUT
        if os.environ.get("ENGINEHOUSE_TRACEBACK"):
            raise
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        print("(ENGINEHOUSE_TRACEBACK=1 shows where; the finished stages are kept)", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flows",
        description="Fine-tune, prune, quantize, build, gate and promote.",
        epilog="Exit status: 0 promoted, registered or nothing changed, 3 refused by the gate, 4 built but "
        "not executable here, 5 watch asks for something, 2 bad recipe or input, 1 anything else.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    optimize = verbs.add_parser("optimize", help="run a recipe from data to a promoted engine")
    optimize.add_argument("recipe", help="a name in recipes/, or a path to a .yaml file")
    _common(optimize)
    retrain = verbs.add_parser("retrain", help="bring a registered model up to its data or a new checkpoint")
    retrain.add_argument("model", help="the registered model's name")
    retrain.add_argument("--data", metavar="SOURCE", help="new rows: a path, or a source as in a recipe")
    retrain.add_argument("--checkpoint", metavar="DIR", help="weights trained elsewhere, instead of training")
    retrain.add_argument("--recipe", help="a newer recipe than the champion's")
    retrain.add_argument(
        "--rebuild", action="store_true", help="retrain anyway, and build instead of refitting"
    )
    _common(retrain)
    watch = verbs.add_parser("watch", help="compare new, unlabelled inputs with the calibration rows")
    watch.add_argument("model", help="the registered model's name")
    watch.add_argument("--data", metavar="SOURCE", required=True, help="a path, or a source as in a recipe")
    watch.add_argument("--json", action="store_true", help="print the result as one JSON line, last")
    prune = verbs.add_parser("prune", help="remove artifacts that no version, run or ledger line refers to")
    prune.add_argument("--delete", action="store_true", help="do it; otherwise only say what would go")
    prune.add_argument("--days", type=float, default=1.0, help="touch nothing younger (1)")
    verbs.add_parser("recipes", help="list the recipes that ship")
    verdict = verbs.add_parser("verdict", help="judge a logged run again; the bytes must be the same")
    verdict.add_argument("run_id", metavar="RUN_ID", help="the MLflow run")
    touched = verbs.add_parser("touched", help="list the recipes that a push touches")
    touched.add_argument("commit", help="40 hex digits")
    touched.add_argument("--before", help="what the branch held before; the commit's parent by default")
    touched.add_argument("--repository", default=".", metavar="FOLDER", help="a clone that holds both")
    push = verbs.add_parser("push", help="start the recipes that a push touches, in a checkout of its commit")
    push.add_argument("repository", help="a name or an address in the allow list")
    push.add_argument("commit", help="40 hex digits")
    push.add_argument("--before", help="what the branch held before; none for a new branch")
    push.add_argument("--branch", default="main")
    return parser


def _common(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="change one value; repeatable"
    )
    verb.add_argument("--json", action="store_true", help="print the result as one JSON line, last")


def _optimize(options: argparse.Namespace) -> int:
    store.prepare()
    from flows import artifacts
    from flows.optimize import optimize

    with artifacts.tags():
        outcome = optimize(options.recipe, options.set)
    return _told(outcome, options.json)


def _retrain(options: argparse.Namespace) -> int:
    store.prepare()
    from flows.retrain import retrain

    outcome = retrain(
        options.model, options.data, options.checkpoint, options.recipe, options.set, options.rebuild
    )
    return _told(outcome, options.json)


def _prune(options: argparse.Namespace) -> int:
    store.prepare()
    from flows.prune import prune, table

    print(table(prune(options.delete, options.days), options.delete))
    return 0


def _watch(options: argparse.Namespace) -> int:
    store.prepare()
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


def _verdict(options: argparse.Namespace) -> int:
    from flows.verdict import recompute

    content, same = recompute(options.run_id)
    sys.stdout.buffer.write(content + b"\n")
    print("the same bytes as logged" if same else "error: NOT the verdict that was logged", file=sys.stderr)
    return 0 if same else FAILED


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


if __name__ == "__main__":
    sys.exit(main())
