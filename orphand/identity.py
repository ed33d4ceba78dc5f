# SPDX-License-Identifier: Apache-2.0
"""Who was it: what an orphan's leftovers tell about it. A help for the reader, never evidence.

Sources, the best first: Docker's leftover metadata, the bundle's config.json, runc's state.json (which
outlives the bundle and keeps the annotations), the init's own /proc. All of it is data that somebody else
wrote: bounded, of any type, possibly missing. No environment value is ever taken, and what looks like a
secret in a command line is masked.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Optional

from orphand.bundles import Disk, bundles_beside, runc_roots, runc_state
from orphand.cgroups import is_identifier
from orphand.errors import ProcError
from orphand.model import Identity, ProcessId, Sighting
from orphand.proc import Proc, age

_MAX_TEXT = 256
_MAX_COMMAND = 512
_MAX_ITEMS = 32  # ports, mounts
MASK = "***"

# where containerd keeps bundles, for a container whose shim is gone (shims.md: system, k3s, Docker's own)
_STATE_DIRECTORIES = ("/run/containerd", "/run/k3s/containerd", "/run/docker/containerd/daemon")
_TASKS = ("io.containerd.runtime.v2.task", "io.containerd.runtime.v1.linux")

# the CRI plugin's annotations, dockershim's and kubelet's labels, nerdctl's labels
_NAME = ("io.kubernetes.cri.container-name", "io.kubernetes.container.name", "nerdctl/name")
_POD = ("io.kubernetes.cri.sandbox-name", "io.kubernetes.pod.name")
_POD_NAMESPACE = ("io.kubernetes.cri.sandbox-namespace", "io.kubernetes.pod.namespace")
_IMAGE = ("io.kubernetes.cri.image-name", "nerdctl/image")
_POD_UID = re.compile(r"pod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12}|[0-9a-f]{32})")

# mounts that every container has
_USUAL = ("/proc", "/sys", "/dev", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/run/.containerenv")
_VIRTUAL = frozenset(["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "devtmpfs"])


def identify(
    sighting: Sighting,
    data_roots: Sequence[str] = (),
    proc: Optional[Proc] = None,
    disk: Optional[Disk] = None,
) -> Identity:
    """As much of the identity as can be found. `data_roots`: Docker's. Raises nothing."""
    proc, disk = proc or Proc(), disk or Disk()
    if not is_identifier(sighting.container_id):
        return Identity()
    docker = _docker(disk, sighting.container_id, data_roots)
    spec = _spec(disk, sighting)
    state = _state(disk, sighting)
    return Identity(
        name=_first(docker.name, _annotation(_NAME, docker.labels, spec.annotations, state.annotations)),
        image=_first(docker.image, _annotation(_IMAGE, spec.annotations, state.annotations)),
        pod=_first(_annotation(_POD, docker.labels, spec.annotations, state.annotations), _pod_uid(sighting)),
        pod_namespace=_annotation(_POD_NAMESPACE, docker.labels, spec.annotations, state.annotations),
        hostname=_first(docker.hostname, spec.hostname, state.hostname),
        command=command_line(_argv(proc, sighting) or docker.argv or spec.argv),
        started=_started(sighting),
        ports=docker.ports,
        mounts=spec.mounts or state.mounts or _mountinfo(proc, sighting),
    )


@dataclass(frozen=True)
class _Leftover:
    """What one source tells."""

    name: str = ""
    image: str = ""
    hostname: str = ""
    labels: Mapping[str, Any] = field(default_factory=dict)
    annotations: Mapping[str, Any] = field(default_factory=dict)
    argv: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()
    mounts: tuple[str, ...] = ()


def _docker(disk: Disk, container_id: str, data_roots: Iterable[str]) -> _Leftover:
    for root in data_roots:
        found = disk.json(f"{root}/containers/{container_id}", "config.v2.json")
        if found:
            config, network = _object(found.get("Config")), _object(found.get("NetworkSettings"))
            return _Leftover(
                name=_text(found.get("Name")).lstrip("/"),
                image=_text(config.get("Image")),
                hostname=_text(config.get("Hostname")),
                labels=_object(config.get("Labels")),
                argv=_texts([found.get("Path"), *_list(found.get("Args"))]),
                ports=_ports(_object(network.get("Ports"))),
            )
    return _Leftover()


def _ports(bindings: Mapping[str, Any]) -> tuple[str, ...]:
    found = []
    for inner, outers in bindings.items():
        for outer in _list(outers):
            host = _object(outer)
            found.append(f"{_text(host.get('HostIp'))}:{_text(host.get('HostPort'))}->{_text(inner)}")
    return tuple(found[:_MAX_ITEMS])


