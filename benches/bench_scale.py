"""Whether the cost stays where it is when slots, cores and workers grow; and what the slab weighs.

Floors: the round trip at 8 slots; one process alone (and, for what the machine itself loses when both cores work, the
same with a C guard); one look into a mailbox.
"""

from __future__ import annotations

import array
import contextlib
import random
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from benches import floor, subject
from benches.harness import Candidate, Line, Options, Spread, interleave, loop, quantile
from benches.workers import Crew, Forked, Peer, allow_descriptors, cores, pin

BODY = "with pool.get() as c: c.socket"
PEEK = "mailbox peek"


def run(options: Options) -> list[Line]:
    lines = two_processes(options)
    with Peer() as peer, letter() as mailbox:
        if options.floors_only:
            table = interleave([peek_candidate(mailbox)], rounds=20)
            table.show(options, PEEK)
            return lines
        lines += many_slots(options, peer)
        lines += steals(options, peer, mailbox)
        lines += weights(peer)
        lines += snapshots(options, peer)
    return lines


# ---- two processes on two cores ------------------------------------------------------------------------------------

GO, DONE, LIMIT = 0, 1, 2  # words; worker k has those from 8 * (k + 1) on
STOP, GUARD, POOL = 99, 1, 2  # what GO says
WARM_UP = 1000


def two_processes(options: Options) -> list[Line]:
    """The rates of two pinned processes together against each alone: of the pool, and of a C guard for each."""
    if len(cores()) < 2:
        options.say("  left out: two processes on two cores: there is one core")
        return []
    words = floor.load().Words()
    with contextlib.ExitStack() as stack:
        pool = None
        if not options.floors_only:
            peer = stack.enter_context(Peer())
            pool = stack.enter_context(subject.pool_of(peer.dial_tcp, 8, alive_bypass=60.0))
        with Crew(*(Forked(_worker, words, number, pool) for number in (0, 1))) as crew:
            guards, pools = _scalings(words, pool is not None, options.pick(25, 150))
            for number in (0, 1):
                words.wake(8 * (number + 1) + GO, STOP)
            crew.results()
    machine_scale = Spread.of(guards)
    options.say(f"  two processes against one, C guard of each: {machine_scale.text(' x')}")
    if not pools:
        return []
    against_guard = Spread.of(ours / machine for ours, machine in zip(pools, guards, strict=True))
    return [
        Line("scale", "2 processes on 2 cores / 1", Spread.of(pools), limit=1.9, at_least=True),
        Line("scale", "  a private C guard each (the machine's own loss)", machine_scale),
        Line("scale", "  the pool's over the guard's", against_guard),
    ]


def _scalings(words: Any, with_pool: bool, rounds: int) -> tuple[list[float], list[float]]:
    found: dict[int, list[float]] = {GUARD: [], POOL: []}
    for _ in range(rounds):
        for kind in (GUARD, POOL) if with_pool else (GUARD,):
            together = sum(_best_rates(words, (0, 1), kind))
            alone = [_best_rates(words, (number,), kind)[0] for number in (0, 1)]
            found[kind].append(together / (sum(alone) / 2))
    return found[GUARD], found[POOL]


def _best_rates(words: Any, who: tuple[int, ...], kind: int, tries: int = 4) -> list[float]:
    """The best of some short slices for each: an interruption from outside hits one of them, not all."""
    return [max(rates) for rates in zip(*(_rates(words, who, kind) for _ in range(tries)), strict=True)]


def _rates(words: Any, who: tuple[int, ...], kind: int, slice_ms: float = 2.0) -> list[float]:
    for number in who:
        words.store(8 * (number + 1) + DONE, 0)
        words.store(8 * (number + 1) + LIMIT, int(slice_ms * 1e6))
    for number in who:
        words.wake(8 * (number + 1) + GO, kind)
    for number in who:
        words.sleep_while(8 * (number + 1) + DONE, 0)
    return [1e6 / words.load(8 * (number + 1) + DONE) for number in who]


def _worker(words: Any, number: int, pool: Any) -> None:
    pin(number)
    timed = {GUARD: loop("with guard: pass", guard=floor.load().Guard())}
    if pool is not None:
        timed[POOL] = loop(BODY, pool=pool)
    for one in timed.values():
        one(WARM_UP)
    mine = 8 * (number + 1)
    while True:
        words.sleep_while(mine + GO, 0)
        kind = words.load(mine + GO)
        if kind == STOP:
            return
        words.store(mine + GO, 0)
        words.wake(mine + DONE, _picoseconds_per_turn(timed[kind], words.load(mine + LIMIT)))


