# SPDX-License-Identifier: Apache-2.0
"""Fires when an engine's process ends or a new one has come: that is when orphans are made."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Optional

from orphand.authorities.bench import EngineState
from orphand.authorities.dockerd import process_id
from orphand.model import ProcessId

Fire = Callable[[str], None]


class EngineWatch:
    """Watches the engines' processes by pidfd in the loop; without pidfds (kernel before 5.3) at each update only."""

    def __init__(self, loop: asyncio.AbstractEventLoop, fire: Fire, proc: Path = Path("/proc")) -> None:
        self._loop = loop
        self._fire = fire
        self._proc = proc
        self._watched: dict[ProcessId, tuple[str, int]] = {}
        self._first = True

    def update(self, engines: Iterable[EngineState]) -> None:
        """The engines that the last look found. Called in the loop, after each look."""
        found = {e.process: e.name for e in engines if e.process}
        for process in [p for p in self._watched if p not in found]:
            name = self._forget(process)
            self._fire(f"{name} (pid {process.pid}) is no longer the engine")
        for process, name in found.items():
            if process not in self._watched and self._watch(process, name) and not self._first:
                self._fire(f"{name} (pid {process.pid}) started")
        self._first = False

    def stop(self) -> None:
        """Close every pidfd."""
        for process in list(self._watched):
            self._forget(process)
        self._first = True

    def state(self) -> list[str]:
        """The engines that are watched."""
        return [f"{name} (pid {process.pid})" for process, (name, _) in self._watched.items()]

    def _watch(self, process: ProcessId, name: str) -> bool:
        pidfd = self._open(process)
        if pidfd is None:
            return False
        self._watched[process] = (name, pidfd)
        if pidfd >= 0:
            self._loop.add_reader(pidfd, self._ended, process)
        return True

    def _open(self, process: ProcessId) -> Optional[int]:
        """A pidfd of that very process; -1 where there are none; None if it has ended."""
        try:
            pidfd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            return None
        except (AttributeError, OSError):
            return -1
        if process_id(process.pid, self._proc) != process:  # the pid may have a new owner: then the pidfd is of that
            os.close(pidfd)
            return None
        return pidfd

    def _ended(self, process: ProcessId) -> None:
        name = self._forget(process)
        self._fire(f"{name} (pid {process.pid}) ended")

    def _forget(self, process: ProcessId) -> str:
        name, pidfd = self._watched.pop(process)
        if pidfd >= 0:
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
        return name
