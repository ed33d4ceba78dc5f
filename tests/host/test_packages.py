# SPDX-License-Identifier: Apache-2.0
"""The packages and repositories themselves, and the RPM installed by dnf on a booted host with an rpm database."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.host.conftest import BEFORE, Repository, end_agent, make_key, run
from tests.host.guest import ROOT, Host, tree

SERVED = "/srv/orphand"
DEBIAN_MACROS = ROOT / "packaging/rpm/debian.macros"
DNF = "dnf -y -q --noplugins --setopt=reposdir=/etc/yum.repos.d --setopt=install_weak_deps=0"


# What was built


def test_two_builds_are_bit_identical(packages: Path, tmp_path: Path) -> None:
    """From another directory, with another umask, time zone and hour."""
    copy = tmp_path / "elsewhere"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", ".cache", "dist", "__pycache__"))
    out = tmp_path / "out"
    for kind in ("deb", "rpm"):
        command = f"umask 077; TZ=Asia/Tokyo packaging/build {kind} {out}"
        subprocess.run(["bash", "-c", command], cwd=copy, check=True, stdout=subprocess.DEVNULL)
    for again in out.iterdir():
        assert digest(again) == digest(packages / again.name), again.name


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_lintian_has_no_complaint(packages: Path, repository: Repository) -> None:
    deb = packages / f"orphand_{repository.current}_all.deb"
    assert run(["lintian", "-EI", "--pedantic", "--allow-root", str(deb)], {}) == ""


def test_rpmlint_has_no_complaint(packages: Path, repository: Repository) -> None:
    said = run(
        ["rpmlint", "-c", str(ROOT / "packaging/rpm/rpmlintrc.toml"), str(rpm(packages, repository.current))], {}
    )
    assert "0 errors, 0 warnings" in said, said


def test_no_macro_of_the_spec_is_left_unexpanded(packages: Path, repository: Repository) -> None:
    assert "%" not in run(["rpm", "-qp", "--scripts", str(rpm(packages, repository.current))], {})


@pytest.mark.parametrize("system", ["rhel 9", "rhel 10", "fedora 43"])
def test_the_spec_is_right_for_each_system(system: str) -> None:
    """Parsed, not built there: this machine has no Fedora or EL."""
    spec = str(ROOT / "packaging/rpm/orphand.spec")
    defines = ["--define", system, "--define", "orphand_version 1.2.3", "--load", str(DEBIAN_MACROS)]
    assert run(["rpmspec", "-q", "--qf", "%{name} %{version} %{arch}", *defines, spec], {}) == "orphand 1.2.3 noarch"


def test_the_spec_refuses_el_8() -> None:
    spec = str(ROOT / "packaging/rpm/orphand.spec")
    defines = ["--define", "rhel 8", "--define", "orphand_version 1.2.3", "--load", str(DEBIAN_MACROS)]
    done = subprocess.run(["rpmspec", "-q", *defines, spec], text=True, capture_output=True)
    assert done.returncode != 0
    assert "EL 9, EL 10 or Fedora" in done.stderr


def rpm(where: Path, version: str) -> Path:
    (path,) = where.glob(f"orphand-{version}-*.rpm")
    return path


def test_the_deb_starts_the_service(packages: Path) -> None:
    """debhelper writes no script, and says nothing, for a unit that it does not find where its suite has them."""
    for deb in packages.glob("*.deb"):
        scripts = f"dpkg-deb --ctrl-tarfile {deb} | tar -xO ./postinst ./prerm"
        text = run(["bash", "-c", scripts], {})
        assert "deb-systemd-helper enable 'orphand.service'" in text
        assert "deb-systemd-invoke stop 'orphand.service'" in text


@pytest.mark.parametrize("page", ["orphand.8", "orphand.yaml.5"])
def test_man_pages_have_no_error(page: str, tmp_path: Path) -> None:
    out = tmp_path / page
    with (ROOT / f"docs/man/{page}.scd").open() as source, out.open("w") as target:
        subprocess.run(["scdoc"], stdin=source, stdout=target, check=True)
    assert run(["mandoc", "-Tlint", "-Werror", str(out)], {}) == ""
    shown = ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", str(out)]
    assert subprocess.run(shown, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True).stderr == b""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_is_valid(shell: str) -> None:
    files = {"bash": "orphand.bash", "zsh": "_orphand", "fish": "orphand.fish"}
    run([shell, "-n", str(ROOT / "packaging/completion" / files[shell])], {})


# dnf


@pytest.fixture(scope="module")
def host(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A bookworm host with dnf; names of Debian's own packages are provided by an empty stub."""
    stubs = tmp_path_factory.mktemp("stubs")
    define = ["--define", f"_topdir {stubs}", "--define", f"_rpmdir {stubs}"]
    run(["rpmbuild", "-bb", *define, str(ROOT / "tests/host/stubs.spec")], {})
    base = tree("bookworm", "bookworm-dnf", "rpm,dnf,gnupg")
    with Host("bookworm", base=base, binds=[f"{repository.directory}:{SERVED}", f"{stubs}:/srv/stubs"]) as host:
        host.sh("live_restore; img; mkdir -p /etc/yum.repos.d")
        # Debian's rpm has its database in $HOME
        host.write("/root/.rpmmacros", "%_dbpath /var/lib/rpm\n")
        host.sh("rpm -i --nodeps /srv/stubs/noarch/*.rpm")
        yield host


