"""A server that is away: it is noticed once, asked seldom by one process at a time, and used the moment it is back.

Callers of four processes want connections meanwhile; each dial of all processes is on record with its time (`Dials`),
beside the pool's own count and, where it can see them, the server's. The short forms run always; SHMPOOL_TEST_LONG=1
runs them at full length too.

Not here: what a dial does (test_dialing), the state of the upstream step by step (the core's tests).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import socket
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from shmpool import DialError, DialRequest, Pool, PoolTimeout
from shmpool.dialing import dial_target
from tests.books import audit
from tests.processes import LONG, Counters, Family, chance, proven, states, until, use
from tests.servers import ExclusiveServer, ask, exclusive_use

BY_HAND: dict[str, Any] = {"maintenance_interval": math.inf}
Mode = Literal["refuse", "reset", "hang"]
Down = Literal["wait", "fail"]

PROCESSES = 4
SLACK_S = 1.5  # a machine that is busy with other tests
SHORTEST_STEP = 0.75  # a step of the backoff is up to a quarter shorter, at random
SHAKE_S = 0.02  # dials whose times are noted by different processes


class Dials:
    """When dials began, over all processes: records appended to one file, whole or not at all."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile("a+b", buffering=0)  # noqa: SIM115 - close() closes it

    def note(self) -> None:
        self._file.write(struct.pack("=dI", time.monotonic(), os.getpid()))

    def _records(self) -> list[tuple[float, int]]:
        size = os.fstat(self._file.fileno()).st_size
        return sorted(struct.iter_unpack("=dI", os.pread(self._file.fileno(), size, 0)))

    def times(self, since: float = 0.0) -> list[float]:
        return [at for at, _ in self._records() if at >= since]

    def by_process(self) -> Counter[int]:
        return Counter(pid for _, pid in self._records())

    def close(self) -> None:
        self._file.close()


@pytest.fixture
def dials(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dials]:
    """All dials of the test's pools, in this process and in those forked from it."""

    def dial(*args: Any) -> socket.socket:
        noted.note()
        return dial_target(*args)

    with contextlib.closing(Dials()) as noted:
        monkeypatch.setattr("shmpool.pool.dial_target", dial)
        yield noted


def steps_in(seconds: float, backoff: tuple[float, float]) -> int:
    """How many steps of the backoff, begun or over, so much time has."""
    step, longest = backoff
    steps = 0
    while seconds > 0:
        seconds -= step
        step = min(longest, step * 2)
        steps += 1
    return steps


def seldom(times: list[float], backoff: tuple[float, float], until_s: float) -> None:
    """At most two dials in a step of the backoff: in all of them together, and in each of the longest ones, which are
    reached some time after the first."""
    allowed = 2 * steps_in(until_s - times[0], backoff)
    late = [at for at in times if at > times[0] + 3 * backoff[1] + 0.5]
    spans = [third - first for first, third in zip(late, late[2:], strict=False)]
    print(f"{len(times)} dials, {allowed} allowed; of three in a row the nearest in {min(spans, default=0):.3f} s")
    apart = [round(then - at, 3) for at, then in itertools.pairwise(times)]
    assert len(times) <= allowed, f"seconds between dials: {apart}"
    assert all(span > SHORTEST_STEP * backoff[1] - SHAKE_S for span in spans), f"seconds between dials: {apart}"


def handshake(conn: Any) -> None:
    """on_created: a server that resets what it has accepted is not there."""
    ask(conn.socket, "PING")


@dataclass
class Answer:
    """What a caller got, and when."""

    what: str  # "served", "late" (its deadline came), or what was wrong
    answered: float
    deadline: float
    knew: bool = False  # the reason: the dial that failed


def want(pool: Pool, timeout: float, down: Down) -> Answer:
    """Want a connection for so long. Where get() fails at once, try again until then, as callers do."""
    begun = time.monotonic()
    deadline = begun + timeout
    answer = Answer("late", math.inf, deadline)
    while math.isinf(answer.answered) or (down == "fail" and begun < deadline):
        try:
            with pool.get(timeout=max(0.0, deadline - begun)) as leased:
                exclusive_use(leased.socket, f"{os.getpid()}:{threading.get_ident()}")
        except PoolTimeout as error:
            answer.knew = isinstance(error.__cause__, DialError)
        except DialError as error:
            answer.knew = True
            if down == "wait":
                answer.what = f"an error before the deadline: {error!r}"
            elif time.monotonic() - begun > SLACK_S:
                answer.what = f"an error after {time.monotonic() - begun:.3f} s"
        else:
            answer.what = "served"
        answer.answered = time.monotonic()
        if answer.what != "late":
            break
        if down == "fail":
            time.sleep(0.02)  # sleep: a caller that tries again does so a little later
        begun = time.monotonic()
    return answer


