# SPDX-License-Identifier: Apache-2.0
"""Delivering one document, once: to a program's stdin, or by POST. Each takes at most its deadline."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Optional

from orphand import __version__
from orphand.masking import masked

if TYPE_CHECKING:
    import http.client
    import socket

ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
RETRIED = frozenset({408, 429})  # of the 4xx: the receiver asks for another try
ANSWER_LIMIT = 512  # bytes read of an answer


class Undelivered(Exception):
    """It did not arrive; another try may help."""


class Permanent(Undelivered):
    """It did not arrive, and would not on another try."""


def run(argv: Sequence[str], body: bytes, deadline: float) -> None:
    """Run a program with the document on its stdin; exit status 0 means delivered.

    No shell, a small fixed environment, / as directory, a process group of its own that is killed at the
    deadline (seconds). What it writes goes to our stderr: under systemd, the journal. A failure is Permanent,
    since a program that paged somebody and then failed must not page again, unless it could not even be started.
    """
    try:
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.PIPE,
            stdout=2,
            env=ENVIRONMENT,
            cwd="/",
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise Undelivered(f"{argv[0]} can't be run ({error})") from error
    try:
        process.communicate(body, timeout=deadline)
    except subprocess.TimeoutExpired:
        raise Permanent(f"{argv[0]} did not end within {deadline:g} s and was killed") from None
    except OSError as error:
        raise Permanent(f"{argv[0]} could not be given the document ({error})") from error
    finally:
        if process.returncode is None:
            _kill_group(process)
    if process.returncode:
        raise Permanent(f"{argv[0]} {_ending(process.returncode)}")


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    # Not reaped yet, so its pid, which names the group, can't belong to anybody else
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()


def _ending(status: int) -> str:
    return f"ended by signal {-status}" if status < 0 else f"ended with status {status}"


def shown(url: str) -> str:
    """The URL for a record, without what may be secret: user, password, path and query."""
    parts = urllib.parse.urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{masked(parts.hostname or '')}{port}/…"


def post(url: str, body: bytes, deadline: float) -> None:
    """POST the document; any 2xx means delivered.

    `deadline`: seconds for all of it, connecting included, however slowly the receiver drips; only the name's
    resolution is the resolver's own affair. Certificates are verified. A redirect is not followed, and
    no proxy is used. 4xx other than 408 and 429, and redirects, are Permanent.
    """
    import http.client  # with ssl below it: 10 MB that only a webhook needs

    until = time.monotonic() + deadline
    try:
        with _connected(url, until) as connection:
            _request(connection, url, body)
            response = connection.getresponse()
            with contextlib.suppress(OSError, http.client.HTTPException):
                response.read(ANSWER_LIMIT)  # so that closing does not reset a receiver that still writes
    except (OSError, http.client.HTTPException, ValueError, RuntimeError) as error:  # RuntimeError: no more threads
        late = time.monotonic() >= until
        reason = f"no answer within {deadline:g} s" if late else masked(str(error) or type(error).__name__)
        raise Undelivered(f"{shown(url)}: {reason}") from error
    _check(response.status, response.getheader("Location"), url)


def _check(status: int, location: Optional[str], url: str) -> None:
    if 200 <= status < 300:
        return
    if 300 <= status < 400:
        to = f" to {shown(urllib.parse.urljoin(url, location))}" if location else ""
        raise Permanent(f"{shown(url)} redirects{to} ({status}), which is not followed; write the final URL")
    if 400 <= status < 500 and status not in RETRIED:
        raise Permanent(f"{shown(url)} refused it with status {status}")
    raise Undelivered(f"{shown(url)} answered with status {status}")


@contextlib.contextmanager
def _connected(url: str, until: float) -> Iterator[http.client.HTTPConnection]:
    """A connection that is cut at `until`: a socket's own timeout starts anew with each byte that drips in."""
    import http.client
    import socket

    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    connection = http.client.HTTPConnection(host, port)
    with socket.create_connection((host, port), timeout=_remaining(until)) as raw, _cut_at(until, raw):
        try:
            connection.sock = _secured(raw, host) if parts.scheme == "https" else raw
            yield connection
        finally:
            connection.close()


def _remaining(until: float) -> float:
    return max(0.01, until - time.monotonic())


@contextlib.contextmanager
def _cut_at(until: float, raw: socket.socket) -> Iterator[None]:
    import socket

    def cut() -> None:
        with contextlib.suppress(OSError):
            duplicate.shutdown(socket.SHUT_RDWR)

    # A duplicate, since TLS takes the socket's own descriptor away
    with raw.dup() as duplicate:
        timer = threading.Timer(_remaining(until), cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()


def _secured(raw: socket.socket, host: str) -> socket.socket:
    import ssl

    return ssl.create_default_context().wrap_socket(raw, server_hostname=host)


def _request(connection: http.client.HTTPConnection, url: str, body: bytes) -> None:
    parts = urllib.parse.urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = {
        "Host": parts.netloc.rpartition("@")[2],
        "Content-Type": "application/json",
        "User-Agent": f"orphand/{__version__}",
        "Connection": "close",
    }
    if parts.username is not None:
        login = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
    connection.request("POST", target, body, headers)
