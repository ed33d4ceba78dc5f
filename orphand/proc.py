# SPDX-License-Identifier: Apache-2.0
"""Reading /proc, and signals that can't hit the wrong process.

Everything here is raw bytes through os.open and os.read: a look reads some thousand small files, and
that is what it costs. Any entry may vanish at any read: that is `Gone`, never another exception.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Optional, Union

from orphand.errors import Denied, Gone, ProcError
from orphand.model import ProcessId

HAS_PIDFD = hasattr(os, "pidfd_open") and hasattr(signal, "pidfd_send_signal")
TICKS = os.sysconf("SC_CLK_TCK")
ARGV_LIMIT = 32 * 1024  # bytes; the longest argv of a real shim is well below 2 KiB
DELETED = " (deleted)"  # what the kernel appends to the name of a file or cgroup that was removed
_SMALL = 16 * 1024  # bytes; stat and status are asked for with no more
_PIECE = 64 * 1024
ZOMBIE_STATES = frozenset("ZXx")

_GONE = frozenset({errno.ENOENT, errno.ESRCH, errno.ENOTDIR})
_NO_PIDFD = frozenset({errno.ENOSYS, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINVAL})
_NAMESPACE = re.compile(r"\A[a-z_]+:\[([0-9]+)\]\Z")

Name = Union[str, bytes]


class Stat(NamedTuple):
    """The parts of /proc/PID/stat that are needed. `comm` may be anything that the process likes."""

    pid: int
    comm: str
    state: str
    ppid: int
    start: int  # clock ticks after boot

    @property
    def process(self) -> ProcessId:
        return ProcessId(self.pid, self.start)

    @property
    def dead(self) -> bool:
        """A zombie, or on its way out: it holds nothing but its pid any more."""
        return self.state in ZOMBIE_STATES


@dataclass(frozen=True)
class Status:
    """The parts of /proc/PID/status that are needed."""

    uids: tuple[int, ...]  # real, effective, saved, filesystem
    nspids: tuple[int, ...]  # its pid in each pid namespace, ours first; empty before Linux 4.1


@dataclass(frozen=True)
class Cgroup:
    """One line of /proc/PID/cgroup. `controllers` is "" for the unified hierarchy."""

    controllers: str
    path: str

    @property
    def rank(self) -> int:
        """The order in which hierarchies are asked: systemd's own, the unified one, any controller."""
        return {"name=systemd": 0, "": 1}.get(self.controllers, 2)


def _failure(error: OSError, what: str) -> ProcError:
    text = f"{what}: {error.strerror or error}"
    return Gone(text) if error.errno in _GONE else Denied(text)


