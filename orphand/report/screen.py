# SPDX-License-Identifier: Apache-2.0
"""What the commands print: the table of all containers, and the explanation of one. Pure."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from orphand.masking import ELLIPSIS, masked, short_id
from orphand.model import SUSPECTS, Case, Shim, Testimony, Verdict
from orphand.report.words import ORDER, claim_words, span

HEADINGS = ("CONTAINER", "NAMESPACE", "VERDICT", "NAME", "IMAGE", "SHIM", "REASON")
WIDEST = (14, 16, 26, 32, 36, 8)  # columns' limits where the table has to fit; the reason gets the rest
REASON_LEAST = 24
STALE_SECONDS = 180.0
COLOURS = {
    Verdict.ORPHAN: "\x1b[1;31m",
    Verdict.PENDING: "\x1b[33m",
    Verdict.UNDECIDED: "\x1b[35m",
    Verdict.MANAGED: "\x1b[32m",
}
RESET = "\x1b[0m"
SOCKETS = {True: "holds the one that clients reach", False: "does not hold the one that clients reach", None: ""}
RULES = {
    Verdict.MANAGED: "one authority that knows a container is enough: it is never touched",
    Verdict.PENDING: "everybody who could own it said no, but not yet in every look for the whole grace",
    Verdict.ORPHAN: "everybody who could own it said no, after the sighting, in every look for the whole grace",
    Verdict.UNDECIDED: "somebody who could own it could not be asked: nothing is concluded, nothing is ended",
    Verdict.FOREIGN: "it belongs to an engine that is not this node's: not judged",
    Verdict.EXEMPT: "it looks orphaned, and a rule of the admin's says to leave it alone",
}


def table(cases: Sequence[Case], width: int, colour: bool) -> str:
    """Every container in a row, orphans first. `width`: columns of the terminal, 0 for no limit."""
    rows = [_row(case) for case in sorted(cases, key=_rank)]
    widths = [max(len(HEADINGS[i]), *(_wide(row[1][i]) for row in rows), 0) for i in range(len(HEADINGS))]
    if width:
        widths = _fitted(widths, width)
    lines = [_line(HEADINGS, widths)]
    for verdict, cells in rows:
        paint = COLOURS.get(verdict, "") if colour else ""
        lines.append(_line(cells, widths, paint))
    return "\n".join(lines)


def _rank(case: Case) -> tuple[int, str, str]:
    return (ORDER.index(case.judgement.verdict), case.sighting.namespace, case.sighting.container_id)


def _row(case: Case) -> tuple[Verdict, tuple[str, ...]]:
    sighting, judgement, identity = case.sighting, case.judgement, case.identity
    pod = f"{identity.pod_namespace}/{identity.pod}/" if identity.pod else ""
    verdict = judgement.verdict.value + (f" {judgement.kind.value}" if judgement.kind else "")
    cells = (
        short_id(sighting.container_id),
        sighting.namespace,
        verdict,
        pod + identity.name,
        identity.image,
        str(sighting.shim.process.pid) if sighting.shim else "",
        judgement.reason + (f"; but {judgement.veto}" if judgement.veto else ""),
    )
    return judgement.verdict, tuple(masked(cell, 512) or "-" for cell in cells)


def _fitted(widths: Sequence[int], width: int) -> list[int]:
    """The columns cut to their limits, names and images further where the reason would get too little."""
    fitted = [min(each, most) for each, most in zip(widths, WIDEST)]
    gaps = 2 * len(WIDEST)
    for column in (4, 3, 1):
        lack = sum(fitted) + gaps + REASON_LEAST - width
        fitted[column] = max(min(fitted[column], len(HEADINGS[column])), fitted[column] - max(lack, 0))
    return [*fitted, max(REASON_LEAST, width - sum(fitted) - gaps)]


def _line(cells: Sequence[str], widths: Sequence[int], paint: str = "") -> str:
    padded = [_fit(cell, wide) for cell, wide in zip(cells, widths)]
    if paint:
        padded[2] = f"{paint}{padded[2]}{RESET}"
    return "  ".join(padded).rstrip()


def _fit(cell: str, wide: int) -> str:
    if _wide(cell) > wide:
        kept, room = [], wide - 1
        for character in cell:
            room -= _wide(character)
            if room < 0:
                break
            kept.append(character)
        cell = "".join(kept) + ELLIPSIS
    return cell + " " * (wide - _wide(cell))


def _wide(text: str) -> int:
    """Columns on a terminal: East Asian wide characters take two, combining ones none."""
    if text.isascii():
        return len(text)
    return sum(_columns(character) for character in text)


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def explanation(case: Case, steps: Sequence[str]) -> str:
    """The evidence, witness by witness, and what ending it would do: `steps`, in order."""
    judgement = case.judgement
    kind = f", {judgement.kind.value}" if judgement.kind else ""
    lines = [
        f"{masked(case.sighting.container_id)}",
        *_pairs(
            ("verdict", judgement.verdict.value + kind),
            ("why", judgement.reason),
            ("rule", RULES[judgement.verdict]),
            ("but", f"not to be ended: {judgement.veto}" if judgement.veto else ""),
        ),
        *_block("who it was", _identity(case)),
        *_block("what /proc shows", _processes(case)),
        *_block("what the witnesses say", [_witness(t, case.sighting.seen_at) for t in case.testimonies]),
        *_block("what ending it would do", [f"{n}. {masked(step, 512)}" for n, step in enumerate(steps, 1)]),
    ]
    return "\n".join(lines)


def _pairs(*pairs: tuple[str, str]) -> list[str]:
    return [f"  {label:<12}{masked(text, 1024)}" for label, text in pairs if text]


def _block(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"{title}:", *(f"  {line.strip()}" for line in lines or ["nothing"])]


def _identity(case: Case) -> list[str]:
    who = case.identity
    return _pairs(
        ("name", who.name),
        ("image", who.image),
        ("pod", f"{who.pod_namespace}/{who.pod}" if who.pod else ""),
        ("hostname", who.hostname),
        ("command", who.command),
        ("started", who.started),
        *(("port", port) for port in who.ports),
        *(("mount", mount) for mount in who.mounts),
    )


def _processes(case: Case) -> list[str]:
    sighting = case.sighting
    shim = sighting.shim
    others = ", ".join(short_id(other) for other in sighting.siblings)
    return _pairs(
        ("shim", _shim(shim) if shim else "none"),
        *(("init", f"pid {i.process.pid}, cgroup {i.cgroup}") for i in sighting.inits),
        ("init", "" if sighting.inits else "none"),
        ("containerd", f"{sighting.address or 'unknown'}, namespace {sighting.namespace or 'unknown'}"),
        ("bundle", shim.bundle if shim else ""),
        ("serves too", others),
        ("socket", SOCKETS[sighting.owns_socket]),
        ("foreign", sighting.foreign),
        ("veto", sighting.veto if case.judgement.verdict in SUSPECTS else ""),
    )


def _shim(shim: Shim) -> str:
    return f"pid {shim.process.pid}, {shim.generation.value}, {shim.exe}, parent {shim.ppid}"


def _witness(testimony: Testimony, seen_at: float) -> str:
    age = testimony.asked_at - seen_at
    when = f"asked {span(age)} after the sighting" if age >= 0 else f"asked {span(-age)} before the sighting: too old"
    veto = f"; veto: {masked(testimony.veto)}" if testimony.veto else ""
    pid = f"; its record names pid {testimony.pid}" if testimony.pid else ""
    return f"{masked(testimony.authority)} ({testimony.role.value}): {claim_words(testimony)}{pid}{veto}; {when}"


def status(data: Mapping[str, Any], now: float) -> str:
    """`orphand status`, from what the daemon wrote at its last look. `now`: the wall clock, epoch seconds."""
    age = max(0.0, now - float(data["looked_at"]))
    lines = _pairs(
        ("last look", f"{span(age)} ago: {masked(str(data['status']), 400)}"),
        ("policy", f"{masked(str(data['policy']))}; {data['kills_left']} kills left in this hour"),
        ("hold", masked(str(data["hold"] or "none"), 400)),
        ("breaker", masked(str(data["breaker"] or "closed"), 400)),
        ("ends", f"{data['ends_in_progress']} in progress"),
    )
    lines += _pairs(
        *((masked(name).replace("_", " "), masked(_plain(each), 400)) for name, each in data["sources"].items())
    )
    for each in data["containers"]:
        decision = each.get("decision") or {}
        then = f" -> {decision['action']} ({decision['reason']})" if decision else ""
        kind = each.get("kind") or each["verdict"]
        lines.append(masked(f"{each['verdict']}: {short_id(each['container_id'])} {kind}: {each['reason']}{then}", 600))
    if age > STALE_SECONDS:
        lines.append(f"The daemon has not looked for {span(age)}: see `systemctl status orphand`.")
    return "\n".join(lines)


def _plain(state: Any) -> str:
    if isinstance(state, dict):
        return ", ".join(f"{value} ({name})" for name, value in state.items())
    return ", ".join(map(str, state)) if isinstance(state, list) else str(state)
