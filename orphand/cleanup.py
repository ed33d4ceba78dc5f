# SPDX-License-Identifier: Apache-2.0
"""What only the ended container owned is taken away, and nothing that can't be tied to it; then looked at again."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Callable, Optional

from orphand import cgroupfs, mounts
from orphand.authorities.listeners import listening_inodes
from orphand.endings import company
from orphand.errors import Denied, Gone, ProcError
from orphand.estate import SOCKETS, Estate, RuncState, is_aborted_runc, is_bundle, read_runc_state
from orphand.model import ProcessId
from orphand.proc import Proc

RUNC_SECONDS = 30.0
ABORTED_SECONDS = 5.0  # between two steps of runc that follow each other at once
MAX_ENTRIES = 10_000  # of a bundle or work directory: a dozen are usual

Say = Callable[[str], None]


def clean(estate: Estate, proc: Proc, say: Say) -> None:
    """Remove the container's leftovers, one by one, each said; one that can't be removed is said too.

    To be called when no process of it is left. Blocks for as long as runc and umount take, at most a minute.
    """
    if anybody(estate, proc):
        say("nothing is cleaned up, since processes of it are left")
        return
    _remove_socket(estate, say)  # first: while the rest is there, no new shim of that id gets to bind the name
    others = strangers(estate, proc)
    if others:
        say(f"left its cgroups and runc's record: {_first(others)}")
    else:
        _delete_runc_state(estate, proc, say)
        for directory, inode in sorted(estate.cgroups.items()):
            if cgroupfs.inode(directory) == inode:
                _told(say, f"cgroup {directory}", cgroupfs.remove(directory))
    for point in _own_mounts(estate):
        _told(say, f"mount {point}", mounts.unmount(point))
    for directory in _own_directories(estate):
        _told(say, directory, remove_directory(directory, estate))
    _remove_netns(estate, proc, say)


def _told(say: Say, what: str, obstacle: str) -> None:
    say(f"could not remove {what}: {obstacle}" if obstacle else f"removed {what}")


def _first(others: Mapping[ProcessId, str]) -> str:
    process, why = next(iter(sorted(others.items())))
    return f"process {process.pid} is in its cgroup, but not its own ({why})"


def living(estate: Estate, proc: Proc) -> list[ProcessId]:
    """The container's own processes that still run: inits and what is in its cgroups."""
    members = cgroup_members(estate, proc)
    others = company(estate, members, proc)
    return sorted({*_alive(estate.inits, proc), *(m for m in members if m not in others)})


def strangers(estate: Estate, proc: Proc) -> dict[ProcessId, str]:
    """Who else is in its cgroups, and why it is not the container's."""
    return company(estate, cgroup_members(estate, proc), proc)


def anybody(estate: Estate, proc: Proc) -> list[ProcessId]:
    """All that an end must have ended: the container's processes, and its shim unless others need it."""
    shim = [estate.doomed_shim] if estate.doomed_shim else []
    return [*living(estate, proc), *_alive(shim, proc)]


def cgroup_members(estate: Estate, proc: Proc) -> dict[ProcessId, str]:
    """The processes in the container's cgroups. A cgroup that was made anew since is somebody else's."""
    same = [directory for directory, inode in estate.cgroups.items() if cgroupfs.inode(directory) == inode]
    return cgroupfs.members(same, proc, cgroupfs.hierarchies())


def _alive(processes: Sequence[ProcessId], proc: Proc) -> Iterator[ProcessId]:
    for process in processes:
        try:
            if proc.alive(process):
                yield process
        except ProcError:
            yield process  # not seen to be gone


def _delete_runc_state(estate: Estate, proc: Proc, say: Say) -> None:
    """`runc delete` kills what is in the cgroup that its record names, so that must be our dead init's record."""
    state = _own_runc_state(estate)
    if state is None:
        _remove_aborted(estate.runc, say)
        return
    if estate.inits and not state.init.pid:
        say(f"left {estate.runc}: it is of a container that is being made")
        return
    if state.init.pid and list(_alive([state.init], proc)):
        say(f"left {estate.runc}: its process {state.init.pid} runs")
        return
    root, _, container_id = estate.runc.rpartition("/")
    command = ["runc", "--root", root, "delete", "--force", container_id]
    _told(say, f"runc's record {estate.runc}", mounts.run(command, RUNC_SECONDS))


