# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 a mistake and its message read best in one line
"""The configuration: what it becomes, and what each mistake is told as."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest

from orphand import config, settings
from orphand.config_tree import Problems
from orphand.errors import ConfigError
from orphand.model import Action, Kind
from orphand.settings import ContainerdEngine, DockerEngine, Match, Settings

PACKAGED = Path(__file__).parents[2] / "packaging" / "orphand.yaml"


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Loads texts as files a.yaml, b.yaml, … in this order."""

    def _load(*contents: Any) -> Settings:
        paths = []
        for name, content in zip("abcdef", contents):
            path = tmp_path / f"{name}.yaml"
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            paths.append(path)
        return config.load(paths)

    return _load


def mistakes(load: Any, tmp_path: Path, *contents: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*contents)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


UNIT = "write it with a unit, as in 120s, 2m or 1h30m"
SHORT = "is too short to be safe; write at least 60s, or for tests kill: {allow_short_grace: true}"
MATCH = "name at least one of kind, namespace, container_id, name, image, pod, pod_namespace, hostname"
WINDOW = 'write it as in "Mon-Fri 09:00-17:00", "22:00-06:00" or "Sat,Sun"'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # keys
        ("polcy: {}", "1:1: polcy: unknown key; did you mean policy?"),
        ("policy:\n  actoin: kill", "2:3: policy.actoin: unknown key; did you mean action?"),
        ("policy: {max-orphans: 1}", "1:10: policy.max-orphans: unknown key; known here: action, grace, rules, exempt, windows, jitter"),
        ("kill: {term-timeout: 1s}", "1:8: kill.term-timeout: unknown key; did you mean term_timeout?"),
        ("scan: {max_orphans: 1}", "1:8: scan.max_orphans: unknown key; it belongs below kill"),
        ("kill: {cleanup: true}\nscan: {}\nkill: {}", "3:1: kill: key is here twice, first in line 1; keep one"),
        ("? [a, b]\n: 1", "1:3: a list or mapping as a key; keys are plain words"),
        ('"a\\nb": 1', "1:1: a\\nb: unknown key; known here: policy, kill, scan, docker, containerd, journal, alerts"),
        # types
        ("policy: kill", "1:9: policy: is one value; write keys below it: action, grace, rules, exempt, windows, jitter"),
        ("policy: [kill]", "1:9: policy: is a list; write keys below it: action, grace, rules, exempt, windows, jitter"),
        ("kill: {cleanup: 1}", "1:17: kill.cleanup: 1 is neither true nor false; write true or false"),
        ('kill: {cleanup: "yes"}', "1:17: kill.cleanup: yes is neither true nor false; write true or false"),
        ("kill: {max_orphans: many}", "1:21: kill.max_orphans: many is not a whole number; write one from 0 to 10000, digits only"),
        ("kill: {max_orphans: 2.5}", "1:21: kill.max_orphans: 2.5 is not a whole number; write one from 0 to 10000, digits only"),
        ("kill: {max_orphans: 0x10}", "1:21: kill.max_orphans: 0x10 is not a whole number; write one from 0 to 10000, digits only"),
        ("kill: {max_orphans: -1}", "1:21: kill.max_orphans: -1 is negative; write a whole number from 0 to 10000"),
        ("kill: {max_orphans: 10001}", "1:21: kill.max_orphans: 10001 is too large; write a whole number from 0 to 10000"),
        ("kill: {max_orphans: .nan}", "1:21: kill.max_orphans: .nan is not a whole number; write one from 0 to 10000, digits only"),
        ("kill: {max_orphans: }", "1:20: kill.max_orphans: nothing is not a whole number; write one from 0 to 10000, digits only"),
        ("policy: {rules: {match: {name: a}}}", "1:17: policy.rules: is a mapping, not a list; write a list of rules, each after a dash"),
        ("policy: {action: kil}", "1:18: policy.action: kil is not known; did you mean kill?"),
        ("policy: {action: delete}", "1:18: policy.action: delete is not known; write one of log, alert, kill"),
        ("policy: {action: [log]}", "1:18: policy.action: a list is not known; write one of log, alert, kill"),
        # units
        ("policy: {grace: 120}", f"1:17: policy.grace: 120 has no unit; {UNIT}"),
        ("policy: {grace: 1:30}", f"1:17: policy.grace: 1:30 is not a duration; {UNIT}"),
        ("policy: {grace: soon}", f"1:17: policy.grace: soon is not a duration; {UNIT}"),
        ("policy: {grace: .inf}", f"1:17: policy.grace: .inf is not a duration; {UNIT}"),
        ('policy: {grace: ""}', f"1:17: policy.grace: an empty string is not a duration; {UNIT}"),
        ("policy: {grace: }", '1:16: policy.grace: is empty; write a value, "" for an empty one, or remove the key'),
        ("policy: {grace: 2 weeks}", '1:17: policy.grace: 2 weeks has the unit "weeks"; use ms, s, m, h or d'),
        ("policy: {grace: 30m1h}", "1:17: policy.grace: 30m1h is not a duration; write the larger unit first, each once: 1h30m"),
        ("policy: {grace: -5s}", f"1:17: policy.grace: -5s is negative; {UNIT}"),
        ("policy: {grace: 8d}", "1:17: policy.grace: 8d is too long; write at most 7d"),
        ("scan: {timeout: 0}", "1:17: scan.timeout: 0 is too short; write at least 100ms"),
        ("kill: {max_share: 25}", "1:19: kill.max_share: 25 is more than the whole; write it as 25% or 0.25"),
        ("kill: {max_share: .nan}", "1:19: kill.max_share: .nan is not a share; write it as 25% or 0.25"),
        ("kill: {max_share: -5%}", "1:19: kill.max_share: -5% is negative; write it as 25% or 0.25"),
        # what must not be set lightly
        ("policy: {grace: 59s}", f"1:17: policy.grace: 59s {SHORT}"),
        ("policy: {grace: 0}", f"1:17: policy.grace: 0s {SHORT}"),
        ("policy:\n  rules:\n  - match: {name: a}\n    grace: 500ms", f"4:12: policy.rules[0].grace: 500ms {SHORT}"),
        (
            "policy: {action: kill}\nscan: {settle: 5s}",
            "2:16: scan.settle: 5s is too short to be safe; write at least 30s, or for tests kill: {allow_short_grace: true}",
        ),
        # rules
        ("policy: {exempt: [{}]}", f"1:19: policy.exempt[0]: is empty and would fit nothing; {MATCH}"),
        ("policy: {exempt: [web]}", "1:19: policy.exempt[0]: is one value; write keys below it: kind, namespace, container_id, name, image, pod, pod_namespace, hostname"),
        ("policy: {rules: [{match: , action: log}]}", f"1:25: policy.rules[0].match: is empty and would fit nothing; {MATCH}"),
        ("policy: {rules: [{action: log}]}", "1:18: policy.rules[0]: match is missing; write match: …"),
        ("policy: {rules: [{match: {name: a}}]}", "1:18: policy.rules[0]: changes nothing; set action or grace"),
        ("policy: {exempt: [{kind: leaked}]}", "1:26: policy.exempt[0].kind: leaked is not known; did you mean leaked-shim?"),
        ("policy: {exempt: [{name: [a]}]}", "1:26: policy.exempt[0].name: is a list; write one value"),
        (
            "policy: {exempt: [{container_id: ab12cd34ef56}]}",
            "1:34: policy.exempt[0].container_id: ab12cd34ef56 is a short id and would fit no container; write ab12cd34ef56*",
        ),
        # windows
        ("policy: {windows: [Fri-Foo]}", f'1:20: policy.windows[0]: "Foo" is not a day (Mon, Tue, Wed, Thu, Fri, Sat, Sun); {WINDOW}'),
        ("policy: {windows: [25:00-26:00]}", f'1:20: policy.windows[0]: "25:00" is not a time of day; {WINDOW}'),
        ("policy: {windows: [Mon 9-17]}", f'1:20: policy.windows[0]: "9-17" is not a span of hours; {WINDOW}'),
        ("policy: {windows: [09:00-09:00]}", f"1:20: policy.windows[0]: start and end are the same; {WINDOW}"),
        ("policy: {windows: [Mon 09:00-17:00 UTC]}", f"1:20: policy.windows[0]: Mon 09:00-17:00 UTC is not a window; {WINDOW}"),
        # engines
        ("docker: true", "1:9: docker: is true; write auto, false, or a mapping: {socket: /run/…}"),
        ("docker: {containerd: /run/c.sock}", "1:9: docker: socket is missing; write socket: …"),
        ("docker: {socket: tcp://1.2.3.4:2375}", "1:18: docker.socket: tcp:// is not supported; only engines of this node are watched: unix:///PATH"),
        ("docker: {socket: docker.sock}", "1:18: docker.socket: docker.sock is not the path of a socket; write /run/… or unix:///run/…"),
        (f"docker: {{socket: /{'a' * 107}}}", "1:18: docker.socket: a socket's path of more than 107 bytes can't be connected to; write a shorter one"),
        ("containerd: [{address: /a}, {address: /a}]", "1:13: containerd: two entries have the same address; keep one"),
        ("docker: {socket: /a, data_root: var/lib}", "1:33: docker.data_root: var/lib is not an absolute path; write it from /"),
        # alerts
        ("alerts: {command: mail -s x}", "1:19: alerts.command: is one value, not a list; no shell reads it: write a list: [/usr/local/bin/page, --team, nodes]"),
        ("alerts: {command: [page]}", "1:20: alerts.command: page is not an absolute path; write the program from /"),
        ("alerts: {command: [/bin/page, [x]]}", "1:31: alerts.command: word 2 is a list; write one value"),
        ("alerts: {webhook: ftp://x/y}", "1:19: alerts.webhook: a URL with ftp: is not supported; write https://HOST/PATH"),
        ("alerts: {webhook: example.com/hook}", "1:19: alerts.webhook: a URL with no scheme is not supported; write https://HOST/PATH"),
        ("alerts: {webhook: 'https://'}", "1:19: alerts.webhook: the URL names no usable host and port; write https://HOST/PATH"),
        ("alerts: {webhook: 'https://x:99999/'}", "1:19: alerts.webhook: is not a URL; write https://HOST/PATH"),
        ("alerts: {webhook: 'https://x/a b'}", "1:19: alerts.webhook: the URL holds a blank or a character that must be written as %XX; encode it"),
        # not YAML, or more YAML than there is use for
        ("policy:\n\taction: log", "2:1: a tab where a value or key begins; indent with spaces"),
        ("policy: {action: log", "1:21: a bracket or brace that is never closed, or a missing comma; close it"),
        ("policy: action: log", "1:15: a colon that can't be here; check the indentation and the line before, or put the value in quotes"),
        ('policy: "log', "1:13: a quote that is never closed; close it"),
        ("policy\nkill: {}", "2:5: a colon that can't be here; check the indentation and the line before, or put the value in quotes"),
        ("a: 1\nkill\n", "3:1: a key without a colon; write key: value"),
        ("kill: {}\n---\nscan: {}", "2:1: a second document (---); keep one document in a file"),
        ("- policy", "1:1: the file holds a list, not keys with values; start with, say, policy:"),
        ("policy", "1:1: the file holds policy, not keys with values; start with, say, policy:"),
        ("kill: &a {}\nscan: *a", "2:7: alias *a is not supported; write the value out"),
        ("kill: {<<: {cleanup: true}}", "1:8: kill: merge key << is not supported; write the keys out"),
        ("kill: !!python/object/apply:os.system {}", "1:7: kill: tag !!python/object/apply:os.system is not supported; remove it"),
        ("policy: {action: !kill log}", "1:18: policy.action: tag !kill is not supported; remove it"),
        (b"policy: {action: l\xf6g}", "1:19: byte 0xf6 is not UTF-8; save the file as UTF-8"),
        (b"kill: {}\nscan: \0", "2:7: character \\x00 is not allowed in YAML; remove it"),
        ("a: " + "[" * 30 + "]" * 30, "1:1: nested too deeply; 20 levels are the limit"),
        ("a: " + "[" * 5000, "1:1: nested too deeply; 20 levels are the limit"),
    ],
    ids=lambda text: str(text)[:40],
)  # fmt: skip
def test_each_mistake_is_told_with_its_place_and_how_to_mend_it(
    load: Any, tmp_path: Path, content: Any, message: str
) -> None:
    assert mistakes(load, tmp_path, content) == [f"a.yaml:{message}"]


