# SPDX-License-Identifier: Apache-2.0
"""How large a run is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    name: str
    processes: tuple[int, ...]
    shims: tuple[int, ...]
    real: int  # of the shims so many are real ones, the rest look-alikes
    repeats: int
    samples: int  # of each latency
    containers: tuple[int, ...]  # real ones, for the growth; the last also for idle and the storms
    looks: int
    traced: int  # looks under strace
    settled: float  # seconds before the idle time begins: the engines are believed after scan.settle
    idle: float  # seconds
    storm: int  # containers started and stopped
    flood: tuple[int, int]  # lines a second, seconds
    watched: float  # seconds in which the engines' calls are counted
    few: int  # containers started while they are counted
    settling: float = 31.0  # seconds before a look is measured: young shims (30 s) are read anew in each
    beside: bool = True  # with what isn't in the tests' own host tree: fail2ban


SIZES = {
    "smoke": Sizes("smoke", (150,), (3,), 2, 2, 2, (2,), 2, 1, 1, 3, 4, (2000, 2), 3, 2, 1, False),
    "quick": Sizes("quick", (100, 1000), (0, 20), 5, 5, 10, (0, 20), 10, 5, 130, 60, 40, (50_000, 5), 35, 5),
    "full": Sizes(
        "full", (100, 1000, 10_000), (0, 20, 200), 20, 9, 100, (0, 20, 100, 200), 20, 10, 130, 600, 1000,
        (50_000, 30), 120, 20,
    ),
}  # fmt: skip
