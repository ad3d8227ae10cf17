"""`Pool`: the Python half of a pool, and the policy that the C core asks for; `attach` and `pools`.

    get() -> core (core/pool.c: cache, free-list, steal, queue) --(an empty slot is ours)--> _dial -> core

The core calls the methods marked "for the core" below, with the slot in its hands. They may raise; the core gives the
slot back. Everything shared between processes is in the core; a Pool object has only settings.

A process comes by a pool in one of four ways: it makes it, it is forked from one that has it, it joins it by name, or
it unpickles it, which is a way of joining (`_join`).

Not here: the order of get() (core/pool.c), leases (core/module.c), opening a connection to a target (dialing), how
descriptors reach a process that did not inherit them (rendezvous).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import random
import resource
import secrets
import socket
import struct
import sys
import time
import weakref
from collections.abc import Callable
from multiprocessing import util
from types import TracebackType
from typing import Any

from . import _core, rendezvous, slab
from .config import IPVersion, PoolConfig, Protocol, Target
from .dialing import DialRequest, buckets_of, dial_target
from .errors import (
    DescriptorsLost,
    DialError,
    ForeignUser,
    InvalidConfig,
    NoConnectionForIPVersion,
    NoConnectionForProtocol,
    PoolClosed,
    PoolError,
    PoolExhausted,
    PoolExists,
    PoolNotFound,
    PoolTimeout,
    PoolUnreachable,
    SlabCorrupt,
    SlabVersionMismatch,
)
from .stats import PoolStats

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
_SOCKET_KINDS = (
    (socket.AF_INET, socket.SOCK_STREAM, 0),
    (socket.AF_INET6, socket.SOCK_STREAM, 0),
    (socket.AF_INET, socket.SOCK_DGRAM, 0),
    (socket.AF_INET6, socket.SOCK_DGRAM, 0),
    (-1, -1, -1),
)
_LIFETIME_JITTER = 0.1  # connections of one birth end within this share of their lifetime
_SPARE_DESCRIPTORS = 64  # left to the rest of the process when the limit is checked
_CLOSE_POLL_S = 0.002

JOIN_TIMEOUT_S = 10.0
_FIRST_PATIENCE_S, _LONGEST_PATIENCE_S = 0.1, 0.5  # for the descriptors; members that run send them in a millisecond
_JOIN_PAUSE_S = 0.002
_WORKER_LIMIT = (
    "the worker limit is reached: each process that uses the pool counts, and each Pool it has made or joined"
)

# By id. A plain dict: a copy of its values is atomic, while a WeakSet cannot be walked while another thread adds to it.
_pools: dict[int, weakref.ref[Pool]] = {}


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


class Pool(_core.PoolBase):
    """One pool of connections for many processes, under one cap.

        pool = Pool("tcp://127.0.0.1:6379", max_connections=32)     # before the fork
        with pool.get() as conn:
            conn.socket.sendall(b"PING\\r\\n")

    `target` is `tcp://host:port`, `udp://host:port` or `unix:///path`; instead of it `dial=` takes a callable that
    returns a connected socket, or (socket, metadata bytes). Other keywords are the fields of PoolConfig; or give a
    whole one as `config=`.

    Which processes: this one, its forked children (they use it as it is), and those that it is sent to by pickle, such
    as children of multiprocessing by whatever start method. With a `name`, every process of this user on this host that
    makes a Pool of that name: one creates it, however many begin at once, the others join it.

    Raises InvalidConfig (all problems at once; for a pool that exists: settings that its processes must agree on and
    that differ), PoolUnreachable (a pool of that name is alive, but nobody in it hands its descriptors over within 10
    s), PoolExhausted (more than max_workers processes), SlabCorrupt or SlabVersionMismatch (what bears the name is no
    pool that this process can use).

    Threads share a Pool. `close()` ends it for all processes; a process that merely exits, or calls `leave()`, leaves
    it to the others.
    """

    __slots__ = ("__weakref__", "_config", "_name", "_own_sockets", "_target")

    def __init__(self, target: str | None = None, *, config: PoolConfig | None = None, **settings: Any) -> None:
        if config is None:
            config = PoolConfig.from_dict({"target": target, **settings})
        elif not isinstance(config, PoolConfig):
            raise InvalidConfig(
                field="config", value=config, remedy="must be a PoolConfig; PoolConfig.from_dict() makes one"
            )
        elif target is not None or settings:
            given = ", ".join(["target"] * (target is not None) + sorted(settings))
            remedy = f"give it alone, without {given}; config.replace(...) changes single settings"
            raise InvalidConfig(field="config", value=config, remedy=remedy)
        if self._identity()[0]:
            raise RuntimeError(f"{self!r} is made already")
        self._take(config)
        if config.name is None:
            slab.reap()
            self._create_slab()
        else:
            self._join_or_create()
        self._register()

    def _register(self) -> None:
        key = id(self)
        _pools[key] = weakref.ref(self, lambda _: _pools.pop(key, None))

    def _take(self, config: PoolConfig) -> None:
        self._config = config
        self._target = Target.parse(config.target) if config.target is not None else None
        self._name = config.name or f"{os.getpid()}-{secrets.token_hex(4)}"
        self._own_sockets: dict[int, str] = {}  # by process: path, see `_listen`
        _reserve_descriptors(config.max_connections)

    # ---- how a process comes by a pool ------------------------------------------------------------------------------

    def _join_or_create(self) -> None:
        """Exactly one of all processes that want the name creates; what we met may have ended before we joined it."""
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        while True:
            try:
                return self._join(deadline)
            except PoolNotFound:
                pass
            except (SlabCorrupt, SlabVersionMismatch):
                if not slab.remove_remains(self._name):  # somebody's, or no slab at all
                    raise
            slab.reap()
            try:
                return self._create_slab()
            except PoolExists:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_JOIN_PAUSE_S)

    def _create_slab(self) -> None:
        config = self._config
        capacities = (config.max_connections, config.max_workers, config.max_waiters)
        size, _, _ = _core.layout(*capacities)
        slab_id = os.urandom(16)
        fd, path = slab.create(size, config.max_connections)
        listener, socket_path = -1, ""
        handed_over = False
        try:
            if config.name is not None:
                listener, socket_path = rendezvous.listen(slab_id)
            target = (self._target.text if self._target else _name_of(config.dial))[:255]
            born = (slab_id, time.time(), os.getuid(), self._name, target, config.to_json(), socket_path)
            settings = self._settings()
            handed_over = True
            self._create(fd, listener, capacities, born, settings)
            slab.publish(path, self._name)
            self._note_path(slab.path_of(self._name))
        except BaseException:
            if not handed_over:
                os.close(fd)
                if listener >= 0:
                    os.close(listener)
            self._unmake()
            try:
                os.unlink(path)
                rendezvous.remove(socket_path)
            except FileNotFoundError:  # it was published before the interrupt came, and others may have joined
                slab.remove_remains(self._name)
            raise

    def _settings(self) -> tuple[Any, ...]:
        """What this process wants of the pool, as the core takes it."""
        config = self._config
        options = (
            config.local_cache_size,
            config.alive_bypass,
            config.idle_timeout,
            config.clear_udp_buffer,
            config.udp_clear_timeout,
            config.udp_clear_max_packets,
            config.stats,
        )
        return options, config.get_timeout, self._whole_mask(), config.on_borrow, config.on_return

    def _join(self, deadline: float, path: str = "") -> None:
        """Join the living pool of our name: ask its members for the descriptors, at the path that its slab names (else
        at `path`), or help ourselves.

        Raises PoolNotFound when there is none, PoolUnreachable at the deadline.
        """
        begun = time.monotonic()
        patience = _FIRST_PATIENCE_S
        while True:
            with slab.view(self._name) as view:
                slab_id, _, theirs, its_path, _, _, is_open = view.identity()
                if not is_open:  # whoever closed it did not come to removing the name
                    slab.remove_own(self._name, slab_id)
                if not view.in_use() or not is_open:
                    raise PoolNotFound(name=self._name)
                self._agree(theirs)
                problem = self._join_by(view, slab_id, its_path or path, patience)
                if problem is None:
                    return
                pids = tuple(view.workers())
            if time.monotonic() > deadline:
                waited = time.monotonic() - begun
                raise PoolUnreachable(name=self._name, waited=waited, pids=pids) from problem
            time.sleep(_JOIN_PAUSE_S)
            patience = min(patience * 2, _LONGEST_PATIENCE_S)

    def _agree(self, theirs: str) -> None:
        try:
            wrong = self._config.disagreements(theirs)
        except (ValueError, TypeError, RecursionError) as error:
            raise SlabCorrupt(name=self._name, detail=f"its settings cannot be read: {error}") from error
        if wrong:
            raise InvalidConfig.many(wrong)

    def _join_by(self, view: _core.SlabView, slab_id: bytes, path: str, patience: float) -> Exception | None:
        """Ask whoever listens at `path`, else copy what some member has; what went wrong, None: nothing."""
        for pool in pools():
            if pool._identity()[0] == slab_id:
                with contextlib.suppress(PoolError):
                    pool._answer(-1)  # this process may be the only one awake
        try:
            with rendezvous.ask(path) as sock:
                self._attached(lambda: self._attach(sock.fileno(), patience, slab_id, self._settings()))
            return None
        except (OSError, LookupError) as error:
            problem = error
        fd = slab.open_checked(self._name, writable=True)
        try:
            for pid, theirs, listens in rendezvous.holders(view):
                with contextlib.suppress(OSError, LookupError):
                    self._copy(fd, slab_id, pid, theirs, listens)
                    return None
        finally:
            os.close(fd)
        return problem

    def _copy(self, fd: int, slab_id: bytes, pid: int, theirs: list[int], listens: bool) -> None:
        rendezvous.hold(fd, slab.path_of(self._name))
        self._attached(lambda: self._attach_copies(pid, fd, slab_id, theirs, listens, self._settings()))

    def _attached(self, attach: Callable[[], None]) -> None:
        """Raises OSError when the descriptors do not come whole, LookupError when they are not those of the slab."""
        try:
            attach()
        except IndexError:
            raise PoolExhausted(reason=_WORKER_LIMIT, limit=self._config.max_workers) from None
        except ValueError as error:
            raise SlabCorrupt(name=self._name, detail=str(error.args[0])) from None
        self._note_path(slab.path_of(self._name))

    # ---- what is asked of a pool ------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The name that `shmpool stats NAME` takes; a random one when none was given."""
        return self._name

    @property
    def config(self) -> PoolConfig:
        return self._config

    @property
    def closed(self) -> bool:
        """Whether the pool was closed, by whichever process."""
        return not self._is_open()

    def stats(self) -> PoolStats:
        """One snapshot over all processes. Takes no lock and writes nothing."""
        return PoolStats.from_snapshot(self._snapshot())

    def recover(self) -> int:
        """Look for dead processes now and take back what they held; returns how many connections were freed.

        Nobody has to call it: a get() that finds nothing does the same, and so does each waiter. Any process may, at
        any time. Raises PoolClosed after close() or leave().
        """
        if self.closed:
            raise PoolClosed(pool=self._name, left=self._left())
        return self._recover()

    def maintain(self) -> None:
        """Do now what is due: take back what dead processes held, retire connections past `max_lifetime` or
        `idle_timeout`, close this process's copies of ended connections, open new ones up to `min_connections`.

        Any process may call it, at any time and at once with others. Raises DialError when the server cannot be
        reached, PoolClosed after close().
        """
        if self.closed:
            raise PoolClosed(pool=self._name, left=self._left())
        self._recover()
        self._expire()
        self._close_stale()
        for _ in range(self._config.effective_min_connections - self._open_connections()):
            if not self._open(self._whole_mask()):
                break

    def close(self, timeout: float = 0.0) -> int:
        """Close the pool for all processes; returns how many leases are still out.

        Idle connections are retired at once, waiting calls get PoolClosed in every process, and so does each get() from
        now on. Leased connections stay with their holders and are retired at release; `timeout` seconds are spent
        waiting for that. The pool's name is free when this returns. Closing a pool that is closed, or that this process
        has left, does nothing.
        """
        deadline = time.monotonic() + timeout
        if self._left():
            return 0
        slab_id, _ = self._identity()
        self._shut()
        slab.remove_own(self._name, slab_id)
        self._remove_own_socket()
        while (out := self._leases_out()) and time.monotonic() < deadline:
            time.sleep(_CLOSE_POLL_S)
            self._recover()  # a holder may die meanwhile
        self._finish()
        return out

    def leave(self) -> None:
        """This process takes no further part: its leases are retired, its place is given back, get() raises PoolClosed.

        The others keep the pool and all idle connections; with the last one it ends. A process that exits leaves by
        itself. Leaving once more does nothing.
        """
        self._leave()
        self._remove_own_socket()
        slab.remove_remains(self._name)

    def _remove_own_socket(self) -> None:
        if path := self._own_sockets.pop(os.getpid(), ""):
            rendezvous.remove(path)

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        """The end of a `with` block closes a pool without a name, and leaves one with a name to its other processes."""
        if self._config.name is None:
            self.close()
        else:
            self.leave()

    def __repr__(self) -> str:
        source = self._target.text if self._target else _name_of(self._config.dial)
        state = "left" if self._left() else "closed" if self.closed else "open"
        return f"<shmpool.Pool {self._name!r} to {source}, {state}, max_connections={self._config.max_connections}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """A pool travels as its settings and the path at which its descriptors can be asked for. In a process that has
        the pool already, it is that one."""
        if self.closed:
            raise PoolClosed(pool=self._name, left=self._left())
        for setting, value in self._config.to_dict().items():
            if callable(value):
                _check_picklable(setting, value)
        slab_id, path = self._identity()
        path = path or self._listen()
        self._answer(-1)
        return _unpickled, (self._config, self._name, slab_id, path)

    def _listen(self) -> str:
        """Where this process answers newcomers of a pool without a name; it begins to when it first pickles it."""
        if path := self._own_sockets.get(os.getpid()):
            return path
        listener, path = rendezvous.listen(self._identity()[0], secrets.token_hex(4))
        first = self._own_sockets.setdefault(os.getpid(), path)
        if first != path:  # another thread's
            os.close(listener)
            rendezvous.remove(path)
            return first
        try:
            self._answer(listener)
        except BaseException:
            del self._own_sockets[os.getpid()]
            rendezvous.remove(path)
            raise
        return path

    def __copy__(self) -> Pool:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Pool:
        return self

    def __del__(self) -> None:
        # Nothing was taken when the constructor raised; at interpreter exit the modules may be gone.
        if not sys.is_finalizing() and self._identity()[0]:
            self.leave()

    def _leases_out(self) -> int:
        counts = self._counts()
        return counts["leased"] + counts["dialing"] + counts["checking"]

    def _open_connections(self) -> int:
        counts = self._counts()
        return sum(counts.values()) - counts["empty"] - counts["retiring"]

    # ---- for the core -----------------------------------------------------------------------------------------------

    def _whole_mask(self) -> int:
        """The buckets that this pool can ever have."""
        kinds = set(BUCKETS) if self._target is None else buckets_of(self._target)
        return sum(1 << index for index, kind in enumerate(BUCKETS) if kind in kinds)

    def _no_such_kind(self, protocol: object, ip_version: object) -> Exception:
        """The exception for a kind of connection that this pool can never have."""
        if protocol is not None and not isinstance(protocol, str):
            return TypeError(f"protocol must be 'tcp', 'udp' or 'unix', not {protocol!r}")
        whole = [kind for index, kind in enumerate(BUCKETS) if self._whole_mask() >> index & 1]
        fitting = [kind for kind in whole if protocol is None or kind[0] == protocol]
        if not fitting:
            available = tuple(dict.fromkeys(kind[0].value for kind in whole))
            return NoConnectionForProtocol(protocol=str(protocol), available=available)
        versions = tuple(sorted({int(kind[1]) for kind in fitting if kind[1] is not None}))
        if not isinstance(ip_version, int):
            return TypeError(f"ip_version must be 4 or 6, not {ip_version!r}")
        return NoConnectionForIPVersion(ip_version=int(ip_version), available=versions)

    def _protocol_of(self, bucket: int) -> Protocol:
        return BUCKETS[bucket][0]

    def _ip_version_of(self, bucket: int) -> IPVersion | None:
        return BUCKETS[bucket][1]

    def _wrap(self, fd: int, bucket: int) -> tuple[PooledSocket, bytearray]:
        """This process's socket for a descriptor from a mailbox. The descriptor is closed if this raises."""
        sock = PooledSocket.__new__(
            PooledSocket
        )  # exists before it owns the descriptor: one of the two is closed, not both
        try:
            sock.__init__(*_SOCKET_KINDS[bucket], fileno=fd)  # type: ignore[misc]
            self._restore(sock)
        except BaseException:
            if sock.fileno() < 0:
                os.close(fd)
            socket.socket.close(sock)
            raise
        return sock, sock._mark

    def _restore(self, sock: socket.socket) -> bool:
        """Give a socket the pool's mode again; False when its holder has ended it."""
        mark = sock._mark if isinstance(sock, PooledSocket) else None
        if sock.fileno() < 0 or (mark is not None and mark[0] & PooledSocket.RUINED):
            return False
        if sock.gettimeout() != self._config.socket_timeout or mark is not None:
            sock.settimeout(self._config.socket_timeout)
        if mark is not None:
            mark[0] = 0
        return True

    def _peer(self, bucket: int, address: bytes, sock: socket.socket) -> tuple[str, int] | str:
        version = BUCKETS[bucket][1]
        if version is None:
            return _unix_path(sock, self._target)
        family, size = (socket.AF_INET, 4) if version is IPVersion.V4 else (socket.AF_INET6, 16)
        (port,) = struct.unpack_from("!H", address, 16)
        return socket.inet_ntop(family, address[:size]), port

    def _error(self, kind: str, mask: int, waited: float, timeout: float) -> PoolError:
        """The exception for something the core cannot give."""
        if kind == "closed":
            return PoolClosed(pool=self._name, left=self._left())
        if kind == "damaged":
            return SlabCorrupt(name=self._name, detail="a slot is in a state that does not exist")
        if kind == "descriptors":
            return DescriptorsLost(pool=self._name)
        if kind == "user":
            return ForeignUser(pool=self._name, uid=os.geteuid(), owner=self._snapshot()["uid"])
        counts = self._counts()
        if kind == "timeout":
            protocol, version = (None, None) if mask == self._whole_mask() else self._wanted(mask)
            return PoolTimeout(
                waited=waited,
                timeout=timeout,
                counts=counts,
                protocol=None if protocol is None else protocol.value,
                ip_version=None if version is None else int(version),
            )
        limits = {
            "exhausted": ("all connections are in use", self._config.max_connections),
            "waiters": ("the waiter limit is reached", self._config.max_waiters),
            "workers": (_WORKER_LIMIT, self._config.max_workers),
        }
        reason, limit = limits[kind]
        return PoolExhausted(reason=reason, counts=counts, limit=limit)

    def _wanted(self, mask: int) -> tuple[Protocol | None, IPVersion | None]:
        """The protocol and version that all buckets of a mask have in common."""
        kinds = [kind for index, kind in enumerate(BUCKETS) if mask >> index & 1]
        protocols, versions = {kind[0] for kind in kinds}, {kind[1] for kind in kinds}
        return (protocols.pop() if len(protocols) == 1 else None, versions.pop() if len(versions) == 1 else None)

    def _dial(self, mask: int, left: float, slot: int, connection: int, timeout: float) -> tuple[Any, ...]:
        """Open connection number `connection` for `slot`, within `left` of the `timeout` seconds that get() was given.

        After a failure up to `dial_retries` times more, with a growing pause between.
        """
        config = self._config
        deadline = time.monotonic() + left
        protocol, version = self._wanted(mask)
        pause = config.dial_backoff[0]
        attempt = 0
        while True:
            attempt += 1
            limit = min(config.connection_timeout, max(0.0, deadline - time.monotonic()))
            mailed: list[bool] = []

            def predeposit(sock: socket.socket, mailed: list[bool] = mailed) -> None:
                mailed[:] = [self._mail(slot, connection, sock.fileno())]

            request = DialRequest(protocol, version, limit, attempt, predeposit)
            try:
                return self._accept(*self._call_dial(request), mask, mailed == [True])
            except DialError as error:
                late = time.monotonic() - deadline
                if late >= 0:
                    raise PoolTimeout(waited=timeout + late, timeout=timeout, counts=self._counts()) from error
                if attempt > config.dial_retries:
                    raise
                time.sleep(min(pause * random.uniform(0.5, 1.0), -late))
                pause = min(pause * 2, config.dial_backoff[1])

    def _call_dial(self, request: DialRequest) -> tuple[socket.socket, bytes]:
        """Call the dial of this pool; every failure of it is a DialError with its cause."""
        started = time.monotonic()
        try:
            if self._target is not None:
                return dial_target(self._target, request, self._config), b""
            assert self._config.dial is not None
            result: Any = self._config.dial(request)
            try:
                return _socket_and_metadata(result)
            except BaseException:
                for each in result if isinstance(result, tuple) else (result,):
                    if isinstance(each, socket.socket):
                        each.close()
                raise
        except PoolError:
            raise
        except Exception as error:
            source = self._target.text if self._target else _name_of(self._config.dial)
            waited = time.monotonic() - started
            raise DialError(target=source, attempt=request.attempt, waited=waited) from error

    def _accept(self, sock: socket.socket, metadata: bytes, mask: int, mailed: bool) -> tuple[Any, ...]:
        """Take a dialled socket over: what the core's install() wants."""
        try:
            bucket, address = _kind_of(sock)
            if not mask >> bucket & 1:
                protocol, version = BUCKETS[bucket]
                wanted = self._wanted(mask)
                if wanted[0] not in (None, protocol):
                    raise NoConnectionForProtocol(protocol=str(wanted[0]), available=(protocol.value,))
                raise NoConnectionForIPVersion(ip_version=_as_int(wanted[1]), available=_versions(version))
            private = _is_private(sock)
            ours = sock if private else _take_over(sock)
            sock = ours
            self._restore(ours)
            mark = ours._mark if isinstance(ours, PooledSocket) else bytearray(1)
            lifetime = self._config.max_lifetime * random.uniform(1 - _LIFETIME_JITTER, 1)
            return ours, mark, ours.fileno(), bucket, private, mailed and not metadata, lifetime, address, metadata
        except BaseException:
            sock.close()
            raise


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _as_int(version: IPVersion | int | None) -> int:
    return int(version) if isinstance(version, int) else 0


