"""redis-py on shared connections: all workers' commands go over one pool of at most `max_connections`.

    pool = ConnectionPool.from_url("redis://127.0.0.1:6379/0", max_connections=4)   # before the fork
    client = redis.Redis(connection_pool=pool)                                      # before or after it
    client.set("key", "value")

What: `ConnectionPool` takes the place of redis-py's own; `Dialer` opens connections for it; `ping` tries a lease.

How: the handshake (HELLO or AUTH, SELECT, CLIENT SETNAME and SETINFO) is part of the dial, so it happens once per
connection, whoever uses it later; what was agreed travels with the connection as its metadata. Each process has its
own `SharedConnection` object (a redis-py `Connection` with its own parser) for each connection it has used, and keeps
it as the lease's `session` while the connection rests.

        who                 does                                         then
    1   get_connection      leases; takes the object out of `session`,   the caller holds the only reference: when it
                            or makes one                                 is lost, so is the connection, not the permit
    2   send, read          check the lease, note each command           what it did to the connection is known
    3   release             clean: object into `session`, lease given    the next holder, in any process, finds it as
                            back. Not clean: the connection is ended     the handshake left it
    2b  disconnect          ends the connection at once                  permit free; connect() takes a fresh lease

Clean means: every command sent was answered and every byte received was parsed; no MULTI or WATCH is open; no command
was sent that leaves a mark on a connection (SELECT, SUBSCRIBE, MONITOR, CLIENT TRACKING, AUTH, ... : `_MARKS`).

Invariants: the shared socket is never closed nor shut down by a redis-py object, only by the pool. A socket is used
under a valid lease only; an object carried over a fork has none. A command is never sent a second time by this module.

Errors: what the pool raises arrives as redis-py's: `MaxConnectionsError` when no connection came free in time,
`ConnectionError`, `TimeoutError`, `AuthenticationError`; the pool's own error, with all its evidence, is `__cause__`.

Not here: TLS (`rediss://`), client-side caching, Sentinel and Cluster, maintenance notifications, asyncio.
"""

# mypy: allow-untyped-calls
# (redis-py types its commands; the methods of its connections, which are called here, it mostly does not)

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
import json
import math
import os
import re
import socket
import time
import weakref
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

try:
    from redis._parsers import _RESP2Parser, _RESP3Parser
    from redis.connection import AbstractConnection, Connection, parse_url
    from redis.connection import ConnectionPool as RedisConnectionPool
    from redis.exceptions import (
        ConnectionError,  # noqa: A004  (redis-py's, not the built-in one, wherever it stands in this file)
        MaxConnectionsError,
        RedisError,
        ResponseError,
        TimeoutError,  # noqa: A004
    )
except ModuleNotFoundError as missing:
    raise ImportError("the integration needs redis-py: pip install 'shmpool[redis]'") from missing

from ..config import PoolConfig, Protocol, Target, _read
from ..dialing import DialRequest, dial_target
from ..errors import DialError, InvalidConfig, LeaseExpired, PoolError, PoolExhausted, PoolTimeout
from ..pool import Pool

if TYPE_CHECKING:
    from redis.retry import Retry

    from .._core import PooledConnection

__all__ = ["ConnectionPool", "Dialer", "SharedConnection", "ping"]

# What commands do to a connection -----------------------------------------------------------------------------------

_NOTHING, _WATCH, _UNWATCH, _MULTI, _EXEC, _MARK, _ASK_SUBCOMMAND = range(7)

# Commands after which a connection is not what the handshake made it. Scripts cannot change their caller's connection.
_MARKS = (
    "ASKING AUTH DEBUG HELLO HIMPORT MONITOR PSUBSCRIBE PSYNC PUNSUBSCRIBE QUIT READONLY READWRITE REPLCONF RESET "
    "SELECT SHUTDOWN SSUBSCRIBE SUBSCRIBE SUNSUBSCRIBE SYNC UNSUBSCRIBE"
)
# Of these commands, the subcommands that leave no mark; any other one, known or not, counts as one that does.
_HARMLESS = {
    b"CLIENT": frozenset(b"GETNAME GETREDIR HELP ID INFO KILL LIST PAUSE TRACKINGINFO UNBLOCK UNPAUSE".split()),
    b"SCRIPT": frozenset(b"EXISTS FLUSH HELP KILL LOAD SHOW".split()),
}
_FIRST_WORDS: dict[bytes, int] = {
    b"WATCH": _WATCH,
    b"UNWATCH": _UNWATCH,
    b"MULTI": _MULTI,
    b"EXEC": _EXEC,
    b"DISCARD": _EXEC,
    **dict.fromkeys(_MARKS.encode().split(), _MARK),
    **dict.fromkeys(_HARMLESS, _ASK_SUBCOMMAND),
}