def _spec(disk: Disk, sighting: Sighting) -> _Leftover:
    """From the bundle's config.json, as the OCI's runtime-spec has it."""
    for bundle in _bundles(sighting):
        found = disk.json(bundle, "config.json")
        if found:
            return _Leftover(
                hostname=_text(found.get("hostname")),
                annotations=_object(found.get("annotations")),
                argv=_texts(_list(_object(found.get("process")).get("args"))),
                mounts=_mounts(_list(found.get("mounts"))),
            )
    return _Leftover()


def _bundles(sighting: Sighting) -> tuple[str, ...]:
    shim = sighting.shim
    if shim:
        beside = bundles_beside(shim)
        if beside:
            return (f"{beside}/{sighting.container_id}",)
        return (shim.bundle,) if shim.bundle and shim.container_id == sighting.container_id else ()
    if not is_identifier(sighting.namespace):
        return ()
    tail = f"{sighting.namespace}/{sighting.container_id}"
    return tuple(f"{state}/{task}/{tail}" for state in _STATE_DIRECTORIES for task in _TASKS)


def _state(disk: Disk, sighting: Sighting) -> _Leftover:
    """From runc's state.json (libcontainer's configs.Config): labels are NAME=VALUE, the annotations among them."""
    for root in runc_roots(disk, sighting.shim):
        config = _object(runc_state(disk, root, sighting.namespace, sighting.container_id).get("config"))
        if config:
            labels = (label.partition("=") for label in _texts(_list(config.get("labels"))))
            return _Leftover(
                hostname=_text(config.get("hostname")),
                annotations={name: value for name, _, value in labels},
                mounts=_mounts(_list(config.get("mounts"))),
            )
    return _Leftover()


def _mounts(mounts: Iterable[Any]) -> tuple[str, ...]:
    """DESTINATION from SOURCE of what was mounted into it from the node."""
    found = []
    for mount in map(_object, mounts):
        source, destination = _text(mount.get("source")), _text(mount.get("destination"))
        if source.startswith("/") and not _usual(destination):
            found.append(f"{destination} from {source}")
    return tuple(found[:_MAX_ITEMS])


def _usual(destination: str) -> bool:
    return destination == "/" or any(destination == u or destination.startswith(u + "/") for u in _USUAL)


def _mountinfo(proc: Proc, sighting: Sighting) -> tuple[str, ...]:
    """From what is mounted in the init's namespace (proc(5): mount's root is field 4, its point 5)."""
    for init in sighting.inits:
        try:
            with proc.open(init.process.pid) as held:
                text = held.mountinfo()
        except ProcError:
            continue
        return tuple(filter(None, map(_mounted, text.splitlines())))[:_MAX_ITEMS]
    return ()


def _mounted(line: str) -> str:
    before, _, after = line.partition(" - ")
    fields, filesystem = before.split(" "), after.split(" ")
    if len(fields) < 6 or len(filesystem) < 2 or filesystem[0] in _VIRTUAL or _usual(fields[4]):
        return ""
    return f"{_text(fields[4])} from {_text(fields[3])} of {_text(filesystem[1])}"


def _pod_uid(sighting: Sighting) -> str:
    """The pod's uid where a kubepods cgroup names it; the systemd driver writes _ for -."""
    for init in sighting.inits:
        match = _POD_UID.search(init.cgroup) if "kubepods" in init.cgroup else None
        if match:
            return f"uid {match.group(1).replace('_', '-')}"
    return ""


def _argv(proc: Proc, sighting: Sighting) -> tuple[str, ...]:
    for init in sighting.inits:
        try:
            return proc.cmdline(init.process.pid)
        except ProcError:
            continue
    return ()


def _started(sighting: Sighting) -> str:
    processes: Sequence[ProcessId] = [i.process for i in sighting.inits] or sighting.processes
    if not processes:
        return ""
    moment = time.time() - age(min(processes, key=lambda p: p.start))
    return datetime.fromtimestamp(moment).astimezone().isoformat(timespec="seconds")


# --- command lines -----------------------------------------------------------------------------------

_SENSITIVE = r"(?:pass(?:word|wd|phrase)?|pwd|secrets?|tokens?|credentials?|auth(?:orization)?|api[-_]?key|" \
          r"access[-_]?key|private[-_]?key|encryption[-_]?key|signing[-_]?key|license[-_]?key|cookie|dsn)"  # fmt: skip
