# SPDX-License-Identifier: Apache-2.0
"""Laws of masking: one line, printable, bounded, stable, whatever a container calls itself."""

from __future__ import annotations

import re

from hypothesis import example, given
from hypothesis import strategies as st

from orphand.masking import field_name, masked, quoted, short_id

ANYTHING = st.text(st.characters(), max_size=300)  # with surrogates, controls, everything
NASTY = st.text(st.sampled_from("a \x1b\n\r\x9b\u202e\u2066\udc80\u200b\u2028\U000e0001\"'\\"), max_size=40)
TEXTS = st.one_of(ANYTHING, NASTY)
LIMITS = st.integers(0, 80)


@given(TEXTS, LIMITS)
@example("a" * 300, 1)
@example("\x1b" * 30, 3)
def test_masked_is_printable_and_bounded(text: str, limit: int) -> None:
    out = masked(text, limit)
    assert out.isprintable()
    assert len(out) <= limit
    out.encode()


@given(TEXTS, LIMITS)
def test_masking_twice_changes_nothing(text: str, limit: int) -> None:
    assert masked(masked(text, limit), limit) == masked(text, limit)


@given(TEXTS)
def test_what_is_printable_stays(text: str) -> None:
    if text.isprintable() and len(text) <= 256:
        assert masked(text) == text


@given(NASTY)
def test_nothing_is_lost_below_the_limit(text: str) -> None:
    """Each character is there, as itself or as its escape; so two names never become one by being masked."""
    out = masked(text, 10_000)
    shown = re.sub(r"\\(?:x(..)|u(....)|U(........))", lambda m: chr(int(m[1] or m[2] or m[3], 16)), out)
    assert shown.replace("\\n", "\n").replace("\\r", "\r") == text or "\\" in text


@given(TEXTS)
def test_a_quoted_value_can_not_leave_its_quotes(text: str) -> None:
    out = quoted(text)
    assert out.isprintable()
    assert (out[0] == out[-1] == '"' and '"' not in out[1:-1]) or " " not in out


@given(TEXTS)
def test_a_field_name_is_one_that_the_journal_takes(text: str) -> None:
    assert re.fullmatch(r"([A-Z][A-Z0-9_]{0,63})?", field_name(text))


@given(TEXTS)
def test_a_short_id_is_short_and_printable(text: str) -> None:
    assert short_id(text).isprintable()
    assert len(short_id(text)) <= 82
