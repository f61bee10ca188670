"""Remove what no version, run or ledger line refers to; says what it would remove unless told to.

python -m flows prune [--delete] [--days N]
"""

from __future__ import annotations

from prefect import flow

from tasks import prune as collector
from tasks.prune import Survey
from tasks.stage import say


@flow(name="prune", persist_result=False, validate_parameters=False)
def prune(delete: bool = False, days: float = 1.0) -> Survey:
    """Look, and with `delete` remove; nothing used in the last `days` is touched."""
    found = collector.survey(days)
    word = "removing" if delete else "would remove"
    for garbage in found.garbage:
        say(f"{word} {garbage.kind} {garbage.place} ({_mb(garbage.bytes)})")
        if delete:
            collector.remove(garbage)
    return found


def table(found: Survey, delete: bool) -> str:
    """Kept and removed, in words."""
    total = sum(garbage.bytes for garbage in found.garbage)
    word = "removed" if delete else "can be removed (--delete does it)"
    return (
        f"{found.kept} artifacts are kept ({_mb(found.kept_bytes)}): young, or a version or run has them\n"
        f"{len(found.garbage)} {word} ({_mb(total)})"
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
