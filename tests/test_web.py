"""The web view: what it answers about real pools and to whom, and the page of it in a real browser."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

from shmpool import Pool, PoolError, inspect, slab, steering
from shmpool.events import Event, EventBatch
from shmpool.inspector import Inspector, unlink
from shmpool.stats import FAILURES, SOURCES
from shmpool.web import recorder as recorder_module
from shmpool.web.recorder import Record, Recorder, Tail
from tests.members import Members, some_name
from tests.processes import Family, proven, until, use
from tests.servers import ExclusiveServer, has_ipv6
from tests.test_inspector import segment
from tests.tools import tool

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "shmpool", "serve"]
DEADLINE_S = 30.0
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
COUNTED = (
    *("name", "target", "state", "pid", "created_at", "max_connections", "connections", "waiting", "upstream"),
    *("in_use", "idle", "gets", "created", "closed", "dial_attempts", "recoveries", *SOURCES, *FAILURES),
)
HOSTILE = "<img src=x onerror=alert(1)>"


class Response(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Served(NamedTuple):
    """A serving process."""

    process: subprocess.Popen[str]
    url: str
    host: str
    port: int

    def ask(self, path: str, method: str = "GET", hosts: tuple[str, ...] | None = None) -> Response:
        """A path as it stands, with so many Host headers."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=DEADLINE_S)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for host in (self.host,) if hosts is None else hosts:
                connection.putheader("Host", host)
            connection.endheaders()
            response = connection.getresponse()
            return Response(response.status, dict(response.getheaders()), response.read())

    def json(self, path: str) -> Any:
        response = self.ask(path)
        assert response.status == 200, response
        assert response.headers["Content-Type"] == "application/json"
        return json.loads(response.body)

    def pool(self, name: str, **query: int) -> dict[str, Any]:
        asked = "&".join(f"{key}={value}" for key, value in query.items())
        return cast("dict[str, Any]", self.json(f"/api/pools/{name}?{asked}"))

    def status(self, name: str) -> str:
        """Of a pool, "" when it is not known."""
        return "".join(row["status"] for row in self.json("/api/pools")["pools"] if row["name"] == name)

    def points(self, name: str, since: int = 0) -> list[dict[str, Any]]:
        history = self.json(f"/api/pools/{name}/history?since={since}")
        return [dict(zip(history["fields"], point, strict=True)) for point in history["points"]]


