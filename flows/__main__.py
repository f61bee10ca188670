"""python -m flows VERB: arguments and recipe are checked before Prefect or anything heavy is imported."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import recipes
from tasks import store
from tasks.errors import InputError

if TYPE_CHECKING:
    from flows.optimize import Outcome

STATUS = {"promoted": 0, "registered": 0, "built": 4, "refused": 3}
BAD_INPUT, FAILED = 2, 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, check, run; the exit status says how it ended (see --help)."""
    options = _parser().parse_args(arguments)
    try:
        if options.verb == "recipes":
            print("\n".join(recipes.names()))
            return 0
        if options.verb == "verdict":
            return _verdict(options)
        if options.verb in PROMOTION:
            return PROMOTION[options.verb](options)
        recipes.load(options.recipe, options.set)
        return _optimize(options)
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
        epilog="Exit status: 0 promoted or registered, 3 refused by the gate, "
        "4 built but not executable here, 2 bad recipe or input, 1 anything else.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    optimize = verbs.add_parser("optimize", help="run a recipe from data to a promoted engine")
    optimize.add_argument("recipe", help="a name in recipes/, or a path to a .yaml file")
    optimize.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="change one value; repeatable"
    )
    optimize.add_argument("--json", action="store_true", help="print the result as one JSON line, last")
    verbs.add_parser("recipes", help="list the recipes that ship")
    verdict = verbs.add_parser("verdict", help="judge a logged run again; the bytes must be the same")
    verdict.add_argument("run_id", metavar="RUN_ID", help="the MLflow run")
    _promotion_verbs(verbs)
    return parser


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
    predict.add_argument("values", metavar="VALUE", nargs="+", help="a text, or an image as a JSON array")


def _optimize(options: argparse.Namespace) -> int:
    store.prepare()
    from flows import summary
    from flows.optimize import optimize

    outcome: Outcome = optimize(options.recipe, options.set)
    print(summary.table(outcome))
    if options.json:
        print(json.dumps(summary.as_json(outcome)))
    return STATUS[outcome.verdict]


def _verdict(options: argparse.Namespace) -> int:
    from flows.verdict import recompute

    content, same = recompute(options.run_id)
    sys.stdout.buffer.write(content + b"\n")
    print("the same bytes as logged" if same else "error: NOT the verdict that was logged", file=sys.stderr)
    return 0 if same else FAILED


def _promote(options: argparse.Namespace) -> int:
    from flows import promote
    from tasks import registry_alias

    registry_alias.check_model(options.model)
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
    from flows import promote
    from tasks import registry_alias

    registry_alias.check_model(options.model)
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
    """An image's JSON array, else the text itself."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if isinstance(found, list) else text


PROMOTION = {
    "promote": _promote,
    "reconcile": _reconcile,
    "rollback": _rollback,
    "override": _override,
    "history": _history,
    "verify": _verify,
    "predict": _predict,
}


if __name__ == "__main__":
    sys.exit(main())
