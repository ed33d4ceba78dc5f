# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from orphand.cgroups import contains, is_identifier, last_id, places

A, B = "a" * 64, "b" * 64
PODS = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice"


@pytest.mark.parametrize(
    ("path", "container", "cgroup"),
    [
        (f"/docker/{A}", A, f"/docker/{A}"),
        (f"/k8s.io/{A}", A, f"/k8s.io/{A}"),
        (f"/kubepods/burstable/pod12-34/{A}", A, f"/kubepods/burstable/pod12-34/{A}"),
        (f"/system.slice/docker-{A}.scope", A, f"/system.slice/docker-{A}.scope"),
        (f"{PODS}/cri-containerd-{A}.scope", A, f"{PODS}/cri-containerd-{A}.scope"),
        (f"{PODS}/docker-{A}.scope", A, f"{PODS}/docker-{A}.scope"),
        (f"/user.slice/nerdctl-{A}.scope", A, f"/user.slice/nerdctl-{A}.scope"),
        (f"/my.slice/my-batch.slice/docker-{A}.scope", A, f"/my.slice/my-batch.slice/docker-{A}.scope"),
        (f"/parent/{A}", A, f"/parent/{A}"),
        (f"/machine-learning.slice/docker-{A}.scope", A, f"/machine-learning.slice/docker-{A}.scope"),
        # the container moved its processes down (systemd in it, containerd#13784)
        (f"/docker/{A}/init.scope", A, f"/docker/{A}"),
        (f"/system.slice/docker-{A}.scope/system.slice/cron.service", A, f"/system.slice/docker-{A}.scope"),
    ],
)
def test_container_of_a_path(path: str, container: str, cgroup: str) -> None:
    (place,) = places(path)
    assert (place.container_id, place.path, place.foreign) == (container, cgroup, "")


@pytest.mark.parametrize(
    ("path", "whose"),
    [
        (f"/machine.slice/libpod-{A}.scope", "podman"),
        (f"/machine.slice/libpod-{A}.scope/container", "podman"),
        (f"/libpod_parent/libpod-{A}", "podman"),
        (f"{PODS}/crio-{A}.scope", "CRI-O"),
        (f"/user.slice/buildah-{A}.scope", "Buildah"),
        ("/lxc.payload.web/init.scope", "LXC"),
        ("/lxc.payload/web", "LXC"),
        ("/lxc/web", "LXC"),
        ("/machine.slice/machine-deb\\x2done.scope/payload", "systemd-machined"),
        ("/machine.slice/systemd-nspawn@web.service/payload", "systemd-nspawn"),
        ("/docker/buildkit/abcdefgh", "BuildKit"),
    ],
)
def test_containers_of_other_engines(path: str, whose: str) -> None:
    assert places(path)[0].foreign == whose


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/system.slice/containerd.service",
        "/user.slice/user-1000.slice/session-1.scope",
        "/machine-learning.slice",
        "/buildkitd.slice/x",
        f"/system.slice/{A[:63]}",
        f"/system.slice/docker-{A}.service",
        f"/system.slice/crio-conmon-{A}.scope",
        f"/machine.slice/libpod-conmon-{A}.scope",
        "/lxc.monitor.web",
        "/system.slice/docker.service",
    ],
)
def test_no_container(path: str) -> None:
    assert places(path) == ()


def test_nested_containers_from_the_outside_in() -> None:
    assert [p.container_id for p in places(f"/system.slice/docker-{A}.scope/docker/{B}")] == [A, B]
    assert [p.container_id for p in places(f"/docker/{A}/kubelet/kubepods/pod1/{B}")] == [A, B]


def test_known_names_count_in_the_last_part_only() -> None:
    assert places("/default/web", ("web",))[0].path == "/default/web"
    assert places("/system.slice/ctr-web.scope", ("web",))[0].container_id == "web"
    # an id may be called like a slice of the host's
    assert places("/system.slice/sshd.service", ("system.slice",)) == ()


@pytest.mark.parametrize("text", ["web", "a.b-c_d", "0" * 76, A])
def test_identifiers(text: str) -> None:
    assert is_identifier(text)


@pytest.mark.parametrize("text", ["", ".", "..", "a/b", "-a", "a-", "a..b", "a b", "é", "a\n", "0" * 77, "../../etc"])
def test_not_identifiers(text: str) -> None:
    assert not is_identifier(text)


def test_last_id() -> None:
    assert last_id("/default/web") == "web"
    assert last_id(f"/x.slice/ctr-{A}.scope") == A
    assert last_id("/") == ""


def test_contains() -> None:
    assert contains("/a", "/a")
    assert contains("/a", "/a/b")
    assert not contains("/a", "/ab")
