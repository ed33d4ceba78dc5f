# SPDX-License-Identifier: Apache-2.0
"""What one look of the running daemon costs, all sources asked: tick.py LOOKS TRACED. One line of JSON.

LOOKS looks are measured, then TRACED more are counted system call by system call with strace.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import meter

SUMMARY = "/run/bench-strace"


def traced(pid: int, looks: int) -> dict[str, float]:
    """System calls for one look, the most frequent ones by name."""
    strace = subprocess.Popen(
        ["strace", "-f", "-c", "-S", "calls", "-p", str(pid), "-o", SUMMARY], stderr=subprocess.DEVNULL
    )
    time.sleep(1)
    for _ in range(looks):
        meter.one_look(pid)
    strace.send_signal(signal.SIGINT)
    strace.wait()
    calls: dict[str, float] = {}
    with open(SUMMARY) as lines:
        for line in lines:
            fields = line.split()
            if len(fields) >= 5 and fields[3].isdigit() and fields[-1] != "total":
                calls[fields[-1]] = int(fields[3]) / looks
    return {"all": sum(calls.values()), **dict(list(calls.items())[:8])}


def main() -> None:
    pid = meter.orphand_pid()
    used = [meter.one_look(pid) for _ in range(int(sys.argv[1]))]
    memory = meter.memory(pid)
    calls = traced(pid, int(sys.argv[2])) if int(sys.argv[2]) else {}
    meter.say({"cpu": meter.spread(used), "memory": memory, "syscalls": calls})


main()
