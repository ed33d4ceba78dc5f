# SPDX-License-Identifier: Apache-2.0
"""Telling systemd how the daemon is: sd_notify(3), through sdnotify. Does nothing where nobody listens."""

from __future__ import annotations

import os
import time
from typing import Callable, Optional

from orphand.masking import masked

STATUS_LIMIT = 512  # characters; systemctl status shows one line


class Notifier:
    """What systemd is told. Never raises: a lost datagram must not end the daemon."""

    def __init__(self) -> None:
        """Connects to $NOTIFY_SOCKET, if there is one."""
        self._send = _sender()

    def ready(self, status: str) -> None:
        """The first look is done, or a reload is over."""
        self._send(f"READY=1\n{_status(status)}")

    def status(self, text: str) -> None:
        """The line that `systemctl status` shows."""
        self._send(_status(text))

    def watchdog(self) -> None:
        """A whole tick has completed. To be called from the tick itself, so that a hung one is noticed."""
        self._send("WATCHDOG=1")

    def reloading(self) -> None:
        """A reload has begun. systemd wants the monotonic clock in the same message (Type=notify-reload)."""
        microseconds = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send(f"RELOADING=1\nMONOTONIC_USEC={microseconds}")

    def stopping(self) -> None:
        """The daemon is on its way out."""
        self._send("STOPPING=1\nSTATUS=Stopping")


def _sender() -> Callable[[str], None]:
    if not os.environ.get("NOTIFY_SOCKET"):
        return lambda state: None
    import sdnotify

    notify: Callable[[str], None] = sdnotify.SystemdNotifier().notify

    def send(state: str) -> None:
        # sdnotify 0.3 encodes as Latin-1 and drops, silently, whatever that can't hold; systemd reads UTF-8
        notify(state.encode("utf-8").decode("latin-1"))

    return send


def _status(text: str) -> str:
    # One line: a container's name with a newline must not become a statement to systemd, as MAINPID= is
    return f"STATUS={masked(text, STATUS_LIMIT)}"


def watchdog_interval() -> Optional[float]:
    """Seconds within which systemd wants a ping, or None if it wants none (sd_watchdog_enabled(3))."""
    try:
        microseconds = int(os.environ.get("WATCHDOG_USEC", ""))
        wanted_from = int(os.environ.get("WATCHDOG_PID", os.getpid()))
    except ValueError:
        return None
    if microseconds <= 0 or wanted_from != os.getpid():
        return None
    return microseconds / 1e6
