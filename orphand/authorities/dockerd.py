# SPDX-License-Identifier: Apache-2.0
"""Finding Docker engines: the dockerd processes, and whose sockets, containerd and namespaces are theirs.

Nothing here connects to an engine, so that looking wakes none that was stopped on purpose.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

from orphand.authorities import listeners, peers
from orphand.model import ProcessId
from orphand.proc import read_up_to
from orphand.settings import DockerEngine

DEFAULT_SOCKETS = ("/run/docker.sock", "/var/run/docker.sock")
DEFAULT_CONFIG = "/etc/docker/daemon.json"
DEFAULT_DATA_ROOT = "/var/lib/docker"
DEFAULT_EXEC_ROOT = "/var/run/docker"
SYSTEM_CONTAINERD = "/run/containerd/containerd.sock"
CONTAINERD_NAMES = ("containerd.sock", "docker-containerd.sock")  # the second: Docker 17.12 to 18.06
CONFIG_LIMIT = 1 << 20
CHOICES = frozenset({"containerd", "containerd-namespace", "containerd-plugins-namespace"})
TICKS = os.sysconf("SC_CLK_TCK")
REMAPPED = re.compile(r"\d+\.\d+")  # the last part of a data-root under userns-remap: UID.GID


@dataclass(frozen=True)
class Engine:
    """One dockerd. `problem` says why it must not or can't be asked; then `process` may be None."""

    socket: str
    process: Optional[ProcessId] = None
    containerd: str = ""  # the address of its containerd; "" if nothing tells
    proven: bool = False  # the address was read from its open connection
    doubt: str = ""  # why its containerd and namespaces are only guessed; its own words (Docker 27 on) settle it
    data_root: str = DEFAULT_DATA_ROOT
    namespace: str = "moby"
    plugin_namespace: str = "plugins.moby"
    started_at: float = 0.0  # boot clock, seconds
    problem: str = ""

    @property
    def name(self) -> str:
        """How it is called in reasons."""
        return "docker" if self.socket in DEFAULT_SOCKETS else f"docker at {self.socket}"


def same_socket(one: str, other: str) -> bool:
    """Do both paths name one socket? By device and inode, or resolved where neither exists."""
    if not one or not other:
        return False
    try:
        a, b = os.stat(one), os.stat(other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)


@dataclass(frozen=True)
class Stranger:
    """A dockerd that is not the host's own: in a container, or a user's. It is never asked."""

    process: ProcessId
    containerd: tuple[str, ...]  # where it may look for its containerd, in its own mount namespace

    def uses(self, address: str, proc: Path = Path("/proc")) -> bool:
        """May it use this containerd of the host's, through a socket that was mounted for it?"""
        try:
            ours = os.stat(address)
        except OSError:
            return False
        root = proc / str(self.process.pid) / "root"
        return any(_is_file(f"{root}{path}", ours) for path in self.containerd)


def _is_file(path: str, wanted: os.stat_result) -> bool:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return False
    return (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino)


