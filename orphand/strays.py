# SPDX-License-Identifier: Apache-2.0
"""Containers without a shim: processes in a container's cgroup and namespaces that no shim has as its child.

A process counts as one only where nothing speaks against it: what it says of itself with its cgroup has to
be borne out by runc's record, or else it is sighted with a veto.
"""

from __future__ import annotations

import os
import stat as modes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from orphand.bundles import RUNC_ROOTS, Disk, recorded_process, runc_state
from orphand.cgroups import Place, contains, is_hex_id, is_identifier, last_id
from orphand.model import ProcessId, Sighting
from orphand.proc import Cgroup
from orphand.served import bundle_of, docker_directory, init_of, is_first, path_named
from orphand.shims import Facts, Host

Alive = Callable[[ProcessId], bool]

_TASK_DIRECTORIES = ("io.containerd.runtime.v2.task", "io.containerd.runtime.v1.linux")


@dataclass(frozen=True)
class Stray:
    """A container's process that no shim keeps."""

    sighting: Sighting
    owner_directory: str = ""  # as in served.Member
    remnant: bool = False  # not the container's first process: one that outlived it
    unsure: bool = False  # something of it could not be read


@dataclass(frozen=True)
class Parent:
    """What is known of a stray's parent."""

    pid: int
    cgroups: tuple[Cgroup, ...] = ()
    adopts: bool = False  # PID 1, or a subreaper by what was seen of it


def find_stray(disk: Disk, host: Host, facts: Facts, parent: Parent, alive: Alive) -> Optional[Stray]:
    """Say whether a process, which is no shim's child, is what is left of a container. Raises what `alive` raises."""
    if facts.stat.dead or not _own_world(host, facts):
        return None
    inside = host.places(facts.cgroups)
    above = [p for p in host.places(parent.cgroups) if p.container_id]  # an engine's slice holds its monitors too
    if above:
        return _nested(host, facts, inside, above)
    outer = _told(disk, facts, inside)
    if outer and outer.foreign:
        return _foreign(host, facts, outer, f"it belongs to {outer.foreign}") if is_first(facts) else None
    container_id = outer.container_id if outer else _last_id(facts)
    cgroup = outer.path if outer else path_named(facts, container_id)
    return _unkept(disk, host, facts, container_id, cgroup, parent, alive)


def _told(disk: Disk, facts: Facts, inside: Sequence[Place]) -> Optional[Place]:
    """The outermost container that its cgroup names, or, where it has another one's cgroup as its parent (docker run
    --cgroup-parent), the one whose record names the process.
    """
    named = (p for p in inside if len(inside) > 1 and p.container_id and _record(disk, facts, p.container_id)[1])
    return next(named, inside[0] if inside else None)


def _own_world(host: Host, facts: Facts) -> bool:
    """Whether it lives in a mount or pid namespace of its own; what can't be seen counts as so."""
    return len(facts.nspids) > 1 or host.differs(facts, "mnt") is not False


def _nested(host: Host, facts: Facts, inside: Sequence[Place], above: Sequence[Place]) -> Optional[Stray]:
    """A container that runs inside another one: the engine in that one is to be asked, not the host's."""
    if not is_first(facts) or len(inside) <= len(above):
        return None  # a process of the same container
    return _foreign(host, facts, inside[-1], f"it runs inside container {inside[0].container_id[:12]}")


def _foreign(host: Host, facts: Facts, place: Place, reason: str) -> Stray:
    name = place.container_id or f"pid-{facts.stat.pid}"
    init = init_of(host, facts, name, place.path)
    return Stray(Sighting(name, "", "", None, (init,), 0.0, foreign=reason), unsure=bool(facts.unseen))


def _unkept(
    disk: Disk, host: Host, facts: Facts, container_id: str, cgroup: str, parent: Parent, alive: Alive
) -> Optional[Stray]:
    if not is_identifier(container_id) or any(contains(cgroup, c.path) for c in host.cgroups):
        return None
    namespace, state = _record(disk, facts, container_id)
    init = bool(state) or is_first(facts)
    if not state and (not is_hex_id(container_id) or not (init or parent.adopts)):
        return None
    if not init:
        namespace, state = _outlived(disk, container_id, alive)
    if not state and host.differs(facts, "user"):  # anybody may make one, in a cgroup of his own that is called so
        reason = "it has a user namespace of its own and no record of runc's: another engine's, or rootless"
        return _foreign(host, facts, Place(container_id, cgroup), reason)
    address = _address(disk, bundle_of(state))
    veto = _veto(host, facts, state, cgroup, address, parent)
    sighting = Sighting(
        container_id, namespace, address, None, (init_of(host, facts, container_id, cgroup),), 0.0, veto=veto
    )
    return Stray(sighting, docker_directory(state, container_id), not init, bool(facts.unseen))


def _outlived(disk: Disk, container_id: str, alive: Alive) -> tuple[str, dict[str, Any]]:
    """(namespace, runc's state) of a container whose first process has ended, by the one record that there is of it.

    In the host's pid namespace nobody dies with an init, and what is left stands for the container.
    """
    found = [(namespace, state) for namespace, state in _records(disk, container_id) if recorded_process(state)]
    if len(found) != 1:
        return "", {}
    first = recorded_process(found[0][1])
    return found[0] if first and not alive(first) else ("", {})


def _veto(host: Host, facts: Facts, state: Mapping[str, Any], cgroup: str, address: str, parent: Parent) -> str:
    reasons = []
    if not state:
        reasons.append("no record of runc's ties its process to the id")
    elif not address:
        reasons.append("which containerd it was of can't be told")
    if not cgroup:
        reasons.append("it has no cgroup of its own")
    if not parent.adopts:
        reasons.append(f"its parent, process {parent.pid}, may be its keeper")
    if any(host.differs(facts, kind) is None for kind in ("mnt", "pid", "user")):
        reasons.append("its namespaces could not be compared with the host's")
    return "; ".join(reasons)


def _record(disk: Disk, facts: Facts, container_id: str) -> tuple[str, dict[str, Any]]:
    """(namespace, runc's state) where a record names that very process; ("", {}) where none does."""
    named = (found for found in _records(disk, container_id) if recorded_process(found[1]) == facts.process)
    return next(named, ("", {}))


def _records(disk: Disk, container_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for root in RUNC_ROOTS:
        for namespace in disk.names(root):
            yield namespace, runc_state(disk, root, namespace, container_id)


def _last_id(facts: Facts) -> str:
    return next((i for i in (last_id(c.path) for c in facts.cgroups if c.path != "/") if i), "")


def _address(disk: Disk, bundle: str) -> str:
    """The socket of the containerd whose state directory the bundle was in; "" if none stands there.

    STATE/TASK/NAMESPACE/ID is the bundle. The socket is in STATE (containerd's own default, k3s) or beside it
    (dockerd's own containerd, whose state is …/daemon; k0s, microk8s).
    """
    parts = bundle.rsplit("/", 3)
    if len(parts) != 4 or parts[1] not in _TASK_DIRECTORIES:
        return ""
    state = parts[0]
    beside = os.path.dirname(state)
    for directory in (state, beside):
        for name in ("containerd.sock", "docker-containerd.sock"):
            if _is_roots_socket(disk.at(f"{directory}/{name}")):
                return f"{directory}/{name}"
    return ""


def _is_roots_socket(path: str) -> bool:
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return modes.S_ISSOCK(found.st_mode) and found.st_uid == 0
