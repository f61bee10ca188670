"""python -m flows VERB: arguments and recipe are checked before Prefect or anything heavy is imported."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import recipes
from flows import settings
from flows.verbs import BAD_INPUT, FAILED, SERVICES, VERBS
from tasks import store
from tasks.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, check, run; the exit status says how it ended (see --help)."""
    options = _parser().parse_args(arguments)
    try:
        if options.verb == "recipes":
            print("\n".join(recipes.names()))
            return 0
        if getattr(options, "recipe", None):
            recipes.load(options.recipe, options.set)
        settings.check_services(*SERVICES.get(options.verb, ()))
        return VERBS[options.verb](options)
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
    prune.add_argument("--days", type=float, default=1.0, help="touch nothing used since (1)")
    verbs.add_parser("recipes", help="list the recipes that ship")
    verdict = verbs.add_parser("verdict", help="judge a logged run again; the verdict must be the same")
    verdict.add_argument("run_id", metavar="RUN_ID", help="the MLflow run")
    _promotion_verbs(verbs)
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


def _promotion_verbs(verbs: Any) -> None:
    promote = verbs.add_parser("promote", help="bring alias, ledger and serving folder into agreement")
    promote.add_argument("model", metavar="NAME")
    promote.add_argument("--to", metavar="V", help="first set the alias on this version, as in MLflow's UI")
    verbs.add_parser("reconcile", help="the same for every registered model")
    rollback = verbs.add_parser("rollback", help="restore the champion before this one, alias and engine")
    rollback.add_argument("model", metavar="NAME")
    rollback.add_argument("--to", metavar="V", help="restore this version instead")
    rollback.add_argument("--by", metavar="WHO", help="default: you")
    rollback.add_argument("--reason", metavar="TEXT", default="rolled back by hand")
    override = verbs.add_parser("override", help="let a version be promoted though its gate refused it")
    override.add_argument("model", metavar="NAME")
    override.add_argument("version", metavar="VERSION")
    override.add_argument("--by", metavar="WHO", required=True, help="who answers for it")
    override.add_argument("--reason", metavar="TEXT", required=True)
    history = verbs.add_parser("history", help="every move of a model's champion: the ledger")
    history.add_argument("model", metavar="NAME")
    verify = verbs.add_parser("verify", help="check digests, ledger, verdict and what is deployed")
    verify.add_argument("address", metavar="NAME@champion", help="or NAME@VERSION")
    predict = verbs.add_parser("predict", help="ask the deployed version")
    predict.add_argument("model", metavar="NAME")
    predict.add_argument(
        "values",
        metavar="VALUE",
        nargs="+",
        help='a text, an image as a JSON array, or {"image": …, "text": …}',
    )


if __name__ == "__main__":
    sys.exit(main())
