# SPDX-License-Identifier: Apache-2.0
"""Laws of the story: it tells each change, and never more than the changes."""

from __future__ import annotations

from typing import Any, Optional

from hypothesis import given
from hypothesis import strategies as st

from orphand.model import (
    SUSPECTS,
    Action,
    Case,
    Claim,
    Decision,
    Generation,
    Judgement,
    Kind,
    ProcessId,
    Shim,
    Sighting,
    Survey,
    Testimony,
    Verdict,
)
from orphand.report.story import Story
from orphand.report.topics import Topic

IDS = ("1" * 64, "2" * 64, "3" * 64)


def case(container_id: str, verdict: Verdict) -> Case:
    shim = Shim(ProcessId(int(container_id[0]), 5), Generation.RUNC_V2, "/s", "moby", container_id, "/c", "/b", 1)
    claim = Claim.UNAVAILABLE if verdict is Verdict.UNDECIDED else Claim.UNKNOWN
    kind = Kind.LEAKED_SHIM if verdict in SUSPECTS else None
    testimony = Testimony("docker", claim, 2.0)
    return Case(Sighting(container_id, "moby", "/c", shim, (), 1.0), (testimony,), Judgement(verdict, "because", kind))


LOOKS = st.lists(
    st.tuples(st.dictionaries(st.sampled_from(IDS), st.sampled_from(Verdict)), st.sampled_from((0.5, 30.0))),
    max_size=30,
)


def told(looks: Any, action: Action) -> list[tuple[int, Topic, Optional[str]]]:
    """(number of the look, topic, container) of each record."""
    records: list[tuple[int, Topic, Optional[str]]] = []
    number = 0

    def hear(topic: Topic, message: str, case: Optional[Case] = None, **fields: str) -> None:
        records.append((number, topic, case.sighting.container_id if case else None))

    story, now = Story(hear), 0.0
    for number, (verdicts, pause) in enumerate(looks):  # noqa: B007 hear reads it
        now += pause
        cases = tuple(case(container_id, verdict) for container_id, verdict in verdicts.items())
        story.look(Survey(cases, now), lambda c: Decision(action, "rule"), lambda c: 120.0, now)
    return records


@given(LOOKS)
def test_a_look_that_repeats_the_last_one_tells_nothing_but_a_lasting_silence(looks: Any) -> None:
    doubled = [look for verdicts, pause in looks for look in ((verdicts, pause), (verdicts, 0.0))]
    topics = [topic for number, topic, _ in told(doubled, Action.ALERT) if number % 2]
    assert set(topics) <= {Topic.UNDECIDED}


@given(LOOKS)
def test_each_suspect_is_told_and_so_is_its_end(looks: Any) -> None:
    """Who reads only the records knows at each moment the suspects, save those that nobody can judge now."""
    records = told(looks, Action.ALERT)
    open_: set[str] = set()
    for number, (verdicts, _) in enumerate(looks):
        for _, topic, container in (record for record in records if record[0] == number):
            if topic in (Topic.SUSPECTED, Topic.ORPHANED) and container:
                open_.add(container)
            elif topic is Topic.CLEARED and container:
                assert container in open_, "cleared, but never suspected"
                open_.remove(container)
        suspects = {each for each, verdict in verdicts.items() if verdict in SUSPECTS}
        unjudged = {each for each, verdict in verdicts.items() if verdict is Verdict.UNDECIDED}
        assert suspects <= open_
        assert open_ - suspects <= unjudged


@given(LOOKS)
def test_what_is_only_managed_foreign_or_exempt_is_never_told(looks: Any) -> None:
    quiet = (Verdict.MANAGED, Verdict.FOREIGN, Verdict.EXEMPT)
    harmless = [({k: v for k, v in verdicts.items() if v in quiet}, pause) for verdicts, pause in looks]
    assert told(harmless, Action.KILL) == []


@given(LOOKS)
def test_each_record_of_a_look_is_another_one(looks: Any) -> None:
    records = told(looks, Action.KILL)
    assert len(set(records)) == len(records)
