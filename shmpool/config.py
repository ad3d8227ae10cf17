"""What a pool is to be: `PoolConfig`, the `Target` it connects to, and the words `Protocol` and `IPVersion`.

A `PoolConfig` that exists is a valid one: it is checked whole at construction, all its problems are reported by one
`InvalidConfig`, and nothing is repaired on the way. Each setting stands once, as a dataclass field with its default
and its kind: what its values are, and what a text in the environment or in a URL means. Validation, the ways in and
out, and the hints for misspelt names all walk those fields.

Not here: how a target is connected to (`dialing`), and what the pool does with a setting (`pool` and the core).
Imports nothing of shmpool at run time but `errors`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .errors import InvalidConfig

if TYPE_CHECKING:
    import socket

    from ._core import PooledConnection
    from .dialing import DialRequest
    from .hooks import ClosedConnection, LeakReport

    Dial = Callable[[DialRequest], socket.socket | tuple[socket.socket, bytes]]
    Acceptor = Callable[[socket.socket], socket.socket | tuple[socket.socket, bytes]]
    HealthCheck = Callable[[PooledConnection], bool]
    ConnectionHook = Callable[[PooledConnection], object]
    CloseHook = Callable[[ClosedConnection], object]
    LeakHook = Callable[[LeakReport], object]

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
    """Where connections go, or where a listener is. Made by `Target.parse`, which checks; `text` is what was parsed.

    `host` is a name or an address without brackets, "" for unix; `port` is 0 for unix, and where the kernel is to
    choose one; `path` is "" for tcp and udp.
    """

    scheme: Protocol
    host: str
    port: int
    path: str
    text: str

    @classmethod
    def parse(cls, text: str, *, listening: bool = False) -> Target:
        """The target that `text` names: `tcp://host:port`, `tcp://[::1]:port`, `udp://…`, `unix:///path`.

        Anything else, and anything more than that, raises `InvalidConfig` for the field `target`. The port may be 0
        when it is one to listen at: the kernel chooses.
        """
        try:
            return _parse_target(text, listening)
        except _Unfit as unfit:
            raise InvalidConfig(field="target", value=text, remedy=str(unfit)) from None

    @property
    def numeric_version(self) -> IPVersion | None:
        """The IP version of a host that is an address, else None."""
        import ipaddress

        try:
            return IPVersion(ipaddress.ip_address(self.host).version)
        except ValueError:
            return None

    def __str__(self) -> str:
        return self.text


class _Unfit(Exception):
    """What is wrong with a text, as the remedy that the user gets to read."""


def _parse_target(text: object, listening: bool) -> Target:
    if not isinstance(text, str):
        raise _Unfit(f"must be a text; {_FORMS}")
    if any(character.isspace() or not character.isprintable() for character in text):
        raise _Unfit("remove the whitespace and control characters")
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in list(Protocol):
        raise _Unfit(_FORMS)
    if "?" in rest:
        raise _Unfit("remove the query: PoolConfig.from_url() is what reads settings from one")
    if "#" in rest:
        raise _Unfit("remove the fragment: a target ends before it")
    if scheme == Protocol.UNIX:
        return Target(Protocol.UNIX, "", 0, _unix_path(rest), text)
    host, port = _host_and_port(rest, listening)
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


def _host_and_port(rest: str, listening: bool) -> tuple[str, int]:
    if "@" in rest:
        raise _Unfit("remove user and password: log in on the connection, in a dial of your own")
    if "/" in rest:
        raise _Unfit("end after the port: a tcp or udp target has no path")
    host, separator, port = rest.rpartition(":")
    if rest.endswith("]") or not separator:
        raise _Unfit("add the port: host:port")
    if host.startswith("[") and host.endswith("]"):
        return _ipv6_host(host[1:-1]), _port(port, listening)
    if ":" in host or "[" in host or "]" in host:
        raise _Unfit("put an IPv6 address into brackets: [::1]:port")
    return _name_or_ipv4_host(host), _port(port, listening)


_PORT_WANTED = "the port must be a number from 1 to 65535"


def _port(text: str, listening: bool) -> int:
    if listening and text == "0":
        return 0
    if not re.fullmatch(r"[1-9][0-9]{0,4}", text) or int(text) > 65535:
        raise _Unfit(_PORT_WANTED + (", or 0 to listen at a free one" if listening else ""))
    return int(text)


def _ipv6_host(host: str) -> str:
    import ipaddress

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
        import ipaddress

        try:
            ipaddress.IPv4Address(host)
        except ValueError as error:
            raise _Unfit(f"the host looks like an IPv4 address and is none: {error}") from None
    return host


# Kinds of value -------------------------------------------------------------------------------------------------------

Check = Callable[[object], str]
IDLE_TIMEOUT_S = 300.0
LONGEST_S = 1e9  # thirty years; in nanoseconds, and added to the clock, it still fits 63 bits


class _Kind(NamedTuple):
    """What the values of a setting are."""

    # "" for a value that fits, else what it must be.
    check: Check
    # The value that a text means; the text itself when it means none, which `check` then refuses.
    read: Callable[[str], object] = str
    callable: bool = False


def _read_whole(text: str) -> object:
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else text


def _read_seconds(text: str) -> object:
    if text == "inf":
        return math.inf
    if not re.fullmatch(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?", text):
        return text
    return text if math.isinf(float(text)) else float(text)  # 1e999 is not "never"


def _read_parts(read: Callable[[str], object]) -> Callable[[str], object]:
    """Reads "a,b,c" as a tuple, when each part can be read."""

    def parts(text: str) -> object:
        values = tuple(read(part.strip()) for part in text.split(","))
        return text if any(isinstance(value, str) for value in values) else values

    return parts


def _whole(low: int, high: int) -> _Kind:
    def check(value: object) -> str:
        fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return "" if fits else f"must be a whole number from {low} to {high}"

    return _Kind(check, _read_whole)


def _seconds(*, zero: bool = False, never: bool = False) -> _Kind:
    """Seconds above 0; `zero` allows 0 as well, `never` infinity. NaN fails each comparison, and so the check."""
    wanted = f"must be seconds, {'at least' if zero else 'more than'} 0 and at most {LONGEST_S:g}"
    wanted += ", or infinity (inf) for never" if never else ""

    def check(value: object) -> str:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return wanted
        low = value >= 0 if zero else value > 0
        return "" if low and (value <= LONGEST_S or (never and value == math.inf)) else wanted

    return _Kind(check, _read_seconds)


def _optional(kind: _Kind, none: str) -> _Kind:
    """None as well, which means `none`. The text "none" means None, unless it is a value of its own."""

    def check(value: object) -> str:
        return "" if value is None or not (wrong := kind.check(value)) else f"{wrong}, or None {none}"

    def read(text: str) -> object:
        return None if text.casefold() == "none" and kind.check(text) else kind.read(text)

    return kind._replace(check=check, read=read)


def _choice(*words: str) -> _Kind:
    wanted = f"must be {' or '.join(map(repr, words))}"
    return _Kind(lambda value: "" if isinstance(value, str) and value in words else wanted)


_FLAGS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_flag = _Kind(
    lambda value: "" if isinstance(value, bool) else "must be True or False",
    lambda text: _FLAGS.get(text.casefold(), text),
)


def _check_call(value: object) -> str:
    if isinstance(value, str):
        return "must be callable: a text cannot name one, give the callable itself in Python"
    return "" if callable(value) else "must be callable"


def _callable(none: str) -> _Kind:
    return _optional(_Kind(_check_call, callable=True), none)


_hook = _callable("for nothing")


def name_problem(value: object) -> str:
    """What a pool's name must be, when `value` is none; else ""."""
    fits = isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value)
    return "" if fits else "must have 1 to 64 of A-Z a-z 0-9 . _ - and begin with a letter or a digit"


