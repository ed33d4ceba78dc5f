# SPDX-License-Identifier: Apache-2.0
"""The judge: one owner who knows saves, only unanimous fresh denials condemn."""

from __future__ import annotations

from dataclasses import replace
from typing import Optional

import pytest

from orphand import judge
from orphand.model import Claim, Generation, Init, Judgement, Kind, ProcessId, Role, Shim, Sighting, Testimony, Verdict

ID = "ab" * 32
OTHER_ID = "cd" * 32
SEEN = 100.0
PENDING = Judgement(Verdict.PENDING, "unknown to docker", Kind.LEAKED_SHIM)


def shim(generation: Generation = Generation.RUNC_V2, pid: int = 10) -> Shim:
    exe = "/usr/bin/containerd-shim-runc-v2"
    return Shim(ProcessId(pid, 5), generation, exe, "moby", ID, "/run/c.sock", "/b", 1)


def sighting(
    with_shim: Optional[Shim] = None,
    inits: bool = True,
    siblings: tuple[str, ...] = (),
    foreign: str = "",
    init_pid: int = 11,
    container_id: str = ID,
) -> Sighting:
    init = (Init(ProcessId(init_pid, 6), container_id, f"/docker/{container_id}/{init_pid}"),) if inits else ()
    return Sighting(container_id, "moby", "/run/c.sock", with_shim, init, SEEN, siblings, foreign)


def says(
    claim: Claim,
    asked_at: float = SEEN + 1,
    authority: str = "docker",
    veto: str = "",
    role: Role = Role.OWNER,
    pid: int = 0,
) -> Testimony:
    return Testimony(authority, claim, asked_at, veto=veto, role=role, pid=pid)


def keeper(claim: Claim, pid: int = 0, veto: str = "") -> Testimony:
    return says(claim, authority="containerd", role=Role.KEEPER, pid=pid, veto=veto)


NO = says(Claim.UNKNOWN)


@pytest.mark.parametrize(
    ("testimonies", "verdict"),
    [
        pytest.param([says(Claim.KNOWN)], Verdict.MANAGED, id="known"),
        pytest.param([says(Claim.KNOWN, SEEN - 1)], Verdict.MANAGED, id="an-old-yes-saves-too"),
        pytest.param([NO], Verdict.PENDING, id="unknown"),
        pytest.param([says(Claim.UNKNOWN, SEEN - 1)], Verdict.UNDECIDED, id="an-old-no-is-no-no"),
        pytest.param([says(Claim.UNAVAILABLE)], Verdict.UNDECIDED, id="silent"),
        pytest.param([], Verdict.UNDECIDED, id="nobody-to-ask"),
        pytest.param([keeper(Claim.UNKNOWN)], Verdict.UNDECIDED, id="a-keeper-alone-cannot-deny"),
        pytest.param([keeper(Claim.KNOWN)], Verdict.UNDECIDED, id="a-keeper-alone-cannot-save"),
        pytest.param([NO, says(Claim.UNAVAILABLE)], Verdict.UNDECIDED, id="one-silent"),
        pytest.param([NO, keeper(Claim.UNAVAILABLE)], Verdict.UNDECIDED, id="keeper-silent"),
        pytest.param([NO, says(Claim.KNOWN)], Verdict.MANAGED, id="one-knows"),
        pytest.param([says(Claim.UNAVAILABLE), says(Claim.KNOWN)], Verdict.MANAGED, id="knows-beside-silent"),
        pytest.param([NO, keeper(Claim.KNOWN, 11)], Verdict.PENDING, id="engine-orphan"),
        pytest.param([NO, keeper(Claim.KNOWN, 99)], Verdict.UNDECIDED, id="the-task-is-another-process"),
        pytest.param([says(Claim.DISOWNED), keeper(Claim.KNOWN, 11)], Verdict.PENDING, id="disowned"),
    ],
)
def test_verdict_of_one_look(testimonies: list[Testimony], verdict: Verdict) -> None:
    assert judge.conclude(sighting(shim()), testimonies).verdict is verdict


@pytest.mark.parametrize(
    ("seen", "testimonies", "kind"),
    [
        (sighting(shim()), [NO], Kind.LEAKED_SHIM),
        (sighting(shim()), [NO, keeper(Claim.UNKNOWN)], Kind.LEAKED_SHIM),
        (sighting(shim(), inits=False), [NO], Kind.CHILDLESS_SHIM),
        (sighting(None), [NO], Kind.SHIMLESS),
        (sighting(shim()), [says(Claim.DISOWNED), keeper(Claim.KNOWN, 11)], Kind.DISOWNED),
        (sighting(shim()), [NO, keeper(Claim.KNOWN, 11)], Kind.ENGINE_ORPHAN),
        (sighting(shim(), inits=False), [NO, keeper(Claim.KNOWN, 11)], Kind.ENGINE_ORPHAN),  # stopped, never deleted
    ],
)
def test_kind(seen: Sighting, testimonies: list[Testimony], kind: Kind) -> None:
    assert judge.conclude(seen, testimonies).kind is kind


