# SPDX-License-Identifier: Apache-2.0
"""The commands. Exit status: 0 nothing found, 1 orphans, 2 undecided, 3 error; 64 wrong usage, 78 bad configuration."""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import pwd
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, Optional

from orphand import __version__
from orphand.errors import ConfigError, OrphandError
from orphand.loop import asyncio
from orphand.masking import masked
from orphand.model import SUSPECTS, Case, Outcome, Survey, Verdict
from orphand.settings import Settings

OK, ORPHANS, UNDECIDED, ERROR, EX_USAGE, EX_CONFIG = 0, 1, 2, 3, 64, 78
WATCH_SECONDS = 2.0
MAX_PID_DIGITS = 7  # 4194304 (proc(5), pid_max)


class Parser(argparse.ArgumentParser):
    """Wrong usage ends with 64 (EX_USAGE of sysexits.h), as orphand(8) says."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EX_USAGE, f"{self.prog}: {message}\n")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command; returns its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that isn't UTF-8 shows escapes, not a traceback
            stream.reconfigure(errors="backslashreplace")
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EX_CONFIG
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except KeyboardInterrupt:
        return 130
    except (OrphandError, OSError) as error:
        print(f"orphand: {masked(str(error), 4096)}", file=sys.stderr)
        return ERROR


def _parser() -> Parser:
    parser = Parser(
        prog="orphand",
        description="Finds containers that nobody manages any more, says why, and ends them safely.",
        epilog="Exit status: 0 nothing found, 1 orphans, 2 undecided, 3 error, 64 wrong usage, 78 bad configuration. "
        "See orphand(8) and orphand.yaml(5).",
    )
    parser.add_argument("--version", action="version", version=f"orphand {__version__}")
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="read FILE instead of /etc/orphand.yaml and /etc/orphand.d/*.yaml",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    _add(commands, "daemon", _daemon, "watch this node and apply the policy (what the service runs)", json_too=False)
    scan = _add(commands, "scan", _scan, "look once: every container with its verdict and the reason")
    scan.add_argument("--watch", action="store_true", help="look again every two seconds, until Ctrl-C")
    explain = _add(commands, "explain", _explain, "the evidence about one container, and what ending it would do")
    explain.add_argument("target", metavar="ID|PID", help="a container id (shortened if unique), or a pid of its")
    reap = _add(commands, "reap", _reap, "end one orphan by hand: the same rules, without the grace")
    reap.add_argument("target", metavar="ID|PID", help="a container id (shortened if unique), or a pid of its")
    reap.add_argument("--yes", action="store_true", help="don't ask for confirmation")
    hold = _add(commands, "hold", _hold, "kill nothing for now: kills become log lines", json_too=False)
    hold.add_argument("--for", dest="duration", metavar="TIME", type=_seconds, help="such as 2h or 30m; else for good")
    hold.add_argument("reason", metavar="REASON", nargs="*", help="said in the journal and in `orphand status`")
    _add(commands, "resume", _resume, "end a hold", json_too=False)
    _add(commands, "status", _status, "what the running daemon saw last")
    history = _add(commands, "history", _history, "what orphand found and did, from the journal")
    history.add_argument("--since", metavar="TIME", type=_moment, help="YYYY-MM-DD [HH:MM], or such as 2h ago: 2h")
    history.add_argument("-n", "--lines", metavar="N", type=_count, help="only the last N records")
    check = _add(commands, "check-config", _check_config, "name every mistake in the configuration", json_too=False)
    check.add_argument("file", metavar="FILE", nargs="*", type=Path, help="check these files together instead")
    return parser


def _add(commands: Any, name: str, run: Any, text: str, json_too: bool = True) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    if json_too:
        parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not text or not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90s, 30m, 2h or 1h30m")
    days, hours, minutes, seconds = (int(group or 0) for group in match.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not 0 < total <= 366 * 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not between one second and a year")
    return float(total)


def _moment(text: str) -> datetime.datetime:
    for form in ("%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M", "%Y-%m-%d"):
        try:
            return datetime.datetime.strptime(text, form).astimezone()
        except ValueError:
            continue
    return datetime.datetime.now().astimezone() - datetime.timedelta(seconds=_seconds(text))


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


# Looking


class Eyes:
    """What the commands look with: the same parts as the daemon's."""

    def __init__(self, settings: Settings) -> None:
        from orphand.authorities.bench import Bench
        from orphand.identity import identify
        from orphand.scan import Scanner
        from orphand.sightings import Looker

        self.bench = Bench(settings)
        self.scanner = Scanner(Looker(), self.bench, lambda s: identify(s, self.bench.data_roots()))
        self._settings = settings

    def look(self) -> Survey:
        """A full sweep, each case with the admin's exemptions."""
        from orphand import policy

        survey = self.scanner.look(full=True, everybody=True)
        cases = [replace(c, judgement=policy.exempted(c, self._settings.policy)) for c in survey.cases]
        cases = _with_daemons_word(cases, self._settings.scan.max_gap)
        return replace(survey, cases=tuple(sorted(cases, key=lambda c: c.sighting.key)))

    def close(self) -> None:
        """Close every connection."""
        self.bench.close()


