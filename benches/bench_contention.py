"""Many workers, few connections: throughput, waiting and fairness, which no simple tool has all at once.

Workers lease, hold for 100 us, return, and begin again, for some seconds. The peers guard the same number of permits: a
`multiprocessing.BoundedSemaphore` (whoever runs takes: fast, long waits for some); a pipe with one byte a permit, whose
sleeping readers the kernel wakes in turn, while a running one may still come first; and a strict queue, in which every
return goes to the longest waiter (fair, each turn costs a wake-up). Runs take turns (pool, semaphore, pipe, queue,
pool, ...); ratios are taken within a turn.

The hold is `time.sleep` (the process may lose its core), and, as a variant, `select` on nothing with the kernel's timer
slack set to 1 ns, which makes the hold as short as it says.
"""

from __future__ import annotations

import array
import gc
import multiprocessing
import os
import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benches import floor, subject
from benches.harness import Line, Options, Spread, quantile
from benches.workers import Crew, Forked, Peer

WORKERS, PERMITS, HOLD = 8, 4, 100e-6
START, END, IN_PLACE = 0, 1, 2  # words
WORKER = [0]  # the number of this worker, set in each


@dataclass(frozen=True)
class Outcome:
    """One run of one contender."""

    rate: float
    waits_us: list[float]
    fairness: float

    def wait(self, share: float) -> float:
        return quantile(self.waits_us, share)

    def text(self) -> str:
        waits = "  ".join(f"{self.wait(share):7.0f}" for share in (0.5, 0.99, 0.999, 1.0))
        return f"{self.rate:8.0f}  {waits}  {self.fairness:6.2f}"


def hold_asleep() -> Callable[[], None]:
    def hold(sleep: Callable[[float], None] = time.sleep) -> None:
        sleep(HOLD)

    return hold


def hold_exactly() -> Callable[[], None]:
    floor.load().timer_slack(1)

    def hold(wait: Any = select.select) -> None:
        wait((), (), (), HOLD)

    return hold


HOLDS = {"sleep": hold_asleep, "select": hold_exactly}


class Semaphore:
    """A semaphore of the C library in shared memory."""

    name = "BoundedSemaphore"

    def __init__(self) -> None:
        self.semaphore = multiprocessing.get_context("fork").BoundedSemaphore(PERMITS)

    def take(self) -> None:
        self.semaphore.acquire()

    def give(self, _permit: None) -> None:
        self.semaphore.release()

    def close(self) -> None: ...


class Pipe:
    """Permits as bytes in a pipe: whoever reads one has one."""

    name = "pipe"

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.write(self.writer, b"." * PERMITS)

    def take(self) -> bytes:
        return os.read(self.reader, 1)

    def give(self, permit: bytes) -> None:
        os.write(self.writer, permit)

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


class Queue:
    """A strict queue: a permit given back goes to the longest waiter, nobody passes."""

    name = "strict queue"

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self.lock = context.Lock()
        self.bells = [context.Semaphore(0) for _ in range(WORKERS)]
        self.ring = context.RawArray("i", WORKERS)
        self.free_head_tail = context.RawArray("i", [PERMITS, 0, 0])

    def take(self) -> None:
        state = self.free_head_tail
        with self.lock:
            if state[0]:
                state[0] -= 1
                return
            self.ring[state[2] % WORKERS] = number = WORKER[0]
            state[2] += 1
        self.bells[number].acquire()

    def give(self, _permit: None) -> None:
        state = self.free_head_tail
        with self.lock:
            if state[1] == state[2]:
                state[0] += 1
                return
            first = self.ring[state[1] % WORKERS]
            state[1] += 1
        self.bells[first].release()

    def close(self) -> None: ...


class Pooled:
    """The pool itself."""

    name = "shmpool"

    def __init__(self, peer: Peer) -> None:
        self.pool = subject.make_pool(peer.dial_tcp, PERMITS)
        self.take = self.pool.get

    def give(self, permit: Any) -> None:
        permit.release()

    def close(self) -> None:
        self.pool.close()


