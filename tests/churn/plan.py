# SPDX-License-Identifier: Apache-2.0
"""From a seed to a plan: what is lived, lost and disturbed. Pure; the same arguments make the same plan."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

KINDS = ("engine_orphan", "stopped_orphan", "leaked_shim", "childless_shim", "shimless", "shared_member")
DISTURBANCES = (
    "restart-docker",
    "restart-containerd",
    "kill-docker",
    "kill-containerd",
    "kill-both",
    "stop-docker",
    "stop-containerd",
    "disk-load",
    "without-live-restore",
)
BURST = 10  # lives that begin at once


@dataclass(frozen=True)
class Life:
    """One container: how it is created, what is done to it, how it ends. Times are seconds."""

    number: int
    command: str  # see life.COMMANDS
    runtime: str  # v1 | v2
    exit_after: float  # commands that exit by themselves
    host: dict[str, Any] = field(default_factory=dict)  # Docker's HostConfig
    health: bool = False
    steps: tuple[tuple[str, float], ...] = ()  # (what, seconds afterwards)
    end: str = "rm-f"
    burst: bool = False


@dataclass(frozen=True)
class Event:
    """What happens once `at` lives have begun. `calm`: leave orphand the time to end an orphan afterwards."""

    at: int
    what: str  # one of KINDS or DISTURBANCES
    count: int = 1
    seconds: float = 0.0
    calm: bool = True
    quiesce: bool = False  # no call to Docker is in flight when it begins
    victims: tuple[Life, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything that a run will do."""

    seed: int
    residents: tuple[Life, ...]
    lives: tuple[Life, ...]
    events: tuple[Event, ...]


def make_plan(seed: int, lives: int, every: int, cgroup: str) -> Plan:
    """`every`: an orphan is injected about every so many lives, and about as often something is disturbed."""
    dice = random.Random(f"{seed} {lives} {every} {cgroup}")
    residents = tuple(_resident(dice, -1 - i, cgroup) for i in range(10))
    events = sorted((*_injections(dice, lives, every, cgroup), *_disturbances(dice, lives, every)), key=lambda e: e.at)
    return Plan(seed, residents, _lives(dice, lives, cgroup), tuple(events))


def _lives(dice: random.Random, count: int, cgroup: str) -> tuple[Life, ...]:
    made: list[Life] = []
    while len(made) < count:
        burst = dice.random() < 0.006
        for _ in range(min(BURST if burst else 1, count - len(made))):
            made.append(_life(dice, len(made) + 1, cgroup, burst))
    return tuple(made)


def _runtime(dice: random.Random, cgroup: str) -> str:
    return "v1" if cgroup == "v1" and dice.random() < 0.4 else "v2"  # Docker refuses the v1 shim on cgroup v2


def _host(dice: random.Random, cgroup: str, number: int) -> dict[str, Any]:
    host: dict[str, Any] = {"NetworkMode": "none"}
    if dice.random() < 0.15:
        host["Init"] = True
    if dice.random() < 0.1:
        host["PidMode"] = "host"
    if dice.random() < 0.2:
        host["CgroupnsMode"] = dice.choice(["host", "private"])
    if dice.random() < 0.12:
        host["CgroupParent"] = "/churn/deep" if cgroup == "v1" else "churn.slice"
    if dice.random() < 0.08:
        # --privileged: every capability but the one that a nested host does not have itself
        host.update(CapAdd=["ALL"], CapDrop=["SYS_RESOURCE"], SecurityOpt=["seccomp=unconfined"])
    network = dice.random()
    if network < 0.10:
        host["NetworkMode"] = "bridge"
    elif network < 0.14:
        host["NetworkMode"] = "host"
    elif network < 0.17:
        host.update(NetworkMode="bridge", PortBindings={"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": ""}]})
    if dice.random() < 0.05:
        host["IpcMode"] = "shareable"
    if dice.random() < 0.1:
        host["ReadonlyRootfs"] = True
    if dice.random() < 0.8:
        host["LogConfig"] = {"Type": "none"}
    return host