def test_all_mistakes_of_all_files_are_told_at_once_in_order(load: Any, tmp_path: Path) -> None:
    told = mistakes(
        load,
        tmp_path,
        "scan: {interval: 5}\nkill: {cleanup: maybe, max_orphans: -1}\npolicy: {grace: 5s, actoin: log}\n",
        "policy: {action: log",
        "docker: {sockte: /run/docker.sock}\n",
    )
    assert [line.split(": ")[:2] for line in told] == [
        ["a.yaml:1:18", "scan.interval"],
        ["a.yaml:2:17", "kill.cleanup"],
        ["a.yaml:2:37", "kill.max_orphans"],
        ["a.yaml:3:17", "policy.grace"],
        ["a.yaml:3:21", "policy.actoin"],
        ["b.yaml:1:21", "a bracket or brace that is never closed, or a missing comma; close it"],
        ["c.yaml:1:9", "docker"],
        ["c.yaml:1:10", "docker.sockte"],
    ]


def test_a_thousand_mistakes_are_cut(load: Any, tmp_path: Path) -> None:
    told = mistakes(load, tmp_path, "".join(f"key{n}: 1\n" for n in range(1000)))
    assert len(told) == 51
    assert told[-1] == "and 950 more mistakes"


def test_a_webhook_with_a_password_is_never_printed(load: Any, tmp_path: Path) -> None:
    for url in ("ftp://me:hunter2@x/", "https://me:hunter2@/", "https://me:hunter2@x:0/", "hunter2://me@x"):
        told = mistakes(load, tmp_path, f"alerts: {{webhook: '{url}'}}")
        assert "me:" not in told[0]
        assert "hunter2@" not in told[0]
    assert "hunter2" not in mistakes(load, tmp_path, "alerts: https://me:hunter2@x/")[0]
    assert "hunter2" not in mistakes(load, tmp_path, "alerts: {command: 'curl -u me:hunter2 x'}")[0]


