# SPDX-License-Identifier: Apache-2.0
"""Docker's events as triggers, over a real socket; the engine is found by a stand-in for the search."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orphand.authorities import dockerd
from orphand.authorities.bench import EngineState
from orphand.authorities.docker_api import Silence
from orphand.authorities.dockerd import Engine
from orphand.report.topics import Topic
from orphand.triggers import docker_events
from orphand.triggers.docker_events import DockerEvents, lines
from tests.unit.docker_server import ID, DockerServer, docker_server, says

MOMENT = 60.0


class Events:
    """The server's /events: what is put here is sent in a chunk of its own, as dockerd does."""

    def __init__(self, server: DockerServer) -> None:
        self.connections: list[socket.socket] = []
        server.answers["/events"] = self.accept

    def accept(self, connection: socket.socket) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head)
        self.connections.append(connection)
        threading.Event().wait(MOMENT)

    def send(self, data: bytes) -> None:
        self.connections[-1].sendall(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def event(self, action: str, nanoseconds: int = 0, kind: str = "container") -> None:
        document = {"Type": kind, "Action": action, "timeNano": nanoseconds, "Actor": {"ID": ID}}
        self.send(json.dumps(document).encode() + b"\n")

    def hang_up(self) -> None:
        self.connections[-1].shutdown(socket.SHUT_RDWR)


class Setting:
    """A listener in a running loop, and what it told."""

    def __init__(self, server: DockerServer, events: Events, engines: list[Engine]) -> None:
        self.server, self.events, self.engines = server, events, engines
        self.fired: list[str] = []
        self.told: list[tuple[Topic, str]] = []
        self.trigger: Any = None

    async def until(self, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + MOMENT
        while not condition():
            assert time.monotonic() < end
            await asyncio.sleep(0.005)

    def listen(self) -> None:
        self.trigger.update([EngineState("dockerd", self.server.path, None)])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    monkeypatch.setattr(docker_events, "POLL", 0.02)
    with docker_server(tmp_path) as server:
        engines = [server.engine()]

        class FoundEngine:
            def __init__(self, *_: Any) -> None: ...

            def look(self, thorough: bool) -> list[Engine]:
                return list(engines)

        monkeypatch.setattr(docker_events, "Finder", FoundEngine)
        setting = Setting(server, Events(server), engines)

        async def main(test: Callable[[Setting], Awaitable[None]]) -> None:
            loop = asyncio.get_running_loop()
            setting.trigger = DockerEvents(loop, setting.fired.append, lambda t, m: setting.told.append((t, m)))
            await test(setting)
            started = time.monotonic()
            setting.trigger.stop()
            assert time.monotonic() - started < MOMENT
            assert not [t for t in threading.enumerate() if t.name.startswith("events ") and t.is_alive()]

        yield lambda test: asyncio.run(main(test))


def connected(setting: Setting, count: int = 1) -> Callable[[], bool]:
    return lambda: len(setting.events.connections) >= count and "connected" in setting.trigger.state().values()


def test_an_event_fires(run: Callable[..., None]) -> None:
    async def test(setting: Setting) -> None:
        setting.listen()
        await setting.until(connected(setting))
        setting.events.event("die", 1)
        await setting.until(lambda: setting.fired)
        assert setting.fired == ["docker event: die"]
        assert setting.told == []
        query = next(p for p in setting.server.asked if "/events" in p)
        assert "container" in query and "destroy" in query and "since" not in query

    run(test)


def test_since_when_they_are_silent(run: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    later = docker_events.boot_clock() + 1000.0

    async def test(setting: Setting) -> None:
        assert setting.trigger.quiet_since() is None
        setting.listen()
        await setting.until(connected(setting))
        assert setting.trigger.quiet_since() > docker_events.boot_clock()  # dockerd may not have subscribed yet
        setting.events.event("destroy", 1)
        await setting.until(lambda: setting.fired)
        assert setting.trigger.quiet_since() > docker_events.boot_clock()
        monkeypatch.setattr(docker_events, "boot_clock", lambda: later)
        setting.events.event("destroy", 2)
        await setting.until(lambda: len(setting.fired) == 2)
        assert setting.trigger.quiet_since() == later, "a list from before that event tells nothing of its container"
        setting.engines[0] = setting.server.engine(problem="nobody is there")
        setting.events.hang_up()
        await setting.until(lambda: setting.trigger.quiet_since() is None)

    run(test)


def test_other_events_do_not(run: Callable[..., None]) -> None:
    async def test(setting: Setting) -> None:
        setting.listen()
        await setting.until(connected(setting))
        setting.events.event("pull", 1, kind="image")
        setting.events.event("exec_start: sh", 2)
        setting.events.send(b"[1]\n")
        setting.events.event("destroy", 3)
        await setting.until(lambda: setting.fired)
        assert setting.fired == ["docker event: destroy"]

    run(test)


def test_after_a_disconnect_it_resumes_where_it_was(run: Callable[..., None]) -> None:
    async def test(setting: Setting) -> None:
        setting.listen()
        await setting.until(connected(setting))
        setting.events.event("start", 1_700_000_000_000_000_042)
        await setting.until(lambda: setting.fired)
        setting.events.hang_up()
        await setting.until(connected(setting, 2))
        assert "since=1700000000.000000042" in setting.server.asked[-1]
        setting.events.event("start", 1_700_000_000_000_000_042)  # `since` includes it
        setting.events.event("die", 1_700_000_000_000_000_043)
        await setting.until(lambda: "docker event: die" in setting.fired)
        assert setting.fired.count("docker event: start") == 1
        await setting.until(lambda: len(setting.told) == 2)
        assert [topic for topic, _ in setting.told] == [Topic.SOURCE_LOST, Topic.SOURCE_BACK]
        assert [f for f in setting.fired if "is back" in f]

    run(test)


@pytest.mark.parametrize(
    "garbage", [b"{\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n", b" " * (docker_events.LINE_LIMIT + 1)]
)
def test_garbage_ends_the_stream_and_a_new_one_is_opened(run: Callable[..., None], garbage: bytes) -> None:
    async def test(setting: Setting) -> None:
        setting.listen()
        await setting.until(connected(setting))
        setting.events.send(garbage)
        await setting.until(connected(setting, 2))
        setting.events.event("die", 5)
        await setting.until(lambda: "docker event: die" in setting.fired)

    run(test)


@pytest.mark.parametrize("status", ["500 Internal Server Error", "404 Not Found", "301 Moved"])
def test_a_refusal_is_told_once_and_tried_again(run: Callable[..., None], status: str) -> None:
    async def test(setting: Setting) -> None:
        accept = setting.server.answers["/events"]
        setting.server.answers["/events"] = says(status, {})
        setting.listen()
        await setting.until(lambda: len([p for p in setting.server.asked if "/events" in p]) >= 3)
        setting.server.answers["/events"] = accept
        await setting.until(connected(setting))
        await setting.until(lambda: len(setting.told) == 2)
        assert [topic for topic, _ in setting.told] == [Topic.SOURCE_LOST, Topic.SOURCE_BACK]

    run(test)


def test_a_stopped_engine_is_not_connected_to(run: Callable[..., None]) -> None:
    async def test(setting: Setting) -> None:
        running = setting.engines[:]
        setting.engines[:] = [Engine(setting.server.path, problem=dockerd.stopped(setting.server.path))]
        setting.listen()
        await setting.until(lambda: setting.told)
        assert "would wake it" in setting.told[0][1]
        assert setting.server.asked == []
        setting.engines[:] = running
        await setting.until(connected(setting))
        assert [topic for topic, _ in setting.told] == [Topic.SOURCE_LOST, Topic.SOURCE_BACK]

    run(test)


def test_an_engine_that_ends_before_the_connection_is_not_woken(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docker_events, "absence", lambda *_: "dockerd (pid 7) has ended")

    async def test(setting: Setting) -> None:
        setting.listen()
        await setting.until(lambda: setting.told)
        assert "dockerd (pid 7) has ended" in setting.told[0][1]
        assert setting.server.asked == []
        monkeypatch.undo()
        await setting.until(connected(setting))

    run(test)


def test_an_engine_that_is_silent_while_it_starts_is_waited_for(run: Callable[..., None]) -> None:
    async def test(setting: Setting) -> None:
        gate = threading.Event()
        setting.server.answers["/version"] = lambda c: (gate.wait(MOMENT), says("200 OK", {"ApiVersion": "1.41"})(c))
        setting.listen()
        await setting.until(lambda: "/version" in setting.server.asked)
        gate.set()
        await setting.until(connected(setting))
        assert setting.told == []

    run(test)


def test_it_stops_while_the_engine_is_silent(run: Callable[..., None]) -> None:
    async def test(setting: Setting) -> None:
        setting.server.answers["/version"] = lambda c: c.recv(1)
        setting.listen()
        await setting.until(lambda: "/version" in setting.server.asked)

    run(test)


def test_an_engine_that_is_no_longer_found_is_not_listened_to(run: Callable[..., None]) -> None:
    async def test(setting: Setting) -> None:
        setting.listen()
        await setting.until(connected(setting))
        setting.trigger.update([])
        assert setting.trigger.state() == {}
        await setting.until(lambda: not [t for t in threading.enumerate() if t.name.startswith("events ")])

    run(test)


def test_lines_across_pieces() -> None:
    assert list(lines([b'{"a"', b": 1}\n{", b"}", b"\n\n", b"3\n4"])) == [{"a": 1}, {}, 3]
    with pytest.raises(Silence):
        list(lines([b"x" * (docker_events.LINE_LIMIT + 1)]))