def many(family: Family, pool: Pool, callers: int, call: Callable[[int], Any]) -> Callable[[float], list[Any]]:
    """Run `call(number)` for so many callers at once, threads of PROCESSES processes; what waits for the results.

    The processes end when no dial is under way, so that each connection that the server has accepted is installed.
    """
    share = callers // PROCESSES
    ready, go = Counters(PROCESSES), family.latch()

    def run(place: int) -> list[Any]:
        barrier = threading.Barrier(share + 1)

        def one(number: int) -> Any:
            barrier.wait()
            go.wait()
            return call(number)

        with ThreadPoolExecutor(share) as executor:
            results = [executor.submit(one, place * share + at) for at in range(share)]
            barrier.wait()
            ready[place] = 1
            found = [result.result() for result in results]
        until(lambda: "dialing" not in states(pool), "dials that nobody waits for any more are over")
        return found

    children = [family.fork(run, place) for place in range(PROCESSES)]
    until(lambda: all(ready.list()), "all callers are there")
    go.set()
    return lambda timeout_s: [result for child in children for result in child.result(timeout_s)]


OUTAGES: list[Any] = [
    pytest.param("refuse", "wait", 3.0, (0.01, 0.25), id="refuse-wait"),
    pytest.param("refuse", "fail", 3.0, (0.01, 0.25), id="refuse-fail"),
    pytest.param("reset", "wait", 2.0, (0.01, 0.25), id="reset-wait"),
    pytest.param("hang", "wait", 3.0, (0.01, 0.25), id="hang-wait"),
    *(
        pytest.param(
            mode,
            down,
            10.0,
            (0.01, 1.0),
            id=f"{mode}-{down}-long",
            marks=[pytest.mark.slow, pytest.mark.skipif(not LONG, reason="SHMPOOL_TEST_LONG=1 asks for it")],
        )
        for mode in ("refuse", "reset", "hang")
        for down in ("wait", "fail")
    ),
]


@pytest.mark.parametrize(("mode", "down", "seconds", "backoff"), OUTAGES)
def test_an_outage_with_two_hundred_callers(
    server: ExclusiveServer,
    family: Family,
    dials: Dials,
    mode: Mode,
    down: Down,
    seconds: float,
    backoff: tuple[float, float],
) -> None:
    """All connections end and the server is away; some callers have no time to see it come back, others have.

    Breaks when each waiter dials in its turn, when each process keeps a backoff of its own, when a caller is kept
    beyond its deadline by another's dial, or when nobody asks again (or only after a pause without an end).
    """
    random = chance()
    timeouts = [random.uniform(0.1, seconds + 3) for _ in range(200)]
    settings: dict[str, Any] = {"when_down": down, "dial_backoff": backoff, "max_waiters": 256}
    settings |= {"on_created": handshake} if mode == "reset" else {}
    with proven(server, 20, connection_timeout=0.2, alive_bypass=0, maintenance_interval=0.2, **settings) as pool:
        for leased in [pool.get() for _ in range(20)]:
            leased.release()
        until(lambda: server.stats()["open"] == 20, "the server has accepted all")
        getattr(server, mode)()
        server.close_connections(rst=True)
        gone = time.monotonic()
        before = pool.stats()
        answers = many(family, pool, 200, lambda number: want(pool, timeouts[number], down))
        until(lambda: time.monotonic() - gone >= seconds, "the outage is over", seconds + 10)
        counted = pool.stats().diff(before)
        server.listen()
        back = time.monotonic()
        found: list[Answer] = answers(seconds + 30)
        during = [at for at in dials.times(gone) if at <= back]
        ends = Counter(answer.what for answer in found)
        first = min(answer.answered for answer in found if answer.what == "served")
        print(f"{ends}; the first served {first - back:.3f} s after the server was back")
        seldom(during, backoff, back)
        assert abs(counted.dial_attempts - len(during)) <= 1, "the pool counts the same"
        if mode == "reset":
            assert abs(server.stats()["resets"] - len(during)) <= 1, "so does the server"
        assert set(ends) <= {"served", "late"}
        assert {answer.what for answer in found if answer.deadline > back + backoff[1] + SLACK_S} == {"served"}
        assert {answer.what for answer in found if answer.deadline < back} == {"late"}
        assert all(answer.knew for answer in found if gone + SLACK_S < answer.deadline < back)
        assert max(answer.answered - answer.deadline for answer in found) < SLACK_S
        assert 0 <= first - back < backoff[1] + SLACK_S
        # A reset may come before connect() returns: then there was no connection.
        audit(pool, server=None if mode == "reset" else server)


