# SPDX-License-Identifier: Apache-2.0
"""Real containerds, each with its own root, state and socket: no booted host is needed.

They are those of the tests' host tree: installing them here could replace the machine's own engine.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Optional

import pytest

from tests.host.guest import tree

CONFIG = """
version = 2
root = "{place}/root"
state = "{place}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
address = "{place}/c.sock"
[ttrpc]
address = "{place}/c.ttrpc"
"""


def eventually(answer: Callable[[], bool], what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not answer():
        assert time.monotonic() < end, f"waited {seconds:g} s for {what}"
        time.sleep(0.02)


def thread_states(pid: int) -> Iterator[str]:
    """Of each thread: a signal that stops a process takes its time, and what still runs may answer."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            yield (task / "stat").read_text().rpartition(")")[2].split()[0]


class PrivateContainerd:
    """One containerd. Its containers run busybox without network in a namespace named after the test's process."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.address = str(place / "c.sock")
        self.namespace = f"orphand-{os.getpid()}"
        self.process: Optional[subprocess.Popen[bytes]] = None
        (place / "config.toml").write_text(CONFIG.format(place=place))
        (place / "rootfs" / "bin").mkdir(parents=True)
        self._tree = tree("bookworm")
        shutil.copy(self._tree / "bin/busybox", place / "rootfs" / "bin")

    def start(self) -> None:
        log = open(self.place / "log", "ab")  # noqa: SIM115 - the child's
        command = [str(self._tree / "usr/bin/containerd"), "--config", str(self.place / "config.toml")]
        path = f"{self._tree}/usr/sbin:{self._tree}/usr/bin:{os.environ['PATH']}"
        self.process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, "PATH": path}
        )
        eventually(lambda: self.ctr("version", check=False).returncode == 0, "containerd")

    def stop(self, number: int = signal.SIGKILL) -> None:
        assert self.process
        self.process.send_signal(number)
        self.process.wait(30)

    @contextlib.contextmanager
    def frozen(self, pid: int) -> Iterator[None]:
        os.kill(pid, signal.SIGSTOP)
        try:
            eventually(lambda: set(thread_states(pid)) <= {"T", "Z"}, f"the threads of process {pid} to stop")
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def ctr(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self._tree / "usr/bin/ctr"), "--address", self.address, "--namespace", self.namespace, *args],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=check,
            timeout=60,
        )

    def run(self, name: str, *command: str) -> int:
        """Start a container; the pid of its init."""
        argv = command or ("/bin/busybox", "sleep", "99999")
        self.ctr("run", "--detach", "--rootfs", str(self.place / "rootfs"), name, *argv)
        return self.pid(name)

    def pid(self, name: str) -> int:
        rows = [line.split() for line in self.ctr("tasks", "ls").stdout.splitlines()[1:]]
        return next((int(row[1]) for row in rows if row[0] == name), 0)

    def shim(self, name: str) -> int:
        for path in glob.glob("/proc/[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                argv = Path(path).read_bytes().split(b"\0")
                if b"containerd-shim" in argv[0] and name.encode() in argv and self.address.encode() in argv:
                    return int(path.split("/")[2])
        raise AssertionError(f"no shim for {name}")

    def close(self) -> None:
        if self.process and self.process.poll() is None:
            for name in self.ctr("tasks", "ls", "-q", check=False).stdout.split():
                self.ctr("tasks", "rm", "--force", name, check=False)
            self.stop()
        for directory in [*glob.glob(f"/sys/fs/cgroup/*/{self.namespace}"), f"/sys/fs/cgroup/{self.namespace}"]:
            with contextlib.suppress(OSError):
                os.rmdir(directory)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], PrivateContainerd]]:
    """Start a containerd of its own; each call one more."""
    with contextlib.ExitStack() as running:

        def one() -> PrivateContainerd:
            place = tmp_path / f"ctrd{len(list(tmp_path.iterdir()))}"
            place.mkdir()
            containerd = PrivateContainerd(place)
            running.callback(containerd.close)
            containerd.start()
            return containerd

        yield one


@pytest.fixture
def containerd(start: Callable[[], PrivateContainerd]) -> PrivateContainerd:
    return start()