def _target_problem(value: object, listening: bool = True) -> str:
    try:
        _parse_target(value, listening)
    except _Unfit as unfit:
        return str(unfit)
    return ""


def _check_backoff(value: object) -> str:
    if isinstance(value, tuple) and len(value) == 2 and not any(map(_seconds(zero=True).check, value)):
        first, longest = value
        if first <= longest:
            return ""
    return "must be a tuple (first pause, longest pause) in seconds, the first not the longer one"


# What the kernel takes: the first two are seconds.
_KEEPALIVE = (_whole(1, 32_767), _whole(1, 32_767), _whole(1, 127))


def _check_keepalive(value: object) -> str:
    if isinstance(value, tuple) and len(value) == len(_KEEPALIVE):
        fits = not any(kind.check(part) for kind, part in zip(_KEEPALIVE, value, strict=True))
    else:
        fits = isinstance(value, bool)
    wanted = "(idle seconds, seconds between probes, probes) in whole numbers: at most 32767, 32767 and 127"
    return "" if fits else f"must be True, False or {wanted}"


def _read_keepalive(text: str) -> object:
    return _read_parts(_read_whole)(text) if "," in text else _flag.read(text)


def _setting(default: Any, kind: _Kind, *, own: bool = False) -> Any:
    """`own`: each process may have its own value; the others must be equal in all processes of a named pool."""
    return field(default=default, metadata={"kind": kind, "own": own})