class Finder:
    """Finds the engines. What a process doesn't change while it lives is read once."""

    def __init__(
        self,
        configured: Optional[Sequence[DockerEngine]],
        proc: Path = Path("/proc"),
        config: str = DEFAULT_CONFIG,
        host: int = 1,
    ) -> None:
        """`host` is the process whose namespaces are the host's."""
        self._configured = configured
        self._proc = proc
        self._config = config
        self._host = host
        self._known: dict[ProcessId, Engine] = {}
        self._strangers: tuple[Stranger, ...] = ()

    @property
    def strangers(self) -> tuple[Stranger, ...]:
        """Those that the last thorough look found and that still run."""
        return tuple(s for s in self._strangers if process_id(s.process.pid, self._proc) == s.process)

    def look(self, thorough: bool = True, shims: Container[int] = ()) -> list[Engine]:
        """All engines that are configured, or else found. Not `thorough`: only known ones and children of PID 1.

        `shims`: the pids of those, which are most of PID 1's children on a busy node.
        """
        if self._configured is not None and not self._configured:
            return []
        pids = all_pids(self._proc) if thorough else self._likely(shims)
        dockerds = self._without_forks(dict.fromkeys(filter(None, (named(p, "dockerd", self._proc) for p in pids))))
        own = [p for p in dockerds if is_hosts_own(p.pid, self._proc, self._host)]
        if thorough:
            self._strangers = tuple(self._stranger(p) for p in dockerds if p not in own)
        found = {p: self._describe(p) for p in own}
        self._known = {p: e for p, e in found.items() if not e.problem}
        if self._configured is None:
            return [*found.values(), *self._stopped(found)]
        return [self._match(wanted, found) for wanted in self._configured]

    def _without_forks(self, dockerds: Iterable[ProcessId]) -> list[ProcessId]:
        """Without the children of one of them: what a dockerd is about to execute has its name and its sockets until
        then, and on a busy node that takes a while.
        """
        found = list(dockerds)
        pids = {process.pid for process in found}
        return [p for p in found if parent_of(p.pid, self._proc) not in pids]

    def _likely(self, shims: Container[int]) -> Iterator[int]:
        yield from (p.pid for p in self._known)
        try:
            with open(f"{self._proc}/1/task/1/children") as file:
                children = file.read()
        except OSError:  # a kernel without CONFIG_PROC_CHILDREN
            yield from all_pids(self._proc)
            return
        yield from (pid for pid in map(int, children.split()) if pid not in shims)

    def _stranger(self, process: ProcessId) -> Stranger:
        told = list(_values(read_argv(process.pid, self._proc), ("--containerd",)))
        return Stranger(process, (*told, *_usual_containerds(DEFAULT_EXEC_ROOT)))

    def _describe(self, process: ProcessId) -> Engine:
        known = self._known.get(process)
        if known and known.proven:
            return known
        argv = read_argv(process.pid, self._proc)
        path = _last(argv, ("--config-file",)) or self._config
        config = read_json(path)
        options = _Options(argv, config)
        socket, problem = self._socket(process, options)
        containerd, proven, doubt = self._containerd(process, options)
        if not CHOICES.isdisjoint(config) and _is_newer(path, process):
            proven, doubt = False, f"{path} was changed after dockerd started"
        return Engine(
            socket=socket,
            process=process,
            containerd=containerd,
            proven=proven,
            doubt=doubt,
            data_root=options.one("--data-root", "data-root", "--graph", "-g") or DEFAULT_DATA_ROOT,
            namespace=options.one("--containerd-namespace", "containerd-namespace") or "moby",
            plugin_namespace=options.one("--containerd-plugins-namespace", "containerd-plugins-namespace")
            or "plugins.moby",
            started_at=process.start / TICKS,
            problem=problem,
        )

    def _socket(self, process: ProcessId, options: _Options) -> tuple[str, str]:
        """The API's socket: of those it really listens on, the one that is configured or has the usual name."""
        held = self._listens_on(process.pid)
        wanted = [path for host in options.hosts() for path in _socket_of_host(host)]
        for path in (*wanted, *DEFAULT_SOCKETS):
            for bound in held:
                if os.path.realpath(bound) == os.path.realpath(path):
                    return path, ""
        for bound in held:
            if os.path.basename(bound) == "docker.sock":
                return bound, ""
        path = wanted[0] if wanted else DEFAULT_SOCKETS[0]
        return path, f"dockerd (pid {process.pid}) does not listen on {path}: name its socket under docker:"

    def _listens_on(self, pid: int) -> list[str]:
        try:
            own = set(peers.socket_inodes(pid, self._proc))
            return [path for inode, path in listeners.listening(self._proc) if inode in own and path.startswith("/")]
        except OSError:
            return []

    def _containerd(self, process: ProcessId, options: _Options) -> tuple[str, bool, str]:
        """(address, proven, doubt) of its containerd: what it is connected to, or was told, or Docker's own rule."""
        told = options.one("--containerd", "containerd")
        try:
            connected = peers.connected_to(process.pid, self._proc)
        except OSError:
            connected = frozenset()
        for bound in sorted(connected, key=lambda b: b.path):
            if (told and bound.is_file(told)) or os.path.basename(bound.path) in CONTAINERD_NAMES:
                return bound.path, True, ""
        rule = _usual_containerds(options.one("--exec-root", "exec-root") or DEFAULT_EXEC_ROOT)
        doubt = "" if told else "it can't be seen which containerd dockerd uses"
        return told or next((path for path in rule if os.path.exists(path)), ""), False, doubt

    def _match(self, wanted: DockerEngine, found: Mapping[ProcessId, Engine]) -> Engine:
        engine = self._holder(wanted.socket, found)
        if engine is None:
            return Engine(wanted.socket, containerd=wanted.containerd, problem=self._why_nobody(wanted.socket))
        engine = replace(engine, socket=wanted.socket, problem="")
        if wanted.data_root:
            engine = replace(engine, data_root=wanted.data_root)
        if not wanted.containerd:
            return engine
        if engine.proven and not same_socket(engine.containerd, wanted.containerd):
            problem = f"it is connected to {engine.containerd}, not to {wanted.containerd} as configured"
            return replace(engine, problem=problem)
        return replace(engine, containerd=wanted.containerd, doubt="")

    def _holder(self, socket: str, found: Mapping[ProcessId, Engine]) -> Optional[Engine]:
        inodes = listeners.listening_inodes(socket, self._proc)
        return next((e for p, e in found.items() if listeners.holds(inodes, p, self._proc)), None)

    def _why_nobody(self, socket: str) -> str:
        inodes = listeners.listening_inodes(socket, self._proc)
        if not inodes:
            return f"nobody listens on {socket}"
        if self._held_by_init(inodes):
            return stopped(socket)
        return f"it is not a dockerd that listens on {socket}"

    def _held_by_init(self, inodes: frozenset[int]) -> bool:
        return bool(listeners.holders(inodes, [ProcessId(1, 0)], self._proc))

    def _stopped(self, found: Mapping[ProcessId, Engine]) -> Iterator[Engine]:
        """The usual socket, where systemd holds it for a dockerd that doesn't run."""
        for socket in {os.path.realpath(path): path for path in reversed(DEFAULT_SOCKETS)}.values():
            inodes = listeners.listening_inodes(socket, self._proc)
            if not inodes or any(listeners.holds(inodes, process, self._proc) for process in found):
                continue
            if self._held_by_init(inodes):
                yield Engine(socket, problem=stopped(socket))
                return


