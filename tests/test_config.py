"""PoolConfig and Target: defaults, every refusal and its remedy, and the ways in and out."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmpool.config import UNIX_PATH_MAX, IPVersion, PoolConfig, Protocol, Target
from shmpool.errors import InvalidConfig

TARGET = "tcp://127.0.0.1:6379"
DEFAULTS: dict[str, object] = {item.name: item.default for item in dataclasses.fields(PoolConfig)}
MAY_BE_NEVER = {"get_timeout", "idle_timeout", "max_lifetime"}
NUMBERS = [name for name, value in DEFAULTS.items() if isinstance(value, int | float) and not isinstance(value, bool)]


def config(**settings: Any) -> PoolConfig:
    return PoolConfig(**{"target": TARGET, **settings})


def problems(**settings: Any) -> list[tuple[str, object]]:
    with pytest.raises(InvalidConfig) as caught:
        config(**settings)
    assert all(error.remedy for error in caught.value.errors)
    return [(error.field, error.value) for error in caught.value.errors]


# Words --------------------------------------------------------------------------------------------------------------


def test_words_equal_their_plain_values() -> None:
    assert list[object](Protocol) == ["tcp", "udp", "unix"]
    assert f"{Protocol.UDP} {Protocol.UNIX!s}" == "udp unix"
    assert list[object](IPVersion) == [4, 6]
    assert [Protocol("udp"), IPVersion(4)] == [Protocol.UDP, IPVersion.V4]


# Targets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "scheme", "host", "port", "path", "version"),
    [
        ("tcp://127.0.0.1:6379", "tcp", "127.0.0.1", 6379, "", 4),
        ("tcp://[::1]:1", "tcp", "::1", 1, "", 6),
        ("udp://[fe80::1%eth0]:65535", "udp", "fe80::1%eth0", 65535, "", 6),
        ("udp://db-1.example.com.:53", "udp", "db-1.example.com.", 53, "", None),
        ("tcp://my_service:80", "tcp", "my_service", 80, "", None),
        ("tcp://xn--bcher-kva.example:80", "tcp", "xn--bcher-kva.example", 80, "", None),
        ("unix:///run/redis@1.sock", "unix", "", 0, "/run/redis@1.sock", None),
        (f"unix:///{'x' * (UNIX_PATH_MAX - 1)}", "unix", "", 0, f"/{'x' * (UNIX_PATH_MAX - 1)}", None),
    ],
)
def test_parse(text: str, scheme: str, host: str, port: int, path: str, version: int | None) -> None:
    target = Target.parse(text)
    assert (target.scheme, target.host, target.port, target.path) == (scheme, host, port, path)
    assert str(target) == target.text == text
    assert target.numeric_version == version


REFUSED = [
    (None, "must be a text"),
    (b"tcp://h:1", "must be a text"),
    ("", "write tcp://"),
    ("localhost:6379", "write tcp://"),
    ("http://h:1", "write tcp://"),
    ("TCP://h:1", "write tcp://"),
    ("tcp:/h:1", "write tcp://"),
    ("tcp://", "add the port"),
    ("tcp://h", "add the port"),
    ("tcp://[::1]", "add the port"),
    ("tcp://h:", "from 1 to 65535"),
    ("tcp://h:0", "from 1 to 65535"),
    ("tcp://h:65536", "from 1 to 65535"),
    ("tcp://h:-1", "from 1 to 65535"),
    ("tcp://h:+1", "from 1 to 65535"),
    ("tcp://h:080", "from 1 to 65535"),
    ("tcp://h:8_0", "from 1 to 65535"),
    ("tcp://h:٨", "from 1 to 65535"),
    ("tcp://h:http", "from 1 to 65535"),
    ("tcp://:1", "give a host"),
    ("tcp://user:secret@h:1", "remove user and password"),
    ("tcp://h:1?db=1", "remove the query"),
    ("tcp://h:1#x", "remove the fragment"),
    ("tcp://h:1/", "no path"),
    ("tcp://h:1/0", "no path"),
    ("tcp://::1:80", "brackets"),
    ("tcp://[::1:80", "brackets"),
    ("tcp://::1]:80", "brackets"),
    ("tcp://[]:80", "must hold an IPv6 address"),
    ("tcp://[127.0.0.1]:80", "must hold an IPv6 address"),
    ("tcp://[::1::]:80", "must hold an IPv6 address"),
    ("tcp://256.0.0.1:80", "looks like an IPv4 address"),
    ("tcp://127.1:80", "looks like an IPv4 address"),
    ("tcp://0x7f.0.0.0x1:80", "looks like an IPv4 address"),
    ("tcp://2130706433:80", "looks like an IPv4 address"),
    ("tcp://a..b:80", "must be a name"),
    ("tcp://-a:80", "must be a name"),
    ("tcp://bücher.example:80", "must be a name"),
    (f"tcp://{'x' * 64}:80", "must be a name"),
    (f"tcp://{'x.' * 127}:80", "must be a name"),
    ("tcp://a b:80", "whitespace"),
    (" tcp://h:80", "whitespace"),
    ("tcp://h:80\n", "whitespace"),
    ("tcp://h\x00:80", "control"),
    ("tcp://h\u200b:80", "control"),
    ("unix://", "absolute path"),
    ("unix://run/x.sock", "absolute path"),
    ("unix:run/x.sock", "write tcp://"),
    ("unix:///", "not a directory"),
    ("unix:///run/", "not a directory"),
    ("unix:///run/x?mode=1", "remove the query"),
    (f"unix:///{'x' * UNIX_PATH_MAX}", "at most 107 bytes, this one 108"),
    (f"unix:///{'ü' * 54}", "at most 107 bytes, this one 109"),
]


@pytest.mark.parametrize(("text", "remedy"), REFUSED)
def test_parse_refuses(text: Any, remedy: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        Target.parse(text)
    assert (caught.value.field, caught.value.value) == ("target", text)
    assert remedy in caught.value.remedy
    if text is not None:  # None means "with a dial" there
        assert problems(target=text, max_connections=0) == [("target", text), ("max_connections", 0)]


@given(st.text(max_size=40) | st.text(max_size=30).map("tcp://{}:1".format))
def test_parse_answers_any_text_with_a_target_or_invalid_config(text: str) -> None:
    try:
        answer: object = Target.parse(text).text
    except InvalidConfig as error:
        answer = error.value
    assert answer == text


# Single settings ----------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    assert config().to_dict() == {
        "target": TARGET,
        "dial": None,
        "name": None,
        "max_connections": 10,
        "min_connections": None,
        "connection_timeout": 10.0,
        "get_timeout": 5.0,
        "idle_timeout": 300.0,
        "max_lifetime": 1800.0,
        "alive_bypass": 0.5,
        "dial_retries": 0,
        "dial_backoff": (0.01, 1.0),
        "socket_timeout": 30.0,
        "max_waiters": 1024,
        "max_workers": 128,
        "local_cache_size": 8,
        "clear_udp_buffer": True,
        "udp_clear_timeout": 0.1,
        "udp_clear_max_packets": 100,
        "on_borrow": None,
        "on_return": None,
        "stats": True,
    }


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_setting_refuses_a_wrong_type(name: str) -> None:
    wrong = object()
    assert problems(**{name: wrong}) == [(name, wrong)]


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_is_a_bool_a_text_or_nan(name: str) -> None:
    for wrong in (True, "1", -1, -math.inf, None):
        if not (name == "socket_timeout" and wrong is None):
            assert problems(**{name: wrong}) == [(name, wrong)]
    with pytest.raises(InvalidConfig):
        config(**{name: math.nan})


@pytest.mark.parametrize("name", NUMBERS)
def test_infinity_only_where_it_means_never(name: str) -> None:
    if name in MAY_BE_NEVER:
        assert getattr(config(**{name: math.inf}), name) == math.inf
    else:
        assert problems(**{name: math.inf}) == [(name, math.inf)]


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("name", ["a", "0", "a.b_c-D", "x" * 64], ["", ".a", "-a", "a/b", "a b", "a\n", "ä", "x" * 65, 1]),
        ("max_connections", [1, 100_000], [0, 100_001, 1.0]),
        ("min_connections", [0, 10, None], [-1, 100_001, 1.0, True]),
        ("connection_timeout", [0.001, 5, 1e9], [0, 1.1e9, None]),
        ("get_timeout", [0, 0.5], [-0.001, None]),
        ("alive_bypass", [0, 60.0], []),
        ("dial_retries", [0, 100], [-1, 101, 0.5]),
        ("dial_backoff", [(0, 0), (1, 2.5)], [[0, 1], (1, 0.5), (0,), (0, 1, 2), (-1, 1), (0, math.inf), 1, ("0", 1)]),
        ("socket_timeout", [None, 0.5], [0, math.nan]),
        ("max_waiters", [1, 4032], [0, 4033]),
        ("max_workers", [1, 4096], [0, 4097]),
        ("local_cache_size", [0, 64], [-1, 65]),
        ("udp_clear_timeout", [0, 1], []),
        ("udp_clear_max_packets", [1], [0]),
        ("stats", [False], [0, 1, None]),
        ("clear_udp_buffer", [False], [None]),
        ("on_return", [print, None], ["print"]),
    ],
)
def test_ranges(name: str, right: list[object], wrong: list[object]) -> None:
    for value in right:
        assert getattr(config(**{name: value}), name) is value
    for value in wrong:
        with pytest.raises(InvalidConfig) as caught:
            config(**{name: value})
        assert [error.field for error in caught.value.errors] == [name]


# Relations ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "blamed"),
    [
        ({"target": None}, "target"),
        ({"dial": print}, "target"),
        ({"max_connections": 3, "min_connections": 4}, "min_connections"),
        ({"idle_timeout": 61, "max_lifetime": 60}, "idle_timeout"),
    ],
)
def test_relations(settings: dict[str, Any], blamed: str) -> None:
    assert [name for name, _ in problems(**settings)] == [blamed]


def test_a_relation_tells_the_other_side() -> None:
    with pytest.raises(InvalidConfig, match="min_connections=4: must be at most max_connections, which is 3"):
        config(max_connections=3, min_connections=4)


def test_what_is_no_contradiction() -> None:
    config(max_lifetime=60)  # the default idle_timeout is longer, and harmless
    config(max_lifetime=60, idle_timeout=math.inf)
    PoolConfig(dial=print)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "least"),
    [({}, 2), ({"max_connections": 1}, 1), ({"min_connections": 0}, 0), ({"min_connections": 5}, 5)],
)
def test_what_none_stands_for(settings: dict[str, Any], least: int) -> None:
    assert config(**settings).effective_min_connections == least


# All together -------------------------------------------------------------------------------------------------------


def test_all_problems_are_reported_together() -> None:
    bad = {"target": "x", "max_connections": 0, "max_conections": 1, "socket_timeout": math.inf, "zzz": 1}
    with pytest.raises(InvalidConfig) as caught:
        PoolConfig.from_dict(bad)
    error = caught.value
    assert {part.field for part in error.errors} == set(bad)
    assert "5 problems" in str(error)
    assert "did you mean max_connections?" in str(error)
    assert "zzz=1: there is no such setting; there are target, dial, " in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_frozen_keyword_only_and_hashable() -> None:
    made = config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.name = "x"  # type: ignore[misc]
    with pytest.raises(TypeError):
        PoolConfig(TARGET)  # type: ignore[call-arg]
    assert hash(made) == hash(config())


# In and out ---------------------------------------------------------------------------------------------------------


def test_round_trips() -> None:
    made = config(name="web", dial_backoff=(0.5, 2.0), on_borrow=print, max_lifetime=math.inf)
    assert PoolConfig.from_dict(made.to_dict()) == made
    assert pickle.loads(pickle.dumps(made)) == made


def test_replace_checks_anew() -> None:
    made = config(max_connections=5)
    assert made.replace(max_connections=1).effective_min_connections == 1
    with pytest.raises(InvalidConfig, match="did you mean min_connections"):
        made.replace(min_conections=1)
    with pytest.raises(InvalidConfig, match="max_connections=0"):
        made.replace(max_connections=0)


def test_to_json_is_strict_json_without_callables() -> None:
    made = config(get_timeout=math.inf, on_borrow=problems, on_return=print)
    values = json.loads(made.to_json(), parse_constant=pytest.fail)
    assert list(values) == list(DEFAULTS)
    assert values["get_timeout"] == "inf"
    assert values["on_borrow"].endswith("test_config.problems")
    assert values["on_return"] == "builtins.print"
    assert values["dial_backoff"] == [0.01, 1.0]


TOML = f'target = "{TARGET}"\nmax_connections = 7\nget_timeout = inf\ndial_backoff = [0.5, 2]\n'


@pytest.mark.parametrize("text", [TOML, f'title = "app"\n[shmpool]\n{TOML}[other]\nx = 1\n'])
def test_from_toml(text: str, tmp_path: Path) -> None:
    path = tmp_path / "pool.toml"
    path.write_text(text, encoding="utf-8")
    wanted = config(max_connections=7, get_timeout=math.inf, dial_backoff=(0.5, 2), on_borrow=print)
    assert PoolConfig.from_toml(path, on_borrow=print) == wanted
    assert PoolConfig.from_toml(str(path), on_borrow=print) == wanted
    assert PoolConfig.from_toml(text=text, on_borrow=print) == wanted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("x = ", "not valid TOML"),
        ("shmpool = 1", "must be a table"),
        ("[shmpool]\nmax_conections = 1", "did you mean max_connections"),
    ],
)
def test_from_toml_refuses(text: str, shown: str) -> None:
    with pytest.raises(InvalidConfig, match=shown):
        PoolConfig.from_toml(text=text)


def test_from_toml_takes_one_source() -> None:
    with pytest.raises(TypeError):
        PoolConfig.from_toml()
    with pytest.raises(TypeError):
        PoolConfig.from_toml("pool.toml", text="")
    with pytest.raises(FileNotFoundError):
        PoolConfig.from_toml("/nonexistent/pool.toml")
