"""How soon capacity is back after a SIGKILL of the process that holds it, while somebody waits for it.

A holder leases everything the pool has. Somebody else asks, and falls asleep in the queue. After a pause of random
length (a waiter looks again in slices, and a kill may fall anywhere in one) the holder kills itself; the time runs from
just before that until the waiter's `get()` has returned a connection it can use, dialled anew.
"""

from __future__ import annotations

import os
import random
import signal
import time
from typing import Any

from benches import floor, subject
from benches.harness import Line, Options, Spread
from benches.workers import Asleep, Crew, Forked, Peer

HOLDING, ASKING, KILLED_AT = 0, 1, 2  # words
PAUSE = 0.12


def run(options: Options) -> list[Line]:
    if options.floors_only:
        return []
    kills = options.pick(50, 200)
    seed = random.SystemRandom().randrange(2**32)
    options.say(f"  seed {seed}")
    lines = []
    for connections in (1, 8):
        figures = [one / 1e6 for one in recoveries(connections, kills, random.Random(seed))]
        spread = Spread.of(figures)
        most = Spread.of([max(figures)])
        options.say(f"  {connections} held: {spread.text(' ms', 1)}, most {most.median:.1f} ms, {kills} kills")
        what = f"a connection again after SIGKILL of who held all {connections}"
        lines.append(Line("recovery", f"{what}, median of {kills}", spread, " ms", limit=60.0, digits=1))
        lines.append(Line("recovery", f"{what}, longest", most, " ms", limit=60.0, digits=1))
    return lines


def recoveries(connections: int, kills: int, chance: random.Random) -> list[int]:
    words = floor.load().Words()
    figures = []
    with Peer() as peer, subject.pool_of(peer.dial_tcp, connections) as pool:
        waiter = os.getpid()
        for _ in range(kills):
            words.store(HOLDING, 0)
            words.store(ASKING, 0)
            holder = Forked(_hold_and_die, pool, words, waiter, connections, chance.uniform(0.0, PAUSE))
            with Crew(holder):
                words.sleep_while(HOLDING, 0)
                words.wake(ASKING, 1)
                with pool.get() as lease:
                    taken_at = time.perf_counter_ns()
                    assert lease.socket.fileno() >= 0
                figures.append(taken_at - words.load(KILLED_AT))
                holder.wait_killed()
    return figures


def _hold_and_die(pool: Any, words: Any, waiter: int, connections: int, pause: float) -> None:
    leases = [pool.get() for _ in range(connections)]
    words.wake(HOLDING, len(leases))
    words.sleep_while(ASKING, 0)
    asleep = Asleep(waiter)
    while not asleep():
        time.sleep(0.0005)
    time.sleep(0.001 + pause)
    words.store(KILLED_AT, time.perf_counter_ns())
    os.kill(os.getpid(), signal.SIGKILL)
