"""What a pool at work loses while somebody looks at it from outside.

One worker, and two, lease and return without end, all on the first core; inspectors have the second one. Slices of 50
milliseconds take turns: nobody looks; an inspector looks once in the slice, twenty times a second; inspectors attach,
look as fast as they can, and are killed after some milliseconds, without end; and the floor of that, the same
inspectors at another pool, because the two cores share caches, and perhaps one core's units, whatever is done on them.
What is left is what the pool charges for being looked at: cache lines that travel, a lock if there were one. A ratio is
taken within a round.

The line that counts is turns per second of processor time: the other work of a machine takes wall time from a worker,
and hardly that. Turns per second of wall time are told as well.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import time
from typing import Any

from benches import floor, subject
from benches.harness import Line, Options, Spread, loop
from benches.workers import Crew, Forked, Peer, cores, pin

BODY = "with pool.get() as c: c.socket"
SLICE_NS = 50_000_000
LONGEST_LIFE_S = 0.01  # of an inspector that is killed
NOBODY, LOOKS, KILLED, ELSEWHERE = "nobody", "20 looks/s", "inspectors killed without end", "such inspectors elsewhere"
RATIOS = ((LOOKS, NOBODY), (KILLED, ELSEWHERE), (ELSEWHERE, NOBODY))
SLICES = (NOBODY, LOOKS, KILLED, ELSEWHERE)
# Words: of the looker, of the killer (where it is to look) and its answer; worker k has those from 8 * (k + 1) on.
LOOKER, KILLER, AT_REST = 0, 1, 2
GO, DONE, CPU = 0, 1, 2
STOP = 2**32 - 1


def run(options: Options) -> list[Line]:
    if options.floors_only:
        return []
    if len(cores()) < 2:
        options.say("  left out: there is one core")
        return []
    lines = []
    for count in (1, 2):
        lines += _lines(count, _rounds(count, options.pick(15, 200)))
    return lines


def _lines(count: int, rounds: list[dict[str, tuple[float, float]]]) -> list[Line]:
    lines = []
    workers = f"{count} worker{'' if count == 1 else 's'}"
    for name, floor_name in RATIOS:
        on_cpu, on_wall = (Spread.of(one[name][kind] / one[floor_name][kind] for one in rounds) for kind in (0, 1))
        limit = None if name == ELSEWHERE else 0.98
        what = f"{workers}, {name} / {floor_name}"
        lines.append(Line("inspect", what, on_cpu, limit=limit, at_least=True, digits=3))
        lines.append(Line("inspect", "  by the wall clock", on_wall, digits=3))
    return lines


def _rounds(count: int, rounds: int) -> list[dict[str, tuple[float, float]]]:
    """Of each round and slice: turns per second of processor time, and of wall time, of all workers together."""
    words, found = floor.load().Words(), []
    words.store(AT_REST, 1)
    names = {what: f"bench-{os.getpid()}-{secrets.token_hex(3)}" for what in (KILLED, ELSEWHERE)}
    with Crew(Forked(_looker, words, names[KILLED]), Forked(_killer, words, names)) as inspectors, Peer() as peer:
        with (
            subject.pool_of(peer.dial_tcp, 8, name=names[ELSEWHERE]),
            subject.pool_of(peer.dial_tcp, 8, name=names[KILLED], alive_bypass=60.0) as pool,
            Crew(*(Forked(_worker, words, number, pool) for number in range(count))) as workers,
        ):
            for number in range(rounds):
                first = number % len(SLICES)
                order = [*SLICES[first:], *SLICES[:first]]
                found.append({each: _slice(words, count, each, number + 1) for each in order})
            for number in range(count):
                words.wake(8 * (number + 1) + GO, STOP)
            workers.results()
        for word in (LOOKER, KILLER):
            words.wake(word, STOP)
        inspectors.results()
    return found


def _slice(words: Any, count: int, what: str, number: int) -> tuple[float, float]:
    mine = [8 * (worker + 1) for worker in range(count)]
    if what in (KILLED, ELSEWHERE):
        words.wake(KILLER, SLICES.index(what))
        words.sleep_while(AT_REST, 1)
    elif what == LOOKS:
        words.wake(LOOKER, number)
    for at in mine:
        words.store(at + DONE, 0)
        words.wake(at + GO, 1)
    for at in mine:
        words.sleep_while(at + DONE, 0)
    if what in (KILLED, ELSEWHERE):
        words.store(KILLER, 0)
        words.sleep_while(AT_REST, 0)
    return sum(1e12 / words.load(at + CPU) for at in mine), sum(1e12 / words.load(at + DONE) for at in mine)


def _worker(words: Any, number: int, pool: Any) -> None:
    pin(0)
    timed, mine = loop(BODY, pool=pool), 8 * (number + 1)
    timed(1000)
    while True:
        words.sleep_while(mine + GO, 0)
        if words.load(mine + GO) == STOP:
            return
        words.store(mine + GO, 0)
        turns, began, began_cpu = 0, time.perf_counter_ns(), time.process_time_ns()
        while time.perf_counter_ns() < began + SLICE_NS:
            timed(4000)
            turns += 4000
        cpu, wall = time.process_time_ns() - began_cpu, time.perf_counter_ns() - began
        words.store(mine + CPU, max(1, cpu * 1000 // turns))  # picoseconds a turn
        words.wake(mine + DONE, max(1, wall * 1000 // turns))


def _looker(words: Any, name: str) -> None:
    pin(1)
    seen = 0
    with contextlib.ExitStack() as stack:
        inspector = None
        while True:
            words.sleep_while(LOOKER, seen)
            seen = words.load(LOOKER)
            if seen == STOP:
                return
            inspector = inspector or stack.enter_context(subject.inspector_of_name(name))
            inspector.stats()
            inspector.events()


def _killer(words: Any, names: dict[str, str]) -> None:
    pin(1)
    chance = random.Random(1)
    while True:
        words.sleep_while(KILLER, 0)
        where = words.load(KILLER)
        if where == STOP:
            return
        words.wake(AT_REST, 0)
        while words.load(KILLER):
            inspector = Forked(_look_without_end, names[SLICES[where]])
            time.sleep(chance.uniform(0.0, LONGEST_LIFE_S))
            os.kill(inspector.pid, signal.SIGKILL)
            inspector.wait_killed()
        words.wake(AT_REST, 1)


def _look_without_end(name: str) -> None:
    while True:
        with subject.inspector_of_name(name) as inspector:
            inspector.stats()
            inspector.events()
