# SPDX-License-Identifier: Apache-2.0
"""What a container owns: found, recorded, read back; and never more than its own."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orphand import cgroupfs, cleanup, endings, mounts
from orphand.estate import Estate, _asked_for, _runc_state, is_bundle, read_runc_state, socket_path
from orphand.model import Generation, Kind, ProcessId, Shim, Sighting
from orphand.proc import Proc

ID = "4f" * 32
OTHER = "a0" * 32
FULL = Estate(
    container_id=ID,
    namespace="moby",
    address="/run/containerd/containerd.sock",
    kind=Kind.LEAKED_SHIM,
    boot_id="b",
    shim=ProcessId(10, 100),
    shim_shared=True,
    inits=(ProcessId(11, 101), ProcessId(12, 102)),
    cgroups={f"/sys/fs/cgroup/docker/{ID}": 77},
    bundle=f"/run/containerd/io.containerd.runtime.v2.task/moby/{ID}",
    directories={f"/run/containerd/io.containerd.runtime.v2.task/moby/{ID}": 5},
    runc_init=ProcessId(11, 101),
    netns=4026534765,
    netns_files=("/run/docker/netns/1f2e3d4c5b6a",),
    addresses=("172.17.0.2",),
)


def test_it_survives_a_restart() -> None:
    assert Estate.from_json(json.loads(json.dumps(FULL.to_json()))) == FULL
    shimless = Estate(ID, "", "", Kind.SHIMLESS, "b")
    assert Estate.from_json(json.loads(json.dumps(shimless.to_json()))) == shimless


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"kind": "no-such"}, id="kind"),
        pytest.param({"shim": [1]}, id="half-a-process"),
        pytest.param({"shim": "1234"}, id="shim-text"),
        pytest.param({"inits": [[1, 2, 3]]}, id="three-numbers"),
        pytest.param({"inits": None}, id="no-inits"),
        pytest.param({"cgroups": ["/sys"]}, id="cgroups"),
        pytest.param({"bundle": 7}, id="bundle"),
        pytest.param({"more": "x"}, id="an-unknown-field"),
        pytest.param({"netns": "x"}, id="netns"),
    ],
)
def test_a_damaged_record_is_an_error(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Estate.from_json({**FULL.to_json(), **change})


@pytest.mark.parametrize(
    "missing", ["shim", "inits", "kind", "cgroups", "container_id", "shim_shared", "directories", "runc_init"]
)
def test_a_record_with_a_gap_is_an_error(missing: str) -> None:
    data = FULL.to_json()
    del data[missing]
    with pytest.raises(ValueError):
        Estate.from_json(data)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (f"/run/containerd/io.containerd.runtime.v2.task/moby/{ID}", True),
        (f"/var/lib/containerd/io.containerd.runtime.v1.linux/moby/{ID}", True),
        (f"/run/containerd/io.containerd.runtime.v2.task/moby/{OTHER}", False),
        (f"/run/containerd/io.containerd.runtime.v2.task/other/{ID}", False),
        (f"/run/containerd/io.containerd.runtime.v2.task/moby/{ID}/", False),
        (f"/run/containerd/io.containerd.runtime.v2.task/x/../moby/{ID}", False),
        (f"run/containerd/io.containerd.runtime.v2.task/moby/{ID}", False),
        (f"/io.containerd.runtime.v2.task/moby/{ID}", False),
        ("/", False),
        ("", False),
    ],
)
def test_only_containerds_own_paths_are_bundles(path: str, expected: bool) -> None:
    assert is_bundle(path, "moby", ID) is expected


def test_a_sockets_name_is_containerds() -> None:
    """The name that containerd 1.6.20 gave to the shim of ctr's container `web` in namespace t1."""
    expected = "/run/containerd/s/e367766afb96432e93a0e6bd687e4ac9e4216d0be8b3468bf2d69beb85f5698b"
    assert socket_path("/tmp/ct/c.sock", "t1", "web") == expected


# ---- runc's record


def state(directory: Path, **changed: Any) -> str:
    place = directory / ID
    place.mkdir(exist_ok=True)
    record = {
        "id": ID,
        "init_process_pid": 55,
        "init_process_start": 999,
        "cgroup_paths": {"": f"/sys/fs/cgroup/docker/{ID}"},
        "config": {"rootfs": "/x/merged", "labels": ["a=b", f"bundle=/run/b/{ID}"]},
        **changed,
    }
    (place / "state.json").write_text(json.dumps(record))
    return str(place)


