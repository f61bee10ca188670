"""Losses by step of a run's trainings, and the plot that shows what each kind of compression costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.report import GRID, INK

if TYPE_CHECKING:
    from tasks.manifest import Attempt

Curve = list[dict[str, float]]
COLORS = ("#57606a", "#1f6feb", "#bc4c00")  # dense, sparse, the candidate


def curves(attempt: Attempt) -> dict[str, Curve]:
    """The curve of each network that ended with training; with compare_dense those of the controls, too."""
    made = attempt.checkpoints | attempt.controls
    return {name: item.facts["curve"] for name, item in made.items() if item.facts.get("curve")}


def validation(curve: Curve) -> list[tuple[int, float]]:
    """The steps at which the validation rows were looked at, and their loss."""
    return [(int(p["step"]), p["validation_loss"]) for p in curve if "validation_loss" in p]


def plot(found: dict[str, Curve], words: str, path: Path, title: str) -> None:
    """Validation loss against step: dense, sparse with and without tuning, and the candidate (`words`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    names = {"dense": "dense, trained", "sparse": "2:4, trained", "candidate": f"{words}, trained"}
    for color, (name, label) in zip(COLORS, names.items(), strict=True):
        steps, losses = zip(*validation(found[name]), strict=True)
        axis.plot(steps, losses, "o-", color=color, markersize=3.5, linewidth=1.6, label=_ends(label, losses))
    untuned = validation(found["sparse"])[0][1]
    axis.axhline(untuned, color=COLORS[1], linewidth=1.2, linestyle=(0, (4, 3)))
    axis.plot([], [], color=COLORS[1], linestyle=(0, (4, 3)), label=f"2:4, not trained: {untuned:.4f}")
    _style(axis, title)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    figure.savefig(path, dpi=150)


def _ends(label: str, losses: tuple[float, ...]) -> str:
    return f"{label}: {losses[0]:.4f} → {losses[-1]:.4f}, lowest {min(losses):.4f}"


def _style(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=11, color=INK, loc="left")
    axis.set_xlabel("step", fontsize=9, color=INK)
    axis.set_ylabel("validation loss", fontsize=9, color=INK)
    axis.tick_params(length=0, labelsize=9, colors=INK)
    axis.grid(color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    for side in axis.spines.values():
        side.set_visible(False)
