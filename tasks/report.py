"""The gate's report: the verdict in words (Markdown) and the intervals against their limits (PNG)."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from recipes.gate import Gate
from tasks.artifacts import Rule, Verdict
from tasks.measurements import Measurements, latency_summary

GOOD, BAD, INK, GRID = "#1a7f5a", "#c0392b", "#24292f", "#d0d7de"
PANELS = {"metric ratio": "metric, times the reference's", "ratio": "times the reference", "value": "value"}
SEEN: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": INK, "markersize": 5, "zorder": 3}


def report(verdict: Verdict, measurements: Measurements, gate: Gate, folder: Path, title: str) -> list[Path]:
    """Write `gate.md` and `gate.png` into the folder; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "gate.png"
    plot(verdict, picture, title)
    text = folder / "gate.md"
    text.write_text(markdown(verdict, measurements, gate, title, picture.name), encoding="utf-8")
    return [text, picture]


def markdown(verdict: Verdict, measurements: Measurements, gate: Gate, title: str, picture: str) -> str:
    """The verdict first, then every rule, what was measured, and the recipe's section as it was applied."""
    lines = [f"# {title}: {'passed' if verdict.passed else 'refused'}", ""]
    lines += [*(f"- {reason}" for reason in verdict.reasons), ""] if verdict.reasons else []
    lines += [f"![Differences and their limits]({picture})", "", "| rule | passed | |", "|---|---|---|"]
    for rule in verdict.rules:
        lines.append(f"| `{rule.name}` | {'yes' if rule.passed else '**no**'} | {rule.sentence} |")
    lines += ["", "## Measured", "", *_engines(measurements), "", *_latencies(measurements)]
    section = gate.model_dump(mode="json", exclude_defaults=True)
    lines += ["## The recipe's gate", "", "```yaml", _yaml(section), "```", ""]
    return "\n".join(lines)


