"""A pool that listens: clients served by whichever worker is free, one request at a time.

The workers are forked processes that speak HTTP on the pool's connections (`speak_http`); the clients are plain sockets
where the test is about the pool, and http.client with keep-alive where it is about a server as a whole.
"""

from __future__ import annotations

import contextlib
import gc
import http.client
import logging
import math
import multiprocessing
import os
import random
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shmpool
from shmpool import ClosedConnection, InvalidConfig, Pool, PoolClosed, PooledConnection, PoolExhausted, PoolTimeout
from tests.processes import LONG, TIMEOUT_S, Child, Family, Latch, chance, descriptors, until
from tests.servers import has_ipv6

ROOT = Path(__file__).parent.parent
SOON_S = 0.05  # for what must not come


# ---- servers and clients ---------------------------------------------------------------------------------------------


@pytest.fixture
def listen() -> Iterator[Callable[..., Pool]]:
    """Make listening pools; at the end they are closed, and nothing may be out or left."""
    made: list[Pool] = []
    creator = os.getpid()

    def make(address: str = "tcp://127.0.0.1:0", **settings: Any) -> Pool:
        made.append(Pool.listen(address, **{"max_connections": 8, "get_timeout": TIMEOUT_S, **settings}))
        return made[-1]

    def epolls() -> int:
        return sum("[eventpoll]" in what for what in descriptors().values())

    before = epolls()
    yield make
    if os.getpid() != creator:
        return
    assert [pool.close() for pool in made] == [0] * len(made)
    for pool in made:
        stats = pool.stats()
        leaving = stats.connections["retiring"]  # in the hands of a process that gave its part back before it was done
        assert stats.open == leaving, stats.connections
        if not stats.recoveries:  # one that was killed may have counted what it did not come to, or the other way round
            assert stats.created == sum(stats.closed.values()) + leaving
    made.clear()
    gc.collect()
    assert epolls() == before


def connect(pool: Pool, say: bytes = b"") -> socket.socket:
    if isinstance(pool.address, str):
        client = socket.socket(socket.AF_UNIX)
        client.connect(pool.address)
    else:
        client = socket.create_connection(pool.address)
    client.settimeout(TIMEOUT_S)
    if say:
        client.sendall(say)
    return client


def echo(pool: Pool) -> bytes:
    """Lease the next connection and send back what is there."""
    with pool.get() as conn:
        said = conn.socket.recv(100)
        conn.socket.sendall(said)
        return said


def known(pool: Pool) -> socket.socket:
    """A client that the pool has accepted; it is idle."""
    client = connect(pool)
    with pool.get() as conn:
        assert conn.reuse_count == 0
    return client


def is_over(client: socket.socket, timeout_s: float = TIMEOUT_S) -> bool:
    """Whether the server has ended the connection."""
    client.settimeout(timeout_s)
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


def nobody(pool: Pool, timeout_s: float = SOON_S) -> bool:
    """Whether nobody comes and nobody speaks."""
    try:
        pool.get(timeout=timeout_s).release()
    except PoolTimeout:
        return True
    return False


def speak_http(pool: Pool, handle: Callable[[str, bytes], bytes]) -> None:
    """A worker: answers requests until the pool is closed. `handle(path, body)` makes the body of an answer."""
    while True:
        try:
            with pool.get(timeout=math.inf) as conn:
                if not _answer(conn.socket, handle):
                    conn.discard("the client has gone")
        except PoolClosed:
            pool.leave()
            return
        except OSError:  # it went in the middle; the connection has ended with the block
            continue


