# SPDX-License-Identifier: Apache-2.0
"""What a look finds, on nodes that are written down. tests/engine has the same with real engines."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import pytest

from orphand import proc as proc_module
from orphand import sightings
from orphand.errors import ProcError
from orphand.model import Generation, Sighting
from orphand.served import read_served
from orphand.sightings import Looker
from tests.fakeproc import FakeNode

A, B, C = "a" * 64, "b" * 64, "c" * 64
RUNC = "/run/docker/runtime-runc"


@pytest.fixture
def node(tmp_path: Path) -> FakeNode:
    return FakeNode(tmp_path)


class Checked(Looker):
    """Where a look says that nothing has changed, it must find what the last one found."""

    last: Optional[list[Sighting]] = None
    quiet = False

    def look(self, full: bool = False) -> list[Sighting]:
        before = self.changes
        found = super().look(full)
        self.quiet = self.changes == before
        if self.quiet:
            assert [replace(s, seen_at=0.0) for s in found] == self.last
        self.last = [replace(s, seen_at=0.0) for s in found]
        return found


def looker(node: FakeNode) -> Checked:
    return Checked(node.proc, node.disk)


def look(node: FakeNode, full: bool = False) -> dict[str, Sighting]:
    found = looker(node).look(full)
    by_id = {s.container_id: s for s in found}
    assert len(by_id) == len(found)
    return by_id


def pids(sighting: Sighting) -> tuple[int, ...]:
    return tuple(p.pid for p in sighting.processes)


CGROUPS = [
    "0::/docker/{}",
    "0::/system.slice/docker-{}.scope",
    "0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-{}.scope",
    "0::/docker/{}/init.scope",
    "1:name=systemd:/kubepods/besteffort/pod1/{}",
    "4:memory:/my/parent/{}",
]


@pytest.mark.parametrize("line", CGROUPS)
@pytest.mark.parametrize("generation", ["v1", "v2"])
@pytest.mark.parametrize("full", [False, True])
def test_a_container_with_its_shim(node: FakeNode, line: str, generation: str, full: bool) -> None:
    node.v2_shim(50, A) if generation == "v2" else node.v1_shim(50, A)
    node.init(51, 50, A, cgroups=[line.format(A), "7:cpu:/"])
    (sighting,) = looker(node).look(full)
    assert (sighting.container_id, sighting.namespace, pids(sighting)) == (A, "moby", (50, 51))
    assert sighting.inits[0].cgroup == line.split(":")[2].format(A).removesuffix("/init.scope")
    assert sighting.address == "/run/containerd/containerd.sock"
    assert (sighting.foreign, sighting.veto, sighting.siblings) == ("", "", ())
    assert sighting.seen_at > 0


def test_a_v1_shim_below_its_containerd(node: FakeNode) -> None:
    node.add(40, "containerd", ["/usr/bin/containerd"], exe="/usr/bin/containerd")
    node.v1_shim(50, A, ppid=40)
    node.init(51, 50, A)
    assert pids(look(node)[A]) == (50, 51)


def test_dockerds_own_containerd(node: FakeNode) -> None:
    node.add(40, "dockerd", ["dockerd"], exe="/usr/bin/dockerd")
    node.add(41, "docker-containe", ["docker-containerd"], ppid=40, exe="/usr/bin/docker-containerd")
    node.v1_shim(50, A, ppid=41)
    assert pids(look(node)[A]) == (50,)


def test_runc_loggers_and_execs_are_no_inits(node: FakeNode) -> None:
    node.v2_shim(50, A)
    node.init(51, 50, A)
    shims = "/system.slice/containerd.service"
    node.add(60, "runc", ["runc", "exec", A], ppid=50, exe="/usr/sbin/runc", cgroup=shims)
    node.add(61, "containerd", ["containerd", "publish"], ppid=50, exe="/usr/bin/containerd", cgroup=shims)
    node.add(62, "my-logger", ["my-logger"], ppid=50, cgroup=shims)
    node.add(63, "sh", ["sh"], ppid=50, nspids=[63, 9], cgroup=f"/docker/{A}", mnt=1051, pidns=2051)
    sighting = look(node)[A]
    assert (pids(sighting), sighting.veto) == ((50, 51), "")


def test_a_container_that_is_created_but_not_started(node: FakeNode) -> None:
    node.v2_shim(50, A)
    node.add(51, "runc:[2:INIT]", ["runc", "init"], ppid=50, exe="/usr/sbin/runc", nspids=[51, 1], mnt=7, pidns=8,
             cgroup=f"/docker/{A}")  # fmt: skip
    assert pids(look(node)[A]) == (50, 51)


def test_an_init_that_runc_is_just_starting(node: FakeNode) -> None:
    node.v2_shim(50, A)
    node.add(60, "runc", ["runc", "create"], ppid=50, exe="/usr/sbin/runc", cgroup="/system.slice/containerd.service")
    node.init(61, 60, A)
    assert pids(look(node)[A]) == (50, 61)


def test_host_pid_namespace_init_by_runcs_record(node: FakeNode) -> None:
    node.v2_shim(50, A)
    for pid in (51, 52, 53):  # 52 lost its parent, 53 is an exec
        node.init(pid, 50, A, nspids=[pid], pidns=200, start=pid)
    assert "can't be told" in look(node)[A].veto
    node.record(RUNC, "moby", A, 52, 52)
    sighting = look(node)[A]
    assert (pids(sighting), sighting.veto) == ((50, 52), "")


def test_host_pid_namespace_init_by_the_bundle(node: FakeNode) -> None:
    node.v2_shim(50, A)
    for pid in (51, 52):
        node.init(pid, 50, A, nspids=[pid], pidns=200)
    node.write(f"/run/containerd/io.containerd.runtime.v2.task/moby/{A}/init.pid", "51")
    assert (pids(look(node)[A]), look(node)[A].veto) == ((50, 51), "")


def test_a_record_of_another_process_is_believed_more_than_a_pid_namespace(node: FakeNode) -> None:
    """A process of a host-pid container may make a pid namespace, lose its parent and become the shim's child."""
    node.v2_shim(50, A)
    node.init(51, 50, A, nspids=[51], pidns=200, start=5)
    node.init(52, 50, A, start=9)
    node.record(RUNC, "moby", A, 51, 5)
    assert pids(look(node)[A]) == (50, 51)
    node.add(60, "sh", ["sh"], start=4)
    node.record(RUNC, "moby", A, 60, 4)
    sighting = look(node)[A]
    assert (pids(sighting), "can't be told" in sighting.veto) == ((50, 51), True)


