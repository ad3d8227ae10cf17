"""How long a process that inherited nothing takes to join a named pool, beside the start of its interpreter.

Each figure is of a new interpreter: it imports shmpool, then joins by name the pool of this process. Beside it, in
turn, an interpreter that does nothing at all, timed from here from start to end. All modules are compiled before.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Iterator

import shmpool
from benches.harness import Line, Options, Spread
from benches.interpreters import Interpreters

NEWCOMER = """
import json, sys, time
began = time.perf_counter_ns()
import shmpool
imported = time.perf_counter_ns()
pool = shmpool.attach(sys.argv[1])
joined = time.perf_counter_ns()
print(json.dumps([imported - began, joined - imported]))
"""
LIMITS_MS = {64: 5.0, 1000: 30.0}


def run(options: Options) -> list[Line]:
    if options.floors_only:
        return []
    lines = []
    for slots, limit in LIMITS_MS.items():
        with pool_of(slots) as name, Interpreters() as interpreters:
            idle, imports, joins = [], [], []
            interpreters.output(NEWCOMER, name)
            for _ in range(options.pick(8, 60)):
                idle.append(_timed(interpreters, "pass"))
                imported, joined = json.loads(interpreters.output(NEWCOMER, name))
                imports.append(imported / 1e6)
                joins.append(joined / 1e6)
        spread, start = Spread.of(joins), Spread.of(idle)
        options.say(
            f"  {slots} slots: joins in {spread.text(' ms')}; the interpreter starts and ends in {start.text(' ms')}"
        )
        options.say(f"  import shmpool: {Spread.of(imports).text(' ms')}")
        lines.append(Line("join", f"a stranger joins a pool of {slots} slots", spread, " ms", limit=limit))
    return lines


@contextlib.contextmanager
def pool_of(slots: int) -> Iterator[str]:
    """The name of a living pool; nothing is ever dialled."""
    name = f"bench-{os.getpid()}-{secrets.token_hex(3)}"
    with shmpool.Pool("tcp://127.0.0.1:1", name=name, max_connections=slots, min_connections=0):
        yield name


def _timed(interpreters: Interpreters, program: str) -> float:
    began = time.perf_counter_ns()
    interpreters.output(program)
    return (time.perf_counter_ns() - began) / 1e6
