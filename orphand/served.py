# SPDX-License-Identifier: Apache-2.0
"""What a shim serves: which containers, with which first process each."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from orphand.bundles import (
    Disk,
    bundle_pid,
    bundles_beside,
    recorded_process,
    runc_roots,
    runc_state,
    socket_of_bundle,
    sockets_of,
)
from orphand.cgroups import contains, is_identifier, last_id
from orphand.errors import Gone, ProcError
from orphand.model import Generation, Init, ProcessId, Shim
from orphand.proc import Proc
from orphand.shims import Facts, Host, gather

_TICK = 1_000_000_000  # ns; file systems keep times by the kernel's tick, some by the second
Children = Callable[[int], Iterable[int]]

# Docker binds these out of <data-root>/containers/<id> into each of its containers
_DOCKER_FILE = re.compile(r"\A(?P<root>/.+)/containers/(?P<id>[0-9a-f]{64})/(?:resolv\.conf|hostname|hosts)\Z")


@dataclass(frozen=True)
class Member:
    """One container that a shim serves."""

    container_id: str
    inits: tuple[Init, ...] = ()
    veto: str = ""
    owner_directory: str = ""  # Docker's own directory of it, as its mounts name it


@dataclass(frozen=True)
class Served:
    """Everything that one shim serves."""

    members: tuple[Member, ...]
    bundles: tuple[str, ...] = ()  # the ids of the bundles that name its socket
    veto: str = ""
    below: frozenset[int] = frozenset()  # the shim's children
    unread: bool = False  # of a living child something could not be read

    @property
    def complete(self) -> bool:
        """Whether each container has its first process, and nothing was left unread."""
        return not self.unread and all(m.inits for m in self.members)

    @property
    def inits(self) -> tuple[Init, ...]:
        return tuple(i for m in self.members for i in m.inits)


@dataclass
class _Beside:
    """The bundles of one directory, and the socket that each names."""

    changed: int = -1
    sockets: dict[str, str] = field(default_factory=dict)
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)  # socket -> who name it
    inodes: dict[str, int] = field(default_factory=dict)


class Bundles:
    """Which bundles name which shim's socket; a directory is read again only when it changed."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._beside: dict[str, _Beside] = {}
        self.changes = 0  # while it stands still, `of` answers what it answered before

    def refresh(self) -> None:
        """See which directories changed. Until then `of` answers from what was read before."""
        for parent, beside in list(self._beside.items()):
            changed = self._disk.changed(parent)
            if not changed:
                del self._beside[parent]
                self.changes += 1
            elif changed != beside.changed:
                self._read(parent, changed)

    def _read(self, parent: str, changed: int) -> _Beside:
        beside = self._beside.setdefault(parent, _Beside())
        self.changes += 1
        inodes = {n: inode for n, inode in self._disk.entries(parent).items() if is_identifier(n)}
        known = {n: socket for n, socket in beside.sockets.items() if beside.inodes.get(n) == inodes.get(n)}
        beside.sockets = {n: known.get(n) or socket_of_bundle(self._disk, f"{parent}/{n}") for n in inodes}
        beside.inodes = inodes
        beside.names = {}
        for name, socket in sorted(beside.sockets.items()):
            beside.names[socket] = (*beside.names.get(socket, ()), name)
        # Read it again next time if a bundle is being made (it names no socket yet), or if the directory changed
        # just now: a change within the same tick of the clock would leave the same time.
        certain = all(beside.sockets.values()) and time.time_ns() - changed > _TICK
        beside.changed = changed if certain else -1
        return beside

    def of(self, shim: Shim) -> tuple[str, ...]:
        """The ids of the bundles that name the shim's socket: a pod's containers, also those without a process."""
        parent = bundles_beside(shim)
        if not parent or shim.generation is not Generation.RUNC_V2:
            return ()
        beside = self._beside.get(parent) or self._read(parent, self._disk.changed(parent))
        own = beside.sockets.get(shim.container_id)
        if own:
            return beside.names[own]
        return tuple(sorted(name for socket in set(sockets_of(shim)) for name in beside.names.get(socket, ())))


@dataclass(frozen=True)
class _Process:
    """A process right below a shim, and the cgroup of the container that it was tied to."""

    facts: Facts
    cgroup: str