def _usual_containerds(exec_root: str) -> list[str]:
    """Where a dockerd that is told nothing looks for a containerd, or puts one of its own."""
    return [SYSTEM_CONTAINERD, *(os.path.join(exec_root, "containerd", name) for name in CONTAINERD_NAMES)]


def stopped(socket: str) -> str:
    """Why an engine behind its socket unit is not asked."""
    return f"docker.service is stopped; asking at {socket} would wake it"


def absence(engine: Engine, proc: Path = Path("/proc")) -> str:
    """Why the engine that was found is not (or no longer) the one behind its socket; "" if it is."""
    process, path = engine.process, engine.socket
    if process is None:
        return f"no dockerd runs behind {path}"
    if process_id(process.pid, proc) != process:
        return f"dockerd (pid {process.pid}) has ended"
    try:
        inodes = listeners.listening_inodes(path, proc)
    except OSError as error:
        return f"can't see who listens on {path}: {error.strerror}"
    if not listeners.holds(inodes, process, proc):
        return f"dockerd (pid {process.pid}) no longer listens on {path}"
    return ""


@dataclass(frozen=True)
class _Options:
    """dockerd's options: the command line, then daemon.json (dockerd refuses one that is in both)."""

    argv: Sequence[str]
    config: Mapping[str, Any]

    def one(self, flag: str, key: str, *more_flags: str) -> str:
        """The last value of the flag, or the string under the key."""
        value = _last(self.argv, (flag, *more_flags)) or self.config.get(key) or ""
        return value if isinstance(value, str) else ""

    def hosts(self) -> list[str]:
        """What it was told to listen on."""
        listed = self.config.get("hosts")
        listed = listed if isinstance(listed, list) else []
        return [*_values(self.argv, ("-H", "--host")), *(h for h in listed if isinstance(h, str))]


