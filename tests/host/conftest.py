# SPDX-License-Identifier: Apache-2.0
"""What the package tests share: two versions of both packages in signed repositories, made as a release is."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.host.guest import ROOT

BEFORE = "0.0.9"  # an older version, built from the same tree: what is tested is the packaging


@dataclass(frozen=True)
class Repository:
    """`directory` is served: apt/, yum/ and the public keys. `testing` has both versions, `stable` BEFORE only."""

    directory: Path
    packages: Path
    current: str
    environment: dict[str, str]

    def do(self, *arguments: str) -> None:
        """Run packaging/repo/repo with the test's key."""
        command = [str(ROOT / "packaging/repo/repo"), arguments[0], str(self.directory), *arguments[1:]]
        run(command, self.environment)


def run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, env={**os.environ, **environment}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}"
    return done.stdout


def make_key(home: Path, address: str) -> dict[str, str]:
    """A throw-away signing key; the environment that names it."""
    home.mkdir(mode=0o700)
    environment = {"GNUPGHOME": str(home), "REPO_KEY": address}
    user = f"orphand test only <{address}>"
    run(["gpg", "-q", "--batch", "--passphrase", "", "--quick-gen-key", user, "rsa3072", "sign", "1y"], environment)
    return environment


def end_agent(environment: dict[str, str]) -> None:
    run(["gpgconf", "--kill", "gpg-agent"], environment)


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both packages in both versions, unsigned."""
    out = tmp_path_factory.mktemp("packages")
    for kind in ("deb", "rpm"):
        run([str(ROOT / "packaging/build"), kind, str(out)], {})
        run([str(ROOT / "packaging/build"), kind, str(out)], {"VERSION": BEFORE})
    return out


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory, packages: Path) -> Iterator[Repository]:
    """Signed repositories of both versions."""
    base = tmp_path_factory.mktemp("repository")
    environment = make_key(base / "gnupg", "repo@orphand.invalid")
    served = base / "served"
    (current,) = {path.name.split("_")[1] for path in packages.glob("*.deb")} - {BEFORE}
    repository = Repository(served, packages, current, environment)
    try:
        repository.do("add", *map(str, sorted(packages.iterdir())))
        repository.do("promote", BEFORE)
        yield repository
    finally:
        end_agent(environment)


def pytest_configure() -> None:
    """A run that is told to stop still ends its hosts."""
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("SIGTERM", returncode=143))
