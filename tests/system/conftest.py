# SPDX-License-Identifier: Apache-2.0
"""Real parts of the system for tests: a journald of one's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest

ROOT = Path(__file__).parents[2]
WRAPPER = Path(__file__).parent / "private-journald"
PATIENCE = 120.0  # seconds; a machine under load starts journald slowly

Told = Callable[[str], list[dict[str, Any]]]


@pytest.fixture
def journal_of(tmp_path: Path) -> Told:
    """Runs Python code with a journald of its own; the records that are in its journal afterwards, oldest first."""
    assert os.geteuid() == 0, "a private journald needs root"

    def run(code: str) -> list[dict[str, Any]]:
        show = "journalctl --sync; journalctl --no-pager -o json -q"
        argv = [os.fspath(WRAPPER), os.fspath(tmp_path), "sh", "-ec", f'"$0" -c "$1"; {show}', sys.executable, code]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run