def test_what_an_init_left_in_the_hosts_pid_namespace(node: FakeNode) -> None:
    """Nobody dies with an init there: any process of the one cgroup stands for the container then."""
    node.v2_shim(50, A)
    for pid in (52, 53):
        node.init(pid, 50, A, nspids=[pid], pidns=200, start=pid)
    node.record(RUNC, "moby", A, 51, 5)
    assert (pids(look(node)[A]), look(node)[A].veto) == ((50, 52), "")
    node.init(54, 50, A, nspids=[54], pidns=200, start=54, cgroups=[f"0::/elsewhere/{A}"])
    assert "can't be told" in look(node)[A].veto


def test_a_pod_shares_its_shim(node: FakeNode) -> None:
    node.v2_shim(50, A, namespace="k8s.io")
    for pid, container in ((51, A), (52, B)):
        node.init(pid, 50, container, cgroup=f"/kubepods/pod1/{container}")
    # C has no process any more, but its bundle names the shim's socket
    node.write(f"/run/containerd/io.containerd.runtime.v2.task/k8s.io/{C}/address", f"unix:///run/containerd/s/{A}")
    node.write("/run/containerd/io.containerd.runtime.v2.task/k8s.io/other/address", "unix:///run/containerd/s/x")
    found = look(node)
    assert {i: pids(s) for i, s in found.items()} == {A: (50, 51), B: (50, 52), C: (50,)}
    assert {i: set(s.siblings) for i, s in found.items()} == {A: {B, C}, B: {A, C}, C: {A, B}}
    assert {s.namespace for s in found.values()} == {"k8s.io"}
    assert not any(s.veto for s in found.values())


def test_a_bootstrap_file_names_the_socket_too(node: FakeNode) -> None:
    node.v2_shim(50, A, namespace="k8s.io")
    bundles = "/run/containerd/io.containerd.runtime.v2.task/k8s.io"
    (node.disk_root / bundles.lstrip("/") / A / "address").unlink()
    bootstrap = {"version": 2, "address": "unix:///run/containerd/s/q", "protocol": "ttrpc"}
    node.write(f"{bundles}/{A}/bootstrap.json", bootstrap)
    node.write(f"{bundles}/{B}/bootstrap.json", bootstrap)
    assert set(look(node)) == {A, B}


def test_a_pod_whose_own_bundle_is_gone_is_told_by_its_computed_socket(node: FakeNode) -> None:
    import hashlib
    import shutil

    node.v2_shim(50, A, namespace="k8s.io")
    bundles = "/run/containerd/io.containerd.runtime.v2.task/k8s.io"
    shutil.rmtree(node.disk_root / bundles.lstrip("/") / A)
    name = hashlib.sha256(f"/run/containerd/containerd.sock/k8s.io/{A}".encode()).hexdigest()
    node.write(f"{bundles}/{B}/address", f"unix:///run/containerd/s/{name}")
    node.write(f"{bundles}/{C}/address", "unix:///run/containerd/s/other")
    assert set(look(node)) == {A, B}


def test_a_child_that_belongs_to_no_container_is_a_veto(node: FakeNode) -> None:
    node.v2_shim(50, A)
    node.init(51, 50, A)
    node.add(52, "x", ["x"], ppid=50, cgroup="/elsewhere", mnt=9)
    assert "process 52" in look(node)[A].veto


