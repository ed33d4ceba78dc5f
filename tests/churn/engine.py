# SPDX-License-Identifier: Apache-2.0
"""Docker's API over its socket: one connection for each call, so that a dying engine breaks one call only."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any, Optional

SOCKET = "/run/docker.sock"


class Away(Exception):
    """The engine gave no whole answer: whether it did what was asked is not known."""


class _Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(SOCKET)


class Gate:
    """Holds back new calls. While dockerd is down on purpose, a connection to docker.socket would start it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._closed = False
        self._inside = 0

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Around one call: waits while the gate is closed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def closed(self, quiesce: bool) -> Iterator[None]:
        """No new call inside. `quiesce`: and those under way have ended (for at most 20 s)."""
        with self._changed:
            self._closed = True
            if quiesce:
                self._changed.wait_for(lambda: self._inside == 0, timeout=20)
        try:
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()


class Docker:
    """Calls that return (status, decoded body). Raises Away."""

    def __init__(self, gate: Optional[Gate] = None) -> None:
        self.gate = gate or Gate()

    def call(self, method: str, path: str, body: Any = None, timeout: float = 60.0) -> tuple[int, Any]:
        with self.gate.passing():
            return self._call(method, path, body, timeout)

    def _call(self, method: str, path: str, body: Any, timeout: float) -> tuple[int, Any]:
        connection = _Connection("docker", timeout=timeout)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
            answer = connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise Away(f"{method} {path}: {type(error).__name__}: {error}") from None
        finally:
            connection.close()
        try:
            return answer.status, json.loads(text) if text else None
        except ValueError:
            return answer.status, text.decode(errors="replace")

    @functools.cached_property
    def drops_what_is_missing(self) -> bool:
        """Whether `privileged` works without CAP_SYS_RESOURCE: newer engines give what there is (seen with 26.1)."""
        _, version = self.call("GET", "/version")
        return tuple(map(int, version["ApiVersion"].split("."))) >= (1, 42)

    def inspect(self, name: str) -> tuple[int, Any]:
        return self.call("GET", f"/containers/{name}/json")