def _versions(version: IPVersion | None) -> tuple[int, ...]:
    return () if version is None else (int(version),)


def _name_of(dial: Callable[..., object] | None) -> str:
    name = getattr(dial, "__qualname__", None)
    return f"{getattr(dial, '__module__', '?')}.{name}" if name else repr(dial)


def _is_private(sock: socket.socket) -> bool:
    """TLS state lives in one process's memory. ssl is not imported for the question."""
    ssl = sys.modules.get("ssl")
    return ssl is not None and isinstance(sock, ssl.SSLSocket)


def _take_over(sock: socket.socket) -> PooledSocket:
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


def _socket_and_metadata(result: Any) -> tuple[socket.socket, bytes]:
    """What a dial returned, checked."""
    sock, metadata = result if isinstance(result, tuple) and len(result) == 2 else (result, b"")
    if not isinstance(sock, socket.socket) or not isinstance(metadata, bytes):
        raise TypeError(f"dial must return a socket, or (socket, bytes), not {result!r:.200}")
    if sock.fileno() < 0:
        raise ValueError("dial returned a closed socket")
    if len(metadata) > _core.MAX_METADATA:
        raise ValueError(f"dial returned {len(metadata)} bytes of metadata; {_core.MAX_METADATA} is the most")
    return sock, metadata


