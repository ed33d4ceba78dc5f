# SPDX-License-Identifier: Apache-2.0
"""Laws of the judge that hold for every sequence of answers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orphand import judge
from orphand.model import Claim, Init, ProcessId, Sighting, Testimony, Verdict

ID = "ab" * 32
SIGHTING = Sighting(ID, "moby", "/s", None, (Init(ProcessId(2, 3), ID, f"/docker/{ID}"),), 100.0)
answers = st.builds(
    Testimony,
    authority=st.sampled_from(["docker", "containerd", "kubelet"]),
    claim=st.sampled_from(list(Claim)),
    asked_at=st.floats(0, 500),
)


@given(st.lists(answers, max_size=4))
def test_only_unanimous_fresh_denials_look_orphaned(testimonies: list[Testimony]) -> None:
    if judge.conclude(SIGHTING, testimonies).verdict is Verdict.PENDING:
        assert testimonies
        assert all(t.claim in (Claim.UNKNOWN, Claim.DISOWNED) and t.asked_at >= 100 for t in testimonies)


@given(
    st.lists(
        st.tuples(st.floats(0.1, 60), st.lists(answers, max_size=3)),
        min_size=1,
        max_size=12,
    ),
    st.floats(1, 120),
)
def test_an_orphan_looked_orphaned_in_every_look_of_the_grace(
    looks: list[tuple[float, list[Testimony]]], grace: float
) -> None:
    history, now, row = judge.History(), 1000.0, []
    for wait, testimonies in looks:
        now += wait
        first = judge.conclude(SIGHTING, testimonies)
        row = [*row, now] if first.verdict is Verdict.PENDING else []
        history = judge.remember(history, {SIGHTING.key: first}, now)
        ripe = judge.ripen(first, history.since.get(SIGHTING.key), now, grace)
        if ripe.verdict is Verdict.ORPHAN:
            assert row
            assert now - row[0] >= grace
