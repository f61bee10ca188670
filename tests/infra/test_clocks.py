"""The schedules that ship: their zones, and what they do when clocks are changed."""

from __future__ import annotations

import asyncio
import itertools
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml
from prefect.server.schemas.schedules import CronSchedule, IntervalSchedule

FILE = Path(__file__).resolve().parent.parent.parent / "infra" / "prefect.yaml"
CHANGES = [datetime(2027, 3, 28, tzinfo=timezone.utc), datetime(2027, 10, 31, tzinfo=timezone.utc)]


def clocks() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    deployments = yaml.safe_load(FILE.read_text())["deployments"]
    return [(each["name"], each, clock) for each in deployments for clock in each.get("schedules", [])]


CRONS = [(name, clock) for name, _, clock in clocks() if "cron" in clock]


@pytest.mark.parametrize(("name", "clock"), CRONS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_cron_keeps_its_local_time_over_a_change_of_clocks(
    name: str, clock: dict[str, Any], change: datetime
) -> None:
    schedule = CronSchedule(cron=clock["cron"], timezone=clock["timezone"])
    zone = ZoneInfo(clock["timezone"])
    found = asyncio.run(schedule.get_dates(n=28, start=change - timedelta(days=14)))
    local = [each.astimezone(zone) for each in found]
    minute, hour = (int(part) for part in clock["cron"].split()[:2])
    assert {(each.hour, each.minute) for each in local} == {(hour, minute)}
    days = [each.date() for each in local]
    assert len(set(days)) == len(days)
    step = 7 if clock["cron"].split()[4] != "*" else 1
    assert {(b - a).days for a, b in itertools.pairwise(days)} == {step}
    assert len({each.utcoffset() for each in local}) == 2  # the change lies within


@pytest.mark.parametrize("change", CHANGES)
def test_an_interval_is_that_many_seconds_over_a_change_of_clocks(change: datetime) -> None:
    (seconds,) = {clock["interval"] for name, _, clock in clocks() if name == "every-six-hours"}
    schedule = IntervalSchedule(interval=timedelta(seconds=seconds))
    found = asyncio.run(schedule.get_dates(n=20, start=change - timedelta(days=2)))
    assert {b.timestamp() - a.timestamp() for a, b in itertools.pairwise(found)} == {seconds}


def test_every_clock_runs_one_at_a_time_and_says_its_zone() -> None:
    names = set()
    for name, deployment, clock in clocks():
        names.add(name)
        assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}, name
        assert "interval" in clock or clock["timezone"], name
    assert {"nightly", "weekly", "every-six-hours", "hourly", "repositories"} <= names