def test_names_of_ctr_by_cgroup_and_by_record(node: FakeNode) -> None:
    node.v2_shim(50, "web", namespace="default")
    node.init(51, 50, "web", cgroup="/default/web")
    node.v2_shim(60, "db", namespace="default")
    node.init(61, 60, "db", cgroup="/default/db/init.scope")
    assert "belongs to no container" in look(node)["db"].veto
    node.record("/run/containerd/runc", "default", "db", 61)
    found = look(node)
    assert found["web"].inits[0].cgroup == "/default/web"
    assert found["db"].inits[0].cgroup == "/default/db"
    assert (found["web"].veto, found["db"].veto) == ("", "")


def test_a_container_named_like_a_slice_never_gets_that_slice(node: FakeNode) -> None:
    node.v2_shim(50, "system.slice", namespace="default")
    node.init(51, 50, "x", cgroup="/system.slice/x.service")
    sighting = look(node)["system.slice"]
    assert sighting.inits == ()
    assert sighting.veto
    node.record("/run/containerd/runc", "default", "system.slice", 51)
    sighting = look(node)["system.slice"]
    assert [i.cgroup for i in sighting.inits] == [""]
    assert "no cgroup of its own" in sighting.veto


def test_a_process_in_the_shims_own_cgroup_is_tied_by_record_only(node: FakeNode) -> None:
    node.v2_shim(50, A)
    node.init(51, 50, A, cgroup="/system.slice/containerd.service")
    assert "belongs to no container" in look(node)[A].veto
    node.record(RUNC, "moby", A, 51)
    assert "no cgroup of its own" in look(node)[A].veto


def test_cgroups_that_a_container_made_below_its_own_are_not_believed(node: FakeNode) -> None:
    node.v2_shim(50, A)
    node.init(51, 50, A, cgroup=f"/docker/{A}/docker-{B}.scope")
    node.v2_shim(60, B)
    found = look(node)
    assert pids(found[A]) == (50, 51)
    assert pids(found[B]) == (60,)


def test_childless_and_helpers(node: FakeNode) -> None:
    node.v2_shim(50, A)
    node.v2_shim(60, B, argv=["/usr/bin/containerd-shim-runc-v2", "-namespace", "moby", "-id", B, "start"])
    found = look(node)
    assert set(found) == {A}
    assert found[A].inits == ()


def test_two_shims_for_one_id(node: FakeNode) -> None:
    node.v2_shim(50, A)
    node.v2_shim(60, A)
    node.init(51, 50, A)
    node.init(61, 60, A)
    found = looker(node).look()
    assert sorted(pids(s) for s in found) == [(50, 51), (60, 61)]
    assert {s.owns_socket for s in found} == {None}  # no such socket here: tests/system has one


# --- without a shim ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cgroup", [f"/docker/{A}", f"/system.slice/docker-{A}.scope", f"/docker/{A}/x"])
def test_an_init_without_its_shim(node: FakeNode, cgroup: str, tmp_path: Path) -> None:
    import socket

    node.init(51, 1, A, cgroup=cgroup)
    sighting = look(node)[A]
    assert (sighting.shim, pids(sighting), sighting.namespace) == (None, (51,), "")
    assert "no record" in sighting.veto
    bundle = f"/run/containerd/io.containerd.runtime.v2.task/moby/{A}"
    node.record(RUNC, "moby", A, 51, labels=[f"bundle={bundle}"])
    assert "which containerd" in look(node)[A].veto
    (node.disk_root / "run/containerd").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(node.disk_root / "run/containerd/containerd.sock"))
        sighting = look(node)[A]
    assert (sighting.namespace, sighting.address) == ("moby", "/run/containerd/containerd.sock")
    assert (sighting.veto, sighting.inits[0].cgroup) == ("", cgroup.removesuffix("/x"))


def test_an_init_in_the_hosts_pid_namespace_needs_the_record(node: FakeNode) -> None:
    node.init(51, 1, A, nspids=[51], pidns=200, start=3)
    node.init(52, 1, A, nspids=[52], pidns=200, start=5)
    node.record(RUNC, "moby", A, 52, 5)
    sighting = look(node)[A]
    assert (pids(sighting), sighting.namespace) == ((52,), "moby")


def test_what_is_left_of_a_container_that_lost_shim_and_init(node: FakeNode) -> None:
    node.init(52, 1, A, nspids=[52], pidns=200, start=5)
    node.init(51, 1, A, nspids=[51], pidns=200, start=3)
    assert pids(look(node)[A]) == (51,)
    assert "no record" in look(node)[A].veto
    node.record(RUNC, "moby", A, 60, 1)  # which has ended
    sighting = look(node)[A]
    assert (pids(sighting), sighting.namespace) == ((51,), "moby")
    assert sighting.veto == "which containerd it was of can't be told"
    node.add(60, "x", ["x"], ppid=51, start=1)  # it lives, wherever it is: then these are not all
    assert "no record" in look(node)[A].veto


