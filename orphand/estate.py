# SPDX-License-Identifier: Apache-2.0
"""What one container owns on this host: recorded before the first signal, so that an end can be finished after a crash.

Found while it still lives, since most of it can't be tied to the container any more once its init is gone.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from orphand import cgroupfs, mounts
from orphand.bundles import Disk
from orphand.errors import ProcError
from orphand.model import Generation, Init, Kind, ProcessId, Shim, Sighting
from orphand.proc import Proc, read_up_to

RUNTIMES = ("io.containerd.runtime.v2.task", "io.containerd.runtime.v1.linux")
# containerd's state directory -> its root (config.toml's defaults; moby libcontainerd/supervisor/remote_daemon.go)
ROOT_OF_STATE = {
    "/run/containerd": "/var/lib/containerd",
    "/run/docker/containerd/daemon": "/var/lib/docker/containerd/daemon",
}
RUNC_ROOTS = ("/run/docker/runtime-runc", "/run/containerd/runc")
DOCKER_STATE = "/containerd/daemon"  # a dockerd's own containerd keeps its state at EXEC-ROOT/containerd/daemon
SOCKETS = "/run/containerd/s"
DOCKER_NETNS = "/run/docker/netns/"
# -address as it stands in argv: a shim's socket is named after it, letter by letter
ADDRESSES = (
    "/run/containerd/containerd.sock",
    "/var/run/docker/containerd/containerd.sock",
    "/var/run/docker/containerd/docker-containerd.sock",
    "/run/k3s/containerd/containerd.sock",
)
MAX_STATE_BYTES = 4 << 20  # of runc's state.json: 60 KiB with seccomp


@dataclass(frozen=True)
class RuncState:
    """runc's record of the container: DIRECTORY/state.json."""

    directory: str
    init: ProcessId  # (0, 0) before the start
    cgroups: tuple[str, ...] = ()
    bundle: str = ""
    rootfs: str = ""


@dataclass(frozen=True)
class Estate:
    """Everything of one container that an end has to take away. Paths are "" where there is nothing to."""

    container_id: str
    namespace: str
    address: str
    kind: Kind
    boot_id: str
    shim: Optional[ProcessId] = None
    shim_shared: bool = False  # others need it: it gets no signal, and its socket stays
    inits: tuple[ProcessId, ...] = ()
    cgroups: Mapping[str, int] = field(default_factory=dict)  # directory -> inode
    bundle: str = ""
    directories: Mapping[str, int] = field(default_factory=dict)  # bundle and work directory, where there -> inode
    runc: str = ""  # ROOT/ID of runc
    runc_init: Optional[ProcessId] = None  # whom runc's record names
    rootfs: str = ""  # where its file system is mounted, as runc says
    socket: str = ""  # its shim's
    netns: int = 0  # inode of its network namespace, 0 where it shares one with the host
    netns_files: tuple[str, ...] = ()  # where that is kept: an inode alone is soon another namespace's
    addresses: tuple[str, ...] = ()  # its IPv4 addresses

    @property
    def name(self) -> str:
        """One container of one engine."""
        return f"{self.address}/{self.namespace}/{self.container_id}"

    def sighting(self, seen_at: float) -> Sighting:
        """What the engines are asked about, now that part of it may be gone.

        Docker disowns what lives although its record says otherwise: after the init that is the shim alone.
        """
        shim = (self.shim,) if self.shim and self.kind is Kind.DISOWNED else ()
        inits = tuple(Init(process, self.container_id, "") for process in (*self.inits, *shim))
        return Sighting(self.container_id, self.namespace, self.address, None, inits, seen_at)

    def whole_sighting(self, seen_at: float) -> Sighting:
        """The container as it was before its end: what people are told of it, and know it by."""
        inits = tuple(Init(process, self.container_id, "") for process in self.inits)
        return Sighting(self.container_id, self.namespace, self.address, self._whole_shim(), inits, seen_at)

    def _whole_shim(self) -> Optional[Shim]:
        if self.shim is None:
            return None
        generation = Generation.V1 if f"/{RUNTIMES[1]}/" in self.bundle else Generation.RUNC_V2
        whose = (self.namespace, self.container_id, self.address)
        return Shim(self.shim, generation, "", *whose, self.bundle, ppid=0)

    def to_json(self) -> dict[str, Any]:
        """Plain values that from_json reads."""
        return {name: _plain(value) for name, value in vars(self).items()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Estate:
        """The estate again. Raises ValueError for anything that to_json did not write."""
        try:
            raw = dict(data)
            special: dict[str, Any] = {
                "kind": Kind(raw.pop("kind")),
                "shim": _process(raw.pop("shim")),
                "shim_shared": bool(raw.pop("shim_shared")),
                "inits": tuple(ProcessId(int(pid), int(start)) for pid, start in raw.pop("inits")),
                "runc_init": _process(raw.pop("runc_init")),
                "cgroups": {str(path): int(inode) for path, inode in raw.pop("cgroups").items()},
                "directories": {str(path): int(inode) for path, inode in raw.pop("directories").items()},
                "netns": int(raw.pop("netns")),
                "netns_files": tuple(map(str, raw.pop("netns_files"))),
                "addresses": tuple(map(str, raw.pop("addresses"))),
            }
            if not all(isinstance(value, str) for value in raw.values()):
                raise TypeError("not a string")
            return Estate(**special, **raw)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"no estate: {error}") from error

    @property
    def doomed_shim(self) -> Optional[ProcessId]:
        """The shim that is to end with the container."""
        return None if self.shim_shared else self.shim


