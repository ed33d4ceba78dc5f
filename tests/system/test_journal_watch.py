# SPDX-License-Identifier: Apache-2.0
"""The journal watch on a real journald of its own: rotated, vacuumed, restarted, damaged, flooded, hostile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WRAPPER = Path(__file__).parent / "private-journald"
PATIENCE = 120.0  # seconds
ID = "ab" * 32
TELLING = f'time="2018" level=warning msg="unknown container" container={ID} module=libcontainerd namespace=moby'
SAID = f"journal: unknown container {ID[:12]}"


class Scene:
    """A watch in a running loop, in the mount namespace of a private journald."""

    def __init__(self) -> None:
        from orphand.triggers.journal import JournalWatch, Tail

        self.fired: list[str] = []
        self.told: list[str] = []
        self.reads = 0

        scene = self

        class Counted(Tail):
            def get_next(self) -> Mapping[str, Any]:
                scene.reads += 1
                return super().get_next()

        loop = asyncio.get_running_loop()
        self.watch = JournalWatch(loop, self.fired.append, lambda t, m: self.told.append(t.name), Counted)
        self.watch.start()

    async def until(self, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + PATIENCE / 2
        while not condition():
            assert time.monotonic() < end, (self.fired, self.told, self.watch.state())
            await asyncio.sleep(0.01)

    async def noticed(self) -> None:
        """A telling line written now fires."""
        self.fired.clear()
        send(TELLING)
        await self.until(lambda: SAID in self.fired)


def send(message: Any, **fields: Any) -> None:
    from systemd import journal

    journal.send(message, **{"SYSLOG_IDENTIFIER": "dockerd", **fields})


def journald() -> int:
    """The pid of the private journald: a child of the wrapper, which is our parent."""
    children = Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_text().split()
    return next(int(c) for c in children if Path(f"/proc/{c}/comm").read_text().startswith("systemd-journal"))


async def lines_of_the_engines(scene: Scene) -> None:
    send("level=info msg=hello")
    send(TELLING, SYSLOG_IDENTIFIER="somebody")
    await scene.noticed()
    assert scene.fired == [SAID]
    assert scene.told == []
    scene.fired.clear()
    send('{"level":"error","msg":"failed to process event","error":"could not find container x: No such container: x"}')
    await scene.until(lambda: scene.fired)
    for identifier in ("containerd", "docker"):
        scene.fired.clear()
        send(f'level=info msg="cleaning leaked shim process" id={ID}', SYSLOG_IDENTIFIER=identifier)
        await scene.until(lambda: scene.fired)


async def what_was_there_before_does_not_fire(scene: Scene) -> None:
    await scene.noticed()
    scene.watch.stop()
    scene.fired.clear()
    later = Scene()
    await later.noticed()
    assert later.fired == [SAID]
    later.watch.stop()


async def hostile_entries(scene: Scene) -> None:
    from systemd import journal

    noise = os.urandom(99_999)
    journal.sendv(b"SYSLOG_IDENTIFIER=dockerd", b"MESSAGE=\xff\x00 unknown\x00 container", b"B=" + noise)
    send("x" * 5_000_000)
    send("a\nb\x1b[2J\nunknown")
    send("", **{f"FIELD_{n}": "x" * 100 for n in range(500)})
    journal.sendv(
        "SYSLOG_IDENTIFIER=dockerd", "MESSAGE=m", "PRIORITY=none", "CODE_LINE=x", "ERRNO=-1e9", "MESSAGE_ID=x"
    )
    await scene.noticed()
    assert scene.told == []


async def rotated_and_vacuumed(scene: Scene) -> None:
    for _ in range(3):
        await scene.noticed()
        subprocess.run(["journalctl", "--rotate"], check=True)
        subprocess.run(["journalctl", "--vacuum-size=1"], check=True, capture_output=True)
    await scene.noticed()
    assert "SOURCE_LOST" not in scene.told


async def archived_files_take_no_memory(scene: Scene) -> None:
    for _ in range(5):
        send(TELLING)
        subprocess.run(["journalctl", "--rotate"], check=True)
    await scene.noticed()
    later = Scene()
    await later.noticed()
    later.watch.stop()
    mapped = {line.split()[5] for line in Path("/proc/self/maps").read_text().splitlines() if ".journal" in line}
    assert {Path(file).name for file in mapped} == {"system.journal"}


async def journald_restarted(scene: Scene) -> None:
    await scene.noticed()
    os.kill(journald(), signal.SIGKILL)
    again = subprocess.Popen(["/lib/systemd/systemd-journald"])
    try:
        deadline = time.monotonic() + PATIENCE / 4
        while SAID not in scene.fired or time.monotonic() < deadline - PATIENCE / 4 + 1:
            scene.fired.clear()
            with contextlib.suppress(OSError):
                send(TELLING)
            await asyncio.sleep(0.2)
            assert time.monotonic() < deadline
        await scene.noticed()
    finally:
        again.terminate()
        again.wait()


async def files_are_damaged(scene: Scene) -> None:
    """The file is overwritten with garbage under the watch; after a rotation all is well again."""
    await scene.noticed()
    for file in Path("/run/log/journal").rglob("*.journal"):
        with open(file, "r+b") as damaged:
            damaged.seek(200)
            damaged.write(os.urandom(min(100_000, file.stat().st_size // 2)))
    subprocess.run(["journalctl", "--rotate"], capture_output=True)
    end = time.monotonic() + PATIENCE / 2
    while SAID not in scene.fired:
        with contextlib.suppress(OSError):
            send(TELLING)
        await asyncio.sleep(0.2)
        assert time.monotonic() < end, (scene.fired, scene.told, scene.watch.state())


async def the_directory_is_removed_and_comes_back(scene: Scene) -> None:
    from orphand.triggers import journal

    journal.CHECK, journal.RETRY = 0.1, (0.1, 0.2)
    scene.watch.stop()
    scene.watch.start()
    await scene.noticed()
    for root in journal.ROOTS:
        for entry in Path(root).glob("*"):
            shutil.rmtree(entry)
    subprocess.run(["journalctl", "--rotate"], capture_output=True)
    end = time.monotonic() + PATIENCE / 2
    scene.fired.clear()
    while SAID not in scene.fired:
        with contextlib.suppress(OSError):
            send(TELLING)
        await asyncio.sleep(0.2)
        assert time.monotonic() < end, (scene.fired, scene.told, scene.watch.state())


FLOOD = """
import sys, time
from systemd import journal
end, sent = time.monotonic() + 3, 0
while time.monotonic() < end:
    for _ in range(100):
        journal.sendv(b"MESSAGE=level=info msg=forged", b"SYSLOG_IDENTIFIER=dockerd")
    sent += 100