def checked_timeout(value: float) -> float:
    """Seconds from 0, math.inf for ever; TypeError or ValueError for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"timeout must be seconds as a number, not {value!r}")
    if not value >= 0:
        raise ValueError(f"timeout must be seconds >= 0, not {value!r}")
    return value


# The configuration --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    """The settings of a pool. Times are seconds. Exactly one of `target` and `dial` is given."""

    # Where connections come from: a target's text, or a callable that opens one.
    target: str | None = _setting(None, _Kind(lambda value: "" if value is None else _target_problem(value)))
    dial: Dial | None = _setting(None, _callable("with a target"))
    # Or from clients: accept them at the target instead of dialling it, by the acceptor if there is one (called with
    # the listening socket). The backlog is the listener's.
    listening: bool = _setting(False, _flag)
    backlog: int = _setting(1024, _whole(1, 65_535))
    acceptor: Acceptor | None = _setting(None, _callable("to accept"), own=True)
    # The name that other processes find the pool by; None takes a random one.
    name: str | None = _setting(None, _optional(_Kind(name_problem), "for a random one"))

    # How many: the cap over all processes, how many are kept open (None: 2, or 1 under a cap of 1), how many may be
    # idle (None: all), and how far resize() may raise the cap (None: twice, or what the descriptor limit allows).
    max_connections: int = _setting(10, _whole(1, 100_000))
    min_connections: int | None = _setting(None, _optional(_whole(0, 100_000), "for the default"))
    max_idle_connections: int | None = _setting(None, _optional(_whole(0, 100_000), "for max_connections"))
    resize_limit: int | None = _setting(None, _optional(_whole(1, 100_000), "for twice max_connections"))

    # How long: a dial, the wait in get(), idleness, and the life of a connection.
    connection_timeout: float = _setting(10.0, _seconds(), own=True)
    get_timeout: float = _setting(5.0, _seconds(zero=True, never=True), own=True)
    idle_timeout: float = _setting(IDLE_TIMEOUT_S, _seconds(never=True))
    max_lifetime: float = _setting(1800.0, _seconds(never=True))

    # One used within alive_bypass is leased without a look at it; 0 always looks.
    alive_bypass: float = _setting(0.5, _seconds(zero=True), own=True)

    # Dials after a failed one, and the pause between them: (first, longest). Prewarming has its own number.
    dial_retries: int = _setting(0, _whole(0, 100), own=True)
    dial_backoff: tuple[float, float] = _setting(
        (0.01, 1.0), _Kind(_check_backoff, _read_parts(_read_seconds)), own=True
    )
    prewarm_retries: int = _setting(0, _whole(0, 100), own=True)
    # What get() does while the upstream is known to be down and nothing is idle: raise at once, or wait its time.
    when_down: Literal["fail", "wait"] = _setting("fail", _choice("fail", "wait"), own=True)

    # The timeout of each pooled socket; None blocks.
    socket_timeout: float | None = _setting(30.0, _optional(_seconds(), "to block"))
    # Options of the sockets that the pool opens or accepts itself; a dial sets its own. True leaves the times of
    # keepalive to the kernel. Of a buffer's bytes the kernel makes twice as many, up to its own limits
    # (net.core.wmem_max and rmem_max); None leaves the size to it.
    tcp_nodelay: bool = _setting(True, _flag, own=True)
    tcp_keepalive: bool | tuple[int, int, int] = _setting(True, _Kind(_check_keepalive, _read_keepalive), own=True)
    send_buffer_size: int | None = _setting(None, _optional(_whole(1, 2**30 - 1), "for the kernel's"), own=True)
    receive_buffer_size: int | None = _setting(None, _optional(_whole(1, 2**30 - 1), "for the kernel's"), own=True)

    # The pause between two rounds of the background thread; inf: there is no thread, maintain() is called by hand.
    maintenance_interval: float = _setting(1.0, _seconds(never=True), own=True)

    # The check of idle connections (None: closed, reset or unread bytes), how often, and when it is cut short.
    health_check: HealthCheck | None = _setting(None, _callable("to look"), own=True)
    health_check_interval: float = _setting(30.0, _seconds(never=True), own=True)
    health_check_timeout: float = _setting(3.0, _seconds(), own=True)

    # A lease out for longer is a leak: reported, or taken back too. leak_stacks: with where it was taken.
    leak_timeout: float = _setting(300.0, _seconds(never=True), own=True)
    leak_action: Literal["report", "revoke"] = _setting("report", _choice("report", "revoke"), own=True)
    leak_stacks: bool = _setting(False, _flag, own=True)

    # Sizes of the shared segment and of each process's private list of idle slots.
    max_waiters: int = _setting(1024, _whole(1, 3968))
    max_workers: int = _setting(128, _whole(1, 4096))
    local_cache_size: int = _setting(8, _whole(0, 64), own=True)

    # Reading away late datagrams when a UDP connection is returned.
    clear_udp_buffer: bool = _setting(True, _flag)
    udp_clear_timeout: float = _setting(0.1, _seconds(zero=True), own=True)
    udp_clear_max_packets: int = _setting(100, _whole(1, 1_000_000), own=True)

    # Hooks, and whether to count.
    on_created: ConnectionHook | None = _setting(None, _hook, own=True)
    on_borrow: ConnectionHook | None = _setting(None, _hook, own=True)
    on_return: ConnectionHook | None = _setting(None, _hook, own=True)
    on_close: CloseHook | None = _setting(None, _hook, own=True)
    on_leak: LeakHook | None = _setting(None, _hook, own=True)
    stats: bool = _setting(True, _flag, own=True)

    def __post_init__(self) -> None:
        _refuse(_problems(self.to_dict()))

    @property
    def effective_max_idle(self) -> int:
        """`max_idle_connections`; where that is None: `max_connections`."""
        return self.max_connections if self.max_idle_connections is None else self.max_idle_connections

    @property
    def effective_min_connections(self) -> int:
        """`min_connections`; where that is None: 2, or fewer where fewer may be idle. A listening pool has none: it
        cannot make its clients come."""
        if self.listening:
            return 0
        return min(2, self.effective_max_idle) if self.min_connections is None else self.min_connections

    def to_dict(self) -> dict[str, Any]:
        """Every setting by name, callables as they are; `from_dict` takes it back."""
        return {setting.name: getattr(self, setting.name) for setting in fields(self)}

    def to_json(self) -> str:
        """Every setting for people and inspectors: callables by their qualified name, infinity as "inf"."""
        return json.dumps({name: _plain(value) for name, value in self.to_dict().items()}, allow_nan=False)

    def to_slab(self) -> str:
        """What `to_json` makes, and, where it is not the host's, the clock by which the pool's times are."""
        offset = _clock_offset()
        return self.to_json() if offset == _HOSTS_CLOCK else json.dumps({**json.loads(self.to_json()), _CLOCK: offset})

    @classmethod
    def from_json(cls, text: str, **settings: object) -> PoolConfig:
        """A configuration from what `to_json` or `to_slab` made, with `settings` for those that text cannot say, and
        for others.

        Raises InvalidConfig when a `dial` is missing, ValueError when the text is none that `to_json` makes.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("not a configuration")
        values.pop(_CLOCK, None)
        known = _read(values)
        if known.get("dial") is not None and settings.get("dial") is None:
            remedy = "is what opens the connections of this pool: give that callable as dial="
            raise InvalidConfig(field="dial", value=known["dial"], remedy=remedy)
        plain = {name: value for name, value in known.items() if name not in _KINDS or not _KINDS[name].callable}
        return cls.from_dict({**plain, **settings})

    def disagreements(self, json_text: str) -> list[InvalidConfig]:
        """What must be equal in all processes of a pool, and differs between this and what `to_slab` made of theirs."""
        ours = json.loads(self.to_json())
        theirs = {_CLOCK: _HOSTS_CLOCK, **ours, **json.loads(json_text)}
        if theirs[_CLOCK] != (offset := _clock_offset()):
            remedy = (
                f"its processes are in a time namespace of {theirs[_CLOCK]!r} (seconds, nanoseconds added to "
                f"CLOCK_MONOTONIC), this one of {offset!r}: its times mean nothing here; join from a time namespace of "
                "the same offset, or choose another name"
            )
            return [InvalidConfig(field="name", value=self.name, remedy=remedy)]
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
        return cls._made(values)

    @classmethod
    def _made(
        cls, values: Mapping[str, object], found: Iterable[InvalidConfig] = (), called: Callable[[str], str] = str
    ) -> PoolConfig:
        """From settings by name. One error reports what was `found` before and all that is wrong with them; `called`:
        what its reader calls a setting."""
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        settings: dict[str, Any] = {name: value for name, value in given.items() if name in _KINDS}
        unknown = [
            InvalidConfig(field=name, value=value, remedy=_no_such(name, _KINDS))
            for name, value in given.items()
            if name not in _KINDS
        ]
        _refuse([*found, *unknown, *_problems({**_DEFAULTS, **settings}, called)])
        return cls(**settings)

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str] | None = None, *, prefix: str = "SHMPOOL_", **changes: object
    ) -> PoolConfig:
        """A configuration from the environment, or another mapping: SHMPOOL_MAX_CONNECTIONS=8 and so on.

        Numbers, seconds ("inf" for never), true/false/yes/no/on/off/1/0, pairs as "0.01,1", "none" for None. Every
        variable with the prefix must name a setting, but for SHMPOOL_TEST_…, which are left alone. `changes` override
        what is read there, and add what a text cannot say: callables. One InvalidConfig names all that is wrong.
        """
        variables = {name: f"{prefix}{name.upper()}" for name in _KINDS}
        given = {
            variable: text
            for variable, text in (os.environ if environ is None else environ).items()
            if variable.startswith(prefix) and not variable.startswith(_LEFT_ALONE)
        }
        texts = {name: given.pop(variable) for name, variable in variables.items() if variable in given}
        unknown = [
            InvalidConfig(field=variable, value=text, remedy=_no_such(variable.upper(), variables.values()))
            for variable, text in given.items()
        ]
        return cls._made(
            {**_read(texts), **changes}, unknown, lambda name: name if name in changes else variables[name]
        )

    @classmethod
    def from_url(cls, url: str, /, **settings: object) -> PoolConfig:
        """A configuration from a target that may have settings in a query, as in tcp://host:port?max_connections=8.

        What a text means there is the same as in the environment; names and values may be percent-encoded. A setting
        is given once: a second time in the query, or as a keyword too, is an error. `target` is then the part before
        the query. Without a query this is from_dict().
        """
        texts, problems = _url_parts(url)
        problems += [
            InvalidConfig(
                field=name, value=settings[name], remedy="is given twice, in the URL and as a keyword: give it once"
            )
            for name in texts
            if name in settings
        ]
        return cls._made({**_read(texts), **settings}, problems)

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