def test_what_each_key_becomes(load: Any) -> None:
    loaded = load(
        """
        policy:
          action: alert
          grace: 1h30m
          jitter: 0
          rules:
            - match: {kind: childless-shim, namespace: moby, container_id: "ab*", name: 123, image: "nginx*"}
              action: kill
              grace: 90s
            - {match: {pod: p, pod_namespace: yes, hostname: ""}, grace: 2m}
          exempt: [{image: "registry.example/agent*"}]
          windows: [Mon-Fri 09:00-17:00, 22:00-06:00, "sat,Sun", Fri-Mon 00:00-24:00]
        kill: {term_timeout: 500ms, max_orphans: 0, max_share: 12.5%, max_kills_per_hour: 3, cleanup: no}
        scan: {interval: 1m, sweep_interval: 1d, settle: 45s, timeout: 2s 500ms}
        docker: {socket: unix:///run/docker.sock, containerd: /run/c.sock, data_root: /srv/docker}
        containerd: [{address: /a.sock}, {address: unix:///b.sock}]
        journal: {enabled: off}
        alerts: {command: [/bin/page, -t, 1], webhook: "https://me:secret@alerts.example:8443/x?y=z", timeout: 3s}
        """
    )
    first, second = loaded.policy.rules
    assert first == settings.Rule(
        Match(kind=Kind.CHILDLESS_SHIM, namespace="moby", container_id="ab*", name="123", image="nginx*"),
        Action.KILL,
        90.0,
    )
    assert second == settings.Rule(Match(pod="p", pod_namespace="yes", hostname=""), None, 120.0)
    assert (loaded.policy.action, loaded.policy.grace, loaded.policy.jitter) == (Action.ALERT, 5400.0, 0.0)
    assert loaded.policy.exempt == (Match(image="registry.example/agent*"),)
    assert [(sorted(w.days), w.start, w.end) for w in loaded.policy.windows] == [
        ([0, 1, 2, 3, 4], 540, 1020),
        ([0, 1, 2, 3, 4, 5, 6], 1320, 360),
        ([5, 6], 0, 1440),
        ([0, 4, 5, 6], 0, 1440),
    ]
    assert loaded.kill == settings.Kill(0.5, 0, 0.125, 3, cleanup=False)
    assert loaded.scan == settings.Scan(60.0, 86400.0, 45.0, 2.5)
    assert loaded.docker == (DockerEngine("/run/docker.sock", "/run/c.sock", "/srv/docker"),)
    assert loaded.containerd == (ContainerdEngine("/a.sock"), ContainerdEngine("/b.sock"))
    assert loaded.journal == settings.Journal(enabled=False)
    assert loaded.alerts == settings.Alerts(
        ("/bin/page", "-t", "1"), "https://me:secret@alerts.example:8443/x?y=z", 3.0
    )