def test_what_is_left_in_two_cgroups_is_a_veto(node: FakeNode) -> None:
    node.init(51, 1, A, nspids=[51], pidns=200, cgroup=f"/docker/{A}")
    node.init(52, 1, A, nspids=[52], pidns=200, cgroup=f"/elsewhere/{A}")
    node.record(RUNC, "moby", A, 60, 1)
    assert "several cgroups" in look(node)[A].veto


def test_an_exec_beside_a_living_init_is_no_container_of_its_own(node: FakeNode) -> None:
    node.init(51, 1, A)
    node.add(52, "sh", ["sh"], nspids=[52, 7], cgroup=f"/docker/{A}", mnt=1051, pidns=2051)
    assert pids(look(node)[A]) == (51,)


def test_pid_namespaces_that_a_container_makes_are_not_containers(node: FakeNode) -> None:
    node.v2_shim(50, A)
    node.init(51, 50, A)
    node.add(52, "unshare", ["unshare"], ppid=51, nspids=[52, 2], cgroup=f"/docker/{A}", mnt=1051, pidns=2051)
    node.init(53, 52, A, nspids=[53, 3, 1])
    found = looker(node).look(full=True)
    assert [pids(s) for s in found] == [(50, 51)]


def test_an_init_whose_parent_is_nobodys_subreaper_is_a_veto(node: FakeNode) -> None:
    node.add(40, "keeper", ["keeper"])
    node.init(51, 40, A)
    node.record(RUNC, "moby", A, 51)
    assert look(node) == {}
    assert "may be its keeper" in look(node, full=True)[A].veto


def test_a_subreaper_is_learned_from_the_shims_that_it_has(node: FakeNode) -> None:
    node.add(40, "k3s-init", ["k3s-init"])
    node.v2_shim(50, A, ppid=40)
    eye = looker(node)
    assert eye.look() == []
    assert len(eye.look(full=True)) == 1
    node.init(61, 40, B)
    node.v2_shim(70, C, ppid=40)
    found = {s.container_id: s for s in eye.look()}  # the cheap look finds them now
    assert set(found) == {A, B, C}
    assert "keeper" not in found[B].veto


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"cgroup": f"/machine.slice/libpod-{A}.scope/container"}, "podman"),
        ({"cgroup": f"/kubepods/crio-{A}"}, "CRI-O"),
        ({"cgroup": "/lxc.payload.web"}, "LXC"),
        ({"cgroup": "/machine.slice/systemd-nspawn@web.service/payload"}, "systemd-nspawn"),
        ({"cgroup": f"/user.slice/user-1000.slice/user@1000.service/docker-{A}.scope", "user": 7}, "rootless"),
    ],
)
def test_containers_of_others_are_foreign(node: FakeNode, how: dict[str, Any], reason: str) -> None:
    node.init(51, 1, A, **how)
    for pid, cgroup in ((40, f"/machine.slice/libpod-conmon-{A}.scope"), (41, "/libpod_parent/conmon"), (42, "/x")):
        node.add(pid, "conmon", ["conmon"], cgroup=cgroup)
        node.adopt(51, pid)
        (sighting,) = looker(node).look(full=True)
        assert reason in sighting.foreign
    node.adopt(51, 1)
    (sighting,) = looker(node).look()
    assert reason in sighting.foreign


def test_docker_in_docker_is_foreign(node: FakeNode) -> None:
    node.v2_shim(50, A)
    node.init(51, 50, A)
    inner = {"cgroup": f"/docker/{A}", "mnt": 1051, "pidns": 2051}
    node.add(52, "dockerd", ["dockerd"], ppid=51, nspids=[52, 7], exe="/usr/bin/dockerd", **inner)
    node.v2_shim(53, B, ppid=51, nspids=[53, 9], **inner)
    node.init(54, 53, B, nspids=[54, 10, 1], cgroup=f"/docker/{A}/docker/{B}")
    found = {s.container_id: s for s in looker(node).look(full=True)}
    assert set(found) == {A, B}
    assert found[A].foreign == ""
    assert "inside container aaaa" in found[B].foreign
    assert found[B].address == ""  # a path in its own mount namespace


def test_an_inner_init_without_its_shim_is_foreign(node: FakeNode) -> None:
    node.v2_shim(50, A)
    node.init(51, 50, A)
    node.init(54, 51, B, nspids=[54, 10, 1], cgroup=f"/docker/{A}/docker/{B}")
    found = {s.container_id: s for s in looker(node).look(full=True)}
    assert "inside container aaaa" in found[B].foreign


def test_services_with_namespaces_of_their_own_are_no_containers(node: FakeNode) -> None:
    node.add(51, "named", ["named"], mnt=9)
    node.add(52, "x", ["x"], mnt=9, pidns=7, nspids=[52, 1], cgroup="/system.slice/private.service")
    node.add(53, "x", ["x"], cgroup=f"/docker/{A}")  # `cgexec`: no namespace of its own
    assert look(node, full=True) == {}