def _picoseconds_per_turn(timed: Callable[[int], int], limit_ns: int) -> int:
    deadline = time.perf_counter_ns() + limit_ns
    taken, turns = timed(800), 800  # at least once: this process may have lost its core for the whole slice
    while time.perf_counter_ns() < deadline:
        taken += timed(800)
        turns += 800
    return max(1, taken * 1000 // turns)


# ---- many slots ----------------------------------------------------------------------------------------------------


SPARE = 200  # descriptors for everything but the large pool


def many_slots(options: Options, peer: Peer) -> list[Line]:
    wanted = options.pick(2000, 10_000)
    limit = allow_descriptors(2 * wanted + 2 * SPARE)
    slots = min(wanted, (limit - SPARE) // 2)
    if slots < 10_000:
        options.say(f"  {slots} slots in place of 10000 ({'--quick' if options.quick else f'limit of files {limit}'})")
    warm_path, one_left = compare(options, peer, slots, "lease and return", {})
    bare, bare_one_left = compare(options, peer, slots, "without a local cache", {"local_cache_size": 0})
    what = f"{slots} slots / 8 slots"
    return [
        Line("scale", f"lease and return, {what}", warm_path, limit=1.2),
        Line("scale", f"  all others leased, {what}", one_left),
        Line("scale", f"  without a local cache, half of them idle, {what}", bare),
        Line("scale", f"  without a local cache, all others leased, {what}", bare_one_left),
    ]


def compare(options: Options, peer: Peer, slots: int, name: str, config: dict[str, Any]) -> tuple[Spread, Spread]:
    """The cost in a large pool over that in a small one: half of the connections idle, and all but one leased."""
    few, many = f"{name}, 8 slots", f"{name}, {slots} slots"
    rounds = options.pick(30, 150)
    settings = {"alive_bypass": 60.0, **config}
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(subject.pool_of(peer.dial_unix, count, **settings)) for count in (8, slots)]
        candidates = [Candidate(label, loop(BODY, pool=pool)) for label, pool in zip((few, many), pools, strict=True)]
        held = [[pool.get() for _ in range(count)] for pool, count in zip(pools, (8, slots), strict=True)]
        random.Random(1).shuffle(held[1])
        for leases in held:
            for _ in range(len(leases) // 2):
                leases.pop().release()
        half = interleave(candidates, rounds)
        half.show(options, few)
        for pool, leases in zip(pools, held, strict=True):
            idle = int(pool._snapshot()["max_connections"]) - len(leases)
            leases += [pool.get() for _ in range(idle - 1)]
        last = interleave(candidates, rounds)
        for leases in held:
            for lease in leases:
                lease.release()
    return half.ratio(many, few), last.ratio(many, few)


# ---- steals --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def letter() -> Iterator[int]:
    """A mailbox as the pool has one: a datagram socket connected to itself, with one descriptor lying in it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as box, socket.socket() as content:
        box.bind(b"")
        box.connect(box.getsockname())
        socket.send_fds(box, [b"\0" * 96], [content.fileno()])
        yield box.fileno()


def peek_candidate(mailbox: int) -> Candidate:
    c = floor.load()
    return Candidate(PEEK, lambda n: int(c.peek_mailbox(mailbox, n)))


def steals(options: Options, peer: Peer, mailbox: int, slots: int = 1000, stolen: int = 50) -> list[Line]:
    """A keeper leases all slots but those in its cache; fresh processes take these, each for the first time."""
    allow_descriptors(3 * slots + 200)
    c = floor.load()
    words = c.Words()
    config = {"local_cache_size": stolen, "alive_bypass": 60.0}
    with subject.pool_of(peer.dial_unix, slots, **config) as pool:
        rounds = []
        with Crew(Forked(_keeper, pool, words, slots, stolen)) as crew:
            words.sleep_while(0, 0)
            for number in range(options.pick(5, 20)):
                rounds.append(Forked(_thief, pool, stolen, mailbox).result())
                words.wake(1, number + 1)  # the keeper takes them back into its cache
                words.sleep_while(0, number + 1)
            words.wake(1, 2**32 - 1)
            crew.results()
    gets, peeks = ([figure for first, _again in rounds for figure in first[kind]] for kind in ("get", "peek"))
    sockets = [figure for first, _again in rounds for figure in first["socket"]]
    again = [figure for _first, again in rounds for figure in again]
    peek = quantile(sorted(peeks), 0.5)
    options.say(f"  {len(gets)} steals at {slots} slots; a mailbox peek takes {peek / 1000:.2f} us")
    above = Spread.of((figure - peek) / 1000 for figure in gets)
    return [
        Line("scale", f"steal from another worker's cache, {slots} slots, less a peek", above, " us", limit=5.0),
        Line("scale", "  and its socket, less a peek",
             Spread.of((get + made - peek) / 1000 for get, made in zip(gets, sockets, strict=True)), " us"),
        Line("scale", "  mailbox peek", Spread.of(figure / 1000 for figure in peeks), " us"),
        Line("scale", "  lease of one stolen and known before", Spread.of(figure / 1000 for figure in again), " us"),
    ]  # fmt: skip


def _keeper(pool: Any, words: Any, slots: int, stolen: int) -> None:
    pin(0)
    leases = [pool.get() for _ in range(slots)]
    random.Random(1).shuffle(leases)
    free, held = leases[:stolen], leases[stolen:]
    number = 0
    while True:
        for lease in free:
            lease.release()
        words.wake(0, number + 1)
        words.sleep_while(1, number)
        number = words.load(1)
        if number == 2**32 - 1:
            break
        free = [pool.get() for _ in range(stolen)]
    for lease in held:
        lease.release()


def _thief(pool: Any, stolen: int, mailbox: int) -> tuple[dict[str, array.array[float]], array.array[float]]:
    pin(1)
    c, clock, get = floor.load(), time.perf_counter_ns, pool.get
    times = {kind: array.array("d") for kind in ("get", "socket", "peek")}
    leases = [get()]  # not timed: this process becomes a worker of the pool
    for _ in range(stolen - 1):
        began = clock()
        lease = get()
        leased = clock()
        _socket = lease.socket
        seen = clock()
        leases.append(lease)
        times["get"].append(leased - began)
        times["socket"].append(seen - leased)
        times["peek"].append(c.peek_mailbox(mailbox, 1))
    for lease in leases:
        lease.release()
    again = array.array("d")
    for _ in range(stolen):
        began = clock()
        leases.append(get())
        again.append(clock() - began)
    for lease in leases[stolen:]:
        lease.release()
    return times, again


# ---- weights and snapshots -----------------------------------------------------------------------------------------


def weights(peer: Peer) -> list[Line]:
    """Bytes of a slot and of a worker, as differences of slab sizes."""

    def size(slots: int, workers: int) -> int:
        with subject.pool_of(peer.dial_unix, slots, resize_limit=slots, max_workers=workers, max_waiters=64) as pool:
            return int(pool._snapshot()["size"])

    slot = (size(1024, 64) - size(512, 64)) / 512
    worker = (size(64, 128) - size(64, 64)) / 64 / 1024
    return [
        Line("scale", "slab bytes of a slot", Spread.of([slot]), " B", limit=192, digits=0),
        Line("scale", "slab KiB of a worker", Spread.of([worker]), " KiB", limit=16),
    ]


def snapshots(options: Options, peer: Peer, slots: int = 1000) -> list[Line]:
    """An inspector's look at the live pool against building a list of as many tuples in plain Python."""
    allow_descriptors(3 * slots + 200)
    taken, figured = "inspector.snapshot()", "inspector.stats()"
    with subject.pool_of(peer.dial_unix, slots) as pool, subject.inspector_of(pool) as inspector:
        subject.warm(pool, slots)
        fields = len(inspector.snapshot()["slot_fields"])
        row = "(n, " + ", ".join(f"n + {number}" for number in range(1, fields)) + ")"
        plain = f"as many tuples of {fields} in plain Python"
        candidates = [
            Candidate(plain, loop(f"[{row} for n in wide]", wide=range(2**40, 2**40 + slots))),
            Candidate(taken, loop("snapshot()", snapshot=inspector.snapshot)),
            Candidate(figured, loop("stats()", stats=inspector.stats)),
        ]
        table = interleave(candidates, rounds=options.pick(10, 40), slice_ms=10.0)
    table.show(options, plain)
    in_ms = table.derive(lambda times: times[taken] / 1e6)
    return [
        Line("scale", f"inspector's snapshot of {slots} slots", in_ms, " ms", limit=2.0),
        Line("scale", f"  over {plain}", table.ratio(taken, plain)),
        Line("scale", "  with figures made of it (stats()), over the same", table.ratio(figured, plain)),
    ]