@pytest.mark.parametrize(
    ("content", "docker"),
    [("", None), ("docker: auto", None), ("docker:", None), ("docker: false", ()), ("docker: []", ())],
)
def test_engines_are_found_unless_the_admin_says_otherwise(load: Any, content: str, docker: Any) -> None:
    assert load(content).docker == docker


@pytest.mark.parametrize("content", ["", "# nothing\n", "---\n", "policy:\nkill:\n", "\ufeffpolicy: {}\n", "null"])
def test_a_file_that_says_nothing_means_the_defaults(load: Any, content: str) -> None:
    assert load(content) == Settings()


def test_a_short_grace_can_be_allowed(load: Any) -> None:
    loaded = load("kill: {allow_short_grace: true}", "policy: {action: kill, grace: 1s}\nscan: {settle: 0}")
    assert (loaded.policy.grace, loaded.scan.settle) == (1.0, 0.0)


def test_later_files_merge_mappings_and_replace_lists_and_values(load: Any) -> None:
    loaded = load(
        "policy: {action: log, grace: 5m, exempt: [{name: a}, {name: b}]}\nkill: {max_orphans: 1}\ndocker: {socket: /a}",
        "policy: {action: kill, exempt: [{name: c}]}\nkill:\ndocker: [{socket: /b}]",
        "policy: {grace: 10m}",
    )
    assert (loaded.policy.action, loaded.policy.grace) == (Action.KILL, 600.0)
    assert loaded.policy.exempt == (Match(name="c"),)
    assert loaded.kill.max_orphans == 1
    assert loaded.docker == (DockerEngine("/b"),)


