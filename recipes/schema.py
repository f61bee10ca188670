"""The recipe: one YAML file for the whole pipeline. Unknown keys are errors, values are frozen."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, StringConstraints, model_validator

from recipes.data import Data, Section, Source
from recipes.gate import Gate

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
# A path of the repository as git's `:(glob)` reads it: `*` stays in a folder, `**` does not.
Glob = Annotated[str, StringConstraints(pattern=r"^\.?[^/:.](\.?[^.])*\.?$")]
Runtime = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
Task = Literal["text-classification", "image-classification", "sentence-embedding", "causal-lm"]


class Needs(NamedTuple):
    """What a kind of task asks of a recipe: the key of `data` with its inputs, labels, and may it train."""

    column: Literal["text", "image"]
    labels: bool = True
    trains: bool = True


TASKS: dict[str, Needs] = {
    "text-classification": Needs("text"),
    "image-classification": Needs("image"),
    "sentence-embedding": Needs("text", labels=False, trains=False),
    "causal-lm": Needs("text", labels=False),
}


class Model(Section):
    """Where the weights come from, and the name the result is registered under.

    `modelopt:DIR` is a checkpoint that was pruned or quantized elsewhere: it goes straight to export.
    `tokenizer` is the folder with a text model's tokenizer, where that is not the source.
    """

    name: Name
    source: Source
    revision: str | None = None
    tokenizer: Source | None = None


class Finetune(Section):
    """One training with the Hugging Face Trainer; used for the baseline and again for QAT."""

    epochs: float = Field(gt=0)
    batch_size: int = Field(16, ge=1)
    learning_rate: float = Field(5e-5, gt=0)
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    seed: int = 0


class Sparsify(Section):
    """2:4 pruning with ModelOpt; `exclude` holds module name patterns (`*classifier*`)."""

    method: Literal["magnitude", "sparsegpt"] = "magnitude"
    exclude: tuple[str, ...] = ()


Format = Literal["int8", "fp8", "int8-weight-only", "int4", "w4a8", "nvfp4", "mxfp8"]
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "int8": ("max", "entropy", "percentile", "smoothquant"),
    "fp8": ("max",),
    "int8-weight-only": ("max",),
    "int4": ("max", "awq"),
    "w4a8": ("max", "awq"),
}
OPSETS = {"fp8": 20, "int4": 21, "w4a8": 21}
BLOCK: Literal[128] = 128
PERCENTILE = 99.99


class Quantize(Section):
    """Calibration with ModelOpt over `data.split.calibration` rows; docs/formats.md says what each can do.

    `block_size` is of INT4's scales, along K; `percentile` of activations that stay in range. `attention`
    quantizes attention's own matrix products, too. `embeddings` of int4 and w4a8 are INT8.
    """

    format: Format
    algorithm: Literal["max", "entropy", "percentile", "smoothquant", "awq"] = "max"
    percentile: float = Field(PERCENTILE, gt=50, le=100)
    block_size: Literal[16, 32, 64, 128, 256] = BLOCK
    attention: bool = False
    embeddings: bool = False
    exclude: tuple[str, ...] = ()
    batch_size: int = Field(32, ge=1)

    @model_validator(mode="after")
    def _legal(self) -> Quantize:
        if self.format in ("nvfp4", "mxfp8"):
            raise ValueError(
                f"quantize.format: {self.format} needs an NVIDIA GPU to calibrate (there are no CPU kernels "
                "for it), one of compute capability 10.0 or newer to run, and opset 23; there is no route to "
                "an engine here yet: use fp8 (from compute capability 8.9) or int4"
            )
        legal = ALGORITHMS[self.format]
        if self.algorithm not in legal:
            raise ValueError(
                f"quantize.algorithm: {self.algorithm} is not for {self.format}, whose algorithms are "
                f"{', '.join(legal)}: {WHY_NOT[self.algorithm]}"
            )
        if self.percentile != PERCENTILE and self.algorithm != "percentile":
            raise ValueError("quantize.percentile is for algorithm: percentile; leave it out")
        if self.block_size != BLOCK and self.format not in ("int4", "w4a8"):
            raise ValueError(f"quantize.block_size is for int4 and w4a8; with {self.format} leave it out")
        if self.attention and self.format != "fp8":
            raise ValueError(
                f"quantize.attention is for fp8, not {self.format}: ModelOpt quantizes the softmax's side of "
                "attention's products in FP8 alone; leave it out"
            )
        return self


WHY_NOT = {
    "max": "",
    "entropy": "it searches ranges of INT8 activations; FP8's exponent and weights alone have no use for it",
    "percentile": "it cuts ranges of INT8 activations; FP8's exponent and weights alone have no use for it",
    "smoothquant": "it moves outliers of INT8 activations into the weights",
    "awq": "it scales the channels that 4-bit weights would lose; 8 bits do not lose them",
}


class Drift(Section):
    """When `python -m flows watch` asks for something.

    `max_overflow` is how much more of a quantizer's values may lie at the end of its range than in
    calibration, `max_psi` the population stability index of inputs, classes or scores.
    """

    max_overflow: float = Field(0.01, gt=0, lt=1)
    max_psi: float = Field(0.2, gt=0)
    min_rows: int = Field(200, ge=20)


Precision = Literal["fp32", "fp16", "bf16"]


class Export(Section):
    """ONNX; 20 is the first opset with everything FP8 needs, 21 with INT4, 22 with BF16.

    `precision` is of what is not quantized; without it FP16 for TensorRT, FP32 for ONNX Runtime.
    """

    opset: int = Field(20, ge=17, le=23)
    precision: Precision | None = None

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


class Benchmark(Section):
    """Interleaved rounds of every engine at each batch size; a round lasts at least `round_ms`."""

    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 8), min_length=1)
    rounds: int = Field(30, ge=6)
    round_ms: float = Field(20, ge=1)
    warmup: int = Field(3, ge=1)


class Triton(Section):
    """What a Triton model repository says of the engine; requests wait at most `max_queue_delay_us`."""

    instances: int = Field(1, ge=1)
    max_queue_delay_us: int = Field(100, ge=0)
    preferred_batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = ()


class Deploy(Section):
    """What follows a promotion: the serving folder, with the last `keep` versions; `deploy: null` is none."""

    keep: int = Field(3, ge=1)
    triton: Triton | None = Triton()


class Recipe(Section):
    """Everything one run needs; `name` is the file's name."""

    name: Name
    task: Task
    model: Model
    data: Data
    finetune: Finetune | None = None
    sparsify: Sparsify | None = None
    quantize: Quantize | None = None
    qat: Finetune | None = None
    retrain: Finetune | None = None
    """The training of `python -m flows retrain`; without it that of `qat`, else of `finetune`."""
    drift: Drift = Drift()
    export: Export = Export()
    build: Build = Build()
    benchmark: Benchmark = Benchmark()
    gate: Gate
    promote: Literal["auto", "manual"] = "auto"
    deploy: Deploy | None = Deploy()
    # Left out of the recipe's digest: it says when to run, not what is made.
    watch: tuple[Glob, ...] = Field((), exclude=True)

    @model_validator(mode="after")
    def _sections_fit(self) -> Recipe:
        self._task_fits(TASKS[self.task])
        trains = TASKS[self.task].trains
        if trains and self.model.source.startswith("python:") and self.finetune is None:
            raise ValueError("a python: model starts from random weights; add a finetune section")
        if self.compressed_elsewhere:
            self._nothing_to_train()
        elif not self.compresses and self.export.precision not in ("fp16", "bf16"):
            raise ValueError(
                "nothing is pruned or quantized; add a sparsify or quantize section, or set "
                "export.precision: fp16"
            )
        if not (self.gate.max_drop or self.gate.min_ratio or self.gate.floors):
            raise ValueError("gate: nothing holds the quality; set max_drop, min_ratio or floors")
        if max(self.benchmark.batch_sizes) > self.build.max_batch:
            raise ValueError("benchmark.batch_sizes goes beyond build.max_batch")
        sizes = self.deploy.triton.preferred_batch_sizes if self.deploy and self.deploy.triton else ()
        if max(sizes, default=0) > self.build.max_batch:
            raise ValueError("deploy.triton.preferred_batch_sizes goes beyond build.max_batch")
        if self.deploy and self.model.name == "triton":
            raise ValueError("model.name: triton is the serving folder's own; take another name")
        return self

    def _task_fits(self, needs: Needs) -> None:
        if getattr(self.data, needs.column) is None:
            raise ValueError(f"task {self.task} needs data.{needs.column}")
        if needs.labels and self.data.label is None:
            raise ValueError(f"task {self.task} needs data.label and data.labels")
        if not needs.labels and self.data.label is not None:
            raise ValueError(f"task {self.task} has no labels; remove data.label and data.labels")
        given = [name for name in ("finetune", "qat", "retrain") if getattr(self, name) is not None]
        if given and not needs.trains:
            raise ValueError(
                f"task {self.task} is not trained here, the weights are model.source's; remove "
                + ", ".join(given)
            )
        if needs.column == "text" and self.model.source.startswith("python:") and not self.model.tokenizer:
            raise ValueError("a python: model of texts has no tokenizer; say where one is: model.tokenizer")

    @model_validator(mode="after")
    def _numbers_fit(self) -> Recipe:
        least = OPSETS.get(self.quantize.format, 0) if self.quantize else 0
        if self.quantize and self.export.opset < least:
            raise ValueError(
                f"quantize.format: {self.quantize.format} needs export.opset {least} or newer, not "
                f"{self.export.opset}: ONNX has its numbers and their DequantizeLinear only from there"
            )
        if self.export.precision != "bf16":
            return self
        if "onnxruntime" in (self.build.runtime, *self.build.also):
            raise ValueError(
                "export.precision: bf16 has no kernels in ONNX Runtime's CPU provider; use fp16 or fp32, or "
                "build.runtime: tensorrt"
            )
        if self.quantize or self.compressed_elsewhere:
            raise ValueError(
                "export.precision: bf16 is for what is not quantized: beside Q/DQ use fp16, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _profiles_fit(self) -> Recipe:
        profiles = self.build.tensorrt.profiles if self.build.tensorrt else ()
        if not (self.build.tensorrt and profiles):
            return self
        text = TASKS[self.task].column == "text"
        if not text and any(profile.length for profile in profiles):
            raise ValueError("build.tensorrt.profiles: images have a batch and no length; leave length out")
        longest = self.data.max_length if text else 1
        if gap := self.build.tensorrt.uncovered(self.build.max_batch, longest):
            what = f"batch {gap[0]}" + (f" at length {gap[1]}" if text else "")
            raise ValueError(
                f"build.tensorrt.profiles: none holds {what}; together they must hold every batch from 1 to "
                f"build.max_batch ({self.build.max_batch})"
                + (f" at every length from 1 to data.max_length ({longest})" if text else "")
            )
        return self

    @property
    def compresses(self) -> bool:
        """Whether this recipe prunes or quantizes; else only the numbers' precision changes."""
        return self.quantize is not None or self.sparsify is not None

    def precision_of(self, name: str) -> Precision | None:
        """The numbers asked for; of a baseline FP32 where the numbers are all that differs."""
        if name == "baseline":
            return None if self.compresses or self.compressed_elsewhere else "fp32"
        return self.export.precision

    @property
    def compressed_elsewhere(self) -> bool:
        """Whether the weights come with mask and quantizers of their own."""
        return self.model.source.startswith("modelopt:")

    def _nothing_to_train(self) -> None:
        sections = ("finetune", "sparsify", "quantize", "qat", "retrain")
        if given := [name for name in sections if getattr(self, name) is not None]:
            raise ValueError(
                f"a modelopt: checkpoint goes straight to export; remove {', '.join(given)}, or start from "
                "the checkpoint that it was made of"
            )
