"""The recipe: one YAML file for the whole pipeline. Unknown keys are errors, values are frozen."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, StringConstraints, model_validator

from recipes.build import Build, Export, Precision
from recipes.compress import MICROSCALED, OPSETS, Finetune, Format, Quantize, Sparsify
from recipes.data import Data, Section, Source
from recipes.gate import Gate

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
# A path of the repository as git's `:(glob)` reads it: `*` stays in a folder, `**` does not.
Glob = Annotated[str, StringConstraints(pattern=r"^\.?[^/:.](\.?[^.])*\.?$")]
Task = Literal[
    "text-classification",
    "image-classification",
    "image-text",
    "sentence-embedding",
    "causal-lm",
    "diffusion",
]


class Needs(NamedTuple):
    """What a kind of task asks of a recipe: texts, images or pairs as inputs, labels, and may it train."""

    column: Literal["text", "image", "pair"]
    labels: bool = True
    trains: bool = True

    @property
    def texts(self) -> bool:
        """Whether there are texts, which have a tokenizer and a length."""
        return self.column != "image"


HANDED_OVER = ("fp8", "int4", "int8", "nvfp4")
"""Formats that ModelOpt writes as a Hugging Face checkpoint and that vLLM and TensorRT-LLM read."""

TASKS: dict[str, Needs] = {
    "text-classification": Needs("text"),
    "image-classification": Needs("image"),
    "image-text": Needs("pair", labels=False),
    "sentence-embedding": Needs("text", labels=False, trains=False),
    "causal-lm": Needs("text", labels=False),
    "diffusion": Needs("image", labels=False, trains=False),
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

    @model_validator(mode="after")
    def _tokenizer_is_here(self) -> Model:
        if self.tokenizer and self.tokenizer.split(":")[0] not in ("path", "package"):
            raise ValueError(
                f"model.tokenizer: {self.tokenizer} is no folder here; give path:FOLDER or "
                "package:NAME/FOLDER (a hub: model brings its own)"
            )
        return self


class Drift(Section):
    """When `python -m flows watch` asks for something.

    `max_overflow` is how much more of a quantizer's values may lie at the end of its range than in
    calibration, `max_psi` the population stability index of inputs, classes or scores.
    """

    max_overflow: float = Field(0.01, gt=0, lt=1)
    max_psi: float = Field(0.2, gt=0)
    min_rows: int = Field(200, ge=20)


class Benchmark(Section):
    """Interleaved rounds of every engine at each batch size; a round lasts at least `round_ms`.

    Where the gate judges latency (or `max_rounds` is given) there are more, up to `max_rounds`, until half
    the interval of candidate / champion is at most `precision` (its limit is close to 1), and of candidate /
    baseline at most five times that: a few noisy rounds would refuse a good engine.
    """

    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 8), min_length=1)
    rounds: int = Field(30, ge=6)
    round_ms: float = Field(20, ge=1)
    warmup: int = Field(3, ge=1)
    max_rounds: int | None = Field(None, ge=6)
    """Four times `rounds` where none is given, and latency is judged."""
    precision: float = Field(0.02, gt=0)

    @model_validator(mode="after")
    def _enough(self) -> Benchmark:
        if self.max_rounds and self.max_rounds < self.rounds:
            raise ValueError(f"benchmark.max_rounds: {self.max_rounds} is less than rounds ({self.rounds})")
        return self


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
    compare_dense: bool = False
    """Train the dense baseline and the pruned network, not quantized, as `qat` says, too; plot the losses."""
    compare_calibrated: bool = False
    """Also build and measure the network as it is before `qat`, so that what that brings can be seen."""
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
        self._slices_are_known()
        if max(self.benchmark.batch_sizes) > self.build.max_batch:
            raise ValueError("benchmark.batch_sizes goes beyond build.max_batch")
        sizes = self.deploy.triton.preferred_batch_sizes if self.deploy and self.deploy.triton else ()
        if max(sizes, default=0) > self.build.max_batch:
            raise ValueError("deploy.triton.preferred_batch_sizes goes beyond build.max_batch")
        if self.deploy and self.model.name == "triton":
            raise ValueError("model.name: triton is the serving folder's own; take another name")
        return self

    def _slices_are_known(self) -> None:
        """A floor on a slice that there is not would hold nothing."""
        labels = self.data.labels
        known = ("label", "file", *self.data.keep) if labels else ("file", *self.data.keep)
        for column, values in self.gate.floors.items():
            if column not in known:
                raise ValueError(
                    f"gate.floors: {column!r} is not one of {', '.join(known)}; name it in data.keep"
                )
            if column == "label" and (unknown := sorted(values.keys() - set(labels))):
                raise ValueError(
                    f"gate.floors.label: {', '.join(unknown)} is not among data.labels, {', '.join(labels)}"
                )

    def _task_fits(self, needs: Needs) -> None:
        if needs.column == "pair":
            self._pair_fits()
        elif getattr(self.data, needs.column) is None:
            raise ValueError(f"task {self.task} needs data.{needs.column}")
        if taken := {needs.column, "label", "file"}.intersection(self.data.keep):
            raise ValueError(
                f"data.keep: {', '.join(sorted(taken))}: every row is kept with its {needs.column}, label "
                "and file; leave it out, or rename it where it is another column (data.query)"
            )
        if needs.labels and self.data.label is None:
            raise ValueError(f"task {self.task} needs data.label and data.labels")
        if not needs.labels and needs.column != "pair" and self.data.label is not None:
            raise ValueError(f"task {self.task} has no labels; remove data.label and data.labels")
        given = [name for name in ("finetune", "qat", "retrain") if getattr(self, name) is not None]
        if given and not needs.trains:
            raise ValueError(
                f"task {self.task} is not trained here, the weights are model.source's; remove "
                + ", ".join(given)
            )
        if self.quantize and self.quantize.effective_bits and not needs.trains:
            raise ValueError(
                f"quantize.effective_bits: task {self.task} has no loss to score layers with; leave it out"
            )
        if self.task == "diffusion" and not self.model.source.startswith(("python:", "modelopt:")):
            raise ValueError(
                "task diffusion needs a network of your own: model.source python:MODULE:FUNCTION"
            )
        if needs.texts and self.model.source.startswith("python:") and not self.model.tokenizer:
            raise ValueError("a python: model of texts has no tokenizer; say where one is: model.tokenizer")

    def _pair_fits(self) -> None:
        if self.data.image is None:
            raise ValueError(f"task {self.task} needs data.image")
        if (self.data.text is None) == (self.data.prompt is None):
            raise ValueError(
                f"task {self.task} needs a text for each image: data.text names its column, or data.prompt "
                "makes it of data.label; set one of the two"
            )

    @model_validator(mode="after")
    def _trainings_fit(self) -> Recipe:
        sections = {"finetune": self.finetune, "qat": self.qat, "retrain": self.retrain}
        watched = self.data.split.validation > 0
        for name, section in sections.items():
            if section and section.early_stopping and not watched:
                raise ValueError(
                    f"{name}.early_stopping looks at the validation loss; set data.split.validation"
                )
            if section and section.lora and name != "finetune":
                raise ValueError(
                    f"{name}.lora: pruned or quantized weights would not stay so when adapters are added to "
                    "them; lora belongs to finetune"
                )
            if section and section.processes > 1 and self.task == "image-text":
                raise ValueError(
                    f"{name}.processes: an image is compared with the texts of its batch, of which each "
                    "process would have a part; train image-text in one process"
                )
        if self.finetune and self.finetune.distill:
            raise ValueError("finetune.distill: finetune trains the teacher itself; distill belongs to qat")
        if self.retrain and self.retrain.distill and not self.qat:
            raise ValueError("retrain.distill is for a recipe with qat; leave it out")
        if self.compare_dense and not (self.sparsify and self.qat and watched):
            raise ValueError(
                "compare_dense shows what training with the mask on brings; it needs sparsify, qat and "
                "data.split.validation"
            )
        if self.compare_calibrated and not (self.quantize and self.qat):
            raise ValueError(
                "compare_calibrated shows what training after calibration brings; it needs quantize and qat"
            )
        return self

    @model_validator(mode="after")
    def _numbers_fit(self) -> Recipe:
        on_cpu = "onnxruntime" in (self.build.runtime, *self.build.also)
        if self.quantize:
            self._format_fits(self.quantize.format, on_cpu)
        if self.export.precision != "bf16":
            return self
        if on_cpu:
            raise ValueError(
                "export.precision: bf16 has no kernels in ONNX Runtime's CPU provider; use fp16 or fp32, or "
                "build.runtime: tensorrt"
            )
        if self.quantize or self.compressed_elsewhere:
            raise ValueError(
                "export.precision: bf16 is for what is not quantized: beside Q/DQ use fp16, or leave it out"
            )
        return self

    def _format_fits(self, format: Format, on_cpu: bool) -> None:
        least = OPSETS.get(format, 0)
        if self.export.opset < least:
            raise ValueError(
                f"quantize.format: {format} needs export.opset {least} or newer, not "
                f"{self.export.opset}: ONNX has its numbers and their DequantizeLinear only from there"
            )
        if on_cpu and format in MICROSCALED:
            raise ValueError(
                f"quantize.format: {format} has no kernels in ONNX Runtime, neither for its weights nor for "
                "activations that are quantized as they come; set build.runtime to tensorrt or tensorrt-rtx, "
                "and leave onnxruntime out of build.also"
            )

    @model_validator(mode="after")
    def _language_fits(self) -> Recipe:
        asked = [name for name in ("kv_cache", "huggingface") if getattr(self.export, name)]
        if asked and self.task != "causal-lm":
            raise ValueError(f"export.{asked[0]} is for task causal-lm, not {self.task}; leave it out")
        if self.export.huggingface:
            self._can_be_handed_over()
        if not self.export.kv_cache:
            return self
        if {self.build.runtime, *self.build.also} != {"onnxruntime"}:
            raise ValueError(
                "export.kv_cache: only ONNX Runtime's engine is fed a cache here; name no other in "
                "build.runtime and build.also, and take export.huggingface for TensorRT-LLM"
            )
        if self.deploy and self.deploy.triton:
            raise ValueError(
                "export.kv_cache: the Triton repository that is written here keeps no cache between "
                "requests; set deploy.triton: null"
            )
        return self

    @model_validator(mode="after")
    def _profiles_fit(self) -> Recipe:
        profiles = self.build.tensorrt.profiles if self.build.tensorrt else ()
        if not (self.build.tensorrt and profiles):
            return self
        text = TASKS[self.task].texts
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

    def _can_be_handed_over(self) -> None:
        if self.quantize is None or self.quantize.format not in HANDED_OVER:
            raise ValueError(
                f"export.huggingface: the formats that vLLM and TensorRT-LLM read are "
                f"{', '.join(HANDED_OVER)}; set quantize.format to one of them, or leave it out"
            )
        if self.sparsify:
            raise ValueError(
                "export.huggingface: ModelOpt writes no quantized weights of a pruned network; leave out "
                "sparsify or export.huggingface"
            )
        if self.quantize.embeddings:
            raise ValueError(
                "export.huggingface: vLLM and TensorRT-LLM have no quantized embedding; set "
                "quantize.embeddings: false"
            )

    @property
    def timing(self) -> Benchmark:
        """The benchmark section, without further rounds where no rule looks at what they tell."""
        if self.gate.max_latency_ratio or self.benchmark.max_rounds:
            return self.benchmark
        return self.benchmark.model_copy(update={"max_rounds": self.benchmark.rounds})

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
