# SPDX-License-Identifier: Apache-2.0
"""Which listening Unix sockets a process is connected to, by NETLINK_SOCK_DIAG (sock_diag(7)).

This is how dockerd's own containerd is found: by the connection that it holds, whatever its
configuration says. Only the sockets of orphand's own network namespace are visible.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
REQUEST, DUMP = 0x1, 0x300  # NLM_F_REQUEST, NLM_F_DUMP
NLMSG_ERROR, NLMSG_DONE = 2, 3
SHOW_NAME, SHOW_VFS, SHOW_PEER = 1, 2, 4  # UDIAG_SHOW_*, linux/unix_diag.h
NAME, VFS, PEER = 0, 1, 2  # UNIX_DIAG_*
ESTABLISHED, LISTEN = 1 << 1, 1 << 10  # TCP_ESTABLISHED, TCP_LISTEN: the states of stream sockets
HEADER = struct.Struct("=IHHII")
ANSWER = struct.Struct("=BBBxI8x")
ATTRIBUTE = struct.Struct("=HH")
ANY_COOKIE = 0xFFFFFFFF  # INET_DIAG_NOCOOKIE
DEADLINE = 2.0  # seconds; the kernel answers from memory
_MAX_SEEN = 64
_seen: dict[tuple[int, int], int] = {}  # a socket's file -> the inode of who was seen to listen there


@dataclass(frozen=True)
class Bound:
    """The socket file at the far end of a connection: its path as bound, and the file itself where the kernel says."""

    path: str
    device: int = 0
    inode: int = 0  # the lower 32 bits

    def is_file(self, path: str) -> bool:
        """Is `path` this very socket file? By device and inode, or else by its resolved path."""
        try:
            stat = os.stat(path)
        except OSError:
            return False
        if self.inode and (stat.st_dev, stat.st_ino & 0xFFFFFFFF) == (self.device, self.inode):
            return True
        return os.path.realpath(path) == os.path.realpath(self.path)


@dataclass(frozen=True)
class _Socket:
    inode: int
    bound: Optional[Bound]
    peer: int
    listens: bool
    abstract: str = ""  # its name, with an @ for the NUL, where that is no file's

    def listens_on(self, device: int, number: int) -> bool:
        """Whether it listens behind that file."""
        bound = self.bound
        return self.listens and bound is not None and (bound.device, bound.inode) == (device, number)


def connected_to(pid: int, proc: Path = Path("/proc")) -> frozenset[Bound]:
    """The listening sockets that the process is a client of. OSError where we are not allowed to see."""
    own = set(socket_inodes(pid, proc))
    sockets = {s.inode: s for s in _sockets(ESTABLISHED)}
    peers = (sockets.get(s.peer) for inode, s in sockets.items() if inode in own and s.bound is None)
    return frozenset(p.bound for p in peers if p and p.bound)


def listening() -> list[tuple[int, Bound]]:
    """(inode, what it is bound to) of each listening socket of this network namespace. Raises OSError.

    An abstract name has an @ for its NUL, as in /proc/net/unix. That file prints names as they are, so that a name with
    a newline in it, which anybody may bind, reads like a line of the kernel's: it is no source for whom to believe.
    """
    found = ((s.inode, s.bound or Bound(s.abstract)) for s in _sockets(LISTEN))
    return [(inode, bound) for inode, bound in found if bound.path]


def listening_on(file: os.stat_result) -> frozenset[int]:
    """The inodes of the sockets that listen behind that very file, by its device and inode. Raises OSError.

    Every shim listens on a socket, and a look asks several times. So the one that was seen there last is asked for by
    itself: bind(2) makes the file, hence no other is bound to it. Else most answers are passed over unread.
    """
    device, number = file.st_dev, file.st_ino & 0xFFFFFFFF
    seen = _seen.get((device, number), 0)
    if seen and any(s.listens_on(device, number) for s in _sockets_by_inode(seen)):
        return frozenset({seen})
    said = struct.pack("=II", number, os.major(device) << 20 | os.minor(device))  # the kernel's dev_t, linux/kdev_t.h
    found = (_parse(payload) for payload in _answers(LISTEN, SHOW_NAME | SHOW_VFS) if said in payload)
    inodes = frozenset(s.inode for s in found if s.listens_on(device, number))
    if len(_seen) >= _MAX_SEEN:
        _seen.clear()
    _seen.update(((device, number), inode) for inode in inodes)
    return inodes


def socket_inodes(pid: int, proc: Path = Path("/proc")) -> Iterator[int]:
    """The inodes of the sockets that the process has open."""
    with os.scandir(f"{proc}/{pid}/fd") as entries:
        for entry in entries:
            try:
                target = os.readlink(entry.path)
            except OSError:
                continue
            if target.startswith("socket:["):
                yield int(target[8:-1])


def listener(path: str) -> tuple[int, int]:
    """(pid, uid) of the process that called listen() on the socket, by SO_PEERCRED (unix(7)).

    Connects and hangs up at once, so it must not be used on a socket that would wake a stopped service.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)  # a full backlog is EAGAIN, not a wait
        client.connect(path)
        return peer_of(client)