def _read_file(path: Name, dir_fd: Optional[int], limit: int) -> bytes:
    """At most `limit` bytes. One of the three functions through which all of /proc is read."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        # the small files come whole in one read; long lists and command lines come in pieces
        return os.read(fd, limit) if limit <= _SMALL else read_up_to(fd, limit)
    finally:
        os.close(fd)


def read_up_to(fd: int, limit: int) -> bytes:
    """The rest of a file, at most `limit` bytes. Raises OSError.

    In pieces, since os.read and file.read(limit) allocate all that they are asked for. Megabytes of it at each look
    tear holes into the heap, which then never shrinks.
    """
    pieces, left = [], limit
    while left > 0 and (piece := os.read(fd, min(left, _PIECE))):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def _read_link(path: Name, dir_fd: Optional[int]) -> str:
    return os.readlink(os.fsdecode(path), dir_fd=dir_fd)


def _list_dir(path: str) -> list[str]:
    return os.listdir(path)


def parse_stat(data: bytes) -> Stat:
    """Read a line of /proc/PID/stat. Raises Gone where it is no such line (the process ended in the read)."""
    opening, closing = data.find(b"("), data.rfind(b")")
    fields = data[closing + 1 :].split(None, 20)
    try:
        return Stat(
            pid=int(data[:opening]),
            comm=os.fsdecode(data[opening + 1 : closing]),
            state=fields[0].decode("ascii"),
            ppid=int(fields[1]),
            start=int(fields[19]),  # field 22 of proc(5), the third field after comm being number 3
        )
    except (ValueError, IndexError) as error:
        raise Gone(f"not a stat line: {data[:64]!r}") from error


def parse_status(data: bytes) -> Status:
    """Read /proc/PID/status. Raises Gone where it has no uids."""
    uids: tuple[int, ...] = ()
    nspids: tuple[int, ...] = ()
    try:
        for line in data.split(b"\n"):
            if line.startswith(b"Uid:"):
                uids = tuple(int(n) for n in line[4:].split())
            elif line.startswith(b"NSpid:"):
                nspids = tuple(int(n) for n in line[6:].split())
    except ValueError as error:
        raise Gone("not a status file") from error
    if not uids:
        raise Gone("a status without uids")
    return Status(uids, nspids)


@lru_cache(maxsize=128)  # thousands of processes share a few cgroups; an entry takes 3 KiB
def parse_cgroups(data: bytes) -> tuple[Cgroup, ...]:
    """Read /proc/PID/cgroup, in the order in which hierarchies are asked."""
    found = []
    for line in data.decode("utf-8", "surrogateescape").split("\n"):
        parts = line.split(":", 2)
        if len(parts) == 3 and parts[2].startswith("/"):
            path = parts[2][: -len(DELETED)] if parts[2].endswith(DELETED) else parts[2]
            found.append(Cgroup(parts[1], path))
    return tuple(sorted(found, key=lambda c: c.rank))


class ProcessDir:
    """The open directory of one process: what is read through it can't be another process with the same pid."""

    def __init__(self, fd: int, pid: int) -> None:
        self._fd = fd
        self.pid = pid

    def _read(self, name: str, limit: int) -> bytes:
        try:
            return _read_file(name, self._fd, limit)
        except OSError as error:
            raise _failure(error, f"{name} of process {self.pid}") from error

    def _link(self, name: str) -> str:
        try:
            return _read_link(name, self._fd)
        except OSError as error:
            raise _failure(error, f"{name} of process {self.pid}") from error

    def stat(self) -> Stat:
        return parse_stat(self._read("stat", 4096))

    def status(self) -> Status:
        return parse_status(self._read("status", _SMALL))

    def cmdline(self, limit: int = ARGV_LIMIT) -> tuple[str, ...]:
        """Its arguments. Raises Denied where they are longer than `limit` bytes: half an argv says nothing."""
        data = self._read("cmdline", limit + 1)
        if len(data) > limit:
            raise Denied(f"the command line of process {self.pid} is longer than {limit} bytes")
        return tuple(os.fsdecode(a) for a in data.rstrip(b"\0").split(b"\0")) if data.strip(b"\0") else ()

    def exe(self) -> str:
        """The path of its executable as it was, without " (deleted)"."""
        return strip_deleted(self._link("exe"))

    def exe_owner(self) -> tuple[int, int]:
        """(uid, mode) of the executable itself, also of a deleted one."""
        try:
            found = os.stat("exe", dir_fd=self._fd)
        except OSError as error:
            raise _failure(error, f"exe of process {self.pid}") from error
        return found.st_uid, found.st_mode

    def cwd(self) -> str:
        """Its working directory, without " (deleted)"."""
        return strip_deleted(self._link("cwd"))

    def root(self) -> str:
        """Its root directory (chroot(2)), as seen from ours."""
        return self._link("root")

    def namespace(self, kind: str) -> int:
        """The inode of its namespace of that kind: mnt, pid, user, …"""
        text = self._link(f"ns/{kind}")
        match = _NAMESPACE.match(text)
        if not match:
            raise Gone(f"namespace {kind} of process {self.pid}: {text[:64]!r}")
        return int(match.group(1))

    def mountinfo(self, limit: int = 256 * 1024) -> str:
        """What is mounted in its mount namespace, as proc(5) has it, cut at `limit` bytes."""
        return os.fsdecode(self._read("mountinfo", limit))

    def cgroups(self) -> tuple[Cgroup, ...]:
        return parse_cgroups(self._read("cgroup", 65536))


def strip_deleted(path: str) -> str:
    return path[: -len(DELETED)] if path.endswith(DELETED) else path


