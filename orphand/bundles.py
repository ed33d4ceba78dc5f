# SPDX-License-Identifier: Apache-2.0
"""What engines leave on disk about a container: its bundle and runc's state. Only read, never followed elsewhere.

A file counts only if it is a regular one, belongs to root and isn't too long; anything else is as if it
were not there.
"""

from __future__ import annotations

import json
import os
import stat as modes
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional, cast

from orphand.cgroups import is_identifier
from orphand.model import Generation, ProcessId, Shim
from orphand.proc import read_up_to

MAX_FILE = 4 * 1024 * 1024  # bytes; a config.json of a privileged pod is below 100 KiB
# containerd's default (process/utils.go: RuncRoot) and Docker's <exec-root>/runtime-runc
RUNC_ROOTS = ("/run/containerd/runc", "/run/docker/runtime-runc")
_SOCKETS = "/run/containerd/s"  # a constant in containerd since 1.3.9 (shim/util_unix.go: SocketAddress)


class Disk:
    """The node's files, below `root` in tests."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = str(root).rstrip("/")

    def at(self, path: str) -> str:
        """Where a path of the node is for us."""
        return self._root + path if path.startswith("/") else path

    def read(self, directory: str, name: str, limit: int = MAX_FILE) -> Optional[bytes]:
        """A file right in a directory; None if it is missing, no regular file, not root's or longer than `limit`."""
        try:
            folder = os.open(self.at(directory), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        except OSError:
            return None
        finally:
            os.close(folder)
        try:
            return _read_regular(fd, limit)
        except OSError:
            return None
        finally:
            os.close(fd)

    def json(self, directory: str, name: str, limit: int = MAX_FILE) -> dict[str, Any]:
        """A JSON object; {} if there is none that can be read."""
        data = self.read(directory, name, limit)
        if data is None:
            return {}
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            return {}
        return cast("dict[str, Any]", found) if isinstance(found, dict) else {}

    def names(self, directory: str) -> tuple[str, ...]:
        """What is in a directory; () if it can't be listed."""
        return tuple(self.entries(directory))

    def entries(self, directory: str) -> dict[str, int]:
        """What is in a directory, with the inode of each; {} if it can't be listed."""
        try:
            with os.scandir(self.at(directory)) as found:
                return {entry.name: entry.inode() for entry in found}
        except OSError:
            return {}

    def changed(self, directory: str) -> int:
        """The directory's modification time in ns, which moves when an entry comes or goes; 0 if it is missing."""
        try:
            return os.stat(self.at(directory)).st_mtime_ns
        except OSError:
            return 0


def _read_regular(fd: int, limit: int) -> Optional[bytes]:
    found = os.fstat(fd)
    if not modes.S_ISREG(found.st_mode) or found.st_uid != 0 or found.st_size > limit:
        return None
    data = read_up_to(fd, limit + 1)
    return data if len(data) <= limit else None


def runc_state(disk: Disk, root: str, namespace: str, container_id: str) -> dict[str, Any]:
    """runc's own record of a container, <root>/<namespace>/<id>/state.json; {} if there is none."""
    if not (is_identifier(namespace) and is_identifier(container_id)):
        return {}
    return disk.json(f"{root}/{namespace}/{container_id}", "state.json")


def recorded_process(state: Mapping[str, Any]) -> Optional[ProcessId]:
    """The init by runc's record, which outlives the bundle; None if the record names none."""
    pid, start = state.get("init_process_pid"), state.get("init_process_start")
    if isinstance(pid, int) and isinstance(start, int) and pid > 1:
        return ProcessId(pid, start)
    return None


def runc_roots(disk: Disk, shim: Optional[Shim]) -> tuple[str, ...]:
    """Where runc may have its record of what the shim serves, the most likely first."""
    if shim is None:
        return RUNC_ROOTS
    configured = disk.json(shim.bundle, "options.json", 65536).get("root", "") if shim.bundle else ""
    named = [r for r in (shim.runtime_root, configured) if isinstance(r, str) and r.startswith("/")]
    return tuple(dict.fromkeys((*named, *RUNC_ROOTS)))


def bundle_pid(disk: Disk, bundle: str) -> int:
    """The pid in a bundle's init.pid; 0 if it has none."""
    data = disk.read(bundle, "init.pid", 32) if bundle else None
    return int(data) if data and data.strip().isdigit() else 0


def socket_of_bundle(disk: Disk, bundle: str) -> str:
    """The shim's socket as the bundle names it ("/run/containerd/s/…" or "@…" of an abstract one); "" if it doesn't.

    containerd 1.x writes the file `address`, 2.x bootstrap.json.
    """
    data = disk.read(bundle, "address", 4096)
    text = data.decode("utf-8", "replace").strip() if data else ""
    if not text:
        found = disk.json(bundle, "bootstrap.json", 65536).get("address", "")
        text = found if isinstance(found, str) else ""
    if text.startswith("unix://"):
        text = text[len("unix://") :]
    # before containerd 1.3.9 the address was an abstract one, written without its leading NUL
    return "@" + text if text.startswith("/containerd-shim/") else text


def sockets_of(shim: Shim) -> tuple[str, ...]:
    """Where the shim's socket is by the rules of containerd's versions, if its own id is the group's."""
    import hashlib  # brings OpenSSL, and is seldom needed

    name = f"{shim.namespace}/{shim.container_id}"
    by_address = hashlib.sha256(f"{shim.address}/{name}".encode("utf-8", "surrogateescape")).hexdigest()
    by_name = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
    return (
        f"{_SOCKETS}/{by_address}",
        f"@/containerd-shim/{by_name}.sock",
        f"@/containerd-shim/{name}/shim.sock",
    )


def bundles_beside(shim: Shim) -> str:
    """The directory in which the shim's own bundle is (or was); "" if its working directory is no bundle's."""
    return _beside(shim.bundle, shim.namespace, shim.generation)


@lru_cache(maxsize=256)  # 1 KiB each; to split a path again costs two microseconds
def _beside(bundle: str, namespace: str, generation: Generation) -> str:
    parent, own = os.path.split(bundle)
    kind = "io.containerd.runtime.v1.linux" if generation is Generation.V1 else "io.containerd.runtime.v2.task"
    return parent if own and parent.endswith(f"/{kind}/{namespace}") else ""
