"""Processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import signal
import sys


def end_with_the_parent() -> None:
    """For `preexec_fn`: Linux ends this process with SIGTERM when its parent dies, however that came."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