def _kind_of(sock: socket.socket) -> tuple[int, bytes]:
    """The bucket of a connected socket, and its peer as the slab stores it: address, port, nothing for unix."""
    try:
        peer = sock.getpeername()
    except OSError as error:
        raise DialError(target="dial") from error
    if sock.family == socket.AF_UNIX:
        return BUCKETS.index((Protocol.UNIX, None)), bytes(24)
    kind = (_PROTOCOLS.get(sock.type), _FAMILIES.get(sock.family))
    if kind not in BUCKETS:
        unfit = ValueError(f"dial must return a TCP, UDP or unix socket, not {sock.family!r} {sock.type!r}")
        raise DialError(target="dial") from unfit
    host, port = peer[:2]
    packed = socket.inet_pton(sock.family, host.partition("%")[0])
    return BUCKETS.index(kind), packed.ljust(16, b"\0") + struct.pack("!H6x", port)


def _unix_path(sock: socket.socket, target: Target | None) -> str:
    if target is not None:
        return target.path
    with contextlib.suppress(OSError):
        name = sock.getpeername()
        return name if isinstance(name, str) else "\0" + bytes(name)[1:].decode(errors="replace")
    return ""


def _reserve_descriptors(connections: int) -> None:
    """Each process needs a mailbox and a copy for each connection: see that the limit allows it, raise the soft one."""
    in_use = len(os.listdir("/proc/self/fd"))
    needed = in_use + 2 * connections + _SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        remedy = (
            f"each process needs {needed} descriptors (two a connection, {in_use} open, {_SPARE_DESCRIPTORS} spare), "
            f"but the hard limit is {hard}; lower max_connections to "
            f"{max(0, (hard - in_use - _SPARE_DESCRIPTORS) // 2)} or raise the limit (ulimit -Hn, LimitNOFILE=)"
        )
        raise InvalidConfig(field="max_connections", value=connections, remedy=remedy)
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


