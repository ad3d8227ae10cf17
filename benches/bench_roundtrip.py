"""What one lease and its return cost in a process that has used the connection before.

Floors: an empty C guard in `with`; the same with a CAS pair on shared memory; the bare CAS pair; a bare liveness look.
Peers: pools of other projects, each for one process (`peers`), and what one would share between processes with the
standard library (`permits`). What statistics cost is the difference, within a round, to a pool that keeps none.

Not here: more than one thread (`bench_contention`, `bench_grid`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from benches import floor, peers, permits, subject
from benches.harness import Candidate, Line, Options, Table, interleave, loop
from benches.workers import Peer

GUARD = "empty C guard, with"
LOOK = "recv(MSG_PEEK|MSG_DONTWAIT)"
WARM = "shmpool with get() as c: c.socket"
LOOKING = WARM + ", looked at"
UNSEEN = ", stats=False"
BARE = "shmpool get/release"
BODY = "with get() as c: c.socket"
SHARED: tuple[Callable[[int], permits.Permits], ...] = (
    permits.Semaphore,
    permits.Pipe,
    permits.FreeStack,
    permits.SimpleIndices,
    permits.Indices,
    permits.ManagedIndices,
)


def run(options: Options) -> list[Line]:
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(Peer())
        candidates = floors(stack, peer)
        subjects = [] if options.floors_only else ours(stack, peer)
        between = shared(stack)  # first: they fork, and some of the others have threads
        others = peers.enter_all(stack, peer, options)
        candidates += [*subjects, *stack.enter_context(peers.lifo_queue(peer)), *others, *between]
        table = interleave(candidates, rounds=options.pick(40, 200), slice_ms=options.pick(1.0, 2.0))
    table.show(options, GUARD)
    return [] if options.floors_only else budget(table, [other.name for other in others])


def floors(stack: contextlib.ExitStack, peer: Peer) -> list[Candidate]:
    c = floor.load()
    quiet = stack.enter_context(peer.dial_tcp())
    return [
        Candidate(GUARD, loop("with guard: pass", guard=c.Guard()), "floor"),
        Candidate("empty C guard, with get() as c: c.socket", loop(BODY, get=c.Guard().get), "floor"),
        Candidate("C guard with a CAS pair on shared memory", loop("with guard: pass", guard=c.Guard(c.CAS)), "floor"),
        Candidate("C guard with CAS pair and two clocks", loop("with guard: pass", guard=c.Guard(c.CLOCK)), "floor"),
        Candidate("CAS pair on shared memory, nobody else", lambda n: int(c.swap_pairs(n)), "floor"),
        Candidate("C call", loop("nothing()", nothing=c.nothing), "floor"),
        Candidate(LOOK, lambda n: int(c.look_at_socket(quiet.fileno(), n)), "floor"),
    ]


def ours(stack: contextlib.ExitStack, peer: Peer) -> list[Candidate]:
    def pool(**config: Any) -> Any:
        made = stack.enter_context(subject.pool_of(peer.dial_tcp, 8, **{"alive_bypass": 60.0, **config}))
        subject.warm(made, 1)
        return made

    def nothing(connection: object) -> None: ...

    usual, unseen = pool(), pool(stats=False)
    return [
        Candidate(WARM, loop("with pool.get() as c: c.socket", pool=usual)),
        Candidate(WARM + UNSEEN, loop("with pool.get() as c: c.socket", pool=unseen)),
        Candidate("shmpool with get() as c: pass", loop("with pool.get() as c: pass", pool=usual)),
        Candidate(BARE, loop("c = pool.get()\nc.release()", pool=usual)),
        Candidate(BARE + UNSEEN, loop("c = pool.get()\nc.release()", pool=unseen)),
        Candidate("shmpool try_get/release", loop("c = pool.try_get()\nc.release()", pool=usual)),
        Candidate("shmpool with get_tcp()", loop("with pool.get_tcp() as c: c.socket", pool=usual)),
        Candidate(LOOKING, loop("with pool.get() as c: c.socket", pool=pool(alive_bypass=0.0))),
        Candidate(
            WARM + ", two hooks",
            loop("with pool.get() as c: c.socket", pool=pool(on_borrow=nothing, on_return=nothing)),
        ),
    ]


def shared(stack: contextlib.ExitStack) -> list[Candidate]:
    """What has no more than a count is no pool, and is there for comparison: a semaphore, a pipe."""
    found = []
    for make in SHARED:
        made = make(4)
        stack.callback(made.close)
        stack.callback(made.leave)
        body = loop("c = take()\ngive(c)", take=made.take, give=made.give)
        found.append(Candidate(made.name, body, "for several processes"))
    return found


def budget(table: Table, others: list[str]) -> list[Line]:
    looks = table.derive(lambda times: (times[LOOKING] - times[WARM]) / times[LOOK])
    return [
        Line("roundtrip", "lease and return, warm / empty C guard", table.ratio(WARM, GUARD), limit=2.2),
        Line("roundtrip", "liveness look / bare syscall", looks, limit=1.2),
        *against(table, WARM, [other for other in others if other.endswith(" with")], "in a with"),
        *against(table, BARE, [other for other in others if " with" not in other], "get, release"),
        Line("roundtrip", "get, release / empty C guard", table.ratio(BARE, GUARD)),
        Line("roundtrip", "with two Python hooks / empty C guard", table.ratio(WARM + ", two hooks", GUARD)),
        Line("roundtrip", "lease and return, warm", table.cost(WARM), unit=" ns", digits=0),
        *(statistics(table, name, limit) for name, limit in ((WARM, 25.0), (BARE, None))),
        Line("roundtrip", "free stack of the standard library, for several processes / get, release",
             table.ratio(permits.FreeStack.name, BARE)),
    ]  # fmt: skip


def statistics(table: Table, name: str, limit: float | None) -> Line:
    """The cost of statistics."""
    cost = table.derive(lambda times: times[name] - times[name + UNSEEN])
    return Line("roundtrip", f"what statistics cost, {name.removeprefix('shmpool ')}", cost, " ns", limit, digits=1)


def against(table: Table, ours: str, others: list[str], manner: str) -> list[Line]:
    """How much faster we are than the fastest of the others, like with like."""
    if not others:
        return []
    fastest = min(others, key=lambda other: table.cost(other).median)
    faster = table.derive(lambda times: times[fastest] / times[ours])  # not the luckiest of each round
    name = fastest.removesuffix(" with").partition(" get")[0]
    what = f"fastest Python pool, {manner} ({name}) / the same"
    return [Line("roundtrip", what, faster, limit=12.0, at_least=True)]
