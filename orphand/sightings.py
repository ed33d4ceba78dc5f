# SPDX-License-Identifier: Apache-2.0
"""From /proc to sightings: every container that has a shim or a process, whoever knows it or not.

A look starts from the children of PID 1 and of the engines, where every shim and every init that lost its
shim is to be found, and reads in full only what it hasn't seen before; what it knows is watched through
pidfds. So a look costs what has changed, whatever the number of processes. A full look goes through all of
/proc: the safety net for other subreapers and for kernels without /proc/PID/task/TID/children.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Optional

from orphand.bundles import Disk, socket_of_bundle, sockets_of
from orphand.errors import ProcError
from orphand.model import Generation, Init, ProcessId, Shim, Sighting
from orphand.proc import TICKS, Proc, Stat
from orphand.served import Bundles, Member, Served, read_served
from orphand.shims import Host, Recognised, gather, is_candidate, read_host, recognise
from orphand.sockets import holds_live_socket
from orphand.strays import Parent, Stray, find_stray
from orphand.watch import Watch

# Executables whose children may be shims (v1), or an engine that they run themselves
ENGINES = frozenset(
    [
        "dockerd", "docker-containerd", "containerd", "k3s", "k3s-server", "k3s-agent", "rke2", "k0s", "kubelite",
    ]
)  # fmt: skip
_ENGINE_COMMS = ("docker", "containerd", "k3s", "rke2", "k0s", "kubelite")
_YOUNG = 10.0  # seconds in which a process may still exec something else, so that no "nothing" is remembered
_SETTLING = 30.0  # seconds in which a shim may still be given its first containers
_DIRECTORIES_FOR = 10.0  # seconds for which it is believed that Docker's directory of a container is there
_MAX_PARENTS = 256  # processes whose children are read at each look
_MAX_FOREIGN = 256  # sightings of other engines: anybody in a container can make many
_MAX_NOTES = 16


@dataclass
class _Keeper:
    """A shim that was recognised, and what it serves."""

    found: Recognised
    shim: Shim
    served: Optional[Served] = None
    due: bool = True  # what it serves is to be read again
    unsure: bool = False  # something of it could not be read: it is to be recognised again
    fresh_at: int = -1  # the changes of the bundles up to which what it serves is known to be as it was read


class Looker:
    """Looks at the node's processes. Not for several threads at once.

    `proc` and `disk` are the node's; in tests they are directories that look like them.
    """

    def __init__(self, proc: Optional[Proc] = None, disk: Optional[Disk] = None) -> None:
        self._proc = proc or Proc()
        self._disk = disk or Disk()
        self._host = Host()
        self._watch = Watch(self._proc)
        self._bundles = Bundles(self._disk)
        self._keepers: dict[int, _Keeper] = {}
        self._keeper_of: dict[ProcessId, int] = {}  # init -> its shim's pid
        self._strays: dict[int, Stray] = {}
        self._parents: dict[int, ProcessId] = {}  # whose children are read, besides PID 1
        self._adopters: set[int] = {1}  # those of them to which orphaned processes go
        self._dull: set[int] = set()  # processes that are none of our business, packed: see _packed
        self._dull_children: dict[int, int] = {}  # the same for the cheap look: pid -> inode of /proc/PID
        self._notes: dict[ProcessId, str] = {}
        self._by_parent: dict[int, list[int]] = {}  # only for kernels without the files of children
        self._directories: dict[str, bool] = {}
        self._directories_at = 0.0
        self.blind: tuple[str, ...] = ()  # what the last look could not see, and why
        self.seen_at = 0.0  # boot clock, before the first read of the last look
        self.changes = 0  # while it stands still, a look finds what the last one found

    def look(self, full: bool = False) -> list[Sighting]:
        """Every container that can be seen. `full`: go through all of /proc. Raises Denied if /proc can't be read."""
        self.read(full)
        return self.sightings()

    def read(self, full: bool = False) -> None:
        """Bring up to date what is known of the node's processes. `changes` moves with all that is read anew.

        Raises Denied if /proc can't be read.
        """
        self.seen_at = self._proc.now()
        blind = not self._host.namespaces
        if full or blind:
            self._host = read_host(self._proc)
        ended = self._watch.ended()
        self._forget(ended)
        self._bundles.refresh()
        found = self._sweep() if full or not self._proc.has_children() else self._children()
        self._classify(found)
        self._drop_kept(full)
        due = [k for k in self._keepers.values() if k.unsure or self._is_due(k)]
        for keeper in due:
            self._verify(keeper) if keeper.unsure else self._serve(keeper)
        if full or blind or ended or found or due or self._strays:
            self.changes += 1
        self.blind = self._blindness()

    def again(self, sighting: Sighting) -> Optional[Sighting]:
        """Read that one container anew. None: it isn't the same any more, or can't be seen.

        Then what is remembered of it is not to be trusted, and the next look reads it anew, too.
        """
        fresh = self._reread(sighting)
        if fresh is None:
            self._distrust(sighting)
            return None
        keeper = self._keepers.get(sighting.shim.process.pid) if sighting.shim else None
        if keeper and keeper.served and keeper.served.unread:  # whom this look has missed, it can't protect
            return replace(fresh, veto=_joined(keeper.served.veto, fresh.veto))
        return fresh

    def _distrust(self, sighting: Sighting) -> None:
        for process in sighting.processes:
            keeper, stray = self._keepers.get(process.pid), self._strays.get(process.pid)
            if keeper:
                keeper.due = True
            if stray:
                self._strays[process.pid] = replace(stray, unsure=True)

    def _reread(self, sighting: Sighting) -> Optional[Sighting]:
        seen_at = self._proc.now()
        self._directories = {}  # what was remembered of Docker's directories doesn't count here
        host = read_host(self._proc)
        try:
            found = self._anew(sighting, host)
        except ProcError:
            return None
        known = [s for k in self._keepers.values() if k.served for s in self._of_shim(k.found, k.shim, k.served)]
        known.extend(s.sighting for s in self._strays.values())
        same = next((s for s in _mark_hosts(found, known) if s.key == sighting.key), None)
        if same is None:
            return None
        owns = None if sighting.owns_socket is None else self._owns_socket(same)
        return replace(same, seen_at=seen_at, owns_socket=owns)

    def close(self) -> None:
        """Give the descriptors back."""
        self._watch.close()

    # --- which processes there are -------------------------------------------------------------------

    def _forget(self, ended: Iterable[ProcessId]) -> None:
        for process in ended:
            self._notes.pop(process, None)
            if self._parents.get(process.pid) == process:
                del self._parents[process.pid]
                self._adopters.discard(process.pid)
            keeper = self._keepers.get(process.pid)
            if keeper and keeper.shim.process == process:
                del self._keepers[process.pid]
                self._let_go(keeper.served.inits if keeper.served else ())
            stray = self._strays.get(process.pid)
            if stray and stray.sighting.inits[0].process == process:
                del self._strays[process.pid]
            owner = self._keepers.get(self._keeper_of.pop(process, 0))
            if owner:
                owner.due = True

    def _let_go(self, inits: Iterable[Init]) -> None:
        for init in inits:
            self._keeper_of.pop(init.process, None)
            self._watch.drop(init.process)

    def _children(self) -> list[Stat]:
        """Processes not seen before among the children of PID 1, the engines and the subreapers."""
        found: list[Stat] = []
        waiting = [1, *self._parents]
        asked = set(waiting)
        for parent in waiting:  # grows while it is gone through
            for stat in self._new_among(self._children_of(parent)):
                found.append(stat)
                if self._is_engine(stat) and stat.pid not in asked:
                    asked.add(stat.pid)
                    waiting.append(stat.pid)
        return found

    def _children_of(self, pid: int) -> Sequence[int]:
        if not self._proc.has_children():
            return self._by_parent.get(pid, ())
        try:
            return self._proc.children(pid)
        except ProcError:
            return ()

    def _new_among(self, pids: Iterable[int]) -> Iterator[Stat]:
        seen: dict[int, int] = {}
        for pid in pids:
            if pid in self._keepers or pid in self._strays:
                continue
            inode = self._proc.inode(pid)
            if inode and self._dull_children.get(pid) == inode:
                continue
            stat = self._stat(pid)
            if stat is None or stat.dead:
                continue
            if _packed(stat) in self._dull:
                seen[pid] = inode
            else:
                yield stat
        self._dull_children.update(seen)

    def _stat(self, pid: int) -> Optional[Stat]:
        try:
            return self._proc.stat(pid)
        except ProcError:
            return None

    def _sweep(self) -> list[Stat]:
        """Processes not seen before, of all. Shims that have other children than when they were read become due."""
        found: list[Stat] = []
        dull: set[int] = set()
        below: dict[int, list[int]] = {pid: [] for pid in self._keepers}
        everybody = not self._proc.has_children()
        for stat in self._proc.stats():
            packed = _packed(stat)
            if stat.ppid in below:
                below[stat.ppid].append(stat.pid)
            elif everybody:
                below[stat.ppid] = [stat.pid]
            if packed in self._dull:
                dull.add(packed)
            elif stat.pid in self._keepers:
                self._see_parent(self._keepers[stat.pid], stat)
            elif not stat.dead and stat.pid not in self._strays:
                found.append(stat)
        for pid, keeper in self._keepers.items():
            if keeper.served and not keeper.found.foreign:
                keeper.due = keeper.due or keeper.served.below != frozenset(below[pid])
        self._dull, self._by_parent, self._dull_children = dull, below, {}
        for stat in found:
            self._is_engine(stat)
        return found

    def _see_parent(self, keeper: _Keeper, stat: Stat) -> None:
        """A v1 shim goes from its containerd to PID 1 when that ends."""
        if keeper.shim.ppid != stat.ppid and keeper.shim.process == stat.process:
            keeper.shim = replace(keeper.shim, ppid=stat.ppid)

    def _is_engine(self, stat: Stat) -> bool:
        """Whether it is one of the host's, whose children are to be read. A wrong yes only costs time."""
        if not stat.comm.startswith(_ENGINE_COMMS) or stat.comm.startswith("containerd-shim"):
            return False
        try:
            with self._proc.open(stat.pid) as held:
                status = held.status()
                named = os.path.basename(held.exe()) in ENGINES and status.uids[1] == 0
                engine = named and len(status.nspids) <= 1 and not self._host.places(held.cgroups())
        except ProcError:
            return False
        if engine:
            self._add_parent(stat.process)
        return engine

    def _add_parent(self, process: ProcessId, adopts: bool = False) -> None:
        if process.pid not in self._parents and process.pid > 1:
            if len(self._parents) >= _MAX_PARENTS:
                return
            self._parents[process.pid] = process
            self._watch.add(process)
        if adopts:
            self._adopters.add(process.pid)

    # --- what they are -------------------------------------------------------------------------------

    def _classify(self, stats: Sequence[Stat]) -> None:
        for stat in stats:
            if is_candidate(stat.comm):
                self._consider_shim(stat)
        for stat in stats:
            if not is_candidate(stat.comm):
                self._consider_stray(stat)

    def _consider_shim(self, stat: Stat) -> None:
        try:
            facts = gather(self._proc, stat.pid)
        except ProcError:
            return
        found = recognise(facts, self._host)
        if found is None or found.shim is None:
            self._note(stat, found.note if found else "")
            self._set_aside(stat, bool(facts.unseen))
        elif stat.ppid in self._keepers or (found.foreign and self._crowded()):
            self._set_aside(stat)  # a container may be a fork of its shim (wasm): it is what that shim serves
        else:
            self._keepers[stat.pid] = _Keeper(found, found.shim, unsure=bool(facts.unseen))
            self._watch.add(found.shim.process)
            if not found.foreign:
                self._learn_parent(found.shim)

    def _learn_parent(self, shim: Shim) -> None:
        """A v2 shim is left by the process that started it: whoever is its parent takes in orphaned processes."""
        if shim.ppid in self._keepers:
            return
        parent = self._stat(shim.ppid)
        if parent:
            self._add_parent(parent.process, adopts=shim.generation is not Generation.V1)

    def _crowded(self) -> bool:
        foreign = sum(1 for k in self._keepers.values() if k.found.foreign)
        return foreign + sum(1 for s in self._strays.values() if s.sighting.foreign) >= _MAX_FOREIGN

    def _note(self, stat: Stat, note: str) -> None:
        if note and len(self._notes) < _MAX_NOTES:
            self._notes[stat.process] = f"process {stat.pid} is named like a shim but is none: {note}"
            self._watch.add(stat.process)

    def _consider_stray(self, stat: Stat) -> None:
        if stat.ppid in self._keepers:
            return  # found as what that shim serves
        try:
            inside = self._host.places(self._proc.cgroups(stat.pid))
            stray = self._stray(stat, self._host) if inside or stat.ppid in self._adopters else None
        except ProcError:
            return
        if stray is None or (stray.sighting.foreign and self._crowded()):
            self._set_aside(stat)
        else:
            self._strays[stat.pid] = stray
            self._watch.add(stat.process)

    def _stray(self, stat: Stat, host: Host) -> Optional[Stray]:
        """What it is if no shim keeps it. Raises Gone, Denied."""
        facts, alive = gather(self._proc, stat.pid), self._proc.alive
        ppid = facts.stat.ppid
        if ppid <= 1:
            return find_stray(self._disk, host, facts, Parent(ppid, adopts=True), alive)
        if is_candidate(self._proc.stat(ppid).comm):
            return None  # a shim that could not be read this time, or one that is none of the host's
        parent = Parent(ppid, self._proc.cgroups(ppid), ppid in self._adopters)
        return find_stray(self._disk, host, facts, parent, alive)

    def _drop_kept(self, anew: bool) -> None:
        """Forget the strays that have a shim after all. `anew`: read each of them again."""
        for pid, stray in list(self._strays.items()):
            stat = self._stat(pid)
            try:
                found = self._stray(stat, self._host) if stat and (anew or stray.unsure) else stray
            except ProcError:
                continue
            if stat is None or stat.ppid in self._keepers or found is None:
                del self._strays[pid]
                self._watch.drop(stray.sighting.inits[0].process)
            else:
                self._strays[pid] = found

    def _set_aside(self, stat: Stat, unsure: bool = False) -> None:
        """Don't look at it again, unless something could not be read, or it is so young that it may exec yet."""
        if not unsure and self.seen_at - stat.start / TICKS > _YOUNG:
            self._dull.add(_packed(stat))

    # --- what the shims serve --------------------------------------------------------------------------

    def _is_due(self, keeper: _Keeper) -> bool:
        served = keeper.served
        if served is None or keeper.due:
            return True
        if keeper.found.foreign or keeper.fresh_at == self._bundles.changes:
            return False
        young = self.seen_at - keeper.shim.process.start / TICKS < _SETTLING
        due = young or not served.complete or self._bundles.of(keeper.shim) != served.bundles
        keeper.fresh_at = -1 if due else self._bundles.changes
        return due

    def _verify(self, keeper: _Keeper) -> None:
        """Read the shim itself anew, too."""
        try:
            facts = gather(self._proc, keeper.shim.process.pid)
        except ProcError:
            return
        found = recognise(facts, self._host)
        if found and found.shim and found.shim.process == keeper.shim.process:
            keeper.found, keeper.shim, keeper.unsure = found, found.shim, bool(facts.unseen)
            self._serve(keeper)

    def _serve(self, keeper: _Keeper) -> None:
        before = keeper.served.inits if keeper.served else ()
        keeper.served = self._read(keeper.found, keeper.shim, self._host, before)
        keeper.due, keeper.fresh_at = False, -1
        kept = {i.process for i in keeper.served.inits}
        self._let_go(i for i in before if i.process not in kept)
        for process in kept:
            self._keeper_of[process] = keeper.shim.process.pid
            self._watch.add(process)

    def _read(self, found: Recognised, shim: Shim, host: Host, before: Sequence[Init]) -> Served:
        if found.foreign:  # what it serves is for the engine to say that it belongs to
            return Served((Member(shim.container_id),))
        bundles = self._bundles.of(shim)
        return read_served(self._proc, self._disk, host, shim, bundles, before, self._children_of)

    # --- sightings -----------------------------------------------------------------------------------

    def sightings(self) -> list[Sighting]:
        """Every container that the last reading saw."""
        self._see_directories()
        found = [s for k in self._keepers.values() if k.served for s in self._of_shim(k.found, k.shim, k.served)]
        found = self._settle_duplicates(found)
        taken = {s.container_id for s in found}
        taken.update(s.sighting.container_id for s in self._strays.values() if not s.remnant)
        found.extend(self._of_stray(s) for s in self._strays.values() if not s.remnant)
        found.extend(self._of_stray(s) for s in self._remnants(taken))
        return _mark_hosts(found, found)

    def _remnants(self, taken: set[str]) -> Iterator[Stray]:
        """Of the containers that lost shim and init but not all processes: the oldest process of each."""
        oldest: dict[str, Stray] = {}
        for stray in self._strays.values():
            container_id = stray.sighting.container_id
            if stray.remnant and container_id not in taken:
                other = oldest.get(container_id)
                if other is None or _started(stray) < _started(other):
                    oldest[container_id] = stray
        yield from oldest.values()

    def _of_shim(self, found: Recognised, shim: Shim, served: Served) -> Iterator[Sighting]:
        ids = tuple(m.container_id for m in served.members)
        # the address of a foreign shim is a path in its own mount namespace: another socket here, or none
        address = "" if found.foreign else shim.address
        for member in served.members:
            yield Sighting(
                container_id=member.container_id,
                namespace=shim.namespace,
                address=address,
                shim=shim,
                inits=member.inits,
                seen_at=self.seen_at,
                siblings=tuple(i for i in ids if i != member.container_id),
                foreign=found.foreign,
                veto=_joined(found.veto, served.veto, member.veto),
                metadata=self._metadata(member.owner_directory),
            )

    def _of_stray(self, stray: Stray) -> Sighting:
        veto = _joined(stray.sighting.veto, self._scattered(stray))
        return replace(stray.sighting, seen_at=self.seen_at, veto=veto, metadata=self._metadata(stray.owner_directory))

    def _scattered(self, stray: Stray) -> str:
        ours = stray.sighting
        cgroups = {
            s.sighting.inits[0].cgroup
            for s in self._strays.values()
            if stray.remnant and s.sighting.container_id == ours.container_id
        }
        return "what is left of it is in several cgroups" if len(cgroups) > 1 else ""

    def _see_directories(self) -> None:
        """Docker's own directory of each container, by the mounts that it gave it: metadata that shows an owner."""
        served = (m.owner_directory for k in self._keepers.values() if k.served for m in k.served.members)
        named = {d for d in (*served, *(s.owner_directory for s in self._strays.values())) if d}
        if self.seen_at - self._directories_at > _DIRECTORIES_FOR:
            self._directories, self._directories_at = {}, self.seen_at
        self._directories = {
            d: self._directories[d] if d in self._directories else os.path.isdir(self._disk.at(d)) for d in named
        }

    def _metadata(self, directory: str) -> str:
        there = self._directories.get(directory) if directory else False
        if there is None:
            there = os.path.isdir(self._disk.at(directory))
        return f"Docker's metadata of it is still there: {directory}" if there else ""

    def _settle_duplicates(self, sightings: list[Sighting]) -> list[Sighting]:
        """Say of shims that claim the same container which of them is reached at the socket."""
        claims = Counter(s.name for s in sightings if not s.foreign)
        if all(count == 1 for count in claims.values()):
            return sightings
        return [replace(s, owns_socket=self._owns_socket(s)) if claims[s.name] > 1 else s for s in sightings]

    def _owns_socket(self, sighting: Sighting) -> Optional[bool]:
        shim = sighting.shim
        if shim is None:
            return None
        named = socket_of_bundle(self._disk, shim.bundle)
        for path in (named,) if named else sockets_of(shim):
            owns = holds_live_socket(shim.process, path, self._proc.root)
            if owns is not None:
                return owns
        return None

    def _anew(self, sighting: Sighting, host: Host) -> list[Sighting]:
        if sighting.shim is None:
            strays = (self._stray(self._proc.stat(i.process.pid), host) for i in sighting.inits)
            return [self._of_stray(s) for s in strays if s]
        found = recognise(gather(self._proc, sighting.shim.process.pid), host)
        if found is None or found.shim is None:
            return []
        self._bundles.refresh()
        served = self._read(found, found.shim, host, sighting.inits)
        return list(self._of_shim(found, found.shim, served))

    def _blindness(self) -> tuple[str, ...]:
        reasons = []
        if not self._host.namespaces:
            reasons.append("the namespaces of PID 1 could not be read: that needs root with CAP_SYS_PTRACE")
        unread = sum(1 for k in self._keepers.values() if not k.shim.exe)
        if unread:
            reasons.append(f"the executables of {unread} shims could not be read: that needs root")
        return (*reasons, *self._notes.values())