def test_a_foreign_container_is_never_judged_by_testimonies() -> None:
    assert judge.conclude(sighting(shim(), foreign="podman's"), [NO]).verdict is Verdict.FOREIGN


def test_vetoes_come_from_metadata_sightings_and_shims_whose_signals_are_not_known() -> None:
    assert "directory" in judge.conclude(sighting(shim()), [says(Claim.UNKNOWN, veto="directory exists")]).veto
    assert "record" in judge.conclude(sighting(shim()), [NO, keeper(Claim.UNKNOWN, veto="a record")]).veto
    assert "not known" in judge.conclude(sighting(shim(Generation.OTHER)), [NO]).veto
    assert "unsure" in judge.conclude(replace(sighting(shim()), veto="unsure"), [NO]).veto
    assert "docker's" in judge.conclude(replace(sighting(shim()), metadata="docker's"), [NO]).veto
    assert judge.conclude(sighting(shim()), [NO]).veto == ""


def test_dockers_metadata_is_no_veto_where_docker_itself_disowns_the_container() -> None:
    kept = replace(sighting(shim()), metadata="docker's")
    judgement = judge.conclude(kept, [says(Claim.DISOWNED), keeper(Claim.KNOWN)])
    assert (judgement.kind, judgement.veto) == (Kind.DISOWNED, "")
    assert judge.conclude(replace(kept, veto="unsure"), [says(Claim.DISOWNED)]).veto == "unsure"


class TestTwoShimsForOneId:
    kept = replace(sighting(shim(pid=10), init_pid=11), owns_socket=True)
    other = replace(sighting(shim(pid=20), init_pid=21), owns_socket=False)
    agreed = (says(Claim.KNOWN, pid=11), keeper(Claim.KNOWN, pid=11))

    def verdicts(
        self, looks: list[tuple[Sighting, tuple[Testimony, ...]]]
    ) -> list[tuple[Verdict, Optional[Kind], bool]]:
        return [(j.verdict, j.kind, bool(j.veto)) for j in judge.conclude_all(looks)]

    def test_the_one_that_the_witnesses_name_is_kept(self) -> None:
        assert self.verdicts([(self.kept, self.agreed), (self.other, self.agreed)]) == [
            (Verdict.MANAGED, None, False),
            (Verdict.PENDING, Kind.DUPLICATE_SHIM, False),
        ]

    @pytest.mark.parametrize(
        "testimonies",
        [
            (says(Claim.KNOWN, pid=11), keeper(Claim.KNOWN, pid=21)),
            (says(Claim.KNOWN, pid=99), keeper(Claim.KNOWN, pid=99)),
            (says(Claim.KNOWN), keeper(Claim.KNOWN)),
            (says(Claim.KNOWN, pid=11), keeper(Claim.UNAVAILABLE)),
        ],
        ids=["they-differ", "neither", "no-pid", "one-silent"],
    )
    def test_without_agreement_both_are_managed(self, testimonies: tuple[Testimony, ...]) -> None:
        both = self.verdicts([(self.kept, testimonies), (self.other, testimonies)])
        assert [v for v, _, _ in both] == [Verdict.MANAGED, Verdict.MANAGED]

    @pytest.mark.parametrize("owns", [True, None])
    def test_a_shim_that_may_hold_the_live_socket_is_not_killed(self, owns: Optional[bool]) -> None:
        looks = [(self.kept, self.agreed), (replace(self.other, owns_socket=owns), self.agreed)]
        assert self.verdicts(looks)[1] == (Verdict.PENDING, Kind.DUPLICATE_SHIM, True)

    def test_one_that_shares_the_cgroup_is_not_killed(self) -> None:
        shared = replace(self.other, inits=(replace(self.other.inits[0], cgroup=self.kept.inits[0].cgroup),))
        assert self.verdicts([(self.kept, self.agreed), (shared, self.agreed)])[1][2]

    def test_processes_without_a_shim_are_not_killed(self) -> None:
        bare = sighting(None, init_pid=31)
        assert self.verdicts([(self.kept, self.agreed), (bare, self.agreed)])[1][2]


class TestASharedShim:
    pod = sighting(shim(), siblings=(OTHER_ID,))
    other = sighting(shim(), siblings=(ID,), init_pid=21, container_id=OTHER_ID)
    bare = sighting(shim(), inits=False, siblings=(OTHER_ID,))
    managed = Judgement(Verdict.MANAGED, "")

    def test_its_shim_is_not_ended_while_it_serves_a_known_one(self) -> None:
        vetoes = [j.veto for j in judge.protect_siblings([(self.bare, PENDING), (self.other, self.managed)])]
        assert OTHER_ID[:12] in vetoes[0]
        assert vetoes[1] == ""

    def test_nor_while_it_serves_one_that_was_not_seen(self) -> None:
        assert judge.protect_siblings([(self.bare, PENDING)])[0].veto

    def test_an_orphan_with_an_init_is_ended_alone(self) -> None:
        assert judge.protect_siblings([(self.pod, PENDING), (self.other, self.managed)])[0].veto == ""

    def test_all_orphaned(self) -> None:
        assert judge.protect_siblings([(self.bare, PENDING), (self.other, PENDING)])[0].veto == ""


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (None, Verdict.PENDING),
        (judge.Row(400.0, 500.0, 9), Verdict.PENDING),
        (judge.Row(380.0, 500.0, 2), Verdict.PENDING),
        (judge.Row(380.0, 500.0, 3), Verdict.ORPHAN),
    ],
    ids=["no-row", "too-young", "too-few-looks", "ripe"],
)
def test_it_ripens_only_after_the_whole_grace(row: Optional[judge.Row], verdict: Verdict) -> None:
    assert judge.ripen(PENDING, row, 500.0, 120.0).verdict is verdict


