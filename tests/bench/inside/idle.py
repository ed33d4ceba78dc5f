# SPDX-License-Identifier: Apache-2.0
"""What daemons cost while nothing happens: idle.py SECONDS NAME=PID…  One line of JSON."""

from __future__ import annotations

import sys
import time

import meter


def main() -> None:
    seconds = float(sys.argv[1])
    pids = {name: int(pid) for name, _, pid in (argument.partition("=") for argument in sys.argv[2:])}
    begun = time.monotonic()
    before = {name: (meter.cpu(pid), meter.wakeups(pid)) for name, pid in pids.items()}
    time.sleep(seconds)
    took = time.monotonic() - begun
    found = {}
    for name, pid in pids.items():
        used, woken = meter.cpu(pid) - before[name][0], meter.wakeups(pid) - before[name][1]
        found[name] = {
            "cpu seconds": round(used, 4),
            "share of a core": used / took,
            "wake-ups a minute": round(60 * woken / took, 1),
            "memory": meter.memory(pid),
        }
    meter.say({"seconds": round(took, 1), "by": found})


main()
