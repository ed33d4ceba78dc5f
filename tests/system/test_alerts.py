# SPDX-License-Identifier: Apache-2.0
"""Alerts to real programs and real servers, the bad ones above all."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import os
import queue
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import pytest

from orphand import settings
from orphand.report.alerts import Alerts, Event
from orphand.report.delivery import Permanent, Undelivered, post, run
from orphand.report.topics import Topic

PATIENCE = 60.0
BODY = b'{"event": "orphan"}'


class Server(http.server.ThreadingHTTPServer):
    """Answers with `status`, and keeps what it was sent."""

    daemon_threads = True

    def __init__(self, status: int = 204, headers: Optional[dict[str, str]] = None, fail_first: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.headers, self.failing = status, headers or {}, fail_first
        self.requests: queue.Queue[tuple[str, dict[str, str], bytes]] = queue.Queue()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hook?token=SECRET"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.put((self.path, dict(self.headers), body))
        self.server.failing -= 1
        self.send_response(503 if self.server.failing >= 0 else self.server.answer)
        for name, text in self.server.headers.items():
            self.send_header(name, text)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        return


@contextlib.contextmanager
def serving(*args: Any, **kwargs: Any) -> Iterator[Server]:
    server = Server(*args, **kwargs)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def peer(talk: Callable[[socket.socket, threading.Event], None]) -> Iterator[str]:
    """A server of bare sockets for what no HTTP server does; the URL. `talk` runs for each connection."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        talk(connection, over)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            over.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(PATIENCE)


def test_a_document_is_posted_as_json() -> None:
    with serving() as server:
        post(server.url.replace("http://", "http://me:p%40ss@"), BODY, PATIENCE)
        path, headers, body = server.requests.get(timeout=PATIENCE)
    assert path == "/hook?token=SECRET"
    assert body == BODY
    assert headers["Content-Type"] == "application/json"
    assert headers["Host"] == server.url.split("/")[2]
    assert headers["User-Agent"].startswith("orphand/")
    assert base64.b64decode(headers["Authorization"].split()[1]) == b"me:p@ss"


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_a_receiver_in_trouble_is_tried_again(status: int) -> None:
    with serving(status) as server, pytest.raises(Undelivered) as caught:
        post(server.url, BODY, PATIENCE)
    assert not isinstance(caught.value, Permanent)
    assert str(caught.value) == f"http://127.0.0.1:{server.server_address[1]}/… answered with status {status}"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 413])
def test_a_refusal_is_final(status: int) -> None:
    with serving(status) as server, pytest.raises(Permanent, match=f"refused it with status {status}"):
        post(server.url, BODY, PATIENCE)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_said_without_secrets(status: int) -> None:
    with serving() as target, serving(status, {"Location": target.url}) as server:
        with pytest.raises(Permanent, match="which is not followed; write the final URL") as caught:
            post(server.url, BODY, PATIENCE)
        assert target.requests.empty()
    assert "SECRET" not in str(caught.value)


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(Undelivered, match="Connection refused"):
        post(f"http://127.0.0.1:{port}/", BODY, PATIENCE)


def test_a_name_that_does_not_resolve() -> None:
    with pytest.raises(Undelivered):
        post("http://receiver.invalid/", BODY, PATIENCE)


def hang(connection: socket.socket, over: threading.Event) -> None:
    over.wait(PATIENCE)


def drip(connection: socket.socket, over: threading.Event) -> None:
    """One byte at a time, each well within a socket's own timeout."""
    while not over.wait(0.05):
        connection.sendall(b"H")


@pytest.mark.parametrize("talk", [hang, drip])
def test_the_deadline_holds_however_the_receiver_delays(talk: Any) -> None:
    with peer(talk) as url, pytest.raises(Undelivered, match=r"no answer within 0\.5 s"):
        post(url, BODY, 0.5)


@pytest.mark.parametrize("talk", [hang, drip])
def test_the_deadline_holds_within_a_tls_handshake(talk: Any) -> None:
    with peer(talk) as url, pytest.raises(Undelivered):
        post(url.replace("http:", "https:"), BODY, 0.5)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 2x0 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 500,
        b"\xff" * 100_000,
    ],
)
def test_nonsense_is_no_delivery(answer: bytes) -> None:
    def talk(connection: socket.socket, over: threading.Event) -> None:
        connection.recv(65536)
        connection.sendall(answer)

    with peer(talk) as url, pytest.raises(Undelivered):
        post(url, BODY, PATIENCE)


def test_a_status_counts_although_the_rest_of_the_answer_never_comes() -> None:
    def talk(connection: socket.socket, over: threading.Event) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
        over.wait(PATIENCE)

    with peer(talk) as url:
        post(url, BODY, 1.0)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    both = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", both, "-out", f"{both}.crt"],
        check=True, capture_output=True, timeout=PATIENCE,
    )  # fmt: skip
    both.write_text(both.read_text() + Path(f"{both}.crt").read_text())
    return both


