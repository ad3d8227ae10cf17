"""The live picture of the pools in a web browser: `shmpool serve`, `serve()`.

One process answers `http://host:port/` with a page (`index.html`, `style.css`, `page.js`, `plot.js`) that asks it once
a second for figures:

    GET /api/pools                              a row for each pool
    GET /api/pools/NAME?events=N                its newest figures, workers, connections, waiters; events from N on
    GET /api/pools/NAME/history?since=N         what is plotted, from point N on

The answers are those of a `Recorder`, as JSON. Nothing here changes a pool; names out of a request are looked up among
those that are known, and reach no file.

Who may read: whoever reaches the address, by default processes of this host. A page of another site may not: its
scripts cannot read the answers (no CORS headers), and a name of its own that it lets point here (DNS rebinding) is
refused by the Host header, which must be a loopback name, the `host` given, or the address that was connected to.

Not here: looking at pools and remembering (`recorder`), what the figures mean (`stats`).
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import re
import resource
import signal
import socket
import socketserver
import sys
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any, NamedTuple, cast
from urllib.parse import parse_qs, unquote

from ..errors import CannotListen
from ..inspector import pool_names
from .recorder import Recorder

__all__ = ["serve"]

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_SILENCE_S = 60.0  # a client that says nothing for so long is let go
_CONNECTIONS_MAX = 64  # of more, the one whose last request is longest ago
_ASSETS = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/plot.js": ("plot.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def serve(name: str | None = None, host: str = "127.0.0.1", port: int = 9465) -> None:
    """Show all pools of this user, or the one of that name, at `http://host:port/` until SIGINT or SIGTERM comes.

    Prints where it listens; port 0 is any free one. A pool need not be there yet, and may come and go. In the main
    thread only, since those two signals are taken from the process meanwhile. Raises a PoolError when it cannot listen
    there, or when no pool can be named so.
    """
    ends = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # all threads inherit it
    try:
        with _listening(Recorder(name), host, port) as server:
            _warn(server, name)
            address = f"[{host}]" if ":" in host else host
            print(f"listening on http://{address}:{server.server_port}/; Ctrl-C ends it", flush=True)
            signal.sigwait(ends)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _listening(recorder: Recorder, host: str, port: int) -> Iterator[_Server]:
    """A server that answers meanwhile, in threads of its own."""
    try:
        server = _Server(recorder, host, port)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CannotListen(host=host, port=port, reason=reason) from error
    thread = threading.Thread(target=server.serve_forever, name="shmpool-web", daemon=True)
    with server, recorder:
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def _warn(server: _Server, name: str | None) -> None:
    bound = str(server.server_address[0])
    if not ipaddress.ip_address(bound).is_loopback:
        print(
            f"shmpool: warning: whoever can reach {bound} port {server.server_port} can read the pools' names, "
            "targets, peers and errors; there is no password. Without --host only this host can",
            file=sys.stderr,
        )
    if name is not None and name not in pool_names():
        print(f"shmpool: there is no pool {name!r} of this user yet; it is shown when it comes", file=sys.stderr)


class _Answer(NamedTuple):
    status: HTTPStatus
    kind: str
    body: bytes


def _refusal(status: HTTPStatus, text: str) -> _Answer:
    return _Answer(status, "text/plain; charset=utf-8", f"{text}\n".encode())


class _Server(ThreadingHTTPServer):
    """Its threads end with the process, whatever their clients do. Clients that stay, silent or slow, make room for new
    ones, and leave descriptors to the recorder."""

    request_queue_size = _CONNECTIONS_MAX

    def __init__(self, recorder: Recorder, host: str, port: int) -> None:
        self.recorder, self.host = recorder, host
        self._connections: dict[socket.socket, None] = {}  # the one whose last request is longest ago is the first
        self._lock = threading.Lock()
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = _CONNECTIONS_MAX if limit == resource.RLIM_INFINITY else max(1, min(_CONNECTIONS_MAX, limit // 4))
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        package = resources.files(__name__)
        self.assets = {path: (package.joinpath(name).read_bytes(), kind) for path, (name, kind) in _ASSETS.items()}
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """Not HTTPServer's, which asks the resolver for the name of the address."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.host, self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        self.note(request, is_new=True)
        super().process_request(request, client_address)

    def note(self, connection: socket.socket, *, is_new: bool = False) -> None:
        """It is the last one to be let go now, and when it is one too many, another goes."""
        with self._lock:
            if is_new or connection in self._connections:
                self._connections.pop(connection, None)
                self._connections[connection] = None
            if len(self._connections) > self._most:
                silent = next(iter(self._connections))
                del self._connections[silent]
                with contextlib.suppress(OSError):  # its thread sees the end, and closes it
                    silent.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away in the middle is no error of ours."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer is one write: its end does not wait for the client's acknowledgement of its beginning
    timeout = _SILENCE_S

    def do_GET(self) -> None:
        self._served.note(self.connection)
        self._send(self._found())

    do_HEAD = do_GET  # noqa: N815 - as the base class looks for it

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses: methods that there are none of, and what is no HTTP. Nothing more is read."""
        self.close_connection = True
        if code == HTTPStatus.NOT_IMPLEMENTED:
            self._send(_refusal(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD: nothing can be changed here"))
        else:
            said = ": ".join(filter(None, (message, explain)))
            self._send(_refusal(HTTPStatus(code), said or HTTPStatus(code).phrase))

    def version_string(self) -> str:
        """What the answer says of who answers: no versions."""
        return "shmpool"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as the base class calls it
        """Requests are not logged."""

    @property
    def _served(self) -> _Server:
        return cast("_Server", self.server)

    def _found(self) -> _Answer:
        if not self._is_meant():
            text = "this host name is not served: open it by the address that `shmpool serve` prints"
            return _refusal(HTTPStatus.FORBIDDEN, text)
        path, _, query = self.path.partition("?")
        if path in self._served.assets:
            body, kind = self._served.assets[path]
            return _Answer(HTTPStatus.OK, kind, body)
        try:
            figures = self._figures(path, query)
        except ValueError as error:
            return _refusal(HTTPStatus.BAD_REQUEST, str(error))
        if figures is None:
            return _refusal(HTTPStatus.NOT_FOUND, "there is no such page, and no pool of such a name")
        return _Answer(HTTPStatus.OK, "application/json", json.dumps(figures, separators=(",", ":")).encode())

    def _figures(self, path: str, query: str) -> dict[str, object] | None:
        recorder = self._served.recorder
        if path == "/api/pools":
            return recorder.pools()
        found = re.fullmatch(r"/api/pools/([^/]+)(/history)?", path)
        if not found:
            return None
        name = unquote(found[1])
        if found[2]:
            return recorder.history(name, _number(query, "since"))
        return recorder.pool(name, _number(query, "events"))

    def _is_meant(self) -> bool:
        """Whether the client has connected to a name that is ours."""
        hosts = self.headers.get_all("Host", [])
        found = re.fullmatch(r"(?:\[([^]]*)\]|([^:]*))(?::[0-9]*)?", hosts[0]) if len(hosts) == 1 else None
        if not found:
            return False
        local = str(self.connection.getsockname()[0]).removeprefix("::ffff:")
        return (found[1] or found[2]).lower() in _LOOPBACK | {self._served.host.lower(), local}

    def _send(self, answer: _Answer) -> None:
        self.send_response(answer.status)
        headers = {**_HEADERS, "Content-Type": answer.kind, "Content-Length": str(len(answer.body))}
        if answer.status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = "GET, HEAD"
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)


def _number(query: str, name: str) -> int:
    """A number from 0 on out of a query, 0 when it is not there."""
    text = parse_qs(query, keep_blank_values=True).get(name, ["0"])[-1]
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise ValueError(f"{name}={text[:40]}: must be a whole number from 0 on")
    return int(text)