_KINDS: dict[str, _Kind] = {setting.name: setting.metadata["kind"] for setting in fields(PoolConfig)}
_DEFAULTS: dict[str, object] = {setting.name: setting.default for setting in fields(PoolConfig)}


# Relations between settings -------------------------------------------------------------------------------------------


class _Relation(NamedTuple):
    names: tuple[str, ...]  # the first is the one to blame
    fits: Callable[..., bool]  # takes their values
    remedy: str  # may show their values, by number


def _at_most(value: float | None, most: float | None) -> bool:
    return value is None or most is None or value <= most


_RELATIONS: tuple[_Relation, ...] = (
    _Relation(
        ("target", "dial", "listening"),
        lambda target, dial, listening: listening or (target is None) != (dial is None),
        "give either a target or a dial",
    ),
    _Relation(
        ("target", "listening"),
        lambda target, listening: target is not None or not listening,
        "give what to listen at, as in tcp://0.0.0.0:9000",
    ),
    _Relation(
        ("target", "listening"),
        lambda target, listening: not (listening and target is not None and target.startswith("udp:")),
        "listen at tcp:// or unix://: datagrams come without connections to accept",
    ),
    # All that a target may be only where the pool listens.
    _Relation(
        ("target", "listening"),
        lambda target, listening: target is None or listening or not _target_problem(target, listening=False),
        _PORT_WANTED,
    ),
    _Relation(
        ("dial", "listening"),
        lambda dial, listening: dial is None or not listening,
        "a pool that listens does not dial: leave it out, or give an acceptor",
    ),
    _Relation(
        ("acceptor", "listening"),
        lambda acceptor, listening: acceptor is None or listening,
        "only a pool that listens accepts: leave it out, or give a dial",
    ),
    _Relation(
        ("min_connections", "listening"),
        lambda least, listening: not (least and listening),
        "a pool that listens cannot open connections: leave it out",
    ),
    _Relation(("min_connections", "max_connections"), _at_most, "must be at most max_connections, which is {1}"),
    _Relation(
        ("min_connections", "max_idle_connections"), _at_most, "must be at most max_idle_connections, which is {1}"
    ),
    _Relation(("max_idle_connections", "max_connections"), _at_most, "must be at most max_connections, which is {1}"),
    _Relation(
        ("resize_limit", "max_connections"),
        lambda limit, cap: _at_most(cap, limit),
        "must be at least max_connections, which is {1}",
    ),
    _Relation(
        ("idle_timeout", "max_lifetime"),
        # The default, and "never", do not contradict a shorter life: they leave the end to it.
        lambda idle, life: idle in (IDLE_TIMEOUT_S, math.inf) or idle <= life,
        "must be at most max_lifetime, which is {1}",
    ),
    _Relation(
        ("health_check_timeout", "health_check_interval", "health_check"),
        # The built-in look waits for nothing.
        lambda timeout, interval, check: check is None or timeout < interval,
        "must be less than health_check_interval, which is {1}",
    ),
)