def _socket_of_host(host: str) -> Iterator[str]:
    if host.startswith("unix://"):
        yield host[len("unix://") :] or DEFAULT_SOCKETS[1]


def _values(argv: Sequence[str], flags: Sequence[str]) -> Iterator[str]:
    """The values of a flag in the forms that dockerd's parser takes: `-H x`, `-Hx`, `-H=x`, `--host x`, `--host=x`."""
    for index, argument in enumerate(argv):
        for flag in flags:
            if argument == flag:
                yield from argv[index + 1 : index + 2]
            elif argument.startswith(flag + "="):
                yield argument[len(flag) + 1 :]
            elif len(flag) == 2 and argument.startswith(flag):
                yield argument[2:]


def _last(argv: Sequence[str], flags: Sequence[str]) -> str:
    return ["", *_values(argv, flags)][-1]


def all_pids(proc: Path = Path("/proc")) -> list[int]:
    """Every process there is."""
    return [int(name) for name in os.listdir(proc) if name.isdigit()]


def named(pid: int, name: str, proc: Path = Path("/proc")) -> Optional[ProcessId]:
    """The process, if its executable is called so, also after an upgrade replaced the file."""
    directory = f"{proc}/{pid}"
    try:
        fd = os.open(f"{directory}/comm", os.O_RDONLY | os.O_CLOEXEC)
        try:
            comm = os.read(fd, 64)
        finally:
            os.close(fd)
        if comm.strip() != name[:15].encode():
            return None
        exe = os.readlink(f"{directory}/exe")
    except OSError:
        return None
    if os.path.basename(exe.removesuffix(" (deleted)")) != name:
        return None
    return process_id(pid, proc)


def process_id(pid: int, proc: Path = Path("/proc")) -> Optional[ProcessId]:
    """Pid and start time, or None if it has ended (a zombie has)."""
    fields = _stat_fields(pid, proc)
    if len(fields) < 20 or fields[0] in (b"Z", b"X"):
        return None
    return ProcessId(pid, int(fields[19]))


def parent_of(pid: int, proc: Path = Path("/proc")) -> int:
    """The pid of its parent, 0 if it has ended."""
    fields = _stat_fields(pid, proc)
    return int(fields[1]) if len(fields) > 1 else 0


def _stat_fields(pid: int, proc: Path) -> list[bytes]:
    """/proc/PID/stat from the third field on (proc(5)); empty if there is no such process."""
    try:
        with open(f"{proc}/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()
    except OSError:
        return []


def is_hosts_own(pid: int, proc: Path = Path("/proc"), host: int = 1) -> bool:
    """Root's, and in the mount, pid and user namespace of the host's process: not rootless, not in a container."""
    try:
        with open(f"{proc}/{pid}/status", errors="replace") as file:
            status = file.read()
        ours = all(
            os.readlink(f"{proc}/{pid}/ns/{kind}") == os.readlink(f"{proc}/{host}/ns/{kind}")
            for kind in ("mnt", "pid", "user")
        )
    except OSError:
        return False
    uids = next((line.split()[1:] for line in status.splitlines() if line.startswith("Uid:")), [])
    return ours and bool(uids) and set(uids) == {"0"}


def read_argv(pid: int, proc: Path = Path("/proc")) -> list[str]:
    """The command line without argv[0]; empty if it can't be read."""
    try:
        with open(f"{proc}/{pid}/cmdline", "rb") as file:
            return [os.fsdecode(a) for a in read_up_to(file.fileno(), 1 << 17).split(b"\0")][1:-1]
    except OSError:
        return []


def _is_newer(path: str, process: ProcessId) -> bool:
    """Was the file changed after the process started? By the wall clock, as files have it."""
    try:
        changed = os.stat(path).st_mtime
    except OSError:
        return False
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - process.start / TICKS
    return changed > time.time() - age + 1.0 / TICKS


def read_json(path: str) -> Mapping[str, Any]:
    """A JSON object, or {} for whatever isn't one."""
    try:
        with open(path, "rb") as file:
            content = json.loads(read_up_to(file.fileno(), CONFIG_LIMIT))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