def _remove_aborted(directory: str, say: Say) -> None:
    """A directory without a record. Not by `runc delete --force`: a new container of the same id may be about to be
    recorded in it, and would be killed; an rmdir can't harm that. Nor does it to take away the fifo that runc makes
    before its record (libcontainer, createExecFifo), if that lies there for longer than a creation takes."""
    if not directory or not is_aborted_runc(directory):
        return
    fifo = f"{directory}/exec.fifo"
    try:
        if os.path.lexists(fifo) and time.time() - os.lstat(fifo).st_ctime > ABORTED_SECONDS:
            os.unlink(fifo)
        os.rmdir(directory)
    except OSError as error:
        say(f"left {directory}: {error.strerror}")
    else:
        say(f"removed {directory}, in which runc had not recorded anything yet")


def _own_runc_state(estate: Estate) -> Optional[RuncState]:
    """runc's record, unless it is a newer one of the same id."""
    state = read_runc_state(estate.runc) if estate.runc else None
    return state if state and state.init == estate.runc_init else None


def _own_directories(estate: Estate) -> list[str]:
    """Bundle and work directory, unless somebody has made them anew since, for a new container of that id."""
    return [d for d, inode in sorted(estate.directories.items()) if cgroupfs.inode(d) == inode]


def _own_mounts(estate: Estate) -> list[str]:
    """What is mounted in its bundle."""
    own = estate.bundle in _own_directories(estate)
    own = own and is_bundle(estate.bundle, estate.namespace, estate.container_id)
    return mounts.beneath(estate.bundle) if own else []


def remove_directory(directory: str, estate: Estate) -> str:
    """Remove a bundle or work directory of the container's, without following links or leaving its device.

    containerd itself refuses a bundle whose rootfs isn't empty (bundle.go, Delete), and so does this.
    What was in the way, or "".
    """
    if not is_bundle(directory, estate.namespace, estate.container_id):
        return "its path is not one of containerd's"
    if mounts.beneath(directory):
        return "something is mounted in it"
    parent, name = os.path.split(directory)
    try:
        fd = _open_directory(parent)
    except OSError as error:
        return f"{error.strerror}"
    try:
        _empty(name, fd, os.fstat(fd).st_dev, [MAX_ENTRIES])
        os.rmdir(name, dir_fd=fd)
    except OSError as error:
        return f"{error.filename or name}: {error.strerror or error}"
    finally:
        os.close(fd)
    return ""


def _open_directory(path: str) -> int:
    """An open directory, reached without a single link on the way."""
    fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for part in filter(None, path.split("/")):
        try:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        finally:
            os.close(fd)
        fd = below
    return fd


def _empty(name: str, parent: int, device: int, budget: list[int]) -> None:
    """Unlink everything in the directory but what is in `rootfs`, which must be empty."""
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        if os.fstat(fd).st_dev != device:
            raise OSError(0, "another file system is mounted there", name)
        for entry in os.listdir(fd):
            budget[0] -= 1
            if budget[0] < 0:
                raise OSError(0, f"more than {MAX_ENTRIES} files in it", name)
            if not stat.S_ISDIR(os.stat(entry, dir_fd=fd, follow_symlinks=False).st_mode):
                os.unlink(entry, dir_fd=fd)
                continue
            if entry != "rootfs":
                _empty(entry, fd, device, budget)
            os.rmdir(entry, dir_fd=fd)
    finally:
        os.close(fd)


def _remove_socket(estate: Estate, say: Say) -> None:
    if _socket_left(estate):
        try:
            os.unlink(estate.socket)
            obstacle = ""
        except OSError as error:
            obstacle = str(error.strerror)
        _told(say, f"socket {estate.socket}", obstacle)


def _socket_left(estate: Estate) -> bool:
    """Whether its shim's socket file is there and nobody listens on it any more."""
    if estate.shim_shared or os.path.dirname(estate.socket) != SOCKETS:
        return False
    try:
        there = stat.S_ISSOCK(os.stat(estate.socket, follow_symlinks=False).st_mode)
    except OSError:
        return False
    return there and not listening_inodes(estate.socket)


