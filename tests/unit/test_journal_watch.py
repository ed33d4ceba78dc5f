# SPDX-License-Identifier: Apache-2.0
"""What the journal watch takes as a trigger, and what it does when the journal fails.

The failing readers are stand-ins: a real journal doesn't fail on demand. The real one is in tests/system.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Optional

import pytest

from orphand.report.topics import Topic
from orphand.triggers import journal
from orphand.triggers.journal import JournalWatch, hint

ID = "ab" * 32
MOMENT = 60.0

LOGFMT = 'time="2020-01-01T00:00:00Z" level=error msg="failed to process event" container=ID error="could not find \
container ID: No such container: ID" event=exit event-info="{ID ID 12 137}" module=libcontainerd namespace=moby'
TELLING = {
    "17.09": 'time="2017" level=warning msg="libcontainerd: unknown container ID"',
    "17.09 with the id": 'level=warning msg="libcontainerd: unknown container ' + ID + '"',
    "18.06": f'time="2018" level=warning msg="unknown container" container={ID} module=libcontainerd namespace=moby',
    "20.10": LOGFMT.replace("ID", ID),
    "JSON of 25": json.dumps(
        {"container": ID, "error": f"could not find container {ID}: No such container: {ID}", "level": "error",
         "msg": "failed to process event", "time": "2024"}
    ),
    "JSON of old": json.dumps({"level": "warning", "msg": "unknown container", "container": ID}),
    "containerd 1.6": f'level=error msg="loading container {ID}" error="container \\"x\\" in namespace: not found"',
    "containerd 1.7": f'level=info msg="cleaning leaked shim process" id={ID} namespace=moby',
    "containerd 1.2": f'level=error msg="cleanup dead shim {ID}"',
    "containerd after a KILL": 'level=warning msg="failed to clean up after shim disconnected" error="context"',
}  # fmt: skip
ORDINARY = {
    "a start": 'level=info msg="API listen on /run/docker.sock"',
    "a normal delete": 'level=info msg="shim disconnected" id=x',
    "a normal start of containerd 2": f'level=info msg="connecting to shim {ID}" protocol=ttrpc version=3',
    "a normal exit": 'level=info msg="ignoring event" container=x module=libcontainerd topic=/tasks/delete',
    "another failure of an event": LOGFMT.replace("could not find container", "no space left"),
    "words in another field": 'level=info msg="hello" name="unknown container"',
    "empty": "",
    "broken JSON": '{"msg": "unknown container"',
    "JSON of something else": '{"unknown container": ["unknown container"]}',
    "deep JSON": "{" + '"a":[' * 100_000,
}


@pytest.mark.parametrize("name", TELLING)
def test_telling_lines(name: str) -> None:
    assert hint(TELLING[name])
    assert hint(TELLING[name].encode()) == hint(TELLING[name])
    assert ID not in TELLING[name] or hint(TELLING[name]).endswith(ID[:12])


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_lines(name: str) -> None:
    assert hint(ORDINARY[name]) == ""


@pytest.mark.parametrize("message", [None, 3, b"\xff\xfe\x00", [], {}, ["a", "b"]])
def test_a_message_of_another_kind(message: object) -> None:
    assert hint(message) == ""


def test_a_huge_line_costs_little() -> None:
    for line in ('msg="' + "a\\" * 10_000_000, "msg=" * 10_000_000, 'msg="unknown' + '"' * 10_000_000):
        started = time.process_time()
        assert hint(line) == ""
        assert time.process_time() - started < MOMENT


class FakeReader:
    """A journal that can fail; its fd is a pipe."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        self.entries: list[Any] = []
        self.error: Optional[Exception] = None
        self.state = 1
        self.closed = False
        self.reads = 0

    def write(self, *messages: Any) -> None:
        self.entries += [{"MESSAGE": m} for m in messages]
        os.write(self.write_end, b"x")

    def fail(self, error: Exception) -> None:
        self.error = error
        os.write(self.write_end, b"x")

    def fileno(self) -> int:
        return self.read_end

    def process(self) -> int:
        with contextlib.suppress(BlockingIOError):
            os.read(self.read_end, 65536)
        if self.error:
            raise self.error
        state, self.state = self.state, 1
        return state

    def get_next(self) -> dict[str, Any]:
        self.reads += 1
        return self.entries.pop(0) if self.entries else {}

    def seek_tail(self) -> None:
        self.entries.clear()

    def get_previous(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.closed = True
        os.close(self.read_end)
        os.close(self.write_end)


class Setting:
    def __init__(self, roots: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        self.roots = roots
        self.readers: list[FakeReader] = []
        self.refuse: list[Exception] = []
        self.fired: list[str] = []
        self.told: list[Topic] = []
        self.watch: Any = None
        monkeypatch.setattr(journal, "RETRY", (0.01, 0.05))
        monkeypatch.setattr(journal, "CHECK", 0.02)
        monkeypatch.setattr(journal, "RENEW", 1 << 30)

    def open(self) -> FakeReader:
        if self.refuse:
            raise self.refuse.pop()
        self.readers.append(FakeReader())
        return self.readers[-1]

    async def until(self, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + MOMENT
        while not condition():
            assert time.monotonic() < end
            await asyncio.sleep(0.002)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    (tmp_path / "journal").mkdir()
    setting = Setting((str(tmp_path / "journal"),), monkeypatch)

    async def main(test: Callable[[Setting], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()
        setting.watch = JournalWatch(
            loop, setting.fired.append, lambda topic, message: setting.told.append(topic), setting.open, setting.roots
        )
        setting.watch.start()
        await test(setting)
        setting.watch.stop()
        assert all(reader.closed for reader in setting.readers)

    return lambda test: asyncio.run(main(test))


def test_it_fires(run: Callable[..., None]) -> None:
    async def test(setting: Setting) -> None:
        setting.readers[0].write(*ORDINARY.values(), TELLING["18.06"])
        await setting.until(lambda: setting.fired)
        assert setting.fired == [f"journal: unknown container {ID[:12]}"]
        assert setting.told == []

    run(test)


@pytest.mark.parametrize("error", [OSError(74, "Bad message"), OSError(2, "No such file"), ValueError("bad field")])
def test_a_damaged_journal_is_opened_anew(run: Callable[..., None], error: Exception) -> None:
    async def test(setting: Setting) -> None:
        setting.refuse = [OSError(74, "Bad message")] * 5
        setting.readers[0].fail(error)
        await setting.until(lambda: len(setting.readers) == 2)
        assert setting.told == [Topic.SOURCE_LOST, Topic.SOURCE_BACK]
        assert setting.fired == ["the journal was opened anew"]
        setting.readers[1].write(TELLING["18.06"])
        await setting.until(lambda: len(setting.fired) == 2)

    run(test)


def test_a_journal_that_comes_later(run: Callable[..., None], tmp_path: Path) -> None:
    async def test(setting: Setting) -> None:
        setting.watch.stop()
        os.rmdir(setting.roots[0])
        setting.watch.start()
        assert setting.watch.state() == "there is no journal"
        await asyncio.sleep(0.1)
        assert setting.told == [Topic.SOURCE_LOST]
        os.mkdir(setting.roots[0])
        await setting.until(lambda: setting.watch.state() == "followed")
        assert setting.told == [Topic.SOURCE_LOST, Topic.SOURCE_BACK]

    run(test)


def test_a_journal_directory_that_is_replaced_is_opened(run: Callable[..., None], tmp_path: Path) -> None:
    async def test(setting: Setting) -> None:
        os.rename(setting.roots[0], tmp_path / "old")
        os.mkdir(setting.roots[0])
        await setting.until(lambda: len(setting.readers) == 2)
        assert Topic.SOURCE_LOST not in setting.told

    run(test)


def test_what_was_read_is_let_go(run: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """libsystemd keeps mapped what it has read: after many entries the journal is opened anew, and one look is made."""

    async def test(setting: Setting) -> None:
        monkeypatch.setattr(journal, "RENEW", 1000)
        setting.readers[0].write(*["x"] * 999)
        await setting.until(lambda: not setting.readers[0].entries)
        await asyncio.sleep(0.1)
        assert len(setting.readers) == 1
        setting.readers[0].write("x", "x")
        await setting.until(lambda: len(setting.readers) == 2)
        assert setting.fired == ["the journal was opened anew"]
        assert setting.told == []
        setting.readers[1].write(TELLING["18.06"])
        await setting.until(lambda: len(setting.fired) == 2)

    run(test)


def test_rotation_fires_since_entries_may_be_skipped(run: Callable[..., None]) -> None:
    async def test(setting: Setting) -> None:
        setting.readers[0].state = journal.INVALIDATE
        setting.readers[0].write()
        await setting.until(lambda: setting.fired)
        assert setting.fired == ["journal: its files changed"]

    run(test)


def test_a_flood_is_read_at_a_bounded_rate(run: Callable[..., None]) -> None:
    async def test(setting: Setting) -> None:
        reader = setting.readers[0]
        ticks = 0
        end = asyncio.get_running_loop().time() + 1.5
        while asyncio.get_running_loop().time() < end:
            reader.write(*["x"] * 1000)
            ticks += 1
            await asyncio.sleep(0.005)  # the loop gets its turns
        assert reader.reads <= 3 * (journal.RATE + 2 * journal.BATCH)
        assert [f for f in setting.fired if "skipped" in f]
        reader.entries.clear()
        setting.fired.clear()
        await asyncio.sleep(1.1)
        reader.write(TELLING["20.10"])
        await setting.until(lambda: setting.fired)

    run(test)