class Proc:
    """/proc, or in tests a directory that looks like it."""

    def __init__(self, root: Path = Path("/proc")) -> None:
        self.root = root
        self._root = str(root)
        self._has_children: Optional[bool] = None

    @contextmanager
    def open(self, pid: int) -> Iterator[ProcessDir]:
        """Hold a process's directory open for several reads. Raises Gone, Denied."""
        try:
            fd = os.open(f"{self._root}/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise _failure(error, f"process {pid}") from error
        try:
            yield ProcessDir(fd, pid)
        finally:
            os.close(fd)

    def pids(self) -> list[int]:
        """Every process, in no order. Raises Denied where /proc can't be listed."""
        try:
            return [int(name) for name in _list_dir(self._root) if name.isdigit()]
        except OSError as error:
            raise _failure(error, self._root) from error

    def stat(self, pid: int) -> Stat:
        """One read, for the many. Raises Gone, Denied."""
        try:
            return parse_stat(_read_file(f"{self._root}/{pid}/stat", None, 4096))
        except OSError as error:
            raise _failure(error, f"process {pid}") from error

    def inode(self, pid: int) -> int:
        """The inode of /proc/PID, 0 if there is none. It is new for each process, so that the same one is the same
        process; the kernel may give a process another one when memory is short."""
        try:
            return os.stat(f"{self._root}/{pid}").st_ino
        except OSError:
            return 0

    def process(self, pid: int) -> ProcessId:
        """The pid with its start time. Raises Gone, Denied."""
        return self.stat(pid).process

    def alive(self, process: ProcessId) -> bool:
        """Whether that very process still runs (a zombie doesn't). Raises Denied where that can't be seen."""
        try:
            stat = self.stat(process.pid)
        except Gone:
            return False
        return stat.start == process.start and not stat.dead

    def cmdline(self, pid: int, limit: int = ARGV_LIMIT) -> tuple[str, ...]:
        with self.open(pid) as held:
            return held.cmdline(limit)

    def exe(self, pid: int) -> str:
        with self.open(pid) as held:
            return held.exe()

    def cwd(self, pid: int) -> str:
        with self.open(pid) as held:
            return held.cwd()

    def uid(self, pid: int) -> int:
        """Its effective uid."""
        with self.open(pid) as held:
            return held.status().uids[1]

    def namespace(self, pid: int, kind: str) -> int:
        with self.open(pid) as held:
            return held.namespace(kind)

    def cgroups(self, pid: int) -> tuple[Cgroup, ...]:
        """Its cgroup in each hierarchy. Raises Gone, Denied."""
        try:
            return parse_cgroups(_read_file(f"{self._root}/{pid}/cgroup", None, 65536))
        except OSError as error:
            raise _failure(error, f"process {pid}") from error

    def cgroup_of(self, pid: int) -> str:
        """Its path below the hierarchy's root; of several hierarchies the first where it isn't in the root itself."""
        paths = [c.path for c in self.cgroups(pid)]
        return next((p for p in paths if p != "/"), "/")

    def has_children(self) -> bool:
        """Whether the kernel has /proc/PID/task/TID/children (CONFIG_PROC_CHILDREN)."""
        if self._has_children is None:
            own = os.getpid() if self._root == "/proc" else 1
            self._has_children = os.path.exists(f"{self._root}/{own}/task/{own}/children")
        return self._has_children

    def children(self, pid: int) -> tuple[int, ...]:
        """The pids of its children. Without CONFIG_PROC_CHILDREN this costs a look at every process.

        The kernel may leave some out while others of them exit (proc(5)), so absence proves nothing.
        Raises Gone, Denied.
        """
        if not self.has_children():
            return tuple(stat.pid for stat in self.stats() if stat.ppid == pid)
        tasks = f"{self._root}/{pid}/task"
        try:
            threads = _list_dir(tasks)
        except OSError as error:
            raise _failure(error, f"process {pid}") from error
        found: list[int] = []
        for thread in threads:
            try:
                data = _read_file(f"{tasks}/{thread}/children", None, 1 << 22)
            except OSError as error:
                if error.errno in _GONE:
                    continue
                raise _failure(error, f"children of process {pid}") from error
            found.extend(int(child) for child in data.split())
        return tuple(found)

    def stats(self) -> Iterator[Stat]:
        """Every process that can be seen; those that vanish meanwhile are left out."""
        for pid in self.pids():
            with suppress(ProcError):
                yield self.stat(pid)

    def boot_id(self) -> str:
        """The kernel's name for this boot. Raises Denied where it can't be read."""
        try:
            return _read_file(f"{self._root}/sys/kernel/random/boot_id", None, 64).decode("ascii", "replace").strip()
        except OSError as error:
            raise Denied(f"boot_id: {error.strerror}") from error

    def now(self) -> float:
        """Seconds on the boot clock, which runs through a suspend and is never set."""
        return now()

    def age(self, process: ProcessId) -> float:
        """Seconds since it started, by the boot clock."""
        return age(process)

    def open_pidfd(self, process: ProcessId) -> Optional[int]:
        """A descriptor of that very process, which the caller closes; None where the kernel or a limit refuses one.

        The start time is read after the descriptor was opened: the pid belonged to the process when
        it was sighted and does so now, hence in between. Raises Gone, Denied.
        """
        if not HAS_PIDFD or self._root != "/proc":
            return None
        try:
            fd = os.pidfd_open(process.pid)
        except OSError as error:
            if error.errno in _NO_PIDFD:
                return None
            raise _failure(error, f"process {process.pid}") from error
        try:
            self._check(process)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def send_signal(self, process: ProcessId, number: int) -> None:
        """Send a signal to that very process.

        Through a pidfd; where there is none the start time is read again right before kill(2), which leaves
        a gap of microseconds. Refuses (ValueError) pid 1 and below, which would hit many, and ourselves.
        Raises Gone, Denied.
        """
        if process.pid <= 1 or process.pid == os.getpid():
            raise ValueError(f"process {process.pid} is never sent a signal")
        fd = self.open_pidfd(process)
        try:
            if fd is None:
                self._check(process)
                os.kill(process.pid, number)
            else:
                signal.pidfd_send_signal(fd, number)
        except OSError as error:
            raise _failure(error, f"signal {number} to process {process.pid}") from error
        finally:
            if fd is not None:
                os.close(fd)

    def _check(self, process: ProcessId) -> None:
        if self.stat(process.pid).start != process.start:
            raise Gone(f"pid {process.pid} belongs to another process now")


def now() -> float:
    """Seconds on CLOCK_BOOTTIME."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def age(process: ProcessId) -> float:
    """Seconds since the process started, by the boot clock."""
    return now() - process.start / TICKS


def boot_id() -> str:
    """The kernel's name for this boot. Raises Denied where it can't be read."""
    return Proc().boot_id()


def cgroup_of(pid: int) -> str:
    """Proc.cgroup_of of the node's own /proc. Raises Gone, Denied."""
    return Proc().cgroup_of(pid)
