# SPDX-License-Identifier: Apache-2.0
"""Which of two shims holds the socket that containerd would reach.

A second shim for an id unlinks the first one's socket and binds its own at the same path. /proc/net/unix
then shows two listeners by that name; which of them stands in the file system only sock_diag(7) tells,
by the file that each was bound to. Nothing is connected to.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Optional

from orphand.authorities import peers
from orphand.authorities.listeners import holders
from orphand.model import ProcessId


def holds_live_socket(process: ProcessId, path: str, proc: Path = Path("/proc")) -> Optional[bool]:
    """Whether that process listens on the socket that stands at `path` ("@…": an abstract one). None: can't be told."""
    inodes = _live(path)
    if not inodes:
        return None
    try:
        os.listdir(f"{proc}/{process.pid}/fd")
    except OSError:
        return None
    return bool(holders(inodes, [process], proc))


def _live(path: str) -> frozenset[int]:
    """The inodes of the sockets that a connect to `path` would reach; empty if that can't be told."""
    try:
        listening = peers.listening()
        if path.startswith("@"):
            return frozenset(inode for inode, bound in listening if not bound.inode and bound.path == path)
        file = os.stat(path)
    except OSError:  # no sock_diag (CONFIG_UNIX_DIAG): names alone, which anybody may take, tell nothing
        return frozenset()
    wanted = (file.st_dev, file.st_ino & 0xFFFFFFFF)
    return frozenset(inode for inode, bound in listening if (bound.device, bound.inode) == wanted)
