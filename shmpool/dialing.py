"""Opening one connection to a `Target`: resolve the name, try its addresses in turn, all within one timeout.

What: `DialRequest` (what a `dial` is asked for), `dial_target` (the dial of a pool that was given a target),
`set_options` (the options of each socket that the pool opens itself) and `buckets_of` (the kinds of connection a
target can ever give).

Invariants: a socket that is not returned is closed, whatever is raised meanwhile; a returned one is connected, not
inheritable and has the pool's timeout; a numeric host is never looked up. All waiting is in plain socket calls: they
let other threads run, and a signal handler that raises ends them; so does shutdown() of the connecting socket, by
whatever thread or process that has it. The one exception is the resolver of libc, which has its own timeouts and runs
handlers only when it is done.

Not here: retries, backoff and the permit to dial (`pool`), and protocols spoken on the connection.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .config import IPVersion, PoolConfig, Protocol, Target
from .errors import SHORTAGES, DialError, NoConnectionForIPVersion, NoConnectionForProtocol

__all__ = ["DialRequest", "buckets_of", "dial_target", "set_options"]

_FAMILIES = {IPVersion.V4: socket.AF_INET, IPVersion.V6: socket.AF_INET6}
_VERSIONS: dict[int, IPVersion] = {family: version for version, family in _FAMILIES.items()}
_KINDS = {Protocol.TCP: socket.SOCK_STREAM, Protocol.UDP: socket.SOCK_DGRAM, Protocol.UNIX: socket.SOCK_STREAM}
_KEEPALIVE_OPTIONS = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)


@dataclass(frozen=True, slots=True)
class DialRequest:
    """What the pool asks of a `dial`: a connection of this kind (None: any), within `timeout` seconds.

    `attempt` counts from 1. A dial that cannot give the kind raises `NoConnectionForProtocol` or
    `NoConnectionForIPVersion`.
    """

    protocol: Protocol | None = None
    ip_version: IPVersion | None = None
    timeout: float = 10.0
    attempt: int = 1
    # Called by dial_target with each socket before it connects: the pool puts the descriptor where it outlives us.
    _predeposit: Callable[[socket.socket], None] | None = field(default=None, repr=False, compare=False)
    # Which of the addresses is tried first; the pool counts it on, so that its connections spread over all of them.
    _rotation: int = field(default=0, repr=False, compare=False)


class _Address(NamedTuple):
    family: int
    sockaddr: tuple[Any, ...] | str  # as getaddrinfo gives it; a path for unix

    def __str__(self) -> str:
        return str(self.sockaddr[0]) if isinstance(self.sockaddr, tuple) else self.sockaddr


def buckets_of(target: Target) -> set[tuple[Protocol, IPVersion | None]]:
    """Every (protocol, IP version) that connections to `target` can have; a host name may resolve to both versions."""
    if target.scheme is Protocol.UNIX:
        return {(Protocol.UNIX, None)}
    version = target.numeric_version
    return {(target.scheme, known) for known in IPVersion if version in (None, known)}


def dial_target(target: Target, request: DialRequest, config: PoolConfig) -> socket.socket:
    """A socket connected to the first address of `target` that answers, beginning with the one whose turn it is.

    The time that is left is shared evenly among the addresses that are left, so that a silent first one does not use
    up the time of the others. Raises `DialError`, or the `NoConnectionFor…` errors for what `target` can never give.
    A dial that somebody cuts short, by shutdown() of its socket, tries no other address; the cause of its `DialError`
    is a `ConnectionAbortedError`, which no server can bring about.
    """
    started = time.monotonic()
    deadline = started + request.timeout
    _refuse_other_kinds(target, request)
    tried: list[str] = []
    cause: OSError | None = None
    try:
        addresses = _in_turn(_resolve(target, request.ip_version), request._rotation)
        for index, address in enumerate(addresses):
            left = deadline - time.monotonic()
            try:
                return _open(target.scheme, address, left / (len(addresses) - index), request, config)
            except _AddressFailed as failed:
                cause = failed.error
                tried.append(f"{address}: {cause.strerror or cause}")
                if isinstance(cause, ConnectionAbortedError):
                    break
    except socket.gaierror as error:
        cause = error
    waited = time.monotonic() - started
    raise DialError(target=target.text, attempt=request.attempt, waited=waited, tried=tuple(tried)) from cause


def _refuse_other_kinds(target: Target, request: DialRequest) -> None:
    if request.protocol not in (None, target.scheme):
        raise NoConnectionForProtocol(protocol=str(request.protocol), available=(target.scheme.value,))
    available = tuple(sorted(int(version) for _, version in buckets_of(target) if version is not None))
    if request.ip_version is not None and request.ip_version not in available:
        raise NoConnectionForIPVersion(ip_version=int(request.ip_version), available=available)


# Resolving ----------------------------------------------------------------------------------------------------------


def _resolve(target: Target, version: IPVersion | None) -> list[_Address]:
    """The addresses of the target in the resolver's order, each once. Raises socket.gaierror."""
    if target.scheme is Protocol.UNIX:
        return [_Address(socket.AF_UNIX, target.path)]
    family = socket.AF_UNSPEC if version is None else _FAMILIES[version]
    try:
        return _lookup(target, family)
    except socket.gaierror:
        available = () if version is None else _versions(target)
        if version is None or not available:
            raise
        raise NoConnectionForIPVersion(ip_version=int(version), available=available) from None


