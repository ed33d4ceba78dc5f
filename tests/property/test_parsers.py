# SPDX-License-Identifier: Apache-2.0
"""What anybody can write is parsed without an error, whatever it is, and a helper is never taken for a shim."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orphand.cgroups import contains, is_identifier, last_id, places
from orphand.errors import Gone
from orphand.identity import MASK, command_line, mask_arguments
from orphand.model import Generation, ProcessId, Shim
from orphand.proc import Stat, parse_cgroups, parse_stat, parse_status
from orphand.shims import Facts, Host, parse_arguments, recognise

IDS = st.from_regex(r"\A[A-Za-z0-9]+([._-][A-Za-z0-9]+){0,4}\Z").filter(is_identifier)
HEX = st.text("0123456789abcdef", min_size=64, max_size=64)
NAMES = ["namespace", "id", "address", "publish-binary", "workdir", "containerd-binary", "runtime-root", "bundle"]
ANY = st.text(st.characters(blacklist_categories=()), max_size=40)


@st.composite
def flag(draw: st.DrawFn, name: str, value: str) -> list[str]:
    """One flag in one of the four forms of Go's flag package."""
    dashes = draw(st.sampled_from(["-", "--"]))
    return [f"{dashes}{name}={value}"] if draw(st.booleans()) else [f"{dashes}{name}", value]


@st.composite
def argvs(draw: st.DrawFn) -> list[str]:
    """argv of a v2 shim: its flags in any order and form."""
    values = {"namespace": draw(IDS), "id": draw(st.one_of(IDS, HEX)), "address": "/run/containerd/containerd.sock"}
    for name in draw(st.sets(st.sampled_from(NAMES[3:]))):
        values[name] = draw(st.sampled_from(["", "/usr/bin/containerd", "start", "delete", "x"]))
    parts = [draw(flag(name, value)) for name, value in values.items()]
    parts += [["-debug"]] * draw(st.integers(0, 1))
    return ["containerd-shim-runc-v2", *(a for part in draw(st.permutations(parts)) for a in part)]


def facts(argv: list[str], exe: str = "/usr/bin/containerd-shim-runc-v2", **more: object) -> Facts:
    values: dict[str, object] = {
        "stat": Stat(50, "containerd-shim", "S", 1, 1), "argv": tuple(argv), "exe": exe, "exe_uid": 0,
        "exe_mode": 0o100755, "cwd": "/", "uids": (0,) * 4, "nspids": (50,), "namespaces": {}, "cgroups": (), **more,
    }  # fmt: skip
    return Facts(**values)  # type: ignore[arg-type]


@given(argvs())
def test_serving_shims_are_recognised_in_every_form(argv: list[str]) -> None:
    found = recognise(facts(argv), Host())
    assert found is not None
    assert isinstance(found.shim, Shim)
    assert found.shim.generation is Generation.RUNC_V2
    assert found.shim.address == "/run/containerd/containerd.sock"


@given(argvs(), st.sampled_from(["start", "delete"]), st.lists(st.sampled_from(["--", "-debug", "-new"]), max_size=2))
def test_helpers_never_are(argv: list[str], action: str, before: list[str]) -> None:
    assert recognise(facts([*argv, *before, action]), Host()) is None


@given(argvs(), st.sampled_from(["-v", "--version", "-info", "-h"]))
def test_printing_calls_never_are(argv: list[str], printing: str) -> None:
    assert recognise(facts([argv[0], printing, *argv[1:]]), Host()) is None


@given(st.lists(ANY, max_size=12), ANY, st.sampled_from([0, 1000]), st.sampled_from([0o100755, 0o100777, 0o40755]))
def test_whatever_is_recognised_could_be_real(argv: list[str], exe: str, uid: int, mode: int) -> None:
    parse_arguments(argv)
    for path in (exe, "/usr/bin/containerd-shim-runc-v2", "/x/containerd-shim"):
        found = recognise(facts(argv, path, uids=(uid,) * 4, exe_mode=mode), Host())
        if found and found.shim:
            assert (uid, mode) == (0, 0o100755)
            assert is_identifier(found.shim.container_id)
            assert is_identifier(found.shim.namespace) or found.shim.generation is Generation.OTHER


@given(st.binary(max_size=200))
def test_any_bytes_are_gone_or_a_stat(data: bytes) -> None:
    for parse in (parse_stat, parse_status, parse_cgroups):
        try:
            parse(data)
        except Gone:
            continue


@given(st.binary(max_size=15), st.integers(1, 1 << 22), st.integers(0, 1 << 60))
def test_stat_of_any_comm(comm: bytes, pid: int, start: int) -> None:
    stat = parse_stat(b"%d (%s) S 1 " % (pid, comm) + b"0 " * 17 + b"%d 0\n" % start)
    assert (stat.process, stat.ppid, stat.state) == (ProcessId(pid, start), 1, "S")


PARTS = st.one_of(
    HEX, HEX.map(lambda h: f"docker-{h}.scope"), HEX.map(lambda h: f"libpod-{h}"), ANY,
    st.sampled_from(["system.slice", "lxc.payload.a", "lxc", "machine-x.scope", "buildkit", "payload", "..", ""]),
)  # fmt: skip


@given(st.lists(PARTS, max_size=6), st.lists(st.one_of(IDS, PARTS), max_size=3))
def test_places_are_above_or_at_the_path(parts: list[str], known: list[str]) -> None:
    path = "/" + "/".join(parts)
    found = places(path, tuple(k for k in known if is_identifier(k)))
    for place in found:
        assert contains(place.path, path)
        assert place.path not in ("", "/")
        assert place.container_id == "" or is_identifier(place.container_id)
    assert last_id(path) == "" or is_identifier(last_id(path))


SECRETS = st.text("abcdefghXYZ0123456789", min_size=12, max_size=30)


@given(
    SECRETS, st.sampled_from(["--password", "--db-password", "--api-key", "-token", "--client-secret", "--authToken"])
)
def test_secrets_by_name_never_show(secret: str, name: str) -> None:
    for argv in (
        ["app", name, secret],
        ["app", f"{name}={secret}"],
        ["sh", "-c", f"app {name} {secret} --x"],
        ["sh", "-c", f"app {name}='{secret}' --x"],
        ["docker", "run", "-e", f"X={secret}", "img"],
        ["docker", "run", "--env", f"X={secret}"],
        ["docker", "run", f"--env=X={secret}"],
        ["curl", f"https://user:{secret}@host/path"],
        ["curl", "-u", f"user:{secret}"],
        ["curl", "-H", f"Authorization: Bearer {secret}"],
        ["sh", "-c", f"DB_PASSWORD={secret} exec app"],
        ["sh", "-c", f'export API_TOKEN="{secret}"; app'],
    ):
        assert secret not in command_line(argv)
        assert MASK in command_line(argv)


@given(st.lists(ANY, max_size=70))
def test_any_argv_becomes_a_bounded_line(argv: list[str]) -> None:
    assert len(command_line(argv)) <= 512
    assert len(mask_arguments(argv)) == len(argv)
