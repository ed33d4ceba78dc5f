# SPDX-License-Identifier: Apache-2.0
"""Recognising shims of every generation, by what a process can't forge.

A name and an argv can be had by anyone. So a process is a shim only if its executable (the kernel's word)
is named as one and belongs to root, if it runs as root, in the host's pid, mount and user namespaces, and
not in a container's cgroup. The argv then only says which container it serves.
"""

from __future__ import annotations

import os
import re
import stat as modes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Optional

from orphand.cgroups import Place, is_identifier, places
from orphand.errors import Denied, Gone
from orphand.model import Generation, ProcessId, Shim
from orphand.proc import Cgroup, Proc, ProcessDir, Stat

# runc's shims, whose signals are known; docker-containerd-shim is Docker 17.12 to 18.06's
_GENERATIONS = {
    "containerd-shim": Generation.V1,
    "docker-containerd-shim": Generation.V1,
    "containerd-shim-runc-v1": Generation.RUNC_V1,
    "containerd-shim-runc-v2": Generation.RUNC_V2,
}
_OTHER = re.compile(r"\A(?:containerd-shim-[A-Za-z0-9._-]+|system-docker-containerd-shim)\Z")

# the kernel cuts comm to 15 bytes: every shim's begins with one of these
_COMMS = ("containerd-shim", "docker-containe", "system-docker-c")

# Flags of containerd 1.0 to 2.3 that take a value, and those that don't (Go's flag package: bool flags)
_VALUED = frozenset(
    [
        "namespace", "id", "address", "publish-binary", "bundle", "socket",
        "workdir", "containerd-binary", "criu-path", "criu", "runtime-root", "shim-cgroup",
    ]
)  # fmt: skip
_BOOLEAN = frozenset(["debug", "systemd-cgroup"])
_PRINTING = frozenset(["v", "version", "info", "h", "help"])  # print and exit
_ACTIONS = frozenset({"start", "delete"})
_FALSE = frozenset({"0", "f", "F", "FALSE", "false", "False"})  # strconv.ParseBool

NAMESPACES = ("mnt", "pid", "user")
_MAX_ADDRESS = 1024


@dataclass(frozen=True)
class Arguments:
    """An argv, parsed as Go's flag package would."""

    flags: Mapping[str, str]
    positionals: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()  # flags that no containerd known to us writes

    @property
    def helper(self) -> bool:
        """Whether it is a short call (start, delete, -v, -info), not a server."""
        if any(self.flags.get(name, "0") not in _FALSE for name in _PRINTING):
            return True
        return bool(self.positionals)


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Parse what follows argv[0]. All of `-id X`, `-id=X`, `--id X`, `--id=X` are taken.

    Go stops at the first argument that is no flag. A flag that isn't known to us may or may not take a
    value: the next argument is taken for it, unless it is a flag or one of the helpers' words.
    """
    flags: dict[str, str] = {}
    unknown: list[str] = []
    rest = list(argv[1:])
    while rest:
        argument = rest[0]
        if not argument.startswith("-") or argument == "-":
            break
        rest.pop(0)
        if argument == "--":
            break
        name, equals, value = argument.lstrip("-").partition("=")
        if equals:
            flags[name] = value
        elif name in _BOOLEAN or name in _PRINTING:
            flags[name] = "true"
        elif name in _VALUED:
            flags[name] = rest.pop(0) if rest else ""
        else:
            flags[name] = rest.pop(0) if rest and not rest[0].startswith("-") and rest[0] not in _ACTIONS else ""
        if name not in _VALUED and name not in _BOOLEAN and name not in _PRINTING:
            unknown.append(name)
    return Arguments(flags, tuple(rest), tuple(unknown))


@dataclass(frozen=True)
class Facts:
    """Everything about one process that the decisions need, read through one open directory."""

    stat: Stat
    argv: tuple[str, ...]
    exe: str  # "" where it can't be read
    exe_uid: int  # -1 where it can't be read
    exe_mode: int
    cwd: str
    uids: tuple[int, ...]
    nspids: tuple[int, ...]
    namespaces: Mapping[str, int]  # those of NAMESPACES that could be read
    cgroups: tuple[Cgroup, ...]
    unseen: tuple[str, ...] = ()  # what the kernel did not let us read
    root: str = ""  # its root directory, "" where it can't be read

    @property
    def process(self) -> ProcessId:
        return self.stat.process


@dataclass(frozen=True)
class Host:
    """What is the host's: the namespaces of PID 1, and the cgroups in which PID 1 itself is."""

    namespaces: Mapping[str, int] = field(default_factory=dict)
    cgroups: tuple[Cgroup, ...] = ()
    root: str = ""

    def differs(self, facts: Facts, kind: str) -> Optional[bool]:
        """Whether a process is in another namespace than the host's. None: can't be seen."""
        mine, its = self.namespaces.get(kind), facts.namespaces.get(kind)
        return None if mine is None or its is None else mine != its

    def places(self, cgroups: Sequence[Cgroup], known: tuple[str, ...] = ()) -> tuple[Place, ...]:
        """The containers that a process's cgroups name, the outermost first, by the first hierarchy that names one.

        Where PID 1 is in a container itself (orphand looks from within one), what is above it doesn't count.
        """
        own = {c.controllers: c.path for c in self.cgroups}
        for cgroup in cgroups:
            above = [p.path for p in places(own.get(cgroup.controllers, "/"))]
            base = next((a for a in reversed(above) if cgroup.path.startswith(f"{a}/")), "")
            found = places(cgroup.path[len(base) :], known)
            if found:
                return tuple(Place(p.container_id, base + p.path, p.foreign) for p in found)
        return ()


