# SPDX-License-Identifier: Apache-2.0
"""What is kept over a restart, and what happens when it can't be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orphand import state
from orphand.policy import Budget
from orphand.state import Hold, State

BOOT = "b0"


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    kept = State(BOOT, Budget((1.0, 2.0), 5.0), frozenset({"a", "b"}), "4 of 5", {"x": {"pid": 3}})
    state.save_state(tmp_path / "state.json", kept)
    assert state.load_state(tmp_path / "state.json", BOOT, 9.0, 120.0) == kept


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"boot_id": "b0"}',
        '{"boot_id":"b0","spent":3,"closed_until":0,"ends":{},"alerted":[],"tripped":""}',
        "\x00\xff",
    ],
)
def test_missing_or_broken_closes_the_budget_while_engines_settle(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "state.json"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    assert state.load_state(path, BOOT, 9.0, 120.0) == State(BOOT, Budget(closed_until=129.0))


def test_another_boots_state_is_not_taken(tmp_path: Path) -> None:
    state.save_state(tmp_path / "s", State("other", Budget((1.0,)), frozenset({"a"})))
    assert state.load_state(tmp_path / "s", BOOT, 9.0, 120.0) == State(BOOT, Budget(closed_until=129.0))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "directory"])
def test_what_is_no_file_is_neither_read_nor_waited_for(tmp_path: Path, make: object) -> None:
    make(tmp_path / "s")  # type: ignore[operator]
    assert state.load_state(tmp_path / "s", BOOT, 0.0, 1.0).budget.closed_until == 1.0


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    state.save_state(tmp_path / "real", State(BOOT, Budget((1.0,))))
    (tmp_path / "s").symlink_to(tmp_path / "real")
    assert state.load_state(tmp_path / "s", BOOT, 0.0, 1.0).budget.spent == ()


def test_a_write_that_fails_says_so_and_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = State(BOOT, tripped="old")
    state.save_state(tmp_path / "s", old)

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(state.StateError, match="No space left"):
        state.save_state(tmp_path / "s", State(BOOT, tripped="new"))
    assert state.load_state(tmp_path / "s", BOOT, 0.0, 1.0) == old
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_ends_are_added_and_finished() -> None:
    begun = state.with_end(State(BOOT), "x", {"pid": 3})
    assert begun.ends == {"x": {"pid": 3}}
    assert state.with_end(begun, "x", None).ends == {}


class TestHold:
    def test_for_good_and_for_a_time(self, tmp_path: Path) -> None:
        assert state.read_hold(tmp_path) is None
        for hold in (Hold("storage work", None, "root"), Hold("", 200.0, "ann")):
            state.write_hold(hold, tmp_path)
            assert state.read_hold(tmp_path, now=100.0) == hold
        assert state.read_hold(tmp_path, now=200.0) is None
        state.write_hold(None, tmp_path)
        state.write_hold(None, tmp_path)
        assert state.read_hold(tmp_path, now=100.0) is None

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"reason": "x"}', '{"reason":"x","until":"soon","by":""}'])
    def test_one_that_cannot_be_read_holds(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "hold.json").write_text(text)
        hold = state.read_hold(tmp_path)
        assert hold
        assert hold.damaged
        assert "orphand resume" in hold.words()


def test_one_end_at_a_time(tmp_path: Path) -> None:
    with state.locked(tmp_path / "l") as first, state.locked(tmp_path / "l") as second:
        assert (first, second) == (True, False)
    with state.locked(tmp_path / "l") as third:
        assert third
