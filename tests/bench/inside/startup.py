# SPDX-License-Identifier: Apache-2.0
"""How long the daemon takes from exec to READY=1, and where it goes: startup.py REPEATS. One line of JSON."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import time

import meter

PYTHON = "/usr/bin/python3"
LINE = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \|(\s+)(\S+)")
STEPS = {
    "the interpreter": "pass",
    "+ asyncio": "import asyncio",
    "+ orphand.daemon": "import asyncio, orphand.daemon",
    "+ the configuration": "import asyncio, orphand.daemon; orphand.daemon.config.load(None)",
    "+ the first look": (
        "import asyncio, orphand.daemon as d; s = d.config.load(None); b = d.Bench(s); d.Scanner(d.Looker(), b,"
        " lambda x: d.identify(x, b.data_roots())).look(True)"
    ),
}


def to_ready() -> dict[str, float]:
    """Seconds by systemd's own stamps; CPU of all that the unit did until then."""
    subprocess.run(["systemctl", "reset-failed", "orphand"])  # the unit may be started five times in ten minutes
    subprocess.run(["systemctl", "restart", "orphand"], check=True)
    pid = meter.orphand_pid()
    used = meter.cpu(pid)
    names = "ExecMainStartTimestampMonotonic,ActiveEnterTimestampMonotonic"
    shown = subprocess.check_output(["systemctl", "show", "-p", names, "orphand"], text=True)
    stamps = dict(line.split("=") for line in shown.split())
    start, ready = (int(stamps[name]) for name in names.split(","))
    time.sleep(1)
    return {"seconds": (ready - start) / 1e6, "cpu": used}


def step(code: str) -> dict[str, float]:
    """Seconds and CPU of an interpreter that runs this and ends."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([PYTHON, "-c", code], check=True)
    seconds, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"seconds": seconds, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def imports() -> list[tuple[str, float]]:
    """The dearest modules of the daemon's first look, with all that each brings: (name, seconds)."""
    argv = [PYTHON, "-X", "importtime", "-c", STEPS["+ the first look"]]
    text = subprocess.run(argv, capture_output=True, text=True, check=True).stderr
    found = [(m[4], int(m[2]) / 1e6) for m in map(LINE.match, text.splitlines()) if m]
    return sorted(found, key=lambda entry: -entry[1])[:15]


def main() -> None:
    repeats = int(sys.argv[1])
    ready = [to_ready() for _ in range(repeats)]
    steps = {name: [step(code) for _ in range(repeats)] for name, code in STEPS.items()}
    meter.say(
        {
            "to ready": {k: meter.spread(r[k] for r in ready) for k in ("seconds", "cpu")},
            "steps": {n: {k: meter.spread(r[k] for r in rs) for k in ("seconds", "cpu")} for n, rs in steps.items()},
            "imports": imports(),
        }
    )


main()
