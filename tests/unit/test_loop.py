# SPDX-License-Identifier: Apache-2.0
"""What the daemon's imports bring, in an interpreter of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def loaded(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_the_daemon_does_without_what_it_does_not_use() -> None:
    modules = loaded("import orphand.cli, orphand.daemon")
    assert "asyncio" in modules
    assert modules.isdisjoint({"ssl", "_ssl", "_hashlib", "grpc", "requests", "docker", "yaml", "systemd"})


def test_tls_can_be_had_later() -> None:
    assert {"ssl", "asyncio"} <= loaded("import orphand.cli, ssl; ssl.create_default_context()")


def test_of_docker_py_only_what_is_used_is_there_and_the_whole_can_be_had_later() -> None:
    modules = loaded("from orphand.authorities import docker_api; docker_api.newest_known()")
    assert "requests" in modules
    assert not {m for m in modules if m.partition(".")[0] in ("docker", "paramiko", "setuptools", "distutils")}
    assert "docker.models" in loaded(
        "from orphand.authorities import docker_api; docker_api.newest_known(); import docker; docker.DockerClient"
    )
