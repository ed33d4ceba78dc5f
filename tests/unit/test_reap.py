# SPDX-License-Identifier: Apache-2.0
"""What `orphand reap` takes its target for, and what it refuses before it looks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orphand import cli, proc, state
from orphand.errors import OrphandError
from orphand.model import Case, Init, Judgement, Kind, ProcessId, Sighting, Verdict

DIGITS = "1234" + "a" * 60


def case(container_id: str, pid: int = 4000000, verdict: Verdict = Verdict.PENDING, veto: str = "") -> Case:
    init = Init(ProcessId(pid, 1), container_id, f"/docker/{container_id}")
    sighting = Sighting(container_id, "default", "/c.sock", None, (init,), 0.0)
    return Case(sighting, (), Judgement(verdict, "because", Kind.SHIMLESS, veto=veto))


def test_a_pid_in_a_service_is_not_in_a_container_whose_name_is_a_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proc, "cgroup_of", lambda pid: "/system.slice/website.service")
    with pytest.raises(OrphandError, match="no container"):
        cli._find([case("web")], str(os.getpid()))


def test_a_pid_below_a_containers_cgroup_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proc, "cgroup_of", lambda pid: "/default/web/below")
    assert cli._find([case("web"), case("we")], str(os.getpid())) == [case("web")]


def test_a_pid_that_has_ended_is_not_the_start_of_an_id() -> None:
    with pytest.raises(OrphandError, match="no container"):
        cli._find([case(DIGITS)], "1234")
    assert cli._find([case(DIGITS)], "1234a") == [case(DIGITS)]


def test_the_start_of_two_ids_is_neither() -> None:
    with pytest.raises(OrphandError, match="not unique"):
        cli._find([case("ab" * 32), case("abcd" * 16)], "ab")


@pytest.mark.parametrize(
    ("refused", "why"),
    [
        (case("a", verdict=Verdict.MANAGED), "not an orphan"),
        (case("a", verdict=Verdict.UNDECIDED), "not an orphan"),
        (case("a", verdict=Verdict.EXEMPT), "not an orphan"),
        (case("a", verdict=Verdict.FOREIGN), "not an orphan"),
        (case("a", veto="a record"), "must not be ended: a record"),
    ],
)
def test_what_is_no_free_orphan_is_refused(refused: Case, why: str) -> None:
    with pytest.raises(OrphandError, match=why):
        cli._reapable([refused])


def test_of_two_orphans_with_one_id_none_is_chosen() -> None:
    with pytest.raises(OrphandError, match="several orphans"):
        cli._reapable([case("a"), case("a", pid=4000001)])


def test_a_hold_is_not_overruled_by_a_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read_hold = state.read_hold
    monkeypatch.setattr(state, "read_hold", lambda: read_hold(tmp_path))
    cli._mind_the_hold(unasked=True)
    state.write_hold(state.Hold("upgrade"), tmp_path)
    cli._mind_the_hold(unasked=False)
    with pytest.raises(OrphandError, match="upgrade"):
        cli._mind_the_hold(unasked=True)
