# SPDX-License-Identifier: Apache-2.0
"""A crowd of idle processes and of shims, for as long as its standard input is open.

Commands on stdin, one a line: `processes N`, `shims N`: from now on there are so many; "ok" when they are there.

The processes are real: `busybox sleep`, one each. The shims are look-alikes, for more than memory allows of
real ones: a copy of the interpreter under the name of containerd's shim, forked (so that its memory is shared),
child of PID 1, with a shim's argv, a bundle as its working directory, and below it a process in a pid
namespace and a cgroup of its own. To a look at /proc they are what a real one is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import sys
import time
from pathlib import Path

SHIM = Path("/run/bench/containerd-shim-runc-v2")
BUNDLES = Path("/run/containerd/io.containerd.runtime.v2.task/moby")
IDS = Path("/run/bench/ids")
SCOPES = Path("/sys/fs/cgroup/system.slice")
SLEEP = ["/bin/busybox", "sleep", "999999"]
CLONE_NEWPID = 0x20000000
ROOM = 400  # bytes of argv that a look-alike may fill


class Crowd:
    def __init__(self) -> None:
        self.sleepers: list[int] = []
        self.shims: list[tuple[str, int, int]] = []  # id, shim, its init

    def processes(self, wanted: int) -> None:
        while len(self.sleepers) > wanted:
            pid = self.sleepers.pop()
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        while len(self.sleepers) < wanted:
            self.sleepers.append(os.posix_spawn(SLEEP[0], SLEEP, {}))

    def more_shims(self, wanted: int) -> None:
        missing = wanted - len(self.shims)
        if missing <= 0:
            return
        if not SHIM.exists():
            SHIM.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(os.path.realpath("/usr/bin/python3"), SHIM)
        ids = [secrets.token_hex(32) for _ in range(missing)]
        for container_id in ids:
            bundle = BUNDLES / container_id
            bundle.mkdir(parents=True)
            (bundle / "address").write_text(f"unix:///run/containerd/s/{secrets.token_hex(32)}")
        IDS.write_text("\n".join(ids))
        source, sink = os.pipe()
        os.set_inheritable(sink, True)
        nursery = os.posix_spawn(
            str(SHIM),
            [str(SHIM), "-S", __file__, "--nursery", str(sink), "x" * ROOM],
            {"PYTHONHOME": "/usr"},
        )
        os.waitpid(nursery, 0)
        os.close(sink)
        with open(source) as lines:
            for line in lines:
                container_id, shim, init = line.split()
                self.shims.append((container_id, int(shim), int(init)))

    def end(self) -> None:
        self.processes(0)
        for container_id, shim, init in self.shims:
            for pid in (shim, init):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(BUNDLES / container_id, ignore_errors=True)
        time.sleep(0.5)
        for container_id, _, _ in self.shims:
            with contextlib.suppress(OSError):
                (SCOPES / f"docker-{container_id}.scope").rmdir()
        self.shims = []


def nursery(sink: int) -> None:
    """Become the parent of one look-alike for each id, and leave them to PID 1."""
    for container_id in IDS.read_text().split():
        pid = os.fork()
        if pid == 0:
            os.setsid()
            pretend(sink, container_id)
    os.close(sink)


def pretend(sink: int, container_id: str) -> None:
    """Be a shim. Does not return."""
    os.chdir(BUNDLES / container_id)
    rewrite_argv([str(SHIM), "-namespace", "moby", "-id", container_id, "-address", "/run/containerd/containerd.sock"])
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWPID):
        raise OSError(ctypes.get_errno(), "unshare")
    scope = SCOPES / f"docker-{container_id}.scope"
    scope.mkdir(exist_ok=True)
    init = os.fork()
    if init == 0:
        os.close(sink)
        time.sleep(0.2)  # its cgroup is written meanwhile
        os.execv(SLEEP[0], SLEEP)
    (scope / "cgroup.procs").write_text(str(init))
    os.write(sink, f"{container_id} {os.getpid()} {init}\n".encode())
    os.close(sink)
    while True:
        signal.pause()


def rewrite_argv(argv: list[str]) -> None:
    """Make /proc/self/cmdline say so: by writing to where the kernel reads it (fields 48 and 49 of proc(5), stat)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    text = b"\0".join(a.encode() for a in argv) + b"\0"
    ctypes.memmove(start, text + b"\0" * (end - start - len(text)), end - start)


def main() -> None:
    crowd = Crowd()
    try:
        for line in sys.stdin:
            word, number = line.split()
            {"processes": crowd.processes, "shims": crowd.more_shims}[word](int(number))
            print("ok", flush=True)
    finally:
        crowd.end()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--nursery"]:
        nursery(int(sys.argv[2]))
    else:
        main()
