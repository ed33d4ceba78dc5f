# SPDX-License-Identifier: Apache-2.0
"""Docker's events as triggers: a thread for each engine waits for them, and for a lost engine to come back."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Optional
from urllib.parse import urlencode

from orphand.authorities.bench import EngineState
from orphand.authorities.docker import boot_clock
from orphand.authorities.docker_api import Client, Silence
from orphand.authorities.dockerd import Engine, Finder, absence
from orphand.report.topics import Report, Topic
from orphand.settings import DockerEngine

Fire = Callable[[str], None]

EVENTS = ("create", "start", "die", "destroy")
POLL = 1.0  # seconds between looks for an engine that isn't there
THOROUGH = 30  # of so many looks one is through all of /proc, not only the children of PID 1
BACKOFF = 30.0  # seconds at most between attempts with an engine that is there and refuses
PATIENCE = 600.0  # seconds that an engine may take to start: until then it accepts and is silent
SUBSCRIBING = 1.0  # seconds: dockerd sends its first bytes a moment before it listens to its own events
LINE_LIMIT = 1 << 20  # bytes of one event


class DockerEvents:
    """The events of every Docker engine that the looks find."""

    def __init__(self, loop: asyncio.AbstractEventLoop, fire: Fire, report: Report, proc: Path = Path("/proc")) -> None:
        """`fire` and `report` are called in the loop's thread."""
        self._loop = loop
        self._fire = fire
        self._report = report
        self._proc = proc
        self._listeners: dict[str, _Listener] = {}

    def update(self, engines: Iterable[EngineState]) -> None:
        """The engines of the last look: a thread for each dockerd, none for those that are gone from it."""
        wanted = {e.address for e in engines if e.name == "dockerd"}
        for socket in set(self._listeners) - wanted:
            self._listeners.pop(socket).stop()
        for socket in wanted - set(self._listeners):
            self._listeners[socket] = _Listener(socket, self._tell, self._proc)
            self._listeners[socket].start()

    def stop(self) -> None:
        """End the threads, within a second."""
        for listener in self._listeners.values():
            listener.stop()
        until = time.monotonic() + 1.0
        for listener in self._listeners.values():
            listener.join(max(0.0, until - time.monotonic()))
        self._listeners.clear()

    def state(self) -> dict[str, str]:
        """Socket -> how it is with it, for people."""
        return {socket: listener.status for socket, listener in self._listeners.items()}

    def quiet_since(self) -> Optional[float]:
        """Since when (boot clock) the events of all of them are followed and silent; None if they aren't followed."""
        since = [listener.quiet_since for listener in self._listeners.values()]
        known = [moment for moment in since if moment is not None]
        return max(known) if known and len(known) == len(since) else None

    def _tell(self, topic: Optional[Topic], message: str) -> None:
        try:
            if topic is None:
                self._loop.call_soon_threadsafe(self._fire, message)
            else:
                self._loop.call_soon_threadsafe(self._report, topic, message)
        except RuntimeError:  # the loop has ended
            return


class _Listener:
    """One engine's events, in a thread of its own."""

    def __init__(self, socket: str, tell: Callable[[Optional[Topic], str], None], proc: Path) -> None:
        self.status = "not yet connected"
        self.quiet_since: Optional[float] = None
        self._socket = socket
        self._tell = tell
        self._finder = Finder([DockerEngine(socket)], proc)
        self._proc = proc
        self._engine = Engine(socket)
        self._client = Client(socket, PATIENCE, self._absence)
        self._stopping = threading.Event()
        self._since = ""
        self._lost = False
        self._was_connected = False
        self._thread = threading.Thread(target=self._run, name=f"events {socket}", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def stop(self) -> None:
        """Let the thread end, whatever it waits for."""
        self._stopping.set()
        self._client.cut()

    def join(self, timeout: float) -> None:
        """Wait until the thread has ended."""
        self._thread.join(timeout)

    def _run(self) -> None:
        backoff = POLL
        looks = 0
        while not self._stopping.is_set():
            engine = self._engine = self._find(thorough=looks % THOROUGH == 0)
            looks += 1
            if engine.problem:  # also a stopped one behind its socket unit, which connecting would wake
                self._lose(engine.problem)
                backoff = POLL
            else:
                self._lose(self._follow(engine))
                looks = 0
                backoff = POLL if self._was_connected else min(backoff * 2, BACKOFF)
            self._stopping.wait(backoff)

    def _find(self, thorough: bool) -> Engine:
        try:
            return self._finder.look(thorough)[0]
        except OSError as error:  # no more file descriptors: as good as not there
            return Engine(self._socket, problem=f"it can't be looked for: {error.strerror}")

    def _absence(self) -> str:
        return absence(self._engine, self._proc)

    def _follow(self, engine: Engine) -> str:
        """Fire at each event until the stream ends; why it ended."""
        self._was_connected = False
        query = {"filters": json.dumps({"type": ["container"], "event": list(EVENTS)})}
        if self._since:
            query["since"] = self._since
        try:
            pieces = self._client.stream("/events?" + urlencode(query))
            next(pieces)
            self._gain(engine)
            for event in lines(pieces):
                self._handle(event)
        except Silence as silence:
            return str(silence)
        return "the stream of events ended"

    def _handle(self, event: Any) -> None:
        if not isinstance(event, dict) or event.get("Type", "container") != "container":
            return
        nanoseconds = event.get("timeNano")
        if isinstance(nanoseconds, int):
            since = f"{nanoseconds // 10**9}.{nanoseconds % 10**9:09d}"
            if since == self._since:  # `since` includes the moment itself
                return
            self._since = since
        action = event.get("Action") or event.get("status")
        if action in EVENTS:
            self.quiet_since = max(self.quiet_since or 0.0, boot_clock())
            self._tell(None, f"docker event: {action}")

    def _gain(self, engine: Engine) -> None:
        self.status = "connected"
        self.quiet_since = boot_clock() + SUBSCRIBING
        self._was_connected = True
        if self._lost:
            self._tell(Topic.SOURCE_BACK, f"{engine.name}: its events are followed again")
            self._tell(None, f"{engine.name} is back")
        self._lost = False

    def _lose(self, why: str) -> None:
        self.status = why
        self.quiet_since = None
        if not self._lost and not self._stopping.is_set():
            self._lost = True
            self._tell(Topic.SOURCE_LOST, f"no events from Docker at {self._socket}: {why}; looking by the timer")


def lines(pieces: Iterable[bytes]) -> Iterator[Any]:
    """The JSON documents of a stream, one a line. Raises Silence for a line that is none, or has no end."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            if line.strip():
                yield _parsed(line)
        if len(rest) > LINE_LIMIT:
            raise Silence("an event is too long")


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise Silence("an event is not JSON") from None
