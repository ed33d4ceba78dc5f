# SPDX-License-Identifier: Apache-2.0
"""Which API calls the engines receive from orphand: calls.py IDLE_SECONDS CONTAINERS. One line of JSON.

Docker's are counted at dockerd's own socket: what it reads (strace), by the User-Agent of docker-py's transport, which
nobody else in the host uses. containerd's are counted by itself (its grpc metrics at 127.0.0.1:1338), less what it
counted in as long a time without orphand.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections import Counter
from urllib.request import urlopen

import meter

TRACE = "/run/bench-trace"
REQUEST = re.compile(r'"(GET|POST|HEAD|DELETE|PUT) (\S+) HTTP/1\.1\\r\\n(.*)')
HANDLED = re.compile(r'grpc_server_started_total\{.*grpc_method="(\w+)",grpc_service="([\w.]+)".*\} (\d+)')
AGENT = "python-requests"
RUN = ["docker", "run", "--rm", "--network", "none", "bb:1", "/bin/busybox", "true"]


def containerd_calls() -> Counter[str]:
    with urlopen("http://127.0.0.1:1338/v1/metrics") as answer:
        lines = answer.read().decode().splitlines()
    found = (HANDLED.match(line) for line in lines)
    return Counter({f"{m[2].rpartition('.')[2]}.{m[1]}": int(m[3]) for m in found if m})


def docker_calls() -> Counter[str]:
    """Those of orphand so far: method and path, ids and queries left out."""
    calls: Counter[str] = Counter()
    with open(TRACE, errors="replace") as lines:
        for match in map(REQUEST.search, lines):
            if match and AGENT in match[3]:
                path = re.sub(r"^/v[\d.]+|\?.*", "", match[2])
                calls[f"{match[1]} {re.sub('[0-9a-f]{64}', 'ID', path)}"] += 1
    return calls


class Counted:
    """What came since the last time it was asked."""

    def __init__(self) -> None:
        self.docker, self.containerd = Counter[str](), containerd_calls()

    def since(self) -> dict[str, dict[str, int]]:
        docker, containerd = docker_calls(), containerd_calls()
        found = {"docker": dict(docker - self.docker), "containerd": dict(containerd - self.containerd)}
        self.docker, self.containerd = docker, containerd
        return found


def main() -> None:
    seconds, containers = float(sys.argv[1]), int(sys.argv[2])
    pid = subprocess.check_output(["systemctl", "show", "-p", "MainPID", "--value", "docker"], text=True).strip()
    open(TRACE, "w").close()
    strace = subprocess.Popen(
        ["strace", "-f", "-qq", "-e", "trace=read", "-s", "512", "-o", TRACE, "-p", pid], stderr=subprocess.DEVNULL
    )
    time.sleep(2)
    found = {}
    subprocess.run(["systemctl", "stop", "orphand"])
    counted = Counted()
    time.sleep(seconds)
    found["idle, without orphand"] = counted.since()
    subprocess.run(["systemctl", "start", "orphand"], check=True)
    time.sleep(2)
    found["start"] = counted.since()
    time.sleep(seconds)
    found["idle"] = counted.since()
    for _ in range(containers):
        subprocess.run(RUN, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(2)
    found["containers"] = counted.since()
    looks = 10
    for _ in range(looks):
        meter.one_look(meter.orphand_pid())
    found["looks"] = counted.since()
    strace.send_signal(signal.SIGINT)
    strace.wait()
    meter.say({"seconds": seconds, "containers": containers, "looks": looks, "by": found})


main()