@dataclass(frozen=True)
class Recognised:
    """A process that is a shim, or claims to be one.

    `foreign` and `veto` as in Sighting. Without a shim, `note` says why it is none.
    """

    shim: Optional[Shim] = None
    foreign: str = ""
    veto: str = ""
    note: str = ""


def is_candidate(comm: str) -> bool:
    """Whether a process with that comm is worth a full read. No evidence: anyone may set it."""
    return comm.startswith(_COMMS)


def read_host(proc: Proc) -> Host:
    """Read what is the host's from PID 1. What isn't allowed to be read is left out."""
    namespaces = {}
    cgroups: tuple[Cgroup, ...] = ()
    root = ""
    try:
        with proc.open(1) as held:
            namespaces = _namespaces(held, [])
            cgroups = held.cgroups()
            root = _root(held)
    except (Gone, Denied):
        pass
    return Host(namespaces, cgroups, root)


def gather(proc: Proc, pid: int) -> Facts:
    """Read one process. Raises Gone; what isn't allowed to be read is listed in `unseen`."""
    with proc.open(pid) as held:
        unseen: list[str] = []
        stat = held.stat()
        status = held.status()
        argv: tuple[str, ...] = ()
        exe, cwd, owner = "", "", (-1, 0)
        try:
            argv = held.cmdline()
        except Denied:
            unseen.append("cmdline")
        try:
            exe = held.exe()
            owner = held.exe_owner()
            cwd = held.cwd()
        except Denied:
            unseen.append("exe")
        namespaces = _namespaces(held, unseen)
        return Facts(
            stat=stat,
            argv=argv,
            exe=exe,
            exe_uid=owner[0],
            exe_mode=owner[1],
            cwd=cwd,
            uids=status.uids,
            nspids=status.nspids,
            namespaces=namespaces,
            cgroups=held.cgroups(),
            unseen=tuple(unseen),
            root=_root(held),
        )


def _root(held: ProcessDir) -> str:
    try:
        return held.root()
    except (Gone, Denied):
        return ""


def _namespaces(held: ProcessDir, unseen: list[str]) -> dict[str, int]:
    found = {}
    try:
        for kind in NAMESPACES:
            found[kind] = held.namespace(kind)
    except Denied:  # who may not see one may not see the others
        unseen.append("namespaces")
    return found


def generation_of(name: str) -> Optional[Generation]:
    """The generation of an executable of that name, or None if it is no shim's."""
    known = _GENERATIONS.get(name)
    if known:
        return known
    return Generation.OTHER if _OTHER.match(name) else None