def _mark_hosts(sightings: list[Sighting], known: Sequence[Sighting]) -> list[Sighting]:
    """Put a veto on those whose cgroup has another container's below it (docker run --cgroup-parent).

    To end a container is to end everything in its cgroup and below. What is nested in the container itself,
    as in docker-in-docker, is foreign, and ends with it.
    """
    paths = {i.cgroup: s.container_id for s in known if not s.foreign for i in s.inits if i.cgroup}
    guests: dict[str, str] = {}
    for path, container_id in paths.items():
        above = path.rpartition("/")[0]
        while above:
            if paths.get(above, container_id) != container_id:
                guests[above] = container_id
            above = above.rpartition("/")[0]
    if not guests:
        return sightings
    return [replace(s, veto=_joined(s.veto, *(_guest_veto(guests, i) for i in s.inits))) for s in sightings]


def _guest_veto(guests: Mapping[str, str], init: Init) -> str:
    guest = guests.get(init.cgroup)
    return f"the cgroup of container {guest[:12]} is below its own" if guest else ""


def _packed(stat: Stat) -> int:
    """A pid (at most 22 bits) and a start time as one number: thousands of them are kept."""
    return stat.start << 22 | stat.pid


def _started(stray: Stray) -> int:
    return stray.sighting.inits[0].process.start


def _joined(*reasons: str) -> str:
    return "; ".join(filter(None, dict.fromkeys(reasons)))
