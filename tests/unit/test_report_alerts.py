# SPDX-License-Identifier: Apache-2.0
"""Alerts: what is sent once, what closes what, and that a receiver's trouble stays its own.

The ways are fakes here, since only they can fail on demand; tests/system has real programs and servers.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Optional

import pytest

from orphand import settings
from orphand.model import (
    Action,
    Case,
    Claim,
    Generation,
    Identity,
    Init,
    Judgement,
    Kind,
    ProcessId,
    Shim,
    Sighting,
    Testimony,
    Verdict,
)
from orphand.report import alerts as module
from orphand.report.alerts import Alert, Alerts, Event, Way, case_document
from orphand.report.delivery import Permanent, Undelivered, shown
from orphand.report.topics import Topic

PATIENCE = 30.0
ID = "ab" * 32
SHIM = Shim(ProcessId(10, 5), Generation.RUNC_V2, "/s", "moby", ID, "/run/c.sock", "/b", 1)
CASE = Case(
    Sighting(ID, "moby", "/run/c.sock", SHIM, (Init(ProcessId(11, 6), ID, "/x"),), 1.0),
    (Testimony("docker", Claim.UNKNOWN, 2.0, "No such container"),),
    Judgement(Verdict.ORPHAN, "unknown to docker", Kind.LEAKED_SHIM),
    Identity("web", "nginx:1", "web-1", "shop", "node7", command="serve --password=hunter2", ports=("80/tcp",)),
)
OTHER = replace(CASE, sighting=replace(CASE.sighting, container_id="cd" * 32))


class Ears:
    """A report that can be waited for."""

    def __init__(self) -> None:
        self.records: queue.Queue[tuple[Topic, str]] = queue.Queue()

    def __call__(self, topic: Topic, message: str, case: Optional[Case] = None, **fields: str) -> None:
        self.records.put((topic, message))

    def next(self) -> str:
        topic, message = self.records.get(timeout=PATIENCE)
        assert topic is Topic.ALERT_FAILED
        return message


class Receiver:
    """What arrives, and what is answered."""

    def __init__(self, answer: Callable[[int], Optional[Exception]] = lambda n: None) -> None:
        self.bodies: queue.Queue[Any] = queue.Queue()
        self.count = 0
        self._answer = answer

    def __call__(self, body: bytes) -> None:
        self.count += 1
        error = self._answer(self.count)
        if error:
            raise error
        self.bodies.put(json.loads(body))

    def next(self) -> Any:
        return self.bodies.get(timeout=PATIENCE)


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Receiver:
    received = Receiver()
    monkeypatch.setattr(module, "post", lambda url, body, deadline: received(body))
    return received


@pytest.fixture
def sender(receiver: Receiver) -> Iterator[Callable[..., Alerts]]:
    made: list[Alerts] = []

    def make(sent: frozenset[str] = frozenset()) -> Alerts:
        made.append(Alerts(settings.Alerts(webhook="https://x/"), Ears(), "node7", "boot1", sent))
        return made[-1]

    yield make
    for alerts in made:
        alerts.close(PATIENCE)


def test_the_document_is_the_one_in_the_docs(sender: Any, receiver: Receiver) -> None:
    assert sender().send(Event.ORPHAN, "orphan: web", CASE, Action.KILL)
    document = receiver.next()
    assert document.pop("time").endswith("+00:00")
    assert document == {
        "version": 1,
        "event": "orphan",
        "host": "node7",
        "boot_id": "boot1",
        "message": "orphan: web",
        "action": "kill",
        "container": {
            "id": ID,
            "namespace": "moby",
            "address": "/run/c.sock",
            "shim_pid": 10,
            "init_pids": [11],
        },
        "identity": {
            "name": "web",
            "image": "nginx:1",
            "pod": "web-1",
            "pod_namespace": "shop",
            "hostname": "node7",
            "started": "",
            "ports": ["80/tcp"],
            "mounts": [],
        },
        "kind": "leaked-shim",
        "verdict": "orphan",
        "reason": "unknown to docker",
        "veto": "",
        "testimonies": [{"authority": "docker", "role": "owner", "claim": "unknown", "detail": "No such container"}],
    }


def test_no_secret_of_a_command_line_leaves_the_node() -> None:
    assert "hunter2" not in json.dumps(case_document(CASE))


def test_hostile_names_are_masked_and_bounded() -> None:
    evil = "x\x1b[2J\n\u202e\udc80" + "y" * 10_000
    case = replace(CASE, identity=Identity(*[evil] * 7, ports=(evil,) * 1000, mounts=(evil,) * 1000))
    body = json.dumps(case_document(case))
    assert len(body) < 64_000
    assert "\\u202e" not in body.replace("\\\\u202e", "")


def test_each_alert_goes_out_once_over_restarts_too(sender: Any) -> None:
    first = sender()
    assert first.send(Event.ORPHAN, "m", CASE)
    assert not first.send(Event.ORPHAN, "m", CASE)
    assert first.send(Event.ORPHAN, "m", OTHER)
    first.close(PATIENCE)
    second = sender(first.sent)
    assert not second.send(Event.ORPHAN, "m", CASE)
    assert second.send(Event.ENDED, "m", CASE)
    assert second.send(Event.ORPHAN, "m", CASE), "it came back after its end"


def test_the_pid_of_a_new_shim_makes_it_another_orphan(sender: Any) -> None:
    alerts = sender()
    alerts.send(Event.ORPHAN, "m", CASE)
    again = replace(CASE, sighting=replace(CASE.sighting, shim=replace(SHIM, process=ProcessId(99, 9))))
    assert alerts.send(Event.ORPHAN, "m", again)


def test_the_all_clear_is_told_only_to_those_who_know_of_the_orphan(sender: Any, receiver: Receiver) -> None:
    alerts = sender()
    assert not alerts.send(Event.CLEARED, "m", CASE)
    alerts.send(Event.ORPHAN, "m", CASE)
    assert alerts.send(Event.CLEARED, "m", CASE)
    assert not alerts.send(Event.CLEARED, "m", CASE)
    assert [receiver.next()["event"] for _ in range(2)] == ["orphan", "cleared"]


def test_a_breaker_is_told_once_and_once_when_it_is_over(sender: Any, receiver: Receiver) -> None:
    alerts = sender()
    assert [alerts.send(Event.BREAKER, "many") for _ in range(3)] == [True, False, False]
    assert [alerts.send(Event.BREAKER_RESET, "few") for _ in range(3)] == [True, False, False]
    assert alerts.send(Event.BREAKER, "many")
    first = receiver.next()
    assert "container" not in first
    assert first["event"] == "breaker"


def test_without_a_receiver_nothing_is_remembered() -> None:
    alerts = Alerts(settings.Alerts(), Ears(), "node7")
    assert not alerts.send(Event.ORPHAN, "m", CASE)
    assert alerts.sent == frozenset()
    alerts.close(0)


def test_a_reload_takes_what_waits_to_the_new_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    received: queue.Queue[tuple[str, Any]] = queue.Queue()

    def deliver(url: str, body: bytes, deadline: float) -> None:
        if url == "https://old/":
            raise Undelivered("down")
        received.put((url, json.loads(body)["event"]))

    monkeypatch.setattr(module, "post", deliver)
    ears = Ears()
    alerts = Alerts(settings.Alerts(webhook="https://old/"), ears, "node7")
    alerts.send(Event.ORPHAN, "m", CASE)
    ears.next()
    alerts.reconfigure(settings.Alerts(webhook="https://new/"))
    assert not alerts.send(Event.ORPHAN, "m", CASE)
    alerts.close(PATIENCE)
    assert received.get(timeout=PATIENCE) == ("https://new/", "orphan")
    assert ears.records.empty()


def test_a_reload_may_end_and_begin_alerts(sender: Any, receiver: Receiver) -> None:
    alerts = sender()
    alerts.reconfigure(settings.Alerts())
    assert not alerts.send(Event.ORPHAN, "m", CASE)
    alerts.reconfigure(settings.Alerts(webhook="https://x/"))
    assert alerts.send(Event.ORPHAN, "m", CASE)
    assert receiver.next()["event"] == "orphan"


def put(way: Way, name: str) -> None:
    way.put(Alert(name, json.dumps(name).encode()))


def test_a_failure_is_tried_again_and_told_once() -> None:
    ears, receiver = Ears(), Receiver(lambda n: Undelivered("down") if n < 4 else None)
    way = Way("alerts.webhook", receiver, ears, backoff=(0.01,))
    put(way, "one")
    assert receiver.next() == "one"
    assert receiver.count == 4
    assert ears.next() == "alerts.webhook: one not delivered yet: down; trying again for 10 min"
    assert ears.records.empty()


def test_a_newer_alert_does_not_wait_for_one_that_fails() -> None:
    receiver = Receiver(lambda n: Undelivered("down") if n == 1 else None)
    ears = Ears()
    way = Way("w", receiver, ears, backoff=(3600.0,), retry_for=7200.0)
    put(way, "old")
    ears.next()
    put(way, "new")
    assert receiver.next() == "new"
    way.finish()
    assert receiver.next() == "old", "what waits is tried once more at the end"


def test_what_can_never_arrive_is_given_up_at_once() -> None:
    ears, receiver = Ears(), Receiver(lambda n: Permanent("status 403"))
    way = Way("w", receiver, ears, backoff=(0.0,))
    put(way, "one")
    assert ears.next() == "w: one not delivered: status 403; not tried again"
    way.finish()
    way.join(PATIENCE)
    assert receiver.count == 1
    assert way.pending == frozenset()


def test_after_the_time_for_tries_it_is_given_up() -> None:
    ears, receiver = Ears(), Receiver(lambda n: Undelivered("down"))
    way = Way("w", receiver, ears, backoff=(1.0,), retry_for=0.5)
    put(way, "one")
    assert ears.next() == "w: one not delivered in 1 tries: down; given up"
    way.finish()
    way.join(PATIENCE)
    assert ears.records.empty()
    assert way.pending == frozenset()


def test_an_error_of_ours_does_not_end_the_thread() -> None:
    ears, receiver = Ears(), Receiver(lambda n: RuntimeError("bug") if n == 1 else None)
    way = Way("w", receiver, ears, backoff=(0.01,))
    put(way, "one")
    assert ears.next() == "w: one not delivered yet: RuntimeError: bug; trying again for 10 min"
    assert receiver.next() == "one"


def test_where_no_thread_can_be_started_the_next_alert_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake fault: the kernel refuses threads only to a process that has used up all of its own."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    ears, receiver = Ears(), Receiver()
    way = Way("w", receiver, ears)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        put(way, "one")
    assert ears.next() == "w: one has to wait: no thread can be started; the next alert tries again"
    assert way.pending == {"one"}
    put(way, "two")
    assert [receiver.next(), receiver.next()] == ["one", "two"]


def test_a_hanging_receiver_costs_the_sender_nothing_and_memory_is_bounded() -> None:
    let_go, entered, delivered = threading.Event(), threading.Event(), []

    def hang(body: bytes) -> None:
        entered.set()
        let_go.wait(PATIENCE)
        delivered.append(json.loads(body))

    ears = Ears()
    way = Way("w", hang, ears)
    put(way, "first")
    assert entered.wait(PATIENCE)
    for number in range(module.QUEUE_LIMIT + 10):
        put(way, f"n{number}")
    assert ears.next() == "w: n0 dropped: more than 256 alerts wait"
    assert len(way.pending) == module.QUEUE_LIMIT + 1
    let_go.set()
    way.finish()
    way.join(PATIENCE)
    assert delivered == ["first", *(f"n{number}" for number in range(10, module.QUEUE_LIMIT + 10))]


def test_what_is_not_delivered_at_the_end_is_told_and_sent_at_the_next_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    let_go = threading.Event()
    monkeypatch.setattr(module, "post", lambda url, body, deadline: let_go.wait(PATIENCE))
    ears = Ears()
    alerts = Alerts(settings.Alerts(webhook="https://x/"), ears, "node7")
    alerts.send(Event.ORPHAN, "m", CASE)
    alerts.close(0.05)
    assert ears.next() == (
        "alerts.webhook: 1 alerts were not delivered before orphand stopped; they are sent at the next start"
    )
    assert alerts.sent == frozenset()
    let_go.set()


def test_many_failures_are_few_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUIET", 0.3)
    all_are_there = threading.Event()

    def refuse(body: bytes) -> None:
        all_are_there.wait(PATIENCE)
        raise Permanent("no")

    ears = Ears()
    way = Way("w", refuse, ears)
    for number in range(50):
        put(way, f"n{number}")
    all_are_there.set()
    told = [ears.next(), ears.next()]
    assert told[0] == "w: n0 not delivered: no; not tried again"
    assert told[1].endswith("more failures)")


def test_a_url_is_shown_without_its_secrets() -> None:
    assert shown("https://me:hunter2@hooks.example:8443/services/T0/SECRET?token=x") == "https://hooks.example:8443/…"


def test_the_docs_name_each_event_and_each_key() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "alerts.md").read_text()
    document = case_document(CASE)
    keys = [*document, *document["container"], *document["identity"], *document["testimonies"][0]]
    for word in (*(event.value for event in Event), *keys, "version", "host", "boot_id", "time", "message", "action"):
        assert f"`{word}`" in docs, word
