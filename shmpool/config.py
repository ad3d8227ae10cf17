"""What a pool is to be: `PoolConfig`, the `Target` it connects to, and the words `Protocol` and `IPVersion`.

A `PoolConfig` that exists is a valid one: it is checked whole at construction, all its problems are reported by one
`InvalidConfig`, and nothing is repaired on the way. Each setting stands once, as a dataclass field with its default
and its check; validation, `from_dict`, `to_json` and the hints for misspelt names all walk those fields.

Not here: how a target is connected to (`dialing`), and what the pool does with a setting (`pool` and the core).
Imports nothing of shmpool at run time but `errors`.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any

from .errors import InvalidConfig

if TYPE_CHECKING:
    import socket

    from ._core import PooledConnection
    from .dialing import DialRequest

    Dial = Callable[[DialRequest], socket.socket | tuple[socket.socket, bytes]]
    ConnectionHook = Callable[[PooledConnection], object]

__all__ = ["IPVersion", "PoolConfig", "Protocol", "Target"]


class Protocol(str, Enum):
    """What a connection speaks to the kernel. Compares equal to its plain text."""

    TCP = "tcp"
    UDP = "udp"
    UNIX = "unix"

    def __str__(self) -> str:
        return str(self.value)


class IPVersion(IntEnum):
    """Compares equal to 4 or 6."""

    V4 = 4
    V6 = 6


# Targets ------------------------------------------------------------------------------------------------------------

UNIX_PATH_MAX = 107  # bytes; sun_path has 108, the last of which is the zero
_HOST_MAX = 253
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_NUMERIC_LABEL = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")
_FORMS = "write tcp://host:port, udp://host:port or unix:///path"


@dataclass(frozen=True, slots=True)
class Target:
    """Where connections go. Made by `Target.parse`, which checks; `text` is what was parsed.

    `host` is a name or an address without brackets, "" for unix; `port` is 0 for unix; `path` is "" for tcp and udp.
    """

    scheme: Protocol
    host: str
    port: int
    path: str
    text: str

    @classmethod
    def parse(cls, text: str) -> Target:
        """The target that `text` names: `tcp://host:port`, `tcp://[::1]:port`, `udp://…`, `unix:///path`.

        Anything else, and anything more than that, raises `InvalidConfig` for the field `target`.
        """
        try:
            return _parse_target(text)
        except _Unfit as unfit:
            raise InvalidConfig(field="target", value=text, remedy=str(unfit)) from None

    @property
    def numeric_version(self) -> IPVersion | None:
        """The IP version of a host that is an address, else None."""
        try:
            return IPVersion(ipaddress.ip_address(self.host).version)
        except ValueError:
            return None

    def __str__(self) -> str:
        return self.text


class _Unfit(Exception):
    """What is wrong with a text, as the remedy that the user gets to read."""


def _parse_target(text: object) -> Target:
    if not isinstance(text, str):
        raise _Unfit(f"must be a text; {_FORMS}")
    if any(character.isspace() or not character.isprintable() for character in text):
        raise _Unfit("remove the whitespace and control characters")
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in list(Protocol):
        raise _Unfit(_FORMS)
    for mark, part in (("?", "query"), ("#", "fragment")):
        if mark in rest:
            raise _Unfit(f"remove the {part}: settings are given to the Pool, not in the target")
    if scheme == Protocol.UNIX:
        return Target(Protocol.UNIX, "", 0, _unix_path(rest), text)
    host, port = _host_and_port(rest)
    return Target(Protocol(scheme), host, port, "", text)


def _unix_path(path: str) -> str:
    if not path.startswith("/"):
        raise _Unfit("give an absolute path, with three slashes: unix:///path")
    if path.endswith("/"):
        raise _Unfit("name the socket's file, not a directory")
    size = len(os.fsencode(path))
    if size > UNIX_PATH_MAX:
        raise _Unfit(f"a unix path has at most {UNIX_PATH_MAX} bytes, this one {size}: use a shorter path")
    return path


def _host_and_port(rest: str) -> tuple[str, int]:
    if "@" in rest:
        raise _Unfit("remove user and password: log in on the connection, in a dial of your own")
    if "/" in rest:
        raise _Unfit("end after the port: a tcp or udp target has no path")
    host, separator, port = rest.rpartition(":")
    if rest.endswith("]") or not separator:
        raise _Unfit("add the port: host:port")
    if host.startswith("[") and host.endswith("]"):
        return _ipv6_host(host[1:-1]), _port(port)
    if ":" in host or "[" in host or "]" in host:
        raise _Unfit("put an IPv6 address into brackets: [::1]:port")
    return _name_or_ipv4_host(host), _port(port)


def _port(text: str) -> int:
    wanted = "the port must be a number from 1 to 65535"
    if not re.fullmatch(r"[1-9][0-9]{0,4}", text):
        raise _Unfit(wanted)
    port = int(text)
    if port > 65535:
        raise _Unfit(wanted)
    return port


def _ipv6_host(host: str) -> str:
    try:
        ipaddress.IPv6Address(host)
    except ValueError as error:
        raise _Unfit(f"the brackets must hold an IPv6 address: {error}") from None
    return host


def _name_or_ipv4_host(host: str) -> str:
    labels = host.removesuffix(".").split(".")
    if not host:
        raise _Unfit("give a host before the port")
    if len(host) > _HOST_MAX or not all(_LABEL.fullmatch(label) for label in labels):
        raise _Unfit("the host must be a name of letters, digits, '-', '_' and '.' (others as xn--…) or an address")
    # A resolver takes 127.1 and 0x7f.1 for addresses. Only what is plainly one is taken for one here.
    if _NUMERIC_LABEL.fullmatch(labels[-1]):
        try:
            ipaddress.IPv4Address(host)
        except ValueError as error:
            raise _Unfit(f"the host looks like an IPv4 address and is none: {error}") from None
    return host


# Checks: each takes a value and answers "" when it fits, else what it must be -----------------------------------------

Check = Callable[[object], str]
IDLE_TIMEOUT_S = 300.0
LONGEST_S = 1e9  # thirty years; in nanoseconds, and added to the clock, it still fits 63 bits


def _whole(low: int, high: int) -> Check:
    def check(value: object) -> str:
        fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return "" if fits else f"must be a whole number from {low} to {high}"

    return check


def _seconds(*, zero: bool = False, never: bool = False) -> Check:
    """Seconds above 0; `zero` allows 0 as well, `never` infinity. NaN fails each comparison, and so the check."""
    wanted = f"must be seconds, {'at least' if zero else 'more than'} 0 and at most {LONGEST_S:g}"
    wanted += ", or math.inf for never" if never else ""

    def check(value: object) -> str:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return wanted
        low = value >= 0 if zero else value > 0
        return "" if low and (value <= LONGEST_S or (never and value == math.inf)) else wanted

    return check


def _optional(check: Check, none: str) -> Check:
    return lambda value: "" if value is None or not (wrong := check(value)) else f"{wrong}, or None {none}"


def _flag(value: object) -> str:
    return "" if isinstance(value, bool) else "must be True or False"


def _call(value: object) -> str:
    return "" if callable(value) else "must be callable"


def name_problem(value: object) -> str:
    """What a pool's name must be, when `value` is none; else ""."""
    fits = isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value)
    return "" if fits else "must have 1 to 64 of A-Z a-z 0-9 . _ - and begin with a letter or a digit"