def _with_daemons_word(cases: Sequence[Case], max_gap: float) -> list[Case]:
    """Those that the daemon has found orphaned for the whole grace, and that still look so, are orphans here too.

    Its word counts for `max_gap` seconds, as its own looks do.
    """
    from orphand.report.forms import found_key, orphans_since
    from orphand.state import RUNTIME_DIR, StateError, read_json

    try:
        status = read_json(RUNTIME_DIR / "status.json")
        fresh = abs(time.time() - status["looked_at"]) <= max_gap
        since = orphans_since(status) if fresh else {}
    except (StateError, LookupError, TypeError, ValueError, OverflowError, RecursionError):
        return list(cases)  # there is none, or it is another version's
    return [
        replace(c, judgement=replace(c.judgement, verdict=Verdict.ORPHAN, since=since[found_key(c)]))
        if c.judgement.verdict is Verdict.PENDING and found_key(c) in since
        else c
        for c in cases
    ]


def _settings(arguments: argparse.Namespace) -> Settings:
    from orphand import config

    return config.load([arguments.config] if arguments.config else None)


def _say_blind(survey: Survey) -> None:
    for what in survey.blind:
        print(f"orphand: {masked(what, 1024)}", file=sys.stderr)


def _status_of(cases: Sequence[Case]) -> int:
    verdicts = {case.judgement.verdict for case in cases}
    if verdicts & SUSPECTS:
        return ORPHANS
    return UNDECIDED if Verdict.UNDECIDED in verdicts else OK


def _colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _scan(arguments: argparse.Namespace) -> int:
    eyes = Eyes(_settings(arguments))
    try:
        while True:
            survey = eyes.look()
            if arguments.watch and sys.stdout.isatty() and not arguments.json:
                print("\x1b[H\x1b[2J", end="")
            _print_survey(survey, arguments.json)
            _say_blind(survey)
            if not arguments.watch:
                return _status_of(survey.cases)
            time.sleep(WATCH_SECONDS)
    finally:
        eyes.close()


def _print_survey(survey: Survey, as_json: bool) -> None:
    from orphand.report import screen
    from orphand.report.forms import case_form

    if as_json:
        print(json.dumps({"containers": [case_form(c) for c in survey.cases], "blind": list(survey.blind)}), flush=True)
        return
    width = shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 0
    print(screen.table(survey.cases, width, _colour()), flush=True)