# ---- other ways to a pool --------------------------------------------------------------------------------------------


def attach(name: str, *, timeout: float = JOIN_TIMEOUT_S, **settings: Any) -> Pool:
    """Join the living pool `name` of this user; never creates one.

    The settings are the pool's; `settings` may change those that each process has of its own (such as `get_timeout`,
    `connection_timeout`, `local_cache_size`), and give those that only a program can: the hooks, and `dial` of a pool
    that was made with one.

    Raises PoolNotFound (no living process has it), PoolUnreachable (nobody in it handed its descriptors over in
    `timeout` seconds), InvalidConfig (a setting that differs from the pool's, a `dial` that is missing), PoolExhausted
    (more than max_workers processes), SlabCorrupt or SlabVersionMismatch.
    """
    with slab.view(name) as view:
        _, _, text, path, _, _, is_open = view.identity()
        if not view.in_use() or not is_open:
            raise PoolNotFound(name=name)
    if not path:
        remedy = "this pool was made without a name=, for its own family: only its processes have it"
        raise InvalidConfig(field="name", value=name, remedy=remedy)
    try:
        config = PoolConfig.from_json(text, **settings)
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidConfig):
            raise
        raise SlabCorrupt(name=name, detail=f"its settings cannot be read: {error}") from error
    pool = Pool.__new__(Pool)
    pool._take(config)
    pool._join(time.monotonic() + timeout)
    pool._register()
    return pool


