# SPDX-License-Identifier: Apache-2.0
"""Seconds from a trigger to what the daemon makes of it: latency.py journal|event|exit COUNT. One line of JSON.

journal, event: a container that Docker does not know is started in Docker's namespace with ctr; then
dockerd's own warning about it (journal), or the event of another container that is created (event, with
orphand's journal source off), makes the look that finds it. Measured from the line's time in the journal, or
from the event's own time, to the time of the record of the suspicion. exit: dockerd is ended by SIGKILL;
measured to the end of the look, when the status file has been written.

For journal it is also measured when another follower is told of the line: journald wakes its followers up to 250 ms
after it wrote one (POST_CHANGE_TIMER_INTERVAL_USEC in systemd's journald-server.c), whoever they are.
"""

from __future__ import annotations

import datetime
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from typing import Any, Optional

import meter

from orphand.report.topics import Topic
from orphand.triggers.journal import hint
from systemd import journal

DOCKER = "/run/docker.sock"
REST = 2.3  # seconds: two looks in quick succession are free, and one is earned back each second
RUN = ["ctr", "-n", "moby", "run", "-d", "--runtime", "io.containerd.runc.v2"]
IMAGE = "docker.io/library/bb:1"
ANNOUNCED: list[float] = []  # seconds from dockerd's lines to when another follower was told of them


class Api(HTTPConnection):
    """Docker's API, for the event and to ask for its time."""

    def __init__(self) -> None:
        super().__init__("localhost")

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(DOCKER)

    def call(self, method: str, path: str, body: Any = None) -> bytes:
        headers = {"Content-Type": "application/json"} if body else {}
        self.request(method, path, json.dumps(body) if body else None, headers)
        return self.getresponse().read()


def reader(*matches: str) -> journal.Reader:
    found = journal.Reader(flags=journal.LOCAL_ONLY | journal.SYSTEM)
    for match in matches:
        found.add_match(match)
    return found


def first(records: journal.Reader, since: float, wanted: str, field: str) -> Optional[dict[str, Any]]:
    """The first record since then whose field contains the text."""
    records.seek_realtime(int(since * 1e6))
    for record in iter(records.get_next, {}):
        text = _text(record.get(field, ""))
        if wanted in text and (field != "MESSAGE" or hint(text)):
            return record
    return None


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def sent_at(record: dict[str, Any]) -> float:
    """When it was written: the sender's time where the socket tells it, else journald's."""
    stamp: datetime.datetime = record.get("_SOURCE_REALTIME_TIMESTAMP") or record["__REALTIME_TIMESTAMP"]
    return stamp.timestamp()


class Follower(threading.Thread):
    """Notes when it is told of dockerd's line about a container, as anybody who follows the journal is."""

    def __init__(self, container_id: str) -> None:
        super().__init__(daemon=True)
        self.told_at = 0.0
        self._id = container_id
        self._lines = reader("_SYSTEMD_UNIT=docker.service")
        self._lines.seek_tail()
        self._lines.get_previous()
        self._lines.process()

    def run(self) -> None:
        end = time.monotonic() + 30
        while not self.told_at and time.monotonic() < end:
            self._lines.wait(1.0)
            now = time.time()
            for record in iter(self._lines.get_next, {}):
                text = _text(record.get("MESSAGE", ""))
                if self._id in text and hint(text):
                    self.told_at = self.told_at or now


def start_unknown(container_id: str) -> float:
    """A container that only containerd knows; when the command was given."""
    shares = subprocess.run(["ctr", "run", "--help"], capture_output=True, text=True).stdout
    options = ["--cpu-shares", "0"] if "--cpu-shares" in shares else []
    begun = time.time()
    argv = [*RUN, *options, IMAGE, container_id, "/bin/busybox", "sleep", "99999"]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    return begun


def remove_unknown(container_id: str) -> None:
    for argv in (["tasks", "rm", "-f", container_id], ["containers", "rm", container_id]):
        subprocess.run(["ctr", "-n", "moby", *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def suspected(container_id: str, begun: float) -> float:
    records = reader(f"MESSAGE_ID={Topic.SUSPECTED.message_id}")
    record = meter.wait_until(
        lambda: first(records, begun - 1, container_id, "ORPHAND_CONTAINER_ID"), 60, f"a suspicion of {container_id}"
    )
    return sent_at(record)


def by_journal() -> float:
    container_id = secrets.token_hex(32)
    follower = Follower(container_id)
    follower.start()
    try:
        begun = start_unknown(container_id)
        found = suspected(container_id, begun)
        lines = reader("_SYSTEMD_UNIT=docker.service")
        line = meter.wait_until(lambda: first(lines, begun - 1, container_id, "MESSAGE"), 10, "dockerd's warning")
        follower.join()
        ANNOUNCED.append(follower.told_at - sent_at(line))
        return found - sent_at(line)
    finally:
        remove_unknown(container_id)


def by_event() -> float:
    container_id = secrets.token_hex(32)
    api = Api()
    try:
        begun = start_unknown(container_id)
        time.sleep(0.5)
        asked = time.time()
        other = json.loads(api.call("POST", "/containers/create", {"Image": "bb:1", "Cmd": ["true"]}))["Id"]
        found = suspected(container_id, begun)
        query = f"/events?since={int(asked) - 1}&until={int(time.time()) + 1}"
        events = [json.loads(line) for line in api.call("GET", query).splitlines()]
        at = next(e["timeNano"] for e in events if e.get("Action") == "create" and e["Actor"]["ID"] == other) / 1e9
        api.call("DELETE", f"/containers/{other}?force=1")
        return found - at
    finally:
        remove_unknown(container_id)


def by_exit() -> float:
    shown = ["systemctl", "show", "-p", "MainPID", "--value", "docker"]
    pid = meter.wait_until(lambda: int(subprocess.check_output(shown)), 60, "dockerd")
    meter.wait_until(lambda: f"dockerd (pid {pid})" in engines(), 60, "orphand to know dockerd")
    time.sleep(REST)
    killed = time.time()
    os.kill(pid, signal.SIGKILL)
    return meter.wait_until(lambda: max(0.0, meter.looked_at() - killed), 60, "a look after the end of dockerd", 0.01)


def engines() -> list[str]:
    try:
        with open(meter.STATUS) as status:
            return list(json.load(status)["sources"]["engines"])
    except (OSError, ValueError, KeyError):
        return []


def main() -> None:
    kind, count = sys.argv[1], int(sys.argv[2])
    once = {"journal": by_journal, "event": by_event, "exit": by_exit}[kind]
    seconds, by_chance = [], 0
    while len(seconds) < count and by_chance <= count:
        time.sleep(REST)
        took = once()
        if took < 0:  # the timer's look came before the trigger
            by_chance += 1
        else:
            seconds.append(took)
    result = {"trigger": kind, "seconds": meter.spread(seconds), "all": seconds, "left out": by_chance}
    if ANNOUNCED:
        result["announced"] = meter.spread(ANNOUNCED)
    meter.say(result)


main()