def test_any_other_verdict_starts_the_grace_anew() -> None:
    key = ("k",)
    undecided = Judgement(Verdict.UNDECIDED, "")
    history = judge.remember(judge.History(), {key: PENDING}, 1.0, 60.0)
    assert judge.remember(history, {key: PENDING}, 2.0, 60.0).rows == {key: judge.Row(1.0, 2.0, 2)}
    interrupted = judge.remember(history, {key: undecided}, 3.0, 60.0)
    assert judge.remember(interrupted, {key: PENDING}, 4.0, 60.0).rows == {key: judge.Row(4.0, 4.0)}


def test_a_time_in_which_nobody_looked_starts_the_grace_anew() -> None:
    history = judge.History({("k",): judge.Row(1.0, 50.0, 5)})
    assert judge.remember(history, {("k",): PENDING}, 200.0, 60.0).rows == {("k",): judge.Row(200.0, 200.0)}


def test_the_end_of_its_owners_record_starts_the_grace_anew() -> None:
    """Seen: `docker rm` of a container that had been disowned for the grace, and its shim ended 0.3 s later."""
    disowned = Judgement(Verdict.PENDING, "", Kind.DISOWNED)
    history = judge.History()
    for second in range(5):
        history = judge.remember(history, {("k",): disowned}, float(second), 60.0)
    assert history.rows == {("k",): judge.Row(0.0, 4.0, 5, disowned=True)}
    history = judge.remember(history, {("k",): PENDING}, 5.0, 60.0)
    assert history.rows == {("k",): judge.Row(5.0, 5.0)}


# ---- who would die with it


def with_init(
    container_id: str, pid: int, namespace: int, leads: bool, cgroup: str = "", foreign: str = ""
) -> Sighting:
    init = Init(ProcessId(pid, 6), container_id, cgroup or f"/docker/{container_id}", namespace, leads)
    return Sighting(container_id, "moby", "/run/c.sock", shim(pid=pid - 1), (init,), SEEN, foreign=foreign)


VICTIM = with_init(ID, 11, 77, leads=True)


def veto_for(*others: Sighting, victim: Sighting = VICTIM, judgement: Judgement = PENDING) -> str:
    (found,) = judge.protect_dependents([(victim, judgement)], [victim, *others])
    return found.veto


@pytest.mark.parametrize(
    ("other", "harmed"),
    [
        pytest.param(with_init(OTHER_ID, 21, 77, leads=False), True, id="--pid=container"),
        pytest.param(with_init(OTHER_ID, 21, 78, leads=True), False, id="a-namespace-of-its-own"),
        pytest.param(with_init(OTHER_ID, 21, 0, leads=False), False, id="--pid=host"),
        pytest.param(with_init(OTHER_ID, 21, 77, False, f"/docker/{ID}/{OTHER_ID}"), True, id="--cgroup-parent-too"),
        pytest.param(with_init(OTHER_ID, 21, 77, False, f"/docker/{ID}/x", "nested"), False, id="docker-in-docker"),
        pytest.param(with_init(OTHER_ID, 21, 77, False, "/machine/x", "podman's"), True, id="another-engines"),
        pytest.param(with_init(ID, 21, 77, leads=False), False, id="its-own-second-shim"),
    ],
)
def test_what_lives_in_its_pid_namespace_is_a_veto(other: Sighting, harmed: bool) -> None:
    assert bool(veto_for(other)) is harmed


def test_who_only_joined_the_namespace_can_end_alone() -> None:
    guest = with_init(OTHER_ID, 21, 77, leads=False)
    assert veto_for(VICTIM, victim=guest) == ""


def test_all_in_the_hosts_pid_namespace_share_it_and_nobody_dies_with_another() -> None:
    host = with_init(ID, 11, 0, leads=False)
    assert veto_for(with_init(OTHER_ID, 21, 0, leads=False), victim=host) == ""


def test_who_is_managed_gets_no_veto_and_an_older_veto_stays() -> None:
    other = with_init(OTHER_ID, 21, 77, leads=False)
    assert veto_for(other, judgement=Judgement(Verdict.MANAGED, "known")) == ""
    assert veto_for(other, judgement=replace(PENDING, veto="a record")).startswith("a record; ")
