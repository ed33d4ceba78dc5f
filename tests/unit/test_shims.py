# SPDX-License-Identifier: Apache-2.0
"""Every generation's argv, as reference and source have them; what forges one; what only looks like one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import pytest

from orphand.model import Generation
from orphand.shims import Recognised, gather, parse_arguments, read_host, recognise
from tests.fakeproc import FakeNode

A, B = "a" * 64, "b" * 64
SOCK = "/run/containerd/containerd.sock"
V2 = "/usr/bin/containerd-shim-runc-v2"


@pytest.fixture
def node(tmp_path: Path) -> FakeNode:
    return FakeNode(tmp_path)


def seen(node: FakeNode, pid: int) -> Optional[Recognised]:
    return recognise(gather(node.proc, pid), read_host(node.proc))


# (argv, cwd, generation, namespace, id, address)
GENERATIONS = [
    # containerd 1.3 to 2.x
    ([V2, "-namespace", "moby", "-id", A, "-address", SOCK], f"/x/moby/{A}", Generation.RUNC_V2, "moby", A, SOCK),
    ([V2, "-namespace", "moby", "-id", A, "-address", SOCK, "-debug"], f"/x/{A}", Generation.RUNC_V2, "moby", A, SOCK),
    (["containerd-shim-runc-v1", "-namespace", "k8s.io", "-id", A, "-address", SOCK], f"/x/{A}", Generation.RUNC_V1,
     "k8s.io", A, SOCK),
    # containerd 1.2: no id
    (["containerd-shim-runc-v1", "-namespace", "moby", "-address", SOCK, "-publish-binary", "/usr/bin/containerd"],
     f"/run/containerd/io.containerd.runtime.v2.task/moby/{A}", Generation.RUNC_V1, "moby", A, SOCK),
    (["containerd-shim-runc-v1", "-namespace", "moby", "-address", SOCK, "-publish-binary", "/usr/bin/containerd"],
     f"/run/containerd/io.containerd.runtime.v2.task/moby/.{A}", Generation.RUNC_V1, "moby", A, SOCK),
    # v1: Docker 18.09 to 20.10, and 17.12 to 18.06
    (["containerd-shim", "-namespace", "moby", "-workdir", f"/var/lib/x/io.containerd.runtime.v1.linux/moby/{A}",
      "-address", SOCK, "-containerd-binary", "/usr/bin/containerd", "-runtime-root", "/var/run/docker/runtime-runc",
      "-systemd-cgroup", "-debug"], f"/x/moby/{A}", Generation.V1, "moby", A, SOCK),
    (["docker-containerd-shim", "-namespace", "moby", "-workdir", f"/var/lib/docker/containerd/daemon/x/moby/{A}",
      "-address", "/var/run/docker/containerd/docker-containerd.sock", "-containerd-binary",
      "/usr/bin/docker-containerd", "-runtime-root", "/var/run/docker/runtime-runc"], f"/x/{A}", Generation.V1, "moby",
     A, "/var/run/docker/containerd/docker-containerd.sock"),
    # the forms of Go's flag package
    ([V2, "--namespace=moby", f"--id={A}", "-address=" + SOCK], f"/x/{A}", Generation.RUNC_V2, "moby", A, SOCK),
    ([V2, "--namespace", "moby", f"-id={A}", "--address", SOCK], f"/x/{A}", Generation.RUNC_V2, "moby", A, SOCK),
    ([V2, "-address", SOCK, "-id", "start", "-namespace", "x"], "/x/start", Generation.RUNC_V2, "x", "start",
     SOCK),
    # others: reported only
    (["/usr/bin/containerd-shim-kata-v2", "-namespace", "k8s.io", "-address", SOCK, "-publish-binary", "/x", "-id", A],
     f"/x/{A}", Generation.OTHER, "k8s.io", A, SOCK),
    (["containerd-shim-runsc-v1", "-namespace", "k8s.io", "-address", SOCK, "-publish-binary", "/x"], f"/x/{A}",
     Generation.OTHER, "k8s.io", A, SOCK),
    (["containerd-shim-aws-firecracker", "-namespace", "x", "-id", A, "-address", SOCK], "/", Generation.OTHER, "x", A,
     SOCK),
    # v0.2: id, bundle, runtime
    (["docker-containerd-shim", A, f"/var/run/docker/libcontainerd/{A}", "docker-runc"], f"/x/{A}/init",
     Generation.OTHER, "", A, ""),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "cwd", "generation", "namespace", "container", "address"), GENERATIONS)
@pytest.mark.parametrize("deleted", ["", " (deleted)"])
def test_generations(
    node: FakeNode, argv: list[str], cwd: str, generation: Generation, namespace: str, container: str, address: str,
    deleted: str,
) -> None:  # fmt: skip
    node.add(50, "containerd-shim", argv, exe=argv[0] + deleted, cwd=cwd + deleted)
    found = seen(node, 50)
    assert found is not None
    assert found.shim is not None
    shim = found.shim
    assert (shim.generation, shim.namespace, shim.container_id) == (generation, namespace, container)
    assert (shim.address, shim.bundle, shim.exe[-8:]) == (address, cwd, argv[0][-8:])
    assert (found.foreign, found.veto) == ("", "")


@pytest.mark.parametrize(
    "argv",
    [
        [V2, "-namespace", "moby", "-address", SOCK, "-publish-binary", "/usr/bin/containerd", "-id", A, "start"],
        [V2, "-namespace", "moby", "-address", SOCK, "-publish-binary", "", "-id", A, "-debug", "start"],
        [V2, "-namespace", "moby", "-id", A, "-bundle", f"/x/{A}", "-address", SOCK, "delete"],
        [V2, "-namespace", "moby", "-address", SOCK, "-id", A, "-new-flag", "start"],
        [V2, "-namespace", "moby", "-address", SOCK, "-id", A, "--", "start"],
        [V2, "-v"],
        [V2, "--version"],
        [V2, "-info"],
        [V2, "-h"],
        [V2, "start"],
        ["containerd-shim", "x", "y", "delete"],
        [],
    ],
)
def test_helpers_are_no_shims(node: FakeNode, argv: list[str]) -> None:
    node.add(50, "containerd-shim", argv, exe=V2, cwd=f"/x/{A}")
    assert seen(node, 50) is None


def test_zombie_is_no_shim(node: FakeNode) -> None:
    node.v2_shim(50, A, state="/run/containerd")
    node.v2_shim(51, B, argv=[V2, "-namespace", "moby", "-id", B, "-address", SOCK])
    node.end(50)
    node.add(50, "containerd-shim", [V2, "-namespace", "moby", "-id", A, "-address", SOCK], state="Z", exe=V2)
    assert seen(node, 50) is None
    assert seen(node, 51) is not None


SERVING = [V2, "-namespace", "moby", "-id", A, "-address", SOCK]


@pytest.mark.parametrize(
    ("how", "note"),
    [
        ({"uid": 1000}, "uid 1000"),
        ({"exe": "/usr/bin/python3.11"}, "runs python3.11"),
        ({"exe": "/tmp/containerd-shim-runc-v2x/sh"}, "runs sh"),
        ({"exe_mode": 0o777}, "written by others"),
        ({"exe_mode": 0o775}, "written by others"),
    ],
)
def test_forged_shims(node: FakeNode, how: dict[str, Any], note: str) -> None:
    node.add(50, "containerd-shim", SERVING, **{"exe": V2, "cwd": f"/x/{A}", **how})
    found = seen(node, 50)
    assert found is not None
    assert found.shim is None
    assert note in found.note


def test_executable_of_another_owner_is_forged(node: FakeNode) -> None:
    import os

    node.add(50, "containerd-shim", SERVING, exe=V2, cwd=f"/x/{A}")
    os.chown(os.path.realpath(node.proc_root / "50" / "exe"), 65534, 65534)
    found = seen(node, 50)
    assert found is not None
    assert found.shim is None


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"mnt": 7}, "mount namespace"),
        ({"pidns": 7}, "pid namespace"),
        ({"user": 7}, "user namespace"),
        ({"user": 7, "uid": 1000, "exe_mode": 0o775}, "that of uid 1000: rootless"),
        ({"nspids": [50, 3]}, "pid namespace"),
        ({"cgroup": f"/docker/{B}"}, f"inside container {B[:12]}"),
        ({"cgroup": f"/docker/{B}/sub"}, f"inside container {B[:12]}"),
        ({"cgroup": f"/system.slice/docker-{B}.scope/x"}, f"inside container {B[:12]}"),
        ({"cgroups": ["3:pids:/", f"2:memory:/docker/{B}", "1:name=systemd:/", "0::/"]}, "inside container"),
        ({"cgroup": "/machine.slice/systemd-nspawn@web.service/payload/x"}, "systemd-nspawn"),
        ({"cgroup": "/lxc.payload.web/system.slice"}, "LXC"),
    ],
)
def test_shims_of_nested_engines_are_foreign(node: FakeNode, how: dict[str, Any], reason: str) -> None:
    node.add(50, "containerd-shim", SERVING, **{"exe": V2, "cwd": f"/x/{A}", **how})
    found = seen(node, 50)
    assert found is not None
    assert reason in found.foreign


def test_seen_from_inside_a_container_what_is_above_does_not_count(tmp_path: Path) -> None:
    node = FakeNode(tmp_path)
    node.end(1)
    node.add(1, "systemd", ["/sbin/init"], ppid=0, cgroup=f"/docker/{B}/init.scope")
    node.add(
        50, "containerd-shim", SERVING, exe=V2, cwd=f"/x/{A}", cgroup=f"/docker/{B}/system.slice/containerd.service"
    )
    found = seen(node, 50)
    assert found is not None
    assert found.foreign == ""


@pytest.mark.parametrize("bad", ["../../etc", "a b", "", "a\nb", "x" * 77, "\x1b[2J", "a/b", "."])
@pytest.mark.parametrize("where", ["-id", "-namespace"])
def test_ids_that_containerd_would_refuse(node: FakeNode, bad: str, where: str) -> None:
    argv = list(SERVING)
    argv[argv.index(where) + 1] = bad
    node.add(50, "containerd-shim", argv, exe=V2, cwd="/")
    found = seen(node, 50)
    assert found is not None
    assert found.shim is None
    assert "no container" in found.note


@pytest.mark.parametrize(
    ("argv", "cwd", "reason"),
    [
        ([V2, "-namespace", "moby", "-id", A, "-address", SOCK], f"/x/{B}", "disagree"),
        ([V2, "-namespace", "moby", "-id", A], f"/x/{A}", "names no containerd"),
        ([V2, "-namespace", "moby", "-id", A, "-address", "/x\ny"], f"/x/{A}", "names no containerd"),
        ([V2, "-namespace", "moby", "-id", A, "-address", SOCK, "-new", "3"], f"/x/{A}", "not known: new"),
    ],
)
def test_doubtful_arguments_are_a_veto(node: FakeNode, argv: list[str], cwd: str, reason: str) -> None:
    node.add(50, "containerd-shim", argv, exe=V2, cwd=cwd)
    found = seen(node, 50)
    assert found is not None
    assert found.shim is not None
    assert reason in found.veto


def test_what_cannot_be_read_is_a_veto(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    from orphand import proc as proc_module

    node.add(50, "containerd-shim", SERVING, exe=V2, cwd=f"/x/{A}")
    read_link = proc_module._read_link

    def refuse(path: Any, dir_fd: Optional[int]) -> str:
        if str(path) in ("exe", "cwd") or str(path).startswith("ns/"):
            raise PermissionError(13, "Permission denied")
        return read_link(path, dir_fd)

    monkeypatch.setattr(proc_module, "_read_link", refuse)  # as it is for a user who is not root
    found = seen(node, 50)
    assert found is not None
    assert found.shim is not None
    assert "executable could not be read" in found.veto
    assert "namespaces could not be compared" in found.veto


def test_processes_that_do_not_look_like_shims(node: FakeNode) -> None:
    node.add(50, "nginx", ["nginx: master process"], exe="/usr/sbin/nginx")
    node.add(51, "containerd", ["/usr/bin/containerd"], exe="/usr/bin/containerd")
    node.add(52, "vim", ["vim", "containerd-shim-runc-v2"], exe="/usr/bin/vim")
    assert [seen(node, pid) for pid in (50, 51, 52)] == [None, None, None]


def test_a_flag_without_its_value() -> None:
    assert parse_arguments([V2, "-namespace", "moby", "-id"]).flags == {"namespace": "moby", "id": ""}
    assert parse_arguments([]).flags == {}
    assert parse_arguments([V2, "-debug=false", "-"]).positionals == ("-",)