@contextlib.contextmanager
def served(*words: str) -> Iterator[Served]:
    with subprocess.Popen(
        [*COMMAND, "--port", "0", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            said = re.fullmatch(r"listening on (http://(\S+):(\d+)/); Ctrl-C ends it\n", process.stdout.readline())
            assert said
            host = said[2].strip("[]")
            yield Served(process, said[1], "127.0.0.1" if host == "0.0.0.0" else host, int(said[3]))
        finally:
            process.kill()


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=DEADLINE_S)


@pytest.fixture
def url() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def record(name: str) -> Iterator[Record]:
    with contextlib.closing(Record(name)) as made:
        yield made


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This test's pools are the only ones there are, whatever other tests do meanwhile."""
    own = f"shmpool-{some_name()}-"
    monkeypatch.setattr(slab, "prefix", lambda: own)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


# The figures --------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_pool(members: Callable[..., Members], name: str) -> None:
    pool = members(max_connections=3, maintenance_interval=math.inf)
    holders = [pool.holder(2)[0], pool.holder(1)[0]]
    waiter = pool.waiter()
    with served(name) as server:
        until(lambda: server.pool(name).get("recent", {}).get("interval"), "there are two looks")
        told, stats = server.pool(name), pool.stats().to_dict()
        assert (told["status"], told["name"], told["error"], told["ended_at"]) == ("open", name, "", None)
        assert {what: told["total"][what] for what in COUNTED} == {what: stats[what] for what in COUNTED}
        assert 0 < told["total"]["oldest_wait"] <= stats["oldest_wait"]
        assert told["recent"]["get_latency"]["count"] == 0, "nothing has happened in the last second"
        assert [row["gets"] for row in told["workers"]] == [0, 0, 0]
        for what, keys, rows in (
            ("workers", ("index", "pid", "alive", "held", "cached", "waiting"), stats["workers"]),
            ("connections", ("id", "state", "holder", "cached_by", "peer", "uses"), stats["slots"]),
        ):
            assert [[row[key] for key in keys] for row in told[what]] == [[row[key] for key in keys] for row in rows]
        assert [(row["pid"], row["state"]) for row in told["waiters"]] == [(waiter.pid, "waiting")]
        assert 0 < told["waiters"][0]["waited"] < DEADLINE_S
        point = server.points(name)[-1]
        assert (point["in_use"], point["idle"], point["busy"], point["waiting"], point["cap"]) == (3, 0, 0, 1, 3)
        assert (point["leases"], point["failures"], point["get_p50"], point["wait_p99"]) == (0, 0, None, None)
        row = next(row for row in server.json("/api/pools")["pools"] if row["name"] == name)
        assert (row["in_use"], row["waiting"], row["max_connections"], row["upstream"]) == (3, 1, 3, "up")

        holders[0].kill()
        until(lambda: server.pool(name)["total"]["recoveries"], "its leases are taken back")
        assert [row["pid"] for row in server.pool(name)["workers"] if not row["alive"]][:1] == [holders[0].pid]


def test_events(members: Callable[..., Members], name: str) -> None:
    pool = members(max_connections=1)
    pool.keeper()
    with served(name) as server:

        def kinds(events: int = 0) -> list[str]:
            return [event["kind"] for event in server.pool(name, events=events)["events"]]

        until(lambda: "joined" in kinds(), "the first look")
        told = server.pool(name)
        assert told["events"][0]["says"] == "this process takes part"
        assert (told["next_event"], told["events_lost"]) == (len(told["events"]), 0)
        assert kinds(told["next_event"]) == []
        pool.keeper()
        until(lambda: kinds(told["next_event"]) == ["joined"], "the second process is seen, and nothing again")


def test_what_is_plotted(server: ExclusiveServer, name: str, record: Record) -> None:
    with proven(server, 2, name=name, maintenance_interval=math.inf) as pool:
        record.look()
        before = pool.stats()
        for _ in range(20):
            use(pool)
        record.look()
        assert record.newest is not None
        change, expected = record.newest.change, pool.stats().diff(before)
        record.look()
        for timed in ("get_latency", "use_latency", "dial_latency", "wait_latency"):
            assert getattr(change, timed) == getattr(expected, timed)
        assert [worker.get_latency for worker in change.workers] == [each.get_latency for each in expected.workers]
        first, second, third = record.points.since(0)
        assert (first.leases, first.get_p50) == (None, None), "since when?"
        assert second.leases == pytest.approx(20 / change.interval)
        assert (second.get_p50, second.get_p99) == (expected.get_latency.p50, expected.get_latency.p99)
        assert (third.leases, third.failures, third.get_p50, third.get_p99) == (0, 0, None, None)
        assert [(point.in_use, point.idle, point.busy) for point in (first, second)] == [(0, 0, 0), (0, 1, 0)]


def test_a_tail_is_numbered_and_bounded() -> None:
    tail: Tail[int] = Tail(3)
    assert (tail.since(0), tail.next) == ([], 0)
    for number in range(5):
        tail.add(number)
    assert tail.next == 5
    assert [tail.since(number) for number in (0, 2, 4, 5, 9)] == [[2, 3, 4], [2, 3, 4], [4], [], []]


def test_an_event_that_stays_half_written(record: Record) -> None:
    """It holds up the others for one look."""
    event = Event(1, 0.0, "up", 1, None, None, "", None, None, "")
    asked = []

    class Stuck:
        def events(self, after: int, *, patient: bool = False) -> EventBatch:
            asked.append((after, patient))
            return EventBatch([], 0, 0) if patient else EventBatch([event], 2, 1)

    for _ in range(2):
        record._read_events(cast("Inspector", Stuck()), False)
    assert asked == [(0, True), (0, False), (0, False)]
    assert (record.events.since(0), record.events_lost) == ([event], 1)


# Pools come and go --------------------------------------------------------------------------------------------------


def test_a_pool_comes_goes_and_comes_back(url: str, name: str) -> None:
    with served(name) as server:
        assert server.process.stderr is not None
        said = f"shmpool: there is no pool {name!r} of this user yet; it is shown when it comes\n"
        assert server.process.stderr.readline() == said
        until(lambda: server.status(name) == "absent", "it is looked for")
        with Pool(url, name=name, max_connections=3, maintenance_interval=math.inf) as pool, pool.get():
            until(lambda: server.status(name) == "open", "it is seen")
            first = server.pool(name)
            until(lambda: len(server.points(name)) > 1, "it has a history")
        until(lambda: server.status(name) == "ended", "its end is seen")
        ended = server.pool(name)
        assert ended["ended_at"] >= ended["taken_at"] - 1
        assert ended["events"][-1]["kind"] == "left", "the last look is after the end"
        points = server.points(name)
        assert len(points) > 1
        assert points[0]["cap"] == 3
        with Pool(url, name=name, max_connections=5, maintenance_interval=math.inf):
            until(lambda: server.status(name) == "open", "it is back")
            again = server.pool(name, events=ended["next_event"])
            new = server.points(name, since=len(points))
            assert (again["ended_at"], again["error"]) == (None, "")
            assert again["total"]["created_at"] > first["total"]["created_at"]
            assert (new[0]["cap"], new[0]["leases"]) == (5, None), "nothing is counted from the one before"
            assert server.points(name)[: len(points)] == points, "the history goes on"
            assert again["events"][0]["number"] == 0, "its own events follow those of the one before"


def test_a_pool_that_lost_its_name(url: str, name: str, record: Record) -> None:
    """It lives, but whoever asks for the name gets the other."""
    with Pool(url, name=name, max_connections=2, maintenance_interval=math.inf):
        record.look()
        unlink(name, force=True)
        record.look()
        assert record.status == "ended"
        with Pool(url, name=name, max_connections=4, maintenance_interval=math.inf):
            record.look()
            assert record.status == "open"
            assert record.newest is not None
            assert record.newest.stats.max_connections == 4
            unlink(name, force=True)
            with Pool(url, name=name, max_connections=6, maintenance_interval=math.inf):
                record.look()
                assert record.status == "open", "the third, with no look in between"
                assert record.newest.stats.max_connections == 6
                assert record.newest.change.interval == 0
            record.look()
            assert record.status == "ended"


def test_a_pool_that_is_closed_from_outside(url: str, name: str, record: Record) -> None:
    with Pool(url, name=name, maintenance_interval=math.inf):
        record.look()
        steering.close(name)
        record.look()
        assert record.status == "ended"
        assert record.newest is not None
        assert record.newest.stats.state == "closed"
        assert record.events.since(0)[-1].describe() == "the pool is closed"


def test_a_pool_whose_processes_are_killed(members: Callable[..., Members], record: Record) -> None:
    child, _ = members(max_connections=2).holder(1)
    record.look()
    child.kill()
    record.look()
    record.look()
    assert record.status == "dead"
    assert record.newest is not None
    assert record.newest.stats.in_use == 1, "as it was left"
    assert len(record.points.since(0)) == 1, "nobody is there to be plotted"


@pytest.mark.usefixtures("alone")
def test_damaged_pools_are_listed(url: str, name: str) -> None:
    with served_here() as recorder, Pool(url, name="sound", maintenance_interval=math.inf):
        with segment("text", b"no slab"), segment(name, b""):
            until(lambda: len(recorder.pools()["pools"]) == 3, "all are found")
            until(lambda: all(row["status"] != "absent" for row in recorder.pools()["pools"]), "all are looked at")
            rows = {row["name"]: row for row in recorder.pools()["pools"]}
            assert {key: row["status"] for key, row in rows.items()} == {
                "sound": "open",
                "text": "damaged",
                name: "damaged",
            }
            assert all(bool(row["error"]) == (row["status"] == "damaged") for row in rows.values())
            told = recorder.pool("text")
            assert told is not None
            assert told["error"] == rows["text"]["error"]
            assert "total" not in told
        until(lambda: [row["name"] for row in recorder.pools()["pools"]] == ["sound"], "who was never sound is no more")


@contextlib.contextmanager
def served_here() -> Iterator[Recorder]:
    """A recorder that looks in quick succession."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder_module, "PERIOD_S", 0.01)
        with Recorder() as recorder:
            yield recorder


def test_a_segment_that_is_damaged_meanwhile(url: str, name: str, record: Record) -> None:
    with Pool(url, name=name, maintenance_interval=math.inf):
        whole = Path(slab.path_of(name)).read_bytes()
    with segment(name, whole) as path:
        record.look()
        assert (record.status, record.error) == ("open", "")
        os.truncate(path, 4096)
        record.look()
        assert record.status == "damaged"
        assert name in record.error
        path.write_bytes(whole)
        record.look()
        assert (record.status, record.error) == ("open", "")


@pytest.mark.usefixtures("alone")
def test_only_the_last_that_ended_are_kept(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "ENDED_MAX", 2)
    recorder = Recorder()
    for name in ("d", "a", "c", "b"):
        with Pool(url, name=name, maintenance_interval=math.inf):
            recorder.look()
        recorder.look()
    assert [(row["name"], row["status"]) for row in recorder.pools()["pools"]] == [("b", "ended"), ("c", "ended")]
    assert recorder.pool("a") is None
    assert recorder.history("a") is None


# Who may read, and what ---------------------------------------------------------------------------------------------


def test_headers(name: str) -> None:
    with served(name) as server:
        answers = {
            path: server.ask(path)
            for path in (
                "/",
                "/page.js",
                "/plot.js",
                "/style.css",
                "/icon.svg",
                "/api/pools",
                "/nothing",
                "/api/pools/x",
            )
        }
        answers["wrong number"] = server.ask(f"/api/pools/{name}?events=x")
        answers["wrong host"] = server.ask("/", hosts=("evil.example",))
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "NONSENSE"):
            answers[method] = server.ask("/", method)
            assert answers[method].headers["Allow"] == "GET, HEAD"
            assert answers[method].headers["Connection"] == "close"
        until(lambda: server.ask(f"/api/pools/{name}").status == 200, "the first look")
        assert {what: answer.status for what, answer in answers.items()} == {
            **dict.fromkeys(("/", "/page.js", "/plot.js", "/style.css", "/icon.svg", "/api/pools"), 200),
            **dict.fromkeys(("/nothing", "/api/pools/x"), 404),
            **dict.fromkeys(("POST", "PUT", "DELETE", "OPTIONS", "NONSENSE"), 405),
            "wrong number": 400,
            "wrong host": 403,
        }
        for answer in answers.values():
            assert answer.headers["Content-Security-Policy"] == POLICY
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert answer.headers["Cache-Control"] == "no-store"
            assert answer.headers["Server"] == "shmpool"
            assert not [header for header in answer.headers if header.lower().startswith("access-control-")]
        for path in ("/", "/api/pools", "/nothing"):
            head = server.ask(path, "HEAD")
            assert (head.status, head.body) == (answers[path].status, b"")
            assert int(head.headers["Content-Length"]) > 0


@pytest.mark.parametrize(
    ("hosts", "status"),
    [
        (("127.0.0.1",), 200),
        (("localhost:80",), 200),
        (("LocalHost",), 200),
        (("[::1]:9465",), 200),
        (("127.0.0.9:9465",), 200),  # as it was given
        ((), 403),
        (("",), 403),
        (("evil.example",), 403),
        (("evil.example:9465",), 403),
        (("localhost.evil.example",), 403),
        (("127.0.0.1.evil.example",), 403),
        (("127.0.0.1@evil.example",), 403),
        (("127.0.0.2",), 403),
        (("[::1",), 403),
        (("localhost", "evil.example"), 403),
    ],
)
def test_the_host_must_be_meant(loopback: Served, hosts: tuple[str, ...], status: int) -> None:
    assert loopback.ask("/api/pools", hosts=hosts).status == status
    assert loopback.ask("/", hosts=hosts).status == status


@pytest.fixture(scope="module")
def loopback() -> Iterator[Served]:
    with served("--host", "127.0.0.9") as server:
        yield server


def test_names_and_numbers_out_of_nowhere(loopback: Served, name: str) -> None:
    for path in (
        "/api/pools/",
        "/api/pools/..",
        "/api/pools/..%2f..%2fetc%2fpasswd",
        "/api/pools/%00",
        "/api/pools/%ff%fe",
        f"/api/pools/{'a' * 5000}",
        f"/api/pools/{name}",
        f"/api/pools/{name}/history",
        f"/api/pools/{name}/history/",
        "/../web/__init__.py",
        "/__init__.py",
        "/page.js/",
        "/%2e%2e/recorder.py",
        "//[",
        "http://127.0.0.1/",
        "*",
    ):
        assert loopback.ask(path).status == 404, path
    for number in ("-1", "1.5", "x", "", "9" * 16, "%D9%A1"):
        for asked in (f"{name}?events={number}", f"{name}/history?since={number}"):
            answer = loopback.ask(f"/api/pools/{asked}")
            assert answer.status == 400
            assert answer.body.startswith((b"events=", b"since="))
    with socket.create_connection((loopback.host, loopback.port), DEADLINE_S) as sock:
        sock.sendall(b"no HTTP at all\r\n\r\n")
        assert sock.recv(4096) == b"Bad request version ('all')\n"
    assert loopback.ask("/").status == 200, "nothing of this has done any harm"


def test_the_wheel_has_the_page() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert "shmpool.web" in settings["packages"]
    there = [path.name for path in (ROOT / "shmpool" / "web").iterdir() if path.is_file() and path.suffix != ".py"]
    assert len(there) > 3
    patterns = settings["package-data"]["shmpool.web"]
    assert [each for each in there if not any(fnmatch(each, pattern) for pattern in patterns)] == []


# The command --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends(number: signal.Signals) -> None:
    with served() as server:
        assert server.host == "127.0.0.1", "loopback, if nothing else was asked for"
        with socket.create_connection((server.host, server.port)):  # and asks nothing
            server.process.send_signal(number)
            assert server.process.communicate(timeout=DEADLINE_S) == ("", "")
        assert server.process.returncode == 0


def test_silent_clients_make_room(url: str, name: str, loopback: Served) -> None:
    """Breaks when clients that stay take the descriptors away from others, or from the looks at pools."""
    resource.prlimit(loopback.process.pid, resource.RLIMIT_NOFILE, (100, 100))
    with Pool(url, name=name, min_connections=0), contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection((loopback.host, loopback.port), DEADLINE_S))
        until(lambda: loopback.status(name) == "open", "a new client is answered, and a new pool is seen")
        assert loopback.pool(name)["name"] == name


def test_a_look_that_fails_is_not_the_last(url: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names, fails = recorder_module.pool_names, threading.Semaphore(3)

    def pool_names() -> Iterator[str]:
        if fails.acquire(blocking=False):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), slab.DIRECTORY)
        return names()

    monkeypatch.setattr(recorder_module, "pool_names", pool_names)
    monkeypatch.setattr(recorder_module, "PERIOD_S", 0.01)
    with Pool(url, name=name, min_connections=0), Recorder() as looking:
        until(lambda: looking.pool(name), "it looks again")


def test_whoever_listens_elsewhere_is_warned() -> None:
    with served("--host", "0.0.0.0") as server:
        assert server.process.stderr is not None
        said = server.process.stderr.readline()
        assert said.startswith(f"shmpool: warning: whoever can reach 0.0.0.0 port {server.port} can read ")
        assert server.ask("/", hosts=("127.0.0.1",)).status == 200
        assert server.ask("/", hosts=("evil.example",)).status == 403


@pytest.mark.skipif(not has_ipv6(), reason="no ::1")
def test_over_ipv6() -> None:
    with served("--host", "::1") as server:
        assert server.ask("/", hosts=(f"[::1]:{server.port}",)).status == 200


def test_what_cannot_be_served() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("--port", port)
    said = f"shmpool: cannot listen on 127.0.0.1 port {port}: Address already in use; choose with --host and --port\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)
    done = run("--host", "192.0.2.1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("shmpool: cannot listen on 192.0.2.1 port 9465: ")
    done = run("../etc")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'../etc'" in done.stderr


# The page -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    """A browser that asks nobody but the page."""
    options = webdriver.ChromeOptions()
    options.binary_location = tool("chromium")
    for switch in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1400,900",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=tool("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def text(self, selector: str) -> str:
        return str(self.driver.find_element(By.CSS_SELECTOR, selector).text)

    def texts(self, selector: str) -> list[str]:
        try:
            return [each.text for each in self.driver.find_elements(By.CSS_SELECTOR, selector)]
        except StaleElementReferenceException:  # a row that has just gone
            return self.texts(selector)

    def plots(self) -> list[str]:
        script = "return [...document.querySelectorAll('.series')].map((path) => path.getAttribute('d') ?? '')"
        return cast("list[str]", self.driver.execute_script(script))

    def seen(self, selector: str, wanted: str) -> None:
        until(lambda: any(wanted in text for text in self.texts(selector)), f"{wanted} in {selector}")


@pytest.mark.slow
def test_the_page(browser: webdriver.Chrome, server: ExclusiveServer, family: Family, tmp_path: Path) -> None:
    name, page = some_name(), Page(browser)
    stop = family.latch()

    def work(pool: Pool) -> None:
        while not stop.is_set():
            with contextlib.suppress(ConnectionError, EOFError, PoolError):
                use(pool)

    with proven(server, 3, every_slot=False, name=name) as pool, served(name) as serving:
        workers = [family.fork(work, pool) for _ in range(2)]
        browser.get(f"{serving.url}#{name}")
        page.seen("#name", name)
        assert page.text("#state") == "open"
        until(lambda: len(page.texts("#workers tbody tr")) == 3, "a row for each process")
        until(lambda: all(page.plots()[each] for each in (0, 1, 2, 5, 8)), "lines and areas are drawn")
        shown = [page.texts(".tile b"), page.plots()]
        until(lambda: page.texts(".tile b") != shown[0], "the figures change")
        until(lambda: page.plots() != shown[1], "the plots go on")
        latency = browser.find_element(By.CSS_SELECTOR, ".plot svg")
        near_the_end = latency.size["width"] // 2 - 12
        ActionChains(browser).move_to_element_with_offset(latency, near_the_end, 0).perform()
        page.seen(".tip", "p50")

        with pool.get() as conn:
            conn.discard(HOSTILE)
        page.seen("#events td", f"was discarded: {HOSTILE}")
        assert not browser.find_elements(By.CSS_SELECTOR, "#events img")

        with pool.get(), pool.get(), pool.get():
            page.seen(".tile.fair", "of 3, 100 %")
            page.seen("#waiters td", str(workers[0].pid))
        server.refuse()
        server.close_connections()
        page.seen("#alerts p", "The server has been down for ")
        page.seen("#server", "Connection refused")
        server.listen()
        picture = tmp_path / "page.png"
        assert browser.save_screenshot(str(picture))
        assert picture.stat().st_size > 20_000, "it is not blank"

        stop.set()
        for worker in workers:
            worker.wait()
        pool.close()
        page.seen("#alerts p", "This pool ended at ")
        assert page.plots()[2], "what was is still shown"
        browser.get(f"{serving.url}#{HOSTILE}")
        browser.refresh()
        page.seen("#nothing", f"There is no pool {HOSTILE}.")
        assert not browser.find_elements(By.CSS_SELECTOR, "img")
        assert browser.get_log("browser") == []
        serving.process.send_signal(signal.SIGTERM)
        serving.process.wait(DEADLINE_S)
        page.seen("#alerts p", "The serving process has not answered since ")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_a_segment_says_is_text(browser: webdriver.Chrome, url: str, scheme: str) -> None:
    """A target that is HTML, in a page as narrow as a telephone, and in the colours that were asked for."""
    with Pool(url, max_connections=3, maintenance_interval=math.inf) as made:
        whole = Path(slab.path_of(made.name)).read_bytes()
    name, page = some_name(), Page(browser)
    evil = whole.replace(url.encode() + b"\0" * len(HOSTILE), f"{HOSTILE}".encode() + b"\0" * len(url), 1)
    assert evil != whole
    preferred = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preferred]})
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    with segment(name, evil), inspect(name) as inspector, served(name) as serving:
        assert inspector.stats().target == HOSTILE
        browser.get(serving.url)
        page.seen("#about", HOSTILE)
        assert not browser.find_elements(By.CSS_SELECTOR, "img")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
        (back,) = browser.find_elements(By.TAG_NAME, "body")
        red, green, blue = map(int, re.findall(r"\d+", back.value_of_css_property("background-color"))[:3])
        assert (red + green + blue > 3 * 128) == (scheme == "light")
        assert browser.get_log("browser") == []
