"""The frozen values that travel between tasks: facts, and a digest for whatever is too big to travel.

Only the standard library is imported here: the engines also run where nothing else is installed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Proved = Literal["executed", "built", "checked"]
Facts = dict[str, Any]


@dataclass(frozen=True)
class Blob:
    """A folder in the content-addressed store (`tasks.store`)."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Dataset:
    """Labelled rows: `train`, `calibration`, `test` and where asked for `validation.parquet`.

    Columns: text or image, label, file.
    """

    blob: Blob
    type: str
    labels: tuple[str, ...]
    rows: dict[str, int]
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """Config, `model.safetensors`, `preprocessor/`, and `modelopt_state.pth` once pruned or quantized.

    `identity` is the digest of all but ModelOpt's state file, which holds the same information in every
    process but not the same bytes: cache keys are made from `identity`.
    """

    blob: Blob
    type: str
    identity: str
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True)
class Observations:
    """What so many rows did to the inputs of a network's layers (`tasks.observe`)."""

    blob: Blob
    kind: Literal["ranges", "histograms"]
    rows: int


@dataclass(frozen=True)
class OnnxModel:
    """`model.onnx` (with `model.onnx.data` past 1 GB)."""

    blob: Blob
    format: str
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What depends on (graph, runtime version, device) and on no trained value."""

    blob: Blob
    graph: str
    runtime: str
    version: str
    device: str


@dataclass(frozen=True)
class Engine:
    """A plan, its weights and the preprocessor that feeds it, and how far it is proved."""

    plan: Plan
    weights: Blob | None
    preprocessor: Blob
    format: str
    proved: Proved
    facts: Facts = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes on disk of plan and weights together."""
        return self.plan.blob.bytes + (self.weights.bytes if self.weights else 0)

    @property
    def digests(self) -> dict[str, str]:
        """The sha256 of each part."""
        parts = {"plan": self.plan.blob, "weights": self.weights, "preprocessor": self.preprocessor}
        return {name: blob.sha256 for name, blob in parts.items() if blob}


@dataclass(frozen=True)
class Metrics:
    """Numbers measured on an engine, and the per-example values behind them (a file in the blob)."""

    values: dict[str, float]
    blob: Blob | None = None
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """One rule of the gate: the measurement, its limit, and a sentence that explains both."""

    name: str
    passed: bool
    sentence: str
    value: float | None = None
    limit: float | None = None
    interval: tuple[float, float] | None = None
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """`passed` when every rule passed; `reasons` are the sentences of those that did not."""

    passed: bool
    rules: tuple[Rule, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """The sentences of the rules that did not pass."""
        return tuple(rule.sentence for rule in self.rules if not rule.passed)


@dataclass(frozen=True)
class Version:
    """A registered version of a model; `gate` is its tag: passed, refused or pending."""

    model: str
    version: str
    run_id: str
    gate: str
    alias: str | None
    manifest: str
