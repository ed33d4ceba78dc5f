# SPDX-License-Identifier: Apache-2.0
"""What systemd is told, on a real socket."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orphand.notify import Notifier, watchdog_interval


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listener


def heard(systemd: socket.socket) -> str:
    return systemd.recv(4096).decode()


def test_ready_comes_with_a_status(systemd: socket.socket) -> None:
    Notifier().ready("12 containers: 12 managed")
    assert heard(systemd) == "READY=1\nSTATUS=12 containers: 12 managed"


def test_a_status_beyond_latin_1_arrives(systemd: socket.socket) -> None:
    """sdnotify 0.3 drops such a message without a word, and READY=1 with it."""
    Notifier().ready("web, db, … 網")
    assert heard(systemd) == "READY=1\nSTATUS=web, db, … 網"


def test_a_status_is_one_statement(systemd: socket.socket) -> None:
    Notifier().status("web\nMAINPID=1\udcff")
    assert heard(systemd) == "STATUS=web\\nMAINPID=1\\udcff"


def test_a_reload_says_its_time_in_the_same_message(systemd: socket.socket) -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    Notifier().reloading()
    first, second = heard(systemd).split("\n")
    assert first == "RELOADING=1"
    assert before <= int(second[len("MONOTONIC_USEC=") :]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_watchdog_and_stopping(systemd: socket.socket) -> None:
    notifier = Notifier()
    notifier.watchdog()
    notifier.stopping()
    assert [heard(systemd), heard(systemd)] == ["WATCHDOG=1", "STOPPING=1\nSTATUS=Stopping"]


@pytest.mark.parametrize("where", [None, "", "/nowhere/socket"])
def test_without_a_listener_nothing_happens(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if where is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", where)
    notifier = Notifier()
    notifier.ready("fine")
    notifier.watchdog()


@pytest.mark.parametrize(
    ("microseconds", "pid", "seconds"),
    [
        ("30000000", None, 30.0),
        pytest.param("30000000", str(os.getpid()), 30.0, id="own-pid"),
        ("30000000", "1", None),
        ("0", None, None),
        ("-5", None, None),
        ("soon", None, None),
        ("30000000", "x", None),
        (None, None, None),
    ],
)
def test_the_watchdogs_interval(monkeypatch: pytest.MonkeyPatch, microseconds: str, pid: str, seconds: float) -> None:
    for name, text in (("WATCHDOG_USEC", microseconds), ("WATCHDOG_PID", pid)):
        monkeypatch.delenv(name, raising=False)
        if text is not None:
            monkeypatch.setenv(name, text)
    assert watchdog_interval() == seconds
