"""Dialling real sockets on loopback: what comes back, what is raised, and that what failed is closed."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from shmpool.config import IPVersion, PoolConfig, Protocol, Target
from shmpool.dialing import DialRequest, _was_cut_short, buckets_of, dial_target, set_options
from shmpool.errors import DialError, NoConnectionForIPVersion, NoConnectionForProtocol

LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


def dial(text: str, *, timeout: float = 10.0, settings: dict[str, Any] | None = None, **request: Any) -> socket.socket:
    config = PoolConfig(target=text, **settings or {})
    return dial_target(Target.parse(text), DialRequest(timeout=timeout, **request), config)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@contextmanager
def silent(family: socket.AddressFamily) -> Iterator[socket.socket]:
    """A listener whose backlog is full: it never answers."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server((LOOPBACK[family], 0), family=family, backlog=0))
        for _ in range(4):
            filler = stack.enter_context(socket.socket(family))
            filler.setblocking(False)
            filler.connect_ex(server.getsockname())
        yield server


@pytest.fixture
def silent_port() -> Iterator[int]:
    with silent(socket.AF_INET) as server:
        yield int(server.getsockname()[1])


def resolve_to(monkeypatch: pytest.MonkeyPatch, *hosts: str) -> None:
    """Make every name resolve to these addresses, as getaddrinfo would say it."""
    real = socket.getaddrinfo

    def fake(_host: str, port: int, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0) -> list[Any]:  # noqa: A002
        found = [entry for host in hosts for entry in real(host, port, 0, type, proto, flags)]
        wanted = [entry for entry in found if family in (socket.AF_UNSPEC, entry[0])]
        if not wanted:
            raise socket.gaierror(socket.EAI_NODATA, "no address of that family")
        return wanted

    monkeypatch.setattr(socket, "getaddrinfo", fake)