def _process(raw: Any) -> Optional[ProcessId]:
    return None if raw is None else ProcessId(*map(int, raw))


def _plain(value: Any) -> Any:
    if isinstance(value, ProcessId):
        return [value.pid, value.start]
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return dict(value)
    return value.value if isinstance(value, Kind) else value


def survey(sighting: Sighting, kind: Kind, proc: Proc) -> Estate:
    """Look up what the sighted container owns. Reads only; what can't be tied to it is left out.

    Of two shims for one id the paths belong to the one that is kept, so a DUPLICATE_SHIM has processes only.
    """
    shim = sighting.shim
    inits = tuple(i.process for i in sighting.inits)
    estate = Estate(
        container_id=sighting.container_id,
        namespace=sighting.namespace,
        address=sighting.address,
        kind=kind,
        boot_id=proc.boot_id(),
        shim=shim.process if shim else None,
        shim_shared=bool(sighting.siblings),
        inits=inits,
    )
    if kind is Kind.DUPLICATE_SHIM:
        return estate
    mounted = cgroupfs.hierarchies()
    state = _runc_state(sighting, proc)
    namespace = sighting.namespace or (os.path.basename(os.path.dirname(state.directory)) if state else "")
    bundle = _bundle(sighting, state, namespace)
    netns = _own_netns(inits, proc)
    return Estate(
        **{
            **vars(estate),
            "namespace": namespace,
            "cgroups": {d: cgroupfs.inode(d) for d in _cgroups(sighting, state, bundle, proc, mounted)},
            "bundle": bundle,
            "directories": {d: cgroupfs.inode(d) for d in (bundle, _work(bundle)) if d and cgroupfs.inode(d)},
            "runc": state.directory if state else _aborted_runc(sighting),
            "runc_init": state.init if state else None,
            "rootfs": state.rootfs if state else "",
            "socket": _socket(sighting, namespace, bundle),
            "netns": netns,
            "netns_files": _netns_files(netns),
            "addresses": tuple(sorted(_addresses(inits, proc))),
        }
    )


def _cgroups(
    sighting: Sighting, state: Optional[RuncState], bundle: str, proc: Proc, mounted: Sequence[cgroupfs.Hierarchy]
) -> list[str]:
    found: set[str] = set()
    for init in sighting.inits:
        try:
            found |= cgroupfs.of_process(init.process.pid, sighting.container_id, proc, mounted)
        except ProcError:
            continue
    if state:
        found |= {d for d in state.cgroups if cgroupfs.is_own(d, sighting.container_id, mounted)}
    if not found:
        found = cgroupfs.usual_places(sighting.container_id, sighting.namespace, mounted)
        found |= _asked_for(bundle, sighting.container_id, mounted)
    return sorted(d for d in found if cgroupfs.inode(d))


