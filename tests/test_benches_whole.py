"""The benches of whole requests, start-up and growth: that they do what their figures say. No figure is judged.

Not here: how fast anything is.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benches import __main__ as benches
from benches import bench_growth as growth
from benches import bench_http, requesting
from benches.harness import Options
from benches.http_server import HttpServer
from benches.interpreters import Interpreters
from benches.workers import Peer
from shmpool import Pool
from tests.processes import until
from tests.servers import ExclusiveServer, ask

ROOT = Path(__file__).parent.parent


@pytest.fixture
def options() -> Options:
    return Options(quick=True, out=io.StringIO())


def said(options: Options) -> str:
    assert isinstance(options.out, io.StringIO)
    return options.out.getvalue()


def test_each_bench_is_there_and_is_told() -> None:
    text = (ROOT / "benches" / "README.md").read_text(encoding="utf-8")
    for name in benches.NAMES:
        assert callable(importlib.import_module(f"benches.bench_{name}").run)
        assert f"\n| `{name}` |" in text


# Whole requests -----------------------------------------------------------------------------------------------------


def test_a_server_from_outside() -> None:
    with ExclusiveServer() as server:
        seen = requesting.Server(server.pid)
        clients = [server.connect() for _ in range(3)]
        until(lambda: seen.connections() == 3, "it has three connections more than before")
        before = seen.cpu_s()
        for client in clients:
            with client:
                ask(client, "PING")
        assert seen.cpu_s() > before
        until(lambda: seen.connections() == 0, "they have gone")


def test_turns(options: Options) -> None:
    """Eight workers with a connection each, and eight that share four."""
    case = requesting.Case("some", "PING", 1e-4)

    @contextlib.contextmanager
    def own() -> Iterator[Callable[[], requesting.Request]]:
        def begin() -> requesting.Request:
            client = server.connect()
            return lambda: ask(client, "PING")

        yield begin

    @contextlib.contextmanager
    def shared() -> Iterator[Callable[[], requesting.Request]]:
        def request() -> None:
            with pool.get() as lease:
                ask(lease.socket, "PING")

        with Pool(server.url, max_connections=4, min_connections=0) as pool:
            yield lambda: request

    with ExclusiveServer() as server:
        seen = requesting.Server(server.pid)
        contenders = {"own": own, "shared": shared}
        outcomes = requesting.take_turns(case, contenders, seen, options, seconds=0.05, turns=2)
        asked = server.stats()["requests"]
    assert {name: [one.connections for one in turns] for name, turns in outcomes.items()} == {
        "own": [8, 8],
        "shared": [4, 4],
    }
    counted = sum(round(one.rate * 0.05) for turns in outcomes.values() for one in turns)
    assert asked == counted + 2 * 2 * requesting.WORKERS * requesting.WARM_UP
    assert all(0 < one.p50_us <= one.p99_us <= one.p999_us for turns in outcomes.values() for one in turns)
    lines = requesting.compare(case, outcomes, "own", {"shared": 0.0})
    assert [(line.verdict, line.measured.count) for line in lines] == [("ok", 2), ("", 2), ("", 2)]
    assert json.loads(json.dumps(options.tables))[0]["turns"]["own"]["connections"] == [8, 8]
    assert "PING, 0.1 ms of work between" in said(options)


def test_urllib3_on_leased_connections() -> None:
    urllib3 = pytest.importorskip("urllib3")
    pytest.importorskip("granian")
    with HttpServer() as server, Pool(f"tcp://127.0.0.1:{server.port}", min_connections=0, socket_timeout=None) as pool:
        client = bench_http.leasing(urllib3, pool)("127.0.0.1", server.port)
        request = bench_http.requests_by(client)
        for _ in range(3):
            request()
        assert (pool.stats().created, pool.stats().idle) == (1, 1)
        client.headers = {"Connection": "close"}
        request()
        assert (pool.stats().created, pool.stats().idle) == (1, 0), "what the client has closed is not lent again"
        request()
        assert pool.stats().created == 2


def test_the_http_server_ends_with_its_input() -> None:
    pytest.importorskip("granian")
    with HttpServer() as server, socket.create_connection(("127.0.0.1", server.port)):
        pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))


# Start-up -----------------------------------------------------------------------------------------------------------


def test_interpreters_compile_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    with Interpreters() as interpreters:
        assert interpreters.has("shmpool")
        cached = Path(interpreters.output("import shmpool; print(shmpool.__cached__)").strip())
        assert cached.exists()
        assert ROOT not in cached.parents
        assert not interpreters.has("no_such_module")
        assert interpreters.output("import sys; print(sys.argv[1])", "word") == "word\n"
        with pytest.raises(subprocess.CalledProcessError):
            interpreters.output("raise SystemExit(1)")
    assert not cached.exists()


# Growth -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def peer() -> Iterator[Peer]:
    with Peer() as peer:
        yield peer


def test_steals_are_steals_and_dials_are_dials(peer: Peer) -> None:
    with growth.sites(peer, [64]) as (site,):
        before = site.pool.stats()
        site.partner.steal(16)
        after = site.pool.stats()
        assert after.steals - before.steals == 2 * 16, "there and back"
        assert after.created == before.created == growth.OPEN
        growth.dials(site.pool)(5)
        assert site.pool.stats().created == growth.OPEN + 4, "the first took the last idle one"


def test_idle_workers_are_workers(peer: Peer) -> None:
    with growth.sites(peer, [8]) as (site,), growth.idle(site.pool, 5) as pids:
        assert set(pids) | {os.getpid()} <= {worker.pid for worker in site.pool.stats().workers}
        assert all(growth.private_kib(pid) > 0 and growth.cpu_s(pid) > 0 for pid in pids)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_growth(options: Options, peer: Peer) -> None:
    rows = {16: growth.by_slots(options, peer, 16)}
    lines = growth.show(options, "slots", growth.FEWEST_SLOTS, rows)
    assert {line.what.removesuffix(", 16 slots / 8") for line in lines} == set(rows[16])
    (table,) = json.loads(json.dumps(options.tables))
    assert table["sizes"]["16"].keys() == rows[16].keys()
    workers = growth.by_workers(options, peer, 4)
    assert workers.keys() <= rows[16].keys()


def test_it_runs(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    command = [sys.executable, "-m", "benches", "--floors", "growth", "--json", str(found)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(found.read_text())["lines"] == []
