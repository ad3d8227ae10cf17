"""What happened to a pool: the right events, in order, of all processes; read from within, from outside, by a follower.

Not here: the ring itself, its writers' deaths and stops (the core's tests).
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import shmpool
from shmpool import DialError, Event, Pool, SlabCorrupt
from shmpool.cli import main
from shmpool.events import KINDS
from tests.processes import Family, proven, until, use
from tests.servers import ExclusiveServer

CORE_EVENTS = Path(__file__).parent.parent / "shmpool" / "core" / "events.h"
QUIET: dict[str, Any] = {"maintenance_interval": math.inf, "min_connections": 0}


def kinds(pool: Pool, after: int = 0) -> list[str]:
    return [event.kind for event in pool.events(after).events]


def last(pool: Pool, kind: str) -> Event:
    return [event for event in pool.events().events if event.kind == kind][-1]


def test_the_kinds_are_those_of_the_core() -> None:
    text = CORE_EVENTS.read_text(encoding="utf-8")
    listed = text[text.index("#define SHM_EVENT_KINDS") : text.index("#define SHM_EVENT_ENUM")]
    assert [line.split("(")[1].split(",")[0] for line in listed.splitlines()[1:] if "X(" in line] == list(KINDS)


def test_the_life_of_a_connection(server: ExclusiveServer) -> None:
    with Pool(server.url, max_connections=2, **QUIET) as pool:
        use(pool)
        conn = pool.get()
        number = conn.id
        conn.discard("the protocol is out of step – größer")
        batch = pool.events()
        assert [event.kind for event in batch.events] == ["joined", "opened", "discarded", "closed"]
        assert [event.number for event in batch.events] == [0, 1, 2, 3]
        assert (batch.next, batch.lost) == (4, 0)
        assert all(event.pid == os.getpid() for event in batch.events)
        joined, opened, discarded, closed = batch.events
        assert opened.connection_id == discarded.connection_id == closed.connection_id == number
        assert opened.seconds is not None
        assert 0 < opened.seconds < 30
        assert discarded.text == "the protocol is out of step – größer"
        assert closed.reason == "error"
        assert closed.seconds is not None
        assert closed.seconds >= 0
        assert joined.connection_id is None
        assert joined.slot is None
        assert opened.slot == 0
        assert joined.time <= opened.time <= closed.time
        assert f"connection {number} was discarded: the protocol" in discarded.describe()


@pytest.mark.parametrize("text", ["x" * 200, "ü" * 100, "\udc80", ""])
def test_reasons_that_do_not_fit(server: ExclusiveServer, text: str) -> None:
    with Pool(server.url, max_connections=1, **QUIET) as pool:
        pool.get().discard(text)
        told = [event.text for event in pool.events().events if event.kind == "discarded"]
        assert len(told) == (text[:1] in ("x", "ü"))
        assert all(text.startswith(each) and 30 < len(each) < 64 for each in told)


def test_steering(server: ExclusiveServer) -> None:
    with Pool(server.url, max_connections=2, **QUIET) as pool:
        use(pool)
        begun = pool.events().next
        pool.pause()
        pool.resume()
        pool.resize(3)
        pool.resize(3)
        pool.evict()
        pool.evict()
        events = pool.events(begun).events
        assert [(event.kind, event.reason, event.count) for event in events if event.kind != "closed"] == [
            ("state", "paused", None),
            ("state", "open", None),
            ("resized", "", 3),
            ("evicted", "", 1),
        ]
        pool.drain(timeout=1)
        assert last(pool, "state").reason == "draining"


def test_the_server_goes_and_comes_back(server: ExclusiveServer) -> None:
    with proven(server, 1, every_slot=False, dial_backoff=(0.01, 0.02)) as pool:
        server.refuse()
        server.close_connections()
        with pytest.raises(DialError):
            pool.get()
        with pytest.raises(DialError):
            pool.get()
        server.listen()
        until(lambda: use(pool), "it is back")
        found = [event for event in pool.events().events if event.kind in ("down", "dial_failed", "up")]
        assert [event.kind for event in found[:2]] == ["down", "dial_failed"]
        assert found[0].text == "127.0.0.1: Connection refused"
        assert found[0].describe() == "the server is down: 127.0.0.1: Connection refused"
        assert found[1].describe() == "a dial failed: 127.0.0.1: Connection refused"
        assert found[-1].kind == "up"
        assert found[-1].seconds is not None
        assert found[-1].seconds > 0


def test_processes_come_go_and_die(server: ExclusiveServer, family: Family) -> None:
    with Pool(server.url, max_connections=2, **QUIET) as pool:
        use(pool)

        def leave() -> int:
            use(pool)
            pool.leave()
            return os.getpid()

        def die() -> None:
            pool.get()
            os.kill(os.getpid(), signal.SIGKILL)

        left = family.fork(leave).result()
        dead = family.fork(die)
        until(lambda: not dead.alive(), "it is dead")
        pool.recover()
        by_kind = {kind: [event.pid for event in pool.events().events if event.kind == kind] for kind in KINDS}
        assert by_kind["joined"] == [os.getpid(), left, dead.pid]
        assert by_kind["left"] == [left]
        assert by_kind["died"] == [dead.pid]


def test_an_overdue_lease(server: ExclusiveServer) -> None:
    settings: dict[str, Any] = {**QUIET, "leak_timeout": 0.01, "leak_action": "revoke"}
    with Pool(server.url, max_connections=1, **settings) as pool:
        conn = pool.get()
        number = conn.id

        def taken_away() -> bool:
            pool.maintain()
            return bool(pool.stats().overdue_leases)

        until(taken_away, "it is overdue")
        overdue = last(pool, "overdue")
        assert (overdue.connection_id, overdue.pid) == (number, os.getpid())
        assert overdue.seconds is not None
        assert overdue.seconds >= 0.01
        assert last(pool, "closed").reason == "revoked"


def test_more_than_are_kept(server: ExclusiveServer) -> None:
    with Pool(server.url, max_connections=1, **QUIET) as pool:
        for _ in range(600):
            pool.pause()
            pool.resume()
        batch = pool.events()
        assert len(batch.events) == 1024
        assert batch.lost == batch.next - 1024 > 0
        assert [event.number for event in batch.events] == list(range(batch.next - 1024, batch.next))
        assert pool.events(batch.next).events == []
        assert pool.events(batch.next + 99) == ([], batch.next, 0)
        with pytest.raises(ValueError, match="after=-1"):
            pool.events(-1)


def test_from_outside(server: ExclusiveServer) -> None:
    with Pool(server.url, max_connections=1, name=f"events-{os.getpid()}", **QUIET) as pool:
        use(pool)
        with shmpool.inspect(pool.name) as inspector:
            assert inspector.events() == pool.events()
            begun = inspector.events().next
            pool.pause()
            assert [event.kind for event in inspector.events(begun, patient=True).events] == ["state"]
        with pytest.raises(ValueError, match="closed"):
            inspector.events()


def test_a_segment_that_was_cut(server: ExclusiveServer) -> None:
    with (
        Pool(server.url, max_connections=1, name=f"cut-{os.getpid()}", **QUIET) as pool,
        shmpool.inspect(pool.name) as inspector,
    ):
        path = Path(f"/dev/shm/shmpool-{os.getuid()}-{pool.name}")
        whole = path.read_bytes()
        size = len(whole)
        os.truncate(path, 4096)
        try:
            with pytest.raises(SlabCorrupt):
                inspector.events()
        finally:
            os.truncate(path, size)
            path.write_bytes(whole)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command(server: ExclusiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    with Pool(server.url, max_connections=1, name=f"told-{os.getpid()}", **QUIET) as pool:
        use(pool)
        pool.resize(2)
        assert main(["events", pool.name]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[3] for line in lines] == ["joined", "opened", "resized"]
        assert lines[2].endswith("the cap is 2")
        assert main(["events", pool.name, "--last", "1", "--json"]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        assert json.loads(line)["count"] == 2
        assert main(["events", pool.name, "--kind", "opened", "--kind", "joined"]) == 0
        assert [each.split()[3] for each in capsys.readouterr().out.splitlines()] == ["joined", "opened"]
        assert main(["events", pool.name, "--kind", "died"]) == 0
        assert capsys.readouterr().out == "none of these has happened yet\n"
        for wrong in (["--kind", "nothing"], ["--last", "-1"], ["--last", "x"]):
            with pytest.raises(SystemExit):
                main(["events", pool.name, *wrong])
    assert main(["events", pool.name]) == 1


def test_follow(server: ExclusiveServer) -> None:
    """What happens later is told at once, an event that its process never finished is passed over, and the end of the
    pool ends it."""
    with Pool(server.url, max_connections=1, name=f"followed-{os.getpid()}", **QUIET) as pool:
        use(pool)
        command = [sys.executable, "-m", "shmpool", "events", pool.name, "--follow", "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent) as follower:
            assert follower.stdout is not None

            def told() -> str:
                assert follower.stdout is not None
                event = json.loads(follower.stdout.readline())
                return f"{event['kind']} {event['reason']}".strip()

            assert [told(), told()] == ["joined", "opened"]
            pool.pause()
            assert told() == "state paused"
            pool.resume()
            assert told() == "state open"
            pool.close()
            rest = [json.loads(line) for line in follower.stdout]
            assert {(event["kind"], event["reason"]) for event in rest} >= {("state", "closed"), ("closed", "shutdown")}
            assert follower.wait(30) == 0