def test_runcs_record_names_init_cgroups_and_bundle(tmp_path: Path) -> None:
    found = read_runc_state(state(tmp_path))
    assert found is not None
    assert found.init == ProcessId(55, 999)
    assert (found.cgroups, found.bundle, found.rootfs) == (
        (f"/sys/fs/cgroup/docker/{ID}",),
        f"/run/b/{ID}",
        "/x/merged",
    )


@pytest.mark.parametrize(
    "changed",
    [{"id": OTHER}, {"init_process_pid": "x"}, {"config": [1]}, {"cgroup_paths": "x"}, {"config": {"labels": 3}}],
)
def test_an_odd_record_is_none(tmp_path: Path, changed: dict[str, Any]) -> None:
    assert read_runc_state(state(tmp_path, **changed)) is None


def test_what_is_no_plain_file_is_none(tmp_path: Path) -> None:
    directory = state(tmp_path)
    real = tmp_path / "real.json"
    os.rename(f"{directory}/state.json", real)
    assert read_runc_state(directory) is None
    os.symlink(real, f"{directory}/state.json")
    assert read_runc_state(directory) is None
    os.unlink(f"{directory}/state.json")
    os.mkfifo(f"{directory}/state.json")
    assert read_runc_state(directory) is None


def test_a_record_of_another_user_is_none(tmp_path: Path) -> None:
    directory = state(tmp_path)
    os.chown(f"{directory}/state.json", 65534, 65534)
    assert read_runc_state(directory) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "null", '{"id": 3}', "\0" * 100])
def test_a_broken_record_is_none(tmp_path: Path, text: str) -> None:
    directory = state(tmp_path)
    Path(directory, "state.json").write_text(text)
    assert read_runc_state(directory) is None


# ---- cgroups


@pytest.mark.parametrize(
    ("path", "container_id", "expected"),
    [
        (f"/docker/{ID}", ID, f"/docker/{ID}"),
        (f"/system.slice/docker-{ID}.scope", ID, f"/system.slice/docker-{ID}.scope"),
        (f"/system.slice/docker-{ID}.scope/init.scope", ID, f"/system.slice/docker-{ID}.scope"),
        (f"/kubepods/besteffort/podx/{ID}", ID, f"/kubepods/besteffort/podx/{ID}"),
        (f"/kubepods.slice/cri-containerd-{ID}.scope", ID, f"/kubepods.slice/cri-containerd-{ID}.scope"),
        (f"/docker/{ID}/docker/{ID}", ID, f"/docker/{ID}"),
        (f"/docker/{OTHER}", ID, ""),
        (f"/docker/{ID}0", ID, ""),
        (f"/docker/x{ID}", ID, ""),
        (f"/docker/{ID}.scope", ID, ""),
        ("/default/web", "web", "/default/web"),
        ("/web/web", "web", "/web/web"),
        ("/web/other", "other", "/web/other"),
        ("/system.slice/nerdctl-web.scope", "web", "/system.slice/nerdctl-web.scope"),
        ("/system.slice/docker-my-web.scope", "web", ""),
        ("/system.slice/web.service", "web", ""),
        ("/", "web", ""),
        ("", "web", ""),
    ],
)
def test_only_the_part_that_is_the_containers(path: str, container_id: str, expected: str) -> None:
    assert cgroupfs.own_part(path, container_id) == expected


V2 = cgroupfs.Hierarchy("/sys/fs/cgroup", "/", frozenset())


@pytest.mark.parametrize(
    ("directory", "expected"),
    [
        (f"/sys/fs/cgroup/docker/{ID}", True),
        (f"/sys/fs/cgroup/docker/{OTHER}", False),
        (f"/sys/fs/cgroup/../../../home/{ID}", False),
        (f"/home/{ID}", False),
        (f"/sys/fs/cgroup/docker/{ID}/", False),
        ("/sys/fs/cgroup", False),
    ],
)
def test_a_directory_that_runc_names_must_be_its_cgroup(directory: str, expected: bool) -> None:
    assert cgroupfs.is_own(directory, ID, [V2]) is expected


@pytest.mark.parametrize(
    ("root", "path", "expected"),
    [
        ("/", "/a/b", "/sys/fs/cgroup/a/b"),
        ("/", "/", ""),
        ("/", "/../x", ""),
        ("/outer", "/outer/a", "/sys/fs/cgroup/a"),
        ("/outer", "/outer2/a", ""),
        ("/outer", "/outer", ""),
    ],
)
def test_a_path_is_found_where_it_is_mounted(root: str, path: str, expected: str) -> None:
    assert cgroupfs.Hierarchy("/sys/fs/cgroup", root, frozenset()).directory(path) == expected