@pytest.mark.parametrize("known", [True, False])
def test_callers_with_less_time_than_a_dial_takes(
    server: ExclusiveServer, family: Family, dials: Dials, known: bool
) -> None:
    """The server hangs, a dial would have to wait for longer than any caller does: it is noticed all the same, whether
    it was there before or not. Breaks when a dial ends with its caller, says nothing, and the next caller dials."""
    backoff, timeout, connection_timeout = (0.1, 0.2), 0.03, 0.3
    times: dict[str, Any] = {"dial_backoff": backoff, "connection_timeout": connection_timeout}
    with proven(server, 8, when_down="wait", alive_bypass=0, **times) as pool:
        if known:
            use(pool)
        server.hang()
        server.close_connections()
        begun = time.monotonic()

        def ask_again(_number: int) -> int:
            turns = 0
            while time.monotonic() < begun + 2:
                with pytest.raises(PoolTimeout):
                    pool.get(timeout=timeout)
                turns += 1
            return turns

        turns = many(family, pool, 40, ask_again)(30)
        print(f"{sum(turns)} calls")
        noticed = begun + connection_timeout + 2 * timeout  # the first dial to come to its end has come to it
        seldom([at for at in dials.times(begun) if at > noticed], backoff, begun + 2)
        assert len([at for at in dials.times(begun) if at <= noticed]) <= 3 * 8
        server.listen()
        assert use(pool, timeout_s=connection_timeout + backoff[1] + SLACK_S)


@pytest.mark.parametrize("down", ["wait", "fail"])
def test_a_dial_that_outlasts_its_callers_serves_a_later_one(server: ExclusiveServer, down: Down) -> None:
    """Each caller has less time than a dial takes. Breaks when each of them begins a dial of its own and ends it."""
    dialled: list[float] = []

    def slow(request: DialRequest) -> socket.socket:
        dialled.append(request.timeout)
        pause = threading.Event()
        if pause.wait(min(0.3, request.timeout)) or request.timeout < 0.3:
            raise TimeoutError("too slow")
        return socket.create_connection(server.address)

    with Pool(dial=slow, max_connections=4, min_connections=0, connection_timeout=5, when_down=down) as pool:
        served = False
        calls = 0
        while not served:
            with contextlib.suppress(PoolTimeout), pool.get(timeout=0.05):
                served = True
            calls += 1
            assert calls < 100
        assert len(dialled) == 2, dialled  # the first was cut short
        assert calls > 3


# ---- what is there is used meanwhile ---------------------------------------------------------------------------------


@pytest.mark.parametrize("down", ["wait", "fail"])
def test_connections_that_come_back_serve_who_waits(
    server: ExclusiveServer, family: Family, dials: Dials, down: Down
) -> None:
    """Three connections outlive the server's listener; forty callers share them while nothing can be dialled. Where
    calls fail at once, those do whose own dial has failed, and no others. Breaks when a call fails, or waits for a
    dial, although something may be returned to it."""
    backoff = (0.01, 0.25)
    with proven(server, 6, when_down=down, dial_backoff=backoff, every_slot=False) as pool:
        leases = [pool.get() for _ in range(3)]
        until(lambda: server.stats()["open"] == 3, "the server has accepted all")
        server.refuse()
        gone = time.monotonic()
        answers = many(family, pool, 40, lambda _: want(pool, 20.0, "wait"))
        until(lambda: pool.stats().upstream == "down", "the first of them has noticed")
        until(lambda: pool.stats().waiting >= 40 - len(dials.times(gone)), "all of them wait")
        for leased in leases:
            exclusive_use(leased.socket, "holder:1")
            leased.release()
        served = [answer.what for answer in answers(30)].count("served")
        assert served == 40 or (down == "fail" and served >= 40 - len(dials.times(gone)))
        seldom(dials.times(gone), backoff, time.monotonic())
        assert server.stats()["accepted"] == 3
        server.listen()
        audit(pool, server=server)