def _problems(values: Mapping[str, object], called: Callable[[str], str] = str) -> list[InvalidConfig]:
    """All that is wrong with a full set of settings. A relation is looked at when all its sides are right."""
    wrong = {name: remedy for name, kind in _KINDS.items() if (remedy := kind.check(values[name]))}
    found = list(wrong.items())
    for names, fits, remedy in _RELATIONS:
        sides = [values[name] for name in names]
        if wrong.keys().isdisjoint(names) and not fits(*sides):
            found.append((names[0], remedy.format(*sides)))
    return [InvalidConfig(field=called(name), value=values[name], remedy=remedy) for name, remedy in found]


def _refuse(problems: list[InvalidConfig]) -> None:
    if problems:
        raise InvalidConfig.many(problems)


def _no_such(name: str, known: Iterable[str]) -> str:
    import difflib

    nearest = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(known)}"
    return f"there is no such setting; {hint}"


# In and out ---------------------------------------------------------------------------------------------------------

_CALLABLE_TEXT_MAX = 200
_LEFT_ALONE = "SHMPOOL_TEST_"  # what shmpool's own tests are told


# The key of what is no setting in a slab's text: CLOCK_MONOTONIC's offset there, as the kernel writes it.
_CLOCK, _HOSTS_CLOCK = "monotonic_offset", "0 0"


