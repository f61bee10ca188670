"""How a recipe exports and builds, for which runtimes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from recipes.data import Section

Runtime = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
Precision = Literal["fp32", "fp16", "bf16"]


class Export(Section):
    """ONNX; 20 is the first opset with everything FP8 needs, 21 with INT4, 22 with BF16.

    `precision` is of what is not quantized; without it FP16 for TensorRT, FP32 for ONNX Runtime. `kv_cache`
    gives a language model its key/value cache as inputs and outputs; `huggingface` also writes the quantized
    checkpoint as vLLM and TensorRT-LLM read it.
    """

    opset: int = Field(20, ge=17, le=23)
    precision: Precision | None = None
    kv_cache: bool = False
    huggingface: bool = False

    @model_validator(mode="after")
    def _opset_has_it(self) -> Export:
        least = {"bf16": 22, "fp16": 19}.get(self.precision or "", 0)
        if self.opset < least:
            raise ValueError(
                f"export.precision: {self.precision} needs export.opset {least} or newer, not {self.opset}"
            )
        return self


Range = tuple[
    Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]
]  # min, opt, max


class Profile(Section):
    """Shapes that a plan is tuned for, each [min, opt, max]; without `length` (text): up to max_length."""

    batch: Range
    length: Range | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Profile:
        for name, found in (("batch", self.batch), ("length", self.length)):
            if found and list(found) != sorted(found):
                raise ValueError(f"{name} is [min, opt, max] in this order, not {list(found)}")
        return self

    def holds(self, batch: int, length: int) -> bool:
        """Whether the shape lies within."""
        low, _, high = self.length or (1, 1, length)
        return self.batch[0] <= batch <= self.batch[2] and low <= length <= high


TAX = 0.05


class TensorRT(Section):
    """How TensorRT builds. `refit: auto` keeps a refittable plan that costs at most `max_tax` of latency.

    sparse: by default where the ONNX holds 2:4 weights. individual: the only weights that will change.
    builds: keep the fastest of so many. A version compatible plan opens with later versions, never refits.
    """

    profiles: tuple[Profile, ...] = ()
    refit: Literal["auto", "always", "never"] = "auto"
    max_tax: float = Field(TAX, ge=0)
    individual: tuple[str, ...] = ()
    sparse: bool | None = None
    level: int | None = Field(None, ge=0, le=5)
    workspace_mb: int | None = Field(None, ge=1)
    builds: int = Field(1, ge=1, le=20)
    timing_cache: bool = True
    version_compatible: bool = False
    hardware: Literal["none", "ampere_plus", "same_compute_capability"] = "none"

    @model_validator(mode="after")
    def _together(self) -> TensorRT:
        if self.version_compatible and self.refit == "always":
            raise ValueError("refit: always and version_compatible exclude each other; give up one of them")
        if self.individual and (self.refit == "never" or self.version_compatible):
            raise ValueError("individual names weights for a refit, which this plan never gets; leave it out")
        if self.max_tax != TAX and self.refit != "auto":
            raise ValueError(f"max_tax is for refit: auto; with refit: {self.refit} leave it out")
        return self

    def uncovered(self, batch: int, length: int) -> tuple[int, int] | None:
        """A shape from (1, 1) to (batch, length) that no profile holds; None when all are held."""
        batches = {1, *(p.batch[0] for p in self.profiles), *(p.batch[2] + 1 for p in self.profiles)}
        spans = [p.length for p in self.profiles if p.length]
        lengths = {1, *(span[0] for span in spans), *(span[2] + 1 for span in spans)}
        corners = ((b, n) for b in sorted(batches) for n in sorted(lengths) if b <= batch and n <= length)
        return next((at for at in corners if not any(p.holds(*at) for p in self.profiles)), None)


class Build(Section):
    """The runtime that serves (`runtime`), and further ones built beside it where they are installed."""

    runtime: Runtime = "onnxruntime"
    also: tuple[Runtime, ...] = ()
    threads: int | None = Field(None, ge=1)
    max_batch: int = Field(64, ge=1)
    timeout_minutes: float = Field(60, gt=0)
    tensorrt: TensorRT | None = None

    @model_validator(mode="after")
    def _for_a_tensorrt(self) -> Build:
        if self.tensorrt is None:
            return self
        runtimes = {self.runtime, *self.also} - {"onnxruntime"}
        if not runtimes:
            raise ValueError(
                "build.tensorrt is set and nothing is built for TensorRT: name tensorrt or tensorrt-rtx as "
                "build.runtime or in build.also, or leave the section out"
            )
        largest = max((profile.batch[2] for profile in self.tensorrt.profiles), default=self.max_batch)
        if largest != self.max_batch:
            raise ValueError(
                f"build.max_batch is {self.max_batch} and the largest batch of build.tensorrt.profiles is "
                f"{largest}: make them equal"
            )
        return self

    @model_validator(mode="after")
    def _target_once(self) -> Build:
        if self.runtime in self.also:
            raise ValueError(f"`also` names the target runtime {self.runtime} again; leave it out there")
        return self
