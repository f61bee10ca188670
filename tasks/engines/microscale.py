"""NVFP4 and MXFP8 in NumPy: floats of 4 or 8 bits with a scale for every 16 or 32 values of the last axis.

The numbers are those of ModelOpt's GPU kernels. The same as operators for ONNX's own evaluator: TensorRT's
dynamic quantizers, which have no standard operator, and MXFP8's DequantizeLinear, as TensorRT's parser takes
no scales of E8M0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper

NVFP4_BLOCK, MXFP8_BLOCK = 16, 32
FP4_LARGEST, FP8_LARGEST = 6.0, 448.0
SMALLEST_STEP = 1e-5
"""ModelOpt's kernel makes zeros of a block whose step is smaller."""
SMALLEST_SCALE = 2.0**-9
"""FP8's smallest number: TensorRT wants scales above zero."""
BIAS = 127  # of E8M0's exponent
DOMAIN = "trt"
FP4_QUANTIZE, MXFP8_QUANTIZE = "TRT_FP4DynamicQuantize", "TRT_MXFP8DynamicQuantize"
MXFP8_DEQUANTIZE = "TRT_MXFP8DequantizeLinear"
QUANTIZE = (FP4_QUANTIZE, MXFP8_QUANTIZE)


def global_scale(end: float) -> float:
    """What NVFP4's FP8 scales are multiplied by, from the end of the tensor's range.

    By a multiplication, as PyTorch divides by a number on a GPU: the same codes, bit for bit.
    """
    return float(np.float32(end) * (np.float32(1) / np.float32(FP4_LARGEST * FP8_LARGEST)))


def nvfp4(values: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Codes in FP4 of the values' shape, and a scale in FP8 for each block; `scale` is the global one."""
    import ml_dtypes

    blocks, largest = _blocks(values, NVFP4_BLOCK)
    scales = np.minimum(largest / np.float32(FP4_LARGEST * np.float32(scale)), FP8_LARGEST)
    scales = scales.astype(ml_dtypes.float8_e4m3fn)
    steps = scales.astype(np.float32) * np.float32(scale)
    lost = steps < SMALLEST_STEP
    codes = np.where(lost[..., None], 0, blocks / np.where(lost, 1, steps)[..., None])
    kept = np.maximum(scales.astype(np.float32), SMALLEST_SCALE).astype(scales.dtype)
    return codes.astype(ml_dtypes.float4_e2m1fn).reshape(values.shape), kept


def mxfp8(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes in FP8 of the values' shape, and an exponent (E8M0, as bytes) for each block."""
    import ml_dtypes

    blocks, largest = _blocks(values, MXFP8_BLOCK)
    part, exponent = np.frexp(largest / np.float32(FP8_LARGEST))  # ratio = part * 2 ** exponent
    exponent = np.where(part > 0.5, exponent, exponent - 1)  # ceil(log2(ratio))
    exponent = np.where(largest == 0, 0, np.clip(exponent, -BIAS, BIAS))
    codes = np.clip(np.ldexp(blocks, -exponent[..., None]), -FP8_LARGEST, FP8_LARGEST)
    codes = codes.astype(ml_dtypes.float8_e4m3fn).reshape(values.shape)
    return codes, (exponent + BIAS).astype(np.uint8)


def nvfp4_values(codes: np.ndarray, scales: np.ndarray, scale: float) -> np.ndarray:
    """What codes and scales stand for, FP32."""
    return _times(codes, scales.astype(np.float32) * np.float32(scale))


def mxfp8_values(codes: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """What codes and exponents stand for, FP32."""
    return _times(codes, np.ldexp(np.float32(1), exponents.astype(np.int32) - BIAS))


def _blocks(values: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The values in blocks, and the largest of each, FP32."""
    blocks = values.astype(np.float32).reshape(*values.shape[:-1], -1, size)
    return blocks, np.abs(blocks).max(axis=-1)


def _times(codes: np.ndarray, steps: np.ndarray) -> np.ndarray:
    blocks = codes.astype(np.float32).reshape(*steps.shape, -1)
    values: np.ndarray = (blocks * steps[..., None]).reshape(codes.shape)
    return values


def operators() -> list[Any]:
    """TensorRT's operators as ONNX's own evaluator takes them (`new_ops`)."""
    from onnx.reference.op_run import OpRun

    class Fp4Quantize(OpRun):
        op_domain = DOMAIN

        def _run(self, x: np.ndarray, scale: np.ndarray, **_: Any) -> tuple[np.ndarray, ...]:
            return nvfp4(x, float(scale))

    class Mxfp8Quantize(OpRun):
        op_domain = DOMAIN

        def _run(self, x: np.ndarray, **_: Any) -> tuple[np.ndarray, ...]:
            return mxfp8(x)

    class Mxfp8Dequantize(OpRun):
        op_domain = DOMAIN

        def _run(self, x: np.ndarray, scale: np.ndarray, **given: Any) -> tuple[np.ndarray]:
            kind = helper.tensor_dtype_to_np_dtype(given.get("output_dtype") or TensorProto.FLOAT)
            return (mxfp8_values(x, scale).astype(kind),)

    named = {FP4_QUANTIZE: Fp4Quantize, MXFP8_QUANTIZE: Mxfp8Quantize, MXFP8_DEQUANTIZE: Mxfp8Dequantize}
    for name, operator in named.items():
        operator.__name__ = name  # the evaluator's key
    return list(named.values())
