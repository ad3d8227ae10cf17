"""The error tree: drawn as it is, evidence in attributes and text, pickling with cause and notes."""

from __future__ import annotations

import builtins
import copy
import dataclasses
import pickle
import re
import socket
from typing import Any

import pytest

from shmpool import errors
from shmpool.errors import (
    CannotListen,
    DescriptorsLost,
    DialError,
    ForeignUser,
    InvalidConfig,
    LeaseExpired,
    NoConnectionForIPVersion,
    NoConnectionForProtocol,
    PoolClosed,
    PoolError,
    PoolExhausted,
    PoolExists,
    PoolInUse,
    PoolNotFound,
    PoolTimeout,
    PoolUnreachable,
    SlabCorrupt,
    SlabVersionMismatch,
)

EVERY = [getattr(errors, name) for name in errors.__all__]

# Each error with full evidence, and what its text must show of it.
SAMPLES: list[tuple[PoolError, list[str]]] = [
    (InvalidConfig(field="max_connections", value=0, remedy="must be 1 or more"), ["max_connections=0", "1 or more"]),
    (PoolClosed(pool="web"), ["'web'", "closed"]),
    (
        PoolTimeout(waited=0.5034, timeout=0.5, counts={"leased": 3, "idle": 0}, protocol="tcp", ip_version=6),
        ["0.503 s", "timeout 0.5 s", "3 leased", "tcp", "IPv6", "max_connections"],
    ),
    (PoolExhausted(reason="all connections are leased", counts={"leased": 4}, limit=4), ["limit 4", "4 leased"]),
    (PoolExhausted(reason="the waiter limit is reached", limit=9), ["limit 9", "max_waiters"]),
    (PoolExhausted(reason="the worker limit is reached", limit=9), ["limit 9", "max_workers"]),
    (
        DialError(target="tcp://h:1", attempt=2, waited=0.25, tried=("::1: refused", "127.0.0.1: refused")),
        ["tcp://h:1", "attempt 2", "0.250 s", "::1: refused; 127.0.0.1: refused"],
    ),
    (NoConnectionForProtocol(protocol="udp", available=("tcp", "unix")), ["udp", "tcp or unix"]),
    (NoConnectionForIPVersion(ip_version=6, available=(4,)), ["IPv6", "ip_version can be 4"]),
    (NoConnectionForIPVersion(ip_version=6), ["IPv6", "leave ip_version out"]),
    (LeaseExpired(connection_id=17, reason="released"), ["17", "released", "get()"]),
    (SlabCorrupt(name="web", detail="slot 3: state 15"), ["'web'", "slot 3: state 15", "shmpool unlink web"]),
    (SlabVersionMismatch(name="web", found=1, expected=2), ["'web'", "layout 1", "has 2"]),
    (PoolNotFound(name="web"), ["'web'", "shmpool list"]),
    (PoolExists(name="web", pid=321), ["'web'", "process 321", "close()"]),
    (PoolUnreachable(name="web", waited=10.02, pids=(3, 21)), ["'web'", "process 3, 21", "10.0 s", "stopped"]),
    (PoolInUse(name="web", pids=(3, 21)), ["'web'", "process 3, 21"]),
    (ForeignUser(pool="web", uid=33, owner=0), ["'web'", "user 0", "as user 33", "pool.recover()"]),
    (CannotListen(host="::1", port=80, reason="Permission denied"), ["::1 port 80", "Permission denied", "--port"]),
    (DescriptorsLost(pool="web"), ["'web'", "descriptors", "keep inherited descriptors open"]),
]


def test_the_tree_is_as_drawn() -> None:
    drawn = dict(re.findall(r"[├└]── (\w+)(?:\((\w+)\))?", errors.__doc__ or ""))
    assert {"PoolError", *drawn} == set(errors.__all__)
    for name, builtin in drawn.items():
        bases = (PoolError, getattr(builtins, builtin)) if builtin else (PoolError,)
        assert getattr(errors, name).__bases__ == bases


def test_every_error_has_a_sample() -> None:
    assert {type(error) for error, _ in SAMPLES} == set(EVERY) - {PoolError}


