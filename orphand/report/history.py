# SPDX-License-Identifier: Apache-2.0
"""What orphand found and did, read back from the journal."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from typing import Any, Optional

from orphand.report.topics import Topic

STORY = (
    Topic.SUSPECTED,
    Topic.CLEARED,
    Topic.ORPHANED,
    Topic.ENDING,
    Topic.ENDED,
    Topic.END_REFUSED,
    Topic.END_FAILED,
    Topic.BREAKER_TRIPPED,
    Topic.BREAKER_RESET,
    Topic.HELD,
    Topic.RESUMED,
)


def read(since: Optional[datetime.datetime] = None, directory: Optional[str] = None) -> Iterator[dict[str, Any]]:
    """orphand's own records, oldest first.

    Only what root wrote counts: everybody may log under the name orphand, but journald itself
    adds _UID (systemd.journal-fields(7)). Raises OSError where the journal can't be read.
    """
    from systemd import journal

    with journal.Reader(path=directory) if directory else journal.Reader() as reader:
        reader.add_match(_UID="0")
        reader.add_conjunction()
        for topic in STORY:
            reader.add_match(MESSAGE_ID=topic.message_id)
        if since:
            reader.seek_realtime(since)
        else:
            reader.seek_head()
        for entry in reader:
            yield _record(entry)


def _record(entry: Mapping[str, Any]) -> dict[str, Any]:
    topics = {topic.message_id: topic.name.lower().replace("_", "-") for topic in Topic}
    message_id = entry.get("MESSAGE_ID")
    topic = topics.get(getattr(message_id, "hex", str(message_id)), "")
    fields = {k[8:].lower(): str(v) for k, v in entry.items() if k.startswith("ORPHAND_")}
    return {
        "time": entry["__REALTIME_TIMESTAMP"].astimezone().isoformat(timespec="seconds"),
        "event": topic,
        "message": str(entry.get("MESSAGE", "")),
        **fields,
    }