def _answer(sock: socket.socket, handle: Callable[[str, bytes], bytes]) -> bool:
    """One request, byte by byte at its head, so that nothing of the next one is taken. False: there was none."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)
        if not byte:
            return False
        head += byte
    lines = head.decode("latin-1").split("\r\n")
    sizes = [line.split(":")[1] for line in lines if line.lower().startswith("content-length:")]
    size = int(sizes[0]) if sizes else 0
    body = sock.recv(size, socket.MSG_WAITALL) if size else b""
    text = handle(lines[0].split(" ")[1], body)
    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text) + text)
    return True


def tell_pid(path: str, body: bytes) -> bytes:
    return f"{path} {body.decode()} {os.getpid()}".encode()


class Browser:
    """A client that keeps its connection open from request to request."""

    def __init__(self, pool: Pool) -> None:
        host, port = pool.address
        self.http = http.client.HTTPConnection(str(host), int(port), timeout=TIMEOUT_S)

    def ask(self, path: str, body: bytes | None = None) -> str:
        self.http.request("GET" if body is None else "POST", path, body)
        return self.http.getresponse().read().decode()

    def server(self) -> int:
        """The process that answers now."""
        return int(self.ask("/").split()[-1])

    def port(self) -> int:
        return int(self.http.sock.getsockname()[1])

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *unused: object) -> None:
        self.http.close()


# ---- one process -----------------------------------------------------------------------------------------------------


def test_a_client_is_leased_when_it_is_new_and_when_it_speaks(listen: Callable[..., Pool]) -> None:
    pool = listen()
    with pytest.raises(PoolExhausted, match="no client is new or has spoken"):
        pool.try_get()
    with connect(pool) as client:
        with pool.get() as conn:
            assert conn.peer == client.getsockname()
            assert (conn.protocol, conn.ip_version, conn.metadata, conn.reuse_count) == ("tcp", 4, b"", 0)
            assert conn.socket.getpeername() == client.getsockname()
            number = conn.id
        assert nobody(pool)
        client.sendall(b"hello")
        with pool.get() as conn:
            assert (conn.id, conn.reuse_count) == (number, 1)
            assert conn.socket.recv(100) == b"hello"
            assert conn.socket.gettimeout() == pool.config.socket_timeout
        client.sendall(b"try")
        until(lambda: pool.stats().idle == 1, "it is given back")
        with pool.try_get() as conn:
            assert conn.socket.recv(100) == b"try"
    assert nobody(pool)
    stats = pool.stats()
    assert (stats.created, stats.closed["broken"], stats.open) == (1, 1, 0)
    assert (stats.dials, stats.spoken, stats.successes, stats.exhausted, stats.timeouts) == (1, 2, 3, 1, 2)


def test_what_is_not_read_is_for_the_next(listen: Callable[..., Pool]) -> None:
    pool = listen()
    with connect(pool, b"onetwo") as client:
        for word in (b"one", b"two"):
            with pool.get() as conn:
                assert conn.socket.recv(3) == word
        client.sendall(b"x")
        with pool.get() as conn:
            client.sendall(b"y")  # while it is leased
            assert conn.socket.recv(1) == b"x"
        assert echo(pool) == b"y"


def test_a_last_request_and_the_end_at_once(listen: Callable[..., Pool]) -> None:
    pool = listen()
    with known(pool) as client:
        client.sendall(b"last words")
        client.shutdown(socket.SHUT_WR)
        assert echo(pool) == b"last words"
        assert nobody(pool)
        assert client.recv(100) == b"last words"
        assert is_over(client)
    assert pool.stats().closed["broken"] == 1


def test_a_reset_client_is_not_lent(listen: Callable[..., Pool]) -> None:
    pool = listen()
    client = known(pool)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    assert nobody(pool)
    assert pool.stats().closed["broken"] == 1


def test_a_client_that_went_before_it_was_accepted(listen: Callable[..., Pool]) -> None:
    pool = listen()
    for _ in range(3):
        client = connect(pool)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
    with connect(pool, b"here"):
        assert echo(pool) == b"here"
    stats = pool.stats()
    assert stats.dial_attempts == stats.created + stats.dial_failures


def test_a_lease_that_fails_ends_the_connection(listen: Callable[..., Pool]) -> None:
    pool = listen()
    with connect(pool) as one, connect(pool) as two:
        with contextlib.suppress(ZeroDivisionError), pool.get() as conn:
            raise ZeroDivisionError
        pool.get().discard()
        assert is_over(one)
        assert is_over(two)
    del conn
    assert pool.stats().closed["error"] == 2


def test_where_it_listens(listen: Callable[..., Pool], tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    pool = listen(f"unix://{path}")
    assert pool.address == path
    assert pool.stats().target == f"unix://{path}"
    with connect(pool, b"by a path"):
        with pool.get() as conn:
            assert (conn.protocol, conn.ip_version, conn.peer) == ("unix", None, "")
            assert conn.socket.recv(100) == b"by a path"
        with pytest.raises(OSError, match="in use"):
            Pool.listen(f"unix://{path}")
    pool.close()
    assert not Path(path).exists()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)  # whoever made this is gone, and left it behind
    assert listen(f"unix://{path}").address == path

    pool = listen()
    host, port = pool.address
    assert host == "127.0.0.1"
    assert f"at tcp://127.0.0.1:{port}" in repr(pool)
    with pytest.raises(OSError, match="in use"):
        Pool.listen(f"tcp://127.0.0.1:{port}")
    known(pool).close()
    pool.close()
    with pytest.raises(PoolClosed):
        _ = pool.address
    again = listen(f"tcp://localhost:{port}")
    assert again.address[1] == port


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this host")
def test_ipv6(listen: Callable[..., Pool]) -> None:
    pool = listen("tcp://[::1]:0")
    assert pool.stats().target == f"tcp://[::1]:{pool.address[1]}"
    with connect(pool) as client, pool.get() as conn:
        assert (conn.peer, conn.ip_version) == (client.getsockname()[:2], 6)


def test_what_cannot_listen() -> None:
    for wrong in ("udp://127.0.0.1:0", "tcp://127.0.0.1", "http://x:1"):
        with pytest.raises(InvalidConfig):
            Pool.listen(wrong)
    with pytest.raises(InvalidConfig):
        Pool.listen("tcp://127.0.0.1:0", min_connections=1)
    with pytest.raises(OSError, match="assign"):
        Pool.listen("tcp://192.0.2.1:0")
    with Pool(dial=socket.socket, min_connections=0) as pool, pytest.raises(RuntimeError, match="does not listen"):
        _ = pool.address


def test_options_of_accepted_sockets(listen: Callable[..., Pool]) -> None:
    pool = listen(tcp_nodelay=False, tcp_keepalive=(7, 8, 9), socket_timeout=3.5)
    with connect(pool), pool.get() as conn:
        sock = conn.socket
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 0
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 8
        assert sock.gettimeout() == 3.5
        assert not sock.get_inheritable()


def test_threads_of_one_process(listen: Callable[..., Pool]) -> None:
    pool = listen()
    threads = [threading.Thread(target=speak_http, args=(pool, tell_pid)) for _ in range(4)]
    for thread in threads:
        thread.start()
    browsers = [Browser(pool) for _ in range(6)]
    for turn in range(50):
        for place, browser in enumerate(browsers):
            assert browser.ask(f"/{place}/{turn}").startswith(f"/{place}/{turn} ")
    for browser in browsers:
        browser.http.close()
    pool.close(timeout=TIMEOUT_S)
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


def test_a_signal_handler_that_raises_loses_nothing(listen: Callable[..., Pool]) -> None:
    class Interrupt(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupt

    pool = listen()
    client = known(pool)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for turn in range(100):
            signal.setitimer(signal.ITIMER_REAL, 0.001 + turn / 50_000)
            with contextlib.suppress(Interrupt), pool.get(timeout=0.5) as conn:
                raise AssertionError(f"nobody spoke: {conn!r}")
    finally:
        signal.signal(signal.SIGALRM, before)
    client.sendall(b"still there")
    assert echo(pool) == b"still there"
    client.close()


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_no_more_clients_than_the_cap(listen: Callable[..., Pool]) -> None:
    pool = listen(max_connections=2)
    leases = []
    with connect(pool), connect(pool), connect(pool, b"third"):
        leases = [pool.get(), pool.get()]
        assert nobody(pool)
        assert pool.stats().open == 2
        leases[0].discard()
        assert echo(pool) == b"third"  # when another has gone
        leases[1].release()


def test_a_silent_client_makes_room_for_one_that_waits(listen: Callable[..., Pool]) -> None:
    pool = listen(max_connections=2)
    with known(pool) as first, known(pool) as second, connect(pool, b"third"):
        time.sleep(0.02)  # sleep: the clock that says which was used last ticks every 4 ms
        first.sendall(b"I am busy")
        assert echo(pool) == b"I am busy"
        assert echo(pool) == b"third"  # a second or so later
        assert is_over(second)
        assert first.recv(100) == b"I am busy"
        assert not is_over(first, SOON_S)
    assert pool.stats().closed["evicted"] == 1


def test_silence_ends_with_the_idle_timeout(listen: Callable[..., Pool]) -> None:
    ended: list[ClosedConnection] = []
    pool = listen(idle_timeout=0.2, maintenance_interval=0.02, on_close=ended.append)
    with known(pool) as silent, known(pool) as busy:
        busy.sendall(b"a request that nobody has time for")
        assert is_over(silent)
        until(lambda: ended, "on_close is called")
        assert not is_over(busy, 0.3)
        assert echo(pool) == b"a request that nobody has time for"
    assert [each.reason for each in ended] == ["idle"]
    assert ended[0].peer[0] == "127.0.0.1"


def test_more_silent_ones_than_allowed(listen: Callable[..., Pool]) -> None:
    pool = listen(max_idle_connections=2)
    clients = [connect(pool) for _ in range(4)]
    leases = [pool.get() for _ in clients]
    for lease in leases:
        lease.release()
    assert pool.stats().idle == 2
    assert pool.stats().closed["idle"] == 2
    for client in clients:
        client.close()


def test_an_old_connection_ends_at_its_release(listen: Callable[..., Pool]) -> None:
    pool = listen(max_lifetime=0.3, idle_timeout=0.3, maintenance_interval=math.inf)
    with known(pool) as client:
        time.sleep(0.4)  # sleep: its lifetime has to pass
        client.sendall(b"served all the same")
        assert echo(pool) == b"served all the same"
        assert client.recv(100) == b"served all the same"
        assert is_over(client)
    assert pool.stats().closed["lifetime"] == 1


def test_no_descriptor_for_a_client(listen: Callable[..., Pool]) -> None:
    import resource

    pool = listen()
    client = connect(pool, b"patient")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            pool.get(timeout=0.5)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert echo(pool) == b"patient"
    client.close()


# ---- hooks and acceptors ---------------------------------------------------------------------------------------------


def test_on_created_sees_and_refuses(listen: Callable[..., Pool], caplog: pytest.LogCaptureFixture) -> None:
    verdicts: list[Any] = [True, False, ZeroDivisionError("a fault in a hook"), None]
    seen: list[tuple[object, int]] = []

    def look(conn: PooledConnection) -> object:
        seen.append((conn.peer, conn.reuse_count))
        verdict = verdicts[len(seen) - 1]
        if isinstance(verdict, Exception):
            raise verdict
        return verdict

    ended: list[str] = []
    pool = listen(on_created=look, on_close=lambda closed: ended.append(closed.reason))
    clients = [connect(pool, b"%d" % number) for number in range(4)]
    with caplog.at_level(logging.DEBUG, "shmpool"):
        assert [echo(pool), echo(pool)] == [b"0", b"3"]  # those that it refuses are nobody's concern
    assert [peer for peer, _ in seen] == [client.getsockname() for client in clients]
    assert is_over(clients[1])
    assert is_over(clients[2])
    assert ended == ["refused", "refused"]
    assert pool.stats().closed["refused"] == 2
    faults = [record for record in caplog.records if record.name == "shmpool.hooks"]
    assert [record.levelname for record in faults] == ["ERROR"]
    assert faults[0].exc_info is not None
    assert faults[0].exc_info[1] is verdicts[2]
    for client in clients:
        client.close()


def test_an_interrupt_in_on_created_reaches_the_caller(listen: Callable[..., Pool]) -> None:
    def interrupted(_: PooledConnection) -> None:
        raise KeyboardInterrupt

    pool = listen(on_created=interrupted)
    with connect(pool) as client:
        with pytest.raises(KeyboardInterrupt):
            pool.get()
        assert is_over(client)
    assert pool.stats().closed["refused"] == 1


def test_an_acceptor_of_ones_own(listen: Callable[..., Pool], family: Family) -> None:
    outcomes: list[Any] = []

    def accept(listener: socket.socket) -> tuple[socket.socket, bytes]:
        client, peer = listener.accept()
        if outcomes:
            client.close()
            raise outcomes.pop()
        listener.setblocking(True)  # what it does to its socket must not reach the others
        return client, f"came from {peer[1]}".encode()

    pool = listen(acceptor=accept)
    with pytest.raises(PoolExhausted):
        pool.try_get()
    with connect(pool) as client:
        with pool.get() as conn:
            assert conn.metadata == b"came from %d" % client.getsockname()[1]
        client.sendall(b"x")
        assert family.fork(metadata_of_next, pool).result() == b"came from %d" % client.getsockname()[1]
    outcomes = [ConnectionResetError("gone"), ssl.SSLError("no TLS")]
    clients = [connect(pool), connect(pool), connect(pool, b"good")]
    with pool.get() as conn:
        assert conn.socket.recv(100) == b"good"  # the others were nobody's concern
    outcomes = [TypeError("a fault of the program")]
    clients += [connect(pool), connect(pool, b"after")]
    with pytest.raises(TypeError, match="a fault of the program"):
        pool.get()
    assert echo(pool) == b"after"
    assert nobody(pool)
    for client in clients:
        client.close()


def metadata_of_next(pool: Pool) -> bytes:
    with pool.get() as conn:
        assert conn.socket.recv(100)
        return conn.metadata


def test_an_acceptor_that_returns_something_else(listen: Callable[..., Pool]) -> None:
    pool = listen(acceptor=lambda listener: listener.accept()[0].detach())
    fd = -1
    with connect(pool):
        with pytest.raises(TypeError, match="an acceptor must return a socket") as caught:
            pool.get()
        fd = int(str(caught.value).rsplit(maxsplit=1)[-1])
    os.close(fd)
    assert pool.stats().open == 0


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    room = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -keyout key -out certificate"
    try:
        subprocess.run(shlex.split(command), cwd=room, check=True, capture_output=True)
    except FileNotFoundError as error:
        pytest.skip(f"no certificate without openssl: {error}")
    return room / "certificate", room / "key"


def test_tls_serves_one_lease(listen: Callable[..., Pool], certificate: tuple[Path, Path]) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*certificate)
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE

    def accept(listener: socket.socket) -> socket.socket:
        client, _ = listener.accept()
        client.settimeout(TIMEOUT_S)
        return server.wrap_socket(client, server_side=True)

    pool = listen(acceptor=accept)
    heard: list[bytes] = []

    def talk() -> None:
        with connect(pool) as plain, trusting.wrap_socket(plain) as client:
            client.sendall(b"a secret")
            while part := client.recv(100):
                heard.append(part)

    with connect(pool, b"no TLS at all\r\n") as mumbles:
        thread = threading.Thread(target=talk)
        thread.start()
        with pool.get() as conn:
            assert isinstance(conn.socket, ssl.SSLSocket)
            conn.socket.sendall(conn.socket.recv(100))
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
        with contextlib.suppress(ConnectionResetError):
            while mumbles.recv(100):  # an alert; then the end
                pass
    assert heard == [b"a secret"]
    assert pool.stats().closed["letter"] == 1


# ---- many processes --------------------------------------------------------------------------------------------------


def fork_workers(family: Family, pool: Pool, count: int) -> list[Child]:
    return [family.fork(speak_http, pool, tell_pid) for _ in range(count)]


def test_any_worker_serves_the_next_request(listen: Callable[..., Pool], family: Family) -> None:
    pool = listen()
    holds, gives_back = family.latch(), family.latch()

    def handle(path: str, body: bytes) -> bytes:
        if path == "/hold":
            holds.set()
            gives_back.wait()
        return tell_pid(path, body)

    workers = [family.fork(speak_http, pool, handle) for _ in range(2)]
    pids = {worker.pid for worker in workers}
    with Browser(pool) as browser, Browser(pool) as other:
        assert browser.server() in pids
        port = browser.port()
        other.http.request("GET", "/hold")
        holds.wait()
        free = browser.server()  # the one that is not in the other's hands
        for _ in range(10):
            assert browser.server() == free
        gives_back.set()
        held = int(other.http.getresponse().read().split()[-1])
        assert {held, free} == pids
        until(lambda: pool.stats().idle == 2, "both are given back")
        workers[[worker.pid for worker in workers].index(free)].kill()
        assert browser.server() == held  # on the connection that the dead one has served so far
        assert browser.port() == port
    pool.close()
    assert sorted(worker.wait() for worker in workers) == ["SIGKILL", "exit 0"]


def test_http_over_several_workers(listen: Callable[..., Pool], family: Family) -> None:
    pool = listen(max_connections=6)
    workers = fork_workers(family, pool, 3)
    servers: set[str] = set()

    def browse(place: int) -> None:
        draws = random.Random(place)
        with Browser(pool) as browser:
            for turn in range(60):
                body = draws.randbytes(draws.randrange(5000)).hex()
                path = f"/{place}/{turn}"
                answer = browser.ask(path, body.encode()).split()
                assert answer[:-1] == [path, body][: 1 + bool(body)]
                servers.add(answer[-1])
                if draws.random() < 0.1:
                    browser.http.close()

    browsers = [threading.Thread(target=browse, args=(place,)) for place in range(10)]  # more than the cap
    for thread in browsers:
        thread.start()
    for thread in browsers:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    assert servers <= {str(worker.pid) for worker in workers}
    stats = pool.stats()
    assert stats.open <= 6
    assert stats.gets == stats.successes + stats.timeouts
    pool.close()
    assert [worker.wait() for worker in workers] == ["exit 0"] * 3
    assert pool.stats().successes >= 600


def test_workers_killed_under_load(listen: Callable[..., Pool], family: Family) -> None:
    pool = listen(max_connections=6, maintenance_interval=0.1)
    draws = chance()
    workers = fork_workers(family, pool, 4)
    over = threading.Event()
    broken = [0] * 8
    answered = [0] * 8

    def browse(place: int) -> None:
        with Browser(pool) as browser:
            turn = 0
            while not over.is_set():
                turn += 1
                path = f"/{place}/{turn}"
                try:
                    assert browser.ask(path).startswith(f"{path} ")
                    answered[place] += 1
                except (http.client.HTTPException, ConnectionError):  # its worker was killed
                    broken[place] += 1
                    browser.http.close()

    browsers = [threading.Thread(target=browse, args=(place,)) for place in range(8)]
    for thread in browsers:
        thread.start()
    kills = 60 if LONG else 12
    for _ in range(kills):
        before = sum(answered)
        until(lambda before=before: sum(answered) > before + 50, "they go on being served")
        victim = draws.choice(workers)
        workers.remove(victim)
        victim.kill()
        workers += fork_workers(family, pool, 1)
    over.set()
    for thread in browsers:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    # A kill breaks the connection that the dead one had in its hands; the cap evicts silent ones, if there are any.
    assert sum(broken) <= kills + pool.stats().closed["evicted"]
    pool.close()
    assert [worker.wait() for worker in workers] == ["exit 0"] * 4


def test_a_stopped_worker_keeps_nothing_from_the_others(listen: Callable[..., Pool], family: Family) -> None:
    pool = listen()
    workers = fork_workers(family, pool, 3)
    draws = chance()
    browsers = [Browser(pool) for _ in range(3)]
    for browser in browsers:
        browser.server()
    for _ in range(10):
        victim = draws.choice(workers)
        until(lambda: pool.stats().idle == len(browsers), "nothing is in anybody's hands")
        victim.stop()  # it waits for events as the others do
        for browser in browsers:
            assert browser.server() != victim.pid
        victim.resume()
    for browser in browsers:
        browser.http.close()
    pool.close()


def test_closing_ends_every_wait(listen: Callable[..., Pool], family: Family) -> None:
    pool = listen()
    waiting = [family.latch() for _ in range(2)]

    def wait_for_ever(latch: Latch) -> str:
        latch.set()
        with pytest.raises(PoolClosed):
            pool.get(timeout=math.inf)
        return "closed"

    client = known(pool)
    children = [family.fork(wait_for_ever, latch) for latch in waiting]
    for latch in waiting:
        latch.wait()
    host, port = pool.address
    pool.close()
    assert [child.result(5) for child in children] == ["closed"] * 2
    assert is_over(client)
    client.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((str(host), int(port)))
    with pytest.raises(PoolClosed):
        pool.get()


def test_paused_and_drained(listen: Callable[..., Pool], family: Family) -> None:
    pool = listen()
    idle, leased = known(pool), connect(pool)
    lease = pool.get()
    pool.pause()
    idle.sendall(b"during the pause")
    with connect(pool, b"a newcomer"):
        with pytest.raises(PoolTimeout, match="paused"):
            pool.get(timeout=SOON_S)
        with pytest.raises(PoolExhausted, match="paused"):
            pool.try_get()
        child = family.fork(lambda: sorted([echo(pool), echo(pool)]))
        pool.resume()
        assert child.result() == [b"a newcomer", b"during the pause"]
    assert pool.drain(timeout=0) == 1
    assert idle.recv(100) == b"during the pause"
    assert is_over(idle)
    with connect(pool, b"too early"), pytest.raises(PoolClosed) as refused:
        pool.get()
    assert refused.value.draining
    lease.release()
    assert is_over(leased)
    assert pool.drain() == 0
    pool.resume()
    with connect(pool, b"again"):
        assert {echo(pool), echo(pool)} == {b"too early", b"again"}
    for client in (idle, leased):
        client.close()


def test_evicting_clients(listen: Callable[..., Pool]) -> None:
    pool = listen()
    with known(pool) as first, known(pool) as second, known(pool) as third:
        assert pool.evict(peer=first.getsockname()) == 1
        assert is_over(first)
        assert pool.evict() == 2
        assert is_over(second)
        assert is_over(third)
    assert pool.stats().closed["evicted"] == 3


def test_resize_lets_waiting_clients_in(listen: Callable[..., Pool]) -> None:
    pool = listen(max_connections=1)
    with connect(pool), connect(pool, b"second"):
        lease = pool.get()
        assert nobody(pool)
        pool.resize(2)
        assert echo(pool) == b"second"
        lease.release()


def serve_once(pool: Pool) -> tuple[int, bytes]:
    """For spawned children: one echo."""
    return os.getpid(), echo(pool)


def test_spawned_workers(listen: Callable[..., Pool]) -> None:
    pool = listen()
    with known(pool) as client, multiprocessing.get_context("spawn").Pool(2) as processes:
        for turn in range(3):
            client.sendall(b"request %d" % turn)
            pid, said = processes.apply(serve_once, (pool,))
            assert pid != os.getpid()
            assert said == client.recv(100) == b"request %d" % turn


def test_processes_that_share_a_name(family: Family) -> None:
    """However many begin at once: one binds, the others join it, also after the first has gone."""
    name = f"serving-{os.getpid()}"
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
    go, gone = family.latch(), family.latch()

    def member() -> bytes:
        go.wait()
        with Pool.listen(f"tcp://127.0.0.1:{port}", name=name, max_connections=4, get_timeout=TIMEOUT_S) as pool:
            said = echo(pool)
            gone.wait()
            return said

    members = [family.fork(member) for _ in range(5)]
    go.set()
    clients = []
    for number in range(5):
        until(lambda: shmpool.list_pools(), "the pool is there")
        clients.append(_connect_when_up(port, b"client %d" % number))
    for number, client in enumerate(clients):
        client.settimeout(TIMEOUT_S)
        assert client.recv(64) == b"client %d" % number
    gone.set()  # not before all are served: the first to go closes the pool
    assert sorted(each.result() for each in members) == [b"client %d" % number for number in range(5)]
    for client in clients:
        client.close()


def _connect_when_up(port: int, say: bytes) -> socket.socket:
    client = None

    def try_it() -> bool:
        nonlocal client
        with contextlib.suppress(ConnectionRefusedError):
            # From another address: with nobody listening yet, TCP may connect a socket to itself.
            client = socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.2", 0))
        return client is not None

    until(try_it, "somebody listens")
    assert client is not None
    client.sendall(say)
    return client


def test_attaching_and_leaving(family: Family) -> None:
    name = f"serving-attached-{os.getpid()}"
    with Pool.listen("tcp://127.0.0.1:0", name=name, max_connections=4) as pool:
        with known(pool) as client:
            code = (
                f"import shmpool; pool = shmpool.attach({name!r}); conn = pool.get(timeout=10)\n"
                "conn.socket.sendall(b'attached ' + conn.socket.recv(100)); conn.release()"
            )
            client.sendall(b"and served")
            subprocess.run([sys.executable, "-c", code], check=True, timeout=TIMEOUT_S, cwd=ROOT)
            assert client.recv(100) == b"attached and served"
            child = family.fork(lambda: (pool.leave(), pool.closed)[1])
            assert child.result()
            client.sendall(b"still here")
            assert echo(pool) == b"still here"
        pool.close()


# ---- the example -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_the_example(end: signal.Signals) -> None:
    command = [sys.executable, str(ROOT / "examples" / "http_server.py"), "0", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    ) as server:
        assert server.stdout is not None
        address = server.stdout.readline().strip().removeprefix("http://")
        http_client = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
        for body in (None, b"x" * 100_000):
            http_client.request("GET" if body is None else "POST", "/path", body)
            assert f"({len(body or b'')} bytes) answered by process" in http_client.getresponse().read().decode()
        os.killpg(server.pid, end)
        out, errors = server.communicate(timeout=TIMEOUT_S)
        http_client.close()
    assert (server.returncode, errors) == (0, ""), errors
    assert "1 connections, served 2 times" in out
