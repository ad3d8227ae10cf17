"""The sockets of a pool: `PooledSocket`, the kinds of connection (`BUCKETS`), and what is made of a dialled socket.

Imports only config, errors and the core. Not here: opening a connection (dialing), who may use it (the core).
"""

from __future__ import annotations

import _socket
import contextlib
import socket
import struct
import sys
from typing import Any

from . import _core
from .config import IPVersion, Protocol, Target
from .errors import DialError

__all__ = [
    "BUCKETS",
    "SOCKET_KINDS",
    "PooledSocket",
    "is_private",
    "kind_of",
    "pack_peer",
    "peer_of",
    "socket_and_metadata",
    "take_over",
    "unix_path",
]

# The order is that of the slab (SHM_BUCKETS in core/slab.h).
BUCKETS: tuple[tuple[Protocol, IPVersion | None], ...] = (
    (Protocol.TCP, IPVersion.V4),
    (Protocol.TCP, IPVersion.V6),
    (Protocol.UDP, IPVersion.V4),
    (Protocol.UDP, IPVersion.V6),
    (Protocol.UNIX, None),
)
_FAMILIES = {socket.AF_INET: IPVersion.V4, socket.AF_INET6: IPVersion.V6}
_PROTOCOLS = {socket.SOCK_STREAM: Protocol.TCP, socket.SOCK_DGRAM: Protocol.UDP}
# What socket.socket() must be told of a descriptor's bucket; -1: it looks (a dial may make unix sockets of any type).
SOCKET_KINDS = (
    (socket.AF_INET, socket.SOCK_STREAM, 0),
    (socket.AF_INET6, socket.SOCK_STREAM, 0),
    (socket.AF_INET, socket.SOCK_DGRAM, 0),
    (socket.AF_INET6, socket.SOCK_DGRAM, 0),
    (-1, -1, -1),
)


class PooledSocket(socket.socket):
    """A socket of the pool: an ordinary one that notes when its holder changes what the next holder relies on."""

    __slots__ = ("_mark",)
    CHANGED, RUINED = 1, 2

    def __init__(self, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None) -> None:  # noqa: A002
        self._mark = bytearray(1)
        super().__init__(family, type, proto, fileno)

    def settimeout(self, value: float | None, /) -> None:
        self._mark[0] |= self.CHANGED
        super().settimeout(value)

    def setblocking(self, flag: bool, /) -> None:
        self._mark[0] |= self.CHANGED
        super().setblocking(flag)

    def shutdown(self, how: int, /) -> None:
        self._mark[0] |= self.RUINED
        super().shutdown(how)

    def close(self) -> None:
        self._mark[0] |= self.RUINED
        super().close()

    def detach(self) -> int:
        self._mark[0] |= self.RUINED
        return super().detach()

    # One that was taken away from its holder is dropped, not closed, by the pool: the holder may be in a call. Not a
    # step of Python: an exception of a signal handler would vanish in it.
    __del__ = _socket.socket.close


def is_private(sock: socket.socket) -> bool:
    """TLS state lives in one process's memory. ssl is not imported for the question."""
    ssl = sys.modules.get("ssl")
    return ssl is not None and isinstance(sock, ssl.SSLSocket)


def take_over(sock: socket.socket) -> PooledSocket:
    """A PooledSocket in place of a dialled socket. Whatever interrupts this, one of the two closes the descriptor."""
    ours = PooledSocket.__new__(PooledSocket)
    try:
        ours.__init__(fileno=sock.fileno())  # type: ignore[misc]
        sock.detach()
    except BaseException:
        if sock.fileno() >= 0:
            socket.socket.detach(ours)
        else:
            socket.socket.close(ours)
        raise
    return ours


def socket_and_metadata(result: Any, who: str = "dial") -> tuple[socket.socket, bytes]:
    """What a dial (or an acceptor) returned, checked."""
    sock, metadata = result if isinstance(result, tuple) and len(result) == 2 else (result, b"")
    if not isinstance(sock, socket.socket) or not isinstance(metadata, bytes):
        raise TypeError(f"{who} must return a socket, or (socket, bytes), not {result!r:.200}")
    if sock.fileno() < 0:
        raise ValueError(f"{who} returned a closed socket")
    if len(metadata) > _core.MAX_METADATA:
        raise ValueError(f"{who} returned {len(metadata)} bytes of metadata; {_core.MAX_METADATA} is the most")
    return sock, metadata


def kind_of(sock: socket.socket, target: str) -> tuple[int, bytes]:
    """The bucket of a connected socket, and its peer as the slab stores it: address, port, nothing for unix.

    `target`: what the error calls what was dialled."""
    try:
        peer = sock.getpeername()
    except OSError as error:
        raise DialError(target=target) from error
    if sock.family == socket.AF_UNIX:
        return BUCKETS.index((Protocol.UNIX, None)), bytes(24)
    kind = (_PROTOCOLS.get(sock.type), _FAMILIES.get(sock.family))
    if kind not in BUCKETS:
        unfit = ValueError(f"dial must return a TCP, UDP or unix socket, not {sock.family!r} {sock.type!r}")
        raise DialError(target=target) from unfit
    host, port = peer[:2]
    packed = socket.inet_pton(sock.family, host.partition("%")[0])
    return BUCKETS.index(kind), packed.ljust(16, b"\0") + struct.pack("!H6x", port)


def unix_path(sock: socket.socket, target: Target | None) -> str:
    if target is not None:
        return target.path
    with contextlib.suppress(OSError):
        name = sock.getpeername()
        return name if isinstance(name, str) else "\0" + bytes(name)[1:].decode(errors="replace")
    return ""


def peer_of(bucket: int, address: bytes) -> tuple[str, int] | None:
    """(host, port) as the slab stores it; None for a unix socket."""
    version = BUCKETS[bucket][1]
    if version is None:
        return None
    family, size = (socket.AF_INET, 4) if version is IPVersion.V4 else (socket.AF_INET6, 16)
    (port,) = struct.unpack_from("!H", address, 16)
    return socket.inet_ntop(family, address[:size]), port


def pack_peer(peer: tuple[str, int] | str) -> bytes:
    """What the slab's peers begin with that are at this address, (address, port) or an address; ValueError."""
    try:
        host, port = (peer, None) if isinstance(peer, str) else peer
        packed = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host.partition("%")[0])
        return packed.ljust(16, b"\0") + (b"" if port is None else struct.pack("!H", port))
    except (OSError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise ValueError(f"{peer!r} is no address, nor (address, port)") from error
