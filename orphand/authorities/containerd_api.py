# SPDX-License-Identifier: Apache-2.0
"""containerd's gRPC API: the calls that orphand needs, each with a deadline.

Field numbers are those of containerd's api/services/*/v1/*.proto, the same from 1.2 to 2.x.
grpc is imported with the first call, so that a node without containerd doesn't pay for it.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Any, Callable, Optional, TypeVar, Union

from orphand.authorities import wire
from orphand.errors import OrphandError

TASKS = "/containerd.services.tasks.v1.Tasks/"
CONTAINERS = "/containerd.services.containers.v1.Containers/"
NAMESPACES = "/containerd.services.namespaces.v1.Namespaces/"
MAX_ANSWER_BYTES = 64 << 20  # a list of 10,000 tasks is 1 MiB
MAX_DETAIL = 200  # characters of an engine's words that are passed on

# grpc reads a target as a URI: "%2f", "?" or "#" in it would lead to another socket than the one that was checked
PATH = re.compile(r"/[A-Za-z0-9._/@:+-]+", re.ASCII)
GARBAGE = "GARBAGE"
NOT_FOUND = "NOT_FOUND"
NAMESPACE_HEADER = "containerd-namespace"

T = TypeVar("T")
Fields = Iterable[tuple[int, Union[str, bytes, int, bool]]]


class CallFailed(OrphandError):
    """A call that has no good answer. `code`: gRPC's name of it, such as NOT_FOUND, or GARBAGE."""

    def __init__(self, method: str, code: str, detail: str) -> None:
        """`detail` is the engine's own words."""
        super().__init__(f"{method}: {code}: {detail}"[: MAX_DETAIL + 60])
        self.code = code
        self.detail = detail[:MAX_DETAIL]


class GrpcMissing(OrphandError):
    """Python's grpc module can't be imported."""


class TaskStatus(Enum):
    """containerd.v1.types.Status."""

    UNKNOWN = 0
    CREATED = 1
    RUNNING = 2
    STOPPED = 3
    PAUSED = 4
    PAUSING = 5


@dataclass(frozen=True)
class Task:
    """A task as containerd lists it. `pid` is 0 where its shim did not answer."""

    container_id: str
    pid: int
    status: TaskStatus


def grpc_module() -> Any:
    """The grpc module. Raises GrpcMissing."""
    # grpc's fork handlers only print warnings here: orphand's children exec at once
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        return importlib.import_module("grpc")
    except ImportError as error:
        raise GrpcMissing(f"python3-grpcio is not installed ({error})") from error


class Api:
    """One connection to one containerd; a context manager. Every call takes at most `timeout` seconds.

    A connection a question, never a standing one: a channel that lost its server waits up to two
    minutes before it tries again (grpc, "connection backoff").
    """

    def __init__(self, address: str, timeout: float) -> None:
        """`address` is the path of the socket. Connects with the first call. Raises GrpcMissing, CallFailed."""
        if not PATH.fullmatch(address):
            raise CallFailed("connect", "INVALID_ARGUMENT", f"{address!r} is not a path that it is asked at")
        self._grpc = grpc_module()
        self._timeout = timeout
        self._channel = self._grpc.insecure_channel(
            f"unix:{address}",
            options=[
                ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
                ("grpc.enable_http_proxy", 0),
                ("grpc.enable_retries", 0),
                ("grpc.use_local_subchannel_pool", 1),  # else two objects share one connection and its backoff
                ("grpc.default_authority", "localhost"),
            ],
        )

    def __enter__(self) -> Api:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self._channel.close()

    def namespaces(self) -> frozenset[str]:
        """The names of all namespaces. Raises CallFailed, as all of these do."""
        return frozenset(self._each(NAMESPACES + "List", self._call(NAMESPACES + "List"), 1))

    def tasks(self, namespace: str) -> dict[str, Task]:
        """The listed tasks by id. Never proof of an absence: containerd drops or blanks those of slow shims."""
        method = TASKS + "List"
        answer = self._call(method, namespace=namespace)
        return {task.container_id: task for task in self._checked(method, lambda: _tasks(answer))}

    def task(self, namespace: str, container_id: str) -> Task:
        """One task. CallFailed with NOT_FOUND: containerd has no container of that id, or no task for it."""
        method = TASKS + "Get"
        answer = self._call(method, [(1, container_id)], namespace)
        found = self._checked(method, lambda: _tasks(answer))
        if len(found) != 1 or found[0].container_id != container_id:
            raise CallFailed(method, GARBAGE, f"asked for {container_id}, got {[t.container_id for t in found]}")
        return found[0]

    def has_container(self, namespace: str, container_id: str) -> bool:
        """Whether containerd has a record of the container, with or without a task."""
        method = CONTAINERS + "Get"
        try:
            answer = self._call(method, [(1, container_id)], namespace)
        except CallFailed as failure:
            if failure.code == NOT_FOUND:
                return False
            raise
        if self._each(method, answer, 1) != [container_id]:
            raise CallFailed(method, GARBAGE, f"asked for {container_id}, got another")
        return True

    def kill(self, namespace: str, container_id: str, signal: int, every: bool = False) -> None:
        """Signal the task's init, or every process of the task."""
        self._call(TASKS + "Kill", [(1, container_id), (3, signal), (4, every)], namespace)

    def delete_task(self, namespace: str, container_id: str) -> None:
        """Delete a stopped task: containerd then ends its shim and removes what it made for it."""
        self._call(TASKS + "Delete", [(1, container_id)], namespace)

    def delete_container(self, namespace: str, container_id: str) -> None:
        """Delete the record of a container that has no task."""
        self._call(CONTAINERS + "Delete", [(1, container_id)], namespace)

    def _call(self, method: str, fields: Fields = (), namespace: str = "") -> wire.Message:
        call = self._channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)
        metadata = ((NAMESPACE_HEADER, namespace),) if namespace else ()
        try:
            answer = call(wire.encode(fields), timeout=self._timeout, metadata=metadata)
        except self._grpc.RpcError as error:
            raise CallFailed(method, error.code().name, error.details() or "") from error
        return self._checked(method, lambda: wire.decode(answer))

    def _each(self, method: str, answer: wire.Message, name: int) -> list[str]:
        """Field `name` of each message in field 1."""
        return self._checked(method, lambda: [wire.text(m, name) for m in wire.messages(answer, 1)])

    @staticmethod
    def _checked(method: str, read: Callable[[], T]) -> T:
        try:
            return read()
        except wire.WireError as error:
            raise CallFailed(method, GARBAGE, str(error)) from error


def _tasks(answer: wire.Message) -> list[Task]:
    # the id is in field 2: the server leaves field 1 (container_id) empty in answers
    # (containerd services/tasks/local.go, processFromContainerd)
    return [
        Task(wire.text(m, 2) or wire.text(m, 1), wire.integer(m, 3), _status(wire.integer(m, 4)))
        for m in wire.messages(answer, 1)
    ]


def _status(number: int) -> TaskStatus:
    try:
        return TaskStatus(number)
    except ValueError as error:
        raise wire.WireError(f"task status {number}") from error
