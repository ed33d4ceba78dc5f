# SPDX-License-Identifier: Apache-2.0
"""The words of orphand as frozen values. No I/O, no clock.

All times are seconds on the boot clock (CLOCK_BOOTTIME), so that neither a changed wall clock
nor a suspend moves a grace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Optional


class Claim(str, Enum):
    """What one authority says about one id."""

    KNOWN = "known"
    DISOWNED = "disowned"  # it has a record, but that says exited or names another pid
    UNKNOWN = "unknown"  # a clear "no such container", in the engine's own words
    UNAVAILABLE = "unavailable"  # down, slow, starting, refused, nonsense: never a no


class Role(str, Enum):
    """What an authority's yes is worth."""

    OWNER = "owner"  # whoever created the container: its yes makes it managed
    KEEPER = "keeper"  # runs it for an owner (containerd under Docker): its yes alone makes an engine-orphan


class Verdict(str, Enum):
    """What orphand concludes about one container."""

    MANAGED = "managed"
    PENDING = "pending"  # looks orphaned, not yet for long enough
    ORPHAN = "orphan"
    UNDECIDED = "undecided"  # an authority was unavailable
    FOREIGN = "foreign"  # nested, rootless, another engine's
    EXEMPT = "exempt"  # a rule of the admin's


SUSPECTS = frozenset({Verdict.PENDING, Verdict.ORPHAN})


class Kind(str, Enum):
    """What kind of orphan it is, which says how it ends."""

    ENGINE_ORPHAN = "engine-orphan"
    LEAKED_SHIM = "leaked-shim"
    CHILDLESS_SHIM = "childless-shim"
    DUPLICATE_SHIM = "duplicate-shim"
    SHIMLESS = "shimless"
    DISOWNED = "disowned"


class Action(str, Enum):
    """What the policy does about an orphan."""

    LOG = "log"
    ALERT = "alert"
    KILL = "kill"


class Generation(str, Enum):
    """Which shim it is; OTHER's signals are not known, so it is reported and never signalled."""

    V1 = "v1"  # io.containerd.runtime.v1.linux, one per container
    RUNC_V1 = "runc-v1"  # containerd-shim-runc-v1, API v2
    RUNC_V2 = "runc-v2"  # containerd-shim-runc-v2, one per container or pod
    OTHER = "other"  # kata, gVisor, wasm, firecracker, v0


@dataclass(frozen=True, order=True)
class ProcessId:
    """A process that can't be mistaken for a later one with the same pid.

    `start` is field 22 of /proc/PID/stat: clock ticks after boot (proc(5)).
    """

    pid: int
    start: int


@dataclass(frozen=True)
class Shim:
    """A serving shim, as /proc shows it."""

    process: ProcessId
    generation: Generation
    exe: str
    namespace: str
    container_id: str  # its own -id: of a pod's shim the sandbox's
    address: str  # its -address: containerd's socket, as written
    bundle: str  # its cwd, without " (deleted)"
    ppid: int
    runtime_root: str = ""  # v1: its -runtime-root; "" where argv doesn't say


@dataclass(frozen=True)
class Init:
    """A container's first process."""

    process: ProcessId
    container_id: str
    cgroup: str  # path below the hierarchy's root, ends with the container's id or scope
    pid_namespace: int = 0  # its inode; 0 where it is the host's or can't be seen
    leads: bool = False  # it is PID 1 of that namespace: everybody in there dies with it


@dataclass(frozen=True)
class Sighting:
    """What /proc shows of one container: its shim, its init, or both."""

    container_id: str
    namespace: str  # "" if nothing tells
    address: str  # "" if nothing tells
    shim: Optional[Shim]
    inits: tuple[Init, ...]
    seen_at: float  # boot clock, before the first read of the look
    siblings: tuple[str, ...] = ()  # other ids that the same shim serves
    foreign: str = ""  # why it is not ours to judge; "" if it is
    veto: str = ""  # why it must not be signalled although it may be judged; "" if nothing
    metadata: str = ""  # Docker's metadata of it that is still there; "" if none: a veto, unless Docker disowns it
    owns_socket: Optional[bool] = None  # of two shims for one id: does it hold the live socket? None: not looked

    @cached_property
    def key(self) -> tuple[str, ...]:
        """The same container in two looks: id, shim and inits, each with its start time."""
        shim = f"{self.shim.process.pid}:{self.shim.process.start}" if self.shim else ""
        inits = (f"{i.process.pid}:{i.process.start}" for i in self.inits)
        return (self.address, self.namespace, self.container_id, shim, *sorted(inits))

    @property
    def name(self) -> tuple[str, str, str]:
        """What an authority is asked for: the same for two shims that claim one id."""
        return (self.address, self.namespace, self.container_id)

    @property
    def processes(self) -> tuple[ProcessId, ...]:
        """Every process that the sighting names, the shim first."""
        shim = (self.shim.process,) if self.shim else ()
        return (*shim, *(i.process for i in self.inits))


@dataclass(frozen=True)
class Testimony:
    """One authority's answer for one id."""

    authority: str
    claim: Claim
    asked_at: float  # before the question was sent
    detail: str = ""
    veto: str = ""  # metadata that shows an owner who may come back: at most alert
    role: Role = Role.OWNER
    pid: int = 0  # the init's pid in the authority's own record; 0 if it names none


@dataclass(frozen=True)
class Judgement:
    """A verdict, and the sentence that says why."""

    verdict: Verdict
    reason: str
    kind: Optional[Kind] = None
    since: Optional[float] = None  # of the first look that found it orphaned
    veto: str = ""  # why it must not be killed although it is an orphan


@dataclass(frozen=True)
class Identity:
    """Who it was, as far as its leftovers tell. Never holds environment values."""

    name: str = ""
    image: str = ""
    pod: str = ""
    pod_namespace: str = ""
    hostname: str = ""
    command: str = ""
    started: str = ""  # wall clock, ISO 8601, of the init or else the shim
    ports: tuple[str, ...] = ()
    mounts: tuple[str, ...] = ()  # destinations with their sources


@dataclass(frozen=True)
class Case:
    """One container with everything that is known about it after a look."""

    sighting: Sighting
    testimonies: tuple[Testimony, ...]
    judgement: Judgement
    identity: Identity = Identity()


@dataclass(frozen=True)
class Decision:
    """What will be done about one orphan, and by which rule."""

    action: Action
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What an end came to."""

    ended: bool  # a second look proved that no process of it is left
    refused: str = ""  # why nothing was sent; "" if something was
    steps: tuple[str, ...] = ()  # what was done, in order
    left: tuple[str, ...] = ()  # what remains, and what to do by hand

    @property
    def complete(self) -> bool:
        """Nothing of it is left: no process, and nothing else."""
        return self.ended and not self.left


@dataclass(frozen=True)
class Survey:
    """One whole look at the node."""

    cases: tuple[Case, ...]
    seen_at: float
    complete: bool = True  # a full sweep, not only the children of PID 1 and the engines
    blind: tuple[str, ...] = ()  # what could not be seen, and why (not root, an engine that is silent)
    fields: Mapping[str, str] = field(default_factory=dict)
