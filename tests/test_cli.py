"""The command line: what it prints, where, and with which status."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shmpool
from shmpool import Pool, cli, slab, steering
from shmpool.cli import main
from shmpool.inspector import PoolInfo, list_pools
from shmpool.views import View, count_text, fit, plain_lines, size_text, time_text
from tests.members import Members, WakesAtTheSecondLook, some_name
from tests.processes import Family, until
from tests.servers import ExclusiveServer

DEADLINE_S = 30.0
COMMAND = [sys.executable, "-m", "shmpool"]


@pytest.fixture
def url() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def pool(url: str) -> Iterator[Pool]:
    with Pool(url, max_connections=3, min_connections=0, name=f"test-{os.getpid()}-{secrets.token_hex(4)}") as made:
        yield made


@pytest.fixture
def only(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Pool:
    """The pool, as the only one of this user, whatever other tests do meanwhile."""
    monkeypatch.setattr(cli, "list_pools", lambda: [each for each in list_pools() if each.name == pool.name])
    return pool


def run(*words: str, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **changes}
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=DEADLINE_S, env=environment)


# list ---------------------------------------------------------------------------------------------------------------


def test_list(only: Pool, capsys: pytest.CaptureFixture[str], url: str) -> None:
    assert main(["list"]) == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split() == ["name", "state", "creator", "connections", "memory", "age", "target"]
    assert row.split()[:6] == [only.name, "open", str(os.getpid()), "0", "of", "3"]
    assert row.endswith(url)


def test_list_json(only: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    (info,) = json.loads(capsys.readouterr().out)
    assert (info["name"], info["alive"], info["error"]) == (only.name, True, "")


def test_list_of_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "list_pools", list)
    assert main(["list"]) == 0
    assert capsys.readouterr().out == "there are no pools of this user\n"
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_list_of_the_dead_and_the_damaged(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    infos = [
        PoolInfo(
            name="d", pid=7, state="open", size=4096, max_connections=2, target="x\x1b[31m", created_at=time.time()
        ),
        PoolInfo(name="broken", error="it is a FIFO"),
    ]
    monkeypatch.setattr(cli, "list_pools", lambda: infos)
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^d +dead +7 +0 of 2 +4 KiB .* x\?\[31m$", out, re.MULTILINE)
    assert re.search(r"^broken +damaged +0 B +it is a FIFO$", out, re.MULTILINE)


# doctor -------------------------------------------------------------------------------------------------------------


def test_doctor_removes_what_the_dead_left(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], family: Family
) -> None:
    own = f"shmpool-test-{secrets.token_hex(4)}-"  # pools of other tests reap what they see
    monkeypatch.setattr(slab, "prefix", lambda: own)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    def die() -> None:
        pool = Pool(url, name="dead", max_connections=1)
        os.kill(os.getpid(), signal.SIGKILL if not pool.closed else signal.SIGTERM)

    with Pool(url, name="living", max_connections=1):
        family.fork(die).wait()
        assert len(list((tmp_path / "shmpool").iterdir())) == 2
        Path(slab.path_of("damaged")).write_bytes(b"no slab")
        Path(slab.path_of("damaged")).chmod(0o600)
        try:
            assert main(["doctor"]) == 1
            said = capsys.readouterr().out.splitlines()
            assert said[0] == "removed dead: no process uses it any more"
            assert said[1].startswith("damaged: ")
            assert "shmpool unlink damaged" in said[1]
            assert said[2:] == ["living: nothing is wrong", "pools: 1 well, 0 with findings, 1 damaged, 1 removed"]
            assert len(list((tmp_path / "shmpool").iterdir())) == 1
            assert main(["unlink", "damaged"]) == 0, "as it was told to"
        finally:
            Path(slab.path_of("damaged")).unlink(missing_ok=True)
        capsys.readouterr()
        assert main(["doctor", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["removed"], [pool["name"] for pool in found["pools"]]) == ([], ["living"])
    assert list(tmp_path.iterdir()) == []


# Steering -----------------------------------------------------------------------------------------------------------


class Shell:
    """Runs commands on one pool, in this process."""

    def __init__(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        self._name, self._capsys = name, capsys

    def says(self, command: str, *options: str, status: int = 0) -> str:
        """What a command prints, all of it on standard output, or with a status of its own all on standard error."""
        assert main([command, self._name, *options]) == status
        out, err = self._capsys.readouterr()
        assert not (out and err)
        return (out or err).rstrip("\n").replace(self._name, "NAME")

    def json(self, command: str, *options: str, status: int = 0) -> dict[str, object]:
        """What it prints as JSON, without the name."""
        figures: dict[str, object] = json.loads(self.says(command, *options, "--json", status=status))
        assert figures.pop("name") == "NAME"
        return figures


@pytest.fixture
def shell(name: str, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(name, capsys)


def test_pause_and_resume(members: Callable[..., Members], shell: Shell) -> None:
    one = members(max_connections=1)
    _, gives_back = one.holder()
    waiter = one.waiter()
    assert shell.says("pause") == "NAME is paused: callers wait until `shmpool resume NAME`"
    gives_back.set()
    until(lambda: one.stats().idle == 1, "it is given back")
    assert "  paused: callers wait  " in shell.says("stats")
    assert shell.says("pause") == "NAME was paused already: callers wait until `shmpool resume NAME`"
    assert shell.json("pause") == {"state": "paused", "changed": False}
    assert waiter.alive()
    assert shell.says("resume") == "NAME is open again: callers are served"
    assert waiter.result() >= 1
    assert shell.says("resume") == "NAME was open already"
    assert shell.json("resume") == {"state": "open", "changed": False}


def test_drain(members: Callable[..., Members], shell: Shell) -> None:
    two = members(max_connections=2)
    _, gives_back = two.holder(2)
    after = "callers get PoolClosed until `shmpool resume NAME`"
    assert (
        shell.says("drain", "--timeout", "0.01", status=1)
        == f"NAME still drains: 2 connections in use after 0.01 s; {after}"
    )
    assert "  draining: callers are refused  " in shell.says("stats")
    assert shell.json("drain", "--timeout", "0.01", status=1) == {"state": "draining", "leases_left": 2, "open": 2}
    gives_back.set()
    assert shell.says("drain") == f"NAME is drained: nothing is in use; {after}"
    assert shell.json("drain") == {"state": "draining", "leases_left": 0, "open": 0}


def test_drain_that_leaves_what_is_idle(members: Callable[..., Members], shell: Shell) -> None:
    one = members(max_connections=1, maintenance_interval=float("inf"))
    _, gives_back = one.holder()
    gives_back.set()
    until(lambda: one.stats().idle == 1, "it is given back")
    assert shell.says("drain").startswith("NAME is drained: nothing is in use, 1 connection idle; ")


def test_drain_when_somebody_resumes(members: Callable[..., Members], name: str) -> None:
    one = members(max_connections=1)
    one.holder()
    process = subprocess.Popen([*COMMAND, "drain", name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: one.stats().state == "draining", "it drains")
    assert main(["resume", name]) == 0
    out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, err) == (1, "")
    assert out == f"{name} is not drained: somebody has made it open meanwhile; 1 connection in use\n"


def test_drain_when_the_last_process_ends(members: Callable[..., Members], name: str) -> None:
    one = members(max_connections=1)
    holder, _ = one.holder()
    process = subprocess.Popen([*COMMAND, "drain", name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: one.stats().state == "draining", "it drains")
    holder.kill()
    slab.remove_remains(name)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, err) == (1, "")
    assert out.startswith(f"{name} still drains: 1 connection in use after 30 s; ")


def test_resize(members: Callable[..., Members], shell: Shell) -> None:
    three = members(max_connections=3, resize_limit=8, min_connections=1)
    three.keeper()
    _, gives_back = three.holder(3)
    assert shell.says("resize", "8") == "NAME may have 8 connections, before 3"
    assert (
        shell.says("resize", "1")
        == "NAME may have 1 connection, before 8; 2 more are open, and end when they are idle or returned"
    )
    assert shell.json("resize", "2") == {"max_connections": 2, "before": 1, "surplus": 1}
    assert "] 3 leased of 2" in shell.says("stats")
    gives_back.set()
    until(lambda: three.stats().open <= 2, "the surplus ends")
    assert "can have 1 (min_connections) to 8 connections" in shell.says("resize", "9", status=2)
    assert "must be a whole number from 1" in shell.says("resize", "0", status=2)


def test_evict(members: Callable[..., Members], shell: Shell, server: ExclusiveServer) -> None:
    three = members(max_connections=3)
    _, gives_back = three.holder(2)
    assert shell.says("evict") == "NAME has no such connection"
    in_use = "those in use end when they are returned, idle ones now"
    first = str(three.stats().slots[0].id)
    assert shell.says("evict", "--id", first) == f"evicted 1 connection of NAME: {in_use}"
    assert shell.says("evict", "--peer", "127.0.0.1") == f"evicted 2 connections of NAME: {in_use}"
    assert shell.json("evict", "--peer", f"127.0.0.1:{server.port}") == {"evicted": 2}
    assert shell.json("evict", "--peer", "[::1]:1") == {"evicted": 0}
    assert shell.json("evict", "--leased") == {"evicted": 2}
    gives_back.set()
    until(lambda: three.stats().open == 0, "they end when they are returned")
    assert three.stats().closed["evicted"] == 2


def test_evict_what_is_idle(members: Callable[..., Members], shell: Shell) -> None:
    two = members(max_connections=2, maintenance_interval=float("inf"))
    _, gives_back = two.holder(2)
    gives_back.set()
    until(lambda: two.stats().idle == 2, "both are idle")
    assert shell.says("evict") == "evicted 2 connections of NAME: nobody gets them any more"
    assert shell.says("stats").count("ending") == 2


def test_recover(members: Callable[..., Members], shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    two = members(max_connections=2)
    keeper = two.keeper()
    assert shell.says("recover") == "no process of NAME has died"
    keeper.stop()
    holder, _ = two.holder()
    holder.kill()
    monkeypatch.setattr(steering, "time", WakesAtTheSecondLook(keeper))
    assert shell.says("recover") == "recovered what 1 dead process of NAME held"
    assert two.stats().in_use == 0
    assert shell.json("recover") == {"recovered": 0}


def test_recover_where_nobody_does_it(members: Callable[..., Members], shell: Shell) -> None:
    two = members(max_connections=2, maintenance_interval=float("inf"))
    two.keeper()
    holder, _ = two.holder()
    holder.kill()
    assert "no process of it has a maintenance thread at work" in shell.says("recover", "--timeout", "0.1", status=1)


def test_close(members: Callable[..., Members], shell: Shell) -> None:
    one = members(max_connections=1)
    holder, gives_back = one.holder()
    closed = "NAME is closed: callers get PoolClosed, the name is free"
    assert shell.says("close") == f"{closed}; 1 connection in use, which end when they are returned"
    assert "there is no pool 'NAME'" in shell.says("close", status=1)
    gives_back.set()
    one.keeper()
    assert shell.says("close", "--timeout", "5") == closed
    holder, _ = one.holder()
    assert shell.json("close", "--timeout", "0.01", status=1) == {"state": "closed", "leases_left": 1}
    assert holder.alive()


def test_remains_are_called_so(url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    own = f"shmpool-{some_name()}-"  # pools of other tests reap what they see
    monkeypatch.setattr(slab, "prefix", lambda: own)
    with Pool(url) as pool:
        path, bytes_ = Path(slab.path_of("remains")), Path(slab.path_of(pool.name)).read_bytes()
    path.touch(0o600)
    try:
        path.write_bytes(bytes_)
        assert main(["pause", "remains"]) == 1
        assert capsys.readouterr().err == (
            "shmpool: no process has pool 'remains' any more; 'shmpool doctor' removes what is left of it\n"
        )
    finally:
        path.unlink()


def test_steering_from_another_process(pool: Pool) -> None:
    for words, said in [
        (["pause", pool.name], f"{pool.name} is paused: "),
        (["resume", pool.name], f"{pool.name} is open again: "),
        (["resize", pool.name, "2"], f"{pool.name} may have 2 connections, before 3"),
        (["evict", pool.name], f"{pool.name} has no such connection"),
        (["recover", pool.name], f"no process of {pool.name} has died"),
        (["drain", pool.name], f"{pool.name} is drained: "),
        (["close", pool.name], f"{pool.name} is closed: "),
    ]:
        done = run(*words)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(said)
    assert pool.closed


@pytest.mark.parametrize(
    ("text", "peer"),
    [
        ("1.2.3.4", "1.2.3.4"),
        ("1.2.3.4:5", ("1.2.3.4", 5)),
        ("::1", "::1"),
        ("[::1]", "::1"),
        ("[::1]:65535", ("::1", 65535)),
        ("::ffff:1.2.3.4", "::ffff:1.2.3.4"),
    ],
)
def test_peers(text: str, peer: object) -> None:
    assert cli._peer(text) == peer


# An outage, and the beginning ---------------------------------------------------------------------------------------


def test_an_outage_is_shown(
    deaf_port: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pool(f"tcp://127.0.0.1:{deaf_port}", dial_backoff=(60.0, 60.0), name=some_name()) as pool:
        until(lambda: pool.stats().prewarm_done, "the first dial has failed")
        assert main(["stats", pool.name]) == 0
        out = capsys.readouterr().out
        assert re.search(r"^server +down for .+s, next dial in \d+.*s: .*refused", out, re.MULTILINE)
        assert re.search(r"^prewarming +began with 0 of 2: 2 could not be opened$", out, re.MULTILINE)
        monkeypatch.setattr(cli, "list_pools", lambda: [each for each in list_pools() if each.name == pool.name])
        assert main(["list"]) == 0
        assert f"{pool.name}  open, server down  " in capsys.readouterr().out


def test_the_opening_of_the_minimum_is_shown(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Pool(url, min_connections=2, maintenance_interval=float("inf"), name=some_name()) as pool:
        assert main(["stats", pool.name]) == 0
        assert re.search(r"^prewarming +0 of 2 are open$", capsys.readouterr().out, re.MULTILINE)
        pool.maintain()
        assert main(["stats", pool.name]) == 0
        out = capsys.readouterr().out
        assert "prewarming" not in out
        assert "server" not in out


# stats --------------------------------------------------------------------------------------------------------------


def test_stats(pool: Pool, capsys: pytest.CaptureFixture[str], url: str) -> None:
    with pool.get():
        assert main(["stats", pool.name]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{pool.name}  {url}  open  ")
    assert re.search(r"^connections +\[█{8}·{16}\] 1 leased of 3$", out, re.MULTILINE)
    assert re.search(r"^leases .*/s: 100.0 % new$", out, re.MULTILINE)
    assert re.search(r"^trouble +none$", out, re.MULTILINE)
    assert re.search(rf"^ *{os.getpid()} +1 +0 +0 ", out, re.MULTILINE)
    assert re.search(rf"^ +1 +leased +{os.getpid()} .*{url.removeprefix('tcp://')}$", out, re.MULTILINE)


def test_stats_json_is_all_of_it(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", pool.name, "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen.keys() == {*pool.stats().to_dict(), "alive"}
    assert (seen["name"], seen["alive"], seen["max_connections"]) == (pool.name, True, 3)


def test_stats_of_a_troubled_pool(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    leases = [pool.get() for _ in range(3)]
    for _ in range(2):
        with pytest.raises(shmpool.PoolExhausted):
            pool.try_get()
    for lease in leases:
        lease.discard()
    assert main(["stats", pool.name]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^trouble +exhausted 2$", out, re.MULTILINE)
    assert re.search(r"^opened +3, of 1 leases each; closed: 3 error$", out, re.MULTILINE)


def test_the_name_may_be_left_out(only: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == only.name


def test_which_of_several(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "list_pools", lambda: [PoolInfo(name="a"), PoolInfo(name="b")])
    assert main(["stats"]) == 2
    assert capsys.readouterr().err == "shmpool: there are several pools, name one: a, b\n"
    monkeypatch.setattr(cli, "list_pools", list)
    assert main(["top"]) == 1
    assert capsys.readouterr().err == "shmpool: there are no pools of this user\n"


# Errors -------------------------------------------------------------------------------------------------------------


ON_A_POOL = ["stats", "top", "unlink", "pause", "resume", "drain", "evict", "recover", "close", "resize"]


def on(command: str, name: str) -> list[str]:
    return [command, name, *(["2"] if command == "resize" else [])]


@pytest.mark.parametrize("command", ON_A_POOL)
def test_no_such_pool(command: str, only: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(on(command, "nobody-has-this")) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"shmpool: there is no pool 'nobody-has-this' of this user; there are: {only.name}\n"


@pytest.mark.parametrize("command", ON_A_POOL)
def test_no_such_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(on(command, "../x")) == 2
    assert capsys.readouterr().err.startswith("shmpool: name='../x': must have ")


def test_damaged(capsys: pytest.CaptureFixture[str]) -> None:
    name = f"test-{os.getpid()}-{secrets.token_hex(4)}"
    path = Path(slab.path_of(name))
    os.mkfifo(path, 0o600)
    try:
        for command in ON_A_POOL[:2] + ON_A_POOL[3:]:
            assert main(on(command, name)) == 1
            assert "it is a FIFO, not shared memory" in capsys.readouterr().err
        assert main(["unlink", name]) == 0
        assert capsys.readouterr().out == f"removed {name}\n"
    finally:
        path.unlink(missing_ok=True)


def test_unlink_refuses_and_obeys(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unlink", pool.name]) == 1
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err
    assert main(["unlink", pool.name, "--force"]) == 0
    assert capsys.readouterr().out == f"removed {pool.name}\n"
    assert main(["stats", pool.name]) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["top", "--interval", "0"], "must be seconds, more than 0"),
        (["top", "--interval", "soon"], "invalid number of seconds value: 'soon'"),
        (["top", "--interval", "nan"], "must be seconds"),
        (["demo", "--workers", "0"], "must be from 1 to 64"),
        (["demo", "--connections", "x"], "invalid number value: 'x'"),
        (["unlink"], "the following arguments are required: NAME"),
        (["stats", "a", "b"], "unrecognized arguments: b"),
        (["pause"], "the following arguments are required: NAME"),
        (["resize", "a"], "the following arguments are required: N"),
        (["resize", "a", "many"], "invalid int value: 'many'"),
        (["drain", "a", "--timeout", "-1"], "must be seconds, more than 0"),
        (["evict", "a", "--peer", "localhost"], "'localhost' is no address, nor ADDRESS:PORT"),
        (["evict", "a", "--peer", "1.2.3.4:http"], "'1.2.3.4:http' is no address"),
        (["evict", "a", "--peer", "[::1:5"], "is no address"),
        (["evict", "a", "--id", "x"], "invalid int value: 'x'"),
    ],
)
def test_misuse(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"shmpool {shmpool.__version__}\n"


# As a process -------------------------------------------------------------------------------------------------------


def test_as_a_module(pool: Pool) -> None:
    done = run("stats", pool.name)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(pool.name)
    assert run("stats", "nobody-has-this").returncode == 1
    assert len(pool.stats().workers) == 1


WITHOUT_RICH = "import sys; sys.modules['rich'] = None; from shmpool.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize("words", [["list"], ["stats"], ["top", "--once", "--interval", "0.01"], ["unlink"]])
def test_without_rich(words: list[str], pool: Pool) -> None:
    name = [] if words == ["list"] else [pool.name]
    program = [sys.executable, "-c", WITHOUT_RICH, *words, *name]
    done = subprocess.run(program, capture_output=True, text=True, timeout=DEADLINE_S)
    if words == ["unlink"]:
        assert "in use" in done.stderr
    else:
        assert (done.returncode, done.stderr) == (0, "")
        assert pool.name in done.stdout


def test_a_reader_that_leaves_is_no_error(pool: Pool) -> None:
    process = subprocess.Popen(
        [*COMMAND, "top", pool.name, "--interval", "0.01"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    assert process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(DEADLINE_S) == 1
    assert process.stderr.read() == b""
    process.stderr.close()


def test_a_locale_without_our_characters(pool: Pool) -> None:
    done = run("stats", pool.name, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert "[" in done.stdout


# top ----------------------------------------------------------------------------------------------------------------


def test_top_once_is_one_interval(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(100):
        pool.get().release()
    assert main(["top", pool.name, "--once", "--interval", "0.02"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^leases +0/s: none$", out, re.MULTILINE)
    assert re.search(r"^waiting +nobody now, 0/s$", out, re.MULTILINE)
    assert re.search(r"^opened +1, of 100 leases each$", out, re.MULTILINE)


def test_top_ends_with_the_pool(pool: Pool) -> None:
    process = subprocess.Popen(
        [*COMMAND, "top", pool.name, "--interval", "0.01"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline().startswith(pool.name)
    pool.close()
    out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, err) == (0, "")
    assert out.endswith(f"pool {pool.name!r} is closed\n")


def test_ctrl_c_ends_top_quietly(pool: Pool) -> None:
    process = subprocess.Popen(
        [*COMMAND, "top", pool.name, "--interval", "0.01"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, err) == (0, "")


# Figures and tables -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ns"),
        (65e-9, "65 ns"),
        (999.4e-9, "999 ns"),
        (999.6e-9, "1 µs"),
        (1.234e-5, "12.3 µs"),
        (0.0123, "12.3 ms"),
        (0.9999, "1 s"),
        (59.4, "59.4 s"),
        (59.6, "1m00s"),
        (192, "3m12s"),
        (7500, "2h05m"),
        (3600 * 76, "3d04h"),
    ],
)
def test_time_text(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (0.254, "0.25"), (7, "7"), (12345, "12,345"), (123456, "123 k"), (1234567, "1.23 M"), (999999, "1 M")],
)
def test_count_text(count: float, text: str) -> None:
    assert count_text(count) == text


@given(st.floats(0, 1e12))
def test_figures_are_short(value: float) -> None:
    assert len(count_text(value)) <= 7
    assert len(time_text(value / 1e6)) <= 7
    assert len(size_text(value)) <= 8


def test_size_text() -> None:
    assert [size_text(size) for size in (0, 512, 4096, 2195456, 3 << 30)] == [
        "0 B",
        "512 B",
        "4 KiB",
        "2.09 MiB",
        "3 GiB",
    ]


def table(rows: int, *headings: str) -> View:
    view = View(headings)
    for row in range(rows):
        view.add(*(f"{heading}{row}" for heading in headings or ("x",)))
    return view


@given(st.integers(0, 30), st.integers(0, 30), st.integers(8, 60))
def test_views_fit_the_screen(first: int, second: int, height: int) -> None:
    fitted = fit([table(1), table(first, "a", "b"), table(second, "c", "d")], height)
    shown = [view.height for view in fitted if view.rows]
    assert sum(shown) + len(shown) - 1 <= max(height, 11)
    hidden = sum(int(row[0].split()[1]) - 1 for view in fitted for row in view.rows if row[0].startswith("…"))
    assert sum(len(view.rows) for view in fitted) + hidden == 1 + first + second


def test_plain_lines() -> None:
    view = View(("what", "n"), left=frozenset({0}))
    view.add("a", "1")
    view.add("longer", "1,000")
    assert list(plain_lines(view)) == ["what        n", "a           1", "longer  1,000"]
    assert list(plain_lines(view.cut(1))) == ["what  n", "… 2 more"]


def test_what_a_terminal_would_obey_is_not_shown() -> None:
    view = View()
    view.add("a\x1b]0;b\x07\r\n")
    assert view.rows == [("a?]0;b???",)]


def test_a_locale_without_blocks(only: Pool) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    only.get().release()
    with only.get():
        command = [sys.executable, "-m", "shmpool", "stats", only.name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert "[########" in done.stdout
    assert "................]" in done.stdout


@pytest.mark.parametrize("command", ["serve", "export"])
def test_no_host_is_not_every_host(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([command, "--host", ""])
    assert "must be an address of this host" in capsys.readouterr().err


def test_unlink_json(name: str, members: Callable[..., Members], capsys: pytest.CaptureFixture[str]) -> None:
    members(max_connections=1).keeper()
    assert main(["unlink", name, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": name, "removed": True}