# Effects by the first argument just as callers write it ("GET", b"get", "CLIENT LIST"); it fills up as they do.
_effects: dict[object, int] = {}
_EFFECTS_KEPT = 4096

_OPEN_MULTI, _OPEN_WATCH, _TRANSACTED = 1, 2, 4


def _effect(args: tuple[Any, ...]) -> int:
    """What sending `args` does to the connection: one of the constants above, never `_ASK_SUBCOMMAND`."""
    try:
        effect = _effects[args[0]]
    except (KeyError, TypeError, ValueError):  # not yet known; a bytearray; a writable memoryview
        effect = _learn(args[0])
    return effect if effect != _ASK_SUBCOMMAND else _effect_of_subcommand(args)


def _learn(name: object) -> int:
    words = _words(name)
    effect = _FIRST_WORDS.get(words[0], _NOTHING) if words else _MARK
    if isinstance(name, (str, bytes)) and len(_effects) < _EFFECTS_KEPT:
        _effects[name] = effect
    return effect


def _effect_of_subcommand(args: tuple[Any, ...]) -> int:
    words = [*_words(args[0]), *(word for arg in args[1:2] for word in _words(arg))]
    return _NOTHING if len(words) > 1 and words[1] in _HARMLESS[words[0]] else _MARK


def _words(name: object) -> list[bytes]:
    if isinstance(name, str):
        return name.upper().encode().split()
    return bytes(name).upper().split() if isinstance(name, (bytes, bytearray, memoryview)) else []


# Opening a connection -----------------------------------------------------------------------------------------------


# The settings of PoolConfig for sockets, which a dial has to heed itself.
_OF_SOCKETS = ("tcp_nodelay", "tcp_keepalive", "send_buffer_size", "receive_buffer_size")


class Dialer:
    """A `dial` for `shmpool.Pool`: connects to `target` and performs redis-py's whole handshake.

    `target` is a `shmpool` target (`tcp://host:port` or `unix:///path`); `options` are those of redis-py's
    `Connection` (`db`, `username`, `password`, `protocol`, `client_name`, `credential_provider`, ...), and of
    `shmpool.PoolConfig` those of a socket (`tcp_nodelay`, `tcp_keepalive`, `send_buffer_size`, `receive_buffer_size`).
    Raises, when called, `DialError` with redis-py's error as the cause. Its repr shows no secret.
    """

    def __init__(self, target: str, *, socket_timeout: float | None = None, **options: Any) -> None:
        of_sockets = {name: options.pop(name) for name in _OF_SOCKETS if name in options}
        self.config = PoolConfig(target=target, socket_timeout=socket_timeout, **of_sockets)
        self.target = Target.parse(target)
        if self.target.scheme is Protocol.UDP:
            raise InvalidConfig(field="target", value=target, remedy="Redis speaks TCP and unix sockets")
        self.options = {**options, "socket_timeout": socket_timeout}
        unwanted = ("retry", "retry_on_error", "retry_on_timeout", "health_check_interval")
        self._handshake_options = {name: value for name, value in self.options.items() if name not in unwanted}
        self._refusal: RedisError | None = None  # the last one that this process met
        # What the pool and its inspectors call its dial.
        self.__qualname__ = f"Dialer({self.target}, db={self.options.get('db', 0)})"

    def __repr__(self) -> str:
        return f"<{self.__qualname__}>"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_refusal": None}

    def refusal(self, error: DialError) -> RedisError | None:
        """redis-py's error that an error which only says that the server is down stands for, if this process met it."""
        known = self._refusal
        if known is None or not error.down or not error.tried:
            return None
        return known if f"{type(known).__name__}: {known}".startswith(error.tried[0]) else None  # it may have been cut

    def __call__(self, request: DialRequest) -> tuple[socket.socket, bytes]:
        started = time.monotonic()
        sock = dial_target(self.target, request, self.config)
        try:
            if self.target.scheme is Protocol.TCP:
                for option, value in (self.options.get("socket_keepalive_options") or {}).items():
                    sock.setsockopt(socket.IPPROTO_TCP, option, value)
            metadata = self._shake_hands(sock, started + request.timeout)
            sock.settimeout(self.config.socket_timeout)
        except (RedisError, OSError) as error:
            sock.close()
            if isinstance(error, RedisError):
                self._refusal = copy.copy(error)  # without its traceback
            waited = time.monotonic() - started
            raise DialError(target=self.target.text, attempt=request.attempt, waited=waited) from error
        except BaseException:
            sock.close()
            raise
        return sock, metadata

    def _shake_hands(self, sock: socket.socket, deadline: float) -> bytes:
        connection = _Handshake(sock, deadline, **_address_options(self.target), **self._handshake_options)
        try:
            connection.connect()
            if _unread_check(connection)():
                raise ConnectionError("the server sent more than the handshake asked for")
        finally:
            connection.let_go()
        return json.dumps(_agreed(connection)).encode()