def yum_repository(directory: str) -> str:
    return "\n".join(
        f"[{name}]\nname={name}\nbaseurl=file://{directory}/yum/{channel}\ngpgkey=file://{SERVED}/orphand.asc\n"
        f"gpgcheck=1\nrepo_gpgcheck=1\nenabled={enabled}\n"
        for name, channel, enabled in (("orphand", "stable", 1), ("orphand-testing", "testing", 0))
    )


def test_dnf_installs_upgrades_downgrades_and_removes_it(host: Host, repository: Repository) -> None:
    """The RPM way: installed, it is not enabled until the admin says so; then every change restarts it."""
    host.write("/etc/yum.repos.d/orphand.repo", yum_repository(SERVED))
    host.sh(f"{DNF} install orphand", timeout=300)
    assert host.sh("orphand --version") == f"orphand {BEFORE}"
    assert host.sh("systemctl is-enabled orphand || :; systemctl is-active orphand || :") == "disabled\ninactive"

    host.sh("systemctl enable --now orphand")
    first = host.sh("systemctl show -p MainPID --value orphand")
    host.write("/etc/orphand.yaml", "policy:\n  grace: 150s\n")
    host.sh(f"{DNF} --enablerepo=orphand-testing upgrade orphand", timeout=300)
    assert host.sh("orphand --version") == f"orphand {repository.current}"
    assert host.sh("systemctl is-active orphand") == "active"
    assert host.sh("systemctl show -p MainPID --value orphand") != first
    assert host.read("/etc/orphand.yaml") == "policy:\n  grace: 150s"

    host.sh(f"{DNF} --enablerepo=orphand-testing downgrade orphand-{BEFORE}", timeout=300)
    assert host.sh("orphand --version; systemctl is-active orphand") == f"orphand {BEFORE}\nactive"

    host.sh(f"{DNF} remove orphand", timeout=300)
    assert host.run("systemctl", "is-active", "orphand").returncode != 0
    left = host.sh("find /usr /etc /run /lib/systemd -xdev -iname '*orphand*' -not -path '/etc/yum.repos.d/*'")
    # the edited one, and the packages' own beside it
    assert set(left.split()) == {"/etc/orphand.yaml.rpmsave", "/etc/orphand.yaml.rpmnew"}


# Tampering

Tamper = Callable[[Path, Repository], None]


def a_byte_of_the_package(yum: Path, _: Repository) -> None:
    package = rpm(yum, BEFORE)
    content = bytearray(package.read_bytes())
    content[-100] ^= 1
    package.write_bytes(bytes(content))


def the_index(yum: Path, _: Repository) -> None:
    index = yum / "repodata/repomd.xml"
    index.write_text(index.read_text().replace("<revision>", "<revision>1"))


