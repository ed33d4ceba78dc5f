# SPDX-License-Identifier: Apache-2.0
"""The wire format: vectors from protobuf's own documentation, and laws."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orphand.authorities import wire

numbers = st.integers(1, wire.MAX_NUMBER)
values = st.one_of(st.integers(0, 2**64 - 1), st.binary(max_size=50))


@pytest.mark.parametrize(
    ("fields", "data"),
    [
        pytest.param([(1, 150)], "089601", id="varint"),
        pytest.param([(2, "testing")], "120774657374696e67", id="string"),
        pytest.param([(4, True)], "2001", id="bool"),
        pytest.param([(1, ""), (2, 0), (3, False)], "", id="proto3-leaves-defaults-out"),
        pytest.param([(1, b"\x00" * 200)], "0ac801" + "00" * 200, id="long"),
    ],
)
def test_encoding(fields: list[tuple[int, object]], data: str) -> None:
    assert wire.encode(fields).hex() == data  # type: ignore[arg-type]


def test_a_message_of_containerds() -> None:
    """A ListTasksResponse as containerd 1.6 sent it, with a timestamp in field 10."""
    task = wire.encode([(2, "web"), (3, 12220), (4, 2), (10, wire.encode([(1, 1700000000)]))])
    (read,) = wire.messages(wire.decode(wire.encode([(1, task)])), 1)
    assert (wire.text(read, 1), wire.text(read, 2), wire.integer(read, 3)) == ("", "web", 12220)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param("08", id="a-key-without-a-value"),
        pytest.param("0aff", id="an-unfinished-length"),
        pytest.param("0a05aabb", id="longer-than-what-is-there"),
        pytest.param("0bff", id="a-group"),
        pytest.param("0001", id="field-number-0"),
        pytest.param("08" + "ff" * 10 + "01", id="a-number-of-eleven-bytes"),
        pytest.param("08ffffffffffffffffff7f", id="more-than-64-bits"),
        pytest.param("0d0000", id="half-a-fixed32"),
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n".hex(), id="http"),
        pytest.param(b"<html><body>".hex(), id="html"),
    ],
)
def test_garbage_is_an_error(data: str) -> None:
    with pytest.raises(wire.WireError):
        wire.decode(bytes.fromhex(data))


@given(st.lists(st.tuples(numbers, values), max_size=20))
def test_what_was_encoded_is_decoded(fields: list[tuple[int, object]]) -> None:
    expected: dict[int, list[object]] = {}
    for number, value in fields:
        if value:
            expected.setdefault(number, []).append(value)
    assert wire.decode(wire.encode(fields)) == expected  # type: ignore[arg-type]


@given(st.binary(max_size=200))
def test_no_bytes_do_worse_than_an_error(data: bytes) -> None:
    try:
        message = wire.decode(data)
        for number in message:
            for read in (wire.text, wire.integer, wire.messages):
                try:
                    read(message, number)
                except wire.WireError:
                    continue
    except wire.WireError:
        pass


@pytest.mark.parametrize("read", [wire.integer, wire.text, wire.messages])
def test_a_field_of_another_kind_is_an_error(read: object) -> None:
    message = wire.decode(wire.encode([(1, b"\xff\xfe")]) if read is not wire.messages else wire.encode([(1, 7)]))
    with pytest.raises(wire.WireError):
        read(message, 1)  # type: ignore[operator]


def test_a_missing_field_is_the_default() -> None:
    assert (wire.text({}, 1), wire.integer({}, 1), wire.messages({}, 1)) == ("", 0, [])
