# SPDX-License-Identifier: Apache-2.0
"""The cgroup directories of one container, in every hierarchy: who is in them, freeze, kill, remove."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from orphand.errors import ProcError
from orphand.model import ProcessId
from orphand.proc import Proc, read_up_to

HEX_ID = re.compile(r"[0-9a-f]{64}")
# what runc's callers put before the id of a scope: Docker, CRI, nerdctl and ctr with the systemd driver
SCOPE_PREFIXES = ("docker", "cri-containerd", "nerdctl", "containerd", "ctr")
UNIT_SUFFIXES = (".service", ".slice", ".scope", ".mount", ".socket", ".swap")
MAX_BYTES = 1 << 22  # of a cgroup.procs: 500,000 pids
MAX_DIRECTORIES = 20_000


@dataclass(frozen=True)
class Hierarchy:
    """A mounted cgroup hierarchy. `controllers` is empty for the unified one (v2)."""

    mount: str
    root: str  # what part of the hierarchy is mounted there: "/" but in a cgroup namespace of an older look
    controllers: frozenset[str]

    def directory(self, path: str) -> str:
        """Where a path of /proc/PID/cgroup is found; "" if it is outside what is mounted."""
        below = path if self.root == "/" else path[len(self.root) :] if path.startswith(f"{self.root}/") else ""
        clean = bool(below) and ".." not in below.split("/")
        return f"{self.mount}{below}" if clean and below != "/" else ""


def hierarchies(mountinfo: Path = Path("/proc/self/mountinfo")) -> tuple[Hierarchy, ...]:
    """Every mounted hierarchy, one entry each (proc(5), mountinfo)."""
    found: dict[frozenset[str], Hierarchy] = {}
    for line in mountinfo.read_text(errors="surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        here, there = left.split(), right.split()
        if len(here) < 5 or len(there) < 3 or there[0] not in ("cgroup", "cgroup2"):
            continue
        options = frozenset(there[2].split(",")) - {"rw", "ro", "xattr", "clone_children", "noprefix"}
        names = frozenset(o for o in options if "=" not in o or o.startswith("name="))
        controllers = frozenset() if there[0] == "cgroup2" else names
        found.setdefault(controllers, Hierarchy(here[4], here[3], controllers))
    return tuple(found.values())


def names_container(component: str, container_id: str) -> bool:
    """Whether one part of a cgroup path is that container's and no other's: ID, or PREFIX-ID.scope."""
    if component == container_id:
        return True
    if not component.endswith(f"-{container_id}.scope"):
        return False
    prefix = component[: -len(f"-{container_id}.scope")]
    return HEX_ID.fullmatch(container_id) is not None or prefix in SCOPE_PREFIXES


def own_part(path: str, container_id: str) -> str:
    """The path up to the part that names the container; "" if none does.

    A 64-digit id is a name of its own, and what a container makes below itself doesn't count: the outermost. A
    short one may also be the name of a namespace or slice above it, so there the innermost, which can only
    be too little.
    """
    parts = path.split("/")
    fitting = [n for n, part in enumerate(parts) if part and names_container(part, container_id)]
    if not fitting:
        return ""
    last = fitting[0] if HEX_ID.fullmatch(container_id) else fitting[-1]
    return "/".join(parts[: last + 1])


def of_process(pid: int, container_id: str, proc: Proc, mounted: Sequence[Hierarchy]) -> set[str]:
    """The container's directories that the process is in or below, in every hierarchy. Raises Gone, Denied."""
    found = set()
    for line in proc.cgroups(pid):
        wanted = frozenset(line.controllers.split(",")) if line.controllers else frozenset[str]()
        own = own_part(line.path, container_id)
        for hierarchy in mounted:
            if own and hierarchy.controllers == wanted:
                found.add(hierarchy.directory(own))
    return found - {""}


def is_own(directory: str, container_id: str, mounted: Sequence[Hierarchy]) -> bool:
    """Whether a directory that somebody names is a cgroup of that container's."""
    name = os.path.basename(directory)
    normal = os.path.normpath(directory) == directory
    return normal and names_container(name, container_id) and any(directory.startswith(f"{h.mount}/") for h in mounted)


