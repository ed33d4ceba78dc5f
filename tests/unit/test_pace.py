# SPDX-License-Identifier: Apache-2.0
"""Pace: a lone trigger is quick, a flood costs a bounded number of looks, and none is lost."""

from __future__ import annotations

import random
from collections import deque

from orphand.triggers.pace import MAX_REASONS, Pace


def looks(pace: Pace, fires: list[float], until: float, step: float = 0.01) -> list[tuple[float, str]]:
    """Simulate a loop that fires at the given times and looks whenever one is due."""
    done, now, waiting = [], 0.0, deque(sorted(fires))
    while now <= until:
        while waiting and waiting[0] <= now:
            pace.fire("x", waiting.popleft())
        if pace.due(now) == 0:
            done.append((now, pace.take(now)))
        now += step
    return done


def test_nothing_asked() -> None:
    pace = Pace()
    assert pace.due(0.0) is None
    assert pace.take(0.0) == ""


def test_a_lone_trigger_is_quick() -> None:
    ((at, why),) = looks(Pace(), [5.0], 10.0)
    assert 5.0 <= at <= 5.05
    assert why == "x"


def test_a_flood_costs_about_a_look_a_second() -> None:
    flood = [i / 100_000 for i in range(1_000_000)]  # ten seconds
    done = looks(Pace(), flood, 20.0)
    assert 8 <= len(done) <= 13
    assert done[0][0] <= 0.05


def test_the_last_trigger_of_a_flood_is_not_lost() -> None:
    rng = random.Random(1)
    for _ in range(50):
        fires = [rng.random() * 5 for _ in range(rng.randrange(1, 200))]
        done = looks(Pace(), fires, 10.0)
        assert done[-1][0] >= max(fires)
        assert len(done) <= 5 + 3


def test_a_clock_that_goes_back_does_not_stop_it() -> None:
    pace = Pace()
    for now in (100.0, 100.0, 50.0):
        pace.fire("x", now)
        pace.take(now)
    pace.fire("x", 50.1)
    assert pace.due(52.0) == 0


def test_reasons_are_counted_and_bounded() -> None:
    pace = Pace()
    for _ in range(3):
        pace.fire("docker event: die", 0.0)
    assert pace.take(1.0) == "docker event: die (3 times)"
    for number in range(1000):
        pace.fire(f"reason {number}", 2.0)
    why = pace.take(3.0)
    assert why.endswith(f"; {1000 - MAX_REASONS} more")
    assert why.count(";") == MAX_REASONS
