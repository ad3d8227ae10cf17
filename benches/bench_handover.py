"""How long a connection lies idle while it goes from one process to another that sleeps for it.

Two processes on two cores pass one thing to and fro, first by a bare futex, then by the pool, in turns. Each passing is
timed from just before the giver lets go (`release()`; store and FUTEX_WAKE) until just after the taker has it (`get()`
or FUTEX_WAIT returned), on the clock that both processes share. The giver lets go only when the kernel says that the
taker sleeps, and a little later. It stays out of the way, spinning on its own core, until the taker has it.

The pool may treat a waiter that has only just come (it is woken, and takes what it finds) otherwise than one that has
waited for long (it is given the connection), so both are measured: one passing comes soon, the other after a while.

Told besides: the same futex in a tight loop in C. There the taker often comes back before it has fallen asleep, so that
its figures jump between two worlds; no ratio is taken to it.
"""

from __future__ import annotations

import os
import time
from typing import Any

from benches import floor, subject
from benches.harness import Line, Options, Spread
from benches.workers import Asleep, Crew, Forked, Peer, cores, pin

READY, TAKEN, TAKEN_AT, THING, PING, HELD, PIDS = 0, 1, 2, 3, 4, 5, 8  # words
SECOND = 1_000_000_000
SOON, LATE = 30_000, 2_000_000  # ns that the taker has slept before it is given the thing


def run(options: Options) -> list[Line]:
    if len(cores()) < 2:
        options.say("  left out: there is one core")
        return []
    lines = measure(options, "soon", SOON, options.pick(12, 60), options.pick(30, 50))
    lines += measure(options, "after 2 ms", LATE, options.pick(6, 20), options.pick(20, 50))
    return lines


def measure(options: Options, name: str, settle_ns: int, rounds: int, block: int) -> list[Line]:
    words = floor.load().Words()
    with Peer() as peer:
        pool = None if options.floors_only else subject.make_pool(peer.dial_tcp, 1, alive_bypass=60.0)
        try:
            sides = (Forked(_side, words, number, pool, settle_ns, rounds, block) for number in (0, 1))
            with Crew(*sides) as crew:
                figures = crew.results()
        finally:
            if pool is not None:
                pool.close()
    bare, tight, pooled = ([a + b for a, b in zip(*(side[kind] for side in figures), strict=True)] for kind in range(3))
    tell(f"bare futex, from Python, {name}", bare, options)
    options.say(f"  bare futex, tight loop, no waiting: {Spread.of([one[0] / 1000 for one in tight]).text(' us', 1)}")
    if options.floors_only:
        return []
    tell(f"pool, {name}", pooled, options)
    ratios = Spread.of(_middle(ours) / _middle(floor_) for ours, floor_ in zip(pooled, bare, strict=True))
    took = Spread.of(_middle(one) / 1000 for one in pooled)
    return [
        Line("handover", f"hand-over to a sleeping process, {name} / bare futex", ratios, limit=1.3),
        Line("handover", f"hand-over to a sleeping process, {name}", took, " us", digits=1),
    ]


def tell(name: str, rounds: list[list[int]], options: Options) -> None:
    every = sorted(figure / 1000 for one in rounds for figure in one)
    tail = every[int(len(every) * 0.99)]
    options.say(f"  {name}: {Spread.of(every).text(' us', 1)}, p99 {tail:.1f}, {len(every)} passings")


def _middle(figures: list[int]) -> float:
    return sorted(figures)[len(figures) // 2]


class Passing:
    """The steps of one passing, the same for the futex and for the pool."""

    def __init__(self, words: Any, number: int, settle_ns: int) -> None:
        self.words, self.number, self.settle_ns, self.turn = words, number, settle_ns, 0
        words.store(PIDS + number, os.getpid())
        while not words.load(PIDS + 1 - number):
            time.sleep(0.001)
        self.asleep = Asleep(words.load(PIDS + 1 - number))

    def wait_for_sleeper(self) -> None:
        if not self.words.spin(READY, self.turn, 5 * SECOND):
            raise RuntimeError("the taker never came")
        deadline = time.monotonic() + 5
        while not self.asleep():
            if time.monotonic() > deadline:
                raise RuntimeError("the taker never slept")
        self.words.spin(TAKEN, 2**63, self.settle_ns)  # its core is idle by then

    def wait_until_taken(self, gone_at: int) -> int:
        if not self.words.spin(TAKEN, self.turn, 5 * SECOND):
            raise RuntimeError("the thing was not taken")
        return int(self.words.load(TAKEN_AT)) - gone_at

    def taken(self, at: int) -> None:
        self.words.store(TAKEN_AT, at)
        self.words.store(TAKEN, self.turn)


def _side(
    words: Any, number: int, pool: Any, settle_ns: int, rounds: int, block: int
) -> tuple[list[Any], list[Any], list[Any]]:
    pin(number)
    passing = Passing(words, number, settle_ns)
    bare, tight, pooled = [], [], []
    lease = None
    for _ in range(rounds):
        bare.append(_pass_futex(passing, block))
        one_way = words.ping_pong(PING, number, 4 * block)
        tight.append([one_way] if number == 0 else [])
        if pool is None:
            continue
        if number == 0 and lease is None:
            lease = pool.get()
            words.wake(HELD, 1)
        words.sleep_while(HELD, 0)
        figures, lease = _pass_lease(passing, pool, lease, block)
        pooled.append(figures)
    if lease is not None:
        lease.release()
    return bare, tight, pooled


def _pass_futex(passing: Passing, block: int) -> list[int]:
    words, clock, figures = passing.words, time.perf_counter_ns, []
    for number in range(2 * block):
        passing.turn += 1
        before, after = number % 2, 1 - number % 2  # what the futex word is while it lies here, and then
        if number % 2 == passing.number:
            passing.wait_for_sleeper()
            gone_at = clock()
            words.wake(THING, after)
            figures.append(passing.wait_until_taken(gone_at))
        else:
            words.store(READY, passing.turn)
            words.sleep_while(THING, before)
            passing.taken(clock())
    return figures


def _pass_lease(passing: Passing, pool: Any, lease: Any, block: int) -> tuple[list[int], Any]:
    clock, get, figures = time.perf_counter_ns, pool.get, []
    for number in range(2 * block):
        passing.turn += 1
        if number % 2 == passing.number:
            passing.wait_for_sleeper()
            gone_at = clock()
            lease.release()
            lease = None
            figures.append(passing.wait_until_taken(gone_at))
        else:
            passing.words.store(READY, passing.turn)
            lease = get()
            passing.taken(clock())
    return figures, lease