def _life(dice: random.Random, number: int, cgroup: str, burst: bool) -> Life:
    command = dice.choices(["sleep", "trap", "family", "exit"], [35, 20, 10, 35])[0]
    exit_after = round(dice.uniform(0.1, 1.5), 2)
    host = _host(dice, cgroup, number)
    if command == "exit":
        steps: tuple[tuple[str, float], ...] = ()
        end = dice.choices(["auto-remove", "exit-rm", "restart-policy"], [60, 25, 15])[0]
        if end == "auto-remove":
            host["AutoRemove"] = True
        if end == "restart-policy":
            policy = dice.choice(["on-failure", "always", "unless-stopped"])
            host["RestartPolicy"] = {"Name": policy, "MaximumRetryCount": 3 if policy == "on-failure" else 0}
    else:
        steps = _steps(dice)
        end = dice.choices(
            ["rm-f", "kill-rm", "stop-rm", "auto-kill", "never-started", "rm-paused"], [40, 20, 15, 15, 6, 4]
        )[0]
        if end == "auto-kill":
            host["AutoRemove"] = True
        elif dice.random() < 0.15:
            host["RestartPolicy"] = {"Name": dice.choice(["always", "unless-stopped"]), "MaximumRetryCount": 0}
    health = dice.random() < 0.07
    return Life(number, command, _runtime(dice, cgroup), exit_after, host, health, steps, end, burst)


def _steps(dice: random.Random) -> tuple[tuple[str, float], ...]:
    many = dice.choices([0, 1, 2, 3], [45, 30, 15, 10])[0]
    what = ["exec", "exec-long", "pause", "restart", "rename", "kill-start", "inspect", "top", "wait"]
    names = dice.choices(what, [20, 6, 15, 10, 10, 8, 6, 5, 20], k=many)
    return tuple((name, round(dice.uniform(0.0, 1.2), 2)) for name in names)


def _resident(dice: random.Random, number: int, cgroup: str) -> Life:
    """They differ on purpose: the first ones cover what a killer could trip over."""
    index = -1 - number
    host: dict[str, Any] = {"NetworkMode": "none"}
    special: tuple[dict[str, Any], ...] = (
        {"PidMode": "host"},
        {"CgroupParent": "/churn/resident" if cgroup == "v1" else "churn.slice"},
        {"NetworkMode": "bridge", "PortBindings": {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "18080"}]}},
        {"Init": True, "CapAdd": ["ALL"], "CapDrop": ["SYS_RESOURCE"]},
        {"CgroupnsMode": "host", "IpcMode": "shareable"},
        {"RestartPolicy": {"Name": "always", "MaximumRetryCount": 0}},
        {"NetworkMode": "host", "PidMode": "host", "CgroupnsMode": "private"},
    )
    host.update(special[index] if index < len(special) else _host(dice, cgroup, number))
    runtime = "v1" if cgroup == "v1" and index % 2 else "v2"
    return Life(number, dice.choice(["sleep", "family", "trap"]), runtime, 0.0, host, health=index == 4)


def _victim(dice: random.Random, number: int, cgroup: str) -> Life:
    host = _host(dice, cgroup, number)
    return Life(number, dice.choice(["sleep", "trap", "family"]), _runtime(dice, cgroup), 0.0, host)


def _injections(dice: random.Random, lives: int, every: int, cgroup: str) -> list[Event]:
    kinds: list[str] = []
    events = []
    for slot in range(lives // every):
        if not kinds:
            kinds = list(KINDS)
            dice.shuffle(kinds)
        kind = kinds.pop()
        count = 1 if kind == "shared_member" else dice.choices([1, 2, 3], [75, 17, 8])[0]
        at = slot * every + dice.randint(1, every)
        number = 1_000_000 + slot * 10
        victims = () if kind == "shared_member" else tuple(_victim(dice, number + i, cgroup) for i in range(count))
        events.append(Event(at, kind, count, 0.0, dice.random() < 0.8, dice.random() < 0.4, victims))
    return events


def _disturbances(dice: random.Random, lives: int, every: int) -> list[Event]:
    events = []
    for slot in range(lives // every):
        what = dice.choices(DISTURBANCES, [14, 14, 12, 10, 8, 12, 12, 12, 6])[0]
        seconds = {"disk-load": 6.0, "without-live-restore": 5.0}.get(what, round(dice.uniform(1.0, 9.0), 1))
        events.append(Event(slot * every + dice.randint(1, every), what, 1, seconds, dice.random() < 0.5))
    return events
