# SPDX-License-Identifier: Apache-2.0
"""The words of orphand as frozen values. No I/O, no clock.

All times are seconds on the boot clock (CLOCK_BOOTTIME), so that neither a changed wall clock
nor a suspend moves a grace.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Optional


class Claim(str, Enum):
    """What one authority says about one id."""

    KNOWN = "known"
    DISOWNED = "disowned"  # it has a record, but that says exited or names another pid
    UNKNOWN = "unknown"  # a clear "no such container", in the engine's own words
    UNAVAILABLE = "unavailable"  # down, slow, starting, refused, nonsense: never a no


class Verdict(str, Enum):
    """What orphand concludes about one container."""

    MANAGED = "managed"
    PENDING = "pending"  # looks orphaned, not yet for long enough
    ORPHAN = "orphan"
    UNDECIDED = "undecided"  # an authority was unavailable
    FOREIGN = "foreign"  # nested, rootless, another engine's
    EXEMPT = "exempt"  # a rule of the admin's


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
    """Which shim it is; only RUNC_V1 and RUNC_V2 have signals that are known."""

    V1 = "v1"  # io.containerd.runtime.v1.linux, one per container
    RUNC_V1 = "runc-v1"  # containerd-shim-runc-v1, API v2
    RUNC_V2 = "runc-v2"  # containerd-shim-runc-v2, one per container or pod
    OTHER = "other"  # kata, gVisor, wasm, firecracker, v0: reported, never signalled


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


@dataclass(frozen=True)
class Init:
    """A container's first process."""

    process: ProcessId
    container_id: str
    cgroup: str  # path below the hierarchy's root, ends with the container's id or scope


@dataclass(frozen=True)
class Sighting:
    """What /proc shows of one container: its shim, its init, or both."""

    container_id: str
    namespace: str  # "" if nothing tells
    address: str  # "" if nothing tells
    shim: Optional[Shim]
    inits: tuple[Init, ...]
    seen_at: float
    siblings: tuple[str, ...] = ()  # other ids that the same shim serves
    foreign: str = ""  # why it is not ours to judge; "" if it is

    @property
    def key(self) -> tuple[str, ...]:
        """The same container in two looks: id, shim and inits, each with its start time."""
        shim = f"{self.shim.process.pid}:{self.shim.process.start}" if self.shim else ""
        inits = (f"{i.process.pid}:{i.process.start}" for i in self.inits)
        return (self.address, self.namespace, self.container_id, shim, *sorted(inits))


@dataclass(frozen=True)
class Testimony:
    """One authority's answer for one id."""

    authority: str
    claim: Claim
    asked_at: float  # before the question was sent
    detail: str = ""
    veto: str = ""  # metadata that shows an owner who may come back: at most alert


@dataclass(frozen=True)
class Judgement:
    """A verdict, and the sentence that says why."""

    verdict: Verdict
    reason: str
    kind: Optional[Kind] = None
    since: Optional[float] = None  # of the first look that found it orphaned
    veto: str = ""


@dataclass(frozen=True)
class Identity:
    """Who it was, as far as its leftovers tell. Never holds environment values."""

    name: str = ""
    image: str = ""
    pod: str = ""
    pod_namespace: str = ""
    hostname: str = ""
    command: str = ""


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