def _target(value: object) -> str:
    try:
        _parse_target(value)
    except _Unfit as unfit:
        return str(unfit)
    return ""


def _backoff(value: object) -> str:
    if isinstance(value, tuple) and len(value) == 2 and not any(map(_seconds(zero=True), value)):
        first, longest = value
        if first <= longest:
            return ""
    return "must be (first pause, longest pause) in seconds, the first not the longer one"


_optional_call = _optional(_call, "for nothing")


def _setting(default: Any, check: Check, *, own: bool = False) -> Any:
    """`own`: each process may have its own value; the others must be equal in all processes of a named pool."""
    return field(default=default, metadata={"check": check, "own": own})


# The configuration --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    """The settings of a pool. Times are seconds. Exactly one of `target` and `dial` is given."""

    # Where connections come from: a target's text, or a callable that opens one.
    target: str | None = _setting(None, lambda value: "" if value is None else _target(value))
    dial: Dial | None = _setting(None, _optional(_call, "with a target"))
    # The name that other processes find the pool by; None takes a random one.
    name: str | None = _setting(None, _optional(name_problem, "for a random one"))

    # How many: the cap over all processes, and how many `maintain()` keeps open (None: 2, or 1 under a cap of 1).
    max_connections: int = _setting(10, _whole(1, 100_000))
    min_connections: int | None = _setting(None, _optional(_whole(0, 100_000), "for the default"))

    # How long: a dial, the wait in get(), idleness, and the life of a connection.
    connection_timeout: float = _setting(10.0, _seconds(), own=True)
    get_timeout: float = _setting(5.0, _seconds(zero=True, never=True), own=True)
    idle_timeout: float = _setting(IDLE_TIMEOUT_S, _seconds(never=True))
    max_lifetime: float = _setting(1800.0, _seconds(never=True))

    # One used within alive_bypass is leased without a look at it; 0 always looks.
    alive_bypass: float = _setting(0.5, _seconds(zero=True), own=True)

    # Dials after a failed one, and the pause between them: (first, longest).
    dial_retries: int = _setting(0, _whole(0, 100), own=True)
    dial_backoff: tuple[float, float] = _setting((0.01, 1.0), _backoff, own=True)
    # The timeout of each pooled socket; None blocks.
    socket_timeout: float | None = _setting(30.0, _optional(_seconds(), "to block"))

    # Sizes of the shared segment and of each process's private list of idle slots.
    max_waiters: int = _setting(1024, _whole(1, 4032))
    max_workers: int = _setting(128, _whole(1, 4096))
    local_cache_size: int = _setting(8, _whole(0, 64), own=True)

    # Reading away late datagrams when a UDP connection is returned.
    clear_udp_buffer: bool = _setting(True, _flag)
    udp_clear_timeout: float = _setting(0.1, _seconds(zero=True), own=True)
    udp_clear_max_packets: int = _setting(100, _whole(1, 1_000_000), own=True)

    # Hooks, and whether to count.
    on_borrow: ConnectionHook | None = _setting(None, _optional_call, own=True)
    on_return: ConnectionHook | None = _setting(None, _optional_call, own=True)
    stats: bool = _setting(True, _flag, own=True)

    def __post_init__(self) -> None:
        _refuse(_problems(self.to_dict()))

    @property
    def effective_min_connections(self) -> int:
        """`min_connections`; where that is None: 2, or 1 under a cap of 1."""
        return min(2, self.max_connections) if self.min_connections is None else self.min_connections

    def to_dict(self) -> dict[str, Any]:
        """Every setting by name, callables as they are; `from_dict` takes it back."""
        return {setting.name: getattr(self, setting.name) for setting in fields(self)}

    def to_json(self) -> str:
        """Every setting for people and inspectors: callables by their qualified name, infinity as "inf"."""
        return json.dumps({name: _plain(value) for name, value in self.to_dict().items()}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, **settings: object) -> PoolConfig:
        """A configuration from what `to_json` made, with `settings` for those that text cannot say, and for others.

        Raises InvalidConfig when a `dial` is missing, ValueError when the text is none that `to_json` makes.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("not a configuration")
        known = {name: math.inf if value == "inf" and name != "name" else value for name, value in values.items()}
        if known.get("dial") is not None and settings.get("dial") is None:
            remedy = "is what opens the connections of this pool: give that callable as dial="
            raise InvalidConfig(field="dial", value=known["dial"], remedy=remedy)
        plain = {name: value for name, value in known.items() if name not in _CALLABLES}
        return cls.from_dict({**plain, **settings})

    def disagreements(self, json_text: str) -> list[InvalidConfig]:
        """What must be equal in all processes of a pool, and differs between this and what `to_json` made of theirs."""
        ours = json.loads(self.to_json())
        theirs = {**ours, **json.loads(json_text)}
        return [
            InvalidConfig(
                field=setting.name,
                value=getattr(self, setting.name),
                remedy=f"the pool {self.name!r} exists with {theirs[setting.name]!r}, and its processes share this "
                "setting: give the same, choose another name, or attach() to take the pool's settings",
            )
            for setting in fields(self)
            if not setting.metadata["own"]
            and _comparable(setting.name, theirs[setting.name]) != _comparable(setting.name, ours[setting.name])
        ]

    def replace(self, **changes: object) -> PoolConfig:
        """This configuration with some settings changed, checked anew."""
        return self.from_dict({**self.to_dict(), **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> PoolConfig:
        """A configuration from settings by name; a list (JSON and TOML have no tuples) stands for a tuple."""
        if not isinstance(values, Mapping):
            raise InvalidConfig(field="config", value=values, remedy="must be settings by name: a dict")
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        defaults: dict[str, object] = {setting.name: setting.default for setting in fields(cls)}
        known = {name: value for name, value in given.items() if name in defaults}
        unknown = [
            InvalidConfig(field=name, value=value, remedy=_no_such(name, defaults))
            for name, value in given.items()
            if name not in defaults
        ]
        if unknown:
            _refuse([*unknown, *_problems({**defaults, **known})])
        settings: dict[str, Any] = known
        return cls(**settings)

    @classmethod
    def from_toml(
        cls, path: str | os.PathLike[str] | None = None, *, text: str | None = None, **changes: object
    ) -> PoolConfig:
        """A configuration from a TOML file or text: its table `[shmpool]`, or its top level when it has none.

        `changes` override what is read there, and add what TOML cannot say: callables.
        """
        if path is not None and text is None:
            with open(path, encoding="utf-8") as file:
                return cls.from_dict({**_toml_table(file.read(), os.fspath(path)), **changes})
        if path is None and text is not None:
            return cls.from_dict({**_toml_table(text, "text"), **changes})
        raise TypeError("from_toml() takes either a path or text=")


# (a setting, another one, when the pair is right, what to say of the first when it is not)
_Relation = tuple[str, str, Callable[[Any, Any], bool], str]


def _at_most(value: float | None, most: float | None) -> bool:
    return value is None or most is None or value <= most


_RELATIONS: tuple[_Relation, ...] = (
    ("target", "dial", lambda target, dial: (target is None) != (dial is None), "give either a target or a dial"),
    ("min_connections", "max_connections", _at_most, "must be at most max_connections, which is {}"),
    (
        "idle_timeout",
        "max_lifetime",
        # The default, and "never", do not contradict a shorter life: they leave the end to it.
        lambda idle, life: idle in (IDLE_TIMEOUT_S, math.inf) or idle <= life,
        "must be at most max_lifetime, which is {}",
    ),
)


def _problems(values: Mapping[str, object]) -> list[InvalidConfig]:
    """All that is wrong with a full set of settings. A relation is looked at when both its sides are right."""
    wrong = {
        setting.name: remedy
        for setting in fields(PoolConfig)
        if (remedy := setting.metadata["check"](values[setting.name]))
    }
    found = [InvalidConfig(field=name, value=values[name], remedy=remedy) for name, remedy in wrong.items()]
    for name, other, fits, remedy in _RELATIONS:
        if name not in wrong and other not in wrong and not fits(values[name], values[other]):
            found.append(InvalidConfig(field=name, value=values[name], remedy=remedy.format(values[other])))
    return found


def _refuse(problems: list[InvalidConfig]) -> None:
    if problems:
        raise InvalidConfig.many(problems)


def _no_such(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(known)}"
    return f"there is no such setting; {hint}"


_CALLABLES = ("dial", "on_borrow", "on_return")
_CALLABLE_TEXT_MAX = 200


def _plain(value: object) -> object:
    if callable(value):
        text = f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else repr(value)
        return text[:_CALLABLE_TEXT_MAX]
    return "inf" if value == math.inf else value


def _comparable(name: str, value: object) -> object:
    """A setting for comparison between processes: of a dial, only that there is one. Its module differs (`__main__` and
    `__mp_main__` of spawned processes), and what has no name shows an address."""
    return value is None if name == "dial" else value


def _toml_table(text: str, source: str) -> dict[str, object]:
    try:
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
    except ImportError:
        remedy = "this Python reads no TOML: install tomli, or use from_dict()"
        raise InvalidConfig(field="toml", value=source, remedy=remedy) from None
    try:
        top: dict[str, object] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidConfig(field="toml", value=source, remedy=f"is not valid TOML: {error}") from error
    table = top.get("shmpool", top)
    if not isinstance(table, dict):
        raise InvalidConfig(field="shmpool", value=table, remedy="must be a table: [shmpool]")
    return table
