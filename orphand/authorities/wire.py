# SPDX-License-Identifier: Apache-2.0
"""The few protobuf messages that containerd is asked with: written and read without protobuf.

orphand needs a dozen fields of five services, and their numbers have not changed from containerd 1.2
to 2.x. Generated classes would tie the package to one range of protobuf's runtime (3.12 to 6.x differ
in what they load); the wire format itself never changes (protobuf.dev, "Encoding").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Union

from orphand.errors import OrphandError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
FIXED_BYTES = {FIXED64: 8, FIXED32: 4}
MAX_VARINT_BYTES = 10  # of 64 bits, seven a byte
MAX_NUMBER = (1 << 29) - 1  # of a field

Value = Union[int, bytes]
Message = Mapping[int, Sequence[Value]]


class WireError(OrphandError):
    """The bytes are no protobuf message, or not the one that was expected."""


def encode(fields: Iterable[tuple[int, Union[str, bytes, int, bool]]]) -> bytes:
    """A message of these (number, value); numbers must not be negative. Empty values are left out, as proto3 does."""
    return b"".join(_field(number, value) for number, value in fields if value)


def _field(number: int, value: Union[str, bytes, int, bool]) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3 | VARINT) + _varint(int(value))
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | BYTES) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    if value < 0:
        raise WireError(f"{value} is negative")
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode(data: bytes) -> Message:
    """The fields of one message by number, repeated ones in order; nested messages stay bytes.

    Unknown fields are kept (a newer containerd may add some). Raises WireError for anything that is
    no message from the first byte to the last.
    """
    fields: dict[int, list[Value]] = {}
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        number, form = key >> 3, key & 7
        if not 0 < number <= MAX_NUMBER:
            raise WireError(f"field number {number} at byte {at}")
        if form == VARINT:
            value, at = _read_varint(data, at)
            fields.setdefault(number, []).append(value)
            continue
        if form == BYTES:
            size, at = _read_varint(data, at)
        elif form in FIXED_BYTES:
            size = FIXED_BYTES[form]
        else:
            raise WireError(f"wire type {form} at byte {at}")
        if size > len(data) - at:
            raise WireError(f"field {number} claims {size} bytes, {len(data) - at} are left")
        fields.setdefault(number, []).append(data[at : at + size])
        at += size
    return fields


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(data[at : at + MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            if value >> 64:
                raise WireError(f"a number of more than 64 bits at byte {at}")
            return value, at + index + 1
    raise WireError(f"a number without an end at byte {at}")


def text(message: Message, number: int) -> str:
    """The string of that field, "" where it is missing (proto3's default); the last one counts."""
    value = _last(message, number, b"")
    if not isinstance(value, bytes):
        raise WireError(f"field {number} is a number, not a string")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise WireError(f"field {number} is no UTF-8") from error


def integer(message: Message, number: int) -> int:
    """The number of that field, 0 where it is missing."""
    value = _last(message, number, 0)
    if not isinstance(value, int):
        raise WireError(f"field {number} is no number")
    return value


def messages(message: Message, number: int) -> list[Message]:
    """The messages nested in that field, in order."""
    nested = message.get(number, ())
    if any(isinstance(value, int) for value in nested):
        raise WireError(f"field {number} is a number, not a message")
    return [decode(value) for value in nested if isinstance(value, bytes)]


def _last(message: Message, number: int, default: Value) -> Value:
    values = message.get(number)
    return values[-1] if values else default
