"""Which TensorRT is installed, on which GPU, and what that version can do."""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata, util
from typing import Any, Literal

from tasks.errors import InputError

Flavor = Literal["tensorrt", "tensorrt_rtx"]
FLAVORS: tuple[Flavor, ...] = ("tensorrt", "tensorrt_rtx")
RTX_CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))  # its ComputeCapability members
CHOICE = "POLYGRAPHY_USE_TENSORRT_RTX"


@dataclass(frozen=True)
class Gpu:
    """The first CUDA device."""

    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} ({self.capability[0]}.{self.capability[1]})"


@lru_cache(maxsize=1)
def gpu() -> Gpu | None:
    """The first CUDA device as the driver names it, None without one (no TensorRT is needed for this)."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")
    except OSError:
        return None
    handle, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(handle), 0):
        return None
    cuda.cuDeviceGetName(name, 256, handle)
    major, minor = ctypes.c_int(), ctypes.c_int()
    for value, attribute in (
        (major, 75),
        (minor, 76),
    ):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
    return Gpu(name.value.decode(), (major.value, minor.value))


def flavor(runtime: str) -> Flavor:
    """The flavor that a recipe's runtime (`tensorrt`, `tensorrt-rtx`) names."""
    return "tensorrt" if runtime == "tensorrt" else "tensorrt_rtx"


def installed() -> Flavor | None:
    """The flavor to use: TensorRT where it is installed, else TensorRT for RTX, else None."""
    return next((name for name in FLAVORS if util.find_spec(name)), None)


@lru_cache(maxsize=4)
def version_of(flavor: str) -> str | None:
    """The version of an installed flavor (or of its lean runtime), None when it is not installed."""
    if not util.find_spec(flavor):
        return None
    try:
        return metadata.version(flavor)
    except metadata.PackageNotFoundError:  # a system package leaves no metadata
        return str(importlib.import_module(flavor).__version__)


def numbers(version: str) -> tuple[int, ...]:
    """ "8.6.0.post1" as (8, 6, 0, 1)."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def weakly_typed(flavor: Flavor, version: str) -> bool:
    """True where precision is the builder's choice (TensorRT 8 and 9), not the graph's."""
    return flavor == "tensorrt" and numbers(version) < (10,)


def includes_refit(flavor: Flavor, version: str) -> bool:
    """True where a refitted engine can be saved so that it can be refitted again (INCLUDE_REFIT)."""
    return flavor == "tensorrt_rtx" or numbers(version) >= (10, 14)


def uses_other(flavor: Flavor) -> bool:
    """Whether this process already uses the other flavor, so that it can open no engine of this one."""
    return "polygraphy" in sys.modules and os.environ.get(CHOICE, "0") != _choice(flavor)


def _choice(flavor: Flavor) -> str:
    return "1" if flavor == "tensorrt_rtx" else "0"


def use(flavor: Flavor) -> Any:
    """Import the flavor's module, and make Polygraphy use it too (it takes one flavor a process)."""
    if uses_other(flavor):
        raise InputError(
            f"this process already uses the other TensorRT; open {flavor} engines in a process of their own"
        )
    os.environ[CHOICE] = _choice(flavor)
    try:
        if flavor == "tensorrt_rtx":
            import tensorrt_rtx as module
        else:
            import tensorrt as module
    except ImportError as error:
        name = flavor.replace("_", "-")
        raise InputError(f"{flavor} does not import ({error}): pip install {name}") from error
    from polygraphy.logger import G_LOGGER

    if G_LOGGER.module_severity.get() == G_LOGGER.INFO:  # Polygraphy's default; another choice stays
        G_LOGGER.module_severity = G_LOGGER.ERROR
    return module


def can_execute(flavor: Flavor) -> bool:
    """True when this machine's GPU runs the flavor's engines."""
    found = gpu()
    if found is None:
        return False
    return flavor == "tensorrt" or found.capability in RTX_CAPABILITIES


def platform_name() -> str:
    """Operating system and architecture, which a plan never crosses."""
    return f"{platform.system()}-{platform.machine()}".lower()