def test_hierarchies_of_mountinfo(tmp_path: Path) -> None:
    text = (
        "30 23 0:26 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro,size=4096k\n"
        "31 30 0:27 / /sys/fs/cgroup/unified rw shared:10 - cgroup2 cgroup2 rw,nsdelegate\n"
        "32 30 0:28 / /sys/fs/cgroup/systemd rw shared:11 - cgroup cgroup rw,xattr,name=systemd\n"
        "35 30 0:31 / /sys/fs/cgroup/cpu,cpuacct rw shared:15 - cgroup cgroup rw,cpu,cpuacct\n"
        "broken\n"
    )
    (tmp_path / "mountinfo").write_text(text)
    found = {h.controllers: h.mount for h in cgroupfs.hierarchies(tmp_path / "mountinfo")}
    assert found == {
        frozenset(): "/sys/fs/cgroup/unified",
        frozenset({"name=systemd"}): "/sys/fs/cgroup/systemd",
        frozenset({"cpu", "cpuacct"}): "/sys/fs/cgroup/cpu,cpuacct",
    }


def test_a_deep_tree_of_cgroups_is_walked(tmp_path: Path) -> None:
    """As deep as a path can be: a recursive walk would fail, and a container can make such a tree."""
    place = tmp_path
    for _ in range(1500):
        place = place / "a"
        if len(str(place)) > 4000:
            break
        place.mkdir()
    (tmp_path / "b").mkdir()
    found = cgroupfs.subtree(str(tmp_path))
    assert len(found) > 1000
    assert found[-1] == str(tmp_path)
    assert cgroupfs.remove(str(tmp_path)) == ""
    assert not tmp_path.exists()


# ---- directories


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    place = tmp_path / "state" / "io.containerd.runtime.v2.task" / "moby" / ID
    (place / "rootfs").mkdir(parents=True)
    (place / "config.json").write_text("{}")
    (place / "work").symlink_to(tmp_path)
    os.mkfifo(place / "log")
    return place


def own(place: Path) -> Estate:
    return Estate(ID, "moby", "", Kind.LEAKED_SHIM, "b", bundle=str(place))


def test_a_bundle_is_removed_and_its_links_are_not_followed(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("x")
    assert cleanup.remove_directory(str(bundle), own(bundle)) == ""
    assert not bundle.exists()
    assert (tmp_path / "kept").exists()
    assert bundle.parent.exists()


def test_a_bundle_whose_rootfs_holds_files_stays(bundle: Path) -> None:
    (bundle / "rootfs" / "precious").write_text("x")
    assert "not empty" in cleanup.remove_directory(str(bundle), own(bundle))
    assert (bundle / "rootfs" / "precious").exists()


def test_a_bundle_behind_a_link_stays(bundle: Path, tmp_path: Path) -> None:
    """Somebody put a link in the place of a directory above it."""
    elsewhere = tmp_path / "elsewhere"
    os.rename(tmp_path / "state", elsewhere)
    (tmp_path / "state").symlink_to(elsewhere)
    assert cleanup.remove_directory(str(bundle), own(bundle)) != ""
    assert (elsewhere / "io.containerd.runtime.v2.task" / "moby" / ID / "config.json").exists()


def test_a_bundle_that_is_a_link_stays(bundle: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    os.rename(bundle, elsewhere)
    bundle.symlink_to(elsewhere)
    assert cleanup.remove_directory(str(bundle), own(bundle)) != ""
    assert (elsewhere / "config.json").exists()


def test_another_containers_directory_stays(bundle: Path) -> None:
    theirs = bundle.with_name(OTHER)
    theirs.mkdir()
    assert cleanup.remove_directory(str(theirs), own(bundle)) == "its path is not one of containerd's"
    assert theirs.exists()


def test_a_bundle_with_too_many_files_stays(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleanup, "MAX_ENTRIES", 2)
    assert "more than 2 files" in cleanup.remove_directory(str(bundle), own(bundle))


# ---- signals that nobody hears


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        pytest.param("NSpid:\t9\t1\nSigCgt:\t0\nSigIgn:\t0\nSigBlk:\t0\n", True, id="nested-init-without-handler"),
        pytest.param("NSpid:\t9\t1\nSigCgt:\t4000\nSigIgn:\t0\nSigBlk:\t0\n", False, id="nested-init-with-handler"),
        pytest.param("NSpid:\t9\t1\nSigCgt:\t0\nSigIgn:\t0\nSigBlk:\t4000\n", False, id="nested-init-with-signalfd"),
        pytest.param("NSpid:\t9\nSigCgt:\t0\nSigIgn:\t0\nSigBlk:\t0\n", False, id="in-the-hosts-pid-namespace"),
        pytest.param("NSpid:\t9\t7\nSigCgt:\t0\nSigIgn:\t0\nSigBlk:\t0\n", False, id="nested-but-no-init"),
        pytest.param("NSpid:\t9\nSigCgt:\t0\nSigIgn:\t4000\nSigBlk:\t0\n", True, id="ignored"),
        pytest.param("Name:\tx\n", False, id="not-said"),
        pytest.param("NSpid:\t9\t1\nSigCgt:\tzz\nSigIgn:\t0\nSigBlk:\t0\n", False, id="nonsense"),
    ],
)
def test_who_is_deaf_to_term(tmp_path: Path, status: str, expected: bool) -> None:
    (tmp_path / "9").mkdir()
    (tmp_path / "9" / "status").write_text(status)
    assert endings.is_deaf(9, tmp_path) is expected