print(sent, "lines sent", flush=True)
"""


async def a_forged_flood(scene: Scene) -> None:
    from orphand.triggers import journal

    writers = [await asyncio.create_subprocess_exec(sys.executable, "-c", FLOOD) for _ in range(2)]
    before, begun = time.process_time(), time.monotonic()
    for writer in writers:
        await writer.wait()
    seconds = time.monotonic() - begun
    cpu = 100 * (time.process_time() - before) / seconds
    print(f"CPU {cpu:.1f} % of one core, {scene.reads} reads in {seconds:.1f} s")
    assert scene.reads <= (seconds + 2) * (journal.RATE + 2 * journal.BATCH)
    await asyncio.sleep(1.5)
    await scene.noticed()


SCENES: dict[str, Callable[[Scene], Awaitable[None]]] = {
    scene.__name__: scene
    for scene in (
        lines_of_the_engines,
        what_was_there_before_does_not_fire,
        hostile_entries,
        rotated_and_vacuumed,
        archived_files_take_no_memory,
        journald_restarted,
        files_are_damaged,
        the_directory_is_removed_and_comes_back,
        a_forged_flood,
    )
}


@pytest.mark.parametrize("name", SCENES)
def test_journal_watch(name: str, tmp_path: Path) -> None:
    assert os.geteuid() == 0, "a private journald needs root"
    unlimited = tmp_path / "systemd/journald.conf.d/unlimited.conf"  # becomes /run/systemd/… of the private journald
    unlimited.parent.mkdir(parents=True)
    unlimited.write_text("[Journal]\nRateLimitBurst=0\nRateLimitIntervalSec=0\n")
    argv = [str(WRAPPER), str(tmp_path), sys.executable, "-m", "tests.system.test_journal_watch", name]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]


async def play(name: str) -> None:
    scene = Scene()
    await SCENES[name](scene)
    scene.watch.stop()


if __name__ == "__main__":
    asyncio.run(play(sys.argv[1]))
