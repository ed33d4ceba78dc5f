# SPDX-License-Identifier: Apache-2.0
"""Laws of a single look."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orphand import judge
from orphand.model import Claim, Init, ProcessId, Role, Sighting, Testimony, Verdict

ID = "ab" * 32
SIGHTING = Sighting(ID, "moby", "/s", None, (Init(ProcessId(2, 3), ID, f"/docker/{ID}"),), 100.0)
answers = st.builds(
    Testimony,
    authority=st.sampled_from(["docker", "containerd", "kubelet"]),
    claim=st.sampled_from(list(Claim)),
    asked_at=st.floats(0, 500),
    role=st.sampled_from(list(Role)),
    pid=st.sampled_from([0, 2, 9]),
)


@given(st.lists(answers, max_size=4))
def test_only_unanimous_fresh_denials_of_an_owner_look_orphaned(testimonies: list[Testimony]) -> None:
    if judge.conclude(SIGHTING, testimonies).verdict is Verdict.PENDING:
        assert any(t.role is Role.OWNER for t in testimonies)
        assert all(t.claim is not Claim.UNAVAILABLE and t.asked_at >= 100 for t in testimonies)
        assert not any(t.role is Role.OWNER and t.claim is Claim.KNOWN for t in testimonies)


@given(st.lists(answers, max_size=3), answers)
def test_one_more_witness_never_makes_a_managed_one_an_orphan(given_: list[Testimony], more: Testimony) -> None:
    before = judge.conclude(SIGHTING, given_).verdict
    after = judge.conclude(SIGHTING, [*given_, more]).verdict
    if before in (Verdict.MANAGED, Verdict.UNDECIDED) and given_:
        assert after is not Verdict.PENDING or (before is Verdict.UNDECIDED and not _doubtful(given_))


def _doubtful(testimonies: list[Testimony]) -> bool:
    """Whether an answer itself is in the way, not only that no owner was asked."""
    return any(
        t.claim is Claim.UNAVAILABLE or t.asked_at < 100 or (t.claim is Claim.KNOWN and t.pid == 9) for t in testimonies
    )