# ---- its network namespace


def namespace_file(name: str, inode: int) -> mounts.Mount:
    return mounts.Mount(f"/run/docker/netns/{name}", f"net:[{inode}]", "nsfs")


def test_only_the_files_that_kept_its_network_namespace_before_are_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its own file went, and the inode was given to the next namespace: one of a swarm's, which has no process."""
    unmounted: list[str] = []

    def unmount(point: str) -> str:
        unmounted.append(point)
        return "busy"

    monkeypatch.setattr(mounts, "unmount", unmount)
    (tmp_path / "1").mkdir()
    estate = replace(FULL, netns=4026532001, netns_files=("/run/docker/netns/own",))
    table = [namespace_file("ingress_sbox", 4026532001), namespace_file("own", 4026532002)]
    monkeypatch.setattr(mounts, "of_host", lambda: tuple(table))
    cleanup._remove_netns(estate, Proc(tmp_path), lambda text: None)
    assert unmounted == []
    table.append(namespace_file("own", 4026532001))
    cleanup._remove_netns(estate, Proc(tmp_path), lambda text: None)
    assert unmounted == ["/run/docker/netns/own"]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (f"/churn/deep/{ID}", True),
        ("/churn/deep/other", False),  # not called like the container
        (f"/churn/../../{ID}", False),
        (f"system.slice:docker:{ID}", False),  # systemd's driver: no path
        (["/", ID], False),
    ],
)
def test_the_cgroup_of_a_creation_that_was_broken_off(tmp_path: Path, asked: object, found: bool) -> None:
    """Seen: a --cgroup-parent, and neither a process nor a record of runc's that would tell it."""
    (tmp_path / "config.json").write_text(json.dumps({"linux": {"cgroupsPath": asked}}))
    mounted = [cgroupfs.Hierarchy("/sys/fs/cgroup/pids", "/", frozenset({"pids"}))]
    expected = {f"/sys/fs/cgroup/pids/churn/deep/{ID}"} if found else set()
    assert _asked_for(str(tmp_path), ID, mounted) == expected


@pytest.mark.parametrize(
    ("namespace", "container_id", "expected"),
    [
        ("moby", ID, [f"docker/{ID}"]),
        ("default", "web", ["default/web"]),
        ("default", "buildkit", []),
        ("system.slice", "docker.service", []),
    ],
)
def test_a_cgroup_is_not_guessed_by_a_name_that_is_anothers(
    tmp_path: Path, namespace: str, container_id: str, expected: list[str]
) -> None:
    """docker/buildkit is where dockerd builds, system.slice/docker.service its own."""
    for path in (f"docker/{ID}", "docker/buildkit", "docker/web", "default/web", "system.slice/docker.service"):
        (tmp_path / path).mkdir(parents=True)
    mounted = [cgroupfs.Hierarchy(str(tmp_path), "/", frozenset())]
    found = cgroupfs.usual_places(container_id, namespace, mounted)
    assert found == {str(tmp_path / path) for path in expected}


def test_a_record_by_name_alone_must_be_of_the_shims_own_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another containerd's container of the same name: its record must not be deleted for the shim that was left."""
    bundle = f"/run/one/io.containerd.runtime.v2.task/default/{ID}"
    shim = Shim(ProcessId(4000000, 1), Generation.RUNC_V2, "", "default", ID, "/one.sock", bundle, 1)
    sighting = Sighting(ID, "default", "/one.sock", shim, (), 0.0)
    monkeypatch.setattr("orphand.estate.RUNC_ROOTS", (str(tmp_path),))
    (tmp_path / "default").mkdir()
    for label, found in ((bundle.replace("one", "two"), False), (bundle, True)):
        state(tmp_path / "default", config={"labels": [f"bundle={label}"]})
        assert bool(_runc_state(sighting, Proc())) is found
