"""The `gate` section: which rules a candidate must pass. A rule that is not named here is not applied."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Ratio = Annotated[float, Field(gt=0)]

RULES = (
    "max_drop",
    "min_ratio",
    "max_forgetting",
    "floors",
    "max_size_ratio",
    "max_memory_ratio",
    "max_latency_ratio",
    "min_parity",
    "min_quantized_share",
    "min_sparse_share",
)


class Gate(BaseModel):
    """The rules between a candidate and promotion; at least one is required."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)

    metric: str = "accuracy"
    """A name from `tasks.metrics`, a scikit-learn metric, or `python:package.module:function`."""
    max_drop: Annotated[float, Field(gt=0)] | None = None
    """Allowed worsening against baseline and champion, in the metric's unit: 0.02 is 2 points of accuracy."""
    min_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Least candidate / reference of the metric, against baseline and champion: 0.999."""
    max_forgetting: Annotated[float, Field(gt=0)] | None = None
    """Allowed worsening against the champion on its own, previous held-out rows, in the metric's unit."""
    floors: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Least metric per slice, by label, file or a column of data.keep: {label: {positive: 0.8}}."""
    max_size_ratio: Ratio | None = None
    """Bytes of candidate / baseline."""
    max_memory_ratio: Ratio | None = None
    """Peak memory of candidate / baseline."""
    max_latency_ratio: Ratio | None = None
    """Latency of candidate / baseline, at each measured batch size."""
    champion_latency_ratio: Annotated[float, Field(gt=1)] = 1.05
    """With `max_latency_ratio`: latency of candidate / champion. A refitted plan is no faster."""
    min_parity: Annotated[float, Field(gt=0, le=1)] | None = None
    """Least cosine between the candidate engine's outputs and its unlowered reference, worst example."""
    min_quantized_share: Share | None = None
    """Least share of the work that really runs quantized."""
    min_sparse_share: Share | None = None
    """Least share of the work that really runs sparse."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    """Of every interval; false passes, and false refusals on a set fine enough, are at most the rest."""
    on_coarse: Literal["refuse", "warn"] = "refuse"
    """When the examples, beyond doubt, cannot tell a drop of `max_drop` (or `max_forgetting`) from noise."""
    on_missing: Literal["refuse", "pass"] = "refuse"
    """When a rule's measurement is missing. No champion yet is not missing."""

    @model_validator(mode="after")
    def _some_rule(self) -> Gate:
        if not any(getattr(self, name) not in (None, {}) for name in RULES):
            raise ValueError(f"gate: no rule is set, so everything would pass; set one of {', '.join(RULES)}")
        empty = [column for column, values in self.floors.items() if not values]
        if empty:
            raise ValueError(
                f"gate.floors: no value under {', '.join(empty)}; write {{column: {{value: floor}}}}"
            )
        return self
