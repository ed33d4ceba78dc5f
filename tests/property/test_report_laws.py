# SPDX-License-Identifier: Apache-2.0
"""Laws of what is printed and sent: whatever a container calls itself, each line is one line, printable and bounded."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Optional

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from orphand import settings
from orphand.model import (
    Action,
    Case,
    Claim,
    Decision,
    Generation,
    Identity,
    Init,
    Judgement,
    Kind,
    Outcome,
    ProcessId,
    Role,
    Shim,
    Sighting,
    Survey,
    Testimony,
    Verdict,
)
from orphand.report import alerts as alerts_module
from orphand.report import screen, words
from orphand.report.alerts import Alerts, Event, case_document
from orphand.report.journal import JournalReport
from orphand.report.story import container_key
from orphand.report.topics import Topic

NASTY = st.text(st.sampled_from("a \x1b\n\r\x00\x9b\u202e\udc80\u2028\u3042\u0301\"'=:;()"), max_size=30)
TEXTS = st.one_of(NASTY, st.text(st.characters(), max_size=30), st.sampled_from(["x" * 5000, "\x1b" * 5000, "ab" * 32]))
TIMES = st.floats(0, 1e7)
PIDS = st.builds(ProcessId, st.integers(1, 2**22), st.integers(0, 2**40))
SHIMS = st.builds(Shim, PIDS, st.sampled_from(Generation), TEXTS, TEXTS, TEXTS, TEXTS, TEXTS, st.integers(0, 9), TEXTS)
INITS = st.lists(st.builds(Init, PIDS, TEXTS, TEXTS), max_size=20).map(tuple)
LISTS = st.lists(TEXTS, max_size=3).map(tuple)
SIGHTINGS = st.builds(
    Sighting, TEXTS, TEXTS, TEXTS, st.none() | SHIMS, INITS, TIMES, LISTS, TEXTS, TEXTS, st.none() | st.booleans()
)
TESTIMONIES = st.builds(Testimony, TEXTS, st.sampled_from(Claim), TIMES, TEXTS, TEXTS, st.sampled_from(Role))
JUDGEMENTS = st.builds(
    Judgement, st.sampled_from(Verdict), TEXTS, st.none() | st.sampled_from(Kind), st.none() | TIMES, TEXTS
)
IDENTITIES = st.builds(Identity, TEXTS, TEXTS, TEXTS, TEXTS, TEXTS, TEXTS, TEXTS, LISTS, LISTS)
CASES = st.builds(Case, SIGHTINGS, st.lists(TESTIMONIES, max_size=3).map(tuple), JUDGEMENTS, IDENTITIES)
OUTCOMES = st.builds(Outcome, st.booleans(), TEXTS, LISTS, LISTS)
SLOW = hypothesis_settings(
    max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None
)


@given(CASES, TEXTS, st.sampled_from(Action), OUTCOMES, st.integers(0, 300), TIMES)
@SLOW
def test_each_sentence_is_one_bounded_line(
    case: Case, text: str, action: Action, outcome: Outcome, width: int, seconds: float
) -> None:
    lines = [
        words.suspected(case, seconds, Decision(action, text)),
        words.orphaned(case, Decision(action, text)),
        words.ending(case, text),
        words.ended(case, outcome, seconds),
        words.end_refused(case, outcome),
        words.cleared(case, text),
        words.undecided(case, 2),
        words.breaker_tripped(text),
        words.status_line(Survey((case,), 1.0, blind=(text,)), text),
        *screen.table([case, case], width, colour=False).split("\n"),
        *screen.explanation(case, [text]).split("\n"),
    ]
    for line in lines:
        assert line.isprintable()
        assert len(line) < 8000
    assert len(screen.table([case, case], width, colour=False).split("\n")) == 3


@given(CASES, TEXTS, st.dictionaries(TEXTS, TEXTS, max_size=3))
@SLOW
def test_a_record_is_one_record_of_known_fields(case: Case, text: str, more: dict[str, str]) -> None:
    sent: list[Sequence[str]] = []
    JournalReport(send=sent.append, stderr=io.StringIO())(Topic.ENDED, text, case, **_keywords(more))
    [fields] = sent
    names = [field.split("=", 1)[0] for field in fields]
    assert len(set(names)) == len(names)
    for field in fields:
        assert field.isprintable()
        assert len(field.encode()) < 4096 + 65
    assert set(names) >= {"MESSAGE", "MESSAGE_ID", "PRIORITY"}
    assert all(
        name.startswith("ORPHAND_") for name in set(names) - {"MESSAGE", "MESSAGE_ID", "PRIORITY", "SYSLOG_IDENTIFIER"}
    )


def _keywords(more: dict[str, str]) -> dict[str, str]:
    return {key: text for key, text in more.items() if key not in ("topic", "message", "case", "self")}


@given(CASES)
@SLOW
def test_a_document_is_bounded_json_without_a_command_line(case: Case) -> None:
    body = json.dumps(case_document(case))
    assert len(body) < 200_000
    assert "command" not in case_document(case)["identity"]

    def walk(value: Any) -> None:
        if isinstance(value, str):
            assert value.isprintable()
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(inner)

    walk(case_document(case))


STEPS = st.lists(st.tuples(st.sampled_from([*Event, None]), st.integers(0, 2)), max_size=25)


@given(STEPS)
@SLOW
def test_an_open_alert_is_never_sent_twice_and_an_all_clear_only_after_it(steps: Any) -> None:
    """None: a restart that keeps what was sent."""
    with pytest.MonkeyPatch.context() as patch:
        _follow(steps, patch)


def _follow(steps: Any, patch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, str]] = []

    def deliver(url: str, body: bytes, deadline: float) -> None:
        document = json.loads(body)
        sent.append((document["event"], document.get("container", {}).get("id", "")))

    patch.setattr(alerts_module, "post", deliver)
    alerts = _alerts(frozenset())
    cases = [_case(number) for number in range(3)]
    for event, number in steps:
        if event is None:
            alerts.close(60)
            alerts = _alerts(alerts.sent)
        else:
            about_node = event in (Event.BREAKER, Event.BREAKER_RESET)
            alerts.send(event, str(number), None if about_node else cases[number])
    alerts.close(60)
    for opener, closers in (("orphan", {"ended", "cleared"}), ("breaker", {"breaker_reset"})):
        for name in ("", *(case.sighting.container_id for case in cases)):
            open_ = failed = False
            for event_name, container in sent:
                if container != name:
                    continue
                if event_name == opener:
                    assert not open_
                    open_ = True
                elif event_name == "end_failed":
                    failed = True
                elif event_name in closers:
                    assert open_ or failed or event_name == "ended"
                    open_ = failed = False


def _alerts(known: frozenset[str]) -> Alerts:
    return Alerts(settings.Alerts(webhook="https://x/"), _silent, "node7", "boot", known)


def _silent(topic: Topic, message: str, case: Optional[Case] = None, **fields: str) -> None:
    raise AssertionError(message)


def _case(number: int) -> Case:
    return Case(Sighting(f"{number}" * 64, "moby", "/c", None, (), 1.0), (), Judgement(Verdict.ORPHAN, "because"))


@given(CASES)
@SLOW
def test_the_key_of_a_container_outlives_its_inits(case: Case) -> None:
    if case.sighting.shim:
        assert container_key(replace(case.sighting, inits=())) == container_key(case.sighting)
