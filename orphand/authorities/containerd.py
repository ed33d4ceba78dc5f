# SPDX-License-Identifier: Apache-2.0
"""containerd, asked whether it knows an id in one of its namespaces; and told to end what nobody else knows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Optional

from orphand.authorities import peers
from orphand.authorities.containerd_api import NOT_FOUND, Api, CallFailed, GrpcMissing, Task, TaskStatus
from orphand.authorities.presence import Absent, Presence, Server, boottime
from orphand.model import Claim, Role, Sighting, Testimony
from orphand.settings import Scan

# containerd identifiers/validate.go: what can be no id or namespace is never sent
IDENTIFIER = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*", re.ASCII)
MAX_IDENTIFIER = 76
END_SECONDS = 30.0  # for a call that ends something: containerd itself gives a shim several times 5 s for it
RECORD = "containerd has a record of it"


@dataclass(frozen=True)
class _Answer:
    claim: Claim
    detail: str = ""
    veto: str = ""
    pid: int = 0


def is_identifier(name: str) -> bool:
    """Whether containerd could have a container or namespace of that name."""
    return len(name) <= MAX_IDENTIFIER and IDENTIFIER.fullmatch(name) is not None


class Containerd:
    """One containerd, by the path of its socket. Blocks; every call has a deadline. For one thread at a time."""

    def __init__(self, address: str, scan: Scan) -> None:
        """Nothing is opened and grpc is not imported before the first question."""
        self.address = address
        self.name = f"containerd {address}"
        self._scan = scan
        self._server = Server(address)

    def ask(self, namespace: str, sightings: Sequence[Sighting], role: Role) -> dict[str, Testimony]:
        """What containerd says of each id, by container id. Never raises; takes at most about twice the timeout.

        A no is only NOT_FOUND of the single Get for task and container, in a namespace that containerd lists,
        from a server that is older than `settle` and the same before and after. Everything else is UNAVAILABLE.
        """
        asked_at = boottime()
        wanted = {s.container_id for s in sightings}
        running = {s.container_id for s in sightings if s.inits}
        try:
            before = self._settled(asked_at)
            self._prove(before)
            with Api(self.address, self._scan.timeout) as api:
                answers = self._answers(api, namespace, wanted, running, role, asked_at)
            if self._server.look() != before:
                raise Absent("it was restarted while it was asked")
        except (Absent, GrpcMissing, CallFailed) as failure:
            answers = dict.fromkeys(wanted, _Answer(Claim.UNAVAILABLE, str(failure)))
        return {
            name: Testimony(self.name, a.claim, asked_at, a.detail, a.veto, role, a.pid) for name, a in answers.items()
        }

    def _settled(self, now: float) -> Presence:
        presence = self._server.look()
        age = presence.age(now)
        if age < self._scan.settle:
            raise Absent(f"it started {age:.0f} s ago, and is believed after {self._scan.settle:.0f} s")
        return presence

    def _prove(self, presence: Presence) -> None:
        """Who answers must be whom /proc shows: of two servers on one path an old one may still hold what it bound."""
        try:
            pid, uid = peers.listener(self.address)
        except OSError as error:
            raise Absent(f"it does not take a connection: {error.strerror}") from error
        if pid != presence.process.pid:
            raise Absent(f"process {pid} answers there, not process {presence.process.pid}")
        if uid not in (0, os.geteuid()):
            raise Absent(f"a process of user {uid} answers there")

    def _answers(
        self, api: Api, namespace: str, wanted: set[str], running: set[str], role: Role, asked_at: float
    ) -> dict[str, _Answer]:
        if not is_identifier(namespace):
            return dict.fromkeys(wanted, _Answer(Claim.UNAVAILABLE, f"{namespace!r} is no namespace"))
        tasks = api.tasks(namespace)
        answers = {name: _known(tasks[name]) for name in wanted if name in tasks}
        absent = sorted(wanted - set(tasks))
        if absent and namespace not in api.namespaces():
            # a namespace that does not exist answers "empty, OK" (containerd core/metadata/containers.go)
            unlisted = _Answer(Claim.UNAVAILABLE, f"it does not list the namespace {namespace}")
            return {**answers, **dict.fromkeys(absent, unlisted)}
        for name in absent:
            if boottime() - asked_at > self._scan.timeout:
                answers[name] = _Answer(Claim.UNAVAILABLE, "it answers too slowly")
            else:
                answers[name] = _one(api, namespace, name, role, name in running)
        return answers

    def kill(self, namespace: str, container_id: str, signal: int, every: bool = False) -> None:
        """Send a signal to the task's init, or to all its processes. Takes at most END_SECONDS, as all of these.

        Raises CallFailed, Absent or GrpcMissing.
        """
        with self._connected() as api:
            api.kill(namespace, container_id, signal, every)

    def delete_task(self, namespace: str, container_id: str) -> None:
        """Delete a stopped task, and with it its shim. Raises as `kill` does."""
        with self._connected() as api:
            api.delete_task(namespace, container_id)

    def delete_container(self, namespace: str, container_id: str) -> None:
        """Delete the record of a container without a task. Raises as `kill` does."""
        with self._connected() as api:
            api.delete_container(namespace, container_id)

    def task(self, namespace: str, container_id: str) -> Optional[Task]:
        """Its task, None if there is none. Raises as `kill` does."""
        with self._connected() as api:
            try:
                return api.task(namespace, container_id)
            except CallFailed as failure:
                if failure.code == NOT_FOUND:
                    return None
                raise

    @contextmanager
    def _connected(self) -> Iterator[Api]:
        self._prove(self._server.look())  # and connecting must wake nobody
        with Api(self.address, max(self._scan.timeout, END_SECONDS)) as api:
            yield api


def _known(task: Task) -> _Answer:
    if task.status is TaskStatus.STOPPED:
        return _Answer(Claim.KNOWN, "task is stopped", pid=task.pid)
    detail = "" if task.pid else "its shim did not say its state"
    return _Answer(Claim.KNOWN, detail, pid=task.pid)


def _one(api: Api, namespace: str, container_id: str, role: Role, running: bool) -> _Answer:
    if not is_identifier(container_id):
        return _Answer(Claim.UNAVAILABLE, f"{container_id!r} can be no id of its")
    try:
        return _known(api.task(namespace, container_id))
    except CallFailed as failure:
        if failure.code != NOT_FOUND:
            return _Answer(Claim.UNAVAILABLE, str(failure))
    try:
        if not api.has_container(namespace, container_id):
            return _Answer(Claim.UNKNOWN)
    except CallFailed as failure:
        return _Answer(Claim.UNAVAILABLE, str(failure))
    if role is Role.KEEPER and not running:
        # what a dockerd leaves that is killed while it creates: containerd keeps it for nobody, and can delete it
        return _Answer(Claim.KNOWN, "it has a record, but no task")
    claim = Claim.UNKNOWN if role is Role.KEEPER else Claim.DISOWNED
    return _Answer(claim, "it has a record, but no task", veto=RECORD)
