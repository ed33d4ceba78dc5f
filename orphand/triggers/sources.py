# SPDX-License-Identifier: Apache-2.0
"""All triggers together, paced: when a look is due and why."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, Optional

from orphand.authorities.bench import EngineState
from orphand.report.topics import Report
from orphand.settings import Settings
from orphand.triggers.docker_events import DockerEvents
from orphand.triggers.engines import EngineWatch
from orphand.triggers.journal import JournalWatch
from orphand.triggers.pace import Pace


class Sources:
    """The journal, Docker's events, the engines' processes, and whoever calls `fire`. Lives in the loop."""

    def __init__(
        self,
        settings: Settings,
        loop: asyncio.AbstractEventLoop,
        report: Report,
        engines: Callable[[], Iterable[EngineState]],
    ) -> None:
        self._settings = settings
        self._loop = loop
        self._report = report
        self._engines = engines
        self._pace = Pace()
        self._wanted = asyncio.Event()
        self._last = ""
        self._watch = EngineWatch(loop, self.fire)
        self._events = DockerEvents(loop, self.fire, report)
        self._journal: Optional[JournalWatch] = None

    def start(self) -> None:
        """Begin to listen."""
        if self._settings.journal.enabled:
            self._journal = JournalWatch(self._loop, self.fire, self._report)
            self._journal.start()
        self.update(self._engines())

    def stop(self) -> None:
        """Stop listening, within a second."""
        if self._journal is not None:
            self._journal.stop()
            self._journal = None
        self._watch.stop()
        self._events.stop()

    def reconfigure(self, settings: Settings) -> None:
        """Take a new configuration. What was asked for already stays asked for."""
        self.stop()
        self._settings = settings
        self.start()
        self.fire("the configuration was reloaded")

    def update(self, engines: Iterable[EngineState]) -> None:
        """The engines that the last look found."""
        found = list(engines)
        self._watch.update(found)
        self._events.update(found)

    def fire(self, reason: str) -> None:
        """Ask for a look. In the loop's thread."""
        self._pace.fire(reason, self._loop.time())
        self._wanted.set()

    async def triggered(self) -> str:
        """Return when a look is due that a trigger asked for: why. May be cancelled; nothing is lost then."""
        while True:
            wait = self._pace.due(self._loop.time())
            if wait is None:
                self._wanted.clear()
                await self._wanted.wait()
            elif wait > 0:
                await asyncio.sleep(wait)
            else:
                self._last = self._pace.take(self._loop.time())
                return self._last

    def quiet_since(self) -> Optional[float]:
        """Since when (boot clock) every Docker's events are silent; None where one's are not followed, or one waits."""
        return None if self._pace.due(self._loop.time()) is not None else self._events.quiet_since()

    def state(self) -> dict[str, Any]:
        """How each source is, for `orphand status`."""
        return {
            "journal": self._journal.state() if self._journal else "off",
            "events": self._events.state(),
            "engines": self._watch.state(),
            "last_trigger": self._last,
        }
