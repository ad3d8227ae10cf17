"""Everything that shmpool raises of its own: one small tree, each error carrying its evidence.

    PoolError(Exception)
    ├── InvalidConfig(ValueError)
    ├── PoolClosed
    ├── CannotListen
    ├── DescriptorsLost
    ├── ForeignUser(PermissionError)
    ├── PoolTimeout(TimeoutError)
    ├── PoolExhausted
    ├── DialError(ConnectionError)
    ├── NoConnectionForProtocol
    ├── NoConnectionForIPVersion
    ├── LeaseExpired
    ├── SlabCorrupt
    ├── SlabVersionMismatch
    ├── PoolNotFound(LookupError)
    ├── PoolExists(FileExistsError)
    ├── PoolUnreachable(TimeoutError)
    └── PoolInUse

An error is a dataclass: its fields are the evidence, given by keyword, each with a default. The text is made from
the fields when it is asked for, never stored. An error pickles with its fields, its cause and its notes; what
does not survive pickling travels as its `repr`.

Not here: when each of them is raised (`config`, `dialing`, `pool` and the core), and errors of the operating
system, which appear only as the `__cause__` of one of these.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# What a process or the machine has run out of: no fault of a setting, a pool or a server.
SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOLCK})


def shortage(error: OSError, what: str) -> OSError:
    """The same error, saying what could not be done for it."""
    number = error.errno or errno.EMFILE
    return OSError(number, f"{error.strerror or error}, so {what}")


__all__ = [
    "CannotListen",
    "DescriptorsLost",
    "DialError",
    "ForeignUser",
    "InvalidConfig",
    "LeaseExpired",
    "NoConnectionForIPVersion",
    "NoConnectionForProtocol",
    "PoolClosed",
    "PoolError",
    "PoolExhausted",
    "PoolExists",
    "PoolInUse",
    "PoolNotFound",
    "PoolTimeout",
    "PoolUnreachable",
    "SlabCorrupt",
    "SlabVersionMismatch",
]


@dataclass(eq=False, kw_only=True)
class PoolError(Exception):
    """The root. `except PoolError` catches whatever shmpool raises of its own."""

    def _text(self) -> str:
        return "the pool failed"

    def __str__(self) -> str:
        return self._text()

    def __reduce__(self) -> tuple[Any, ...]:
        # The constructor needs no argument, so an empty error is made and given the fields back.
        state = {name: _portable(value) for name, value in vars(self).items()}
        state["__cause__"] = _portable_cause(self.__cause__)
        state["__suppress_context__"] = self.__suppress_context__
        return type(self), (), state


@dataclass(eq=False, kw_only=True)
class InvalidConfig(PoolError, ValueError):
    """A configuration that cannot be used. One with several problems has them all in `errors`."""

    field: str = ""
    value: object = None
    remedy: str = ""
    errors: tuple[InvalidConfig, ...] = ()

    @classmethod
    def many(cls, errors: Sequence[InvalidConfig]) -> InvalidConfig:
        """One error that reports all of `errors` (at least one), with the evidence of the first as its own."""
        first = errors[0]
        return cls(field=first.field, value=first.value, remedy=first.remedy, errors=tuple(errors))

    def _text(self) -> str:
        if len(self.errors) > 1:
            lines = "".join(f"\n  {error}" for error in self.errors)
            return f"{len(self.errors)} problems in the configuration:{lines}"
        return f"{self.field}={_short(self.value)}: {self.remedy}"


@dataclass(eq=False, kw_only=True)
class PoolClosed(PoolError):
    """The pool has been closed, by this process or by another one; or (`left`) this process has left it; or it is
    `draining`, and open again after resume()."""

    pool: str = ""
    left: bool = False
    draining: bool = False

    def _text(self) -> str:
        if self.draining:
            return f"{_named('pool', self.pool)} is draining and gives nothing out; resume() opens it again"
        if self.left:
            return f"this process has left {_named('pool', self.pool)}; join it again to use it"
        return f"{_named('pool', self.pool)} is closed; make a new Pool"


@dataclass(eq=False, kw_only=True)
class CannotListen(PoolError):
    """`shmpool serve` or `export` cannot listen there."""

    host: str = ""
    port: int = 0
    reason: str = ""

    def _text(self) -> str:
        return f"cannot listen on {self.host} port {self.port}: {self.reason}; choose with --host and --port"


@dataclass(eq=False, kw_only=True)
class DescriptorsLost(PoolError):
    """This process has closed the pool's descriptors, as daemons do that close all they inherited."""

    pool: str = ""

    def _text(self) -> str:
        return (
            f"{_named('pool', self.pool)} cannot be used here: its descriptors were closed in this process; "
            "keep inherited descriptors open, or make the Pool after closing them"
        )