def held_dial(server: ExclusiveServer, dials: Dials, free: int) -> tuple[Callable[[object], socket.socket], Any]:
    """A dial that is quick for the first `free` connections, and then waits to be let go."""
    go = threading.Event()

    def dial(_request: object) -> socket.socket:
        dials.note()
        if len(dials.times()) > free:
            assert go.wait(30)
        return server.connect()

    return dial, go


def test_a_returned_connection_is_had_before_the_dial_is_over(server: ExclusiveServer, dials: Dials) -> None:
    """Breaks when who dials waits for that dial alone; when the connection is dialled anew for the next caller, who
    could have had what is under way; or when it is nobody's in the end."""
    dial, go = held_dial(server, dials, 1)
    with Pool(dial=dial, max_connections=2, min_connections=0, **BY_HAND) as pool, ThreadPoolExecutor(3) as threads:
        first = pool.get()
        waiter = threads.submit(pool.get, 20)
        until(lambda: len(dials.times()) == 2, "a dial for the second")
        first.release()
        second = waiter.result(SLACK_S)
        assert (second.id, len(dials.times())) == (1, 2)
        third = threads.submit(pool.get, 20)
        until(lambda: pool.stats().waiting == 1, "the third waits")
        assert len(dials.times()) == 2, "the dial of the second is its own now"
        go.set()
        adopted = third.result(SLACK_S)
        assert adopted.id == 2
        second.release()
        adopted.release()
        assert len(dials.times()) == 2
        audit(pool, server=server)


def test_an_orphaned_dial_is_used_by_another_process(server: ExclusiveServer, family: Family, dials: Dials) -> None:
    """As long as the process lives that dials. Breaks when only its own threads know of it."""
    go, begun, over = family.latch(), family.latch(), family.latch()

    def dial(_request: object) -> socket.socket:
        dials.note()
        if len(dials.times()) > 1:
            begun.set()
            go.wait()
        return server.connect()

    def want_one() -> None:
        with pytest.raises(PoolTimeout):
            pool.get(timeout=0.05)
        over.wait()

    with Pool(dial=dial, max_connections=2, min_connections=0, **BY_HAND) as pool:
        first = pool.get()
        other = family.fork(want_one)
        begun.wait()
        until(lambda: pool.stats().waiting == 0, "it has given up")
        until(lambda: states(pool) == {"leased": 1, "dialing": 1}, "its dial goes on")
        with ThreadPoolExecutor(1) as threads:
            second = threads.submit(use, pool)
            until(lambda: pool.stats().waiting == 1, "another waits")
            assert len(dials.times()) == 2
            go.set()
            assert second.result(SLACK_S) == 2
        over.set()
        other.result()
        first.release()
        assert len(dials.times()) == 2
        audit(pool, server=server)


# ---- who asks dies, or stops -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fate", ["killed", "stopped", "killed often"])
def test_the_fate_of_who_asks_is_its_own(
    server: ExclusiveServer, family: Family, monkeypatch: pytest.MonkeyPatch, fate: str
) -> None:
    """The process that has the right to dial is killed or stopped in the dial; the others go on asking, and find the
    server when it is back. Breaks when that right has no end, or ends with a step that nobody waits for."""
    victims, back = Counters(1), Counters(1)

    def dial(*args: Any) -> socket.socket:
        if victims[0] and os.getpid() != mine:
            victims[0] -= 1
            os.kill(os.getpid(), signal.SIGSTOP if fate == "stopped" else signal.SIGKILL)
        return dial_target(*args)

    def work() -> None:
        while not back[0]:
            with contextlib.suppress(PoolTimeout):
                use(pool, timeout_s=0.2)
        use(pool)

    mine = os.getpid()
    deaths = 3 if fate == "killed often" else 1
    settings = {"dial_backoff": (0.01, 0.1), "connection_timeout": 0.3, "when_down": "wait"}
    with proven(server, 4, **settings, **BY_HAND, every_slot=fate != "stopped") as pool:
        monkeypatch.setattr("shmpool.pool.dial_target", dial)
        server.refuse()
        children = [family.fork(work) for _ in range(6)]
        until(lambda: pool.stats().upstream_failures >= 3, "they ask")
        victims[0] = deaths
        until(lambda: victims[0] == 0, "whom it was meant for", SLACK_S + 5)
        failures = pool.stats().upstream_failures
        until(lambda: pool.stats().upstream_failures >= failures + 3, "others ask", SLACK_S + 5)
        server.listen()
        begun = time.monotonic()
        back[0] = 1
        assert use(pool, timeout_s=5) > 0
        assert time.monotonic() - begun < 0.1 + SLACK_S
        dead = [child for child in children if child.alive() and "T" in state_of(child.pid)]
        for child in children:
            if child in dead:
                child.kill()
            else:
                assert child.wait() in ("exit 0", "SIGKILL")
        pool.recover()
        audit(pool)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# ---- starts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["refuse", "hang"])