def read_served(
    proc: Proc,
    disk: Disk,
    host: Host,
    shim: Shim,
    bundles: Sequence[str],
    before: Sequence[Init] = (),
    children: Optional[Children] = None,
) -> Served:
    """Read what a shim serves. `bundles`: the ids whose bundles name its socket. Raises nothing.

    `before`: the inits of an earlier look, which are looked at too: the kernel's list of children may leave
    some out while others end, and a container that is overlooked would be one that nobody protects.
    """
    children = children or proc.children
    below = _below(children, shim.process.pid)
    first = (*below, *(i.process.pid for i in before))
    by_id, strangers, unread = _tie(proc, disk, host, shim, first, bundles, children)
    ids = dict.fromkeys((shim.container_id, *bundles, *by_id))
    members = tuple(_member(proc, disk, host, shim, i, by_id.get(i, ())) for i in ids)
    vetoes = [
        *(f"a child of its shim, process {pid}, belongs to no container that can be told" for pid in strangers[:1]),
        *(f"a child of its shim, process {pid}, could not be read" for pid in unread[:1]),
    ]
    return Served(members, tuple(bundles), "; ".join(vetoes), frozenset(below), bool(unread))


def _tie(
    proc: Proc,
    disk: Disk,
    host: Host,
    shim: Shim,
    first: Sequence[int],
    bundles: Sequence[str],
    children: Children,
) -> tuple[Mapping[str, Sequence[_Process]], Sequence[int], Sequence[int]]:
    """(id -> its processes right below the shim, pids that could be tied to no id, those that could not be read).

    `first`: the pids to begin with.
    """
    by_id: dict[str, list[_Process]] = {}
    strangers: list[int] = []
    unread: list[int] = []
    known = (shim.container_id, *bundles)
    shared = _cgroups_of(proc, host, shim.process.pid)
    waiting = [(pid, shim.process.pid) for pid in dict.fromkeys(first)]
    while waiting:
        pid, parent = waiting.pop(0)
        try:
            facts = gather(proc, pid)
        except Gone:
            continue
        except ProcError:
            unread.append(pid)
            continue
        if facts.stat.dead or facts.stat.ppid != parent:
            continue
        if facts.unseen:
            unread.append(pid)
        told = _told_by_cgroup(disk, host, shim, facts, known, shared) or _told_by_record(
            disk, shim, facts, known, shared
        )
        if told:
            by_id.setdefault(told[0], []).append(_Process(facts, told[1]))
        elif not _helps(host, facts, shared):
            strangers.append(pid)
        elif parent == shim.process.pid:  # runc starts the init below itself, and leaves it to the shim
            waiting.extend((child, pid) for child in _below(children, pid))
    return by_id, strangers, unread


def _below(children: Children, pid: int) -> Iterable[int]:
    try:
        return tuple(children(pid))
    except ProcError:
        return ()


def _cgroups_of(proc: Proc, host: Host, pid: int) -> frozenset[str]:
    """Cgroups that can't be a container's: the shim's own and that of PID 1."""
    try:
        return frozenset(c.path for c in (*proc.cgroups(pid), *host.cgroups))
    except ProcError:
        return frozenset(c.path for c in host.cgroups)


def _told_by_cgroup(
    disk: Disk, host: Host, shim: Shim, facts: Facts, known: tuple[str, ...], shared: Iterable[str]
) -> Optional[tuple[str, str]]:
    """(id, cgroup) by the outermost container that its cgroup names; what is below that, the container may forge.

    But a container may have been given another one's cgroup as its parent (docker run --cgroup-parent), and
    outlive that one: then it is the id whose record names the process, or that the shim is known to serve, and
    not the one above it, which nobody knows any more.
    """
    inside = [p for p in host.places(facts.cgroups, known) if p.container_id]
    told = next(iter(inside), None)
    if len(inside) > 1:
        told = next((p for p in inside if p.container_id in known), told)
        told = next((p for p in inside if _names(disk, shim, p.container_id, facts)), told)
    if told is None or any(contains(told.path, c) for c in shared):
        return None
    return told.container_id, told.path


def _names(disk: Disk, shim: Shim, container_id: str, facts: Facts) -> bool:
    """Whether runc's record of that id names that very process."""
    states = (runc_state(disk, root, shim.namespace, container_id) for root in runc_roots(disk, shim))
    return any(recorded_process(state) == facts.process for state in states)


def _told_by_record(
    disk: Disk, shim: Shim, facts: Facts, known: tuple[str, ...], shared: Iterable[str]
) -> Optional[tuple[str, str]]:
    """(id, cgroup) where runc's record names that very process, for ids that the cgroup doesn't tell."""
    for root in runc_roots(disk, shim):
        for container_id in dict.fromkeys((*known, *_names_above(facts))):
            state = runc_state(disk, root, shim.namespace, container_id)
            if recorded_process(state) == facts.process:
                path = path_named(facts, container_id)
                return container_id, "" if any(contains(path, c) for c in shared) else path
    return None


