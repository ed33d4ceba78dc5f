# SPDX-License-Identifier: Apache-2.0
"""A real HTTP server on a Unix socket that speaks like dockerd, or as badly as a test wants.

A stand-in only because the real dockerd doesn't misbehave on demand; what it really says is in tests/engine.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

from orphand.authorities import docker
from orphand.authorities.dockerd import Engine, process_id

Behaviour = Callable[[socket.socket], None]
ID = "ab" * 32
OTHER = "cd" * 32


def http(status: str, body: bytes, kind: str = "application/json", server: str = "Docker/20.10.24 (linux)") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nServer: {server}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def says(status: str, document: Any, **more: str) -> Behaviour:
    return sends(http(status, json.dumps(document).encode(), **more))


def sends(data: bytes) -> Behaviour:
    return lambda connection: connection.sendall(data)


def no_such_container(container_id: str = ID, **more: str) -> Behaviour:
    return says("404 Not Found", {"message": f"No such container: {container_id}"}, **more)


def record(container_id: str = ID, **state: Any) -> Behaviour:
    return says("200 OK", {"Id": container_id, "State": {"Status": "running", "Running": True, "Pid": 0, **state}})


class DockerServer:
    """Answers by path (without the version); 404 like dockerd's router for others."""

    def __init__(self, path: Path, data_root: Path) -> None:
        self.path = str(path)
        self.asked: list[str] = []
        self.closing = threading.Event()
        self.answers: dict[str, Behaviour] = {
            "/version": says("200 OK", {"ApiVersion": "1.41", "MinAPIVersion": "1.12"}),
            "/info": says("200 OK", {"DockerRootDir": str(data_root), "ServerVersion": "20.10.24"}),
            docker.LIST: says("200 OK", []),
        }
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(self.path)
        self._socket.listen(16)
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def inspect(self, behaviour: Behaviour, container_id: str = ID) -> None:
        self.answers[f"/containers/{container_id}/json"] = behaviour

    def engine(self, **changes: Any) -> Engine:
        """The engine that this process is: it holds the socket."""
        process = process_id(os.getpid())
        return Engine(**{"socket": self.path, "process": process, "data_root": "", "started_at": 1.0, **changes})

    def close(self) -> None:
        self.closing.set()
        for connection in (self._socket, *self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _serve(self) -> None:
        while not self.closing.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self._connections.append(connection)
            threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while (path := _read_request(connection)) is not None:
                self.asked.append(path)
                bare = "/" + path.split("/", 2)[2] if path.startswith("/v1.") else path
                behaviour = self.answers.get(bare) or self.answers.get(bare.split("?")[0])
                (behaviour or says("404 Not Found", {"message": "page not found"}))(connection)


def _read_request(connection: socket.socket) -> Optional[str]:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(4096)
        if not piece:
            return None
        data += piece
    return data.split(b" ")[1].decode()


@contextlib.contextmanager
def docker_server(directory: Path) -> Iterator[DockerServer]:
    data_root = directory / "docker"
    (data_root / "containers").mkdir(parents=True)
    server = DockerServer(directory / "docker.sock", data_root)
    try:
        yield server
    finally:
        server.close()
