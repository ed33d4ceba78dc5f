# SPDX-License-Identifier: Apache-2.0
"""The bench still runs, at its smallest: every part gives figures. What they are is nothing to test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.bench.tables import PART
from tests.host.guest import ROOT


def test_the_bench_runs(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "tests.bench", "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())["parts"]
    assert set(found) == set(PART)
    (row,) = found["rescan"]["rows"]
    assert row["by"]["seen"]["shims"] == row["shims"]
    assert all(spread["median"] > 0 for name, spread in row["by"].items() if name != "seen")
    assert all(one["seconds"]["n"] == 2 for one in found["latency"].values())
    assert all(row["memory"]["rss"] > 0 and row["syscalls"]["all"] > 0 for row in found["growth"]["rows"])
    assert found["startup"]["to ready"]["cpu"]["median"] > 0
    assert found["calls"]["by"]["start"]["docker"]["GET /containers/json"] >= 1
    assert found["idle"]["by"]["orphand"]["memory"]["rss"] > 0
    assert found["storms"]["containers"]["done"] == 4
    assert found["storms"]["containers"]["looks"] > 0
    page = (tmp_path / "results.md").read_text()
    assert all(f"## {title}" in page for title in ("Finding the shims", "Idle", "Storms", "Start-up"))