def pools() -> list[Pool]:
    """The open pools of this process."""
    return [pool for pool in _known() if not pool.closed]


def _known() -> list[Pool]:
    return [pool for reference in list(_pools.values()) if (pool := reference()) is not None]


def _unpickled(config: PoolConfig, name: str, slab_id: bytes, path: str) -> Pool:
    """The pool that was pickled: what this process has of it already, else a new member."""
    for pool in pools():
        if pool._identity()[0] == slab_id:
            return pool
    pool = Pool.__new__(Pool)
    pool._take(config)
    pool._name = name
    pool._join(time.monotonic() + JOIN_TIMEOUT_S, path)
    pool._register()
    return pool


def _check_picklable(setting: str, value: Any) -> None:
    try:
        pickle.dumps(value)
    except Exception as error:
        why = f"a Pool travels with its callables, but {setting}={value!r:.200} cannot be pickled"
        raise TypeError(f"{why} ({error}); define it at the top level of a module") from error


# ---- the end of a process --------------------------------------------------------------------------------------------


def _leave_all() -> None:
    for pool in _known():
        pool.leave()


def _leave_with_multiprocessing(_: object = None) -> None:
    """multiprocessing joins its children at exit; one that is being spawned may yet have to ask us for the pool. So we
    leave after that: its finalizers of negative priority come last. (Its own children run these, and no atexit.)"""
    global _leaving_pid
    _leaving_pid = os.getpid()
    util.Finalize(None, _leave_all, exitpriority=-100)


@atexit.register
def _leave_at_exit() -> None:
    if _leaving_pid != os.getpid():  # forked behind Python's back, so that the finalizer is another process's
        _leave_all()


_leaving_pid = 0
_leave_with_multiprocessing()
os.register_at_fork(after_in_child=_leave_with_multiprocessing)
util.register_after_fork(Pool, _leave_with_multiprocessing)  # its forked children forget what was registered before
