# SPDX-License-Identifier: Apache-2.0
"""One bounded question at a time to a Docker engine, through docker-py's transport.

docker-py's APIClient has a timeout for each read, follows redirects, unpacks whatever is sent and
reads ~/.docker/config.json. A witness needs the raw answer, a total deadline and a size limit, so
this talks through docker-py's UnixHTTPAdapter and a socket that enforces both.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, Optional

from orphand.authorities import peers

URL = "http+docker://localhost"  # what docker-py's adapter is mounted for
HEADERS = 1 << 18  # bytes allowed on top of an answer's limit
PIECE = 1 << 16
NO_LIMIT = 1 << 62

_importing = threading.Lock()


class Silence(Exception):
    """No answer that could be used, and why. `fatal`: asking on is no use."""

    def __init__(self, why: str, fatal: bool = False) -> None:
        super().__init__(why)
        self.fatal = fatal


@dataclass(frozen=True)
class Answer:
    """A whole HTTP answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON; Silence if it isn't."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            raise Silence(f"the answer ({self.status}) is not JSON") from None


class Client:
    """A client of the engine behind one socket. For one thread at a time.

    `timeout`: seconds for each question, from connecting to the last byte. `absence` says why nobody is there to be
    asked, or "". It is called right before connecting, which would start an engine whose socket systemd holds: since
    whoever asks has looked, modules may have been imported.
    """

    def __init__(self, path: str, timeout: float, absence: Callable[[], str] = lambda: "") -> None:
        self._path = path
        self._timeout = timeout
        self._absence = absence
        self._allowance = _Allowance()
        self._session: Any = None
        self._version = ""

    def get(self, path: str, limit: int, until: Optional[float] = None, versioned: bool = True) -> Answer:
        """Ask once. At most `limit` bytes, at most the timeout, and not beyond `until` (monotonic). Silence if not."""
        version = f"/v{self._negotiated(until)}" if versioned else ""
        return self._ask(version + path, limit, until)

    def close(self) -> None:
        """Close the connection; the next question opens a new one and negotiates anew."""
        self._version = ""
        self._drop()

    def stream(self, path: str) -> Iterator[bytes]:
        """The pieces of an answer that has no end, as they come; no deadline, `cut` ends it. Silence if it fails.

        The first piece is empty and says that the engine has taken the question.
        """
        version = f"/v{self._negotiated(None)}"
        self._allowance.set(float("inf"), NO_LIMIT)
        try:
            with self._session.get(URL + version + path, stream=True, allow_redirects=False, timeout=None) as response:
                if response.status_code != 200:
                    raise Silence(f"it answered {response.status_code}")
                yield b""
                yield from response.raw.stream(PIECE, decode_content=False)
        except Silence:
            raise
        except Exception as error:  # as in _ask; a stream that breaks off is not worth the parser's words
            silence = self._silence(error)
            raise silence if silence.fatal else Silence("the stream ended") from error
        finally:
            self.close()

    def cut(self) -> None:
        """End for good what another thread is waiting in: this client answers no more."""
        self._allowance.cut()

    @property
    def peer(self) -> int:
        """The pid of the process that called listen() on the socket that was last connected to; 0 if none was."""
        return self._allowance.peer

    @property
    def is_cut(self) -> bool:
        """Was it cut?"""
        return self._allowance.is_cut

    def _negotiated(self, until: Optional[float]) -> str:
        """The newest API version that docker-py and the engine know, or the engine's oldest (29 takes 1.44 up)."""
        if not self._version:
            answer = self._ask("/version", 1 << 20, until)
            versions = answer.json() if answer.status == 200 else None
            if not isinstance(versions, dict):
                raise Silence(f"it answered {answer.status} when asked for its version")
            self._version = choose_version(versions.get("ApiVersion"), versions.get("MinAPIVersion"), newest_known())
        return self._version

    def _ask(self, path: str, limit: int, until: Optional[float]) -> Answer:
        deadline = time.monotonic() + self._timeout
        self._allowance.set(min(deadline, until or deadline), limit + HEADERS)
        try:
            if self._session is None:
                self._session = _session(self._path, self._timeout, self._connected)
            return self._exchange(path, limit)
        except Silence:
            self._drop()
            raise
        except Exception as error:  # whatever the layers throw at a broken answer, it is no answer
            self._drop()
            raise self._silence(error) from error

    def _exchange(self, path: str, limit: int) -> Answer:
        response = self._session.get(URL + path, stream=True, allow_redirects=False, timeout=self._timeout)
        try:
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise Silence("the answer is compressed, which was not asked for")
            body = bytearray()
            while piece := response.raw.read(PIECE, decode_content=False):
                body += piece
                if len(body) > limit:
                    raise Silence(f"the answer is longer than {limit} bytes")
            length = response.headers.get("Content-Length", "")
            if length and length != str(len(body)):
                raise Silence(f"the answer ended after {len(body)} of {length[:20]} bytes")
            return Answer(response.status_code, response.headers, bytes(body))
        finally:
            response.close()

    def _connected(self) -> socket.socket:
        absence = self._absence()
        if absence:
            raise Silence(absence, fatal=True)
        connection = _BoundedSocket(self._allowance)
        try:
            connection.connect(self._path)
        except BaseException:
            connection.close()
            raise
        return connection

    def _drop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _silence(self, error: BaseException) -> Silence:
        """What the layers below requests and urllib3 say of it, as one sentence."""
        causes = list(chain(error))
        if any(isinstance(cause, socket.timeout) for cause in causes):
            return Silence(f"no whole answer within {self._timeout:g} s")
        for cause in causes:
            if isinstance(cause, (FileNotFoundError, ConnectionRefusedError, PermissionError)):
                return Silence(f"{cause.strerror}: {self._path}", fatal=True)
        if any(isinstance(cause, ConnectionError) for cause in causes):
            return Silence("it hung up without a whole answer")
        for cause in causes:
            if type(cause) is OSError or isinstance(cause, BlockingIOError):
                return Silence(str(cause))
        return Silence(f"its answer is not HTTP ({type(causes[0]).__name__})")


def chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and those it came from."""
    seen: set[int] = set()
    following: Optional[BaseException] = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


def choose_version(newest: object, oldest: object, known: str) -> str:
    """The API version to speak: what both know, else the engine's oldest. Silence if it names none."""
    try:
        server, floor = _numbers(newest), _numbers(oldest or "1.12")
    except (AttributeError, ValueError):
        raise Silence("it does not say which API versions it speaks") from None
    return "{}.{}".format(*max(min(server, _numbers(known)), floor))


def _numbers(version: Any) -> tuple[int, int]:
    major, minor = version.split(".")
    return int(major), int(minor)


def newest_known() -> str:
    """The newest API version that the installed docker-py was made for."""
    constants = _docker_py()[1]
    return str(constants.DEFAULT_DOCKER_API_VERSION)


class _Allowance:
    """How long and how much the present question may read."""

    def __init__(self) -> None:
        self._deadline = 0.0
        self._bytes = 0
        self.is_cut = False
        self.peer = 0
        self._socket: Optional[socket.socket] = None

    def set(self, deadline: float, size: int) -> None:
        """A new question."""
        self._deadline, self._bytes = deadline, size

    def opened(self, connection: socket.socket) -> None:
        """The socket that cut() ends. Raises OSError if it was called already."""
        self._socket = connection
        self.peer = peers.peer_of(connection)[0]
        if self.is_cut:
            raise OSError("cut")

    def cut(self) -> None:
        """Wake whoever reads, and let nobody read again."""
        self.is_cut = True
        if self._socket is not None:
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                return

    def time_left(self) -> Optional[float]:
        """Seconds, None for ever; raises socket.timeout when there are none."""
        if self._deadline == float("inf"):
            return None
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise socket.timeout("deadline")
        return left

    def spend(self, size: int) -> None:
        """Count what was read; raises OSError when it is too much."""
        self._bytes -= size
        if self._bytes < 0:
            raise OSError("the answer is too long")


class _BoundedSocket(socket.socket):
    """A Unix socket whose every read and write ends with the allowance, however slowly the bytes come."""

    def __init__(self, allowance: _Allowance) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self._allowance = allowance

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        self.settimeout(self._allowance.time_left())
        size = super().recv_into(*args, **kwargs)
        self._allowance.spend(size)
        return size

    def sendall(self, *args: Any, **kwargs: Any) -> None:
        self.settimeout(self._allowance.time_left())
        super().sendall(*args, **kwargs)

    def connect(self, address: Any) -> None:
        self.settimeout(self._allowance.time_left())
        super().connect(address)
        self._allowance.opened(self)


def _docker_py() -> tuple[Any, Any]:
    """(docker.transport.unixconn, docker.constants)."""
    with _importing:  # the looks' thread and that of the events
        return _lean_docker_py()


@lru_cache(maxsize=1)
def _lean_docker_py() -> tuple[Any, Any]:
    """docker-py's two modules without the rest.

    Its packages import all that they have: ssh, TLS, the swarm's models, and on Python before 3.12 distutils, which
    setuptools turns into itself. So they are stood in for while these two modules are imported: 2 MB, or 16.
    """
    real = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "docker"}
    try:
        for name in ("docker", "docker.transport"):
            sys.modules[name] = _hollow(name)
        unixconn = importlib.import_module("docker.transport.unixconn")
        return unixconn, importlib.import_module("docker.constants")
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] == "docker"]:
            del sys.modules[name]
        sys.modules.update(real)


def _hollow(name: str) -> ModuleType:
    """A package whose modules can be imported, but whose own code has not run. Raises ImportError."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ImportError(f"no module named {name}")
    package = ModuleType(name)
    package.__path__ = spec.submodule_search_locations or []
    return package


def _session(path: str, timeout: float, connected: Callable[[], socket.socket]) -> Any:
    """A requests session whose only way out is docker-py's adapter to the socket at `path`, by `connected`."""
    unixconn = _docker_py()[0]
    import requests

    class Connection(unixconn.UnixHTTPConnection):  # type: ignore[misc, name-defined]
        def connect(self) -> None:
            self.sock = connected()

    class Pool(unixconn.UnixHTTPConnectionPool):  # type: ignore[misc, name-defined]
        def _new_conn(self) -> Any:
            return Connection(URL, path, timeout)

    class Adapter(unixconn.UnixHTTPAdapter):  # type: ignore[misc, name-defined]
        def get_connection(self, url: str, proxies: Optional[Mapping[str, str]] = None) -> Any:
            return pool

        def close(self) -> None:
            pool.close()

    pool = Pool(URL, path, timeout, maxsize=1)
    session = requests.Session()
    session.trust_env = False  # no proxies, no .netrc
    session.adapters.clear()
    session.mount("http+docker://", Adapter("http+unix://" + path, timeout))
    session.headers["Accept-Encoding"] = "identity"
    return session
