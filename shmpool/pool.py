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
import errno
import logging
import math
import os
import random
import resource
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import _core, rendezvous, serving, slab
from .config import IPVersion, PoolConfig, Protocol, Target, checked_timeout
from .dialing import DialRequest, buckets_of, dial_target, pack_failure, says_nothing, unpack_failure
from .errors import (
    SHORTAGES,
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
    shortage,
)
from .hooks import ClosedConnection, call_on_close
from .maintenance import Maintenance, maintain_now
from .sockets import (
    BUCKETS,
    SOCKET_KINDS,
    PooledSocket,
    is_private,
    kind_of,
    pack_peer,
    peer_of,
    socket_and_metadata,
    take_over,
    unix_path,
)

if TYPE_CHECKING:
    from .events import EventBatch
    from .stats import PoolStats

_LIFETIME_JITTER = 0.1  # connections of one birth end within this share of their lifetime
SPARE_DESCRIPTORS = 64  # left to the rest of the process when the limit is checked
_POLL_S = 0.002

_LEAST_HOOK_S = 0.01  # what on_created has at least, however long the dial took
_DIAL_PATIENCE_S = 0.5
_OTHERS_PATIENCE_S = 0.2  # of maintain(), for dials that others have begun
DRAIN_TIMEOUT_S = 30.0
JOIN_TIMEOUT_S = 10.0
_FIRST_PATIENCE_S, _LONGEST_PATIENCE_S = 0.1, 0.5  # for the descriptors; members that run send them in a millisecond
_JOIN_PAUSE_S = 0.002
_BIND_PATIENCE_S = 1.0
_WORKER_LIMIT = (
    "the worker limit is reached: each process that uses the pool counts, and each Pool it has made or joined"
)

logging.getLogger("shmpool").addHandler(logging.NullHandler())  # the program says where it goes, or it goes nowhere
logger = logging.getLogger("shmpool.pool")
dial_logger = logging.getLogger("shmpool.dialing")
_LEVELS = {  # of the ends of connections; others are DEBUG
    "broken": logging.INFO,
    "unhealthy": logging.WARNING,
    "owner_died": logging.WARNING,
    "leaked": logging.WARNING,
    "revoked": logging.WARNING,
}