def recognise(facts: Facts, host: Host) -> Optional[Recognised]:
    """Say whether a process is a serving shim. None: it neither is one nor looks like one."""
    claimed = os.path.basename(facts.argv[0]) if facts.argv else ""
    name = os.path.basename(facts.exe) if facts.exe else claimed
    generation = generation_of(name)
    if facts.stat.dead or not facts.argv:
        return None
    if generation is None:
        return Recognised(note=f"it calls itself {claimed} but runs {name}") if generation_of(claimed) else None
    arguments = parse_arguments(facts.argv)
    v0 = (
        generation is Generation.V1
        and not arguments.flags
        and len(arguments.positionals) == 3
        and arguments.positionals[-1] not in _ACTIONS
    )
    if arguments.helper and not v0:
        return None
    rootless = host.differs(facts, "user")  # a user's own engine has shims of his own
    forged = "" if rootless else _forged(facts)
    if forged:
        return Recognised(note=forged)
    if v0:
        generation = Generation.OTHER
    container_id, namespace = _served(facts, arguments, v0)
    if not is_identifier(container_id) or not (v0 or is_identifier(namespace)):
        return Recognised(note="its arguments name no container that containerd would accept")
    shim = Shim(
        process=facts.process,
        generation=generation,
        exe=facts.exe,
        namespace=namespace,
        container_id=container_id,
        address=_address(arguments),
        bundle=facts.cwd,
        ppid=facts.stat.ppid,
        runtime_root=arguments.flags.get("runtime-root", ""),
    )
    return Recognised(shim, _foreign(facts, host), _veto(facts, host, shim, arguments))


def _forged(facts: Facts) -> str:
    """Why it can't be a shim of the host's engine; "" if it can. What can't be read is no reason: see _veto."""
    if any(uid != 0 for uid in facts.uids):
        return f"it runs as uid {facts.uids[1] if len(facts.uids) > 1 else facts.uids[0]}, not as root"
    if facts.exe_uid < 0:
        return ""
    if facts.exe_uid != 0 or facts.exe_mode & (modes.S_IWGRP | modes.S_IWOTH) or not modes.S_ISREG(facts.exe_mode):
        return f"{facts.exe} may be written by others than root"
    return ""


def _served(facts: Facts, arguments: Arguments, v0: bool) -> tuple[str, str]:
    """(id, namespace) from the argv, else from the bundle that is its working directory."""
    if v0:  # ID BUNDLE RUNTIME (containerd v0.2.9, containerd-shim/main.go)
        return arguments.positionals[0], ""
    flags = arguments.flags
    # a half-deleted bundle was renamed to .ID first (containerd v1.6.39, runtime/v2/bundle.go: atomicDelete)
    last_of_cwd = os.path.basename(facts.cwd).lstrip(".")
    container_id = flags.get("id") or os.path.basename(flags.get("workdir", "").rstrip("/")) or last_of_cwd
    return container_id, flags.get("namespace", "")


def _address(arguments: Arguments) -> str:
    address = arguments.flags.get("address", "")
    return address if len(address) <= _MAX_ADDRESS and address.isprintable() else ""


def _foreign(facts: Facts, host: Host) -> str:
    """Why it belongs to another engine than the host's; "" if nothing says so."""
    inside = host.places(facts.cgroups)
    if inside:
        outer = inside[0]
        name = f"container {outer.container_id[:12]}" if outer.container_id else "a container"
        return f"its shim runs inside {name}" + (f" of {outer.foreign}" if outer.foreign else "")
    if host.differs(facts, "user"):
        owner = next((f", that of uid {uid}: rootless" for uid in facts.uids if uid), "")
        return f"its shim is in another user namespace than the host's{owner}"
    for kind, word in (("pid", "pid"), ("mnt", "mount")):
        if host.differs(facts, kind):
            return f"its shim is in another {word} namespace than the host's"
    if len(facts.nspids) > 1:
        return "its shim is in another pid namespace than the host's"
    if host.root and facts.root and host.root != facts.root:  # the path of its containerd is another one's for us
        return f"its shim has another root directory than the host's ({facts.root[:128]})"
    return ""


def _veto(facts: Facts, host: Host, shim: Shim, arguments: Arguments) -> str:
    reasons = []
    unseen = [k for k in NAMESPACES if host.differs(facts, k) is None]
    if facts.exe_uid < 0:
        reasons.append("its shim's executable could not be read")
    if unseen:
        reasons.append(f"its shim's namespaces could not be compared with the host's ({', '.join(unseen)})")
    if not shim.address and shim.generation is not Generation.OTHER:
        reasons.append("its shim names no containerd")
    if arguments.unknown and shim.generation is not Generation.OTHER:
        reasons.append(f"its shim has arguments that are not known: {', '.join(a[:32] for a in arguments.unknown[:4])}")
    in_bundle = os.path.basename(shim.bundle).lstrip(".")
    if shim.bundle and shim.generation is not Generation.OTHER and in_bundle != shim.container_id:
        reasons.append(f"its shim's arguments and working directory disagree ({shim.bundle[:128]})")
    return "; ".join(reasons)
