# SPDX-License-Identifier: Apache-2.0
"""What a cgroup's path says about the container in it. Pure: paths in, names out.

A path below a delegated cgroup is written by whoever was given it, so it is data: it ties a process to an
id only together with the process's namespaces and its parent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

# containerd's identifiers.Validate: alphanumerics joined by single . _ - and at most 76 bytes
_IDENTIFIER = re.compile(r"\A[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*\Z")
_MAX_IDENTIFIER = 76
_HEX = re.compile(r"\A[0-9a-f]{64}\Z")
# systemd driver: PREFIX-ID.scope; podman and CRI-O write PREFIX-ID with cgroupfs too
_SCOPE = re.compile(r"\A(?P<prefix>[A-Za-z0-9:_.@\\-]*?)-(?P<id>[0-9a-f]{64})(?:\.scope)?\Z")

# PREFIX of PREFIX-ID[.scope] -> whose
_PREFIXES = (("libpod", "podman"), ("crio", "CRI-O"), ("buildah", "Buildah"), ("buildkit", "BuildKit"))
# a whole part that names a container or machine of another engine, or the slice of one -> whose
_PARTS = (
    (re.compile(r"\Alxc\.payload(?:\.(?P<name>.+))?\Z"), "LXC"),
    (re.compile(r"\Alxc\Z"), "LXC"),
    (re.compile(r"\Amachine-(?P<name>.+)\.scope\Z"), "systemd-machined"),
    (re.compile(r"\Asystemd-nspawn@(?P<name>.+)\.service\Z"), "systemd-nspawn"),
    (re.compile(r"\Abuildkit\Z"), "BuildKit"),
    (re.compile(r"\Alibpod_parent\Z"), "podman"),
)


@dataclass(frozen=True)
class Place:
    """A cgroup that is one container's."""

    container_id: str  # "" where only the engine is told
    path: str  # of the cgroup that is the whole container; the process may be in one below
    foreign: str = ""  # whose it is if not containerd's


def is_identifier(text: str) -> bool:
    """Whether containerd would take it as an id or a namespace."""
    return len(text) <= _MAX_IDENTIFIER and bool(_IDENTIFIER.match(text))


def is_hex_id(text: str) -> bool:
    """Whether it is an id as Docker, CRI and nerdctl make them: no other cgroup is called so by chance."""
    return bool(_HEX.match(text))


@lru_cache(maxsize=256)
def places(path: str, known: tuple[str, ...] = ()) -> tuple[Place, ...]:
    """The containers that a cgroup path names, the outermost first: more than one where one is nested in another.

    An id of 64 hex digits is found in any part: the container may have moved its processes further down.
    Other ids (ctr, Nomad) are found only if they are `known`, and only in the last part, since nothing keeps
    one from being called "system.slice". Whoever is in a container may name the cgroups below its own as he
    likes, so only the outermost is the engine's word.
    """
    found: list[Place] = []
    whose = ""  # an engine's own slice, whose containers are in the parts below
    parts = path.split("/")
    for depth, part in enumerate(parts):
        container_id, engine = _name(part, frozenset(known) if depth == len(parts) - 1 else frozenset())
        whose = engine or whose
        if container_id or (engine and depth == len(parts) - 1):
            found.append(Place(container_id, "/".join(parts[: depth + 1]), whose))
            whose = ""
    if whose and not found:
        found.append(Place("", path, whose))
    return tuple(found)


def _name(part: str, known: frozenset[str]) -> tuple[str, str]:
    """(id, whose) of one part of a path; two empty strings if it is no container."""
    if is_hex_id(part) or part in known:
        return part, ""
    match = _SCOPE.match(part)
    if match and match.group("prefix").endswith("-conmon"):
        return "", ""  # the monitor of a container is a process of the host's
    if match:
        return match.group("id"), next((who for start, who in _PREFIXES if match.group("prefix").startswith(start)), "")
    if part.endswith(".scope"):
        stem = part[: -len(".scope")]
        for name in known:
            if stem.endswith(f"-{name}"):
                return name, ""
    for pattern, who in _PARTS:
        match = pattern.match(part)
        if match:
            name = (match.groupdict().get("name") or "").replace("\\x2d", "-")
            return (name if is_identifier(name) else ""), who
    return "", ""


def last_id(path: str) -> str:
    """What the last part would be as an id, for ids that nothing else tells; "" if it can't be one."""
    part = path.rsplit("/", 1)[-1]
    if part.endswith(".scope"):
        part = part[: -len(".scope")].split("-", 1)[-1]
    return part if is_identifier(part) else ""


def contains(outer: str, inner: str) -> bool:
    """Whether the cgroup `inner` is `outer` or below it."""
    return inner == outer or inner.startswith(outer.rstrip("/") + "/")
