# SPDX-License-Identifier: Apache-2.0
"""A directory that looks like /proc, for processes that can't be had for real: every generation of shim,
with every kind of cgroup. Executables and bundles are real files."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from orphand.bundles import Disk
from orphand.proc import Proc

HOST = {"mnt": 100, "pid": 200, "user": 300}
FIELDS_BETWEEN = " ".join(["0"] * 17)  # fields 5 to 21 of /proc/PID/stat


class FakeNode:
    """A node with PID 1 and nothing else. `proc` and `disk` are what a Looker takes."""

    def __init__(self, root: Path, children: bool = True) -> None:
        self.root, self.children = root, children
        self.proc_root, self.disk_root = root / "proc", root / "disk"
        (self.disk_root / "run").mkdir(parents=True)
        self.proc_root.mkdir()
        self.processes: dict[int, int] = {}  # pid -> ppid
        self.add(1, "systemd", ["/sbin/init"], ppid=0, exe="/usr/lib/systemd/systemd", cgroup="/init.scope")

    @property
    def proc(self) -> Proc:
        return Proc(self.proc_root)

    @property
    def disk(self) -> Disk:
        return Disk(self.disk_root)

    def add(
        self,
        pid: int,
        comm: str,
        argv: Sequence[str],
        ppid: int = 1,
        state: str = "S",
        start: int = 1,
        exe: Optional[str] = None,
        exe_mode: int = 0o755,
        cwd: str = "/",
        uid: int = 0,
        nspids: Optional[Sequence[int]] = None,
        cgroup: str = "/system.slice/x.service",
        cgroups: Optional[Sequence[str]] = None,  # whole lines
        pidns: int = 0,
        root: str = "/",
        **namespaces: int,
    ) -> int:
        """A process; start 1 is long ago. `exe` is made as a file of root's, in the node's own tree."""
        directory = self.proc_root / str(pid)
        (directory / "ns").mkdir(parents=True)
        (directory / "task" / str(pid)).mkdir(parents=True)
        (directory / "stat").write_text(f"{pid} ({comm[:15]}) {state} {ppid} {FIELDS_BETWEEN} {start} 0 0\n")
        ids = "\t".join([str(uid)] * 4)
        inner = "\t".join(str(n) for n in (nspids or [pid]))
        (directory / "status").write_text(f"Name:\t{comm}\nUid:\t{ids}\nNSpid:\t{inner}\n")
        (directory / "cmdline").write_bytes(b"".join(os.fsencode(a) + b"\0" for a in argv))
        lines = cgroups if cgroups is not None else [f"0::{cgroup}"]
        (directory / "cgroup").write_text("".join(f"{line}\n" for line in lines))
        os.symlink(self._executable(exe or argv[0], exe_mode), directory / "exe")
        os.symlink(cwd, directory / "cwd")
        os.symlink(root, directory / "root")
        for kind, inode in {**HOST, **namespaces, "pid": pidns or HOST["pid"]}.items():
            os.symlink(f"{kind}:[{inode}]", directory / "ns" / kind)
        self.processes[pid] = ppid
        self._write_children()
        return pid

    def _executable(self, path: str, mode: int) -> Path:
        """A path outside of the node's tree ends the same: only its last part and its owner count."""
        file = self.root / "exe" / f"{mode:o}" / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        file.chmod(mode)
        return file

    def end(self, pid: int) -> None:
        """End a process; its children go to PID 1."""
        directory = self.proc_root / str(pid)
        for path in sorted(directory.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        # kept elsewhere: in /proc no later directory gets its inode, here the next one might
        (self.root / "ended").mkdir(exist_ok=True)
        directory.rename(self.root / "ended" / uuid.uuid4().hex)
        del self.processes[pid]
        for child, parent in self.processes.items():
            if parent == pid:
                self.adopt(child, 1)
        self._write_children()

    def adopt(self, pid: int, ppid: int) -> None:
        """Give a process another parent."""
        self.processes[pid] = ppid
        stat = self.proc_root / str(pid) / "stat"
        before, _, after = stat.read_text().rpartition(") ")
        state, _, rest = after.split(" ", 2)
        stat.write_text(f"{before}) {state} {ppid} {rest}")
        self._write_children()

    def _write_children(self) -> None:
        if not self.children:
            return
        for pid in self.processes:
            below = " ".join(str(c) for c, parent in self.processes.items() if parent == pid)
            (self.proc_root / str(pid) / "task" / str(pid) / "children").write_text(below)

    def write(self, path: str, content: Any) -> None:
        """A file of the node's; anything but text becomes JSON."""
        file = self.disk_root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content))

    def record(self, root: str, namespace: str, container_id: str, pid: int, start: int = 1, **config: Any) -> None:
        """runc's state.json."""
        state = {"id": container_id, "init_process_pid": pid, "init_process_start": start, "config": config}
        self.write(f"{root}/{namespace}/{container_id}/state.json", state)

    # --- shims as the engines start them ---------------------------------------------------------------

    def v2_shim(
        self, pid: int, container_id: str, namespace: str = "moby", state: str = "/run/containerd", **more: Any
    ) -> int:
        """A containerd-shim-runc-v2 of containerd 1.3 and later; its bundle names its socket."""
        bundle = f"{state}/io.containerd.runtime.v2.task/{namespace}/{container_id}"
        self.write(f"{bundle}/address", f"unix:///run/containerd/s/{container_id}")
        argv = ["/usr/bin/containerd-shim-runc-v2", "-namespace", namespace, "-id", container_id]
        argv += ["-address", f"{state}/containerd.sock"]
        values: dict[str, Any] = {"cwd": bundle, "cgroup": "/system.slice/containerd.service", **more}
        return self.add(pid, "containerd-shim", values.pop("argv", argv), **values)

    def v1_shim(self, pid: int, container_id: str, ppid: int = 1, namespace: str = "moby", **more: Any) -> int:
        """A containerd-shim of Docker 18.09 to 20.10."""
        bundle = f"/run/containerd/io.containerd.runtime.v1.linux/{namespace}/{container_id}"
        argv = ["containerd-shim", "-namespace", namespace, "-workdir"]
        argv += [f"/var/lib/containerd/io.containerd.runtime.v1.linux/{namespace}/{container_id}"]
        argv += ["-address", "/run/containerd/containerd.sock", "-containerd-binary", "/usr/bin/containerd"]
        argv += ["-runtime-root", "/var/run/docker/runtime-runc"]
        values: dict[str, Any] = {"cwd": bundle, "cgroup": "/system.slice/containerd.service", **more}
        return self.add(pid, "containerd-shim", values.pop("argv", argv), ppid=ppid, **values)

    def init(self, pid: int, ppid: int, container_id: str, **more: Any) -> int:
        """A container's first process, in pid and mount namespaces of its own."""
        values: dict[str, Any] = {
            "nspids": [pid, 1], "cgroup": f"/docker/{container_id}", "mnt": 1000 + pid, "pidns": 2000 + pid, **more,
        }  # fmt: skip
        return self.add(pid, "sleep", ["sleep", "9999"], ppid=ppid, **values)