def _yaml(section: dict[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump({"gate": section}, sort_keys=False)).rstrip()


def _engines(measurements: Measurements) -> list[str]:
    lines = [
        "| engine | evidence | bytes | peak memory | parity | quantized | sparse |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for name, engine in measurements.engines.items():
        sizes = [_text(x, ",") for x in (engine.bytes, engine.peak_memory_bytes)]
        shares = [_text(x, ".4g") for x in (engine.parity, engine.quantized_share, engine.sparse_share)]
        lines.append(f"| {name} | {engine.proved} | {' | '.join(sizes + shares)} |")
    return lines


def _latencies(measurements: Measurements) -> list[str]:
    lines = ["| engine | batch | p50 | p99 | examples a second | rounds |", "|---|--:|--:|--:|--:|--:|"]
    for name, engine in measurements.engines.items():
        for batch, rounds in sorted(engine.latency.items()):
            seen = latency_summary(rounds, batch)
            times = " | ".join(f"{1000 * seen[key]:.3f} ms" for key in ("p50", "p99"))
            lines.append(f"| {name} | {batch} | {times} | {seen['throughput']:,.0f} | {len(rounds)} |")
    return [*lines, ""] if len(lines) > 2 else []


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def plot(verdict: Verdict, path: Path, title: str) -> None:
    """Every rule that has a limit: its value and interval as a bar, the forbidden side in red."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels, rest = _panels(verdict), [rule for rule in verdict.rules if not rule.passed and not _drawn(rule)]
    notes = _notes(rest, any("detectable" in rule.facts for rule in verdict.rules))
    rows = [len(rules) + 1.4 for rules in panels.values()] + [0.4 + 0.48 * len(notes)]
    figure = Figure(figsize=(10.5, 0.8 + 0.42 * sum(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axis, (unit, rules) in zip(axes, panels.items(), strict=False):
        _panel(axis, unit, rules)
    axes[-1].set(xlim=(0, 1), ylim=(-len(notes), 0.2))
    axes[-1].set_axis_off()
    for row, (text, color) in enumerate(notes):
        axes[-1].text(0, -row - 0.5, text, fontsize=9, color=color, va="center")
    word, color = ("passed", GOOD) if verdict.passed else ("refused", BAD)
    met = sum(rule.passed for rule in verdict.rules)
    text = f"{title}: {word} ({met} of {len(verdict.rules)} rules met)"
    figure.suptitle(text, x=0.01, ha="left", fontsize=14, fontweight="bold", color=color)
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})


def _drawn(rule: Rule) -> bool:
    return rule.value is not None and "unit" in rule.facts


def _panels(verdict: Verdict) -> dict[str, list[Rule]]:
    """Rules by unit: changes of the metric first, then ratios, then values."""
    drawn = [rule for rule in verdict.rules if _drawn(rule)]
    units = dict.fromkeys(rule.facts["unit"] for rule in drawn)
    ordered = sorted(units, key=lambda unit: list(PANELS).index(unit) if unit in PANELS else -1)
    return {unit: [rule for rule in drawn if rule.facts["unit"] == unit] for unit in ordered}


def _panel(axis: Any, unit: str, rules: list[Rule]) -> None:
    scale = 100.0 if unit == "points" else 1.0
    low, high = _limits(rules, unit, scale)
    for row, rule in enumerate(reversed(rules)):
        _row(axis, row, rule, scale, low, high)
    if unit != "value":
        neutral = 1.0 if unit in PANELS else 0.0
        axis.axvline(neutral, color=INK, linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
    axis.set(xlim=(low, high), ylim=(-0.6, len(rules) - 0.4), yticks=range(len(rules)))
    axis.set_yticklabels([_label(rule.name) for rule in reversed(rules)])
    axis.set_xlabel(PANELS.get(unit, f"change in {unit}"), fontsize=9, color=INK)
    axis.tick_params(length=0, labelsize=9, colors=INK)
    axis.grid(axis="x", color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    for side in axis.spines.values():
        side.set_visible(False)


def _row(axis: Any, row: int, rule: Rule, scale: float, low: float, high: float) -> None:
    assert rule.value is not None
    assert rule.limit is not None
    color, limit, value = GOOD if rule.passed else BAD, scale * rule.limit, scale * rule.value
    least = rule.facts["bound"] == "at least"
    start, end = (low, limit) if least else (limit, high)
    axis.barh(row, end - start, left=start, height=0.62, color=BAD, alpha=0.10, zorder=0)
    axis.plot([limit, limit], [row - 0.31, row + 0.31], color=BAD, linewidth=1.6, zorder=2)
    if rule.interval:
        ends = [scale * x for x in rule.interval]
        axis.plot(ends, [row, row], color=color, linewidth=6, alpha=0.35, zorder=3, solid_capstyle="butt")
    if "detectable" in rule.facts:
        seen, *reach = (scale * x for x in _detectable(rule))
        axis.plot(reach, [row, row], color=INK, linewidth=1.2, zorder=3)
        axis.plot(seen, row, "D", **SEEN)
    axis.plot(value, row, "o", color=color, markersize=7, zorder=4)
    text = f"{'✓' if rule.passed else '✗'}  {_figure(value, scale)}"
    if rule.interval:
        text += f", at worst {_figure(scale * rule.interval[0 if least else 1], scale)}"
    axis.text(1.01, row, text, transform=axis.get_yaxis_transform(), va="center", fontsize=9, color=color)


def _detectable(rule: Rule) -> list[float]:
    """It and its interval, as changes of the metric: a drop is below zero where higher is better."""
    sign = -1 if rule.facts["bound"] == "at least" else 1
    value = rule.facts["detectable"]
    return [sign * float(x) for x in (value, *rule.facts.get("detectable_interval", (value, value)))]


def _figure(value: float, scale: float) -> str:
    small = 0 < abs(value) < 5e-4  # would be drawn as 0.000
    form = "+.2f" if scale > 1 else ".1e" if small else ".3f" if abs(value) < 100 else ",.0f"
    return format(value, form).replace("-", "−")


def _notes(rules: list[Rule], sensitivity: bool) -> list[tuple[str, str]]:
    """The key, and what failed and cannot be drawn: lines and their colours."""
    key = ["● measured, with its interval; red is not allowed, and no end of an interval may reach into it"]
    if sensitivity:
        key.append("◇ the smallest drop that the examples can tell from noise, with its interval")
    failed = [line for rule in rules for line in textwrap.wrap("✗  " + rule.sentence, 125)]
    return [(line, "#57606a") for line in key] + [(line, BAD) for line in failed]


def _limits(rules: list[Rule], unit: str, scale: float) -> tuple[float, float]:
    """Room for every value, interval and limit, and some of the forbidden side."""
    seen = [x for rule in rules for x in (rule.value, rule.limit, *(rule.interval or ())) if x is not None]
    seen += [x for rule in rules if "detectable" in rule.facts for x in _detectable(rule)]
    marks = [scale * x for x in seen] + ([] if unit == "value" else [1.0 if unit in PANELS else 0.0])
    room = 0.12 * ((max(marks) - min(marks)) or 1.0)
    return min(marks) - room, max(marks) + room


def _label(name: str) -> str:
    if name == "forgetting":
        return "previous rows vs. champion"
    return name.replace("_", " ").replace(" vs ", " vs. ")