def _lookup(target: Target, family: int) -> list[_Address]:
    flags = 0 if target.numeric_version is None else socket.AI_NUMERICHOST
    found = socket.getaddrinfo(target.host, target.port, family, _KINDS[target.scheme], flags=flags)
    return list(dict.fromkeys(_Address(family, sockaddr) for family, _, _, _, sockaddr in found if family in _VERSIONS))


def _versions(target: Target) -> tuple[int, ...]:
    """The IP versions that the host has addresses of; none when the name is not known at all."""
    try:
        return tuple(sorted({int(_VERSIONS[family]) for family, _ in _lookup(target, socket.AF_UNSPEC)}))
    except socket.gaierror:
        return ()


def _in_turn(addresses: list[_Address], rotation: int) -> list[_Address]:
    """The addresses in the order to try them. The families alternate: where one of them leads nowhere, the next address
    to try is of the other one, whichever comes first."""
    families: dict[int, list[_Address]] = {}
    for address in addresses:
        families.setdefault(address.family, []).append(address)
    rounds = itertools.zip_longest(*families.values())
    alternating = [address for each in rounds for address in each if address is not None]
    first = rotation % max(1, len(alternating))
    return alternating[first:] + alternating[:first]


# Connecting ---------------------------------------------------------------------------------------------------------


def set_options(sock: socket.socket, protocol: Protocol, config: PoolConfig) -> None:
    """The socket options that `config` asks for.

    Before the connect or the listen: the handshake says how large the receive buffer can become. What a listener
    accepts has the listener's options.
    """
    if protocol is Protocol.TCP:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, config.tcp_nodelay)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, bool(config.tcp_keepalive))
        times = config.tcp_keepalive if isinstance(config.tcp_keepalive, tuple) else ()
        for option, value in zip(_KEEPALIVE_OPTIONS, times, strict=False):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
    for option, size in ((socket.SO_SNDBUF, config.send_buffer_size), (socket.SO_RCVBUF, config.receive_buffer_size)):
        if size is not None:
            sock.setsockopt(socket.SOL_SOCKET, option, size)


