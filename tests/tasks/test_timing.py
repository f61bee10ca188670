"""Rounds are interleaved, and timed by the device where it has a clock of its own."""

from __future__ import annotations

from typing import Any

import numpy as np

from recipes.schema import Benchmark
from tasks import timing
from tasks.benchmark import precise
from tasks.engines.common import OnDevice

FEED = {"x": np.zeros((1, 2), np.float32)}


class Session:
    """Notes its calls."""

    inputs: dict[str, tuple[str, tuple[int | None, ...]]] = {}  # noqa: RUF012

    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order = name, order

    def run(self, feed: Any) -> dict[str, np.ndarray]:
        self.order.append(self.name)
        return {}

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None: ...


class Clocked(Session):
    """Times itself."""

    def latencies(self, feed: Any, count: int, warmup: int) -> list[float]:
        self.order.append(self.name)
        return [2.0] * count


def test_every_other_round_goes_backwards() -> None:
    order: list[str] = []
    sessions = {name: Session(name, order) for name in ("a", "b")}
    found = timing.interleaved(
        sessions, {"a": {1: FEED}, "b": {1: FEED}}, rounds=range(3), round_ms=0.000001, warmup=2
    )
    assert order == ["a", "a", "b", "b", "a", "b", "b", "a", "a", "b"]
    assert {name: [len(calls) for calls in by[1]] for name, by in found.items()} == {
        "a": [1, 1, 1],
        "b": [1, 1, 1],
    }


def test_the_devices_own_clock_is_believed() -> None:
    order: list[str] = []
    sessions = {"a": Clocked("a", order)}
    assert isinstance(sessions["a"], OnDevice)
    found = timing.interleaved(sessions, {"a": {4: FEED}}, rounds=range(2), round_ms=7, warmup=1)
    assert found == {"a": {4: [[0.002] * 4, [0.002] * 4]}}


def test_a_tensorrt_session_times_itself() -> None:
    """Its signature is what the rounds call; a rename there would silently fall back to the host's clock."""
    from tasks.engines.tensorrt_run import TensorRTSession

    assert issubclass(TensorRTSession, OnDevice)
    assert TensorRTSession.latencies.__code__.co_varnames[:4] == ("self", "feed", "count", "warmup")


def test_rounds_go_on_until_they_are_enough() -> None:
    order: list[str] = []
    sessions = {"a": Clocked("a", order)}
    found = timing.interleaved(
        sessions,
        {"a": {4: FEED}},
        rounds=range(9),
        round_ms=7,
        warmup=1,
        enough=lambda s: len(s["a"][4]) == 3,
    )
    assert len(found["a"][4]) == 3


def test_a_noisy_champion_gets_more_rounds_and_a_quiet_one_none() -> None:
    section = Benchmark(batch_sizes=(1,))
    quiet = {"candidate": _rounds(30, 0.01), "champion": _rounds(30, 0.01)}
    noisy = {"candidate": _rounds(30, 0.2), "champion": _rounds(30, 0.2)}
    assert precise(section, quiet)
    assert not precise(section, noisy)
    assert not precise(section, {"candidate": _rounds(20, 0.01), "champion": _rounds(20, 0.01)})
    slower = {"candidate": {1: [[2 * call for call in calls] for calls in quiet["candidate"][1]]}}
    assert precise(section, {**quiet, **slower}), "how wide the interval is decides, not where it lies"


def test_a_baseline_gets_more_rounds_where_its_interval_is_five_times_as_wide() -> None:
    section = Benchmark(batch_sizes=(1,))
    rounds = {noise: (_rounds(30, noise), _rounds(30, noise)) for noise in (0.1, 0.8)}
    told = {noise: dict(zip(("candidate", "baseline"), pair, strict=True)) for noise, pair in rounds.items()}
    assert precise(section, told[0.1])
    assert not precise(section, told[0.8])
    champion = {"candidate": rounds[0.1][0], "champion": rounds[0.1][1], "baseline": rounds[0.1][1]}
    assert not precise(section, champion), "the champion's is the narrower one"


RANDOM = np.random.default_rng(0)


def _rounds(count: int, noise: float) -> dict[int, list[list[float]]]:
    return {1: [[float(np.exp(noise * RANDOM.standard_normal()))] for _ in range(count)]}