class _Handshake(Connection):
    """redis-py's handshake on a socket that is there already, within a deadline."""

    def __init__(self, sock: socket.socket, deadline: float, **options: Any) -> None:
        self._given = sock
        self._deadline = deadline
        super().__init__(**options)

    def _connect(self) -> socket.socket:
        self._limit()
        return self._given

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        self._limit()
        return super().read_response(*args, **kwargs)

    def _limit(self) -> None:
        self._given.settimeout(max(self._deadline - time.monotonic(), 0.001))

    def let_go(self) -> None:
        self._sock = None
        self._parser.on_disconnect()


def _agreed(connection: AbstractConnection) -> dict[str, object]:
    """What two holders of one connection must agree on."""
    user = connection.username or "default"
    if connection.credential_provider is not None:
        user = "by credential_provider"
    return {"redis": 1, "protocol": connection.protocol, "db": int(connection.db), "user": user}


def _address_options(target: Target) -> dict[str, Any]:
    return {"host": target.path or target.host, "port": target.port}


def _unread_check(connection: Connection) -> Any:
    """A callable that tells whether the connection's parser holds bytes that it has not parsed."""
    parser: Any = connection._parser
    return parser._reader.has_data if hasattr(parser, "_reader") else parser._buffer.unread_bytes


def ping(lease: PooledConnection) -> bool:
    """Whether the server answers PING on a leased connection. Raises as its socket does: TimeoutError, OSError."""
    sock = lease.socket
    sock.sendall(b"*1\r\n$4\r\nPING\r\n")
    answer = b""
    while not answer.endswith(b"\r\n"):
        part = sock.recv(64)
        if not part:
            return False
        answer += part
    return answer == b"+PONG\r\n"


# A process's own object for a connection ----------------------------------------------------------------------------