# By id. A plain dict: a copy of its values is atomic, while a WeakSet cannot be walked while another thread adds to it.
_pools: dict[int, weakref.ref[Pool]] = {}


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

    __slots__ = (
        "__weakref__",
        "_config",
        "_dialled",
        "_dialling",
        "_interrupted",
        "_maintenance",
        "_name",
        "_own_sockets",
        "_target",
    )

    def __init__(self, target: str | None = None, *, config: PoolConfig | None = None, **settings: Any) -> None:
        if config is None:
            given = {"target": target, **settings}
            config = PoolConfig.from_url(target, **settings) if isinstance(target, str) else PoolConfig.from_dict(given)
        elif not isinstance(config, PoolConfig):
            raise InvalidConfig(
                field="config", value=config, remedy="must be a PoolConfig; PoolConfig.from_dict() makes one"
            )
        elif target is not None or settings:
            names = ", ".join(["target"] * (target is not None) + sorted(settings))
            remedy = f"give it alone, without {names}; config.replace(...) changes single settings"
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

    @classmethod
    def listen(cls, address: str, **settings: Any) -> Pool:
        """A pool of client connections: it accepts at `address` (`tcp://0.0.0.0:9000`, `tcp://[::]:9000`,
        `unix:///path`; port 0: the kernel chooses) instead of dialling.

            pool = Pool.listen("tcp://127.0.0.1:8080", max_connections=1000)     # before the fork
            while True:
                with pool.get(timeout=math.inf) as conn:                         # in each worker
                    serve_one_request(conn.socket)

        get() returns the next client connection that is new or has something to read, in whichever process and thread
        waits for one. Released connections stay open and are watched until they speak again; any worker may get the
        next request. So nothing may be read ahead: what a worker has taken off the socket, it has to answer.

        Settings are those of PoolConfig. `max_connections` limits the clients that are connected; others wait in the
        kernel's queue (`backlog`) until one goes. When none goes for a second, the one that has been silent for longest
        has to (`evicted`), as a server closes keep-alive connections that it needs for others: so give it more than
        there are clients at a time. `max_idle_connections` and `idle_timeout` say how many may be silent,
        and for how long. `on_created` sees each client before anybody has it; one that it refuses, by raising or by
        returning False, ends, and get() goes on (what was raised goes to the log "shmpool.hooks"). `acceptor` takes a
        client from the listening socket in place of accept(): it gets that socket and returns a socket, or (socket,
        metadata); a connection that only one process can use, such as one with TLS, serves a single lease.

        A listener for both IP versions (`tcp://[::]`) gives whoever speaks: `ip_version` does not choose among them.

        Raises InvalidConfig, OSError (the address is in use, or not this host's), and what Pool() raises.
        """
        return cls(address, listening=True, **settings)

    def _register(self) -> None:
        key = id(self)
        _pools[key] = weakref.ref(self, lambda _: _pools.pop(key, None))
        if not self._maintenance.start(self):
            self._remind()

    def _take(self, config: PoolConfig) -> None:
        self._config = config
        target = config.target
        self._target = None if target is None else Target.parse(target, listening=config.listening)
        self._name = config.name or f"{os.getpid()}-{os.urandom(4).hex()}"
        self._own_sockets: dict[int, str] = {}  # by process: path, see `_listen`
        self._maintenance = Maintenance()
        self._dialling: dict[tuple[int, int], socket.socket] = {}  # by process, thread: what it connects this moment
        self._interrupted: set[int] = set()  # threads whose dial was ended by `_interrupt_dials`
        self._dialled: dict[int, tuple[float, float, float]] = {}  # by thread: `_welcome`

    # ---- how a process comes by a pool ------------------------------------------------------------------------------

    def _join_or_create(self) -> None:
        """Exactly one of all processes that want the name creates; what we met may have ended before we joined it."""
        begun = time.monotonic()
        deadline = begun + JOIN_TIMEOUT_S
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
            except OSError as error:  # a listening pool: another process of ours may be about to publish it
                if error.errno != errno.EADDRINUSE or time.monotonic() > begun + _BIND_PATIENCE_S:
                    raise
            time.sleep(_JOIN_PAUSE_S)

    def _create_slab(self) -> None:
        try:
            self._make_slab()
        except OSError as error:
            if error.errno not in SHORTAGES:
                raise
            raise shortage(error, f"pool {self._name!r} cannot be made") from error

    def _make_slab(self) -> None:
        config = self._config
        slots = _slots_for(config)
        _reserve_descriptors(slots, config)
        capacities = (config.max_connections, slots, config.max_workers, config.max_waiters)
        size, _, _ = _core.layout(*capacities[1:])
        slab_id = os.urandom(16)
        fd, path = slab.create(size, config.max_connections)
        listener, socket_path = -1, ""
        clients: socket.socket | None = None
        handed_over = False
        try:
            if config.name is not None:
                listener, socket_path = rendezvous.listen(slab_id)
            target = self._source()[:255]
            if config.listening and self._target is not None:
                clients = serving.bind(self._target, config)
                target = serving.text_of(serving.address_of(clients.fileno()))
            born = (slab_id, time.time(), os.getuid(), self._name, target, config.to_slab(), socket_path)
            settings = self._settings()
            handed_over = True
            self._create(fd, listener, capacities, born, settings)
            if clients is not None:
                self._serve(clients.fileno())
                clients.detach()
            slab.publish(path, self._name)
            self._note_path(slab.path_of(self._name))
            self._log(logging.INFO, "pool %r is created: %s", target, reason="created")
        except BaseException:
            if not handed_over:
                os.close(fd)
                if listener >= 0:
                    os.close(listener)
            if clients is not None:
                clients.close()
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
        idle_limit = 0 if config.max_idle_connections is None else config.max_idle_connections + 1
        options = (
            0 if config.listening else config.local_cache_size,  # its get() goes another way
            config.alive_bypass,
            config.idle_timeout,
            config.clear_udp_buffer,
            config.udp_clear_timeout,
            config.udp_clear_max_packets,
            config.stats,
            config.effective_min_connections,
            idle_limit,
        )
        dials = (
            *config.dial_backoff,
            config.connection_timeout,
            config.dial_retries,
            config.when_down == "wait",
        )
        borrowed = self._maintenance.takers.noting(config.on_borrow) if config.leak_stacks else config.on_borrow
        created = None if config.on_created is None else _welcome_of(weakref.ref(self))
        hooks = borrowed, config.on_return, created, config.acceptor is not None
        return options, dials, config.get_timeout, self._whole_mask(), *hooks

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
                _reserve_descriptors(view.capacity(), self._config)
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
        self._log(logging.INFO, "pool %r is joined", reason="joined")

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

    @property
    def state(self) -> str:
        """ "open", "paused", "draining" or "closed", over all processes."""
        return "closed" if self.closed else self._state()

    @property
    def address(self) -> tuple[str, int] | str:
        """Where a listening pool accepts clients: (address, port), or the path. Raises PoolClosed."""
        if not self._config.listening:
            raise RuntimeError(f"{self!r} does not listen; Pool.listen() makes one that does")
        self._refuse_closed()
        return serving.address_of(self._listener())

    @property
    def max_connections(self) -> int:
        """The cap over all processes as it is now; resize() changes it."""
        return self._limits()[0]

    def stats(self) -> PoolStats:
        """One snapshot over all processes. Takes no lock and writes nothing."""
        from .stats import PoolStats

        return PoolStats.from_snapshot(self._snapshot())

    def events(self, after: int = 0, *, patient: bool = False) -> EventBatch:
        """What happened to the pool in any process, from event number `after` on, as far as it is kept (1024 events).

        `patient=True`, to follow: the batch ends before an event that is being written this moment.
        """
        from .events import read_events

        return read_events(self._events, after, patient)

    def recover(self) -> int:
        """Look for dead processes now and take back what they held; returns how many connections were freed.

        Nobody has to call it: a get() that finds nothing does the same, and so does each waiter. Any process may, at
        any time. Raises PoolClosed after close() or leave().
        """
        self._refuse_closed()
        return self._recover()

    def maintain(self) -> None:
        """Do now, in this thread, what maintenance does in the background every `maintenance_interval`: take back what
        dead processes held, end connections past `max_lifetime` or `idle_timeout`, check idle ones, report overdue
        leases, close this process's copies of ended connections, open new ones up to `min_connections`.

        Any process may call it, at any time and at once with others. Raises DialError when the server cannot be
        reached, PoolClosed after close() or leave().
        """
        self._refuse_closed()
        maintain_now(self)
        deadline = time.monotonic() + _OTHERS_PATIENCE_S
        while (short := self._is_short()) and self._counts()["dialing"] and time.monotonic() < deadline:
            time.sleep(_POLL_S)  # another process, or the background, finds out
        if short and self.state == "open" and self._upstream()[0] in ("down", "probing"):
            raise self._down_error()

    def _is_short(self) -> bool:
        """Whether fewer than min_connections are open, and could be used."""
        counts = self._counts()
        there = sum(counts.values()) - counts["empty"] - counts["retiring"] - counts["dialing"]
        return there < self._config.effective_min_connections

    def wait_ready(self, timeout: float | None = None) -> None:
        """Wait until `min_connections` are open, at most `timeout` seconds (None: the pool's get_timeout).

        They are opened in the background, by whichever process does it; in one without a maintenance thread this call
        opens them. Raises PoolTimeout, with the last dial's error as its cause, or PoolClosed.
        """
        timeout = self._config.get_timeout if timeout is None else checked_timeout(timeout)
        begun = time.monotonic()
        while True:
            self._refuse_closed()
            if not self._is_short():
                return
            if not self._maintenance.is_running():
                with contextlib.suppress(DialError, PoolTimeout):
                    self._open(self._whole_mask(), max(0.001, begun + timeout - time.monotonic()))
            waited = time.monotonic() - begun
            if waited >= timeout:
                raise self._error("timeout", self._whole_mask(), waited, timeout)
            time.sleep(_POLL_S)

    # ---- steering ---------------------------------------------------------------------------------------------------

    def resize(self, max_connections: int) -> None:
        """Change the cap, for all processes, to `min_connections` .. `resize_limit` (without one: twice the
        `max_connections` that the pool was made with, or what the limit of descriptors allowed).

        A larger cap serves waiting callers at once. For a smaller one idle connections beyond it end now, leased ones
        when they are returned; nothing new is opened until fewer are open than the new cap allows.

        Raises InvalidConfig, PoolClosed.
        """
        self._refuse_closed()
        from .steering import check_cap

        check_cap(max_connections, max(1, self._config.effective_min_connections), self._limits()[1])
        before = self._resize(max_connections)
        self._expire(self._config.effective_min_connections)
        self._maintenance.kick()
        self._log(
            logging.INFO, "pool %r has %d connections at most, before %d", max_connections, before, reason="resized"
        )

    def pause(self) -> None:
        """Give nothing out, in all processes, until resume(): get() waits, at most its timeout (then PoolTimeout);
        try_get() raises PoolExhausted. Leases that are out go on, and are returned as always.

        Raises PoolClosed.
        """
        self._refuse_closed()
        if self._steer("paused"):
            self._log(logging.INFO, "pool %r is paused", reason="paused")

    def resume(self) -> None:
        """Go on after pause() or drain(), in all processes. Raises PoolClosed."""
        self._refuse_closed()
        if self._steer("open"):
            self._maintenance.kick()
            self._log(logging.INFO, "pool %r goes on", reason="resumed")

    def drain(self, timeout: float = DRAIN_TIMEOUT_S) -> int:
        """Let what is under way finish, and refuse the rest: callers that wait already are served, later ones get
        PoolClosed (its `draining` is true) in every process; idle connections end now, leased ones at their return.

        Waits up to `timeout` seconds for the leases; returns how many are still out (0: nothing is open any more). The
        pool stays so until resume() or close(). Raises PoolClosed.
        """
        self._refuse_closed()
        checked_timeout(timeout)
        if self._steer("draining"):
            self._log(logging.INFO, "pool %r is draining", reason="draining")
        deadline = time.monotonic() + timeout
        while True:
            self._retire_idle()
            out = self._leases_out()
            if not (out or self._counts()["idle"] or self._waiters()) or time.monotonic() >= deadline:
                return out
            time.sleep(_POLL_S)
            self._recover()  # a holder may die meanwhile

    def evict(
        self,
        connection_id: int | None = None,
        peer: tuple[str, int] | str | None = None,
        *,
        leased: bool = False,
    ) -> int:
        """End connections: one, those to a peer (an address, or (address, port)), or, with neither, all idle ones.

        Idle ones end now. With `connection_id`, `peer` or `leased=True` those in use are meant as well: they end when
        they are returned. Returns how many were found. New ones are opened as they are needed.

        Raises ValueError for a peer that is no address, PoolClosed.
        """
        self._refuse_closed()
        packed = b"" if peer is None else pack_peer(peer)
        named = connection_id is not None or peer is not None
        if connection_id is not None and (isinstance(connection_id, bool) or not isinstance(connection_id, int)):
            raise TypeError(f"connection_id must be the number of a connection, not {connection_id!r}")
        if connection_id is not None and not 0 < connection_id < 1 << 63:
            return 0
        found = self._evict(connection_id or 0, packed, leased or named)
        self._expire(self._config.effective_min_connections)
        self._maintenance.kick()
        return found

    def close(self, timeout: float = 0.0) -> int:
        """Close the pool for all processes; returns how many leases are still out.

        Idle connections are retired at once, waiting calls get PoolClosed in every process, and so does each get() from
        now on. Leased connections stay with their holders and are retired at release; `timeout` seconds are spent
        waiting for that. The pool's name is free when this returns. Closing a pool that is closed, or that this process
        has left, does nothing.
        """
        deadline = time.monotonic() + checked_timeout(timeout)
        if self._left():
            return 0
        slab_id, _ = self._identity()
        was_open = not self.closed
        self._maintenance.stop()  # first: what it finds closed, it would give back under our hands
        try:
            self._shut()
        finally:  # a signal handler may raise anywhere
            slab.remove_own(self._name, slab_id)
            self._remove_own_socket()
            if self._config.listening and self._target is not None:
                serving.remove(self._target)
        while (out := self._leases_out()) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            self._recover()  # a holder may die meanwhile
        self._end_dials()
        self._finish()
        if was_open:
            self._log(logging.INFO, "pool %r is closed, %d leases are out", out, reason="closed")
        return out

    def leave(self) -> None:
        """This process takes no further part: its leases are retired, its place is given back, get() raises PoolClosed.

        The others keep the pool and all idle connections; with the last one it ends. A process that exits leaves by
        itself. Leaving once more does nothing.
        """
        self._maintenance.stop()
        self._end_dials()
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
        source = self._source() if self.closed or not self._config.listening else serving.text_of(self.address)
        state = "left" if self._left() else self.state
        limit = f"max_connections={self.max_connections}"
        where = "at" if self._config.listening else "to"
        return f"<shmpool.Pool {self._name!r} {where} {source}, {state}, {limit}>"

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
        listener, path = rendezvous.listen(self._identity()[0], os.urandom(4).hex())
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

    def _refuse_closed(self) -> None:
        if self.closed:
            raise PoolClosed(pool=self._name, left=self._left())

    def _leases_out(self) -> int:
        counts = self._counts()
        return counts["leased"] + counts["offered"] + counts["dialing"] + counts["checking"]

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
            sock.__init__(*SOCKET_KINDS[bucket], fileno=fd)  # type: ignore[misc]
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
        return peer_of(bucket, address) or unix_path(sock, None if self._config.listening else self._target)

    def _joined(self) -> None:
        """This process has a place in the pool, for the first time since it was forked."""
        self._drop_foreign_dials()
        if not self._maintenance.start(self):
            self._remind()

    def _ended(self, rows: list[tuple[int, int, int, bytes, str, float, int]]) -> None:
        """Connections that this process has ended: (id, slot, bucket, peer, reason, age, uses)."""
        hook = self._config.on_close
        interrupt: BaseException | None = None  # of a signal handler in the hook; the other ends are told all the same
        for connection, slot, bucket, address, reason, age, uses in rows:
            level = _LEVELS.get(reason, logging.DEBUG)
            text = "pool %r: connection %d ended (%s) after %.3f s and %d leases"
            self._log(level, text, connection, reason, age, uses, slot=slot, connection_id=connection, reason=reason)
            if hook is None:
                continue
            protocol, version = BUCKETS[bucket]
            dialled = self._target if not self._config.listening else None
            peer = peer_of(bucket, address) or (dialled.path if dialled else "")
            closed = ClosedConnection(
                id=connection,
                slot=slot,
                protocol=protocol,
                ip_version=version,
                peer=peer,
                reason=reason,  # type: ignore[arg-type]
                age=age,
                uses=uses,
            )
            try:
                call_on_close(hook, closed, self._name)
            except BaseException as error:  # noqa: BLE001 - raised below
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _log(
        self,
        level: int,
        text: str,
        *args: object,
        reason: str,
        slot: int | None = None,
        connection_id: int | None = None,
    ) -> None:
        extra = {"pool": self._name, "slot": slot, "connection_id": connection_id, "reason": reason}
        logger.log(level, text, self._name, *args, extra=extra)

    def _error(self, kind: str, mask: int, waited: float, timeout: float) -> PoolError | OSError:
        """The exception for something the core cannot give. For "system", `mask` is the errno."""
        if kind == "system":
            if mask == errno.ENOENT:  # of the segment in /proc/self/fd
                what = (
                    f"process {os.getpid()} cannot join pool {self._name!r}: mount /proc in its container or namespace"
                )
                return OSError(mask, f"/proc is not there, so {what}")
            return shortage(OSError(mask, os.strerror(mask)), f"process {os.getpid()} cannot join pool {self._name!r}")
        if kind in ("closed", "draining"):
            return PoolClosed(pool=self._name, left=self._left(), draining=kind == "draining")
        if kind == "down":
            return self._down_error(waited)
        if kind == "damaged":
            return SlabCorrupt(name=self._name, detail="a slot is in a state that does not exist")
        if kind == "descriptors":
            return DescriptorsLost(pool=self._name)
        if kind == "user":
            return ForeignUser(pool=self._name, uid=os.geteuid(), owner=self._snapshot()["uid"])
        counts = self._counts()
        if kind == "timeout":
            protocol, version = (None, None) if mask == self._whole_mask() else self._wanted(mask)
            late = PoolTimeout(
                waited=waited,
                timeout=timeout,
                counts=counts,
                protocol=None if protocol is None else protocol.value,
                ip_version=None if version is None else int(version),
                paused=self._state() == "paused",
                listening=self._config.listening,
            )
            if self._upstream()[0] in ("down", "probing"):
                late.__cause__ = self._down_error(waited)
            return late
        limits = {
            "exhausted": ("all connections are in use", self.max_connections),
            "silent": ("no client is new or has spoken", self.max_connections),
            "paused": ("the pool is paused", self.max_connections),
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

    def _upstream(self) -> tuple[str, float, str, int]:
        """What all processes know of the server: "unproved", "up", "down" or "probing"; seconds until the next dial may
        begin; why the last failed one did; how many have failed."""
        state, retry_in, failure, failures = self._upstream_words()
        return state, retry_in, unpack_failure(failure)[0], failures

    def _down_error(self, waited: float = 0.0) -> DialError:
        """What get() raises while the server is known to be down, whichever process noticed it."""
        _, retry_in, failure, _ = self._upstream_words()
        why, cause = unpack_failure(failure)
        tried = (why,) if why else ()
        error = DialError(target=self._source(), waited=waited, tried=tried, down=True, retry_in=retry_in)
        error.__cause__ = cause
        return error

    def _source(self) -> str:
        return self._target.text if self._target else _name_of(self._config.dial)

    def _dial(
        self, mask: int, left: float, slot: int, connection: int, timeout: float, attempt: int, seen: int
    ) -> tuple[Any, ...]:
        """Open connection number `connection` for `slot`, within `left` of the `timeout` seconds that get() was given.

        `seen` is what the state of the upstream was when this dial was let through (core/upstream.h).
        """
        config = self._config
        begun = time.monotonic()
        protocol, version = self._wanted(mask)
        mailed: list[bool] = []
        thread = threading.get_ident()
        key = os.getpid(), thread

        def predeposit(sock: socket.socket) -> None:
            if thread in self._interrupted:  # while it tried another address
                raise ConnectionAbortedError(errno.ECONNABORTED, "the dial was interrupted")
            mailed[:] = [self._mail(slot, connection, sock.fileno())]
            self._dialling[key] = sock

        limit = min(config.connection_timeout, max(0.0, left))
        request = DialRequest(protocol, version, limit, attempt, predeposit, connection)
        try:
            dialled = self._accept(*self._call_dial(request), mask, mailed == [True])
            if self._dialling.pop(key, None) is None and thread in self._interrupted:
                dialled[0].close()  # it was shut down when it had just connected
                raise DialError(target=self._source(), attempt=attempt, waited=time.monotonic() - begun)
            self._log_opened(slot, connection, time.monotonic() - begun)
            if config.on_created is not None:
                self._dialled[thread] = (begun, left, timeout)
            return dialled
        except DialError as error:
            took = time.monotonic() - begun
            if self.closed:  # and the dial cut short for it, perhaps
                raise PoolClosed(pool=self._name, left=self._left()) from error
            if thread in self._interrupted or says_nothing(error.__cause__):
                self._upstream_untried(seen)
            elif left < config.connection_timeout and took >= left:  # cut short by the caller's own deadline
                self._upstream_doubt(seen)
                waited = timeout - left + took
                raise PoolTimeout(waited=waited, timeout=timeout, counts=self._counts()) from error
            else:
                self._dial_failed(error, seen)
            raise
        finally:
            self._dialling.pop(key, None)
            self._interrupted.discard(thread)

    def _log_opened(self, slot: int, connection: int, took: float) -> None:
        text = "pool %r: connection %d is opened in %.6f s"
        self._log(logging.DEBUG, text, connection, took, slot=slot, connection_id=connection, reason="opened")

    def _dial_failed(self, error: DialError, seen: int) -> None:
        failure = pack_failure(error)
        if self._upstream_failed(seen, failure):
            why, _ = unpack_failure(failure.decode(errors="replace"))
            extra = {"pool": self._name, "slot": None, "connection_id": None, "reason": "down"}
            dial_logger.warning("pool %r: %s is down: %s", self._name, self._source(), why, extra=extra)
        else:
            extra = {"pool": self._name, "slot": None, "connection_id": None, "reason": "failed"}
            dial_logger.debug("pool %r: %s", self._name, error, extra=extra)

    def _upstream_is_up(self) -> None:
        extra = {"pool": self._name, "slot": None, "connection_id": None, "reason": "up"}
        dial_logger.info("pool %r: %s is up again", self._name, self._source(), extra=extra)

    def _welcome(self, conn: _core.PooledConnection) -> object:
        """on_created as a part of the dial: what it does on the socket has the rest of the dial's time, and ends when
        the dial is to end."""
        assert self._config.on_created is not None
        thread = threading.get_ident()
        sock, key = conn.socket, (os.getpid(), thread)
        begun, left, _ = self._dialled.get(thread, (math.inf, 0.0, 0.0))  # else a client that was accepted: no limit
        limit = max(_LEAST_HOOK_S, begun + min(self._config.connection_timeout, left) - time.monotonic())
        usual = sock.gettimeout()
        if limit < (math.inf if usual is None else usual):
            sock.settimeout(limit)
        within = sock.gettimeout()  # as it was rounded
        self._dialling[key] = sock
        interrupted = False
        try:
            answer = self._config.on_created(conn)
        finally:
            interrupted = self._dialling.pop(key, None) is None
            with contextlib.suppress(OSError):  # closed by the hook
                if sock.gettimeout() == within:  # else the hook has chosen another
                    sock.settimeout(usual)
        if interrupted and thread in self._interrupted:
            raise ConnectionAbortedError(errno.ECONNABORTED, "the dial was interrupted")
        self._dialled.pop(thread, None)
        return answer

    def _refused(self, cause: BaseException, attempt: int, seen: int) -> BaseException:
        """What a connection refused by on_created means for who wanted it: the dial has failed."""
        thread, now = threading.get_ident(), time.monotonic()
        begun, left, timeout = self._dialled.pop(thread, (now, math.inf, math.inf))
        took, interrupted = now - begun, thread in self._interrupted
        self._interrupted.discard(thread)
        if not isinstance(cause, Exception):
            self._upstream_untried(seen)
            return cause
        error = DialError(target=self._source(), attempt=attempt, waited=took)
        error.__cause__ = cause
        if interrupted or says_nothing(cause):
            self._upstream_untried(seen)
        elif isinstance(cause, TimeoutError) and left < self._config.connection_timeout and took >= left:
            self._upstream_doubt(seen)
            late = PoolTimeout(waited=timeout - left + took, timeout=timeout, counts=self._counts())
            late.__cause__ = error
            return late
        else:
            self._dial_failed(error, seen)
        return error

    @staticmethod
    def _forget_thread() -> None:
        """A dial in a thread of the core's has ended. What asked for the current thread there (logging does) has left a
        dummy behind, which Python before 3.13 would count for ever."""
        active: dict[int, threading.Thread] = getattr(threading, "_active", {})
        lock = getattr(threading, "_active_limbo_lock", contextlib.nullcontext())
        ident = threading.get_ident()
        if isinstance(active.get(ident), getattr(threading, "_DummyThread", ())):
            with lock:
                active.pop(ident, None)

    def _end_dials(self) -> None:
        """This process gives its part back: no dial of it goes on in a thread that nobody sees. What a program's own
        dial does is waited for a moment only; its connection ends when it is there."""
        self._drop_foreign_dials()
        if not self._dial_threads():
            return
        self._interrupt(lambda _thread: True)
        deadline = time.monotonic() + _DIAL_PATIENCE_S
        while self._dial_threads() and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _drop_foreign_dials(self) -> None:
        """Copies of what a parent was connecting when it forked this process."""
        for key in [key for key in list(self._dialling) if key[0] != os.getpid()]:
            if (sock := self._dialling.pop(key, None)) is not None:
                sock.close()

    def _interrupt_dials(self) -> None:
        """End what the maintenance thread of this process is connecting: it has to stop."""
        self._interrupt(self._maintenance.is_thread)

    def _interrupt(self, is_wanted: Callable[[int], bool]) -> None:
        """End what those threads of this process are connecting, or show to on_created. Who finds its socket taken out
        of `_dialling` knows that it was interrupted."""
        for key in list(self._dialling):
            process, thread = key
            if process != os.getpid() or not is_wanted(thread):  # a parent's goes on with it
                continue
            self._interrupted.add(thread)
            if (sock := self._dialling.pop(key, None)) is None:  # it has just ended
                self._interrupted.discard(thread)
                continue
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def _call_dial(self, request: DialRequest) -> tuple[socket.socket, bytes]:
        """Call the dial of this pool; every failure of it is a DialError with its cause."""
        if self._target is not None:  # it raises errors of ours only; what else comes here, a signal handler raised
            return dial_target(self._target, request, self._config), b""
        assert self._config.dial is not None
        started = time.monotonic()
        try:
            result: Any = self._config.dial(request)
            try:
                return socket_and_metadata(result)
            except BaseException:
                for each in result if isinstance(result, tuple) else (result,):
                    if isinstance(each, socket.socket):
                        each.close()
                raise
        except PoolError:
            raise
        except Exception as error:
            waited = time.monotonic() - started
            raise DialError(target=self._source(), attempt=request.attempt, waited=waited) from error

    def _take_client(self) -> tuple[socket.socket, bytes] | bool | None:
        """The next client by the program's acceptor; None: nobody is there; False: nothing came of it."""
        assert self._config.acceptor is not None
        return serving.take_client(self._config.acceptor, self._listener(), self._name)

    def _accept_client(
        self, slot: int, connection: int, fd: int, mailed: bool, taken: tuple[socket.socket, bytes] | None
    ) -> tuple[Any, ...] | None:
        """What the core installs of a client that was accepted as `fd`, or by an acceptor; None: it has gone."""
        sock, metadata = taken or (serving.client_of(fd), b"")
        try:
            client = self._accept(sock, metadata, self._whole_mask(), mailed)
        except DialError as error:
            text, why = "pool %r: connection %d ended before it was accepted: %s", error.__cause__
            self._log(logging.DEBUG, text, connection, why, slot=slot, connection_id=connection, reason="gone")
            return None
        text = "pool %r: connection %d is accepted"
        self._log(logging.DEBUG, text, connection, slot=slot, connection_id=connection, reason="opened")
        return client

    def _client_refused(self, error: BaseException, slot: int, connection: int) -> None:
        serving.log_refusal(error, self._name, slot, connection)

    def _accept(self, sock: socket.socket, metadata: bytes, mask: int, mailed: bool) -> tuple[Any, ...]:
        """Take a dialled socket over: what the core's install() wants."""
        try:
            bucket, address = kind_of(sock, self._source())
            if not mask >> bucket & 1:
                protocol, version = BUCKETS[bucket]
                wanted = self._wanted(mask)
                if wanted[0] not in (None, protocol):
                    raise NoConnectionForProtocol(protocol=str(wanted[0]), available=(protocol.value,))
                raise NoConnectionForIPVersion(ip_version=_as_int(wanted[1]), available=_versions(version))
            private = is_private(sock)
            ours = sock if private else take_over(sock)
            sock = ours
            self._restore(ours)
            mark = ours._mark if isinstance(ours, PooledSocket) else bytearray(1)
            lifetime = self._config.max_lifetime * random.uniform(1 - _LIFETIME_JITTER, 1)
            return ours, mark, ours.fileno(), bucket, private, mailed and not metadata, lifetime, address, metadata
        except BaseException:
            sock.close()
            raise


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _welcome_of(pool: weakref.ref[Pool]) -> Callable[[_core.PooledConnection], object]:
    """on_created as the core calls it. It does not keep the pool: one that is dropped ends at once."""

    def welcome(conn: _core.PooledConnection) -> object:
        mine = pool()
        assert mine is not None, "the core calls this in a method of the pool"
        return mine._welcome(conn)

    return welcome


def _as_int(version: IPVersion | int | None) -> int:
    return int(version) if isinstance(version, int) else 0


def _versions(version: IPVersion | None) -> tuple[int, ...]:
    return () if version is None else (int(version),)


def _name_of(dial: Callable[..., object] | None) -> str:
    name = getattr(dial, "__qualname__", None)
    return f"{getattr(dial, '__module__', '?')}.{name}" if name else repr(dial)


def _slots_for(config: PoolConfig) -> int:
    """How many slots a new pool has: what resize() may ever use, and two that a listening pool keeps for itself."""
    if config.resize_limit is not None:
        slots = config.resize_limit
    else:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        room = math.inf if hard == resource.RLIM_INFINITY else (hard - _descriptors_open() - SPARE_DESCRIPTORS) // 2
        slots = int(max(config.max_connections, min(2 * config.max_connections, room, _core.MAX_SLOTS)))
    return slots + 2 * config.listening


def _descriptors_open() -> int:
    return len(os.listdir("/proc/self/fd"))


def _reserve_descriptors(slots: int, config: PoolConfig) -> None:
    """Each process needs a mailbox and a copy for each slot: see that the limit allows it, raise the soft one."""
    in_use = _descriptors_open()
    needed = in_use + 2 * slots + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        remedy = (
            f"each process needs {needed} descriptors (two for each of {slots} slots, {in_use} open, "
            f"{SPARE_DESCRIPTORS} spare), but the hard limit is {hard}; lower it to "
            f"{max(0, (hard - in_use - SPARE_DESCRIPTORS) // 2)} or raise the limit (ulimit -Hn, LimitNOFILE=)"
        )
        field = "max_connections" if config.resize_limit is None else "resize_limit"
        raise InvalidConfig(field=field, value=getattr(config, field), remedy=remedy)
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
    import pickle

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
    leave after that: its finalizers of negative priority come last. (Its own children run these, and no atexit.)

    Where it is not loaded yet, it will be after this module, and what it does at exit comes before ours."""
    global _leaving_pid, _follows_forks
    util = sys.modules.get("multiprocessing.util")
    if util is None:
        return
    _leaving_pid = os.getpid()
    util.Finalize(None, _leave_all, exitpriority=-100)
    if not _follows_forks:  # its forked children forget what was registered before
        _follows_forks = True
        util.register_after_fork(Pool, _leave_with_multiprocessing)


@atexit.register
def _leave_at_exit() -> None:
    if _leaving_pid != os.getpid():  # forked behind Python's back, so that the finalizer is another process's
        _leave_all()


_leaving_pid = 0
_follows_forks = False
_leave_with_multiprocessing()
os.register_at_fork(after_in_child=_leave_with_multiprocessing)
