# SPDX-License-Identifier: Apache-2.0
"""The churn test in short, and a proof that its oracle sees what it has to see. `make test-churn` runs long ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.churn.plan import KINDS, make_plan
from tests.host.guest import ROOT


def churn(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """(exit status, report, output) of a run."""
    report = tmp_path / "report.json"
    argv = [sys.executable, "-m", "tests.churn", "--json", str(report), *options]
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1500)
    return done.returncode, json.loads(report.read_text()) if report.exists() else {}, done.stdout


@pytest.mark.parametrize("cgroup", ["v1", "v2"])
def test_nothing_managed_is_harmed_and_every_orphan_ends(tmp_path: Path, cgroup: str) -> None:
    status, report, output = churn(tmp_path, "--lives=150", "--seed=11", f"--cgroup={cgroup}", "--every=30")
    assert status == 0, output
    assert report["managed_killed"] == [] and report["residue"] == []
    assert report["orphans"] == report["orphans_ended"] > 0


def test_the_oracle_sees_a_killer(tmp_path: Path) -> None:
    """A stand-in for orphand kills managed containers, with a record and without one in turn."""
    status, report, output = churn(tmp_path, "--lives=20", "--seed=12", "--cgroup=v2", "--every=20", "--saboteur")
    assert status == 1, output
    ways = [bool(killed["act"]) for killed in report["managed_killed"]]
    assert True in ways and False in ways, output
    assert "churn: seed 12: FAILED" in output
    story = next(lines for lines in report["stories"].values() if any("died" in line for line in lines))
    assert any("driver: start" in line for line in story)


def test_the_same_seed_makes_the_same_plan() -> None:
    plan = make_plan(5, 3000, 25, "v1")
    assert plan == make_plan(5, 3000, 25, "v1") != make_plan(6, 3000, 25, "v1")
    assert {e.what for e in plan.events} >= set(KINDS)
    assert {life.runtime for life in plan.lives} == {"v1", "v2"}
    assert {life.runtime for life in make_plan(5, 3000, 25, "v2").lives} == {"v2"}