@pytest.mark.parametrize(("error", "shown"), SAMPLES)
def test_text_shows_the_evidence(error: PoolError, shown: list[str]) -> None:
    for part in shown:
        assert part in str(error)


@pytest.mark.parametrize("kind", EVERY)
def test_a_partial_error_can_be_made_and_printed(kind: type[PoolError]) -> None:
    assert str(kind())


@pytest.mark.parametrize("kind", EVERY)
def test_evidence_is_keyword_only(kind: Any) -> None:
    with pytest.raises(TypeError):
        kind("evidence")


def _evidence(error: PoolError) -> dict[str, object]:
    return {item.name: getattr(error, item.name) for item in dataclasses.fields(error)}


@pytest.mark.parametrize("error", [error for error, _ in SAMPLES])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_keeps_type_evidence_text_and_cause(error: PoolError, protocol: int) -> None:
    sent = copy.copy(error)
    sent.__cause__ = ConnectionRefusedError(111, "refused")
    got = pickle.loads(pickle.dumps(sent, protocol))
    assert type(got) is type(error)
    assert _evidence(got) == _evidence(error)
    assert str(got) == str(sent)
    assert repr(got.__cause__) == repr(sent.__cause__)
    assert got.__suppress_context__


def test_pickling_a_problem_list() -> None:
    parts = [InvalidConfig(field=name, value=0, remedy="no") for name in "ab"]
    got = pickle.loads(pickle.dumps(InvalidConfig.many(parts)))
    assert [error.field for error in got.errors] == ["a", "b"]


def test_what_cannot_be_pickled_travels_as_its_repr() -> None:
    class Local(Exception):
        pass

    sent = InvalidConfig(field="dial", value=lambda: None, remedy="no")
    sent.__cause__ = Local("why")
    got = pickle.loads(pickle.dumps(sent))
    assert "lambda" in got.value
    assert "Local('why')" in str(got.__cause__)


class Unloadable(Exception):
    """Pickles, and then cannot be made again: its constructor wants more than `args`."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def test_what_pickles_but_does_not_unpickle_travels_as_its_repr_too() -> None:
    sent = PoolTimeout(waited=1.0)
    sent.__cause__ = Unloadable(3, "why")
    got = pickle.loads(pickle.dumps(sent))
    assert got.waited == 1.0
    assert "Unloadable('why')" in str(got.__cause__)


def test_notes_survive_pickling() -> None:
    error = PoolClosed(pool="web")
    vars(error)["__notes__"] = ["while serving /"]  # what add_note() does, from Python 3.11 on
    assert vars(pickle.loads(pickle.dumps(error)))["__notes__"] == ["while serving /"]


def test_many_reports_all_with_the_first_as_its_own() -> None:
    parts = [InvalidConfig(field=name, value=value, remedy="no") for value, name in enumerate("abc")]
    error = InvalidConfig.many(parts)
    assert (error.field, error.value, error.remedy) == ("a", 0, "no")
    assert error.errors == tuple(parts)
    assert "3 problems" in str(error)
    assert all(str(part) in str(error) for part in parts)
    assert str(InvalidConfig.many(parts[:1])) == str(parts[0])


def test_timeout_names_the_last_dial_error() -> None:
    error = PoolTimeout(waited=1.0, timeout=1.0)
    error.__cause__ = DialError(target="tcp://h:1")
    assert "last dial failed: cannot connect to tcp://h:1" in str(error)


@pytest.mark.parametrize(
    ("cause", "hint"),
    [
        (socket.gaierror(-2, "unknown"), "host name"),
        (ConnectionRefusedError(111, "refused"), "listening"),
        (TimeoutError("timed out"), "connection_timeout"),
        (FileNotFoundError(2, "no such file"), "no socket at that path"),
        (PermissionError(13, "denied"), "owner and mode"),
    ],
)
def test_dial_error_gives_reason_and_hint(cause: OSError, hint: str) -> None:
    error = DialError(target="tcp://h:1")
    error.__cause__ = cause
    assert type(cause).__name__ in str(error)
    assert hint in str(error)


def test_a_long_value_is_cut_in_the_text_only() -> None:
    error = InvalidConfig(field="name", value="x" * 5000, remedy="shorter")
    assert len(str(error)) < 200
    assert error.value == "x" * 5000
