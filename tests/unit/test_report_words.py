# SPDX-License-Identifier: Apache-2.0
"""The sentences and tables: what an admin reads, and what a container's own words can't do to it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orphand import judge
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
    Shim,
    Sighting,
    Survey,
    Testimony,
    Verdict,
)
from orphand.report import screen, words
from orphand.report.forms import case_form
from orphand.settings import Match, Policy, Rule, Settings, Window

ID = "ab12cd34ef56" + "0" * 52
SHIM = Shim(
    ProcessId(4711, 5), Generation.RUNC_V2, "/usr/bin/containerd-shim-runc-v2", "moby", ID, "/run/c.sock", "/run/b", 1
)
SIGHTING = Sighting(ID, "moby", "/run/c.sock", SHIM, (Init(ProcessId(4712, 6), ID, f"/docker/{ID}"),), 100.0)
ANSWERS = (
    Testimony("docker", Claim.UNKNOWN, 100.2, "No such container"),
    Testimony("containerd", Claim.UNKNOWN, 100.4),
)
WEB = Identity(name="web", image="nginx:1.25")
EVIL = "x\x1b[2J\nJan 1 orphand: all is well\u202e"


def case(orphan: bool = False, identity: Identity = WEB, sighting: Sighting = SIGHTING, veto: str = "") -> Case:
    """Suspected, or an orphan."""
    judgement = judge.conclude(sighting, ANSWERS)
    verdict = Verdict.ORPHAN if orphan else judgement.verdict
    return Case(sighting, ANSWERS, replace(judgement, verdict=verdict, veto=veto or judgement.veto), identity)


def test_a_suspicion_says_who_why_what_next_and_which_command() -> None:
    assert words.suspected(case(), 120.0, Decision(Action.KILL, "default policy")) == (
        "suspected orphan: web (ab12cd34ef56, image nginx:1.25): leaked-shim, unknown to docker (No such container), "
        "unknown to containerd; if every look agrees for 120 s, it will be ended (orphand explain ab12cd34ef56)"
    )


@pytest.mark.parametrize(
    ("decision", "end"),
    [
        (Decision(Action.KILL, "policy rule 2"), "; will be ended now (policy rule 2)"),
        (
            Decision(Action.ALERT, "default policy"),
            "; a person is to see to it, nothing is ended (default policy); orphand reap ab12cd34ef56 ends it",
        ),
        (
            Decision(Action.LOG, "default policy"),
            "; nothing is done (default policy); orphand reap ab12cd34ef56 ends it",
        ),
    ],
)
def test_an_orphan_says_what_is_done_and_by_which_rule(decision: Decision, end: str) -> None:
    told = words.orphaned(case(orphan=True), decision)
    assert told.startswith("orphan: web (ab12cd34ef56, image nginx:1.25): leaked-shim, unknown to docker")
    assert told.endswith(end)


def test_a_veto_offers_no_reaping() -> None:
    told = words.orphaned(
        case(orphan=True, veto="the engine has a record of it"), Decision(Action.ALERT, "rule, but veto")
    )
    assert "reap" not in told
    assert told.endswith("orphand explain ab12cd34ef56")


@pytest.mark.parametrize(
    ("identity", "name"),
    [
        (WEB, "web (ab12cd34ef56, image nginx:1.25)"),
        (Identity(), "container ab12cd34ef56"),
        (Identity(name="api", pod="api-7d9f", pod_namespace="shop"), "shop/api-7d9f/api (ab12cd34ef56)"),
        (Identity(name="two words"), '"two words" (ab12cd34ef56)'),
        (Identity(name='a" (fake)'), '"a\' (fake)" (ab12cd34ef56)'),
        (Identity(name=EVIL), r'"x\x1b[2J\nJan 1 orphand: all is well\u202e" (ab12cd34ef56)'),
    ],
)
def test_a_name_can_not_pass_for_words_of_ours(identity: Identity, name: str) -> None:
    assert words.who(case(identity=identity)) == name


def test_a_hint_never_holds_what_a_shell_would_run() -> None:
    forged = replace(SIGHTING, container_id="$(reboot); x")
    told = words.suspected(case(sighting=forged), 120.0, Decision(Action.LOG, "default policy"))
    assert told.endswith("(orphand explain 4711)")
    named = replace(SIGHTING, container_id="demo-1")
    assert words.explain_hint(case(sighting=named)) == "orphand explain demo-1"


def test_the_end_is_told_with_what_is_left() -> None:
    assert words.ended(case(), Outcome(True), 31.4).endswith("in 31 s: no process of it is left, and nothing else")
    assert words.ended(case(), Outcome(True, left=("mount /a",)), 3).endswith("still to remove: mount /a")
    assert words.end_failed(case(), Outcome(False, left=("pid 7 in state D", "mount /a"))) == (
        "could not end web (ab12cd34ef56, image nginx:1.25): still there: pid 7 in state D; mount /a "
        "(orphand explain ab12cd34ef56)"
    )
    assert "docker knows it; no signal was sent" in words.end_refused(case(), Outcome(False, refused="docker knows it"))


def test_undecided_counts_those_that_wait() -> None:
    waiting = replace(case(), judgement=Judgement(Verdict.UNDECIDED, "no answer from docker: timed out"))
    assert words.undecided(waiting).startswith("undecided: web (ab12cd34ef56, image nginx:1.25): no answer from docker")
    assert words.undecided(waiting, 11).startswith("undecided: 12 containers, web (ab12cd34ef56,")


def test_the_status_counts_the_whole_and_names_the_orphans() -> None:
    managed = replace(case(), judgement=Judgement(Verdict.MANAGED, "known to docker"))
    survey = Survey((case(orphan=True), managed, managed), 1.0, blind=("containerd is silent",))
    assert words.status_line(survey, "on hold") == (
        "3 containers: 1 orphan (web), 2 managed; not seen: containerd is silent; on hold"
    )
    assert words.status_line(Survey((), 1.0)) == "no containers"


def test_the_policy_in_one_line() -> None:
    policy = Policy(
        Action.LOG,
        120.0,
        (Rule(Match(name="a"), Action.KILL), Rule(Match(name="b"), Action.LOG)),
        (Match(name="c"),),
        (Window(frozenset({5}), 0, 1440, "Sat"),),
    )
    assert words.policy_line(Settings(policy=policy)) == (
        "policy log after 120 s, 2 rules (1 with kill), 1 exemption, kills only Sat"
    )
    assert words.started("1.0", Settings(), ["docker 24.0 at /run/docker.sock"]) == (
        "orphand 1.0 started: policy log after 120 s; engines: docker 24.0 at /run/docker.sock"
    )


def test_a_refused_configuration_names_the_first_mistake_and_counts_the_rest() -> None:
    told = words.config_refused(
        "/etc/orphand.yaml:1:1: a: unknown key\n/etc/orphand.yaml:2:1: b: unknown key", kept=True
    )
    assert told == (
        "configuration refused, the previous configuration stays in force: /etc/orphand.yaml:1:1: a: unknown key "
        "(and 1 more; orphand check-config shows all)"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.4, "9.4 s"), (120, "120 s"), (600, "10 min"), (7500, "2 h 5 min"), (7200, "2 h")],
)
def test_spans(seconds: float, text: str) -> None:
    assert words.span(seconds) == text


def everything(of: Case) -> list[str]:
    survey = Survey((of,), 1.0, blind=(EVIL,))
    outcome = Outcome(False, refused=EVIL, left=(EVIL,))
    return [
        words.suspected(of, 120.0, Decision(Action.LOG, EVIL)),
        words.orphaned(of, Decision(Action.KILL, EVIL)),
        words.ending(of, EVIL),
        words.ended(of, outcome, 1.0),
        words.end_refused(of, outcome),
        words.end_failed(of, outcome),
        words.cleared(of, EVIL),
        words.undecided(of, 3),
        words.breaker_tripped(EVIL),
        words.resumed_end(of, outcome),
        words.resumed_end(of, replace(outcome, refused="")),
        words.ended_by_hand(of, outcome),
        words.config_refused(EVIL, kept=False),
        words.status_line(survey, EVIL),
        *screen.table([of], 80, colour=False).splitlines(),
        *screen.table([of], 0, colour=False).splitlines(),
        *screen.explanation(of, [EVIL]).splitlines(),
    ]


def test_nothing_that_is_read_from_outside_reaches_a_terminal() -> None:
    hostile = Identity(*[EVIL] * 7, ports=(EVIL,), mounts=(EVIL,))
    shim = replace(SHIM, exe=EVIL, bundle=EVIL, namespace=EVIL, container_id=EVIL, address=EVIL)
    init = Init(ProcessId(1, 1), EVIL, EVIL)
    sighting = Sighting(EVIL, EVIL, EVIL, shim, (init,), 1.0, siblings=(EVIL,), foreign=EVIL, veto=EVIL)
    judgement = Judgement(Verdict.ORPHAN, EVIL, Kind.LEAKED_SHIM, 1.0, EVIL)
    testimony = Testimony(EVIL, Claim.DISOWNED, 1.0, EVIL, EVIL)
    of = Case(sighting, (testimony,), judgement, hostile)
    daemon = {
        "looked_at": 1.0, "status": EVIL, "policy": EVIL, "kills_left": EVIL, "hold": EVIL, "breaker": EVIL,
        "ends_in_progress": EVIL, "sources": {EVIL: [EVIL]}, "containers": [case_form(of, Decision(Action.LOG, EVIL))],
    }  # fmt: skip
    for line in (*everything(of), *screen.status(daemon, 1.0).splitlines()):
        assert line.isprintable(), line
        assert "\u202e" not in line


def test_sentences_stay_bounded() -> None:
    long = "x" * 100_000
    huge = Identity(*[long] * 7)
    sighting = replace(SIGHTING, container_id=long, namespace=long)
    of = Case(sighting, (Testimony(long, Claim.UNKNOWN, 1.0, long),), Judgement(Verdict.ORPHAN, long, veto=long), huge)
    for line in everything(of):
        assert len(line) < 4096, line[:80]


def test_the_table_puts_orphans_first_and_fits() -> None:
    managed = replace(case(), judgement=Judgement(Verdict.MANAGED, "known to docker"), identity=Identity(name="m" * 60))
    undecided = replace(case(), judgement=Judgement(Verdict.UNDECIDED, "no answer from docker: timed out"))
    lines = screen.table([managed, undecided, case(orphan=True)], 100, colour=False).splitlines()
    assert [line.split()[2] for line in lines] == ["VERDICT", "orphan", "undecided", "managed"]
    assert all(len(line) <= 100 for line in lines)
    assert lines[1].startswith("ab12cd34ef56  moby       orphan leaked-shim  web")
    wide = screen.table([managed, case(orphan=True)], 0, colour=False)
    assert "m" * 60 in wide
    assert "unknown to docker (No such container), unknown to containerd" in wide


def test_wide_characters_keep_the_columns() -> None:
    wide = replace(case(orphan=True), identity=Identity(name="網站", image="e\u0301"))
    heading, row = screen.table([wide], 0, colour=False).splitlines()
    assert row.index("e\u0301") == heading.index("IMAGE") - 2  # two characters take two columns each


def test_colour_is_only_the_callers_wish() -> None:
    assert "\x1b" not in screen.table([case(orphan=True)], 0, colour=False)
    assert "\x1b[1;31morphan leaked-shim\x1b[0m" in screen.table([case(orphan=True)], 0, colour=True)


def test_an_empty_table_is_its_headings() -> None:
    assert screen.table([], 80, colour=True).split() == list(screen.HEADINGS)


def test_an_explanation_goes_witness_by_witness() -> None:
    told = screen.explanation(case(orphan=True), ["TERM to pid 4712", "KILL to its cgroup"])
    for part in (
        ID,
        "verdict     orphan, leaked-shim",
        "rule        everybody who could own it said no",
        "shim        pid 4711, runc-v2, /usr/bin/containerd-shim-runc-v2, parent 1",
        f"init        pid 4712, cgroup /docker/{ID}",
        "docker (owner): does not know it (No such container); asked 0.2 s after the sighting",
        "containerd (owner): does not know it; asked 0.4 s after the sighting",
        "what ending it would do:\n  1. TERM to pid 4712\n  2. KILL to its cgroup",
    ):
        assert part in told
    assert screen.explanation(case(), []).endswith("what ending it would do:\n  nothing")


def test_an_answer_from_before_the_sighting_is_called_too_old() -> None:
    old = replace(case(), testimonies=(Testimony("docker", Claim.UNKNOWN, 98.0),))
    assert "asked 2.0 s before the sighting: too old" in screen.explanation(old, [])