def _names_above(facts: Facts) -> Iterator[str]:
    """What may be an id in its cgroup paths, the last parts first."""
    for cgroup in facts.cgroups:
        path = cgroup.path
        while path not in ("", "/"):
            name = last_id(path)
            if name:
                yield name
            path = path.rsplit("/", 1)[0]


def path_named(facts: Facts, container_id: str) -> str:
    """The cgroup that is called like the container, at or above the process's own; "" if there is none."""
    for cgroup in facts.cgroups:
        path = cgroup.path
        while path not in ("", "/"):
            if last_id(path) == container_id:
                return path
            path = path.rsplit("/", 1)[0]
    return ""


def _helps(host: Host, facts: Facts, shared: frozenset[str]) -> bool:
    """Whether it is runc, a logger or `containerd publish`: in the shim's cgroup and the host's namespaces."""
    return (
        all(c.path in shared for c in facts.cgroups)
        and len(facts.nspids) <= 1
        and not host.differs(facts, "mnt")
        and not host.differs(facts, "pid")
    )


def _member(proc: Proc, disk: Disk, host: Host, shim: Shim, container_id: str, processes: Sequence[_Process]) -> Member:
    """One container with its init; its other processes right below the shim are exec's, or lost their parent."""
    state = _state(disk, shim, container_id)
    directory = docker_directory(state, container_id)
    if not processes:
        return Member(container_id, owner_directory=directory)
    named = [p for p in processes if _is_recorded(disk, shim, container_id, state, p.facts.process)]
    firsts = [] if state else [p for p in processes if is_first(p.facts)]
    chosen = named or firsts
    veto = ""
    if len(chosen) != 1:
        chosen = [min(processes, key=lambda p: p.facts.process.start)]
        if not _outlived(proc, state, processes):
            veto = f"which of its {len(processes)} processes is the first one can't be told"
    if not chosen[0].cgroup:
        veto = "; ".join(filter(None, (veto, "it has no cgroup of its own")))
    init = init_of(host, chosen[0].facts, container_id, chosen[0].cgroup)
    return Member(container_id, (init,), veto, directory)


def init_of(host: Host, facts: Facts, container_id: str, cgroup: str) -> Init:
    """The process as its container's first one."""
    own = facts.namespaces.get("pid", 0) if host.differs(facts, "pid") else 0
    return Init(facts.process, container_id, cgroup, own, is_first(facts))


def _outlived(proc: Proc, state: Mapping[str, Any], processes: Sequence[_Process]) -> bool:
    """Whether its first process is known to have ended, and these are what it left in its one cgroup.

    So in the host's pid namespace, where nobody dies with an init. Any of them can stand for it then.
    """
    first = recorded_process(state)
    try:
        return first is not None and not proc.alive(first) and len({p.cgroup for p in processes}) == 1
    except ProcError:
        return False


def _state(disk: Disk, shim: Shim, container_id: str) -> dict[str, Any]:
    states = (runc_state(disk, root, shim.namespace, container_id) for root in runc_roots(disk, shim))
    return next((s for s in states if s), {})


def _is_recorded(disk: Disk, shim: Shim, container_id: str, state: Mapping[str, Any], process: ProcessId) -> bool:
    recorded = recorded_process(state)
    if recorded:
        return recorded == process
    parent = bundles_beside(shim)
    return bool(parent) and bundle_pid(disk, f"{parent}/{container_id}") == process.pid


def is_first(facts: Facts) -> bool:
    """Whether it is the first process of a pid namespace of its own."""
    return len(facts.nspids) > 1 and facts.nspids[-1] == 1


def docker_directory(state: Mapping[str, Any], container_id: str) -> str:
    """Docker's directory of the container, as the mounts in runc's record name it; "" if they name none.

    It tells the data-root that dockerd had then, which need not be the one it has now. With --network=container:OTHER
    the files mounted are OTHER's, in the same data-root.
    """
    config = state.get("config")
    mounts = config.get("mounts") if isinstance(config, dict) else None
    others = ""
    for mount in mounts if isinstance(mounts, list) else ():
        source = mount.get("source") if isinstance(mount, dict) else None
        match = _DOCKER_FILE.match(source) if isinstance(source, str) else None
        if match and match.group("id") == container_id:
            return f"{match.group('root')}/containers/{container_id}"
        if match:
            others = f"{match.group('root')}/containers/{container_id}"
    return others


def bundle_of(state: Mapping[str, Any]) -> str:
    """The bundle that runc's record names; "" if it names none (libcontainer's label bundle=PATH)."""
    config = state.get("config")
    labels = config.get("labels") if isinstance(config, dict) else None
    for label in labels if isinstance(labels, list) else ():
        if isinstance(label, str) and label.startswith("bundle=/"):
            return os.path.normpath(label[len("bundle=") :])
    return ""
