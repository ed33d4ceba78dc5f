# SPDX-License-Identifier: Apache-2.0
"""Making text that came from outside safe to print: one line, no terminal escapes, bounded. Pure.

Names, labels, argv and engines' answers can be written by a container or an unprivileged user. Whatever
is printed of them, on a terminal, in the journal or in an alert, goes through here.
"""

from __future__ import annotations

import re

LIMIT = 256  # characters of one value
MESSAGE_LIMIT = 4096  # of a whole sentence
ELLIPSIS = "…"
PLAIN = re.compile(r"[\w.,:/@+*%=\[\]~#-]+")
FIELD_LIMIT = 64  # of a journal field's name, systemd src/shared/journal-util (journal_field_valid)
SHORT_ID = 12
ID_LIMIT = 80  # containerd allows 76 characters


def masked(text: str, limit: int = LIMIT) -> str:
    """The text on one line, with everything that isn't printable as a visible escape, at most `limit` characters.

    Control and format characters (escape sequences, newlines, bidi controls, zero-width ones), lone
    surrogates (bytes that were not UTF-8), unassigned and private ones become \\n, \\x1b, \\u202e. A second
    masking changes nothing. The cut never splits an escape.
    """
    if len(text) <= limit and text.isprintable():
        return text
    pieces: list[str] = []
    room = limit
    for character in text[: limit + 1]:
        piece = character if character.isprintable() else _escape(character)
        room -= len(piece)
        if room < 0:
            return _cut(pieces, limit)
        pieces.append(piece)
    return "".join(pieces)


def _cut(pieces: list[str], limit: int) -> str:
    kept = list(pieces)
    while kept and sum(map(len, kept)) + len(ELLIPSIS) > limit:
        kept.pop()
    return "".join(kept) + (ELLIPSIS if limit > 0 else "")


def _escape(character: str) -> str:
    named = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(character)
    if named:
        return named
    code = ord(character)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def quoted(text: str, limit: int = LIMIT) -> str:
    """A value for the middle of a sentence: as it is if nobody could take it for words of ours, else in quotes."""
    safe = masked(text, limit)
    if PLAIN.fullmatch(safe):
        return safe
    return '"' + safe.replace('"', "'") + '"'


def short_id(container_id: str) -> str:
    """The first 12 characters of an id that is 64 hex digits; another id (ctr's are names) whole, masked."""
    if re.fullmatch(r"[0-9a-f]{64}", container_id):
        return container_id[:SHORT_ID]
    return quoted(container_id, ID_LIMIT)


def field_name(name: str) -> str:
    """A journal field's name: capitals, digits and underscores, no underscore or digit first; "" if nothing is left."""
    return re.sub(r"[^A-Z0-9_]", "_", name.upper()[:FIELD_LIMIT]).lstrip("_0123456789")
