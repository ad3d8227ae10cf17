"""Forked workers that send whole requests to a real server, through one client library and different pools.

A `Contender` is a way to have connections; a `Case` is what is asked for, and how long a worker computes between two
requests. All contenders of a case take turns, in an order that is turned each time; ratios are taken within a turn.

The server is asked nothing while the clock runs: its connections are the descriptors that its process has beyond those
it had before, looked at before a turn and ten times in it (the most
counts), and its CPU time is the kernel's. What a worker computes is
CPU time, not wall time, and is not counted as the client's.

Not here: the servers, the clients (bench_redis, bench_http).
"""

from __future__ import annotations

import array
import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benches import floor
from benches.harness import Line, Options, Spread, quantile
from benches.workers import Crew, Forked

WORKERS = 8
START, END, IN_PLACE = 0, 1, 2  # words
LOOKS = 10  # at the server, in a turn
SETTLING_S = 0.2  # until a server has noticed that who was there before has gone
WARM_UP = 20  # requests of each worker

Request = Callable[[], object]
# Entered by the parent before the fork; gives what each worker calls to have its way of sending one request.
Contender = Callable[[], contextlib.AbstractContextManager[Callable[[], Request]]]


@dataclass(frozen=True)
class Case:
    """What is asked for, and the CPU seconds that a worker spends between two requests."""

    bench: str
    what: str
    work_s: float = 0.0

    @property
    def text(self) -> str:
        return f"{self.what}, {self.work_s * 1e3:g} ms of work between" if self.work_s else self.what


@dataclass(frozen=True)
class Outcome:
    """One turn of one contender. CPU times are milliseconds for 1 000 requests."""

    rate: float
    p50_us: float
    p99_us: float
    p999_us: float
    connections: int
    client_cpu: float
    server_cpu: float


COLUMNS = {
    "rate": "a second",
    "p50_us": "p50",
    "p99_us": "p99",
    "p999_us": "p99.9",
    "connections": "connections",
    "client_cpu": "clients' CPU",
    "server_cpu": "server's CPU",
}


class Server:
    """A server's process, seen from outside."""

    def __init__(self, pid: int) -> None:
        # The kernel's clock of a process's CPU time, see clock_getcpuclockid(3).
        self._clock = (~pid << 3) | 2
        self._directory = f"/proc/{pid}/fd"
        self._before = 0
        self._before = min(self._look_after(SETTLING_S / LOOKS) for _ in range(LOOKS))

    def connections(self) -> int:
        return len(os.listdir(self._directory)) - self._before

    def _look_after(self, seconds: float) -> int:
        time.sleep(seconds)
        return self.connections()

    def cpu_s(self) -> float:
        return time.clock_gettime(self._clock)


def take_turns(
    case: Case, contenders: Mapping[str, Contender], server: Server, options: Options, seconds: float, turns: int
) -> dict[str, list[Outcome]]:
    """Lets them take turns, and shows what came of it."""
    names = list(contenders)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
    for turn in range(turns):
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:
            with contenders[name]() as begin:
                outcomes[name].append(contend(case, begin, server, seconds))
    show(case, outcomes, options)
    return outcomes


def contend(case: Case, begin: Callable[[], Request], server: Server, seconds: float) -> Outcome:
    words = floor.load().Words()
    with Crew(*(Forked(_worker, words, number, begin, case.work_s) for number in range(WORKERS))) as crew:
        for number in range(WORKERS):
            words.sleep_while(IN_PLACE + number, 0)
        before, connections = server.cpu_s(), server.connections()
        words.store(END, time.perf_counter_ns() + int(seconds * 1e9))
        for _ in range(WORKERS):
            words.wake(START, 1)
        for _ in range(LOOKS):
            time.sleep(seconds / (LOOKS + 1))
            connections = max(connections, server.connections())
        results = crew.results()
        server_cpu = server.cpu_s() - before
    waits = sorted(wait / 1000 for waits, _ in results for wait in waits)
    client_cpu = sum(cpu_s for _, cpu_s in results)
    p50, p99, p999 = (quantile(waits, share) for share in (0.5, 0.99, 0.999))
    per_thousand = 1e6 / len(waits)
    return Outcome(
        len(waits) / seconds, p50, p99, p999, connections, client_cpu * per_thousand, server_cpu * per_thousand
    )


def _worker(words: Any, number: int, begin: Callable[[], Request], work_s: float) -> tuple[array.array[int], float]:
    """How long each request took, in ns, and the CPU seconds of this process without what it computed between."""
    request, clock = begin(), time.perf_counter_ns
    waits = array.array("Q")
    for _ in range(WARM_UP):
        request()
    gc.disable()
    words.wake(IN_PLACE + number, 1)
    words.sleep_while(START, 0)
    end, cpu = words.load(END), time.process_time()
    while True:  # at least once: this process may have lost its core for the whole turn
        began = clock()
        request()
        waits.append(clock() - began)
        if work_s:
            compute(work_s)
        if clock() >= end:
            break
    return waits, time.process_time() - cpu - work_s * len(waits)


def compute(seconds: float) -> None:
    """Uses up CPU time; how long that takes is the scheduler's business."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


# What came of it ----------------------------------------------------------------------------------------------------


def show(case: Case, outcomes: Mapping[str, Sequence[Outcome]], options: Options) -> None:
    width = max(map(len, outcomes))
    options.say(f"  {case.text}: medians of the turns; {WORKERS} workers; us; CPU in ms for 1 000 requests")
    options.say(f"  {'':{width}}  " + "  ".join(f"{title:>8}" for title in COLUMNS.values()))
    table: dict[str, Any] = {}
    for name, turns in outcomes.items():
        figures = {column: [getattr(one, column) for one in turns] for column in COLUMNS}
        cells = (f"{statistics.median(figures[column]):{max(8, len(title))}.0f}" for column, title in COLUMNS.items())
        options.say(f"  {name:{width}}  " + "  ".join(cells))
        table[name] = figures
    options.tables.append({"bench": case.bench, "case": case.text, "turns": table})


def compare(
    case: Case, outcomes: Mapping[str, Sequence[Outcome]], floor_name: str, limits: Mapping[str, float]
) -> list[Line]:
    """What each contender has over what `floor_name` has, turn by turn. `limits`: of requests a second."""
    lines = []
    for name, turns in outcomes.items():
        if name == floor_name:
            continue
        for column, title in (("rate", "requests a second"), ("p99_us", "  p99"), ("client_cpu", "  clients' CPU")):
            both = zip(turns, outcomes[floor_name], strict=True)
            spread = Spread.of(getattr(ours, column) / getattr(theirs, column) for ours, theirs in both)
            what = f"{title}, {case.text}: {name} / {floor_name}"
            limit = limits.get(name) if column == "rate" else None
            lines.append(Line(case.bench, what, spread, limit=limit, at_least=limit is not None))
    return lines


def connections(bench: str, outcomes: Mapping[str, Sequence[Outcome]]) -> list[Line]:
    return [
        Line(bench, f"connections at the server: {name}", Spread.of(one.connections for one in turns), "", digits=0)
        for name, turns in outcomes.items()
    ]
