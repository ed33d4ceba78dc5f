# SPDX-License-Identifier: Apache-2.0
"""The journal's catalog explains each kind of record, as journalctl itself reads it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from orphand.report.topics import Topic

CATALOG = Path(__file__).parents[2] / "systemd" / "orphand.catalog"
ENTRY = re.compile(r"^-- ([0-9a-f]{32})(?: \S+)?$", re.MULTILINE)


def entries() -> dict[str, str]:
    parts = ENTRY.split(CATALOG.read_text())
    return dict(zip(parts[1::2], parts[2::2]))


def test_each_topic_has_an_entry_and_no_entry_is_without_a_topic() -> None:
    assert list(entries()) == [topic.message_id for topic in Topic]


@pytest.mark.parametrize("topic", Topic, ids=lambda topic: topic.name)
def test_an_entry_has_a_subject_and_says_what_it_means(topic: Topic) -> None:
    head, _, body = entries()[topic.message_id].strip().partition("\n\n")
    keys = [line.split(": ", 1)[0] for line in head.splitlines()]
    assert keys == ["Subject", "Defined-By", "Support", "Documentation"]
    assert len(body) > 60
    assert all(len(line) <= 120 for line in body.splitlines())


def test_a_blank_line_stands_before_each_entry() -> None:
    lines = CATALOG.read_text().splitlines()
    for number, line in enumerate(lines):
        if ENTRY.match(line):
            assert lines[number - 1] == "", line


def test_fields_that_the_texts_name_are_fields_of_the_records() -> None:
    from orphand.report import journal

    known = set(re.findall(r'"(ORPHAND_[A-Z_]+)"', Path(journal.__file__).read_text()))
    assert set(re.findall(r"@([A-Z_]+)@", CATALOG.read_text())) <= known


def test_journalctl_compiles_it_whole(tmp_path: Path) -> None:
    journalctl = shutil.which("journalctl")
    assert journalctl, "journalctl is missing: install systemd"
    place = tmp_path / "usr/lib/systemd/catalog"
    place.mkdir(parents=True)
    shutil.copy(CATALOG, place)
    (tmp_path / "var/lib/systemd/catalog").mkdir(parents=True)
    subprocess.run([journalctl, f"--root={tmp_path}", "--update-catalog"], check=True, timeout=60)
    listed = subprocess.run(
        [journalctl, f"--root={tmp_path}", "--list-catalog"], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    found = dict(line.split(" ", 1) for line in listed.splitlines())
    assert set(found) == {topic.message_id for topic in Topic}
    assert all(": " in text for text in found.values())