def _asked_for(bundle: str, container_id: str, mounted: Sequence[cgroupfs.Hierarchy]) -> set[str]:
    """Where the bundle's config.json wants its cgroups: below a --cgroup-parent, of one that runc did not record yet.

    With systemd's driver it is no path, and a scope vanishes by itself.
    """
    linux = Disk().json(bundle, "config.json").get("linux") if bundle else None
    path = linux.get("cgroupsPath") if isinstance(linux, dict) else None
    if not isinstance(path, str) or not path.startswith("/") or not cgroupfs.HEX_ID.fullmatch(container_id):
        return set()
    return {d for h in mounted if (d := h.directory(path)) and cgroupfs.is_own(d, container_id, mounted)}


def _bundle(sighting: Sighting, state: Optional[RuncState], namespace: str) -> str:
    """The bundle's path, whether it still exists or not; "" if it has not the form that containerd gives it."""
    candidates = [state.bundle] if state else []
    if sighting.shim:
        # of a pod's shim the cwd is the sandbox's bundle; those of the others are beside it
        candidates.insert(0, os.path.join(os.path.dirname(sighting.shim.bundle), sighting.container_id))
    elif namespace:
        name = f"{namespace}/{sighting.container_id}"
        candidates += [f"{root}/{runtime}/{name}" for root in ROOT_OF_STATE for runtime in RUNTIMES]
    fitting = [b for b in candidates if is_bundle(b, namespace, sighting.container_id)]
    return next((b for b in fitting if os.path.isdir(b)), fitting[0] if fitting else "")


def is_bundle(path: str, namespace: str, container_id: str) -> bool:
    """Whether it ends in RUNTIME/NAMESPACE/ID, as all of containerd's bundles and work directories do."""
    parts = path.split("/")
    absolute = path.startswith("/") and os.path.normpath(path) == path
    return (
        absolute
        and len(parts) > 4
        and parts[-3] in RUNTIMES
        and bool(namespace)
        and parts[-2:] == [namespace, container_id]
    )


def _work(bundle: str) -> str:
    """containerd's work directory: where the bundle's link leads, or the default's place for it."""
    if not bundle:
        return ""
    state, runtime, namespace, container_id = bundle.rsplit("/", 3)
    try:
        target = os.path.normpath(os.readlink(f"{bundle}/work"))
    except OSError:
        target = f"{ROOT_OF_STATE.get(state, '')}/{runtime}/{namespace}/{container_id}"
    return target if is_bundle(target, namespace, container_id) else ""


def _socket(sighting: Sighting, namespace: str, bundle: str) -> str:
    """Where its shim listens or listened: a hash of address, namespace and id (containerd 1.3.9+, shim/util_unix.go).

    Of a shim that is gone the address is unknown; of the usual ones only the right one gives a file that is there.
    """
    shim = sighting.shim
    if shim:
        return socket_path(shim.address, shim.namespace, shim.container_id)
    state = bundle.split("/io.containerd.runtime.", maxsplit=1)[0]
    addresses = filter(None, (sighting.address, f"{state}/containerd.sock", *ADDRESSES))
    usual = [socket_path(address, namespace, sighting.container_id) for address in addresses]
    return next((path for path in usual if os.path.exists(path)), "")


def socket_path(address: str, namespace: str, container_id: str) -> str:
    """The socket of the shim that was started with these."""
    import hashlib  # brings OpenSSL, and is seldom needed

    name = f"{address}/{namespace}/{container_id}"
    return f"{SOCKETS}/{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()}"


def _runc_state(sighting: Sighting, proc: Proc) -> Optional[RuncState]:
    """runc's record that names one of the sighted inits; the one in its namespace where the init has ended."""
    inits = {i.process for i in sighting.inits}
    for directory in _runc_directories(sighting):
        state = read_runc_state(directory)
        if state is None:
            continue
        by_name = (
            sighting.namespace and (not inits or _outlived(state, sighting, proc)) and _is_of_shim(state, sighting)
        )
        if state.init in inits or by_name:
            return state
    return None


def _is_of_shim(state: RuncState, sighting: Sighting) -> bool:
    """Whether the bundle that the record names is where the shim has its own: /run/containerd/runc is one for all
    containerds, and two may have a container of the same name.
    """
    if not sighting.shim or not state.bundle:
        return True
    beside = os.path.join(os.path.dirname(sighting.shim.bundle), sighting.container_id)
    return os.path.realpath(state.bundle) == os.path.realpath(beside)


