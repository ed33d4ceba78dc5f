# SPDX-License-Identifier: Apache-2.0
"""A gRPC server that plays containerd, for what the real one can't be made to do on order: faults.

What it says in health is compared with the real containerd in tests/containerd.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Union

import grpc

from orphand.authorities import wire

LIST = "/containerd.services.tasks.v1.Tasks/List"
GET = "/containerd.services.tasks.v1.Tasks/Get"
CONTAINER = "/containerd.services.containers.v1.Containers/Get"
NAMESPACES = "/containerd.services.namespaces.v1.Namespaces/List"

Reply = Union[bytes, grpc.StatusCode, Callable[[], bytes]]


def task(container_id: str, pid: int = 4242, status: int = 2) -> bytes:
    return wire.encode([(2, container_id), (3, pid), (4, status)])


def repeated(*items: bytes) -> bytes:
    return wire.encode([(1, item) for item in items])


def named(name: str) -> bytes:
    return repeated(wire.encode([(1, name)]))


HEALTHY: Mapping[str, Reply] = {
    LIST: repeated(task("web"), task("done", status=3), task("slow", pid=0, status=0)),
    GET: grpc.StatusCode.NOT_FOUND,
    CONTAINER: grpc.StatusCode.NOT_FOUND,
    NAMESPACES: repeated(wire.encode([(1, "moby")]), wire.encode([(1, "default")])),
}


class _Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, replies: Mapping[str, Reply], asked: list[tuple[str, bytes, str]]) -> None:
        self._replies = replies
        self._asked = asked

    def service(self, details: Any) -> Any:
        namespace = dict(details.invocation_metadata).get("containerd-namespace", "")

        def answer(request: bytes, context: Any) -> bytes:
            self._asked.append((details.method, request, namespace))
            reply = self._replies.get(details.method, grpc.StatusCode.UNIMPLEMENTED)
            if isinstance(reply, grpc.StatusCode):
                context.abort(reply, "as the test says")
            return reply() if callable(reply) else reply  # type: ignore[return-value]

        return grpc.unary_unary_rpc_method_handler(answer)


@contextmanager
def containerd_server(path: str, **changed: Reply) -> Iterator[list[tuple[str, bytes, str]]]:
    """Serve at `path`; `changed` by the names LIST, GET, … in lower case. Gives the list of what it is asked."""
    names = {"list": LIST, "get": GET, "container": CONTAINER, "namespaces": NAMESPACES}
    asked: list[tuple[str, bytes, str]] = []
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    replies = {**HEALTHY, **{names[name]: reply for name, reply in changed.items()}}
    server.add_generic_rpc_handlers((_Handler(replies, asked),))
    server.add_insecure_port(f"unix:{path}")
    server.start()
    try:
        yield asked
    finally:
        server.stop(None).wait()


def hang(released: threading.Event) -> Callable[[], bytes]:
    """A reply that comes only once the test is over."""

    def reply() -> bytes:
        released.wait(60)
        return b""

    return reply
