# SPDX-License-Identifier: Apache-2.0
"""What a command that looks by itself learns from the running daemon: that a grace is over."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orphand import cli, state
from orphand.model import Case, Generation, Init, Judgement, Kind, ProcessId, Shim, Sighting, Verdict
from orphand.report.forms import case_form
from orphand.settings import Scan

ID = "ab12cd34ef56" + "0" * 52
SHIM = Shim(ProcessId(4711, 5), Generation.RUNC_V2, "/x", "moby", ID, "/run/c.sock", "/run/b", 1)
SIGHTING = Sighting(ID, "moby", "/run/c.sock", SHIM, (Init(ProcessId(4712, 6), ID, f"/docker/{ID}"),), 100.0)
GAP = Scan().max_gap

Say = Callable[[Any], None]


def case(verdict: Verdict, sighting: Sighting = SIGHTING, kind: Kind = Kind.LEAKED_SHIM) -> Case:
    return Case(sighting, (), Judgement(verdict, "nobody knows it", kind, since=90.5))


NOW = case(Verdict.PENDING)


def status(*cases: Case, **more: Any) -> dict[str, Any]:
    return {"looked_at": time.time(), "containers": [case_form(c) for c in cases], **more}


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Write what the daemon's status file holds: JSON, or the very text."""
    monkeypatch.setattr(state, "RUNTIME_DIR", tmp_path)
    return lambda data: (tmp_path / "status.json").write_text(data if isinstance(data, str) else json.dumps(data))


def verdict() -> Verdict:
    (found,) = cli._with_daemons_word([NOW], GAP)
    return found.judgement.verdict


def test_what_the_daemon_calls_an_orphan_is_one(say: Say) -> None:
    assert verdict() is Verdict.PENDING, "no daemon"
    say(status(case(Verdict.FOREIGN), case(Verdict.ORPHAN)))
    (found,) = cli._with_daemons_word([NOW], GAP)
    assert (found.judgement.verdict, found.judgement.since) == (Verdict.ORPHAN, 90.5)
    managed = case(Verdict.MANAGED)
    assert cli._with_daemons_word([managed], GAP) == [managed], "its own answers decide"


@pytest.mark.parametrize(
    "other",
    [
        case(Verdict.PENDING),
        case(Verdict.ORPHAN, kind=Kind.DISOWNED),  # from one to the other the grace begins anew
        case(Verdict.ORPHAN, replace(SIGHTING, namespace="k8s.io")),
        case(Verdict.ORPHAN, replace(SIGHTING, shim=None)),
        case(Verdict.ORPHAN, replace(SIGHTING, inits=())),
        case(Verdict.ORPHAN, replace(SIGHTING, shim=replace(SHIM, process=ProcessId(4711, 7)))),
    ],
)
def test_another_is_none(say: Say, other: Case) -> None:
    say(status(other))
    assert verdict() is Verdict.PENDING


@pytest.mark.parametrize("ago", [GAP + 5.0, -GAP - 5.0, float("nan"), 10**400, "yesterday", None])
def test_old_news_is_none(say: Say, ago: Any) -> None:
    """After such a gap the daemon itself begins anew."""
    say(status(case(Verdict.ORPHAN), looked_at=time.time() - ago if isinstance(ago, float) else ago))
    assert verdict() is Verdict.PENDING


BROKEN = {**case_form(case(Verdict.ORPHAN)), "since": 10**400}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "[" * 200_000, "7", status(containers=7), status(containers=[BROKEN])]
)
def test_what_is_no_status_file_is_passed_over(say: Say, text: Any) -> None:
    say(text)
    assert verdict() is Verdict.PENDING