def _outlived(state: RuncState, sighting: Sighting, proc: Proc) -> bool:
    """Whether the sighted processes are what a first process that ended left under its shim (served.py)."""
    try:
        return sighting.shim is not None and state.init.pid > 1 and not proc.alive(state.init)
    except ProcError:
        return False


def _aborted_runc(sighting: Sighting) -> str:
    """The directory of a container whose creation was broken off before runc wrote a record into it, or ""."""
    if sighting.inits or not sighting.namespace:
        return ""
    return next((d for d in _runc_directories(sighting) if is_aborted_runc(d)), "")


def is_aborted_runc(directory: str) -> bool:
    """Whether it is a directory of runc's without a record: with one, somebody would have to be named by it."""
    return os.path.isdir(directory) and not os.path.lexists(f"{directory}/state.json")


def _runc_directories(sighting: Sighting) -> Iterator[str]:
    roots = [*RUNC_ROOTS]
    if sighting.shim:
        before, runtime, _ = sighting.shim.bundle.partition("/io.containerd.runtime.")
        if runtime and before.endswith(DOCKER_STATE):
            roots.insert(0, f"{before[: -len(DOCKER_STATE)]}/runtime-runc")
        if sighting.shim.runtime_root:
            roots.insert(0, sighting.shim.runtime_root)
    for root in dict.fromkeys(map(os.path.realpath, roots)):
        if sighting.namespace:
            yield f"{root}/{sighting.namespace}/{sighting.container_id}"
        elif os.path.isdir(root):
            yield from (f"{root}/{name}/{sighting.container_id}" for name in sorted(os.listdir(root)))


def read_runc_state(directory: str) -> Optional[RuncState]:
    """DIRECTORY/state.json, if it is a plain file of root's; None for anything else."""
    try:
        fd = os.open(f"{directory}/state.json", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(fd, "rb"):
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid not in (0, os.geteuid()):
            return None
        try:
            return _parse_runc_state(directory, json.loads(read_up_to(fd, MAX_STATE_BYTES)))
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return None


def _parse_runc_state(directory: str, raw: Mapping[str, Any]) -> Optional[RuncState]:
    """runc libcontainer/container_linux.go, State: init_process_start is field 22 of /proc/PID/stat."""
    config = raw.get("config") or {}
    labels = [str(label) for label in config.get("labels") or ()]
    if raw.get("id") != os.path.basename(directory):
        return None
    return RuncState(
        directory=directory,
        init=ProcessId(int(raw.get("init_process_pid") or 0), int(raw.get("init_process_start") or 0)),
        cgroups=tuple(str(path) for path in (raw.get("cgroup_paths") or {}).values()),
        bundle=next((label[len("bundle=") :] for label in labels if label.startswith("bundle=")), ""),
        rootfs=str(config.get("rootfs") or ""),
    )


def _own_netns(inits: Sequence[ProcessId], proc: Proc) -> int:
    """The inode of the network namespace of the inits, 0 where it is the host's or can't be seen."""
    try:
        host = proc.namespace(1, "net")
        found = {proc.namespace(init.pid, "net") for init in inits if proc.alive(init)}
    except ProcError:
        return 0
    return found.pop() if len(found) == 1 and host not in found else 0


def _netns_files(netns: int) -> tuple[str, ...]:
    """The files of Docker's by which the namespace is kept: after its processes, and for no other's sake."""
    return tuple(p for p in mounts.of_namespace("net", netns) if p.startswith(DOCKER_NETNS)) if netns else ()


def _addresses(inits: Sequence[ProcessId], proc: Proc) -> set[str]:
    """Its IPv4 addresses, from /proc/PID/net/fib_trie (the lines before "/32 host LOCAL")."""
    found: set[str] = set()
    if not _own_netns(inits, proc):
        return found
    for init in inits:
        last = ""
        try:
            lines = (Path("/proc") / str(init.pid) / "net/fib_trie").read_text(errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            words = line.split()
            if len(words) == 2 and words[0] == "|--":
                last = words[1]
            elif words == ["/32", "host", "LOCAL"] and not last.startswith("127."):
                found.add(last)
    return found
