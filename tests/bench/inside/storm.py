# SPDX-License-Identifier: Apache-2.0
"""What a storm does to the daemon: storm.py journal RATE SECONDS | containers COUNT. One line of JSON.

journal: RATE lines a second as dockerd writes them, one in a hundred a warning about an unknown container, straight to
journald's socket. containers: so many are started, end at once and are removed, four at a time.
"""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import meter

PLAIN = b'time="2026-01-01T00:00:00Z" level=info msg="ignoring event" module=libcontainerd topic=/tasks/delete'
WARNING = 'time="2026-01-01T00:00:00Z" level=warning msg="unknown container" container={} module=libcontainerd'
BURST = 0.01  # seconds between two bursts of the writer
RUN = ["docker", "run", "--rm", "--network", "none", "bb:1", "/bin/busybox", "true"]


def write_lines(rate: int, seconds: float) -> int:
    """So many lines a second, in bursts; how many it were."""
    warning = WARNING.format(secrets.token_hex(32)).encode()
    lines = [b"PRIORITY=6\nSYSLOG_IDENTIFIER=dockerd\nMESSAGE=" + m + b"\n" for m in (PLAIN, warning)]
    written, begun = 0, time.monotonic()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.connect("/run/systemd/journal/socket")
        while (passed := time.monotonic() - begun) < seconds:
            while written < rate * passed:
                out.send(lines[written % 100 == 0])
                written += 1
            time.sleep(BURST)
    return written


def start_and_stop(count: int) -> int:
    with ThreadPoolExecutor(4) as pool:
        done = [
            pool.submit(subprocess.run, RUN, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(count)
        ]
        return sum(d.result().returncode == 0 for d in done)


class Watcher(threading.Thread):
    """Sees each look of the daemon by its status file, and its memory."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.looks: list[float] = []
        self.most = 0.0
        self.ending = threading.Event()

    def run(self) -> None:
        last = meter.looked_at()
        while not self.ending.wait(0.02):
            now = meter.looked_at()
            if now != last:
                self.looks.append(now)
                self.most = max(self.most, meter.memory(self.pid)["rss"])
            last = now


def main() -> None:
    if sys.argv[1] == "journal":
        storm: Callable[[], int] = lambda: write_lines(int(sys.argv[2]), float(sys.argv[3]))  # noqa: E731
    else:
        storm = lambda: start_and_stop(int(sys.argv[2]))  # noqa: E731
    pid = meter.orphand_pid()
    watcher = Watcher(pid)
    used, rss = meter.cpu(pid), meter.memory(pid)
    watcher.start()
    begun = time.time()
    done = storm()
    ended = time.time()
    time.sleep(3)  # what was asked for in the storm is still looked at
    watcher.ending.set()
    watcher.join()
    used = meter.cpu(pid) - used
    stamps = [begun, *watcher.looks]
    within = [b - a for a, b in zip(stamps, stamps[1:]) if a < ended]
    meter.say(
        {
            "storm": sys.argv[1],
            "done": done,
            "seconds": round(ended - begun, 2),
            "cpu seconds": round(used, 3),
            "share of a core": used / (ended - begun),
            "looks": len(watcher.looks),
            "longest wait for a look": round(max(within, default=0.0), 3),
            "rss before": rss["rss"],
            "rss at most": watcher.most,
        }
    )


main()
