# SPDX-License-Identifier: Apache-2.0
"""Whatever is in a journal line, the hint is a short sentence of ours or nothing."""

from __future__ import annotations

import json
import re
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from orphand.triggers.journal import hint

SENTENCE = re.compile(r"[a-z ]{0,60}( [0-9a-f]{12})?")
WORDS = st.sampled_from(["unknown container", "msg=", 'msg="', '"', "\\", "ab" * 32, "loading container", "{", "\n"])


@given(st.one_of(st.text(), st.binary(), st.lists(WORDS).map("".join), st.none(), st.integers()))
def test_any_line(line: object) -> None:
    assert SENTENCE.fullmatch(hint(line))


@given(st.dictionaries(st.sampled_from(["msg", "error", "x"]), st.text() | st.integers() | st.lists(WORDS)))
def test_any_json(record: Any) -> None:
    assert SENTENCE.fullmatch(hint(json.dumps(record)))
