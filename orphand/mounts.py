# SPDX-License-Identifier: Apache-2.0
"""The host's mounts: which lie beneath a directory, and undoing them in the host's own mount namespace."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Optional

OCTAL = re.compile(r"\\([0-7]{3})")
MAX_MOUNTS = 1 << 20  # ten times the kernel's own limit for a namespace (sysctl fs.mount-max)
UMOUNT_SECONDS = 10.0  # a dead NFS server holds it for ever
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo (proc(5))."""

    point: str
    root: str  # what of the file system is mounted: "net:[4026531840]" of a namespace
    kind: str  # of file system


def of_host(mountinfo: Path = Path("/proc/1/mountinfo")) -> Iterator[Mount]:
    """Every mount that PID 1 sees, in the order in which they were made. OSError where it can't be read.

    One at a time: a node may have ten thousands of them.
    """
    with mountinfo.open("rb") as file:
        for line in islice(file, MAX_MOUNTS):
            mount = _parse(line.decode("utf-8", "surrogateescape").rstrip("\n"))
            if mount:
                yield mount


def _parse(line: str) -> Optional[Mount]:
    left, _, right = line.partition(" - ")
    here, there = left.split(" "), right.split(" ")
    if len(here) < 6 or not there[0]:
        return None
    return Mount(_unescape(here[4]), _unescape(here[3]), there[0])


def _unescape(text: str) -> str:
    return OCTAL.sub(lambda match: chr(int(match[1], 8)), text)


def beneath(directory: str) -> list[str]:
    """The mount points in or at the directory, the last mounted first."""
    return [m.point for m in of_host() if m.point == directory or m.point.startswith(f"{directory}/")][::-1]


def of_namespace(kind: str, inode: int) -> list[str]:
    """Where a namespace is kept by a bind mount: /run/docker/netns/…"""
    return [m.point for m in of_host() if m.kind == "nsfs" and m.root == f"{kind}:[{inode}]"]


def unmount(point: str) -> str:
    """Unmount it in the host's mount namespace, never lazily. What was in the way, or ""."""
    command = ["umount", "--no-canonicalize", point]
    if not in_host_namespace():
        command = ["nsenter", "--target", "1", "--mount", *command]
    return run(command, UMOUNT_SECONDS)


def in_host_namespace() -> bool:
    """Whether orphand itself lives in PID 1's mount namespace: in another one umount changes nothing outside."""
    return os.stat("/proc/self/ns/mnt").st_ino == os.stat("/proc/1/ns/mnt").st_ino


def run(command: list[str], seconds: float) -> str:
    """Run a program of the system's with no input; what went wrong, or "".

    One that can't even be killed (umount of a dead NFS server is in uninterruptible sleep) is not waited for.
    """
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={"PATH": PATH}
        )
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    try:
        output, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        return f"{command[0]} did not end within {seconds:.0f} s"
    if child.returncode == 0:
        return ""
    return output.decode(errors="replace").strip()[-300:] or f"{command[0]} failed"
