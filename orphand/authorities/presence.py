# SPDX-License-Identifier: Apache-2.0
"""Who serves containerd's socket right now, and since when: seen in /proc, without connecting."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from orphand.authorities import listeners
from orphand.errors import OrphandError
from orphand.model import ProcessId

# what serves containerd's API: Debian's, Docker's up to 18.06, and those that carry it inside
SERVERS = frozenset({"containerd", "docker-containerd", "k3s", "rke2", "k0s"})
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
DELETED = " (deleted)"


class Absent(OrphandError):
    """Nobody is there to be asked; the text says why."""


@dataclass(frozen=True)
class Presence:
    """A served socket. Two looks that give equal ones saw the same server on the same socket."""

    process: ProcessId
    socket: tuple[int, int]  # device and inode of the file, which tell two paths of one socket
    listening: frozenset[int]  # the kernel's inodes of the listening sockets

    def age(self, now: float) -> float:
        """Seconds since the server's process started; `now` is on the boot clock."""
        return now - self.process.start / TICKS_PER_SECOND


def boottime() -> float:
    """Seconds on the boot clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def socket_identity(path: str) -> Optional[tuple[int, int]]:
    """Device and inode of the socket that the path leads to; None if it leads to none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISSOCK(found.st_mode) else None


class Server:
    """The server behind one socket path. Remembers who held it, so that a look costs one process, not all."""

    def __init__(self, path: str, proc: Path = Path("/proc")) -> None:
        """`proc` is where /proc is."""
        self._path = path
        self._proc = proc
        self._last: Optional[ProcessId] = None

    def look(self) -> Presence:
        """Who serves the socket now. Raises Absent."""
        socket = socket_identity(self._path)
        if socket is None:
            raise Absent(f"{self._path} is no socket")
        try:
            inodes = listeners.listening_inodes(self._path, self._proc)
        except OSError as error:
            raise Absent(f"can't see who listens on {self._path}: {error}") from error
        if not inodes:
            raise Absent(f"nobody listens on {self._path}")
        self._last = self._still_there(inodes) or self._search(inodes)
        return Presence(self._last, socket, inodes)

    def _still_there(self, inodes: frozenset[int]) -> Optional[ProcessId]:
        if self._last is None or start_of(self._last.pid, self._proc) != self._last.start:
            return None
        held = listeners.holds(inodes, self._last, self._proc)
        return self._last if held and start_of(self._last.pid, self._proc) == self._last.start else None

    def _search(self, inodes: frozenset[int]) -> ProcessId:
        everybody = list(self._everybody())
        likely = [p for p in everybody if self._program(p) in SERVERS]
        found = listeners.holders(inodes, likely, self._proc) or listeners.holders(inodes, everybody, self._proc)
        # a child between fork and exec holds it too for a moment; PID 1 holds what it will start a service for
        serving = sorted((p for p in found if p.pid != 1), key=lambda p: (p.start, p.pid))
        if not serving:
            held = "only PID 1 holds it, for a service that is stopped" if found else "no process holds it"
            raise Absent(f"nobody serves {self._path}: {held}")
        return serving[0]

    def _everybody(self) -> Iterator[ProcessId]:
        for entry in os.listdir(self._proc):
            if entry.isdigit():
                start = start_of(int(entry), self._proc)
                if start is not None:
                    yield ProcessId(int(entry), start)

    def _program(self, process: ProcessId) -> str:
        try:
            return os.path.basename(os.readlink(f"{self._proc}/{process.pid}/exe")).replace(DELETED, "")
        except OSError:
            return ""


def start_of(pid: int, proc: Path = Path("/proc")) -> Optional[int]:
    """Field 22 of /proc/PID/stat (proc(5)); None if there is no such process."""
    try:
        with open(f"{proc}/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
