"""python -m infra up|down|status: the services of one machine; `make up`, `make down`, `make status`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from filelock import FileLock, Timeout

from infra import keys, setup
from tasks.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; 0 when all is as asked, 1 when a service is down (status), 2 for an error to fix."""
    options = _parser().parse_args(arguments)
    try:
        if options.verb == "status":
            return status()
        with FileLock(keys.folder() / "lock", timeout=0):
            return up() if options.verb == "up" else down()
    except Timeout:
        print("error: another `up` or `down` is at work on this state folder", file=sys.stderr)
        return 2
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m infra",
        description="Prefect, MLflow, a worker and the receiver on this machine, all on loopback.",
        epilog="Environment: AUTH=1, DATABASE_URL=postgresql://…, PREFECT_PORT, MLFLOW_PORT, RECEIVER_PORT; "
        "what was chosen is kept for the next time. State lives in ENGINEHOUSE_HOME.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("up", help="start what is missing, apply infra/prefect.yaml, wait until all answer")
    verbs.add_parser("down", help="stop what `up` started")
    verbs.add_parser("status", help="what runs, where it answers, what memory it takes")
    return parser


def up() -> int:
    """Start what is missing, wait until it answers, apply what the servers must know."""
    from infra import manage

    chosen = setup.load(remember=True)
    manage.up(chosen)
    print(manage.addresses(chosen))
    return 0


def down() -> int:
    """Stop everything of ours; state, logs and secrets stay."""
    from infra import manage

    manage.down(keys.folder())
    return 0


def status() -> int:
    """One line for each service."""
    from infra import manage

    lines, well = manage.status(setup.load())
    print("\n".join(lines))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
