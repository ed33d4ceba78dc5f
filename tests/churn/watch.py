# SPDX-License-Identifier: Apache-2.0
"""What the kernel shows: processes that die, what is left of an id, who lives that nobody knows."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

from tests.churn.book import Process

STATE = Path("/run/containerd")
RUNTIMES = ("io.containerd.runtime.v2.task", "io.containerd.runtime.v1.linux")
RUNC = {
    "moby": Path("/run/docker/runtime-runc/moby"),
    **{n: Path("/run/containerd/runc", n) for n in ("k8s.io", "churn")},
}
FULL_ID = re.compile(r"[0-9a-f]{64}")
DOCKERDS_PROXY = "dockerd's docker-proxy"  # a living dockerd's, which still has it in its books


class Watcher:
    """Notes the time at which each watched process dies, by pidfd."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        threading.Thread(target=self._run, daemon=True).start()

    def watch(self, process: Process) -> None:
        try:
            descriptor = os.pidfd_open(process.pid)
        except OSError:
            process.died = time.time()
            return
        with self._lock:
            self._selector.register(descriptor, selectors.EVENT_READ, process)

    def _run(self) -> None:
        while True:
            with self._lock:
                ready = self._selector.select(0)
                for key, _ in ready:
                    key.data.died = time.time()
                    self._selector.unregister(key.fd)
                    os.close(key.fd)
            time.sleep(0.02)


def argv_of(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    return []


def pids() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name)


def shims() -> dict[int, tuple[str, str]]:
    """pid -> (namespace, id) of every serving shim, from its argv."""
    found = {}
    for pid in pids():
        argv = argv_of(pid)
        if argv and "containerd-shim" in argv[0].rsplit("/", 1)[-1] and argv[-1] not in ("start", "delete"):
            options = dict(zip(argv[1:], argv[2:]))
            full_id = options.get("-id") or options.get("-workdir", "").rsplit("/", 1)[-1]
            found[pid] = (options.get("-namespace", ""), full_id)
    return found


def contained() -> dict[int, str]:
    """pid -> container id of every process in a container's cgroup (any hierarchy). Docker's ids only."""
    found = {}
    for pid in pids():
        with contextlib.suppress(OSError):
            match = FULL_ID.search(Path(f"/proc/{pid}/cgroup").read_text())
            if match:
                found[pid] = match.group()
    return found


def cgroups() -> list[Path]:
    """Every cgroup whose name holds a container's id."""
    found = []
    for root, directories, _ in os.walk("/sys/fs/cgroup"):
        found += [Path(root, d) for d in directories if FULL_ID.search(d)]
        directories[:] = [d for d in directories if not FULL_ID.search(d)]
    return found


def mounts() -> list[str]:
    with open("/proc/self/mountinfo") as file:
        return [line.split()[4] for line in file]


def init_pid(full_id: str, namespace: str = "moby") -> Optional[int]:
    """From runc's own state: it doesn't need an engine that answers."""
    try:
        text = (RUNC[namespace] / full_id / "state.json").read_text()
    except OSError:
        return None
    match = re.search(r'"init_process_pid":(\d+)', text)
    return int(match.group(1)) if match else None


def in_cgroup(pid: int, full_id: str) -> bool:
    """Whether the process lives, in the container's cgroup: runc's state outlives an init, and pids come again."""
    with contextlib.suppress(OSError):
        return full_id in Path(f"/proc/{pid}/cgroup").read_text()
    return False


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def left(full_id: str, namespace: str, netns: str) -> list[str]:
    """What is left of a container apart from what Docker itself keeps (its layers); empty when it is clean."""
    found = [f"shim {pid}" for pid, (_, i) in shims().items() if i == full_id]
    found += [f"process {pid}" for pid, i in contained().items() if i == full_id]
    found += [f"cgroup {path}" for path in cgroups() if full_id in path.name]
    found += [f"bundle {p}" for r in RUNTIMES if (p := STATE / r / namespace / full_id).exists()]
    found += [f"runc state {p}" for p in [RUNC[namespace] / full_id] if p.exists()]
    found += [f"mount {m}" for m in mounts() if full_id in m or m == netns]
    for kind in ("tasks", "containers"):
        listed = subprocess.run(["ctr", "-n", namespace, kind, "ls", "-q"], capture_output=True, text=True, timeout=60)
        if full_id in listed.stdout.split():
            found.append(f"containerd {kind[:-1]}")
    return found


def strangers(known: set[str]) -> dict[str, str]:
    """Ids of Docker's that live in /proc and are not among `known` -> by what they were seen."""
    found: dict[str, str] = {}
    for pid, (namespace, full_id) in shims().items():
        if namespace == "moby" and full_id not in known:
            found[full_id] = f"shim {pid}"
    for pid, full_id in contained().items():
        if full_id not in known:
            found.setdefault(full_id, f"process {pid} ({' '.join(argv_of(pid))[:60]})")
    return found


def residue(known: set[str]) -> list[str]:
    """Everything of any container but those in `known` (ids, and names in k8s.io) that is on the host."""
    of = contained()
    found = [f"shim {pid} of {n}/{i}" for pid, (n, i) in shims().items() if i not in known]
    found += [f"process {pid} of {i}: {' '.join(argv_of(pid))[:60]}" for pid, i in of.items() if i not in known]
    found += proxies()
    found += [
        f"runc {pid}: {' '.join(argv_of(pid))[:80]}"
        for pid in pids()
        if argv_of(pid)[:1] in (["runc"], ["/usr/sbin/runc"]) and of.get(pid) not in known
    ]
    found += [f"cgroup {path}" for path in cgroups() if _id_in(path.name) not in known]
    for runtime in RUNTIMES:
        for place in (STATE / runtime, Path("/var/lib/containerd") / runtime):
            found += [f"bundle {p}" for p in place.glob("*/*") if p.name not in known]
    found += [f"runc state {p}" for place in RUNC.values() for p in place.glob("*") if p.name not in known]
    for mount in mounts():
        full_id = _id_in(mount)
        if full_id and full_id not in known and "/overlay2/" not in mount:
            found.append(f"mount {mount}")
        if mount.startswith("/run/docker/netns/") and not mount.endswith("/default"):
            found.append(f"netns {mount}")
    return found


def proxies() -> list[str]:
    """Every docker-proxy, by whose child it is: dockerd starts and ends its own, and orphand only tells of them."""
    found = []
    for pid in pids():
        argv = argv_of(pid)
        if argv[:1] == ["/usr/sbin/docker-proxy"]:
            parent = parent_of(pid)
            owner = DOCKERDS_PROXY if os.path.basename((argv_of(parent) or [""])[0]) == "dockerd" else "docker-proxy"
            found.append(f"{owner} {pid} of parent {parent}: {' '.join(argv[1:])}")
    return found


def parent_of(pid: int) -> int:
    """0 if it is gone."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def layer_mounts() -> list[str]:
    """Mounts of Docker's storage driver: dockerd's own, which orphand leaves and reports."""
    return [m for m in mounts() if "/overlay2/" in m]


def sandbox_files() -> list[str]:
    return [p.name for p in Path("/run/docker/netns").glob("*") if p.name != "default"]


def _id_in(text: str) -> str:
    match = FULL_ID.search(text)
    return match.group() if match else ""
