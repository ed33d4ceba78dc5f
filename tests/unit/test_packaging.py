# SPDX-License-Identifier: Apache-2.0
"""What is packed says the same as the program: commands, options, keys, defaults, version."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orphand import __version__, cli, config
from orphand.model import Kind, Verdict
from orphand.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
MANUAL = (ROOT / "docs/man/orphand.8.scd").read_text()
CONFIG_MANUAL = (ROOT / "docs/man/orphand.yaml.5.scd").read_text()
COMPLETIONS = ("orphand.bash", "_orphand", "orphand.fish")


def commands() -> dict[str, set[str]]:
    """Each command and its long options."""
    parser = cli._parser()
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return {name: options(sub) for name, sub in action.choices.items()}


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {o for action in parser._actions for o in action.option_strings if o.startswith("--")}


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completion_offers_each_command_and_option(name: str) -> None:
    text = (ROOT / "packaging/completion" / name).read_text()
    for command, of_command in commands().items():
        assert re.search(rf"\b{command}\b", text), command
        for option in of_command | options(cli._parser()):
            assert (f"-l {option[2:]}" if name.endswith("fish") else option) in text, (command, option)


def test_completion_offers_nothing_else() -> None:
    known = set().union(*commands().values()) | options(cli._parser())
    for name in COMPLETIONS[:2]:
        text = (ROOT / "packaging/completion" / name).read_text()
        assert set(re.findall(r"(?<![\w-])--[a-z-]+", text)) <= known
    fish = (ROOT / "packaging/completion/orphand.fish").read_text()
    assert {f"--{name}" for name in re.findall(r"complete .* -l ([a-z-]+)", fish)} <= known


def test_the_manual_has_each_command_option_kind_and_verdict() -> None:
    described = MANUAL.split("# COMMANDS")[1].split("# EXIT STATUS")[0]
    for command, of_command in commands().items():
        entry = re.search(rf"^\*{command}\*.*$", described, re.MULTILINE)
        assert entry, command
        for option in of_command - {"--help", "--json"}:
            assert option in described, (command, option)
        assert ("--json" in entry[0]) == ("--json" in of_command), command
    for kind in Kind:
        assert f"\n*{kind.value}*\n" in MANUAL
    for verdict in Verdict:
        assert f"*{verdict.value}*" in MANUAL


def test_the_manual_has_each_key_with_its_default(tmp_path: Path) -> None:
    """What it calls the default is read by the program as the default."""
    lines = []
    for section, keys in config.SECTIONS.items():
        for key in keys:
            if section in ("docker", "containerd"):
                assert f"*{key}*" in CONFIG_MANUAL.split(f"\n*{section}*:")[1].split("\n\n")[0]
                continue
            entry = re.search(rf"\*{section}\.{key}\*: [^(]*\(default: ([^;,)]*)", CONFIG_MANUAL)
            assert entry, f"{section}.{key}"
            if entry[1] == "none":
                assert getattr(getattr(Settings(), section), key) in ((), "")
            else:
                lines.append(f"{section}: {{{key}: {entry[1]}}}\n")
    for number, line in enumerate(lines):
        path = tmp_path / f"{number}.yaml"
        path.write_text(line)
        assert config.load([path]) == Settings(), line
    for key in config.MATCH:
        assert f"*{key}*" in CONFIG_MANUAL


def test_every_place_has_the_same_version() -> None:
    first = (ROOT / "packaging/debian/changelog").read_text().splitlines()[0]
    assert first.startswith(f"orphand ({__version__}) ")
    spec = (ROOT / "packaging/rpm/orphand.spec").read_text()
    assert re.search(rf"^\* .* - {re.escape(__version__)}-1$", spec, re.MULTILINE)


def test_the_wrapper_runs_isolated_on_the_system_python() -> None:
    """No environment variable and no user's module decides what a root daemon imports."""
    assert (ROOT / "packaging/bin/orphand").read_text().startswith("#!/usr/bin/python3 -IB\n")


def test_the_wrapper_says_which_python_it_needs() -> None:
    old = "import runpy, sys; sys.version_info = (3, 6, 8); runpy.run_path(sys.argv[1])"
    command = [sys.executable, "-c", old, str(ROOT / "packaging/bin/orphand")]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 78
    assert done.stderr == "orphand needs Python 3.9 or later; /usr/bin/python3 is 3.6\n"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["sc"], {"scan"}),
        (["--config", "/etc/os-rel"], {"/etc/os-release"}),
        (["scan", "--w"], {"--watch"}),
        (["--config", "x", "reap", "--y"], {"--yes"}),
        (["history", "--since", ""], set()),
        (["hold", "--"], {"--for", "--help"}),
    ],
)
def test_bash_completes(words: list[str], offered: set[str]) -> None:
    line = f'COMP_WORDS=(orphand "$@"); COMP_CWORD=$#; . {ROOT}/packaging/completion/orphand.bash; _orphand'
    script = f'{line}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", script, "bash", *words], text=True, capture_output=True, check=True)
    assert set(done.stdout.split()) == offered
    assert done.stderr == ""