def peer_of(client: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process that called listen() on the socket that this one is connected to (unix(7))."""
    pid, uid, _gid = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def _sockets(states: int) -> Iterator[_Socket]:
    return map(_parse, _answers(states, SHOW_NAME | SHOW_VFS | SHOW_PEER))


def _sockets_by_inode(inode: int) -> Iterator[_Socket]:
    """The socket of that inode, if it is still there."""
    try:
        yield from map(_parse, _answers(LISTEN, SHOW_NAME | SHOW_VFS, inode))
    except FileNotFoundError:
        return


def _answers(states: int, show: int, inode: int = 0) -> Iterator[bytes]:
    """What the kernel says of all sockets in these states, or of that one in whatever state it is."""
    request = struct.pack("=BBHIIIII", socket.AF_UNIX, 0, 0, states, inode, show, ANY_COOKIE, ANY_COOKIE)
    flags = REQUEST if inode else REQUEST | DUMP
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_SOCK_DIAG) as link:
        link.settimeout(DEADLINE)
        link.send(HEADER.pack(HEADER.size + len(request), SOCK_DIAG_BY_FAMILY, flags, 1, 0) + request)
        while True:
            for kind, payload in _messages(link.recv(1 << 16)):
                if kind == NLMSG_DONE:
                    return
                if kind == NLMSG_ERROR:
                    raise OSError(-struct.unpack_from("=i", payload)[0], "sock_diag")
                yield payload
                if inode:  # its only answer
                    return


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    start = 0
    while len(data) - start >= HEADER.size:
        length, kind, *_ = HEADER.unpack_from(data, start)
        if length < HEADER.size:
            return
        yield kind, data[start + HEADER.size : start + length]
        start += _aligned(length)


def _parse(payload: bytes) -> _Socket:
    _family, _type, state, inode = ANSWER.unpack_from(payload)
    attributes = dict(_attributes(payload[ANSWER.size :]))
    name = attributes.get(NAME, b"")
    abstract = b"@" + name[1:] if name.startswith(b"\0") else b""
    path = name.rstrip(b"\0")
    device, file_inode = 0, 0
    if len(attributes.get(VFS, b"")) == 8:
        file_inode, kernel_device = struct.unpack("=II", attributes[VFS])
        device = os.makedev(kernel_device >> 20, kernel_device & 0xFFFFF)  # the kernel's own dev_t, linux/kdev_t.h
    bound = Bound(os.fsdecode(path), device, file_inode) if path.startswith(b"/") else None
    peer = struct.unpack("=I", attributes[PEER])[0] if len(attributes.get(PEER, b"")) == 4 else 0
    return _Socket(inode, bound, peer, 1 << state == LISTEN, os.fsdecode(abstract))


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= ATTRIBUTE.size:
        length, kind = ATTRIBUTE.unpack_from(data)
        if length < ATTRIBUTE.size:
            return
        yield kind, data[ATTRIBUTE.size : length]
        data = data[_aligned(length) :]


def _aligned(length: int) -> int:
    return (length + 3) & ~3