def _find(cases: Sequence[Case], target: str) -> list[Case]:
    """The cases that an id, a unique start of one, or a pid names. Raises OrphandError with what to do."""
    found = [c for c in cases if c.sighting.container_id == target]
    number = target.isascii() and target.isdigit()
    if not found and number:
        found = _by_pid(cases, int(target))
    if not found and not (number and len(target) <= MAX_PID_DIGITS):  # a pid that has ended is not the start of an id
        found = [c for c in cases if c.sighting.container_id.startswith(target)]
    ids = {c.sighting.container_id for c in found}
    if not ids:
        raise OrphandError(f"no container with the id or pid {target!r} was seen; `orphand scan` lists all")
    if len(ids) > 1:
        raise OrphandError(f"{target!r} is not unique: {', '.join(sorted(i[:20] for i in ids))}")
    return found


def _by_pid(cases: Sequence[Case], pid: int) -> list[Case]:
    from orphand import proc
    from orphand.cgroupfs import own_part

    named = [c for c in cases if pid in {p.pid for p in c.sighting.processes}]
    if named:
        return named
    try:
        cgroup = proc.cgroup_of(pid)
    except OrphandError:
        return []
    return [c for c in cases if own_part(cgroup, c.sighting.container_id)]


def _explain(arguments: argparse.Namespace) -> int:
    from orphand.reaper import plan
    from orphand.report import screen
    from orphand.report.forms import case_form

    settings = _settings(arguments)
    eyes = Eyes(settings)
    try:
        survey = eyes.look()
    finally:
        eyes.close()
    cases = _find(survey.cases, arguments.target)
    if arguments.json:
        print(json.dumps([{**case_form(c), "plan": plan(c, settings.kill)} for c in cases], indent=2))
    else:
        print("\n\n".join(screen.explanation(c, plan(c, settings.kill)) for c in cases))
    _say_blind(survey)
    return _status_of(cases)


# Ending by hand


def _reap(arguments: argparse.Namespace) -> int:
    from orphand.report import words
    from orphand.report.forms import outcome_form

    if os.geteuid() != 0:
        raise OrphandError("reap must be run as root")
    settings = _settings(arguments)
    _mind_the_hold(arguments.yes)
    eyes = Eyes(settings)
    try:
        case = _reapable(_find(eyes.look().cases, arguments.target))
        if not arguments.yes and not _confirmed(case, settings):
            print("nothing was done", file=sys.stderr)
            return ERROR
        outcome = asyncio.run(_end(eyes, case, settings))
    finally:
        eyes.close()
    if arguments.json:
        print(json.dumps(outcome_form(outcome)))
    else:
        print(words.ended_by_hand(case, outcome))
    return OK if outcome.complete else ERROR


def _mind_the_hold(unasked: bool) -> None:
    """A person may overrule a hold once it was pointed out; a script's --yes may not. Raises OrphandError."""
    from orphand.state import read_hold

    hold = read_hold()
    if hold and unasked:
        raise OrphandError(f"{hold.words()}: leave --yes out to overrule it, or end it by `orphand resume`")


def _reapable(cases: Sequence[Case]) -> Case:
    suspects = [c for c in cases if c.judgement.verdict in SUSPECTS]
    if not suspects:
        why = "; ".join(f"{c.judgement.verdict.value}: {c.judgement.reason}" for c in cases)
        raise OrphandError(f"not an orphan, nothing was done ({why})")
    if len(suspects) > 1:
        pids = ", ".join(str(p.pid) for c in suspects for p in c.sighting.processes[:1])
        raise OrphandError(f"several orphans have this id: name one by the pid of its shim ({pids})")
    if suspects[0].judgement.veto:
        raise OrphandError(f"looks orphaned, but must not be ended: {suspects[0].judgement.veto}")
    return suspects[0]


def _confirmed(case: Case, settings: Settings) -> bool:
    from orphand.reaper import plan
    from orphand.report import screen
    from orphand.state import RUNTIME_DIR, StateError, read_hold, read_json

    print(screen.explanation(case, plan(case, settings.kill)))
    hold = read_hold()
    if hold:
        print(f"\nMind: {hold.words()}.")
    try:
        breaker = read_json(RUNTIME_DIR / "status.json").get("breaker")
    except (StateError, AttributeError):
        breaker = ""
    if breaker:
        print(f"\nMind: the daemon's breaker is open: {masked(str(breaker), 1024)}.")
    if not sys.stdin.isatty():
        print("\nNobody can be asked here: say --yes to end it.", file=sys.stderr)
        return False
    return input("\nEnd it now? Type the first four characters of its id: ").strip() == case.sighting.container_id[:4]