def test_without_any_file_the_defaults_are_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "DEFAULT_FILE", tmp_path / "none.yaml")
    monkeypatch.setattr(config, "DEFAULT_DIR", tmp_path / "none.d")
    assert config.load() == Settings()


def test_the_default_places_are_read_in_the_order_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, directory = tmp_path / "orphand.yaml", tmp_path / "orphand.d"
    directory.mkdir()
    file.write_text("policy: {grace: 2m}\nkill: {max_orphans: 7}")
    (directory / "20-b.yaml").write_text("policy: {grace: 4m}")
    (directory / "10-a.yaml").write_text("policy: {grace: 3m}")
    (directory / ".30-hidden.yaml").write_text("nonsense")
    (directory / "README").write_text("nonsense")
    monkeypatch.setattr(config, "DEFAULT_FILE", file)
    monkeypatch.setattr(config, "DEFAULT_DIR", directory)
    loaded = config.load()
    assert (loaded.policy.grace, loaded.kill.max_orphans) == (240.0, 7)


def _refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load([path])
    return str(caught.value).replace(os.fspath(path), "FILE")


def test_only_a_regular_file_of_a_trusted_owner_is_read(tmp_path: Path) -> None:
    good, link, fifo = tmp_path / "good.yaml", tmp_path / "link.yaml", tmp_path / "fifo.yaml"
    good.write_text("policy: {}")
    link.symlink_to(good)
    os.mkfifo(fifo)
    assert (
        _refusal(tmp_path / "none")
        == "FILE: can't be read (No such file or directory); check the path and its permissions"
    )
    assert _refusal(link) == "FILE: is a symbolic link; put the file itself here"
    assert _refusal(tmp_path) == "FILE: is not a regular file; put a YAML file here"
    assert _refusal(fifo) == "FILE: is not a regular file; put a YAML file here"
    good.chmod(0o666)
    assert _refusal(good) == "FILE: can be written by everybody, who could change what is ended; chmod o-w it"
    good.write_text("#" + " " * (1 << 20))
    good.chmod(0o644)
    assert _refusal(good) == "FILE: is larger than 1 MiB; is it the right file?"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("policy: {}")
    os.chown(path, 12345, 0)
    assert _refusal(path) == "FILE: belongs to uid 12345, who could change what is ended; chown root it"


