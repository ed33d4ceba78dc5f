# SPDX-License-Identifier: Apache-2.0
"""CPU of finding the shims of a node: orphand's look and what people use, side by side.

rescan.py REAL SHIMS,… PROCESSES,… REPEATS SETTLING: one line of JSON for each measurement. REAL: at most so many of
the shims are real ones. SETTLING: seconds before each; a young shim (30 s) is read again at each look, a young process
(10 s) at each sweep.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import meter
import psutil

from orphand.sightings import Looker

PIPELINE = "ps -ef | egrep containerd-shim | awk '$3~/^1$/'"
WARM_LOOKS = 20  # in a row, for one figure: one alone is too short to be measured well


def own(work: Callable[[], object], times: int = 1) -> float:
    """Seconds of our own CPU for one of `times` calls."""
    before = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - before) / times


def raw_stat() -> None:
    """Read every /proc/PID/stat, as cheaply as Python can, and look at none of it."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fd = os.open(f"/proc/{name}/stat", os.O_RDONLY)
            except OSError:
                continue
            try:
                os.read(fd, 4096)
            except OSError:
                pass
            finally:
                os.close(fd)


def psutil_all() -> None:
    for process in psutil.process_iter(["pid", "ppid", "name", "cmdline"]):
        process.info["cmdline"] and "containerd-shim" in process.info["cmdline"][0]


def measure(repeats: int) -> dict[str, dict[str, float]]:
    looker = Looker()
    looker.look(full=True)
    looker.look()
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, once in {
            "orphand, warm": lambda: own(looker.look, WARM_LOOKS),
            "orphand, cold": lambda: own(lambda: fresh(False)),
            "orphand, full sweep": lambda: own(lambda: looker.look(full=True)),
            "raw /proc/*/stat": lambda: own(raw_stat),
            "ps | egrep | awk": lambda: meter.children_cpu(["bash", "-c", PIPELINE]),
            "pgrep -f": lambda: meter.children_cpu(["pgrep", "-f", "containerd-shim"]),
            "psutil.process_iter": lambda: own(psutil_all),
        }.items():
            found.setdefault(name, []).append(once())
    seen = len({s.shim for s in looker.look() if s.shim})
    looker.close()
    return {"seen": {"shims": seen}, **{name: meter.spread(values) for name, values in found.items()}}


def fresh(full: bool) -> None:
    """The first look of a Looker that knows nothing."""
    looker = Looker()
    looker.look(full)
    looker.close()


def real_shims(number: int) -> None:
    have = subprocess.run(["docker", "ps", "-q"], capture_output=True, text=True).stdout.split()
    for _ in range(number - len(have)):
        argv = ["docker", "run", "-d", "--network", "none", "bb:1", "/bin/busybox", "sleep", "99999"]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    real, repeats, settling = int(sys.argv[1]), int(sys.argv[4]), float(sys.argv[5])
    shims, processes = ([int(n) for n in text.split(",")] for text in sys.argv[2:4])
    argv = [sys.executable, str(Path(__file__).with_name("crowd.py"))]
    crowd = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(line: str) -> None:
        assert crowd.stdin and crowd.stdout
        crowd.stdin.write(line + "\n")
        crowd.stdin.flush()
        if crowd.stdout.readline() != "ok\n":
            raise SystemExit(f"the crowd failed at {line}")

    for wanted in sorted(shims):
        real_shims(min(wanted, real))
        tell(f"shims {max(0, wanted - real)}")
        for number in sorted(processes):
            tell("processes 0")
            others = sum(name.isdigit() for name in os.listdir("/proc"))
            tell(f"processes {max(0, number - others)}")
            time.sleep(settling)
            meter.say({"shims": wanted, "processes": number, "by": measure(repeats)})
    assert crowd.stdin
    crowd.stdin.close()
    crowd.wait()


main()