async def _end(eyes: Eyes, case: Case, settings: Settings) -> Outcome:
    from orphand import judge, proc
    from orphand.estate import Estate
    from orphand.reaper import Reaper
    from orphand.report.journal import JournalReport
    from orphand.report.topics import Topic
    from orphand.state import RUNTIME_DIR, locked

    async def again(asked: Case) -> Optional[Case]:
        return await asyncio.to_thread(eyes.scanner.again, asked)

    async def denied(estate: Estate) -> str:
        sighting = estate.sighting(proc.now())
        judgement = judge.conclude(sighting, await asyncio.to_thread(eyes.scanner.hear, sighting))
        return judgement.veto if judgement.verdict is Verdict.PENDING else judgement.reason

    report = JournalReport()
    reaper = Reaper(settings.kill, eyes.bench.containerd, report, lambda _: None, lambda _: None)
    with locked(RUNTIME_DIR / "reap.lock") as free:
        if not free:
            raise OrphandError(
                "another end is under way (the daemon's, or another `orphand reap`): try again in a minute"
            )
        report(Topic.ENDING, f"`orphand reap` by {_who()}", case)
        outcome = await reaper.end(case, again, denied)
    topic = Topic.END_REFUSED if outcome.refused else Topic.ENDED if outcome.complete else Topic.END_FAILED
    from orphand.report import words

    report(topic, words.ended_by_hand(case, outcome), case)
    return outcome


def _who() -> str:
    uid = int(os.environ.get("SUDO_UID") or os.getuid()) if (os.environ.get("SUDO_UID") or "0").isdigit() else 0
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _hold(arguments: argparse.Namespace) -> int:
    from orphand.state import Hold, write_hold

    until = time.time() + arguments.duration if arguments.duration else None
    hold = Hold(masked(" ".join(arguments.reason), 200), until, _who())
    write_hold(hold)
    print(hold.words())
    return OK


def _resume(_: argparse.Namespace) -> int:
    from orphand.state import read_hold, write_hold

    print("the hold is ended" if read_hold() else "there was no hold")
    write_hold(None)
    return OK


# Reading


def _status(arguments: argparse.Namespace) -> int:
    from orphand.report import screen
    from orphand.state import RUNTIME_DIR, StateError, read_hold, read_json

    try:
        data = read_json(RUNTIME_DIR / "status.json")
    except StateError as error:
        raise OrphandError(f"no news from the daemon ({error}): see `systemctl status orphand`") from error
    hold = read_hold()
    data["hold"] = hold.words() if hold else ""
    print(json.dumps(data) if arguments.json else screen.status(data, time.time()))
    counts = data["counts"]
    return ORPHANS if counts["orphan"] or counts["pending"] else UNDECIDED if counts["undecided"] else OK


def _history(arguments: argparse.Namespace) -> int:
    from orphand.report import history

    records = list(history.read(arguments.since))
    for record in records[-arguments.lines :] if arguments.lines else records:
        if arguments.json:
            print(json.dumps(record))
        else:
            print(f"{record['time']}  {record['event']:<16} {masked(record['message'], 2000)}")
    return OK


def _check_config(arguments: argparse.Namespace) -> int:
    from orphand import config

    files = arguments.file or ([arguments.config] if arguments.config else None)
    settings = config.load(files)
    print(f"no mistakes; the default action is {settings.policy.action.value}")
    return OK


def _daemon(arguments: argparse.Namespace) -> int:
    from orphand.daemon import Daemon
    from orphand.report.journal import JournalReport

    return asyncio.run(Daemon(JournalReport(), [arguments.config] if arguments.config else None).run())
