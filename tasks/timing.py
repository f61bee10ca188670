"""Interleaved rounds of calls on opened engines: sessions and a clock, nothing else.

Imports with NumPy alone, so that it runs wherever an engine does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping

from tasks.engines.common import Arrays, OnDevice, Session

Feeds = Mapping[str, Mapping[int, Arrays]]  # engine -> batch size -> one batch
Seconds = dict[str, dict[int, list[list[float]]]]  # engine -> batch size -> round -> calls


def interleaved(
    sessions: Mapping[str, Session],
    feeds: Feeds,
    *,
    rounds: Iterable[int],
    round_ms: float,
    warmup: int,
    enough: Callable[[Seconds], bool] = lambda found: False,
) -> Seconds:
    """Seconds of each call; every other round goes through the engines backwards.

    After each round `enough` may end them; it must ask how precise they are, never how they look.
    """
    names = list(sessions)
    sizes = list(feeds[names[0]])
    calls = {size: _calls(sessions, feeds, size, round_ms, warmup) for size in sizes}
    found: Seconds = {name: {size: [] for size in sizes} for name in names}
    for number in rounds:
        for size, count in calls.items():
            for name in names if number % 2 == 0 else reversed(names):
                found[name][size].append(seconds(sessions[name], feeds[name][size], count))
        if enough(found):
            break
    return found


def _calls(sessions: Mapping[str, Session], feeds: Feeds, size: int, round_ms: float, warmup: int) -> int:
    """Warm up; how many calls of the fastest engine make a round long enough to time."""
    fastest = min(min(seconds(session, feeds[name][size], warmup)) for name, session in sessions.items())
    return max(1, math.ceil(round_ms / 1000 / fastest))


def seconds(session: Session, feed: Arrays, count: int) -> list[float]:
    """Seconds of each call: by device events where the session has them, else by the clock."""
    if isinstance(session, OnDevice):
        return [milliseconds / 1000 for milliseconds in session.latencies(feed, count, 0)]
    calls = []
    for _ in range(count):
        started = time.perf_counter()
        session.run(feed)
        calls.append(time.perf_counter() - started)
    return calls
