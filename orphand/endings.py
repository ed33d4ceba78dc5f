# SPDX-License-Identifier: Apache-2.0
"""How processes end: waiting for them, who is deaf to TERM, and who else lives in a cgroup that is to be killed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterable
from pathlib import Path

from orphand.cgroupfs import own_part
from orphand.errors import Gone, ProcError
from orphand.estate import Estate
from orphand.model import ProcessId
from orphand.proc import Proc

POLL_SECONDS = 0.05
TERM_BIT = 1 << (signal.SIGTERM - 1)


async def exited(process: ProcessId, seconds: float, proc: Proc) -> bool:
    """Whether the process has ended, within so many seconds. A zombie has."""
    try:
        fd = proc.open_pidfd(process)
    except Gone:
        return True
    if fd is None:
        return await _polled(process, seconds, proc)
    loop = asyncio.get_running_loop()
    gone: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, _settle, gone)
    try:
        await asyncio.wait_for(gone, seconds)
    except asyncio.TimeoutError:
        return False
    finally:
        loop.remove_reader(fd)
        os.close(fd)
    return True


def _settle(gone: asyncio.Future[None]) -> None:
    if not gone.done():
        gone.set_result(None)


async def _polled(process: ProcessId, seconds: float, proc: Proc) -> bool:
    """The same without pidfds (Linux before 5.3, or no descriptors left)."""
    end = proc.now() + seconds
    while proc.alive(process):
        if proc.now() >= end:
            return False
        await asyncio.sleep(POLL_SECONDS)
    return True


async def all_exited(processes: Iterable[ProcessId], seconds: float, proc: Proc) -> bool:
    """Whether all of them have ended within so many seconds."""
    return all(await asyncio.gather(*(exited(p, seconds, proc) for p in processes)))


def is_deaf(pid: int, proc: Path = Path("/proc")) -> bool:
    """Whether TERM will do nothing: it is ignored, or it is PID 1 of its pid namespace without a handler.

    The kernel drops a signal without a handler for such an init, but keeps one that is blocked, since that
    is how signalfd works (kernel/signal.c, sig_ignored).
    """
    fields = {}
    try:
        for line in (proc / str(pid) / "status").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields[name] = value.split()
        caught, ignored, blocked = (int(fields[n][0], 16) & TERM_BIT for n in ("SigCgt", "SigIgn", "SigBlk"))
    except (OSError, KeyError, IndexError, ValueError):
        return False
    nested_init = len(fields.get("NSpid", ())) > 1 and fields["NSpid"][-1] == "1"
    return not caught and not blocked and bool(ignored or nested_init)


def company(estate: Estate, members: Iterable[ProcessId], proc: Proc) -> dict[ProcessId, str]:
    """Those in the container's cgroups that are not the container's, each with why: then it is not killed as a whole.

    A process is the container's if it descends from its init or its shim, or has lost its parents (PID 1's
    or a subreaper's child then), and doesn't live in the host's mount namespace. Another container that was started
    with this one's cgroup as its parent descends from a shim of its own.
    """
    members = list(members)
    own = {p.pid for p in (*estate.inits, *([estate.shim] if estate.shim else []))}
    reapers = ({0, 1} | {_parent(init.pid, proc) for init in estate.inits}) - own
    kin = _Kin(own, {m.pid for m in members}, reapers, proc)
    found = {}
    for process in members:
        why = _foreign_nature(process, proc) or kin.objection(process.pid)
        if why and process not in estate.inits:
            found[process] = why
    return found


def _foreign_nature(process: ProcessId, proc: Proc) -> str:
    if process.pid in (1, os.getpid()):
        return "it is PID 1 or orphand itself"
    try:
        if proc.namespace(process.pid, "mnt") == proc.namespace(1, "mnt"):
            return "it lives in the host's mount namespace"
    except Gone:
        return ""
    return ""


class _Kin:
    """Whom processes descend from. Each ancestor is read once: a container may have made a chain of ten thousand."""

    def __init__(self, own: set[int], members: set[int], reapers: set[int], proc: Proc) -> None:
        self._members = members
        self._reapers = reapers
        self._proc = proc
        self._known = dict.fromkeys(own, "")

    def objection(self, pid: int) -> str:
        """Why the process doesn't belong to the container, "" if it does."""
        line: list[int] = []
        while pid not in self._known:
            self._known[pid] = "its ancestors go round in a circle"  # unless a better answer comes
            line.append(pid)
            above = _parent(pid, self._proc)
            if above in self._reapers:
                self._known[pid] = "" if pid in self._members else f"it descends from process {pid}"
                break
            pid = above
        answer = self._known[pid]
        self._known.update(dict.fromkeys(line, answer))
        return answer


def _parent(pid: int, proc: Proc) -> int:
    try:
        return proc.stat(pid).ppid
    except ProcError:
        return 0


def dependent(estate: Estate, proc: Proc) -> int:
    """The pid of a process that is not the container's, but would die with its init; 0 if there is none.

    With PID 1 of a pid namespace the kernel kills everybody in it (pid_namespaces(7)): containers that were started
    with `--pid container:ID`, those of a pod with shareProcessNamespace, a shell of nsenter. The container's own are
    in its cgroup.
    """
    spaces, homes = set(), set()
    for init in estate.inits:
        try:
            with proc.open(init.pid) as held:
                if held.status().nspids[-1:] in ((1,), ()) and proc.alive(init):
                    spaces.add(held.namespace("pid"))
                parts = ((c.controllers, own_part(c.path, estate.container_id)) for c in held.cgroups())
                homes |= {home for home in parts if home[1]}
        except Gone:
            continue
    spaces -= {proc.namespace(1, "pid")} if spaces else set()
    inits = {init.pid for init in estate.inits}
    for pid in proc.pids() if spaces else ():
        try:
            if pid in inits or proc.namespace(pid, "pid") not in spaces:
                continue
            own = any((c.controllers, own_part(c.path, estate.container_id)) in homes for c in proc.cgroups(pid))
            if not own and not proc.stat(pid).dead:
                return pid
        except Gone:
            continue
    return 0


def container_children(shim: ProcessId, proc: Proc) -> list[int]:
    """The shim's living children that are containers' processes: while there are any, it is in use.

    What runs in the host's mount namespace is the shim's own helper (a logger, runc).
    """
    found = []
    for pid in proc.children(shim.pid):
        try:
            if not proc.stat(pid).dead and proc.namespace(pid, "mnt") != proc.namespace(1, "mnt"):
                found.append(pid)
        except Gone:
            continue
    return found