def run(options: Options) -> list[Line]:
    lines: list[Line] = []
    turns, seconds = options.pick(2, 7), options.pick(0.7, 2.0)
    with Peer() as peer:
        makers: list[Callable[[], Any]] = [] if options.floors_only else [lambda: Pooled(peer)]
        makers += [Semaphore, Pipe, Queue]
        for hold in ("sleep",) if options.quick else tuple(HOLDS):
            outcomes = take_turns(makers, hold, turns, seconds, options)
            if not options.floors_only:
                lines += judge(outcomes, hold)
    return lines


def take_turns(
    makers: list[Callable[[], Any]], hold: str, turns: int, seconds: float, options: Options
) -> dict[str, list[Outcome]]:
    options.say(f"  {WORKERS} workers, {PERMITS} permits, held 100 us by {hold}; wait in us")
    options.say(f"  {'':18}  {'a second':>8}  {'p50':>7}  {'p99':>7}  {'p99.9':>7}  {'max':>7}  slowest/fastest")
    outcomes: dict[str, list[Outcome]] = {}
    for turn in range(turns):
        first = turn % len(makers)
        for maker in [*makers[first:], *makers[:first]]:
            contender = maker()
            try:
                outcome = contend(contender, hold, seconds)
            finally:
                contender.close()
            outcomes.setdefault(contender.name, []).append(outcome)
            options.say(f"  {contender.name:18}  {outcome.text()}")
    return outcomes


def contend(contender: Any, hold: str, seconds: float) -> Outcome:
    words = floor.load().Words()
    with Crew(*(Forked(_worker, words, number, contender, hold) for number in range(WORKERS))) as crew:
        for number in range(WORKERS):
            words.sleep_while(IN_PLACE + number, 0)
        words.store(END, time.perf_counter_ns() + int(seconds * 1e9))
        for _ in range(WORKERS):
            words.wake(START, 1)
        all_waits = crew.results()
    counts = [len(waits) for waits in all_waits]
    waits_us = sorted(wait / 1000 for waits in all_waits for wait in waits)
    return Outcome(sum(counts) / seconds, waits_us, min(counts) / max(counts))


def _worker(words: Any, number: int, contender: Any, hold_name: str) -> array.array[int]:
    hold, take, give, clock = HOLDS[hold_name](), contender.take, contender.give, time.perf_counter_ns
    waits = array.array("Q")
    WORKER[0] = number
    gc.disable()
    for _ in range(20):
        permit = take()
        hold()
        give(permit)
    words.wake(IN_PLACE + number, 1)
    words.sleep_while(START, 0)
    end = words.load(END)
    while (began := clock()) < end:
        permit = take()
        waits.append(clock() - began)
        hold()
        give(permit)
    return waits


def judge(outcomes: dict[str, list[Outcome]], hold: str) -> list[Line]:
    ours = outcomes[Pooled.name]
    rates = Spread.of(one.rate / other.rate for one, other in zip(ours, outcomes[Semaphore.name], strict=True))
    tails = Spread.of(one.wait(0.99) / 1000 for one in ours)
    fairness = Spread.of(one.fairness for one in ours)
    bound = hold == "sleep"  # the budget speaks of one kind of hold
    lines = [
        Line("contention", f"throughput / semaphore ({hold})", rates, limit=0.95 if bound else None, at_least=True),
        Line("contention", f"p99 wait ({hold})", tails, " ms", limit=0.8 if bound else None),
        Line("contention", f"slowest / fastest worker ({hold})", fairness, limit=0.9 if bound else None, at_least=True),
    ]
    for name in sorted(set(outcomes) - {Pooled.name}):
        lines += tell(name, outcomes, hold)
    return lines


def tell(name: str, outcomes: dict[str, list[Outcome]], hold: str) -> list[Line]:
    """What a peer reaches, for comparison."""
    figures = outcomes[name]
    rates = Spread.of(one.rate / other.rate for one, other in zip(figures, outcomes[Semaphore.name], strict=True))
    lines = [
        Line("contention", f"  {name}: p99 wait ({hold})", Spread.of(one.wait(0.99) / 1000 for one in figures), " ms"),
        Line("contention", f"  {name}: slowest / fastest ({hold})", Spread.of(one.fairness for one in figures)),
    ]
    if name != Semaphore.name:
        lines.insert(0, Line("contention", f"  {name}: throughput / semaphore ({hold})", rates))
    return lines