@dataclass(eq=False, kw_only=True)
class ForeignUser(PoolError, PermissionError):
    """This process has changed its user since the pool was made, and has not used the pool before that."""

    pool: str = ""
    uid: int = 0
    owner: int = 0

    def _text(self) -> str:
        return (
            f"{_named('pool', self.pool)} belongs to user {self.owner}, this process runs as user {self.uid}: make the "
            "pool after changing the user, or use it once (pool.recover() will do) in this process before"
        )


@dataclass(eq=False, kw_only=True)
class PoolTimeout(PoolError, TimeoutError):
    """No connection came free in time. A dial error met on the way is the `__cause__`.

    `listening`: the pool accepts connections; no client was new or had something to say.
    """

    waited: float = 0.0
    timeout: float = 0.0
    counts: Mapping[str, int] = field(default_factory=dict)
    protocol: str | None = None
    ip_version: int | None = None
    paused: bool = False
    listening: bool = False

    def _text(self) -> str:
        wanted = " client's" if self.listening else _wanted(self.protocol, self.ip_version)
        text = f"no{wanted} connection after {self.waited:.3f} s (timeout {self.timeout:g} s); {_tally(self.counts)}"
        if self.paused:
            return f"{text}; the pool is paused: resume() lets it go on"
        if self.__cause__ is not None:
            return f"{text}; the last dial failed: {self.__cause__}"
        if self.listening:
            return f"{text}; none was new or had something to say"
        if not self.counts.get("leased") and self.counts.get("dialing"):
            return f"{text}; a connection is being opened: is the server slow? wait longer"
        return f"{text}; return connections sooner, raise max_connections or wait longer"


@dataclass(eq=False, kw_only=True)
class PoolExhausted(PoolError):
    """There is nothing to give and no waiting for it: `try_get()`, or a limit of the pool is reached."""

    reason: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    limit: int = 0

    def _text(self) -> str:
        remedy = "raise max_connections, or wait with get()"
        if "paused" in self.reason:
            remedy = "resume() lets it go on"
        if "client" in self.reason:
            remedy = "wait with get()"
        for limited in ("worker", "waiter"):
            if limited in self.reason:
                remedy = f"raise max_{limited}s"
        reason = self.reason or "nothing is available"
        return f"{reason} (limit {self.limit}; {_tally(self.counts)}); {remedy}"


@dataclass(eq=False, kw_only=True)
class DialError(PoolError, ConnectionError):
    """A connection could not be opened; why is the `__cause__`. `tried` says what each address answered.

    `down`: nothing was tried now, because dials of this or other processes have failed a moment ago (`tried` has the
    last failure); the next dial is let through in `retry_in` seconds.
    """

    target: str = ""
    attempt: int = 1
    waited: float = 0.0
    tried: tuple[str, ...] = ()
    down: bool = False
    retry_in: float = 0.0

    def _text(self) -> str:
        if self.down:
            last = f" (the last failure: {'; '.join(self.tried)})" if self.tried else ""
            return f"{self.target or 'the server'} is down{last}; the next dial is tried in {self.retry_in:.2f} s"
        text = f"cannot connect to {self.target or 'the server'} (attempt {self.attempt}, {self.waited:.3f} s)"
        if self.tried:
            text = f"{text}: {'; '.join(self.tried)}"
        elif self.__cause__ is not None:
            text = f"{text}: {_reason(self.__cause__)}"
        hint = _dial_hint(self.__cause__)
        return f"{text}; {hint}" if hint else text


@dataclass(eq=False, kw_only=True)
class NoConnectionForProtocol(PoolError):
    """The pool never has a connection of the protocol that was asked for."""

    protocol: str = ""
    available: tuple[str, ...] = ()

    def _text(self) -> str:
        return f"this pool has no {self.protocol} connections; {_choice('protocol', self.available)}"


@dataclass(eq=False, kw_only=True)
class NoConnectionForIPVersion(PoolError):
    """The pool never has a connection of the IP version that was asked for."""

    ip_version: int = 0
    available: tuple[int, ...] = ()

    def _text(self) -> str:
        return f"this pool has no IPv{self.ip_version} connections; {_choice('ip_version', self.available)}"