class _AddressFailed(Exception):
    """This address did not answer; the next one may. Any other exception ends the dial."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


def _open(
    protocol: Protocol, address: _Address, timeout: float, request: DialRequest, config: PoolConfig
) -> socket.socket:
    try:
        sock = socket.socket(address.family, _KINDS[protocol])
    except OSError as error:
        raise _AddressFailed(error) from error
    try:
        if request._predeposit is not None:
            request._predeposit(sock)
        try:
            set_options(sock, protocol, config)
            _connect(sock, protocol, address, timeout)
            sock.settimeout(config.socket_timeout)
        except OSError as error:
            if _is_of_a_handler(error):
                raise
            raise _AddressFailed(error) from error
    except BaseException:
        # A child forked meanwhile has a copy that would go on connecting: this acts on the connection, whoever has it.
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()
        raise
    return sock


def _connect(sock: socket.socket, protocol: Protocol, address: _Address, timeout: float) -> None:
    try:
        if timeout <= 0:
            raise TimeoutError("no time left")
        sock.settimeout(timeout)
        sock.connect(address.sockaddr)
        if protocol is not Protocol.UNIX and _is_shut(sock):
            raise ConnectionAbortedError(errno.ECONNABORTED, _CUT_SHORT)
        # With nobody listening on a local port of the ephemeral range, the kernel may bind this very socket to that
        # port, and TCP connects it to itself.
        if protocol is Protocol.TCP and sock.getsockname() == sock.getpeername():
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    except OSError as error:
        if protocol is Protocol.TCP and not _is_of_a_handler(error) and _was_cut_short(sock, error):
            raise ConnectionAbortedError(errno.ECONNABORTED, _CUT_SHORT) from error
        raise


def _is_of_a_handler(error: OSError) -> bool:
    """Whether a signal handler raised it, in a frame below ours: its TimeoutError (the usual SIGALRM) is not the
    address's."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals is not globals()


# A shutdown() while connect() waits ends the wait with ECONNRESET, as a server may that resets what it has just taken;
# the kernel then undoes the whole connecting, the choice of the local address too. One before the connect() makes it
# return at once, connected or not, with both directions shut; what a server does shuts both only with an error. A unix
# socket does not tell the two apart, and connects without waiting.

_CUT_SHORT = "cut short by a shutdown() of the socket"


def _was_cut_short(sock: socket.socket, error: OSError) -> bool:
    if error.errno == errno.ECONNRESET:
        return sock.getsockname()[0] in ("0.0.0.0", "::")
    return error.errno == errno.ENOTCONN and _is_shut(sock)


def _is_shut(sock: socket.socket) -> bool:
    poller = select.poll()
    poller.register(sock, 0)
    return any(events & (select.POLLHUP | select.POLLERR) == select.POLLHUP for _, events in poller.poll(0))


# Failures, for other processes --------------------------------------------------------------------------------------

FAILURE_BYTES = 127
_OWN_ERRNOS = SHORTAGES | {errno.EACCES, errno.EPERM}
_OWN_ERRORS = (MemoryError, ImportError, NameError, TypeError, AttributeError, ConnectionAbortedError)


def says_nothing(cause: BaseException | None) -> bool:
    """Whether a dial failed for a reason of its own process, which tells other processes nothing about the server: no
    descriptor or memory left, no right to connect, a bug in a `dial` or hook, a dial that was cut short."""
    return isinstance(cause, _OWN_ERRORS) or (isinstance(cause, OSError) and cause.errno in _OWN_ERRNOS)


def pack_failure(error: DialError) -> bytes:
    """What other processes are told of a failed dial: kind of its cause, errno, text; at most FAILURE_BYTES."""
    cause = error.__cause__
    kind = "resolver" if isinstance(cause, socket.gaierror) else "os" if isinstance(cause, OSError) else "other"
    number = cause.errno if isinstance(cause, OSError) and cause.errno is not None else 0
    why = "; ".join(error.tried) or (f"{type(cause).__name__}: {cause}" if cause is not None else str(error))
    text = f"{kind}|{number}|{why}".replace("\0", "?").encode(errors="replace")
    return text[:FAILURE_BYTES].decode(errors="ignore").encode()


def unpack_failure(text: str) -> tuple[str, Exception | None]:
    """The text of what `pack_failure` made, and an error like the one that it was made of."""
    kind, _, rest = text.partition("|")
    number, separator, why = rest.partition("|")
    if not separator or not re.fullmatch(r"-?[0-9]{1,9}", number):  # whoever damages a slab writes what he likes
        return text, None
    if kind == "resolver":
        return why, socket.gaierror(int(number), why)
    if kind == "os" and int(number):
        return why, OSError(int(number), os.strerror(int(number)))
    if kind == "os":
        return why, TimeoutError(why) if "timed out" in why else ConnectionError(why)
    return why, ConnectionError(why)
