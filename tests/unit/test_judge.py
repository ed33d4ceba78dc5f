# SPDX-License-Identifier: Apache-2.0
"""The judge: one who knows saves, only unanimous fresh denials condemn."""

from __future__ import annotations

from typing import Optional

import pytest

from orphand import judge
from orphand.model import Claim, Generation, Init, Judgement, Kind, ProcessId, Shim, Sighting, Testimony, Verdict

ID = "ab" * 32
OTHER_ID = "cd" * 32
SEEN = 100.0


def shim(generation: Generation = Generation.RUNC_V2, container_id: str = ID) -> Shim:
    return Shim(
        ProcessId(10, 5), generation, "/usr/bin/containerd-shim-runc-v2", "moby", container_id, "/run/c.sock", "/b", 1
    )


def sighting(
    with_shim: Optional[Shim] = None, inits: bool = True, siblings: tuple[str, ...] = (), foreign: str = ""
) -> Sighting:
    init = (Init(ProcessId(11, 6), ID, f"/docker/{ID}"),) if inits else ()
    return Sighting(ID, "moby", "/run/c.sock", with_shim, init, SEEN, siblings, foreign)


def says(claim: Claim, asked_at: float = SEEN + 1, authority: str = "docker", veto: str = "") -> Testimony:
    return Testimony(authority, claim, asked_at, veto=veto)


@pytest.mark.parametrize(
    ("testimonies", "verdict"),
    [
        pytest.param([says(Claim.KNOWN)], Verdict.MANAGED, id="known"),
        pytest.param([says(Claim.KNOWN, SEEN - 1)], Verdict.MANAGED, id="an-old-yes-saves-too"),
        pytest.param([says(Claim.UNKNOWN)], Verdict.PENDING, id="unknown"),
        pytest.param([says(Claim.UNKNOWN, SEEN - 1)], Verdict.UNDECIDED, id="an-old-no-is-no-no"),
        pytest.param([says(Claim.UNAVAILABLE)], Verdict.UNDECIDED, id="silent"),
        pytest.param([], Verdict.UNDECIDED, id="nobody-to-ask"),
        pytest.param([says(Claim.UNKNOWN), says(Claim.UNAVAILABLE)], Verdict.UNDECIDED, id="one-silent"),
        pytest.param([says(Claim.UNKNOWN), says(Claim.KNOWN)], Verdict.MANAGED, id="one-knows"),
        pytest.param([says(Claim.UNAVAILABLE), says(Claim.KNOWN)], Verdict.MANAGED, id="knows-beside-silent"),
    ],
)
def test_verdict_of_one_look(testimonies: list[Testimony], verdict: Verdict) -> None:
    assert judge.conclude(sighting(shim()), testimonies).verdict is verdict


@pytest.mark.parametrize(
    ("seen", "claim", "kind"),
    [
        (sighting(shim()), Claim.UNKNOWN, Kind.LEAKED_SHIM),
        (sighting(shim(), inits=False), Claim.UNKNOWN, Kind.CHILDLESS_SHIM),
        (sighting(None), Claim.UNKNOWN, Kind.SHIMLESS),
        (sighting(shim()), Claim.DISOWNED, Kind.DISOWNED),
    ],
)
def test_kind(seen: Sighting, claim: Claim, kind: Kind) -> None:
    assert judge.conclude(seen, [says(claim)]).kind is kind


def test_a_foreign_container_is_never_judged_by_testimonies() -> None:
    assert judge.conclude(sighting(shim(), foreign="podman's"), [says(Claim.UNKNOWN)]).verdict is Verdict.FOREIGN


def test_vetoes_come_from_metadata_unknown_shims_and_records() -> None:
    assert "directory" in judge.conclude(sighting(shim()), [says(Claim.UNKNOWN, veto="directory exists")]).veto
    assert "not known" in judge.conclude(sighting(shim(Generation.OTHER)), [says(Claim.UNKNOWN)]).veto
    assert "record" in judge.conclude(sighting(shim()), [says(Claim.DISOWNED)]).veto


def test_it_ripens_only_after_the_whole_grace() -> None:
    pending = Judgement(Verdict.PENDING, "unknown", Kind.LEAKED_SHIM)
    assert judge.ripen(pending, None, 500.0, 0.0).verdict is Verdict.PENDING
    assert judge.ripen(pending, 400.0, 500.0, 120.0).verdict is Verdict.PENDING
    assert judge.ripen(pending, 380.0, 500.0, 120.0).verdict is Verdict.ORPHAN


def test_any_other_verdict_starts_the_grace_anew() -> None:
    key = ("k",)
    pending, undecided = Judgement(Verdict.PENDING, ""), Judgement(Verdict.UNDECIDED, "")
    history = judge.remember(judge.History(), {key: pending}, 1.0)
    assert judge.remember(history, {key: pending}, 2.0).since == {key: 1.0}
    interrupted = judge.remember(history, {key: undecided}, 3.0)
    assert judge.remember(interrupted, {key: pending}, 4.0).since == {key: 4.0}


def test_a_shim_that_serves_a_known_container_is_protected() -> None:
    seen = sighting(shim(), siblings=(OTHER_ID,))
    orphan = Judgement(Verdict.ORPHAN, "", Kind.LEAKED_SHIM)
    assert OTHER_ID[:12] in judge.protect_siblings({seen.key: (seen, orphan)})[seen.key].veto