@dataclass(eq=False, kw_only=True)
class LeaseExpired(PoolError):
    """A lease was used or released after it was given back or taken away."""

    connection_id: int = 0
    reason: str = ""

    def _text(self) -> str:
        reason = self.reason or "the lease is over"
        return f"connection {self.connection_id} is not leased here any more: {reason}; take a new lease with get()"


@dataclass(eq=False, kw_only=True)
class SlabCorrupt(PoolError):
    """The shared segment holds what no shmpool writes there."""

    name: str = ""
    detail: str = ""

    def _text(self) -> str:
        return (
            f"{_named('slab', self.name)} is damaged: {self.detail or 'unreadable'}; "
            f"stop its processes and remove it{_command('unlink', self.name)}"
        )


@dataclass(eq=False, kw_only=True)
class SlabVersionMismatch(PoolError):
    """The shared segment was made by a shmpool with another layout."""

    name: str = ""
    found: object = None
    expected: object = None

    def _text(self) -> str:
        return (
            f"{_named('slab', self.name)} has layout {self.found}, this shmpool has {self.expected}; "
            "use the same shmpool in all processes"
        )


@dataclass(eq=False, kw_only=True)
class PoolNotFound(PoolError, LookupError):
    """There is no pool of that name for this user."""

    name: str = ""

    def _text(self) -> str:
        return f"there is no {_named('pool', self.name, article='')} of this user; 'shmpool list' shows those there are"


@dataclass(eq=False, kw_only=True)
class PoolExists(PoolError, FileExistsError):
    """There is a pool of that name already."""

    name: str = ""
    pid: int = 0

    def _text(self) -> str:
        return (
            f"{_named('pool', self.name)} exists already, created by process {self.pid}; "
            f"choose another name, or close() that pool first"
        )


@dataclass(eq=False, kw_only=True)
class PoolUnreachable(PoolError, TimeoutError):
    """A living pool has the name, but none of its processes handed its descriptors over. `pids`: who they are; what
    the last attempt met is the `__cause__`."""

    name: str = ""
    waited: float = 0.0
    pids: tuple[int, ...] = ()

    def _text(self) -> str:
        who = f"process {', '.join(map(str, self.pids))}" if self.pids else "nobody that has registered"
        why = "" if self.__cause__ is None else f" ({_reason(self.__cause__)})"
        return (
            f"pool {self.name!r} is alive ({who}), but no process of it answered in {self.waited:.1f} s{why}: they are "
            "stopped, or have forked and not used the pool since; see that one of them uses it, or stop them"
        )


@dataclass(eq=False, kw_only=True)
class PoolInUse(PoolError):
    """The pool cannot be removed: living processes use it."""

    name: str = ""
    pids: tuple[int, ...] = ()

    def _text(self) -> str:
        who = f" by process {', '.join(map(str, self.pids))}" if self.pids else ""
        return (
            f"pool {self.name!r} is in use{who}; stop what uses it first. With --force only the name goes: "
            "what uses the pool keeps it, and nobody can look at it"
        )


# Words that several texts share.

_DIAL_HINTS: tuple[tuple[type[BaseException], str], ...] = (
    (socket.gaierror, "check the host name"),
    (ConnectionRefusedError, "is the server listening there?"),
    (TimeoutError, "is it reachable? else raise connection_timeout"),
    (FileNotFoundError, "there is no socket at that path: is the server running?"),
    (PermissionError, "this user may not open it: check owner and mode"),
)


def _dial_hint(cause: BaseException | None) -> str:
    return next((hint for kind, hint in _DIAL_HINTS if isinstance(cause, kind)), "")


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _named(what: str, name: str, article: str = "the ") -> str:
    return f"{what} {name!r}" if name else f"{article}{what}"


def _command(verb: str, name: str) -> str:
    return f" with 'shmpool {verb} {name}'" if name else ""


def _tally(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "no connections"


def _wanted(protocol: str | None, ip_version: int | None) -> str:
    words = ("" if protocol is None else f" {protocol}", "" if ip_version is None else f" IPv{ip_version}")
    return "".join(words)


def _choice(what: str, available: Sequence[object]) -> str:
    return f"{what} can be {' or '.join(map(str, available))}" if available else f"leave {what} out"


def _short(value: object, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


# Pickling.


def _portable(value: Any) -> Any:
    import pickle

    try:
        pickle.loads(pickle.dumps(value))
    except Exception:  # noqa: BLE001  a foreign object may fail in any way, on either side
        return repr(value)
    return value


def _portable_cause(cause: BaseException | None) -> BaseException | None:
    kept = _portable(cause)
    return RuntimeError(kept) if isinstance(kept, str) else kept
