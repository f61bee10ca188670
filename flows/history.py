"""What the ledger says of a model, for people.

python -m flows history NAME
"""

from __future__ import annotations

from tasks import ledger

COLUMNS = ("number", "at", "event", "actor", "from", "to", "run", "reason")


def rows(model: str) -> list[dict[str, str]]:
    """One row a line, newest first."""
    return [
        {
            "number": str(line.number),
            "at": line.at[:19].replace("T", " "),
            "event": line.event,
            "actor": line.actor,
            "from": line.before or "-",
            "to": line.after or "-",
            "run": (line.run_id or "-")[:8],
            "reason": line.reason,
        }
        for line in reversed(ledger.lines(model))
    ]


def table(model: str) -> str:
    """The rows under their headings, and whether the chain is whole."""
    found = rows(model)
    if not found:
        return f"{model}: nothing was ever promoted or refused"
    cells = [list(COLUMNS), *([row[name] for name in COLUMNS] for row in found)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(COLUMNS))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    broken = ledger.broken(ledger.lines(model))
    told = f"NOT WHOLE: {broken}" if broken else f"{len(found)} lines, each with the sha256 of the one before"
    return "\n".join([*lines, told])