def no_signature_of_the_index(yum: Path, _: Repository) -> None:
    (yum / "repodata/repomd.xml.asc").unlink()


def an_unsigned_package(yum: Path, repository: Repository) -> None:
    shutil.copy(rpm(repository.packages, BEFORE), rpm(yum, BEFORE))
    index_anew(yum, repository)


def a_package_signed_by_another(yum: Path, repository: Repository) -> None:
    other = make_key(yum.parent / "other-key", "other@orphand.invalid")
    try:
        shutil.copy(rpm(repository.packages, BEFORE), rpm(yum, BEFORE))
        sign = ["rpmsign", "--define", "_gpg_name other@orphand.invalid", "--define", "__gpg /usr/bin/gpg", "--addsign"]
        run([*sign, str(rpm(yum, BEFORE))], other)
    finally:
        end_agent(other)
    index_anew(yum, repository)


def index_anew(yum: Path, repository: Repository) -> None:
    shutil.rmtree(yum / "repodata")
    run(["createrepo_c", "-q", str(yum)], {})
    index = str(yum / "repodata/repomd.xml")
    run(["gpg", "--batch", "--armor", "--detach-sign", "-o", f"{index}.asc", index], repository.environment)


@pytest.mark.parametrize(
    ("tamper", "complaint"),
    [
        (a_byte_of_the_package, "checksum"),
        (an_unsigned_package, "not signed"),
        (a_package_signed_by_another, "GPG check FAILED"),
        (the_index, "GPG"),
        (no_signature_of_the_index, "GPG"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_dnf_refuses_what_was_tampered_with(
    host: Host, repository: Repository, tmp_path: Path, tamper: Tamper, complaint: str
) -> None:
    copy = tmp_path / "served"
    shutil.copytree(repository.directory / "yum/stable", copy / "yum/stable")
    tamper(copy / "yum/stable", repository)
    place = f"/root/{tamper.__name__}"
    shutil.copytree(copy, host.root / place.lstrip("/"))
    host.write("/etc/yum.repos.d/orphand.repo", yum_repository(place))

    done = host.run("sh", "-c", f"{DNF} --setopt=cachedir=/tmp/{tamper.__name__} install orphand", timeout=300)
    assert done.returncode != 0
    assert complaint in done.stdout + done.stderr
    assert host.run("test", "-e", "/usr/bin/orphand").returncode != 0


def a_byte_of_the_deb(apt: Path, _: Repository) -> None:
    (package,) = (apt / "pool/stable").glob("*.deb")
    content = bytearray(package.read_bytes())
    content[-100] ^= 1
    package.write_bytes(bytes(content))


def the_list_of_packages(apt: Path, _: Repository) -> None:
    for packages in (apt / "dists/stable/main").rglob("Packages"):
        packages.with_suffix(".gz").unlink(missing_ok=True)
        packages.write_text(packages.read_text().replace("Priority: optional", "Priority: required"))


def the_release(apt: Path, _: Repository) -> None:
    release = apt / "dists/stable/InRelease"
    release.write_text(release.read_text().replace("Label: orphand", "Label: orphans"))


def another_key(apt: Path, _: Repository) -> None:
    other = make_key(apt.parent / "other-key", "other@orphand.invalid")
    release = apt / "dists/stable/InRelease"
    release.unlink()
    (apt / "dists/stable/Release.gpg").unlink()
    try:
        run(["gpg", "--batch", "--clearsign", "-o", str(release), str(apt / "dists/stable/Release")], other)
    finally:
        end_agent(other)


@pytest.mark.parametrize("tamper", [a_byte_of_the_deb, the_list_of_packages, the_release, another_key])
def test_apt_refuses_what_was_tampered_with(host: Host, repository: Repository, tmp_path: Path, tamper: Tamper) -> None:
    copy = tmp_path / "served"
    shutil.copytree(repository.directory / "apt", copy / "apt")
    tamper(copy / "apt", repository)
    place = f"/root/{tamper.__name__}"
    shutil.copytree(copy, host.root / place.lstrip("/"))
    host.sh(f"cp {SERVED}/orphand.gpg /usr/share/keyrings/; rm -rf /etc/apt/sources.list /var/lib/apt/lists/*")
    source = f"deb [signed-by=/usr/share/keyrings/orphand.gpg] file:{place}/apt stable main\n"
    host.write("/etc/apt/sources.list.d/orphand.list", source)

    host.run("apt-get", "update")
    # dnf's host lets apt install nothing by accident either: the package is not there, whatever the exit status was
    host.run("apt-get", "-y", "install", "orphand", timeout=300)
    assert host.run("test", "-e", "/usr/bin/orphand").returncode != 0


# A fleet


def test_a_fleet_is_rolled_out_and_back_by_ansible(repository: Repository, tmp_path: Path) -> None:
    """Two nodes, a batch each. A version that does not come up goes back, and the second node is not touched."""
    with ExitStack() as stack:
        binds = [f"{repository.directory}:{SERVED}"]
        base = tree("bookworm", "bookworm-ansible", "python3-apt")
        nodes = [stack.enter_context(Host("bookworm", base=base, binds=binds)) for _ in range(2)]
        for node in nodes:
            node.sh("rm -f /etc/apt/sources.list")
        inventory = tmp_path / "inventory"
        inventory.write_text("".join(f"{node.name} ansible_become=false\n" for node in nodes))

        done = play(inventory, repository, "stable")
        assert done.returncode == 0, done.stdout + done.stderr
        assert [node.sh("orphand --version; systemctl is-active orphand") for node in nodes] == [
            f"orphand {BEFORE}\nactive"
        ] * 2

        good = tmp_path / "orphand.yaml"
        good.write_text("policy: {grace: 3m}\n")
        done = play(inventory, repository, "testing", f"orphand_version={repository.current}", f"orphand_config={good}")
        assert done.returncode == 0, done.stdout
        assert [node.sh("orphand --version") for node in nodes] == [f"orphand {repository.current}"] * 2
        assert [node.read("/etc/orphand.yaml") for node in nodes] == ["policy: {grace: 3m}"] * 2

        bad = tmp_path / "bad.yaml"
        bad.write_text("policy: {graze: 3m}\n")
        done = play(inventory, repository, "testing", f"orphand_version={BEFORE}", f"orphand_config={bad}")
        assert done.returncode != 0
        assert "did you mean grace" in done.stdout
        assert [state_of(node) for node in nodes] == [f"orphand {repository.current}\nactive"] * 2
        assert [node.read("/etc/orphand.yaml") for node in nodes] == ["policy: {grace: 3m}"] * 2
        (untouched,) = (node for node in nodes if f"{node.name} " not in done.stdout.split("PLAY RECAP")[1])
        assert untouched.name == nodes[1].name


def state_of(node: Host) -> str:
    return node.sh("orphand --version; systemctl is-active orphand")


def play(inventory: Path, repository: Repository, channel: str, *extra: str) -> subprocess.CompletedProcess[str]:
    """Ansible, over a stand-in for ssh, since the hosts have no network."""
    values = [
        f"orphand_repository=file:{SERVED}",
        f"orphand_key={repository.directory}/orphand.gpg",
        f"orphand_channel={channel}",
        "orphand_batches=[1]",
        "orphand_health_retries=3",
        *extra,
    ]
    environment = {
        **os.environ,
        "ANSIBLE_SSH_EXECUTABLE": str(ROOT / "tests/host/ssh"),
        "ANSIBLE_SSH_TRANSFER_METHOD": "piped",
        "ANSIBLE_PIPELINING": "1",
        "ANSIBLE_LOCAL_TEMP": str(inventory.parent / "ansible"),
        "ANSIBLE_NOCOWS": "1",
        "LC_ALL": "C.UTF-8",
    }
    command = ["ansible-playbook", "-i", str(inventory), str(ROOT / "packaging/ansible/orphand.yml")]
    for value in values:
        command += ["-e", value]
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=900)