def _remove_netns(estate: Estate, proc: Proc, say: Say) -> None:
    """The file that keeps its network namespace; the namespace's veth goes with it."""
    user = _user_of_netns(estate.netns, proc)
    for point in _netns_files(estate):
        if user:
            say(f"left {point}: process {user} is in that network namespace")
            continue
        obstacle = mounts.unmount(point)
        if not obstacle:
            try:
                os.unlink(point)
            except OSError as error:
                obstacle = str(error.strerror)
        _told(say, f"network namespace {point}", obstacle)


def _netns_files(estate: Estate) -> list[str]:
    """The files that still keep the namespace as they did when the end began.

    Another namespace may have its inode once they are gone (the kernel hands out the lowest free one), also one
    without a process, such as a swarm's ingress_sbox.
    """
    if not estate.netns_files:
        return []
    return [p for p in mounts.of_namespace("net", estate.netns) if p in estate.netns_files]


def _user_of_netns(inode: int, proc: Proc) -> int:
    """The pid of some process that is in the namespace or can't be seen not to be, 0 if there is none."""
    for pid in proc.pids() if inode else ():
        try:
            if proc.namespace(pid, "net") == inode:
                return pid
        except Gone:
            continue
        except Denied:
            return pid
    return 0


def leftovers(estate: Estate, proc: Proc, cleaned: bool) -> list[str]:
    """A second look: what of the container is still there, and what to do by hand. Empty: nothing.

    With `cleaned` false only processes count.
    """
    found = [f"process {_condition(p, proc)}" for p in living(estate, proc)]
    if estate.doomed_shim and list(_alive([estate.doomed_shim], proc)):
        found.append(f"shim {_condition(estate.doomed_shim, proc)}")
    if not cleaned:
        return found
    others = strangers(estate, proc)
    if others:
        found.append(f"its cgroups: {_first(others)}, so they stay while it does")
    else:
        found += [f"cgroup {d}: rmdir it" for d, inode in sorted(estate.cgroups.items()) if cgroupfs.inode(d) == inode]
    found += [f"mount {p}: umount {p}" for p in _own_mounts(estate)]
    found += [f"directory {d}: rm -r {d}" for d in _own_directories(estate)]
    if _own_runc_state(estate) and not others:
        root, _, container_id = estate.runc.rpartition("/")
        found.append(f"runc's record {estate.runc}: runc --root {root} delete --force {container_id}")
    if _socket_left(estate):
        found.append(f"socket {estate.socket}: rm {estate.socket}")
    if not _user_of_netns(estate.netns, proc):
        found += [f"network namespace {p}: umount {p} && rm {p}" for p in _netns_files(estate)]
    return found


def others_things(estate: Estate, proc: Proc) -> list[str]:
    """What the container leaves behind that is dockerd's to remove, or can't be tied to it for certain."""
    found = []
    if estate.rootfs and not estate.rootfs.startswith(f"{estate.bundle}/"):
        try:
            mounted = any(m.point == estate.rootfs for m in mounts.of_host())
        except OSError:
            mounted = False
        if mounted:
            found.append(f"left to its engine: the layer mounted at {estate.rootfs}")
    for pid, address in _proxies(estate.addresses, proc):
        found.append(
            f"left: docker-proxy {pid} forwards to {address}, which was its address, "
            "but dockerd may have given it to another container since"
        )
    return found


def _proxies(addresses: Sequence[str], proc: Proc) -> Iterator[tuple[int, str]]:
    for pid in proc.pids() if addresses else ():
        try:
            argv = proc.cmdline(pid)
        except ProcError:
            continue
        if argv and os.path.basename(argv[0]) == "docker-proxy":
            for option, value in zip(argv, argv[1:]):
                if option == "-container-ip" and value in addresses:
                    yield pid, value


def _condition(process: ProcessId, proc: Proc) -> str:
    """The process and why it may still be there, for a human."""
    try:
        state = proc.stat(process.pid).state
    except ProcError:
        return f"{process.pid}"
    if state == "D":
        return (
            f"{process.pid} is in uninterruptible sleep (D, {_wchan(process.pid, proc)}): "
            "it dies when what it waits for answers (storage, NFS), or with a reboot"
        )
    return f"{process.pid} ({state}): kill -KILL {process.pid}"


def _wchan(pid: int, proc: Proc) -> str:
    """The kernel function in which it waits."""
    try:
        return (proc.root / str(pid) / "wchan").read_text(errors="replace")[:64] or "?"
    except OSError:
        return "?"
