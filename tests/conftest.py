# SPDX-License-Identifier: Apache-2.0
"""For all tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """pytest's own, with a short name wherever TMPDIR is: a socket's path has 108 bytes at most (unix(7))."""
    with tempfile.TemporaryDirectory(prefix="o", dir="/tmp") as directory:
        yield Path(directory)
