# SPDX-License-Identifier: Apache-2.0
"""Who listens on an engine's socket, when others bind names that are made to mislead."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from orphand.authorities import dockerd, listeners, peers


@contextlib.contextmanager
def bound(name: str) -> Iterator[int]:
    """The inode of a socket that listens by that name."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        yield os.fstat(server.fileno()).st_ino


@pytest.fixture(params=["sock_diag", "/proc/net/unix"])
def source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    def refuse() -> list[tuple[int, peers.Bound]]:
        raise OSError(93, "Protocol not supported")

    if request.param != "sock_diag":
        monkeypatch.setattr(peers, "listening", refuse)
    return str(request.param)


def test_an_engines_socket(source: str, tmp_path: Path) -> None:
    with bound(str(tmp_path / "docker.sock")) as inode:
        (tmp_path / "link").symlink_to(tmp_path)
        assert listeners.listening_inodes(str(tmp_path / "docker.sock")) == {inode}
        assert listeners.listening_inodes(str(tmp_path / "link/docker.sock")) == {inode}
        assert listeners.listening_inodes(str(tmp_path / "other.sock")) == frozenset()
        assert (inode, str(tmp_path / "docker.sock")) in listeners.listening()


def test_a_name_with_a_newline_blinds_nobody(source: str, tmp_path: Path) -> None:
    """An unprivileged user's socket: what the kernel prints of it is no line that can be read."""
    with bound(str(tmp_path / "docker.sock")) as inode, bound(str(tmp_path / "a\nb c d zz e f g h")):
        assert listeners.listening_inodes(str(tmp_path / "docker.sock")) == {inode}


def test_an_abstract_name(source: str) -> None:
    with bound("\0orphand-test") as inode:
        assert listeners.listening_inodes("@orphand-test") == {inode}


def test_a_server_holds_its_socket_at_a_low_descriptor_or_a_high_one() -> None:
    me = dockerd.process_id(os.getpid())
    assert me
    with socket.socket(socket.AF_UNIX) as low:
        inode = frozenset({os.fstat(low.fileno()).st_ino})
        assert listeners.holds(inode, me)
        high = os.dup(low.fileno())
        os.dup2(high, 400)
        os.close(high)
    assert listeners.holds(inode, me)
    os.close(400)
    assert not listeners.holds(inode, me)
    assert not listeners.holds(frozenset(), me)


def test_who_was_seen_to_listen_is_asked_for_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    kernel = peers._answers

    def listen(states: int, show: int, inode: int = 0) -> Iterator[bytes]:
        asked.append(inode)
        return kernel(states, show, inode)

    monkeypatch.setattr(peers, "_answers", listen)
    monkeypatch.setattr(peers, "_seen", {})
    path = tmp_path / "s"
    with bound(str(path)) as first:
        assert [peers.listening_on(os.stat(path)) for _ in range(2)] == [{first}, {first}]
        assert asked == [0, first]
        os.rename(path, tmp_path / "old")
        with bound(str(path)) as second, bound(str(tmp_path / "other")) as third:
            assert peers.listening_on(os.stat(path)) == {second}
            assert peers.listening_on(os.stat(tmp_path / "old")) == {first}
            found = os.stat(path)
            peers._seen[found.st_dev, found.st_ino & 0xFFFFFFFF] = third  # the number of an ended one, given anew
            assert peers.listening_on(found) == {second}
        assert peers.listening_on(found) == frozenset()
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(str(tmp_path / "silent"))
            found = os.stat(tmp_path / "silent")
            peers._seen[found.st_dev, found.st_ino & 0xFFFFFFFF] = os.fstat(silent.fileno()).st_ino
            assert peers.listening_on(found) == frozenset()


def test_a_forged_line_adds_no_listener() -> None:
    """Else any user's process that is called containerd, and older, could stand for the one that has just started."""
    with tempfile.TemporaryDirectory(prefix="o", dir="/tmp") as directory:  # a name has 107 bytes at most
        path = f"{directory}/s"
        forged = f"\0x\n0000000000000000: 00000002 00000000 00010000 0001 01 4242 {path}"
        with bound(path) as inode, bound(forged):
            assert f" 4242 {path}" in Path("/proc/net/unix").read_text()
            assert listeners.listening_inodes(path) == {inode}


def test_the_same_name_in_another_file_system_is_another_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container with --network=host and an engine of its own: its name stands in the host's list."""
    path = str(tmp_path / "containerd.sock")
    with bound(path) as inode:
        foreign = (inode + 1, peers.Bound(path, 99, 7))
        real = peers.listening
        monkeypatch.setattr(peers, "listening", lambda: [*real(), foreign])
        assert listeners.listening_inodes(path) == {inode}
        os.rename(path, f"{path}.old")
        assert listeners.listening_inodes(path) == frozenset()
