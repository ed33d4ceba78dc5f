# SPDX-License-Identifier: Apache-2.0
"""docs/safety.md names tests as proofs: each must be there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROOF = re.compile(r"(tests/[a-z_/]+\.py)::(\w+)")


def test_each_proof_is_a_test() -> None:
    proofs = PROOF.findall((ROOT / "docs/safety.md").read_text())
    assert len(proofs) > 30
    missing = [
        f"{path}::{name}"
        for path, name in proofs
        if not re.search(rf"^(?:def {name}\(|{name} = )", (ROOT / path).read_text(), re.MULTILINE)
    ]
    assert missing == []