# What comes back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", LOOPBACK)
@pytest.mark.parametrize("scheme", ["tcp", "udp"])
def test_ip(family: socket.AddressFamily, scheme: str) -> None:
    kind = socket.SOCK_STREAM if scheme == "tcp" else socket.SOCK_DGRAM
    with socket.socket(family, kind) as server:
        server.bind((LOOPBACK[family], 0))
        if scheme == "tcp":
            server.listen()
        host = f"[{LOOPBACK[family]}]" if family == socket.AF_INET6 else LOOPBACK[family]
        with dial(f"{scheme}://{host}:{server.getsockname()[1]}", settings={"socket_timeout": 7.0}) as sock:
            assert (sock.family, sock.type) == (family, kind)
            assert sock.getpeername() == server.getsockname()
            assert sock.gettimeout() == 7.0
            assert not sock.get_inheritable()
            if scheme == "tcp":
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_unix(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        with dial(f"unix://{path}", settings={"socket_timeout": None}) as sock:
            assert sock.getpeername() == path
            assert sock.gettimeout() is None


@pytest.mark.parametrize("hosts", [["127.0.0.1"], ["127.0.0.2", "127.0.0.1"], ["::1", "127.0.0.1"]])
def test_a_name_is_tried_address_by_address(
    hosts: list[str], listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_to(monkeypatch, *hosts)
    with dial(f"tcp://service:{listener.getsockname()[1]}") as sock:
        assert sock.getpeername() == listener.getsockname()


def test_ip_version_is_honoured(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, "::1", "127.0.0.1")
    families = []
    text = f"tcp://service:{listener.getsockname()[1]}"
    with dial(text, ip_version=IPVersion.V4, _predeposit=lambda sock: families.append(sock.family)):
        assert families == [socket.AF_INET]


def test_a_silent_address_does_not_use_up_the_time_of_the_next(
    silent_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_to(monkeypatch, "127.0.0.1", "127.0.0.2")
    with (
        socket.create_server(("127.0.0.2", silent_port)) as server,
        dial(f"tcp://service:{silent_port}", timeout=1.0) as sock,
    ):
        assert sock.getpeername() == server.getsockname()


def test_a_numeric_host_is_never_looked_up(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    real, flags = socket.getaddrinfo, []

    def spy(*args: Any, **kwargs: Any) -> Any:
        flags.append(kwargs["flags"])
        return real(*args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", spy)
    dial(f"tcp://127.0.0.1:{listener.getsockname()[1]}").close()
    assert flags == [socket.AI_NUMERICHOST]


# Options --------------------------------------------------------------------------------------------------------------


def options(sock: socket.socket) -> dict[str, int]:
    """The options that a pool may set, as the kernel has them."""
    levels = {"SO": socket.SOL_SOCKET, "TCP": socket.IPPROTO_TCP}
    names = ["SO_SNDBUF", "SO_RCVBUF"]
    if sock.family != socket.AF_UNIX and sock.type == socket.SOCK_STREAM:
        names += ["TCP_NODELAY", "SO_KEEPALIVE", "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"]
    return {name: sock.getsockopt(levels[name.split("_")[0]], getattr(socket, name)) for name in names}


def changed(sock: socket.socket) -> dict[str, int]:
    """The options in which a socket differs from a new one of its kind."""
    with socket.socket(sock.family, sock.type) as plain:
        return dict(options(sock).items() - options(plain).items())


KEPT = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 5}
OPTIONS: list[tuple[dict[str, Any], dict[str, int]]] = [
    ({}, {"TCP_NODELAY": 1, "SO_KEEPALIVE": 1}),
    ({"tcp_nodelay": False, "tcp_keepalive": False}, {}),
    ({"tcp_nodelay": False, "tcp_keepalive": (60, 10, 5)}, {"SO_KEEPALIVE": 1, **KEPT}),
    # The kernel doubles what it is told.
    ({"tcp_nodelay": False, "tcp_keepalive": False, "send_buffer_size": 20_000}, {"SO_SNDBUF": 40_000}),
    ({"tcp_nodelay": False, "tcp_keepalive": False, "receive_buffer_size": 30_000}, {"SO_RCVBUF": 60_000}),
]


@pytest.fixture
def connecting(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """What `changed` says of each socket when it connects: the kernel tunes the sizes of a connected one."""
    real, seen = socket.socket.connect, list[dict[str, int]]()

    def connect(sock: socket.socket, address: Any) -> None:
        seen.append(changed(sock))
        real(sock, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    return seen


@pytest.mark.parametrize(("settings", "wanted"), OPTIONS)
def test_options_are_set_before_the_connect(
    settings: dict[str, Any], wanted: dict[str, int], listener: socket.socket, connecting: list[dict[str, int]]
) -> None:
    dial(f"tcp://127.0.0.1:{listener.getsockname()[1]}", settings=settings).close()
    assert connecting == [wanted]


def test_options_of_tcp_are_for_tcp_alone(connecting: list[dict[str, int]], tmp_path: Path) -> None:
    settings = {"tcp_keepalive": (60, 10, 5), "send_buffer_size": 20_000, "receive_buffer_size": 30_000}
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        dial(f"unix://{tmp_path / 's'}", settings=settings).close()
    dial("udp://127.0.0.1:9", settings=settings).close()
    assert connecting == [{"SO_SNDBUF": 40_000, "SO_RCVBUF": 60_000}] * 2


@pytest.mark.parametrize(("settings", "wanted"), OPTIONS)
def test_what_a_listener_accepts_has_its_options(settings: dict[str, Any], wanted: dict[str, int]) -> None:
    with socket.socket() as server:
        set_options(server, Protocol.TCP, PoolConfig(target="tcp://127.0.0.1:0", listening=True, **settings))
        server.bind(("127.0.0.1", 0))
        server.listen()
        with socket.create_connection(server.getsockname()), server.accept()[0] as accepted:
            assert wanted.items() <= options(accepted).items()


# What is raised -----------------------------------------------------------------------------------------------------


def fail(text: str, *, meanwhile: Callable[[socket.socket], None] | None = None, **request: Any) -> DialError:
    """The error of a dial that must fail; the sockets it made, and gave `meanwhile`, must be closed."""

    def deposit(sock: socket.socket) -> None:
        made.append(sock)
        if meanwhile is not None:
            meanwhile(sock)

    made: list[socket.socket] = []
    with pytest.raises(DialError) as caught:
        dial(text, _predeposit=deposit, **request)
    assert all(sock.fileno() == -1 for sock in made)
    assert caught.value.target == text
    assert text in str(caught.value)
    return caught.value


def test_refused(deaf_port: int) -> None:
    error = fail(f"tcp://127.0.0.1:{deaf_port}", attempt=3)
    assert isinstance(error.__cause__, ConnectionRefusedError)
    assert error.attempt == 3
    assert error.tried == ("127.0.0.1: Connection refused",)


def test_silent(silent_port: int) -> None:
    error = fail(f"tcp://127.0.0.1:{silent_port}", timeout=0.05)
    assert isinstance(error.__cause__, TimeoutError)
    assert error.waited >= 0.05


def test_every_address_is_named(deaf_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, "127.0.0.1", "127.0.0.2")
    error = fail(f"tcp://service:{deaf_port}")
    assert error.tried == ("127.0.0.1: Connection refused", "127.0.0.2: Connection refused")


def test_no_time(deaf_port: int) -> None:
    assert isinstance(fail(f"tcp://127.0.0.1:{deaf_port}", timeout=0.0).__cause__, TimeoutError)


def test_unknown_name() -> None:
    error = fail("tcp://nonexistent.invalid:80")
    assert isinstance(error.__cause__, socket.gaierror)
    assert "check the host name" in str(error)


def test_unknown_name_with_a_version() -> None:
    assert isinstance(fail("tcp://nonexistent.invalid:80", ip_version=IPVersion.V6).__cause__, socket.gaierror)


def test_no_such_path(tmp_path: Path) -> None:
    assert isinstance(fail(f"unix://{tmp_path}/none").__cause__, FileNotFoundError)


def test_no_permission() -> None:
    # A broadcast needs a socket option that we do not set, whoever runs this.
    assert isinstance(fail("udp://255.255.255.255:9").__cause__, PermissionError)


@pytest.mark.parametrize(
    ("text", "protocol", "available"),
    [
        ("tcp://127.0.0.1:1", Protocol.UDP, ("tcp",)),
        ("unix:///x", Protocol.TCP, ("unix",)),
    ],
)
def test_other_protocol(text: str, protocol: Protocol, available: tuple[str, ...]) -> None:
    with pytest.raises(NoConnectionForProtocol) as caught:
        dial(text, protocol=protocol)
    assert (caught.value.protocol, caught.value.available) == (protocol, available)


@pytest.mark.parametrize(
    ("text", "version", "available"),
    [
        ("tcp://127.0.0.1:1", IPVersion.V6, (4,)),
        ("udp://[::1]:1", IPVersion.V4, (6,)),
        ("unix:///x", IPVersion.V4, ()),
    ],
)
def test_other_ip_version(text: str, version: IPVersion, available: tuple[int, ...]) -> None:
    with pytest.raises(NoConnectionForIPVersion) as caught:
        dial(text, ip_version=version)
    assert (caught.value.ip_version, caught.value.available) == (version, available)


def test_a_name_without_an_address_of_that_version(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, "127.0.0.1")
    with pytest.raises(NoConnectionForIPVersion) as caught:
        dial("tcp://service:1", ip_version=IPVersion.V6)
    assert caught.value.available == (4,)


# Turns --------------------------------------------------------------------------------------------------------------


def tried(text: str, rotation: int) -> list[str]:
    """The hosts that a dial tries, in their order; all refuse."""
    return [part.split(": ")[0] for part in fail(text, _rotation=rotation).tried]


@pytest.mark.parametrize(
    ("hosts", "rounds"),
    [
        (["127.0.0.1"], [["127.0.0.1"]] * 2),
        (
            ["127.0.0.1", "127.0.0.2", "127.0.0.3"],
            [
                ["127.0.0.1", "127.0.0.2", "127.0.0.3"],
                ["127.0.0.2", "127.0.0.3", "127.0.0.1"],
                ["127.0.0.3", "127.0.0.1", "127.0.0.2"],
                ["127.0.0.1", "127.0.0.2", "127.0.0.3"],
            ],
        ),
        # As a resolver gives them, one family after the other: they alternate, whoever's turn it is.
        (
            ["::1", "127.0.0.1", "127.0.0.2"],
            [
                ["::1", "127.0.0.1", "127.0.0.2"],
                ["127.0.0.1", "127.0.0.2", "::1"],
                ["127.0.0.2", "::1", "127.0.0.1"],
            ],
        ),
        (["127.0.0.1", "127.0.0.2", "::1"], [["127.0.0.1", "::1", "127.0.0.2"], ["::1", "127.0.0.2", "127.0.0.1"]]),
    ],
)
def test_the_addresses_take_turns(
    hosts: list[str], rounds: list[list[str]], deaf_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_to(monkeypatch, *hosts)
    for rotation, wanted in enumerate(rounds):
        assert tried(f"tcp://service:{deaf_port}", rotation) == wanted
        assert tried(f"tcp://service:{deaf_port}", rotation + 60 * len(hosts)) == wanted


def test_turns_spread_the_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = ["127.0.0.1", "127.0.0.2"]
    with socket.create_server((hosts[0], 0)) as server, socket.create_server((hosts[1], server.getsockname()[1])):
        resolve_to(monkeypatch, *hosts)
        peers = []
        for rotation in range(4):
            with dial(f"tcp://service:{server.getsockname()[1]}", _rotation=rotation) as sock:
                peers.append(sock.getpeername()[0])
    assert peers == hosts * 2


# The deposit, and what may interrupt --------------------------------------------------------------------------------


def test_the_deposit_comes_before_the_connect(listener: socket.socket) -> None:
    def deposit(sock: socket.socket) -> None:
        with pytest.raises(OSError, match="not connected"):
            sock.getpeername()
        seen.append(sock)

    seen: list[socket.socket] = []
    with dial(f"tcp://127.0.0.1:{listener.getsockname()[1]}", _predeposit=deposit) as sock:
        assert seen == [sock]


def test_an_error_of_the_deposit_ends_the_dial(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    def deposit(sock: socket.socket) -> None:
        seen.append(sock)
        raise OSError(109, "too many references")

    seen: list[socket.socket] = []
    resolve_to(monkeypatch, "127.0.0.1", "127.0.0.2")
    with pytest.raises(OSError, match="too many references"):
        dial(f"tcp://service:{listener.getsockname()[1]}", _predeposit=deposit)
    assert [sock.fileno() for sock in seen] == [-1]


def test_a_socket_connected_to_itself_is_refused() -> None:
    def take_the_port(sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(holder.getsockname())

    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # two may be bound while none listens
        holder.bind(("127.0.0.1", 0))
        with pytest.raises(DialError) as caught:
            dial(f"tcp://127.0.0.1:{holder.getsockname()[1]}", _predeposit=take_the_port)
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


# Cut short ----------------------------------------------------------------------------------------------------------

SYN_SENT = 2  # what TCP_INFO calls a socket that waits for the other side


def through_the_socket(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_RDWR)


def through_a_copy(sock: socket.socket) -> None:
    """As a forked child has one."""
    with socket.socket(fileno=os.dup(sock.fileno())) as copy:
        copy.shutdown(socket.SHUT_RDWR)


SHUTDOWNS = [through_the_socket, through_a_copy]


def cut(text: str, meanwhile: Callable[[socket.socket], None]) -> None:
    """A dial that `meanwhile` cuts short: it ends long before its time, at the first address."""
    started = time.monotonic()
    error = fail(text, timeout=60.0, meanwhile=meanwhile)
    assert time.monotonic() - started < 15.0
    assert isinstance(error.__cause__, ConnectionAbortedError)
    assert len(error.tried) == 1
    assert "cut short" in str(error)


@pytest.mark.parametrize("shutdown", SHUTDOWNS)
@pytest.mark.parametrize("family", LOOPBACK)
def test_a_dial_that_waits_is_cut_short(
    shutdown: Callable[[socket.socket], None], family: socket.AddressFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    def when_it_waits(sock: socket.socket) -> None:
        while sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != SYN_SENT:
            os.sched_yield()
        shutdown(sock)

    resolve_to(monkeypatch, LOOPBACK[family], "127.0.0.2")
    with silent(family) as server, ExitStack() as stack:

        def meanwhile(sock: socket.socket) -> None:
            thread = threading.Thread(target=when_it_waits, args=[sock])
            thread.start()
            stack.callback(thread.join)

        cut(f"tcp://service:{server.getsockname()[1]}", meanwhile)


@pytest.mark.parametrize("shutdown", SHUTDOWNS)
@pytest.mark.parametrize("answering", [False, True])
def test_a_dial_that_has_not_come_to_waiting_is_cut_short(
    shutdown: Callable[[socket.socket], None], answering: bool, silent_port: int, listener: socket.socket
) -> None:
    def meanwhile(sock: socket.socket) -> None:
        with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
            shutdown(sock)

    cut(f"tcp://127.0.0.1:{listener.getsockname()[1] if answering else silent_port}", meanwhile)
    cut("udp://127.0.0.1:9", meanwhile)


@pytest.mark.parametrize("family", LOOPBACK)
def test_a_reset_by_the_server_is_not_taken_for_a_shutdown(family: socket.AddressFamily) -> None:
    with (
        socket.create_server((LOOPBACK[family], 0), family=family) as server,
        socket.create_connection(server.getsockname()[:2]) as sock,
    ):
        accepted, _ = server.accept()
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        accepted.close()
        poller = select.poll()
        poller.register(sock, 0)
        assert poller.poll(10_000) == [(sock.fileno(), select.POLLHUP | select.POLLERR)]
        for number in (errno.ECONNRESET, errno.ENOTCONN):
            assert not _was_cut_short(sock, OSError(number, ""))


def test_a_server_that_ends_its_first_connection_is_not_taken_for_a_shutdown(tmp_path: Path) -> None:
    """Over a unix socket that shuts both directions here too."""

    def serve() -> None:
        for _ in range(50):
            server.accept()[0].close()

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen(50)
        thread = threading.Thread(target=serve)
        thread.start()
        for _ in range(50):
            dial(f"unix://{tmp_path / 's'}").close()
        thread.join()


# Interrupted --------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("kind", [Interrupted, TimeoutError])
def test_a_signal_handler_that_raises_ends_the_dial(
    kind: type[Exception], silent_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def handler(*_: object) -> None:
        raise kind("by the handler")

    resolve_to(monkeypatch, "127.0.0.1", "127.0.0.2")
    main, made = threading.get_ident(), []

    def deposit(sock: socket.socket) -> None:
        made.append(sock)
        timer.start()

    timer = threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGUSR1))
    with restored(signal.SIGUSR1, handler):
        started = time.monotonic()
        with pytest.raises(kind, match="by the handler"):
            dial(f"tcp://service:{silent_port}", timeout=30.0, _predeposit=deposit)
        assert time.monotonic() - started < 15.0
        timer.join()
    assert [sock.fileno() for sock in made] == [-1]


def restored(number: signal.Signals, handler: Callable[..., None]) -> ExitStack:
    stack = ExitStack()
    stack.callback(signal.signal, number, signal.signal(number, handler))
    return stack


# Kinds --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "buckets"),
    [
        ("tcp://127.0.0.1:1", {("tcp", 4)}),
        ("udp://[::1]:1", {("udp", 6)}),
        ("tcp://service:1", {("tcp", 4), ("tcp", 6)}),
        ("unix:///x", {("unix", None)}),
    ],
)
def test_buckets_of(text: str, buckets: set[tuple[str, int | None]]) -> None:
    assert buckets_of(Target.parse(text)) == buckets


def test_a_request_keeps_the_private_parts_to_itself() -> None:
    request = DialRequest(protocol=Protocol.TCP, timeout=1.0, _predeposit=os.abort, _rotation=3)  # type: ignore[arg-type]
    assert request == DialRequest(protocol=Protocol.TCP, timeout=1.0)
    assert "_predeposit" not in repr(request)
    assert "_rotation" not in repr(request)