@contextlib.contextmanager
def serving_tls(certificate: Path) -> Iterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = Server.__new__(Server)
    http.server.ThreadingHTTPServer.__init__(server, ("127.0.0.1", 0), Handler)
    server.answer, server.headers, server.failing, server.requests = 204, {}, 0, queue.Queue()
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def test_https_is_verified(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_tls(certificate) as server:
        url = server.url.replace("http:", "https:")
        with pytest.raises(Undelivered, match="certificate verify failed"):
            post(url, BODY, PATIENCE)
        assert server.requests.empty()
        monkeypatch.setenv("SSL_CERT_FILE", f"{certificate}.crt")
        post(url, BODY, PATIENCE)
        assert server.requests.get(timeout=PATIENCE)[2] == BODY


def script(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "receiver"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return [os.fspath(path)]


def test_a_program_gets_the_document_and_nothing_of_our_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    out = tmp_path / "out"
    run([*script(tmp_path, f'cat >{out}; env >>{out}; pwd >>{out}; echo "$1" >>{out}'), "a b; id"], BODY, PATIENCE)
    body, *rest = out.read_text().replace("}", "}\n", 1).splitlines()
    assert body.encode() == BODY
    assert sorted(line.split("=")[0] for line in rest[:-2]) == ["LANG", "PATH", "PWD"]
    assert rest[-2:] == ["/", "a b; id"]


@pytest.mark.parametrize(
    ("text", "failure"),
    [("exit 3", "ended with status 3"), ("kill -9 $$", "ended by signal 9"), ("exec <&-; exit 0", "")],
)
def test_how_a_program_ends(tmp_path: Path, text: str, failure: str) -> None:
    large = b"x" * 1_000_000  # more than a pipe holds: a program that doesn't read must not block us
    if failure:
        with pytest.raises(Permanent, match=failure):
            run(script(tmp_path, text), large, PATIENCE)
    else:
        run(script(tmp_path, text), large, PATIENCE)


@pytest.mark.parametrize("argv", [["/nowhere/page"], ["/etc/passwd"], ["/"]])
def test_a_program_that_can_not_be_run(argv: list[str]) -> None:
    """It may be about to be installed, or there are no descriptors left: it has done nothing yet, so try again."""
    with pytest.raises(Undelivered, match="can't be run") as caught:
        run(argv, BODY, PATIENCE)
    assert not isinstance(caught.value, Permanent)


def test_a_program_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(Permanent, match=r"did not end within 1 s and was killed"):
            run(script(tmp_path, f"trap '' TERM\n(trap '' TERM; sleep 600) >{fifo} & wait"), BODY, 1.0)
        until = time.monotonic() + PATIENCE
        os.set_blocking(reader, True)
        assert os.read(reader, 1) == b"", "the end of file comes when the last child has gone"
        assert time.monotonic() < until
    finally:
        os.close(reader)


def test_a_program_that_never_reads_is_killed_at_the_deadline(tmp_path: Path) -> None:
    with pytest.raises(Permanent, match="did not end within"):
        run(script(tmp_path, "exec sleep 600"), b"x" * 1_000_000, 1.0)


class Ears:
    def __init__(self) -> None:
        self.records: queue.Queue[str] = queue.Queue()

    def __call__(self, topic: Topic, message: str, case: Any = None, **fields: str) -> None:
        assert topic is Topic.ALERT_FAILED
        self.records.put(message)


def test_both_ways_get_each_alert_and_one_that_hangs_does_not_hold_up_the_other(tmp_path: Path) -> None:
    ears = Ears()
    with serving(fail_first=1) as server:
        hanging = script(tmp_path, f"echo $$ >{tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; exec sleep 600")
        options = settings.Alerts(tuple(hanging), server.url, 600.0)
        alerts = Alerts(options, ears, "node7")
        alerts.send(Event.BREAKER, "many")
        bodies = [json.loads(server.requests.get(timeout=PATIENCE)[2]) for _ in range(2)]
        assert bodies[0] == bodies[1], "the second try"
        until = time.monotonic() + PATIENCE
        while not (tmp_path / "pid").exists() and time.monotonic() < until:
            time.sleep(0.01)
        alerts.close(0.1)
    heard = [ears.records.get(timeout=PATIENCE) for _ in range(2)]
    assert "answered with status 503; trying again for 10 min" in heard[0]
    assert heard[1].startswith("alerts.command: 1 alerts were not delivered before orphand stopped")
    assert alerts.sent == frozenset()
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
