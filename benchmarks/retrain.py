"""What a retrain costs against a first optimize: seconds and bytes, stage by stage.

python -m benchmarks.retrain [RECIPE] [--out FOLDER] [--set section.key=value …]

Runs, one after the other, each as a command of its own, on a state folder of its own: optimize; retrain
with nothing changed; retrain with newspaper sentences added to the rows (the champion's plan is refitted);
the same retrain with --rebuild from the same champion. Bytes are what each adds: to MLflow's artifacts,
and to the store of intermediate results before and after `prune`. One machine, one seed; the table says
which.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import recipes
from tasks.manifest import host

DEMO = "sentiment-minilm-int8-qat-24"
FURTHER = "nytEditorialSnippets_GroundTruth.txt"


def main() -> None:
    """Run the four, print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default=DEMO)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "enginehouse-retrain")
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    recipe = recipes.load(options.recipe)
    source = Path(recipe.data.source.removeprefix("path:"))
    more = ["--data", str(_more(source, recipe.data.files, options.out / "more"))]
    changes = ["gate.max_forgetting=0.02", *options.set]
    sets = [word for change in changes for word in ("--set", change)]
    home = options.out / "home"
    name = recipe.model.name
    first = _run(home, ["optimize", options.recipe, *sets])
    rows = [("first optimize", first), ("retrain, nothing changed", _run(home, ["retrain", name]))]
    shutil.copytree(home, options.out / "before", symlinks=True)
    rows.append(("retrain, refitted", _run(home, ["retrain", name, *more])))
    shutil.rmtree(home)
    (options.out / "before").rename(home)  # the same champion, at the same addresses
    rows.append(("retrain, rebuilt", _run(home, ["retrain", name, *more, "--rebuild"])))
    print(_tables(rows))


def _more(source: Path, files: Sequence[str], folder: Path) -> Path:
    """The recipe's files, and the rows of a further one."""
    shutil.copytree(source, folder)
    with (folder / files[0]).open("ab") as out:
        out.write(b"\n" + (source / FURTHER).read_bytes())
    return folder


def _run(home: Path, arguments: list[str]) -> dict[str, Any]:
    environment = os.environ | {"ENGINEHOUSE_HOME": str(home), "PREFECT_HOME": str(home / "prefect")}
    environment["PREFECT_LOCAL_STORAGE_PATH"] = str(home / "results")
    before = {name: _bytes(home / name) for name in ("mlartifacts", "store")}
    began = time.perf_counter()
    command = [sys.executable, "-m", "flows", *arguments, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode not in (0, 3):
        raise SystemExit(done.stderr[-3000:])
    prune = [sys.executable, "-m", "flows", "prune", "--days", "0", "--delete"]
    grown = _bytes(home / "store") - before["store"]
    subprocess.run(prune, env=environment, capture_output=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    manifest = json.loads(Path(found["manifest"]).read_text())
    return {
        "seconds": seconds,
        "verdict": found["verdict"],
        "accuracy": found["metrics"].get("candidate_accuracy"),
        "mlflow": _bytes(home / "mlartifacts") - before["mlartifacts"],
        "store": grown,
        "kept": _bytes(home / "store") - before["store"],
        "stages": manifest["stages"] if found["verdict"] != "unchanged" else [],
        "retrained": manifest.get("retrained"),
    }


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _tables(rows: list[tuple[str, dict[str, Any]]]) -> str:
    machine = host()
    lines = [f"{machine['processor']}, {machine['cores']} cores, {machine['system']}", ""]
    lines += ["| run | verdict | accuracy | seconds | MLflow MB | store MB | after prune MB | engine |"]
    lines += ["|---|---|--:|--:|--:|--:|--:|---|"]
    for name, run in rows:
        accuracy = "" if run["accuracy"] is None else f"{run['accuracy']:.4f}"
        sizes = " | ".join(f"{run[key] / 1e6:.1f}" for key in ("mlflow", "store", "kept"))
        engine = _engine(run["retrained"]) if run["stages"] else ""
        lines.append(
            f"| {name} | {run['verdict']} | {accuracy} | {run['seconds']:.0f} | {sizes} | {engine} |"
        )
    lines += ["", "| stage | " + " | ".join(name for name, run in rows if run["stages"]) + " |"]
    lines += ["|---|" + "--:|" * sum(bool(run["stages"]) for _, run in rows)]
    totals = [_by_stage(run["stages"]) for _, run in rows if run["stages"]]
    for stage in dict.fromkeys(stage for total in totals for stage in total):
        cells = [f"{total[stage]:.1f} s" if stage in total else "" for total in totals]
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _engine(retrained: dict[str, Any] | None) -> str:
    if retrained is None:
        return "built"
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in retrained["seconds"].items() if value)
    return f"{retrained['engine']} ({seconds})"


def _by_stage(stages: list[dict[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for stage in stages:
        found[stage["stage"]] = found.get(stage["stage"], 0.0) + stage["seconds"]
    return found


if __name__ == "__main__":
    main()