def test_a_file_that_would_not_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "10-policy.yml").write_text("policy: {action: kill}")
    problems = Problems()
    config.default_paths(tmp_path / "none.yaml", tmp_path, problems)
    assert problems.lines([]) == [
        f"{tmp_path}/10-policy.yml: would not be read; name it 10-policy.yaml, or move it away"
    ]


def _uncommented() -> str:
    return re.sub(r"(?m)^(\s*)#(?=[a-z_])", r"\1", PACKAGED.read_text())


def test_the_packaged_file_is_the_defaults_as_it_is_and_uncommented(load: Any) -> None:
    assert load(PACKAGED.read_text()) == Settings()
    assert load(_uncommented()) == Settings()


def _keys(section: type, prefix: str = "") -> list[str]:
    return [f"{prefix}{field.name}" for field in dataclasses.fields(section)]


def test_the_packaged_file_shows_each_key() -> None:
    import yaml

    shown = yaml.safe_load(_uncommented())
    assert sorted(shown) == sorted(_keys(Settings))
    for name, kind in (
        ("policy", settings.Policy),
        ("kill", settings.Kill),
        ("scan", settings.Scan),
        ("journal", settings.Journal),
        ("alerts", settings.Alerts),
    ):
        assert sorted(shown[name]) == sorted(_keys(kind)), name
    for kind in (settings.DockerEngine, settings.ContainerdEngine, settings.Match, settings.Rule):
        for key in _keys(kind):
            assert key in PACKAGED.read_text(), key


def test_the_manual_page_explains_each_key() -> None:
    page = (PACKAGED.parents[1] / "docs" / "man" / "orphand.yaml.5.scd").read_text()
    for name in ("policy", "kill", "scan", "journal", "alerts"):
        for key in config.SECTIONS[name]:
            assert f"*{name}.{key}*" in page, f"{name}.{key}"
    for key in (
        "docker",
        "containerd",
        *config.SECTIONS["docker"],
        *config.SECTIONS["containerd"],
        *config.MATCH,
        *config.RULE,
    ):
        assert f"*{key}*" in page, key


def test_each_setting_can_be_written() -> None:
    """A field of settings.py that config.py forgets would be an option that does nothing."""
    for name, kind in (
        ("policy", settings.Policy),
        ("kill", settings.Kill),
        ("scan", settings.Scan),
        ("docker", settings.DockerEngine),
        ("containerd", settings.ContainerdEngine),
        ("journal", settings.Journal),
        ("alerts", settings.Alerts),
    ):
        assert sorted(config.SECTIONS[name]) == sorted(_keys(kind)), name
    assert sorted(config.MATCH) == sorted(_keys(settings.Match))
    assert sorted(config.RULE) == sorted(_keys(settings.Rule))
    assert sorted(config.ROOT) == sorted(_keys(Settings))


def test_yaml_is_loaded_only_for_a_file(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from orphand import config; config.DEFAULT_FILE = Path('/none'); "
        "config.DEFAULT_DIR = Path('/none'); config.load(); assert 'yaml' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGED.parents[1])
