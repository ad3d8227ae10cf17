"""Listening: the socket of a pool that accepts connections (`Pool.listen`), and what becomes of each client.

    bind -> the core (core/service.h: all members share the socket, one gets each client) -> client_of -> install

Whoever comes is nobody's request: a client that has gone by the time it is looked at, that an acceptor or `on_created`
does not want, or that fails its handshake, ends, and get() goes on waiting for the next. What get() raises is the
program's own: a fault in an acceptor, or that this process has no descriptors left.

Not here: who waits for whom (core/service.c), the life of an accepted connection (the same as of a dialled one).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
from typing import TYPE_CHECKING

from .config import PoolConfig, Protocol, Target
from .dialing import set_options
from .sockets import socket_and_metadata

if TYPE_CHECKING:
    from .config import Acceptor

__all__ = ["address_of", "bind", "client_of", "log_refusal", "take_client", "text_of"]

logger = logging.getLogger("shmpool.pool")
hooks_logger = logging.getLogger("shmpool.hooks")

_SHORT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def bind(target: Target, config: PoolConfig) -> socket.socket:
    """A socket that listens at `target`; what it accepts has its options. A unix path at which nobody listens any more
    is taken over. Raises OSError."""
    if target.scheme is Protocol.UNIX:
        _remove_stale(target.path)
        return _listen(socket.AF_UNIX, target.path, target.scheme, config)
    flags = socket.AI_PASSIVE | (0 if target.numeric_version is None else socket.AI_NUMERICHOST)
    found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM, flags=flags)
    family, _, _, _, address = found[0]
    return _listen(family, address, target.scheme, config)


def _listen(family: int, address: tuple[object, ...] | str, protocol: Protocol, config: PoolConfig) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if protocol is Protocol.TCP:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        set_options(sock, protocol, config)
        sock.bind(address)
        sock.listen(config.backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_stale(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)  # one whose queue is full is alive
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            except BlockingIOError:
                return


def remove(target: Target) -> None:
    """The pool is closed: its unix path goes."""
    if target.scheme is Protocol.UNIX:
        _remove_stale(target.path)


def address_of(listener: int) -> tuple[str, int] | str:
    """Where a descriptor listens: (address, port), or a path."""
    with socket.socket(fileno=os.dup(listener)) as sock:
        name = sock.getsockname()
        return name if isinstance(name, str) else (str(name[0]), int(name[1]))


def text_of(address: tuple[str, int] | str) -> str:
    """The target that an address is."""
    if isinstance(address, str):
        return f"unix://{address}"
    host, port = address
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def take_client(acceptor: Acceptor, listener: int, pool: str) -> tuple[socket.socket, bytes] | bool | None:
    """The client that the program's acceptor takes; None: nobody is there; False: nothing came of it.

    The acceptor gets a socket of its own for the shared listener, which does not block.
    """
    with socket.socket(fileno=os.dup(listener)) as sock:
        sock.setblocking(False)
        try:
            return socket_and_metadata(acceptor(sock), "an acceptor")
        except BlockingIOError:
            return None
        except OSError as error:  # TLS errors and timeouts, too
            if error.errno in _SHORT:
                raise
            text = "pool %r: nothing came of a client: %s"
            logger.debug(text, pool, error, extra={"pool": pool, "reason": "accept"})
            return False
        finally:
            os.set_blocking(listener, False)  # for all processes; it may have been changed by that socket


def client_of(fd: int) -> socket.socket:
    """A socket for an accepted descriptor, which is closed if this raises."""
    try:
        return socket.socket(fileno=fd)
    except BaseException:
        os.close(fd)
        raise


def log_refusal(error: BaseException, pool: str, slot: int, connection: int) -> None:
    """What on_created raised, or the ConnectionError that stands for its False. Raises what is no `Exception`."""
    if not isinstance(error, Exception):
        raise error
    extra = {"pool": pool, "slot": slot, "connection_id": connection, "reason": "refused"}
    if error.__traceback__ is None:
        logger.debug("pool %r: on_created refused connection %d", pool, connection, extra=extra)
    else:
        text = "on_created of pool %r raised %s for connection %d, which is refused"
        hooks_logger.error(text, pool, type(error).__name__, connection, exc_info=error, extra=extra)
