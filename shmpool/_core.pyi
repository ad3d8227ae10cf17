"""Types of the C core (shmpool/core/module.c). tests/test_exports.py compares this list with the extension."""

import socket as _socket
from types import TracebackType
from typing import Any, Literal, final

from .config import IPVersion, Protocol

MAX_SLOTS: int
MAX_WORKERS: int
MAX_WAITERS: int
MAX_METADATA: int
FAMILY_BYTE: int
SLAB_VERSION: int
SLAB_MAGIC: bytes

def layout(slots: int, workers: int, waiters: int, /) -> tuple[int, int, int]: ...
def byte_is_locked(fd: int, byte: int, /) -> bool: ...
def remove_segment(path: str, slab_id: bytes, /) -> bool: ...
def family_join(fd: int, /) -> None: ...
def publish(private_path: str, public_path: str, /) -> None: ...

@final
class PooledConnection:
    """One lease of one connection, made by `Pool.get()`.

    Use it as a context manager: at the end of the block the connection goes back to the pool; after an exception it is
    retired, because the state of its protocol is unknown. Otherwise call `release()` or `discard()` once.

    A lease is of one use and belongs to the thread that took it. After it was given back, taken away, or in a forked
    child of the process that took it, every access raises LeaseExpired and changes nothing. A lease that is dropped
    without release is retired with a ResourceWarning.
    """

    @property
    def socket(self) -> _socket.socket:
        """This process's socket of the connection: the same object at each lease of the connection.

        Its timeout is the pool's `socket_timeout`; whatever the holder sets is put back at release. One that was
        closed, detached or shut down by the holder is retired at release. Do not keep it beyond the lease.
        """

    @property
    def session(self) -> Any:
        """Any object of this process for this connection, such as a protocol client; None until it is set.

        It stays with the connection in this process from lease to lease and is dropped when the connection ends. A
        forked child starts with None.
        """

    @session.setter
    def session(self, value: Any) -> None: ...
    @property
    def id(self) -> int:
        """Number of the connection, unique in the pool."""

    @property
    def protocol(self) -> Protocol: ...
    @property
    def ip_version(self) -> IPVersion | None:
        """None for a unix socket."""

    @property
    def peer(self) -> tuple[str, int] | str:
        """(host, port), or the path of a unix socket."""

    @property
    def created_at(self) -> float:
        """When the connection was opened, as time.time()."""

    @property
    def age(self) -> float:
        """Seconds since the connection was opened."""

    @property
    def reuse_count(self) -> int:
        """How many leases of this connection came before this one, over all processes."""

    @property
    def metadata(self) -> bytes:
        """What the `dial` callable returned beside the socket; b"" if nothing."""

    def release(self) -> None:
        """Give the connection back. Raises LeaseExpired when it was given back before, or taken away."""

    def discard(self, reason: str = "") -> None:
        """Retire the connection instead of giving it back: it is shut down for all processes, its permit is free."""

    def __enter__(self) -> PooledConnection: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...

class PoolBase:
    """The C half of `shmpool.Pool`."""

    def get(
        self,
        timeout: float | None = None,
        protocol: Protocol | Literal["tcp", "udp", "unix"] | None = None,
        ip_version: IPVersion | Literal[4, 6] | None = None,
    ) -> PooledConnection:
        """Lease a connection, waiting up to `timeout` seconds (None: the pool's `get_timeout`; 0: for nobody's return).

        In order: an idle connection this process used last; one from the shared list; one out of another process's
        cache; a new one, if the cap allows; what a dead process held; else the first that is returned, in the order of
        arrival. `protocol` and `ip_version` restrict the choice.

        Raises PoolTimeout, PoolClosed, DialError (the server cannot be reached; the permit is free again),
        PoolExhausted (more than `max_waiters` wait, or more than `max_workers` processes take part),
        NoConnectionForProtocol, NoConnectionForIPVersion, or what a signal handler raised meanwhile. Threads may call
        it at once; the interpreter's lock is released while waiting and dialling. It works in forked children as it is.
        """

    def try_get(
        self,
        protocol: Protocol | Literal["tcp", "udp", "unix"] | None = None,
        ip_version: IPVersion | Literal[4, 6] | None = None,
    ) -> PooledConnection:
        """Lease a connection without waiting for anybody's return: an idle one, or a new one if the cap allows.

        Raises PoolExhausted when there is neither; otherwise as `get()`.
        """

    def get_tcp(self, timeout: float | None = None) -> PooledConnection:
        """`get(timeout, protocol="tcp")`."""

    def get_udp(self, timeout: float | None = None) -> PooledConnection:
        """`get(timeout, protocol="udp")`."""

    def get_ipv4(self, timeout: float | None = None) -> PooledConnection:
        """`get(timeout, ip_version=4)`."""

    def get_ipv6(self, timeout: float | None = None) -> PooledConnection:
        """`get(timeout, ip_version=6)`."""

    def _create(
        self,
        fd: int,
        listener: int,
        capacities: tuple[int, int, int],
        born: tuple[bytes, float, int, str, str, str, str],
        settings: tuple[Any, ...],
        /,
    ) -> None: ...
    def _attach(self, socket: int, timeout: float, slab_id: bytes, settings: tuple[Any, ...], /) -> None: ...
    def _attach_copies(
        self, pid: int, slab: int, slab_id: bytes, theirs: list[int], listens: bool, settings: tuple[Any, ...], /
    ) -> None: ...
    def _answer(self, listener: int, /) -> None: ...
    def _unmake(self) -> None: ...
    def _note_path(self, path: str, /) -> None: ...
    def _identity(self) -> tuple[bytes, str]: ...
    def _mail(self, slot: int, connection: int, fd: int, /) -> bool: ...
    def _open(self, mask: int, /) -> bool: ...
    def _recover(self) -> int: ...
    def _expire(self) -> int: ...
    def _close_stale(self) -> int: ...
    def _shut(self) -> int: ...
    def _finish(self) -> bool: ...
    def _leave(self) -> None: ...
    def _left(self) -> bool: ...
    def _is_open(self) -> bool: ...
    def _counts(self) -> dict[str, int]: ...
    def _snapshot(self) -> dict[str, Any]: ...

@final
class SlabView:
    """A read-only look at the slab of descriptor `fd`; ValueError((why, is_version)) when it is none."""

    def __init__(self, fd: int) -> None: ...
    def snapshot(self) -> dict[str, Any]: ...
    def identity(self) -> tuple[bytes, str, str, str, int, int, bool]: ...
    def mailboxes(self) -> list[int]: ...
    def workers(self) -> list[int]: ...
    def in_use(self) -> bool: ...
    def close(self) -> None: ...