@pytest.mark.parametrize("down", ["wait", "fail"])
def test_a_cold_start_against_a_dead_server(
    server: ExclusiveServer, family: Family, dials: Dials, mode: Mode, down: Down
) -> None:
    """Nothing is known of the server when forty callers of four processes begin at once, beside the prewarming of each.
    Breaks when what is not known to be down is dialled by everybody."""
    getattr(server, mode)()
    backoff = (0.05, 0.2)
    settings: dict[str, Any] = {"dial_backoff": backoff, "connection_timeout": 0.3, "when_down": down}
    with proven(server, 40, min_connections=10, maintenance_interval=0.1, every_slot=False, **settings) as pool:
        begun = time.monotonic()
        found = many(family, pool, 40, lambda _: want(pool, 1.5, down))(30)
        assert {answer.what for answer in found} == {"late"}
        assert all(answer.knew for answer in found)
        assert max(answer.answered - answer.deadline for answer in found) < SLACK_S
        seldom([at for at in dials.times() if at < begun + 1.5], backoff, begun + 1.5)
        assert pool.stats().open == 0


@pytest.mark.parametrize("minimum", [0, 2])
@pytest.mark.parametrize("slow_s", [0.0, 0.1])
@pytest.mark.parametrize("hold", [True, False])
def test_a_herd_at_a_start_dials_no_more_than_it_needs(
    server: ExclusiveServer, family: Family, dials: Dials, hold: bool, slow_s: float, minimum: int
) -> None:
    """Sixteen callers of four processes, who all hold what they get until all have one, need sixteen connections. Who
    gives it back at once may have served others. Prewarming, which begins at the same time, may add its own, and so
    may a dial whose caller was served by another's. Breaks when every caller dials as often as it looks."""
    holding = Counters(16)

    def dial(_request: object) -> socket.socket:
        dials.note()
        time.sleep(slow_s)  # sleep: a server far away
        return server.connect()

    def caller(number: int) -> int:
        with pool.get(timeout=20) as leased:
            holding[number] = 1
            if hold:
                until(lambda: all(holding.list()), "all have one")
            return exclusive_use(leased.socket, f"herd:{number}")

    with Pool(dial=dial, max_connections=64, min_connections=minimum, maintenance_interval=0.1) as pool:
        numbers = many(family, pool, 16, caller)(30)
        stats = audit(pool, server=server)
        print(f"{len({*numbers})} of {stats.created} connections were used by 16 callers")
        assert stats.created == len(dials.times())
        assert stats.created <= 16 + minimum + PROCESSES
        if hold:
            assert len({*numbers}) == 16


@pytest.mark.parametrize("retries", [0, 3])
def test_known_to_be_down_is_told_at_once(server: ExclusiveServer, retries: int) -> None:
    """Whatever `dial_retries` is: they are for dials of one's own. Breaks when a call waits for the end of the step."""
    with proven(server, 2, dial_retries=retries, dial_backoff=(1.0, 1.0), every_slot=False) as pool:
        server.refuse()
        server.close_connections()
        with pytest.raises((DialError, PoolTimeout)):
            pool.get(1.5)
        for call in (lambda: pool.get(30), pool.try_get, lambda: pool.get(0)):
            begun = time.monotonic()
            with pytest.raises(DialError) as caught:
                call()
            assert caught.value.down
            assert time.monotonic() - begun < 0.3
        server.listen()
