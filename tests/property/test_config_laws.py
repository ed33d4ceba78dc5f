# SPDX-License-Identifier: Apache-2.0
"""Laws of the configuration: whatever a file holds, it is Settings or a ConfigError with places, nothing else."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from orphand import config
from orphand.config_tree import Place, Scalar
from orphand.config_values import UnusableError, duration, written_duration
from orphand.errors import ConfigError
from orphand.model import Action
from orphand.settings import MIN_GRACE, Settings

KEYS = sorted({key for keys in (config.ROOT, *config.SECTIONS.values(), config.MATCH, config.RULE) for key in keys})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["kill", "log", "auto", "120s", "1ms", "9999999999d", "25%", "/run/x.sock", "https://h/", "Mon-Fri"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), inner),
    max_leaves=12,
)
ODDITIES = (
    *("- a", "&a", "*a", "\t", "---", "!!x", "{", "[", "'", '"', "|", ">", "%YAML 9.9", "? ", ": ", "<<: *a"),
    *("\u2028", "\x85", "\ufeff", "grace: 1s", "  - match: {}"),
)
LINES = st.lists(
    st.sampled_from([*(f"{key}:" for key in KEYS), *(f"  {key}: kill" for key in KEYS), *ODDITIES]), max_size=12
)


@pytest.fixture(scope="module")
def file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory) / "orphand.yaml"


def load(file: Path, content: bytes) -> Settings:
    """Settings, or ConfigError; every line of which must name the file."""
    file.write_bytes(content)
    try:
        return config.load([file])
    except ConfigError as error:
        lines = str(error).splitlines()
        assert lines
        for line in lines:
            assert line.startswith((f"{file}:", "and ")), line
            assert line.isprintable(), line
            assert len(line) < 2000
        raise


def survives(file: Path, content: bytes) -> None:
    try:
        loaded = load(file, content)
    except ConfigError:
        return
    if not loaded.kill.allow_short_grace:
        assert loaded.policy.grace >= MIN_GRACE
        assert all(rule.grace is None or rule.grace >= MIN_GRACE for rule in loaded.policy.rules)
    assert 0 <= loaded.kill.max_share <= 1


@given(st.binary(max_size=200))
@example(b'"\\UFFFFFFFF": 1')
@example(b"%YAML 99999999999999999999.1\n---\n")
@example(b"a: 2001-99-99")
@example(b"? ? ? a")
@example(b"!<tag:yaml.org,2002:int> x: 1")
def test_any_bytes(file: Path, content: bytes) -> None:
    survives(file, content)


@given(st.text(max_size=200))
def test_any_text(file: Path, content: str) -> None:
    survives(file, content.encode("utf-8", "surrogatepass"))


@given(LINES)
@hypothesis_settings(suppress_health_check=[HealthCheck.too_slow])
def test_any_lines_of_what_configs_are_made_of(file: Path, lines: list[str]) -> None:
    survives(file, "\n".join(lines).encode())


@given(VALUES)
@hypothesis_settings(suppress_health_check=[HealthCheck.too_slow])
def test_any_tree(file: Path, tree: Any) -> None:
    survives(file, yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass"))


@given(st.dictionaries(st.sampled_from(sorted(config.ROOT)), VALUES))
def test_nothing_but_the_word_kill_kills(file: Path, tree: Any) -> None:
    """Whatever else goes wrong: without the word there is no killing policy."""
    content = yaml.safe_dump(tree).replace("kill", "k_ll").encode("utf-8", "surrogatepass")
    try:
        loaded = load(file, content)
    except ConfigError:
        return
    assert loaded.policy.action is not Action.KILL
    assert all(rule.action is not Action.KILL for rule in loaded.policy.rules)


def scalar(text: str) -> Scalar:
    return Scalar(Place("f", 1, 1), text, "str")


@given(st.integers(0, 10**7))
def test_a_written_duration_is_read_as_it_was(seconds: int) -> None:
    assert duration(scalar(written_duration(seconds)), 0, 1e9) == seconds


@given(st.text(alphabet="0123456789.smhd -", max_size=10))
def test_a_duration_is_seconds_or_unusable(text: str) -> None:
    try:
        assert 0 <= duration(scalar(text), 0, 1e9) <= 1e9
    except UnusableError as error:
        assert "; " in str(error)