def usual_places(container_id: str, namespace: str, mounted: Sequence[Hierarchy]) -> set[str]:
    """Where Docker and ctr make a container's cgroup by default, as far as it exists: for one without processes.

    Docker's ids are hexadecimal: /docker/buildkit is no container's that is called so. And what is named like a unit of
    systemd's is that unit's.
    """
    usual = [f"/docker/{container_id}", f"/system.slice/docker-{container_id}.scope"]
    if not HEX_ID.fullmatch(container_id):
        usual = []
    if namespace and not container_id.endswith(UNIT_SUFFIXES):
        usual.append(f"/{namespace}/{container_id}")
    return {d for h in mounted for d in map(h.directory, usual) if d and os.path.isdir(d)}


def inode(directory: str) -> int:
    """The directory's inode, 0 if there is none: one that was removed and made anew has another."""
    try:
        return os.stat(directory, follow_symlinks=False).st_ino
    except OSError:
        return 0


def subtree(directory: str) -> list[str]:
    """The directory and all below it, the deepest first. At most MAX_DIRECTORIES: a container may make as it likes."""
    found = [directory]
    for (
        place
    ) in found:  # grows while it is read; os.walk would recurse, and a container may nest as deep as a path is long
        if len(found) >= MAX_DIRECTORIES:
            break
        try:
            with os.scandir(place) as entries:
                found.extend(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
        except OSError:
            continue
    return found[::-1]


def members(directories: Iterable[str], proc: Proc, mounted: Sequence[Hierarchy]) -> dict[ProcessId, str]:
    """The processes in these cgroups and those below, each with the cgroup that it was seen in."""
    found: dict[ProcessId, str] = {}
    for directory in directories:
        for place in subtree(directory):
            for pid in _pids(place):
                process = _checked(pid, place, proc, mounted)
                if process:
                    found[process] = place
    return found


def _pids(directory: str) -> list[int]:
    try:
        with open(f"{directory}/cgroup.procs", "rb") as file:
            return [pid for pid in map(int, read_up_to(file.fileno(), MAX_BYTES).split()) if pid > 0]
    except (OSError, ValueError):
        return []  # removed meanwhile; a threaded cgroup's processes are listed above it (cgroups(7))


def _checked(pid: int, directory: str, proc: Proc, mounted: Sequence[Hierarchy]) -> Optional[ProcessId]:
    """The process, if it is still in that cgroup once its start time was read: then it is no other with that pid."""
    try:
        stat = proc.stat(pid)
        inside = any(directory == h.directory(c.path) for c in proc.cgroups(pid) for h in mounted)
    except ProcError:
        return None
    return stat.process if inside and not stat.dead else None


def frozen(directory: str) -> bool:
    """Whether the cgroup itself was told to freeze (paused), v1 or v2."""
    return _read(f"{directory}/cgroup.freeze") == "1" or _read(f"{directory}/freezer.state") in ("FROZEN", "FREEZING")


def is_frozen(directory: str) -> bool:
    """Whether all in it really stand still."""
    return (
        _read(f"{directory}/freezer.state") == "FROZEN"
        or "frozen 1" in _read(f"{directory}/cgroup.events").splitlines()
    )


def freeze(directory: str) -> bool:
    """Freeze it if its hierarchy can; False if it can't."""
    return _write(f"{directory}/cgroup.freeze", "1") or _write(f"{directory}/freezer.state", "FROZEN")


def thaw(directory: str) -> None:
    """Thaw it and all below: in v1 a frozen process does not even die of SIGKILL."""
    for place in reversed(subtree(directory)):
        if frozen(place) and not _write(f"{place}/cgroup.freeze", "0"):
            _write(f"{place}/freezer.state", "THAWED")


def kill(directory: str) -> bool:
    """SIGKILL to all in it and below at once, forks too (cgroup.kill, Linux 5.14).

    False if it has no such file, or nobody in it: on a hybrid host runc's processes may be in v1's hierarchies only.
    """
    populated = "populated 1" in _read(f"{directory}/cgroup.events").splitlines()
    return populated and _write(f"{directory}/cgroup.kill", "1")


def remove(directory: str) -> str:
    """Remove the cgroup and the empty ones below it. What is in the way, or ""."""
    for place in subtree(directory):
        try:
            os.rmdir(place)
        except FileNotFoundError:
            continue
        except OSError as error:
            return f"{place}: {error.strerror}"
    return ""


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read(64).strip()
    except OSError:
        return ""


def _write(path: str, text: str) -> bool:
    """Without O_CREAT: only the kernel makes files there."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        os.write(fd, text.encode())
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