def test_a_flood_of_other_engines_containers_is_bounded(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orphand.sightings._MAX_FOREIGN", 5)
    for pid in range(100, 130):
        node.v2_shim(pid, f"x{pid}", mnt=9)
    for pid in range(200, 230):
        node.init(pid, 1, A, cgroup=f"/lxc.payload.web{pid}")
    node.v2_shim(50, A)
    found = looker(node).look(full=True)
    assert sum(1 for s in found if s.foreign) == 5
    assert [s.container_id for s in found if not s.foreign] == [A]


# --- vetoes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shim", [True, False])
def test_dockers_directory_is_a_veto_wherever_its_data_root_was(node: FakeNode, shim: bool) -> None:
    mounts = [{"source": f"/old/root/containers/{A}/resolv.conf", "destination": "/etc/resolv.conf"}]
    node.record(RUNC, "moby", A, 51, mounts=mounts)
    if shim:
        node.v2_shim(50, A)
    node.init(51, 50 if shim else 1, A)
    assert look(node)[A].metadata == ""
    node.write(f"/old/root/containers/{A}/config.v2.json", "{}")
    assert f"still there: /old/root/containers/{A}" in look(node)[A].metadata


@pytest.mark.parametrize(
    "source", [f"/x/containers/{B}/resolv.conf", "/etc/resolv.conf", f"/x/containers/{A}/data", 7, None, {}]
)
def test_other_mounts_name_no_directory_that_is_there(node: FakeNode, source: Any) -> None:
    node.record(RUNC, "moby", A, 51, mounts=[{"source": source}, source])
    node.v2_shim(50, A)
    node.init(51, 50, A)
    assert look(node)[A].metadata == ""


def test_dockers_directory_of_a_container_in_anothers_network(node: FakeNode) -> None:
    """Of a second dockerd, which is stopped and can't be asked: its data-root is told by the other one's files."""
    node.record(RUNC, "moby", A, 51, mounts=[{"source": f"/second/containers/{B}/hosts", "destination": "/etc/hosts"}])
    node.v2_shim(50, A)
    node.init(51, 50, A)
    node.write(f"/second/containers/{A}/config.v2.json", "{}")
    assert f"still there: /second/containers/{A}" in look(node)[A].metadata


# --- look after look -------------------------------------------------------------------------------------------


def test_the_next_look_finds_what_came_and_loses_what_went(node: FakeNode) -> None:
    eye = looker(node)
    node.v2_shim(50, A)
    node.init(51, 50, A)
    (first,) = eye.look()
    (second,) = eye.look()
    assert first.key == second.key
    assert second.seen_at > first.seen_at
    node.v2_shim(60, B)
    assert {s.container_id for s in eye.look()} == {A, B}
    node.end(51)
    childless = next(s for s in eye.look() if s.container_id == A)
    assert (childless.inits, childless.key == first.key) == ((), False)
    node.end(50)
    assert {s.container_id for s in eye.look()} == {B}


def test_a_look_with_nothing_new(node: FakeNode) -> None:
    eye = looker(node)
    node.v2_shim(50, A, namespace="k8s.io")
    node.init(51, 50, A)
    beside = f"/run/containerd/io.containerd.runtime.v2.task/k8s.io/{B}/address"

    def quiet() -> bool:
        for path in node.root.rglob("*"):  # a directory that changed within a tick of the clock is read again
            os.utime(path, (1, 1), follow_symlinks=False)
        eye.look()
        eye.look()
        return eye.quiet

    assert quiet()
    node.v2_shim(60, C)
    eye.look()
    assert not eye.quiet, "another shim"
    assert not quiet(), "a shim without a process may get one at any time"
    node.init(61, 60, C)
    assert quiet()
    node.write(beside, f"unix:///run/containerd/s/{A}")
    eye.look()
    assert not eye.quiet, "another bundle"
    node.init(52, 50, B)
    assert quiet()
    node.end(52)
    eye.look()
    assert not eye.quiet, "a process that ended"
    assert not quiet(), "its container may get another one at any time"
    node.init(52, 50, B)
    assert quiet()
    node.end(60)
    node.end(61)
    assert {s.container_id for s in eye.look()} == {A, B}
    assert not eye.quiet, "a shim that ended with all that it served"
    assert quiet()
    eye.look(full=True)
    assert not eye.quiet, "a look at everything"


def test_a_shim_that_could_not_be_read_is_read_anew_each_time(node: FakeNode) -> None:
    eye = looker(node)
    node.v2_shim(50, A)
    node.init(51, 50, A)
    (node.proc_root / "50/cwd").unlink()
    for _ in range(3):
        eye.look()
    assert not eye.quiet


def test_without_the_kernels_list_of_children_no_look_is_quiet(tmp_path: Path) -> None:
    node = FakeNode(tmp_path, children=False)
    node.v2_shim(50, A)
    node.init(51, 50, A)
    eye = looker(node)
    for _ in range(3):
        eye.look()
    assert not eye.quiet


def test_processes_without_a_shim_are_looked_at_each_time(node: FakeNode) -> None:
    eye = looker(node)
    node.init(51, 1, A)
    eye.look()
    eye.look()
    assert not eye.quiet


def test_a_shim_that_ends_leaves_its_init_as_a_stray(node: FakeNode) -> None:
    eye = looker(node)
    node.v2_shim(50, A)
    node.init(51, 50, A)
    eye.look()
    node.end(50)
    (sighting,) = eye.look()
    assert (sighting.shim, pids(sighting)) == (None, (51,))


def test_a_pods_next_container_is_found_by_its_bundle(node: FakeNode) -> None:
    eye = looker(node)
    node.v2_shim(50, A, namespace="k8s.io")
    node.init(51, 50, A)
    eye.look()
    node.write(f"/run/containerd/io.containerd.runtime.v2.task/k8s.io/{B}/address", f"unix:///run/containerd/s/{A}")
    node.init(52, 50, B)
    assert {s.container_id: pids(s) for s in eye.look()} == {A: (50, 51), B: (50, 52)}


def test_a_pid_that_belongs_to_a_shim_now(node: FakeNode) -> None:
    eye = looker(node)
    node.add(50, "cron", ["cron"])
    assert eye.look() == []
    assert eye.look() == []
    node.end(50)
    node.v2_shim(50, A, start=9)
    assert [s.container_id for s in eye.look()] == [A]
    node.end(50)
    node.v2_shim(50, B, start=10)
    assert [s.container_id for s in eye.look()] == [B]


def test_a_young_process_is_looked_at_again(node: FakeNode) -> None:
    """A child may be seen between fork and exec: then it has its parent's name and executable."""
    from orphand.proc import TICKS, now

    eye = looker(node)
    start = int(now() * TICKS)
    node.add(50, "containerd", ["containerd"], exe="/usr/bin/x", start=start)
    assert eye.look() == []
    inode = os.stat(node.proc_root / "50")
    node.end(50)
    node.v2_shim(50, A, start=start)
    assert inode  # the same pid and start time: the same process
    assert [s.container_id for s in eye.look()] == [A]


def test_without_the_kernels_list_of_children_every_look_is_full(tmp_path: Path) -> None:
    node = FakeNode(tmp_path, children=False)
    node.add(40, "subreaper", ["subreaper"])
    node.v2_shim(50, A, ppid=40)
    node.init(51, 50, A)
    node.init(61, 1, B)
    eye = looker(node)
    for _ in range(2):
        assert {s.container_id: pids(s) for s in eye.look()} == {A: (50, 51), B: (61,)}


def test_children_that_the_kernel_left_out_are_still_looked_for(node: FakeNode) -> None:
    eye = looker(node)
    node.v2_shim(50, A, namespace="k8s.io")
    node.init(51, 50, A)
    node.init(52, 50, B)
    eye.look()
    (node.proc_root / "50/task/50/children").write_text("51")
    assert {s.container_id for s in eye.look(full=True)} == {A, B}


def test_a_shim_in_another_cgroup_is_not_the_same_any_more(node: FakeNode) -> None:
    eye = looker(node)
    node.v2_shim(50, A)
    (sighting,) = eye.look()
    assert sighting.foreign == ""
    (node.proc_root / "50/cgroup").write_text(f"0::/docker/{B}\n")
    assert eye.again(sighting) is None  # a foreign shim's address is no path of ours: another key


def test_a_full_look_reads_only_shims_that_have_other_children(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """To read one takes about a millisecond, and a node has hundreds."""
    read: list[int] = []

    def counted(*told: Any) -> Any:
        read.append(told[3].process.pid)
        return read_served(*told)

    monkeypatch.setattr(sightings, "read_served", counted)
    eye = looker(node)
    for pid, container_id in ((50, A), (60, B)):
        node.v2_shim(pid, container_id)
        node.init(pid + 1, pid, container_id)
    node.v2_shim(70, C, user=7)
    for path in node.root.rglob("io.containerd*/*"):
        os.utime(path, (1, 1), follow_symlinks=False)
    assert len(eye.look(full=True)) == 3
    for full in (True, False, True):
        eye.look(full)
    assert sorted(read) == [50, 60]
    node.add(62, "x", ["x"], ppid=60, cgroup="/elsewhere", mnt=9)
    eye.look(full=True)
    eye.look(full=True)
    assert sorted(read) == [50, 60, 60]


def test_a_full_look_finds_a_shims_other_children_and_parent(node: FakeNode) -> None:
    eye = looker(node)
    node.add(40, "containerd", ["containerd"], exe="/usr/bin/containerd")
    node.v1_shim(50, A, ppid=40)
    node.init(51, 50, A)
    assert eye.look(full=True)[0].veto == ""
    node.add(52, "x", ["x"], ppid=50, cgroup="/elsewhere", mnt=9)
    node.adopt(50, 1)
    assert eye.look()[0].veto == ""  # nothing tells the cheap look, and a fake process can't be watched
    (sighting,) = eye.look(full=True)
    assert "process 52" in sighting.veto
    assert sighting.shim is not None
    assert sighting.shim.ppid == 1


def test_again(node: FakeNode) -> None:
    eye = looker(node)
    node.v2_shim(50, A)
    node.init(51, 50, A)
    node.init(61, 1, B)
    for sighting in eye.look():
        same = eye.again(sighting)
        assert same is not None
        assert (same.key, same.seen_at > sighting.seen_at) == (sighting.key, True)
    with_shim, without = eye.look()
    node.end(51)
    node.end(61)
    assert eye.again(with_shim) is None
    assert eye.again(without) is None
    node.end(50)
    node.v2_shim(50, A, start=9)
    assert eye.again(with_shim) is None


def test_forged_shims_are_noted_but_not_sighted(node: FakeNode) -> None:
    node.v2_shim(50, A, uid=1000)
    node.v2_shim(60, B, exe="/usr/bin/python3")
    eye = looker(node)
    assert eye.look() == []
    assert any("process 50" in b and "uid 1000" in b for b in eye.blind)
    assert any("process 60" in b for b in eye.blind)
    node.end(50)
    eye.look()
    assert not any("process 50" in b for b in eye.blind)


def test_who_is_not_root_is_told_what_he_cannot_see(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    node.v2_shim(50, A)
    node.init(51, 50, A)
    read_link = proc_module._read_link

    def refuse(path: Any, dir_fd: Optional[int]) -> str:
        if str(path) in ("exe", "cwd") or str(path).startswith("ns/"):
            raise PermissionError(13, "Permission denied")
        return read_link(path, dir_fd)

    monkeypatch.setattr(proc_module, "_read_link", refuse)
    eye = looker(node)
    (sighting,) = eye.look()
    assert sighting.shim is not None
    assert sighting.shim.generation is Generation.RUNC_V2
    assert (pids(sighting), bool(sighting.veto)) == ((50, 51), True)
    assert len(eye.blind) == 2


# --- anything may vanish at any read ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [2, 3, 13, 24])
def test_an_error_at_each_read(node: FakeNode, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """The n-th read fails, for every n: a look never raises, and never ties a process to a wrong id."""
    node.add(40, "dockerd", ["dockerd"], exe="/usr/bin/dockerd")
    node.v2_shim(50, A)
    node.init(51, 50, A)
    node.v1_shim(55, B, ppid=40)
    node.init(56, 55, B)
    node.init(61, 1, C)
    truth = {A: (50, 51), B: (55, 56), C: (61,)}
    counter = [0, 0]  # reads so far, the one that fails
    for name in ("_read_file", "_read_link", "_list_dir"):
        real = getattr(proc_module, name)

        def fail(*arguments: Any, real: Any = real) -> Any:
            counter[0] += 1
            if counter[0] == counter[1]:
                raise OSError(error, "made")
            return real(*arguments)

        monkeypatch.setattr(proc_module, name, fail)
    looker(node).look(full=True)
    reads = counter[0]
    assert reads > 50
    for failing in range(1, reads + 1):
        counter[:] = [0, failing]
        eye = looker(node)
        with suppress(ProcError):  # only where /proc itself can't be listed
            found = eye.look(full=failing % 2 == 1)
            for sighting in found:
                assert set(pids(sighting)) <= set(truth[sighting.container_id])
                assert pids(sighting) == truth[sighting.container_id] or sighting.shim or sighting.veto
        counter[1] = 0
        assert {s.container_id: pids(s) for s in eye.look(full=True)} == truth  # it recovers


def test_a_container_below_a_removed_ones_cgroup_is_not_that_one(node: FakeNode) -> None:
    """docker run --cgroup-parent=docker/A, then docker rm -f A: nobody knows A, and its name is above C's processes."""
    node.v2_shim(50, C)
    node.init(51, 50, C, cgroup=f"/docker/{A}/{C}")
    (sighting,) = looker(node).look(full=True)
    assert (sighting.container_id, pids(sighting), sighting.siblings) == (C, (50, 51), ())
    assert sighting.inits[0].cgroup == f"/docker/{A}/{C}"


def test_a_pods_member_below_a_removed_ones_cgroup_is_told_by_its_record(node: FakeNode) -> None:
    node.v2_shim(50, B, namespace="pods")
    node.init(51, 50, B, cgroup=f"/docker/{B}")
    node.init(52, 50, C, cgroup=f"/docker/{A}/{C}")
    node.record("/run/containerd/runc", "pods", C, 52)
    assert {i: pids(s) for i, s in look(node).items()} == {B: (50, 51), C: (50, 52)}


def test_what_a_container_names_below_its_own_cgroup_is_still_its_own(node: FakeNode) -> None:
    node.v2_shim(50, A)
    node.init(51, 50, A, cgroup=f"/docker/{A}/{C}")
    node.record(RUNC, "moby", C, 999)
    (sighting,) = looker(node).look(full=True)
    assert (sighting.container_id, sighting.inits[0].cgroup) == (A, f"/docker/{A}")


def test_a_container_without_a_shim_below_a_removed_ones_cgroup(node: FakeNode) -> None:
    node.init(51, 1, C, cgroup=f"/docker/{A}/{C}")
    node.record(RUNC, "moby", C, 51)
    (sighting,) = looker(node).look(full=True)
    assert (sighting.container_id, sighting.inits[0].cgroup) == (C, f"/docker/{A}/{C}")


def test_the_pid_namespace_that_an_init_leads_or_has_joined(node: FakeNode) -> None:
    node.v2_shim(50, A)
    node.init(51, 50, A, pidns=900)
    node.v2_shim(60, B)
    node.init(61, 60, B, pidns=900, nspids=[61, 9])  # docker run --pid=container:A
    node.v2_shim(70, C)
    node.init(71, 70, C, pidns=0, nspids=[71])  # --pid=host
    found = {i: (s.inits[0].pid_namespace, s.inits[0].leads) for i, s in look(node).items()}
    assert found == {A: (900, True), B: (900, False), C: (0, False)}


def test_a_container_with_anothers_cgroup_below_its_own_is_not_to_be_ended(node: FakeNode) -> None:
    node.v2_shim(50, A)
    node.init(51, 50, A)
    node.v2_shim(60, C)
    node.init(61, 60, C, cgroup=f"/docker/{A}/{C}")
    node.init(71, 1, B, cgroup=f"/docker/{B}")
    eye = looker(node)
    found = {s.container_id: s for s in eye.look()}
    assert (found[C].veto, "below" in found[B].veto) == ("", False)
    assert f"container {C[:12]} is below" in found[A].veto
    again = eye.again(found[A])
    assert again is not None
    assert again.veto == found[A].veto
    node.end(61)
    node.end(60)
    eye.look()
    again = eye.again(found[A])
    assert again is not None
    assert again.veto == ""


def test_engines_in_containers_are_not_asked_for_their_children(node: FakeNode) -> None:
    eye = looker(node)
    node.v2_shim(50, A)
    node.init(51, 50, A)
    node.add(60, "dockerd", ["dockerd"], ppid=51, exe="/usr/bin/dockerd", cgroup=f"/docker/{A}")
    node.add(61, "dockerd", ["dockerd"], ppid=51, exe="/usr/bin/dockerd", nspids=[61, 7])
    node.add(62, "dockerd", ["dockerd"], exe="/usr/bin/dockerd", uid=1000)
    node.add(63, "dockerd", ["dockerd"], exe="/usr/bin/evil")
    node.add(64, "dockerd", ["dockerd"], exe="/usr/bin/dockerd")
    node.v2_shim(53, B, ppid=51, nspids=[53, 9], mnt=1051, cgroup=f"/docker/{A}")
    eye.look(full=True)
    assert set(eye._parents) == {64}


@pytest.mark.parametrize("frozen", [False, True])
def test_bundles_that_change_are_read_again(node: FakeNode, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`frozen`: every change falls into the same tick of the clock, so that the directory's time stays the same."""
    import os
    import time

    from orphand.served import Bundles

    node.v2_shim(50, A, namespace="k8s.io")
    shim = looker(node).look()[0].shim
    assert shim
    bundles, beside = Bundles(node.disk), Path(f"{node.disk_root}/run/containerd/io.containerd.runtime.v2.task/k8s.io")
    moment = time.time_ns()
    if frozen:
        monkeypatch.setattr(time, "time_ns", lambda: moment + 1)

    def seen() -> tuple[str, ...]:
        if frozen:
            os.utime(beside, ns=(moment, moment))
        bundles.refresh()
        return bundles.of(shim)

    assert seen() == (A,)
    (beside / B).mkdir()
    assert seen() == (A,)  # being made: it names no socket yet
    (beside / B / "address").write_text(f"unix:///run/containerd/s/{A}")
    assert seen() == (A, B)
    (beside / B).rename(beside / f".{B}")  # as containerd deletes one
    assert seen() == (A,)
    (beside / C).mkdir()
    (beside / C / "address").write_text(f"unix:///run/containerd/s/{A}")
    assert seen() == (A, C)
    (beside / C).rename(beside / f".{C}")
    (beside / C).mkdir()  # the same name, another bundle
    (beside / C / "address").write_text("unix:///run/containerd/s/other")
    assert seen() == (A,)


def test_a_shim_of_a_containerd_in_a_chroot_is_not_the_hosts(node: FakeNode) -> None:
    """Its -address, /run/containerd/containerd.sock, is the socket of another containerd there."""
    node.v2_shim(50, A, root="/srv/node-in-a-chroot")
    node.init(51, 50, A)
    sighting = look(node)[A]
    assert "another root directory" in sighting.foreign
    assert sighting.address == ""


def test_an_unprivileged_users_process_in_a_cgroup_named_like_a_container_is_no_suspect(node: FakeNode) -> None:
    """unshare -Um in a cgroup of that name: four of them would trip the breaker and stop all kills."""
    node.add(51, "x", ["x"], uid=1000, cgroup=f"/user.slice/user-1000.slice/{A}", user=999, mnt=998)
    sighting = look(node, full=True)[A]
    assert "user namespace of its own" in sighting.foreign
