"""PoolConfig and Target: defaults, every refusal and its remedy, and the ways in and out."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmpool.config import UNIX_PATH_MAX, IPVersion, PoolConfig, Protocol, Target
from shmpool.errors import InvalidConfig

TARGET = "tcp://127.0.0.1:6379"
DEFAULTS: dict[str, object] = {item.name: item.default for item in dataclasses.fields(PoolConfig)}
MAY_BE_NEVER = {
    "get_timeout",
    "idle_timeout",
    "max_lifetime",
    "maintenance_interval",
    "health_check_interval",
    "leak_timeout",
}
NUMBERS = [name for name, value in DEFAULTS.items() if isinstance(value, int | float) and not isinstance(value, bool)]
FLAGS = [name for name, value in DEFAULTS.items() if isinstance(value, bool) and name != "tcp_keepalive"]
CALLABLES = {
    "dial",
    "acceptor",
    "health_check",
    "on_created",
    "on_borrow",
    "on_return",
    "on_close",
    "on_leak",
}
TEXTS = {"target", "name", "when_down", "leak_action"}
# For each setting but the callables another value than the default, and a text that means it.
OTHER: dict[str, tuple[Any, str]] = {
    "target": ("unix:///run/x", "unix:///run/x"),
    "listening": (True, "yes"),
    "backlog": (5, "5"),
    "name": ("web", "web"),
    "max_connections": (8, "8"),
    "min_connections": (0, "0"),
    "max_idle_connections": (7, "7"),
    "resize_limit": (50, "50"),
    "connection_timeout": (2.5, "2.5"),
    "get_timeout": (math.inf, "inf"),
    "idle_timeout": (60, "6e1"),
    "max_lifetime": (3600, "3600."),
    "alive_bypass": (0, "0"),
    "dial_retries": (3, "+3"),
    "dial_backoff": ((0.5, 2), "0.5, 2"),
    "prewarm_retries": (1, "1"),
    "when_down": ("wait", "wait"),
    "socket_timeout": (None, "None"),
    "tcp_nodelay": (False, "off"),
    "tcp_keepalive": ((60, 10, 5), "60,10,5"),
    "send_buffer_size": (65536, "65536"),
    "receive_buffer_size": (65536, "65536"),
    "maintenance_interval": (0.25, ".25"),
    "health_check_interval": (5, "5"),
    "health_check_timeout": (0.5, "0.5"),
    "leak_timeout": (math.inf, "inf"),
    "leak_action": ("revoke", "revoke"),
    "leak_stacks": (True, "TRUE"),
    "max_waiters": (16, "16"),
    "max_workers": (4, "4"),
    "local_cache_size": (0, "0"),
    "clear_udp_buffer": (False, "no"),
    "udp_clear_timeout": (0.5, "0.5"),
    "udp_clear_max_packets": (10, "10"),
    "stats": (False, "0"),
}
SHARED = {
    "target",
    "dial",
    "listening",
    "backlog",
    "name",
    "max_connections",
    "min_connections",
    "max_idle_connections",
    "resize_limit",
    "idle_timeout",
    "max_lifetime",
    "socket_timeout",
    "max_waiters",
    "max_workers",
    "clear_udp_buffer",
}


def config(**settings: Any) -> PoolConfig:
    return PoolConfig(**{"target": TARGET, **settings})


def problems(**settings: Any) -> list[tuple[str, object]]:
    with pytest.raises(InvalidConfig) as caught:
        config(**settings)
    assert all(error.remedy for error in caught.value.errors)
    return [(error.field, error.value) for error in caught.value.errors]


def outcome(make: Callable[[], PoolConfig]) -> object:
    """The configuration that `make` makes, or what its errors say."""
    try:
        return make()
    except InvalidConfig as error:
        return sorted((part.field.lower().removeprefix("shmpool_"), part.remedy) for part in error.errors)


def variable(name: str) -> str:
    return f"SHMPOOL_{name.upper()}"


def from_env(given: dict[str, str], **changes: Any) -> PoolConfig:
    return PoolConfig.from_env({"PATH": "/bin", "SHMPOOL_TARGET": TARGET, **given}, **changes)


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
    ("tcp://h:1?db=1", "remove the query: PoolConfig.from_url()"),
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
        assert sorted(problems(target=text, max_connections=0)) == [("max_connections", 0), ("target", text)]


@pytest.mark.parametrize("text", ["tcp://127.0.0.1:0", "tcp://0.0.0.0:0", "tcp://[::]:0", "tcp://h:0", "unix:///a:0"])
def test_a_listener_may_leave_its_port_to_the_kernel(text: str) -> None:
    target = Target.parse(text, listening=True)
    assert (target.text, target.port) == (text, 0)
    assert config(target=text, listening=True).target == text


@pytest.mark.parametrize("port", ["00", "65536", "-0", ""])
def test_a_listener_takes_no_other_port_than_one_dials(port: str) -> None:
    with pytest.raises(InvalidConfig, match="from 1 to 65535, or 0 to listen at a free one"):
        Target.parse(f"tcp://h:{port}", listening=True)


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
        "listening": False,
        "backlog": 1024,
        "acceptor": None,
        "name": None,
        "max_connections": 10,
        "min_connections": None,
        "max_idle_connections": None,
        "resize_limit": None,
        "connection_timeout": 10.0,
        "get_timeout": 5.0,
        "idle_timeout": 300.0,
        "max_lifetime": 1800.0,
        "alive_bypass": 0.5,
        "dial_retries": 0,
        "dial_backoff": (0.01, 1.0),
        "prewarm_retries": 0,
        "when_down": "fail",
        "socket_timeout": 30.0,
        "tcp_nodelay": True,
        "tcp_keepalive": True,
        "send_buffer_size": None,
        "receive_buffer_size": None,
        "maintenance_interval": 1.0,
        "health_check": None,
        "health_check_interval": 30.0,
        "health_check_timeout": 3.0,
        "leak_timeout": 300.0,
        "leak_action": "report",
        "leak_stacks": False,
        "max_waiters": 1024,
        "max_workers": 128,
        "local_cache_size": 8,
        "clear_udp_buffer": True,
        "udp_clear_timeout": 0.1,
        "udp_clear_max_packets": 100,
        "on_created": None,
        "on_borrow": None,
        "on_return": None,
        "on_close": None,
        "on_leak": None,
        "stats": True,
    }


def test_the_tables_of_these_tests_are_whole() -> None:
    assert OTHER.keys() | CALLABLES == DEFAULTS.keys()
    assert not OTHER.keys() & CALLABLES
    assert all(value != DEFAULTS[name] for name, (value, _) in OTHER.items())


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
        ("max_idle_connections", [2, 10, None], [-1, 100_001, 1.0, True]),
        ("resize_limit", [10, 100_000, None], [0, 100_001, 1.0]),
        ("prewarm_retries", [0, 100], [-1, 101]),
        ("when_down", ["fail", "wait"], ["", "Fail", None, ("fail",)]),
        ("tcp_nodelay", [False], [0, None]),
        (
            "tcp_keepalive",
            [True, False, (1, 1, 1), (32767, 32767, 127)],
            [
                None,
                1,
                [1, 1, 1],
                (1, 1),
                (1, 1, 1, 1),
                (0, 1, 1),
                (1, 0, 1),
                (1, 1, 0),
                (1, 1, 128),
                (1.0, 1, 1),
                (True,),
            ],
        ),
        ("send_buffer_size", [1, 2**30 - 1, None], [0, 2**30, 1.0]),
        ("receive_buffer_size", [1, 2**30 - 1, None], [0, 2**30, 1.0]),
        ("maintenance_interval", [0.001, math.inf], [0]),
        ("health_check_interval", [0.001, math.inf], [0]),
        ("health_check_timeout", [0.001], [0]),
        ("leak_timeout", [0.001, math.inf], [0]),
        ("leak_action", ["report", "revoke"], ["close", None, True]),
        ("backlog", [1, 65535], [0, 65536]),
        ("max_waiters", [1, 3968], [0, 3969]),
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


@pytest.mark.parametrize("name", sorted(CALLABLES))
def test_a_text_is_no_callable(name: str) -> None:
    with pytest.raises(InvalidConfig, match="a text cannot name one"):
        config(**{name: "json:loads"})


# Relations ----------------------------------------------------------------------------------------------------------


LISTENING = {"listening": True}


@pytest.mark.parametrize(
    ("settings", "blamed"),
    [
        ({"target": None}, "target"),
        ({"dial": print}, "target"),
        ({"target": "tcp://h:0"}, "target"),
        ({"max_connections": 3, "min_connections": 4}, "min_connections"),
        ({"max_idle_connections": 3, "min_connections": 4}, "min_connections"),
        ({"max_connections": 3, "max_idle_connections": 4}, "max_idle_connections"),
        ({"max_connections": 3, "resize_limit": 2}, "resize_limit"),
        ({"idle_timeout": 61, "max_lifetime": 60}, "idle_timeout"),
        ({"health_check": print, "health_check_interval": 3}, "health_check_timeout"),
        ({"health_check": print, "health_check_interval": 1, "health_check_timeout": 2}, "health_check_timeout"),
        ({"acceptor": print}, "acceptor"),
        ({**LISTENING, "target": None}, "target"),
        ({**LISTENING, "target": "udp://127.0.0.1:9"}, "target"),
        ({**LISTENING, "target": "udp://127.0.0.1:0"}, "target"),
        ({**LISTENING, "dial": print}, "dial"),
        ({**LISTENING, "min_connections": 1}, "min_connections"),
    ],
)
def test_relations(settings: dict[str, Any], blamed: str) -> None:
    assert [name for name, _ in problems(**settings)] == [blamed]


def test_all_relations_are_reported_together() -> None:
    found = problems(
        target="udp://h:1",
        listening=True,
        dial=print,
        min_connections=9,
        max_idle_connections=7,
        max_connections=5,
        resize_limit=4,
        idle_timeout=2,
        max_lifetime=1,
        health_check=print,
        health_check_interval=1,
    )
    assert sorted(name for name, _ in found) == [
        "dial",
        "health_check_timeout",
        "idle_timeout",
        "max_idle_connections",
        "min_connections",
        "min_connections",
        "min_connections",
        "resize_limit",
        "target",
    ]


def test_a_relation_tells_the_other_side() -> None:
    with pytest.raises(InvalidConfig, match="min_connections=4: must be at most max_connections, which is 3"):
        config(max_connections=3, min_connections=4)
    with pytest.raises(InvalidConfig, match="resize_limit=2: must be at least max_connections, which is 3"):
        config(max_connections=3, resize_limit=2)


def test_what_is_no_contradiction() -> None:
    config(max_lifetime=60)  # the default idle_timeout is longer, and harmless
    config(max_lifetime=60, idle_timeout=math.inf)
    PoolConfig(dial=print)  # type: ignore[arg-type]
    config(health_check_interval=1)  # without a check of one's own there is nothing to cut short
    config(health_check=print, health_check_interval=math.inf, health_check_timeout=1e9)
    config(max_connections=5, min_connections=5, max_idle_connections=5, resize_limit=5)
    config(listening=True, min_connections=0, acceptor=print)
    config(listening=True, target="unix:///run/x", socket_timeout=None)


@pytest.mark.parametrize(
    ("settings", "least", "idle"),
    [
        ({}, 2, 10),
        ({"max_connections": 1}, 1, 1),
        ({"max_idle_connections": 1}, 1, 1),
        ({"max_idle_connections": 0}, 0, 0),
        ({"min_connections": 0}, 0, 10),
        ({"min_connections": 5}, 5, 10),
        ({"min_connections": 5, "max_idle_connections": 6}, 5, 6),
        ({"listening": True}, 0, 10),
    ],
)
def test_what_none_stands_for(settings: dict[str, Any], least: int, idle: int) -> None:
    made = config(**settings)
    assert (made.effective_min_connections, made.effective_max_idle) == (least, idle)


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


@pytest.mark.parametrize("name", OTHER)
def test_every_setting_comes_back_from_each_form(name: str) -> None:
    value, text = OTHER[name]
    made = config(**{name: value})
    assert getattr(made, name) == value
    assert PoolConfig.from_dict(made.to_dict()) == made
    assert PoolConfig.from_json(made.to_json()) == made
    assert pickle.loads(pickle.dumps(made)) == made
    assert config().replace(**{name: value}) == made
    assert from_env({variable(name): text}) == made
    if name == "target":
        assert PoolConfig.from_url(text) == made
    else:
        assert PoolConfig.from_url(f"{TARGET}?{name}={quote(text)}") == made
    if value is not None:
        plain = "inf" if value == math.inf else json.dumps(value)
        assert PoolConfig.from_toml(text=f'target = "{TARGET}"\n' * (name != "target") + f"{name} = {plain}") == made


def test_names_that_look_like_another_value() -> None:
    for name in ("none", "None", "inf", "true", "1"):
        assert PoolConfig.from_json(config(name=name).to_json()).name == name
        assert from_env({"SHMPOOL_NAME": name}).name == name


@pytest.mark.parametrize("name", DEFAULTS)
def test_who_must_agree(name: str) -> None:
    beside: dict[str, dict[str, Any]] = {"dial": {"target": None}, "acceptor": LISTENING}
    needs = beside.get(name, {})
    value = print if name in CALLABLES else OTHER[name][0]
    made = config(**needs, **{name: value})
    fields = {error.field for error in made.disagreements(config().to_json())}
    assert fields - needs.keys() == {name} & SHARED
    assert made.disagreements(made.to_json()) == []


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


def test_the_longest_settings_fit_into_the_shared_segment() -> None:
    class Wordy:
        def __call__(self, *_: object) -> Any:
            raise NotImplementedError

        def __repr__(self) -> str:
            return 'é\n\\"' * 300

    settings: dict[str, Any] = {"target": f"unix:///{'é' * 53}", "listening": True, "name": "x" * 64}
    hooks: dict[str, Any] = dict.fromkeys(CALLABLES - {"dial"}, Wordy())
    long: dict[str, Any] = {name: 1.1234567890123456 for name, value in DEFAULTS.items() if isinstance(value, float)}
    made = config(**settings, **hooks, **{**long, "health_check_interval": 2.1234567890123456})
    assert len(made.to_json()) < 4096


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


# The environment ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize(
    ("texts", "value"), [(["true", "True", "YES", "on", "1"], True), (["false", "No", "OFF", "0"], False)]
)
def test_flags_by_text(name: str, texts: list[str], value: bool) -> None:
    assert [getattr(from_env({variable(name): text}), name) for text in texts] == [value] * len(texts)


@pytest.mark.parametrize("text", ["true", "no"])
def test_keepalive_by_text(text: str) -> None:
    assert from_env({"SHMPOOL_TCP_KEEPALIVE": text}).tcp_keepalive is (text == "true")


NUMBER = st.integers() | st.integers(-1, 130) | st.floats() | st.floats(0, 2)
VALUES = NUMBER | st.booleans() | st.none() | st.tuples(NUMBER, NUMBER) | st.tuples(NUMBER, NUMBER, NUMBER)


def text_of(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("name", sorted(OTHER.keys() - TEXTS - set(FLAGS) - {"tcp_keepalive"}))
@given(value=VALUES)
def test_a_text_means_what_its_value_means(name: str, value: object) -> None:
    wanted = outcome(lambda: config(**{name: value}))
    assert outcome(lambda: from_env({variable(name): text_of(value)})) == wanted
    assert outcome(lambda: PoolConfig.from_url(f"{TARGET}?{name}={text_of(value)}")) == wanted


@pytest.mark.parametrize("name", sorted({*FLAGS, "tcp_keepalive"}))
@given(value=VALUES.filter(lambda value: type(value) is not int))
def test_a_text_for_a_flag_means_what_its_value_means(name: str, value: object) -> None:
    assert outcome(lambda: from_env({variable(name): text_of(value)})) == outcome(lambda: config(**{name: value}))


@pytest.mark.parametrize("name", sorted(TEXTS))
@given(text=st.text(max_size=20) | st.sampled_from([OTHER[name][1] for name in sorted(TEXTS)]))
def test_a_text_that_is_the_value_itself(name: str, text: str) -> None:
    wanted = outcome(lambda: config(**{name: text}))
    if text.casefold() != "none" or name == "name":
        assert outcome(lambda: from_env({variable(name): text})) == wanted


@pytest.mark.parametrize("name", sorted(OTHER.keys() - {"name"}))
def test_no_other_text_is_a_value(name: str) -> None:
    for text in ("", " ", "1_0", "0x8", "٣", "1,", ",", "nan", "true false", "--1", "1 0", "5s", "1e999", "9" * 5000):
        with pytest.raises(InvalidConfig) as caught:
            from_env({variable(name): text})
        assert [(error.field, error.value) for error in caught.value.errors] == [(variable(name), text)]


@pytest.mark.parametrize("name", sorted(CALLABLES))
def test_no_callable_by_text(name: str) -> None:
    said = "='json:loads': must be callable: a text cannot name one"
    with pytest.raises(InvalidConfig, match=variable(name) + said):
        from_env({variable(name): "json:loads"})
    with pytest.raises(InvalidConfig, match=name + said):
        PoolConfig.from_url(f"{TARGET}?{name}=json:loads")


def test_all_problems_of_an_environment_are_reported_together() -> None:
    given = {
        "SHMPOOL_MAX_CONNECTIONS": "many",  # no number
        "SHMPOOL_MAX_WAITERS": "0",  # out of range
        "SHMPOOL_MAX_CONECTIONS": "8",  # misspelt
        "SHMPOOL_stats": "no",  # in small letters
        "SHMPOOL_IDLE_TIMEOUT": "20",  # against max_lifetime
        "SHMPOOL_MAX_LIFETIME": "10",
        "SHMPOOL_ON_CLOSE": "print",  # no callable
        "SHMPOOL_TEST_SEED": "1",  # not ours
        "OTHER_MAX_CONNECTIONS": "x",
    }
    with pytest.raises(InvalidConfig) as caught:
        PoolConfig.from_env(given, leak_action="forgive", colour="red")
    said = {error.field: error.remedy for error in caught.value.errors}
    assert said.keys() == {
        "SHMPOOL_TARGET",
        "SHMPOOL_MAX_CONNECTIONS",
        "SHMPOOL_MAX_WAITERS",
        "SHMPOOL_MAX_CONECTIONS",
        "SHMPOOL_stats",
        "SHMPOOL_IDLE_TIMEOUT",
        "SHMPOOL_ON_CLOSE",
        "leak_action",
        "colour",
    }
    assert "did you mean SHMPOOL_MAX_CONNECTIONS?" in said["SHMPOOL_MAX_CONECTIONS"]
    assert "did you mean SHMPOOL_STATS?" in said["SHMPOOL_stats"]
    assert "9 problems" in str(caught.value)
    assert "SHMPOOL_MAX_CONNECTIONS='many': must be a whole number" in str(caught.value)


def test_changes_override_the_environment() -> None:
    assert from_env({"SHMPOOL_STATS": "no", "SHMPOOL_NAME": "a"}, name="b", on_close=print) == config(
        stats=False, name="b", on_close=print
    )


def test_another_prefix() -> None:
    given = {"REDIS_TARGET": TARGET, "REDIS_STATS": "no", "SHMPOOL_NAME": "x"}
    assert PoolConfig.from_env(given, prefix="REDIS_") == config(stats=False)


def test_the_environment_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMPOOL_MAX_CONNECTIONS", "8")
    monkeypatch.setenv("SHMPOOL_TEST_SEED", "1")
    assert PoolConfig.from_env(target=TARGET) == config(max_connections=8)


# URLs ---------------------------------------------------------------------------------------------------------------


def test_a_url_with_settings() -> None:
    made = PoolConfig.from_url(f"{TARGET}?max_connections=8&idle_timeout=60", stats=False, on_close=print)
    assert made == config(max_connections=8, idle_timeout=60, stats=False, on_close=print)
    assert PoolConfig.from_url("unix:///run/x?max_connections=3") == config(target="unix:///run/x", max_connections=3)
    assert PoolConfig.from_url("tcp://[::]:0?listening=yes") == config(target="tcp://[::]:0", listening=True)


@given(text=st.text(max_size=20).filter(lambda text: "?" not in text) | st.sampled_from([TARGET, "none", "unix:///x"]))
@pytest.mark.parametrize("settings", [{}, {"max_connections": 0}, {"no": 1}, {"dial_backoff": [1, 2]}, {"stats": "no"}])
def test_a_url_without_settings_is_a_target(text: str, settings: dict[str, object]) -> None:
    wanted = outcome(lambda: PoolConfig.from_dict({"target": text, **settings}))
    assert outcome(lambda: PoolConfig.from_url(text, **settings)) == wanted


@given(st.text(max_size=30))
def test_a_url_answers_any_query_with_a_configuration_or_invalid_config(query: str) -> None:
    outcome(lambda: PoolConfig.from_url(f"{TARGET}?{query}"))


def test_percent_encoding() -> None:
    assert PoolConfig.from_url(f"{TARGET}?%6eame=%77eb&dial_backoff=0.5%2C%202") == config(
        name="web", dial_backoff=(0.5, 2)
    )


@pytest.mark.parametrize(
    ("query", "field", "remedy"),
    [
        ("", "query", "write each setting as name=value"),
        ("stats", "query", "write each setting as name=value"),
        ("=1", "query", "write each setting as name=value"),
        ("stats=no&", "query", "write each setting as name=value"),
        ("name=%", "query", "percent sign as %25"),
        ("name=%a", "query", "percent sign as %25"),
        ("name=%g0", "query", "percent sign as %25"),
        ("name=%ff", "query", "must be UTF-8"),
        ("stats=no#x", "query", "remove the fragment"),
        ("stats=no&stats=no", "stats", "given twice in the URL"),
        ("stats=no&%73tats=yes", "stats", "given twice in the URL"),
        ("target=tcp://h:2", "target", "given twice in the URL"),
        ("get_timeout=1", "get_timeout", "in the URL and as a keyword"),
        ("max_conections=8", "max_conections", "did you mean max_connections?"),
        ("MAX_CONNECTIONS=8", "MAX_CONNECTIONS", "no such setting"),
        ("max_connections=8?stats=no", "max_connections", "must be a whole number"),
        ("max_connections=+8+", "max_connections", "must be a whole number"),
    ],
)
def test_a_url_refuses(query: str, field: str, remedy: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        PoolConfig.from_url(f"{TARGET}?{query}", get_timeout=2)
    assert [error.field for error in caught.value.errors] == [field]
    assert remedy in caught.value.remedy


def test_all_problems_of_a_url_are_reported_together() -> None:
    with pytest.raises(InvalidConfig) as caught:
        PoolConfig.from_url("http://h?max_connections=0&stats&stats=no&zzz=1&name=%ff&name=a&name=b", stats=True, yyy=1)
    fields = [error.field for error in caught.value.errors]
    assert sorted(fields) == sorted(["query", "query", "name", "stats", "zzz", "yyy", "target", "max_connections"])


def test_a_target_twice() -> None:
    with pytest.raises(InvalidConfig, match="given twice, in the URL and as a keyword"):
        PoolConfig.from_url(TARGET, target=TARGET)
