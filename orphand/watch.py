# SPDX-License-Identifier: Apache-2.0
"""Which of many processes have ended, for the price of one system call.

A pidfd becomes readable when its process ends, and epoll reports only those that did: what a look
costs does not grow with the number of processes watched. Processes beyond the limit on descriptors, and
all of them on kernels before 5.3, are looked at one by one.
"""

from __future__ import annotations

import os
import resource
import select
from typing import Optional

from orphand.errors import Gone, ProcError
from orphand.model import ProcessId
from orphand.proc import Proc


class Watch:
    """Processes that are watched until they end or are let go."""

    def __init__(self, proc: Proc, limit: Optional[int] = None) -> None:
        """`limit`: of the descriptors to use; by default half of what the process may have open."""
        self._proc = proc
        self._limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 if limit is None else limit
        self._epoll = select.epoll()
        self._fds: dict[ProcessId, int] = {}
        self._by_fd: dict[int, ProcessId] = {}
        self._plain: set[ProcessId] = set()

    def add(self, process: ProcessId) -> None:
        """Watch it. One that has ended already is reported by the next `ended`."""
        if process in self._fds or process in self._plain:
            return
        fd = self._open(process) if len(self._fds) < self._limit else None
        if fd is None:
            self._plain.add(process)
            return
        self._epoll.register(fd, select.EPOLLIN)
        self._fds[process] = fd
        self._by_fd[fd] = process

    def _open(self, process: ProcessId) -> Optional[int]:
        try:
            return self._proc.open_pidfd(process)
        except ProcError:
            return None

    def ended(self) -> set[ProcessId]:
        """Those that have ended since they were added. They are let go."""
        found = {self._by_fd[fd] for fd, _ in self._epoll.poll(0, max(1, len(self._fds)))}
        found.update(p for p in self._plain if not self._lives(p))
        for process in found:
            self.drop(process)
        return found

    def _lives(self, process: ProcessId) -> bool:
        try:
            return self._proc.alive(process)
        except Gone:
            return False
        except ProcError:
            return True  # it can't be seen: that proves nothing

    def drop(self, process: ProcessId) -> None:
        """Stop watching it."""
        self._plain.discard(process)
        fd = self._fds.pop(process, None)
        if fd is not None:
            del self._by_fd[fd]
            os.close(fd)  # closing takes it out of the epoll set

    def close(self) -> None:
        """Let go of all of them."""
        for process in list(self._fds):
            self.drop(process)
        self._plain.clear()
        self._epoll.close()
