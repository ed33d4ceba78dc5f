# SPDX-License-Identifier: Apache-2.0
"""Hosts with real engines for the engine tests. A host that can't boot fails the test, with the reason."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.host.guest import Host

BYSTANDERS = ("bystander-a", "bystander-b")


@dataclass
class Prepared:
    """A booted host and its bystanders: id -> (pid, start time) of the container's init."""

    host: Host
    bystanders: dict[str, tuple[int, str]]


PREPARED: list[Prepared] = []


def pytest_configure() -> None:
    """A run that is told to stop still ends its hosts."""
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("SIGTERM", returncode=143))


def init_of(host: Host, container: str) -> tuple[int, str]:
    pid = int(host.sh(f"docker inspect -f '{{{{.State.Pid}}}}' {container}"))
    return pid, start_time(host, pid)


def start_time(host: Host, pid: int) -> str:
    return host.sh(f"sed 's/.*) //' /proc/{pid}/stat 2>/dev/null | cut -d' ' -f20", check=False)


def start_bystanders(host: Host) -> dict[str, tuple[int, str]]:
    host.sh(f"docker rm -f {' '.join(BYSTANDERS)} >/dev/null 2>&1 || :")
    ids = [host.sh(f"run2 {name}") for name in BYSTANDERS]
    return {full_id: init_of(host, full_id) for full_id in ids}


def prepare(host: Host) -> Host:
    """Live-restore on, image bb:1, two healthy containers that no test may touch."""
    host.sh("live_restore; img")
    PREPARED.append(Prepared(host, start_bystanders(host)))
    return host


def session_host(cgroup: str) -> Iterator[Host]:
    with Host("bookworm", cgroup=cgroup) as host:
        yield prepare(host)


@pytest.fixture(scope="session")
def v1_host() -> Iterator[Host]:
    """Bookworm with cgroup v1: v1 and v2 shims. Shared by the whole run; swept after each test."""
    yield from session_host("v1")


@pytest.fixture(scope="session")
def v2_host() -> Iterator[Host]:
    """Bookworm with cgroup v2 and the systemd driver. Shared by the whole run; swept after each test."""
    yield from session_host("v2")


@pytest.fixture(params=["v1", "v2"])
def any_host(request: pytest.FixtureRequest) -> Host:
    """The test runs twice: on v1_host and on v2_host."""
    host: Host = request.getfixturevalue(f"{request.param}_host")
    return host


@pytest.fixture
def fresh_host() -> Iterator[Callable[..., Host]]:
    """`fresh_host("v2")`: a host of its own (2 s), for a test that wrecks it. Nobody checks its bystanders."""
    with contextlib.ExitStack() as hosts:

        def boot(cgroup: str = "v2", suite: str = "bookworm") -> Host:
            host = hosts.enter_context(Host(suite, cgroup=cgroup))
            host.sh("live_restore; img")
            start_bystanders(host)
            return host

        yield boot


@pytest.fixture(autouse=True)
def bystanders() -> Iterator[None]:
    """After each test: the bystanders of the shared hosts have the same pids. Then what the test left is removed."""
    yield
    harmed = []
    for prepared in PREPARED:
        host = prepared.host
        for full_id, (pid, start) in prepared.bystanders.items():
            if start_time(host, pid) != start:
                harmed.append(f"{host.name}: {full_id[:12]} (pid {pid}) is gone")
        host.stop_daemon()
        host.sh(f"sweep {' '.join(prepared.bystanders)}")
        if harmed:
            prepared.bystanders = start_bystanders(host)
    assert not harmed, f"healthy containers were ended: {'; '.join(harmed)}"


@pytest.fixture(autouse=True, scope="session")
def forget_prepared() -> Iterator[None]:
    yield
    PREPARED.clear()