def _clock_offset() -> str:
    """Of this process's time namespace; the host's where there are none (before Linux 5.6), or it cannot be read."""
    with contextlib.suppress(OSError), open("/proc/self/timens_offsets", "rb") as file:
        for line in file:
            clock, *offset = line.decode().split()
            if clock == "monotonic":
                return " ".join(offset)
    return _HOSTS_CLOCK


def _read(values: Mapping[str, object]) -> dict[str, object]:
    """Settings by name with what their texts mean; what is no text or no setting stays as it is."""
    return {
        name: _KINDS[name].read(value) if isinstance(value, str) and name in _KINDS else value
        for name, value in values.items()
    }


def _url_parts(url: str) -> tuple[dict[str, str], list[InvalidConfig]]:
    """The target and the query's settings by name, and what is wrong with how they are written."""
    target, mark, query = url.partition("?")
    texts, problems = {"target": target}, []
    for part in query.split("&") if mark else ():
        try:
            name, text = _query_part(part)
        except _Unfit as unfit:
            problems.append(InvalidConfig(field="query", value=part, remedy=str(unfit)))
            continue
        if name in texts:
            problems.append(InvalidConfig(field=name, value=text, remedy="is given twice in the URL: give it once"))
        else:
            texts[name] = text
    return texts, problems


def _query_part(part: str) -> tuple[str, str]:
    name, separator, text = part.partition("=")
    if not name or not separator:
        raise _Unfit("write each setting as name=value, with & between them")
    if "#" in part:
        raise _Unfit("remove the fragment, or write # as %23")
    if re.search(r"%(?![0-9A-Fa-f]{2})", part):
        raise _Unfit("write a percent sign as %25: it begins an encoded byte")
    from urllib.parse import unquote

    try:
        return unquote(name, errors="strict"), unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise _Unfit("its encoded bytes must be UTF-8") from None


def _plain(value: object) -> object:
    """A value that JSON has; of a callable its name, in as many bytes of JSON as it has characters."""
    if callable(value):
        text = f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else repr(value)
        return re.sub(r'[^ -~]|["\\]', "?", text)[:_CALLABLE_TEXT_MAX]
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
