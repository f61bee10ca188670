"""What a run prints at its end: the table, where to look, and one JSON line."""

from __future__ import annotations

import math
import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import registry_engine, store

if TYPE_CHECKING:
    from flows.judge import Outcome
    from tasks.artifacts import Version
    from tasks.manifest import Attempt


def table(outcome: Outcome) -> str:
    """Engines side by side, then the verdict, the version and the commands that open the two UIs."""
    version, attempt = outcome.version, outcome.attempt
    alias = f", alias {version.alias}" if version.alias else ", no alias"
    lines = ["", *(_attempt(outcome, attempt) if attempt else [])]
    lines.append(f"{outcome.verdict.upper()}: {version.model} version {version.version}{alias}")
    lines += [f"  {reason}" for reason in outcome.reasons]
    if attempt:
        lines += _story(attempt)
    lines += [
        f"manifest  {version.manifest}",
        f"MLflow    {_mlflow(version)}",
        f"Prefect   {_prefect()}",
    ]
    return "\n".join(lines)


def _attempt(outcome: Outcome, attempt: Attempt) -> list[str]:
    rules = attempt.verdict.rules if attempt.verdict else ()
    judged = [f"  {'pass' if rule.passed else 'FAIL'}  {rule.sentence}" for rule in rules]
    return [*_engines(outcome, attempt), "", *judged, *([""] if judged else [])]


def _story(attempt: Attempt) -> list[str]:
    """How the engine was made, and how long everything took."""
    lines = []
    if attempt.retrained:
        seconds = ", ".join(f"{k} {v:.1f} s" for k, v in attempt.retrained["seconds"].items() if v)
        lines.append(f"engine {attempt.retrained['engine']} ({seconds}): {attempt.retrained['why']}")
    reused = sum(timing.reused for timing in attempt.timeline)
    total = sum(timing.seconds for timing in attempt.timeline)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    stages = f"{len(attempt.timeline)} stages in {total:.0f} s, {reused} reused"
    return [*lines, f"{stages}; peak memory {peak:.1f} GiB"]


def _prefect() -> str:
    """Where to look, or the command that shows it."""
    api = os.environ.get("PREFECT_API_URL", "")
    quiet = f"PREFECT_SERVER_ANALYTICS_ENABLED=false PREFECT_HOME={os.environ['PREFECT_HOME']}"
    own = f"{quiet} {_command('prefect')} server start"
    return api.removesuffix("/api") or own


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The result for programs; JSON has no NaN, so a metric without a finite value is null."""
    return {
        "verdict": outcome.verdict,
        "recipe": outcome.recipe,
        "model": outcome.version.model,
        "version": outcome.version.version,
        "alias": outcome.version.alias,
        "reasons": list(outcome.reasons),
        "metrics": {name: value if math.isfinite(value) else None for name, value in outcome.metrics.items()},
        "run_id": outcome.version.run_id,
        "manifest": outcome.version.manifest,
    }


def _engines(outcome: Outcome, attempt: Attempt) -> list[str]:
    numbers = outcome.metrics
    metric = attempt.recipe.gate.metric
    sizes = attempt.recipe.benchmark.batch_sizes
    header = ["engine", "format", "runtime", "proved", "MB", f"{metric} (n={attempt.dataset.rows['test']})"]
    header += [f"p50/p99 ms, batch {size}" for size in sizes]
    rows = [header]
    for name, engine in attempt.engines.items():
        value = numbers.get(f"{name}_{metric}")
        row = [name, engine.format, f"{engine.plan.runtime} {engine.plan.version}", engine.proved]
        row += [f"{engine.bytes / 1e6:.1f}", "-" if value is None else f"{value:.4f}"]
        for size in sizes:
            p50, p99 = (numbers.get(f"{name}_{key}_b{size}") for key in ("p50", "p99"))
            row.append("-" if p50 is None or p99 is None else f"{_ms(p50)}/{_ms(p99)}")
        rows.append(row)
    widths = [max(len(row[k]) for row in rows) for k in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _ms(seconds: float) -> str:
    """Milliseconds to a tenth; a short call's with two digits, or all of them would be 0.0."""
    return f"{seconds * 1e3:.1f}" if seconds >= 1e-3 else f"{seconds * 1e3:.2g}"


def _mlflow(version: Version) -> str:
    """The version's page, which MLflow's front page does not lead to, or the command that serves it."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", registry_engine.default_uri())
    page = f"#/models/{version.model}/versions/{version.version}"
    if uri.startswith("http"):
        return f"{uri}/{page}"
    if uri != registry_engine.default_uri():
        return uri
    artifacts = (store.home() / "mlartifacts").as_uri()
    quiet = "MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false"
    command = f"{quiet} {_command('mlflow')} server -w 1"
    command += f" --backend-store-uri {uri} --artifacts-destination {artifacts}"
    return f"{command}\n          then http://127.0.0.1:5000/{page}"


def _command(name: str) -> str:
    """The command beside this Python, relative to here where that is shorter."""
    place = Path(sys.executable).parent / name
    return os.path.relpath(place) if place.is_relative_to(Path.cwd()) else str(place)
