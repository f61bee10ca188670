"""How a recipe trains, prunes and quantizes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from recipes.data import Section


class Distill(Section):
    """Learn from the FP32 baseline: `weight` of the loss is the distance of the logits, the rest the labels'.

    Both sides' logits are divided by `temperature` first.
    """

    weight: float = Field(1.0, gt=0, le=1)
    temperature: float = Field(1.0, gt=0)


class Lora(Section):
    """Train matrices of `rank` beside the linear layers that `targets` names, and of the rest only `also`.

    Both hold module name patterns; scaled by alpha / rank, the matrices are added to the weights at the end.
    """

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    targets: tuple[str, ...] = Field(min_length=1)
    also: tuple[str, ...] = ()


class Finetune(Section):
    """One training with the Hugging Face Trainer; used for the baseline and again for QAT.

    `batch_size` rows are in work at once, over all `processes`; `accumulate` of those make a step. The
    validation rows are looked at `evaluations` times; when their loss has not fallen for `early_stopping` of
    those in a row, training ends, and the weights of the lowest are kept. See docs/training.md.
    """

    epochs: float = Field(gt=0)
    batch_size: int = Field(16, ge=1)
    accumulate: int = Field(1, ge=1)
    learning_rate: float = Field(5e-5, gt=0)
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    evaluations: int = Field(10, ge=1)
    early_stopping: int | None = Field(None, ge=1)
    distill: Distill | None = None
    lora: Lora | None = None
    processes: int = Field(1, ge=1)
    shard: Literal["ddp", "fsdp2"] = "ddp"
    seed: int = 0
    # Left out of the recipe's digest, as it says nothing of the result; None is every five minutes.
    save_steps: int | None = Field(None, ge=1, exclude=True)

    @model_validator(mode="after")
    def _processes_fit(self) -> Finetune:
        if self.batch_size % self.processes:
            raise ValueError(
                f"batch_size ({self.batch_size}) is that of all processes together, a multiple of their "
                f"number ({self.processes})"
            )
        if self.shard == "fsdp2" and self.processes == 1:
            raise ValueError("shard: fsdp2 spreads one network over several processes; set processes")
        if self.shard == "fsdp2" and self.lora:
            raise ValueError("lora has little to shard; use shard: ddp")
        return self


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
    "nvfp4": ("max",),
    "mxfp8": ("max",),
}
MICROSCALED = {"nvfp4": 16, "mxfp8": 32}
"""Formats with a scale for so many values of weights and activations along K; they need a GPU."""
OPSETS = {"fp8": 20, "int4": 21, "w4a8": 21, **dict.fromkeys(MICROSCALED, 23)}
BLOCK: Literal[128] = 128
PERCENTILE = 99.99


class Quantize(Section):
    """Calibration with ModelOpt over `data.split.calibration` rows; docs/formats.md says what each can do.

    `block_size` is of INT4's scales, along K; `percentile` of activations that stay in range. `attention`
    quantizes the matrix products within every attention, too. `embeddings` of int4 and w4a8 are INT8. With
    `effective_bits` the layers that lose most stay as they are, so that weights take as many bits on average.
    nvfp4 and mxfp8 are calibrated on an NVIDIA GPU alone, and have blocks of their own size.
    """

    format: Format
    algorithm: Literal["max", "entropy", "percentile", "smoothquant", "awq"] = "max"
    percentile: float = Field(PERCENTILE, gt=50, le=100)
    block_size: Literal[16, 32, 64, 128, 256] = BLOCK
    attention: bool = False
    embeddings: bool = False
    exclude: tuple[str, ...] = ()
    effective_bits: float | None = Field(None, lt=16)
    batch_size: int = Field(32, ge=1)

    @model_validator(mode="after")
    def _legal(self) -> Quantize:
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
        if self.format in MICROSCALED and (self.embeddings or self.effective_bits is not None):
            raise ValueError(
                f"quantize.embeddings and quantize.effective_bits are not for {self.format}; leave them out"
            )
        least = 4 if self.format in ("int4", "w4a8") else 8
        if self.effective_bits is not None and self.effective_bits <= least:
            raise ValueError(
                f"quantize.effective_bits: {self.effective_bits:g} is not between {least}, the bits of "
                f"{self.format}, and 16, those of a layer that is left as it is"
            )
        if self.attention and self.format != "fp8":
            raise ValueError(
                f"quantize.attention is for fp8, not {self.format}: ModelOpt quantizes the softmax's side of "
                "attention's products in FP8 alone; leave it out"
            )
        return self


WHY_NOT = {
    "max": "",
    "entropy": "it searches ranges of INT8 activations; floats and weights alone have no use for it",
    "percentile": "it cuts ranges of INT8 activations; floats and weights alone have no use for it",
    "smoothquant": "it moves outliers of INT8 activations into the weights",
    "awq": "it scales the channels that 4-bit weights would lose; 8 bits and small blocks lose less",
}
