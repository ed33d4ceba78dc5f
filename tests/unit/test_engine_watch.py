# SPDX-License-Identifier: Apache-2.0
"""The engines' ends, by real processes; and all triggers together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from orphand.authorities.bench import EngineState
from orphand.authorities.dockerd import process_id
from orphand.model import ProcessId
from orphand.settings import Journal, Settings
from orphand.triggers import sources
from orphand.triggers.engines import EngineWatch
from orphand.triggers.sources import Sources

MOMENT = 60.0


@contextlib.contextmanager
def engine(name: str = "dockerd") -> Iterator[tuple[subprocess.Popen[bytes], EngineState]]:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = process_id(child.pid)
    assert process
    try:
        yield child, EngineState(name, "/run/docker.sock", process)
    finally:
        child.kill()
        child.wait()
        assert child.stdin
        child.stdin.close()


async def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + MOMENT
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


def play(test: Callable[[EngineWatch, list[str]], Awaitable[None]]) -> None:
    async def main() -> None:
        fired: list[str] = []
        watch = EngineWatch(asyncio.get_running_loop(), fired.append)
        descriptors = len(os.listdir("/proc/self/fd"))
        await test(watch, fired)
        watch.stop()
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert watch.state() == []

    asyncio.run(main())


def test_an_engines_end_fires_at_once() -> None:
    async def test(watch: EngineWatch, fired: list[str]) -> None:
        with engine() as (child, state):
            watch.update([state])
            assert watch.state() == [f"dockerd (pid {child.pid})"]
            assert fired == []
            child.kill()
            await until(lambda: fired)
            assert fired == [f"dockerd (pid {child.pid}) ended"]
            watch.update([state])  # a look that began before it ended
            assert len(fired) == 1

    play(test)


def test_a_new_engine_fires_but_not_at_the_first_look() -> None:
    async def test(watch: EngineWatch, fired: list[str]) -> None:
        with engine() as (_, docker), engine("containerd") as (child, containerd):
            watch.update([docker])
            watch.update([docker, containerd])
            assert fired == [f"containerd (pid {child.pid}) started"]
            watch.update([docker, containerd])
            watch.update([docker])
            assert fired[1:] == [f"containerd (pid {child.pid}) is no longer the engine"]

    play(test)


def test_a_pid_with_a_new_owner_is_not_watched() -> None:
    async def test(watch: EngineWatch, fired: list[str]) -> None:
        with engine() as (child, _):
            watch.update([EngineState("dockerd", "/s", ProcessId(child.pid, 1))])
            assert watch.state() == []

    play(test)


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), OSError(38, "Function not implemented")])
def test_without_pidfds_it_is_seen_at_the_next_look(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise error

    monkeypatch.setattr(os, "pidfd_open", refuse)

    async def test(watch: EngineWatch, fired: list[str]) -> None:
        with engine() as (child, state):
            watch.update([state])
            watch.update([EngineState("dockerd", "/run/docker.sock", None, "gone")])
            assert fired == [f"dockerd (pid {child.pid}) is no longer the engine"]

    play(test)


# -- all together -------------------------------------------------------------------------------------------------

QUIET = replace(Settings(), journal=Journal(enabled=False))


def with_sources(test: Callable[[Sources], Awaitable[None]]) -> None:
    async def main() -> None:
        made = Sources(QUIET, asyncio.get_running_loop(), lambda *_, **__: None, list)
        made.start()
        await test(made)
        made.stop()

    asyncio.run(main())


def test_a_trigger_returns_with_its_reason() -> None:
    async def test(made: Sources) -> None:
        waiting = asyncio.ensure_future(made.triggered())
        await asyncio.sleep(0)
        made.fire("SIGUSR1")
        assert await asyncio.wait_for(waiting, MOMENT) == "SIGUSR1"
        assert made.state()["last_trigger"] == "SIGUSR1"
        assert made.state()["journal"] == "off"

    with_sources(test)


def test_a_wait_that_is_cancelled_loses_nothing() -> None:
    async def test(made: Sources) -> None:
        for _ in range(3):
            waiting = asyncio.ensure_future(made.triggered())
            await asyncio.sleep(0)
            made.fire("docker event: die")
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        assert await asyncio.wait_for(made.triggered(), MOMENT) == "docker event: die (3 times)"

    with_sources(test)


def test_a_flood_of_triggers_is_few_looks() -> None:
    async def test(made: Sources) -> None:
        looks: list[str] = []

        async def look() -> None:
            while True:
                looks.append(await made.triggered())

        looking = asyncio.ensure_future(look())
        begun = time.monotonic()
        for _ in range(300):
            for _ in range(100):
                made.fire("x")
            await asyncio.sleep(0.005)
        seconds = time.monotonic() - begun
        looking.cancel()
        assert 1 <= len(looks) <= seconds + 3

    with_sources(test)


def test_a_new_configuration_asks_for_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = []

    class Watch:
        def __init__(self, *_: Any) -> None:
            watched.append("made")

        def start(self) -> None:
            watched.append("started")

        def stop(self) -> None:
            watched.append("stopped")

        def state(self) -> str:
            return "followed"

    monkeypatch.setattr(sources, "JournalWatch", Watch)

    async def test(made: Sources) -> None:
        made.reconfigure(Settings())
        assert watched == ["made", "started"]
        assert await asyncio.wait_for(made.triggered(), MOMENT) == "the configuration was reloaded"
        made.reconfigure(QUIET)
        assert watched == ["made", "started", "stopped"]

    with_sources(test)
