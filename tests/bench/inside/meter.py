# SPDX-License-Identifier: Apache-2.0
"""What a process has used, as the kernel counts it. For scripts that run inside the host."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Optional

STATUS = "/run/orphand/status.json"
QUIET = 1.2  # seconds between two wishes for a look: orphand makes at most one a second of a burst


def cpu(pid: int) -> float:
    """Seconds of user and system time of the whole process, also of threads that have ended, to the nanosecond.

    The id of another process's CPU clock is ~pid << 3 | CPUCLOCK_SCHED (clock_getcpuclockid(3)).
    """
    return time.clock_gettime(~pid << 3 | 2)


def memory(pid: int) -> dict[str, float]:
    """RSS and USS (what would come free if it ended) in MB of 1e6 bytes."""
    sums = {"rss": 0.0, "uss": 0.0}
    with open(f"/proc/{pid}/smaps_rollup") as rollup:
        for line in rollup:
            if line.startswith("Rss:"):
                sums["rss"] += int(line.split()[1]) * 1024 / 1e6
            elif line.startswith("Private"):
                sums["uss"] += int(line.split()[1]) * 1024 / 1e6
    return {name: round(value, 2) for name, value in sums.items()}


def wakeups(pid: int) -> int:
    """How often its threads that live now have gone to sleep by themselves, each of which a wake-up ended."""
    count = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/status") as status:
            count += sum(int(line.split()[1]) for line in status if line.startswith("voluntary_ctxt_switches"))
    return count


def orphand_pid() -> int:
    shown = subprocess.run(["systemctl", "show", "-p", "MainPID", "--value", "orphand"], capture_output=True, text=True)
    return int(shown.stdout)


def looked_at() -> float:
    """When orphand's last look ended (wall clock); 0 before the first."""
    try:
        with open(STATUS) as status:
            return float(json.load(status)["looked_at"])
    except (OSError, ValueError, KeyError):
        return 0.0


def wait_until(true: Callable[[], Any], timeout: float, what: str, every: float = 0.02) -> Any:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        value = true()
        if value:
            return value
        time.sleep(every)
    raise SystemExit(f"waited {timeout:g} s for {what}")


def one_look(pid: int) -> float:
    """Make orphand look once, wished for by SIGUSR1: seconds of CPU that the daemon used for it."""
    time.sleep(QUIET)
    before, used = looked_at(), cpu(pid)
    os.kill(pid, signal.SIGUSR1)
    wait_until(lambda: looked_at() != before, 60, "a look")
    time.sleep(0.05)  # it ends its round: status, watchdog
    return cpu(pid) - used


def children_cpu(argv: Sequence[str]) -> float:
    """Seconds of CPU that a command and all that it ran and waited for used."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, extremes, quartiles and the 99th percentile (of those that were measured, the nearest one)."""
    ordered = sorted(values)
    if not ordered:
        return {"n": 0}

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]

    found = {"median": at(0.5), "min": ordered[0], "max": ordered[-1], "q1": at(0.25), "q3": at(0.75), "p99": at(0.99)}
    return {"n": len(ordered), **{name: round(value, 9) for name, value in found.items()}}


def say(result: Any, file: Optional[str] = None) -> None:
    """The result of a script, as one line of JSON."""
    print(json.dumps(result), flush=True)