_SENSITIVE_NAME = re.compile(rf"(?:^|[-_.]){_SENSITIVE}(?:$|[-_.])|{_SENSITIVE}$", re.IGNORECASE)
_ENVIRONMENT = frozenset(["-e", "--env"])
_USER = frozenset(["-u", "--user", "--proxy-user"])
_SENSITIVE_PART = re.compile(_SENSITIVE, re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z0-9_.-]+")
_GIVEN = re.compile(r"(?P<sep>\s*[=:]\s*|\s+)(?P<value>\"[^\"]*\"|'[^']*'|\S+)")  # what follows a name
_PATTERNS = (
    (re.compile(r"(?P<keep>\bauthorization\s*:\s*)[^\"'\n]+", re.IGNORECASE), rf"\g<keep>{MASK}"),
    (
        re.compile(r"(?P<keep>[a-z][a-z0-9+.-]{0,31}://[^/\s:@]*:)[^/\s@]+(?=@)", re.IGNORECASE),
        rf"\g<keep>{MASK}",
    ),
    (re.compile(r"(?P<keep>\b(?:bearer|basic)\s+)\S+", re.IGNORECASE), rf"\g<keep>{MASK}"),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_.-]+"), MASK),  # a JSON web token
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_[A-Za-z0-9]{20,}\b|\bxox[abprs]-[A-Za-z0-9-]{10,}"), MASK),
)


def mask_arguments(argv: Sequence[str]) -> tuple[str, ...]:
    """The argv with everything masked that is a secret by the name before it or by its form."""
    masked: list[str] = []
    before = ""
    for argument in argv:
        masked.append(_mask_one(argument, before))
        before = argument
    return tuple(masked)


def _mask_one(argument: str, before: str) -> str:
    if before in _ENVIRONMENT or argument.startswith(("--env=", "-e=")):
        name, equals, _ = argument.partition("=")
        if argument.startswith(("--env=", "-e=")):
            option, _, rest = argument.partition("=")
            name = f"{option}={rest.partition('=')[0]}"
        return f"{name}={MASK}" if equals else argument
    if before.startswith("-") and "=" not in before and _SENSITIVE_NAME.search(before) and not argument.startswith("-"):
        return MASK
    if before in _USER and ":" in argument:
        return f"{argument.partition(':')[0]}:{MASK}"
    name, equals, value = argument.partition("=")
    if equals and value and not any(c.isspace() for c in argument) and _SENSITIVE_NAME.search(name):
        return f"{name}={MASK}"
    return _mask_text(argument)


def _mask_text(text: str) -> str:
    """Secrets in the middle of an argument, as in `sh -c '…'`.

    An orphan wrote it: no expression here goes through the rest of the text anew from every letter. One that did took
    minutes for a made-up argument, and the look with it.
    """
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return _mask_assignments(text) if any(space in text for space in " \t\n") else text


def _mask_assignments(text: str) -> str:
    """The values that stand after a name of something secret: NAME=VALUE, NAME: VALUE, --NAME VALUE."""
    pieces: list[str] = []
    at = 0
    while (word := _WORD.search(text, at)) is not None:
        given = _GIVEN.match(text, word.end()) if _SENSITIVE_PART.search(word.group()) else None
        pieces.append(text[at : word.end()])
        at = word.end()
        if given is not None:
            pieces.append(f"{given.group('sep')}{MASK}")
            at = given.end()
    return "".join((*pieces, text[at:]))


def command_line(argv: Sequence[str]) -> str:
    """The argv as one line that a shell would take, bounded, with its secrets masked."""
    bounded = [a[: _MAX_COMMAND * 2] for a in argv[:64]]
    text = shlex.join(mask_arguments(bounded)).replace(f"'{MASK}'", MASK)
    return text if len(text) <= _MAX_COMMAND else text[: _MAX_COMMAND - 1] + "…"


# --- values of any type --------------------------------------------------------------------------------


def _first(*texts: str) -> str:
    return next((t for t in texts if t), "")


def _annotation(names: Sequence[str], *sources: Mapping[str, Any]) -> str:
    return _first(*(_text(source.get(name)) for source in sources for name in names))


def _text(value: object, limit: int = _MAX_TEXT) -> str:
    return value[:limit] if isinstance(value, str) else ""


def _texts(values: Iterable[object]) -> tuple[str, ...]:
    return tuple(v[:4096] for v in values if isinstance(v, str))


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
