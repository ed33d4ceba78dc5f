# SPDX-License-Identifier: Apache-2.0
"""Who listens on a Unix socket: found without connecting, so that asking wakes nobody."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from orphand.authorities import peers
from orphand.model import ProcessId

PROC = Path("/proc")
EARLY = range(3, 16)  # descriptors
ACCEPTING = 0x10000  # __SO_ACCEPTCON in the flags column (linux/net.h)


def listening_inodes(path: str, proc: Path = Path("/proc")) -> frozenset[int]:
    """The inodes of the sockets that listen on `path` ("@…": an abstract one). Empty: nobody does. Raises OSError.

    A name proves nothing: a container in the host's network namespace may bind the same one in its own file system. So
    it is the socket's file that is compared, and the name only where the kernel doesn't tell the file's device as
    stat(2) does (overlayfs, btrfs).
    """
    if path.startswith("@"):
        return frozenset(inode for inode, b in _bound(proc) if b.path == path)
    try:
        file = os.stat(path)
    except OSError:
        file = None
    exact = _exact(file, proc) if file else frozenset()
    if exact:
        return exact
    bound = _bound(proc)
    if file is None and any(b.inode for _, b in bound):
        return frozenset()  # whoever listened there can't be reached any more
    number = file.st_ino & 0xFFFFFFFF if file else 0
    return frozenset(i for i, b in bound if b.inode in (0, number) and _same_name(b.path, path))


def _exact(file: os.stat_result, proc: Path) -> frozenset[int]:
    """Those that are bound to that very file; empty where the kernel doesn't tell."""
    if proc != PROC:
        return frozenset()
    try:
        return peers.listening_on(file)
    except OSError:  # a kernel without CONFIG_UNIX_DIAG
        return frozenset()


def _same_name(bound: str, path: str) -> bool:
    """Whether both names lead to one file, as /var/run and /run do. Names that end otherwise are not followed."""
    if bound == path:
        return True
    same_end = os.path.basename(bound) == os.path.basename(path)
    return same_end and bound.startswith("/") and os.path.realpath(bound) == os.path.realpath(path)


def listening(proc: Path = Path("/proc")) -> Iterator[tuple[int, str]]:
    """(inode, path as bound) of each listening socket of this network namespace that has a name. Raises OSError."""
    for inode, bound in _bound(proc):
        yield inode, bound.path


def _bound(proc: Path) -> list[tuple[int, peers.Bound]]:
    if proc == PROC:
        try:
            return peers.listening()
        except OSError:  # a kernel without CONFIG_UNIX_DIAG
            return list(_listed(proc))
    return list(_listed(proc))


def _listed(proc: Path) -> Iterator[tuple[int, peers.Bound]]:
    """The same from /proc/net/unix, where a name with a newline makes lines that look like others, or like none."""
    for line in (proc / "net/unix").read_bytes().split(b"\n")[1:]:
        columns = line.split(None, 7)
        try:
            if len(columns) == 8 and int(columns[3], 16) & ACCEPTING:
                yield int(columns[6]), peers.Bound(os.fsdecode(columns[7]))
        except ValueError:
            continue


def holders(inodes: frozenset[int], candidates: Iterable[ProcessId], proc: Path = Path("/proc")) -> list[ProcessId]:
    """Those of the candidates that have one of the sockets open. One that ends meanwhile holds nothing."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    return [c for c in candidates if wanted and not wanted.isdisjoint(_descriptors(f"{proc}/{c.pid}/fd"))]


def holds(inodes: frozenset[int], process: ProcessId, proc: Path = PROC) -> bool:
    """Whether the process has one of the sockets open. A server opens its socket early, and may have thousands of
    descriptors: the low ones are tried first, since only to list them all takes the kernel a millisecond.
    """
    early = (_target(f"{proc}/{process.pid}/fd/{number}") for number in EARLY)
    found = not {f"socket:[{inode}]" for inode in inodes}.isdisjoint(early)
    return found or bool(holders(inodes, [process], proc))


def _target(link: str) -> str:
    """Where it leads; "" if it is gone."""
    try:
        return os.readlink(link)
    except OSError:
        return ""


def _descriptors(directory: str) -> Iterator[str]:
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                yield _target(entry.path)
    except OSError:
        return