class SharedConnection(Connection):
    """A redis-py connection object whose socket belongs to a lease.

        state          _lease   _sock
        leased         set      set     in the hands of whoever called get_connection()
        parked         None     set     in the lease's `session`; unusable until get_connection() hands it out again
        disconnected   None     None    as redis-py knows it: the next command connects, which here means leases

    Made by `ConnectionPool.make_connection()`. One thread at a time, as all of redis-py's connections.
    """

    _owner: weakref.ref[Any] | None = None  # to a ConnectionPool
    _sock: Any = None
    _lease: PooledConnection | None = None
    # Of the present lease: commands without an answer yet, what has marked the connection, _OPEN_MULTI | _OPEN_WATCH |
    # _TRANSACTED, and the commands that are packed but not yet sent.
    _unanswered = 0
    _marked_by = ""
    _transaction = 0
    _packed: list[tuple[Any, ...]] | None = None
    _should_reconnect = False  # redis-py >= 7 has it of its own

    def __init__(self, owner: weakref.ref[Any] | None = None, **options: Any) -> None:
        self._owner = owner
        super().__init__(**options)
        if self.protocol == 3 and isinstance(self._parser, _RESP2Parser):
            self.set_parser(_RESP3Parser)  # redis-py < 8 does this in its handshake, which is not repeated here

    def repr_pieces(self) -> list[tuple[str, object]]:
        lease = self._lease
        state = f"lease={lease.id}" if lease is not None and self._is_leased() else "not leased"
        return [("address", self._host_error()), ("db", self.db), ("state", state)]

    def _host_error(self) -> str:
        return str(self.host) if self.port == 0 else f"{self.host}:{self.port}"

    # -- the lease

    def _bind(self, lease: PooledConnection) -> None:
        """Make this the object for the leased connection: a parser with nothing in it on the lease's socket."""
        self._lease = lease
        self._sock = lease.socket
        self._parser.on_connect(self)
        self._unread = _unread_check(self)
        self.pid = os.getpid()
        self._unanswered = self._transaction = 0
        self._marked_by = ""
        self._packed = None
        self._should_reconnect = False
        if hasattr(self, "_reset_himport_state"):
            self._reset_himport_state()

    def _unbind(self) -> PooledConnection | None:
        lease, self._lease = self._lease, None
        self._sock = None
        self._parser.on_disconnect()
        self._should_reconnect = False
        return lease

    def _is_leased(self) -> bool:
        """Whether the lease is valid in this process, now: not one that was carried over a fork or taken away."""
        try:
            return self._lease is not None and self._lease.socket is not None
        except LeaseExpired:
            return False

    def _ready(self) -> None:
        """Be leased before a command. A lost lease is replaced, unless a transaction had begun under it."""
        lease = self._lease
        if lease is not None:
            try:
                lease.socket  # noqa: B018  (raises LeaseExpired)
            except LeaseExpired as error:
                in_transaction = self._transaction
                self._unbind()
                if in_transaction:
                    raise ConnectionError(f"a transaction was lost with its connection: {error}") from error
            else:
                return
        elif self._sock is not None:
            raise ConnectionError("this connection was given back to its pool; get one with get_connection()")
        self.connect()

    def _is_clean(self) -> bool:
        """Whether the next holder would find the connection as the handshake left it."""
        if self._transaction:
            if self._transaction != _TRANSACTED:
                return False
            self._transaction = 0
        return not (self._unanswered or self._marked_by or self._should_reconnect or self._packed or self._unread())

    # -- redis-py's side: connecting

    def connect(self) -> None:
        """Be leased: if not, take a lease from the pool and run the connect callbacks. Raises as `get_connection`."""
        self.connect_check_health()

    def connect_check_health(self, check_health: bool = True, retry_socket_connect: bool = True) -> None:  # noqa: ARG002
        if self._is_leased():
            return
        self._unbind()
        pool: ConnectionPool | None = self._owner() if self._owner is not None else None
        if pool is None:
            raise ConnectionError("the connection pool of this connection is gone")
        pool._lease_for(self)
        self._connect_callbacks = [ref for ref in self._connect_callbacks if ref()]
        for ref in self._connect_callbacks:
            callback = ref()
            if callback:
                callback(self)

    def disconnect(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """End the leased connection for all processes and free its permit; otherwise do nothing."""
        if self._lease is None:
            self._should_reconnect = False
            return
        lease = self._unbind()
        if lease is not None:
            with contextlib.suppress(LeaseExpired):  # taken away, or another process's
                lease.discard("disconnected by redis-py")

    # -- redis-py's side: sending and reading

    def send_command(self, *args: Any, **kwargs: Any) -> None:
        packed = self._command_packer.pack(*args)
        self._ready()
        if self.health_check_interval and kwargs.get("check_health", True):
            self.check_health()  # before the command is noted: this may put another connection under us
        self._note(args)
        super().send_packed_command(packed, False)

    def pack_command(self, *args: Any) -> Any:
        packed = super().pack_command(*args)
        self._packed = [*(self._packed or ()), args]
        return packed

    def pack_commands(self, commands: Iterable[tuple[Any, ...]]) -> Any:
        commands = list(commands)
        packed = super().pack_commands(commands)
        self._packed = [*(self._packed or ()), *commands]
        return packed

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        commands, self._packed = self._packed, None
        self._ready()
        if self.health_check_interval and check_health:
            self.check_health()
        if commands is None:
            self._marked_by = "bytes that this connection did not pack"
        else:
            for args in commands:
                self._note(args)
        super().send_packed_command(command, False)

    def _note(self, args: tuple[Any, ...]) -> None:
        """Note a command before it is sent: an interrupted send may have sent it."""
        self._unanswered += 1
        effect = _effect(args)
        if effect == _NOTHING:
            return
        if effect == _MARK:
            self._marked_by = str(args[0])
        elif effect == _WATCH:
            self._transaction |= _OPEN_WATCH | _TRANSACTED
        elif effect == _MULTI:
            self._transaction |= _OPEN_MULTI | _TRANSACTED
        elif effect == _EXEC and self._transaction & _OPEN_MULTI:
            self._transaction = _TRANSACTED
        elif effect == _UNWATCH and not self._transaction & _OPEN_MULTI:
            self._transaction &= ~_OPEN_WATCH

    def can_read(self, timeout: float = 0) -> bool:
        self._ready()
        readable = bool(super().can_read(timeout))
        if readable and not self._unanswered:
            self._marked_by = "bytes that nobody asked for"
        return readable

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_leased():
            raise ConnectionError("no answer can come: the command was not sent on a connection that is leased here")
        try:
            response = super().read_response(*args, **kwargs)
        except ResponseError:
            self._unanswered -= 1
            if self._transaction:  # was it EXEC, UNWATCH or MULTI that failed? Then the keys may still be watched.
                self._marked_by = "an error in a transaction"
            raise
        self._unanswered -= 1
        return response


# The pool -----------------------------------------------------------------------------------------------------------

_THEIRS = frozenset(
    {"health_check_interval"}
)  # both have a setting of this name, for two things; here it is redis-py's
_OURS = frozenset(setting.name for setting in fields(PoolConfig)) - _THEIRS
_REFUSED = {
    "ssl": "TLS sessions live in one process and cannot be shared; use redis:// or unix://, or redis-py's own pool",
    "cache": "client-side caching needs connections of its own; use redis-py's own pool",
    "maint": "maintenance notifications need connections of their own; use redis-py's own pool",
    "connection_class": "the connection class is the pool's own",
    "oss_cluster": "Cluster is not supported",
}
_UNSET: Any = object()
_P = TypeVar("_P", bound="ConnectionPool")


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(function).parameters
    return {name: each for name, each in found.items() if each.kind in kinds and name != "self"}


_ABSTRACT_PARAMETERS = _parameters(AbstractConnection.__init__)
_OPTIONS = frozenset(_ABSTRACT_PARAMETERS) | frozenset(_parameters(Connection.__init__))


class ConnectionPool(RedisConnectionPool):
    """A redis-py connection pool that all processes of the host share; `redis.Redis(connection_pool=...)` takes it.

    `target` is a `redis://` or `unix://` URL, a shmpool target (`tcp://host:port`), or a `shmpool.Pool` whose `dial`
    is a `Dialer` (or that needs no handshake: RESP2, db 0, no password). Without it, `host`, `port` or `path` say
    where. Other arguments are those of redis-py's `Connection` and the fields of `shmpool.PoolConfig`. Where both have
    a word for one thing:

    - `socket_timeout` (s): how long an answer may take; the default is that of the installed redis-py, not the pool's.
    - `timeout` (s), of redis-py's `BlockingConnectionPool`, is `get_timeout`; `socket_connect_timeout` is
      `connection_timeout`.
    - `health_check_interval` (s) is redis-py's: after so long a silence a PING goes before the next command. For that
      of the pool, which checks idle connections in the background, make the `Pool` yourself:
      `Pool(dial=Dialer(...), health_check=ping, health_check_interval=10)`.

    Make it before the fork, or with a `name` in every process; forked children need no call, nor does it matter where
    clients are made. It pickles into children that are spawned. A connection that was
    used within `alive_bypass` (0.5 s) is not looked at before it is lent; give 0 to look each time, as redis-py does.

    Raises `InvalidConfig` for settings that cannot be used.
    """

    def __init__(
        self,
        target: str | Pool | None = None,
        *,
        host: str = "localhost",
        port: int = 6379,
        path: str | None = None,
        timeout: float | None = _UNSET,
        **settings: Any,
    ) -> None:
        if isinstance(target, str) and target.startswith(("redis:", "rediss:", "unix:")):
            from_url = _url_settings(target)
            host, port = from_url.pop("host", host), from_url.pop("port", port)
            path, timeout = from_url.pop("path", path), from_url.pop("timeout", timeout)
            settings, target = {**settings, **from_url}, None
        options = _known(settings)
        pool_settings = {name: options.pop(name) for name in list(options) if name in _OURS}
        self._creator_pid = os.getpid()
        self._owns_pool = not isinstance(target, Pool)
        if isinstance(target, Pool):
            self._set_up(target, _options_of(target, options, pool_settings))
            return
        _put_aliases(pool_settings, options, timeout)
        options["socket_timeout"] = pool_settings.setdefault("socket_timeout", _default_socket_timeout())
        of_sockets = {name: pool_settings[name] for name in _OF_SOCKETS if name in pool_settings}
        dialer = Dialer(target or _target_text(host, port, path), **options, **of_sockets)
        options = {**_address_options(dialer.target), **options}
        SharedConnection(**options)  # an option that redis-py refuses is refused before there is a pool
        self._set_up(Pool(dial=dialer, **pool_settings), options)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels as its Pool does, with the options of its connections."""
        return _unpickled, (type(self), self._pool, self._options)

    def _set_up(self, pool: Pool, options: dict[str, Any]) -> None:
        self._pool = pool
        self._options = options
        self._get = pool.get
        self._ref = weakref.ref(self)
        self._lend_from = 0.0  # unix s: this process uses no connection older than this; 0: any
        off: dict[str, Any] = {}
        if "maint_notifications_config" in _parameters(RedisConnectionPool.__init__):
            from redis.maint_notifications import MaintNotificationsConfig

            off["maint_notifications_config"] = MaintNotificationsConfig(enabled=False)
        super().__init__(SharedConnection, pool.config.max_connections, **off, **options)
        self._template = self.make_connection()

    @classmethod
    def from_url(cls: type[_P], url: str, **kwargs: Any) -> _P:
        """As redis-py's: `redis://[[user]:[password]]@host:port/db?option=value`, `unix://[user]:[pw]@/path?db=0`.

        What the URL says takes precedence over `kwargs`. `rediss://` raises `InvalidConfig`.
        """
        if not url.startswith(("redis://", "rediss://", "unix://")):
            raise InvalidConfig(
                field="url", value=_without_secrets(url), remedy="write redis://host:port/db or unix:///path"
            )
        return cls(url, **kwargs)

    def __repr__(self) -> str:
        return f"<{type(self).__module__}.{type(self).__name__}({self._template._host_error()}, {self._pool!r})>"

    @property
    def pool(self) -> Pool:
        """The `shmpool.Pool` underneath, for `stats()` and the like."""
        return self._pool

    # -- what redis-py's clients call for each command

    def get_connection(self, command_name: object = None, *keys: object, **options: object) -> SharedConnection:  # noqa: ARG002
        """Lease a connection; wait up to `get_timeout` for one. The arguments are redis-py's and mean nothing.

        Raises `MaxConnectionsError` (none came free in time), `ConnectionError` or `TimeoutError` (dial failed; tried
        again as the pool's `retry` says), `AuthenticationError`, each with the pool's error as `__cause__`.
        """
        try:
            lease = self._get()
        except PoolError as error:
            lease = self._lease_after(error)
        if self._lend_from:
            lease = self._recent(lease)
        connection = lease.session
        if connection is None or getattr(connection, "_owner", None) is not self._ref:
            return self._adopt(lease, self.make_connection())
        lease.session = None  # while it is leased, the caller alone holds it
        connection._lease = lease
        return connection  # type: ignore[no-any-return]  # what we have put there

    def release(self, connection: Any) -> None:
        """Give a leased connection back, or end it if it is not clean. One that is not leased is left alone."""
        lease = getattr(connection, "_lease", None)
        if lease is None:
            return
        if not connection._is_clean():
            connection.disconnect()
            return
        connection._lease = None
        try:
            lease.session = connection
            lease.release()
        except LeaseExpired:
            connection._unbind()  # taken away meanwhile, or another process's; the answers were read all the same
        except BaseException:  # an interrupt; without this, its traceback would hold the permit
            with contextlib.suppress(LeaseExpired):
                lease.discard("interrupted")
            raise

    def make_connection(self) -> SharedConnection:
        """A connection object that is not leased yet; its `connect()` takes a lease."""
        connection = SharedConnection(self._ref, **self.connection_kwargs)
        self._objects.add(connection)
        return connection

    # -- leasing, the less common ways

    def _lease_after(self, error: PoolError) -> PooledConnection:
        """The lease that `error` stood in the way of: failed dials are tried again as redis-py's `retry` says."""
        failures = [error]

        def attempt() -> PooledConnection:
            try:
                if failures:
                    raise failures.pop()
                return self._get()
            except PoolError as failed:
                raise _translated(failed, self._pool.config.dial) from failed

        if not isinstance(error, DialError):
            return attempt()
        lease: PooledConnection = self._template.retry.call_with_retry(attempt, lambda _: None)
        return lease

    def _lease_for(self, connection: SharedConnection) -> None:
        """Take a fresh lease for an object that was disconnected: it takes the place of the connection's session."""
        try:
            lease = self._get()
        except PoolError as error:
            lease = self._lease_after(error)
        lease = self._recent(lease)
        lease.session = None
        self._adopt(lease, connection)

    def _adopt(self, lease: PooledConnection, connection: SharedConnection) -> SharedConnection:
        try:
            wrong = _disagreement(lease.metadata, connection)
            if wrong:
                raise ConnectionError(wrong)
            connection._bind(lease)
        except BaseException:
            with contextlib.suppress(LeaseExpired):
                lease.release()
            raise
        return connection

    def _recent(self, lease: PooledConnection) -> PooledConnection:
        while lease.created_at < self._lend_from:
            lease.discard("older than the last disconnect() of this process")
            try:
                lease = self._get()
            except PoolError as error:
                lease = self._lease_after(error)
        return lease

    # -- the rest of redis-py's interface

    def get_protocol(self) -> int:
        return int(self._template.protocol)

    def owns_connection(self, connection: Any) -> bool:
        return getattr(connection, "_owner", None) is self._ref and connection.pid == os.getpid()

    def disconnect(self, inuse_connections: bool = True) -> None:
        """Use none of the present connections again in this process: they are ended when it next meets them.

        Other processes are not disturbed otherwise. Those that this process has leased are ended when they are
        released, if `inuse_connections`. A process that has not used the pool yet (a fresh child) does nothing.
        """
        mine = [connection for connection in list(self._objects) if connection.pid == os.getpid()]
        if not any(connection._sock is not None for connection in mine):
            return
        self._lend_from = time.time()
        for connection in mine:
            if inuse_connections and connection._is_leased():
                connection._marked_by = "disconnect() of the pool"

    def close(self) -> None:
        """In the process that made this object: close the pool for all processes, or, if it has a `name`, leave it to
        the others. Elsewhere, or around a `Pool` that was given: `disconnect()`."""
        if self._owns_pool and os.getpid() == self._creator_pid:
            self._pool.__exit__(None, None, None)
        else:
            self.disconnect()

    def __enter__(self: _P) -> _P:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        """Nothing to do: redis-py's own pool counts here what this one never has."""

    def reset(self) -> None:
        """Forget this process's connection objects; the connections stay in the pool. Never needed after a fork."""
        self._objects: weakref.WeakSet[SharedConnection] = weakref.WeakSet()
        self.pid = os.getpid()

    def _checkpid(self) -> None:
        """Nothing to do: the pool sees a fork by itself."""

    def set_retry(self, retry: Retry) -> None:
        self.connection_kwargs["retry"] = retry
        for connection in list(self._objects):
            connection.retry = retry

    def re_auth_callback(self, token: object) -> None:  # noqa: ARG002
        """A new credential: connections that were opened with the old one are not used again by this process."""
        self.disconnect()

    def _get_free_connections(self) -> list[SharedConnection]:
        return [each for each in list(self._objects) if each._lease is None and each._sock is not None]

    def _get_in_use_connections(self) -> set[SharedConnection]:
        return {each for each in list(self._objects) if each._is_leased()}


def _unpickled(kind: type[_P], pool: Pool, options: dict[str, Any]) -> _P:
    made = kind.__new__(kind)
    made._creator_pid = os.getpid()
    made._owns_pool = False
    made._set_up(pool, options)
    return made


# Settings -----------------------------------------------------------------------------------------------------------


def _target_text(host: str, port: int, path: str | None) -> str:
    if path is not None:
        return f"unix://{path}"
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _url_settings(url: str) -> dict[str, Any]:
    """What a redis-py URL says; texts of the pool's settings mean what they mean in a URL of its own."""
    try:
        settings: dict[str, Any] = dict(parse_url(url))
    except ValueError as error:
        raise InvalidConfig(field="target", value=_without_secrets(url), remedy=str(error)) from None
    if url.startswith("rediss:"):
        raise InvalidConfig(field="target", value=_without_secrets(url), remedy=_REFUSED["ssl"])
    settings.pop("connection_class", None)
    if isinstance(protocol := settings.get("protocol"), str):  # redis-py < 8 leaves it a text
        if protocol not in ("2", "3"):
            raise InvalidConfig(field="protocol", value=protocol, remedy="must be 2 or 3")
        settings["protocol"] = int(protocol)
    return {**settings, **_read({name: value for name, value in settings.items() if name in _OURS})}


def _without_secrets(url: str) -> str:
    return re.sub(r"//[^/]*@", "//…@", url.partition("?")[0])


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, without those that only say no to what this pool does not do anyway. Raises InvalidConfig."""
    known = sorted({*_OURS, *_OPTIONS} - {"target", "dial"})
    kept = {}
    for name, value in settings.items():
        refusals = (why for start, why in _REFUSED.items() if name.startswith(start) and name not in _OURS)
        refusal = next(refusals, "")
        if refusal and value in (None, False):
            continue
        if not refusal and name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            refusal = f"neither the installed redis-py nor shmpool has such a setting{hint}"
        if refusal:
            raise InvalidConfig(field=name, value=type(value), remedy=refusal)  # the value may be a secret
        kept[name] = value
    return kept


def _put_aliases(pool_settings: dict[str, Any], settings: dict[str, Any], timeout: float | None) -> None:
    """redis-py's words for the pool's settings."""
    if timeout is not _UNSET:
        pool_settings.setdefault("get_timeout", math.inf if timeout is None else timeout)
    connect_timeout = settings.pop("socket_connect_timeout", None)
    if connect_timeout is not None:
        pool_settings.setdefault("connection_timeout", connect_timeout)


def _default_socket_timeout() -> float | None:
    default: float | None = _ABSTRACT_PARAMETERS["socket_timeout"].default
    return default


def _options_of(pool: Pool, settings: dict[str, Any], pool_settings: dict[str, Any]) -> dict[str, Any]:
    """The options for connections of a pool that was made elsewhere: its dialer's, then `settings`."""
    for name, value in pool_settings.items():
        raise InvalidConfig(field=name, value=value, remedy="give it to the Pool itself")
    dial = pool.config.dial
    if isinstance(dial, Dialer):
        return {**_address_options(dial.target), **dial.options, **settings}
    address = _address_options(Target.parse(pool.config.target)) if pool.config.target else {}
    return {**address, "protocol": 2, "socket_timeout": pool.config.socket_timeout, **settings}


def _disagreement(metadata: bytes, connection: SharedConnection) -> str:
    """Why this pool's clients must not use a connection that was opened so; "" when they may."""
    wanted = _agreed(connection)
    if not metadata:
        plain = {"redis": 1, "protocol": 2, "db": 0, "user": "default"}
        if wanted == plain and not connection.password and not connection.client_name:
            return ""
        return f"connections of this pool are opened without a handshake, {wanted} needs one; give the Pool a Dialer"
    found = json.loads(metadata)
    return "" if found == wanted else f"this connection was opened for {found}, its pool here is for {wanted}"


# Errors -------------------------------------------------------------------------------------------------------------


def _translated(error: PoolError, dial: object = None) -> RedisError:
    """redis-py's error for the pool's one, whose connections `dial` opens; the caller raises it `from` that."""
    reason: BaseException = error
    while isinstance(reason, (DialError, PoolTimeout)) and reason.__cause__ is not None:
        refusal = dial.refusal(reason) if isinstance(reason, DialError) and isinstance(dial, Dialer) else None
        reason = refusal or reason.__cause__
    if isinstance(reason, RedisError):  # from the handshake, as redis-py itself would have raised it
        return copy.copy(reason)  # the one in the chain keeps its own cause
    if isinstance(reason, (PoolTimeout, PoolExhausted)):  # no dial failed: all were in use
        return MaxConnectionsError(str(error))
    return TimeoutError(str(error)) if isinstance(reason, socket.timeout) else ConnectionError(str(error))
