"""What grows with slots, and what with workers: tables of costs, each as a ratio to the smallest pool, timed beside it.

For each size there are two pools, one of that size and the smallest, in every round. Of slots: first few connections
are open (a cap far above the need costs what the search for them costs), then all, and all but a few leased. Of
workers: all but two do nothing.

How far: each process has two descriptors for a slot (its mailbox, and its copy of the connection), so the hard limit of
open files ends the sizes; the bench says where. The segment's bytes are known for any size.

Not here: the budgets at 10 000 slots, two cores (bench_scale).
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import pathlib
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benches import floor, subject
from benches.harness import Candidate, Line, Options, Spread, Table, interleave, loop
from benches.workers import Crew, Forked, Peer, allow_descriptors

FEWEST_SLOTS, MOST_SLOTS = 8, 100_000
FEWEST_WORKERS = 2  # this process and its partner
SPARE = 400  # descriptors for everything but the large pool
OPEN = 8  # connections, where few are open; as many as a worker's cache holds
WORKER_SLOTS, MAX_WORKERS = 64, 1024  # of the pools of many workers
SETTINGS = {"alive_bypass": 60.0, "maintenance_interval": float("inf"), "max_waiters": 64}
BODY = "with pool.get() as c: c.socket"
ASK, DONE = 0, 1  # words
STOP = 2**32 - 1

# A figure: its spread in ns of the smallest pool and of the other, and that of the ratios.
Row = tuple[Spread, Spread, Spread]
Rows = dict[str, Row]


def run(options: Options) -> list[Line]:
    if options.floors_only:
        return []
    with Peer() as peer:
        slots = {count: by_slots(options, peer, count) for count in slot_counts(options)}
        lines = show(options, "slots", FEWEST_SLOTS, slots)
        workers = {count: by_workers(options, peer, count) for count in options.pick((32,), (8, 64, 256, 1000))}
        lines += show(options, "workers", FEWEST_WORKERS, workers)
        lines += idle_workers(options, peer, max(slots))
    return lines + weights(options)


def slot_counts(options: Options) -> list[int]:
    """Up to what the limit of open files allows; says so where that ends it."""
    limit = allow_descriptors(2 * MOST_SLOTS + 2 * SPARE)
    most = min(MOST_SLOTS, (limit - SPARE) // 2)
    if most < MOST_SLOTS:
        options.say(f"  {most} slots in place of {MOST_SLOTS}: a slot takes two of a process's {limit} open files")
    wanted: tuple[int, ...] = options.pick((512,), (64, 512, 4096, most))
    return sorted({min(count, most) for count in wanted})


# ---- two pools beside each other -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """A pool, a second process at work in it, and a view from outside."""

    pool: Any
    partner: Partner
    inspector: Any


def by_slots(options: Options, peer: Peer, slots: int) -> Rows:
    sizes = (FEWEST_SLOTS, slots)
    with sites(peer, sizes) as two:
        rows = compare(options, [few_open(site) for site in two])
        rows |= deaths(options, [site.pool for site in two])
        with contextlib.ExitStack() as stack:
            for site, size in zip(two, sizes, strict=True):
                stack.enter_context(all_leased_but(site.pool, size, OPEN))
            rows |= compare(options, [all_open(site) for site in two])
    with sites(peer, sizes, local_cache_size=0) as two:
        rows |= compare(options, [{"lease and return, no local cache": loop(BODY, pool=site.pool)} for site in two])
    return rows


def by_workers(options: Options, peer: Peer, workers: int) -> Rows:
    sizes = (WORKER_SLOTS, WORKER_SLOTS)
    with sites(peer, sizes, max_workers=MAX_WORKERS) as two, idle(two[1].pool, workers - FEWEST_WORKERS):
        rows = compare(options, [few_open(site) for site in two])
        return rows | deaths(options, [site.pool for site in two])


@contextlib.contextmanager
def sites(peer: Peer, sizes: Sequence[int], **settings: Any) -> Iterator[list[Site]]:
    """Pools of so many slots, `OPEN` connections in each."""
    with contextlib.ExitStack() as stack:
        found = []
        for size in sizes:
            config = {**SETTINGS, "resize_limit": size, **settings}
            pool = stack.enter_context(subject.pool_of(peer.dial_unix, size, **config))
            partner = stack.enter_context(Partner(pool))
            found.append(Site(pool, partner, stack.enter_context(subject.inspector_of(pool))))
            subject.warm(pool, OPEN)
        yield found


def compare(options: Options, figures: Sequence[dict[str, Callable[[int], int]]]) -> Rows:
    """Times each figure of the smallest pool beside that of the other."""
    candidates = [
        Candidate(f"{number} {name}", timed) for number, each in enumerate(figures) for name, timed in each.items()
    ]
    table = interleave(candidates, rounds=options.pick(5, 25), slice_ms=options.pick(0.5, 1.0))
    return {name: row_of(table, f"0 {name}", f"1 {name}") for name in figures[0]}


def row_of(table: Table, small: str, large: str) -> Row:
    return table.cost(small), table.cost(large), table.ratio(large, small)


def few_open(site: Site) -> dict[str, Callable[[int], int]]:
    return {
        "lease and return": loop(BODY, pool=site.pool),
        "steal from another's cache": site.partner.steal,
        "dial, and end the connection": dials(site.pool),
        **scans("", site),
    }


def all_open(site: Site) -> dict[str, Callable[[int], int]]:
    return {
        f"all open, all but {OPEN} leased: lease and return": loop(BODY, pool=site.pool),
        "  steal from another's cache": site.partner.steal,
        **scans("  ", site),
    }


def scans(indent: str, site: Site) -> dict[str, Callable[[int], int]]:
    return {
        f"{indent}recover(), nobody died": loop("recover()", recover=site.pool.recover),
        f"{indent}snapshot()": loop("snapshot()", snapshot=site.inspector.snapshot),
        f"{indent}stats()": loop("stats()", stats=site.inspector.stats),
    }


def dials(pool: Any) -> Callable[[int], int]:
    """Dials while all that is open is leased, so that the search finds nothing first."""

    def timed(turns: int, clock: Callable[[], int] = time.perf_counter_ns) -> int:
        held = [pool.get() for _ in range(OPEN - 1)]
        began = clock()
        for _ in range(turns):
            pool.get().discard()
        taken = clock() - began
        for lease in held:
            lease.release()
        return taken

    return timed


@contextlib.contextmanager
def all_leased_but(pool: Any, slots: int, idle_ones: int) -> Iterator[None]:
    leases = [pool.get() for _ in range(slots)]
    random.Random(1).shuffle(leases)
    for _ in range(idle_ones):
        leases.pop().release()
    yield
    for lease in leases:
        lease.release()


class Partner:
    """A second process in the pool, which has all idle connections in its cache whenever they are to be stolen."""

    def __init__(self, pool: Any) -> None:
        self._get = pool.get
        self._words = floor.load().Words()
        self._crew = Crew(Forked(_take_all, pool, self._words))
        self._asked = itertools.count(1)

    def steal(self, turns: int, clock: Callable[[], int] = time.perf_counter_ns) -> int:
        taken = 0
        for number in itertools.islice(self._asked, turns // OPEN):
            self._words.wake(ASK, number)
            self._words.sleep_while(DONE, number - 1)
            began = clock()
            leases = [self._get() for _ in range(OPEN)]
            taken += clock() - began
            for lease in leases:
                lease.release()
        return taken

    def __enter__(self) -> Partner:
        self._crew.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._words.wake(ASK, STOP)
        self._crew.__exit__(*error)


def _take_all(pool: Any, words: Any) -> None:
    number = 0
    while True:
        words.sleep_while(ASK, number)
        number = words.load(ASK)
        if number == STOP:
            return
        leases = [pool.get() for _ in range(OPEN)]
        for lease in leases:
            lease.release()
        words.wake(DONE, number)


# ---- newcomers and the dead ----------------------------------------------------------------------------------------


def deaths(options: Options, pools: Sequence[Any]) -> Rows:
    """A forked worker takes its first lease, and is killed with it; then somebody recovers it."""
    firsts: list[list[float]] = [[], []]
    recoveries: list[list[float]] = [[], []]
    for _ in range(options.pick(3, 20)):
        for number, pool in enumerate(pools):
            words = floor.load().Words()
            with Crew(child := Forked(_lease_and_die, pool, words)):
                child.wait_killed()
            firsts[number].append(words.load(DONE))
            began = time.perf_counter_ns()
            freed = pool.recover()
            recoveries[number].append(time.perf_counter_ns() - began)
            assert freed == 1
    return {"first lease of a forked worker": paired(firsts), "recover() one that died": paired(recoveries)}


def paired(figures: Sequence[Sequence[float]]) -> Row:
    small, large = figures
    ratios = [much / little for little, much in zip(small, large, strict=True)]
    return Spread.of(small), Spread.of(large), Spread.of(ratios)


def _lease_and_die(pool: Any, words: Any) -> None:
    began = time.perf_counter_ns()
    lease = pool.get()
    words.store(DONE, time.perf_counter_ns() - began)
    os.kill(os.getpid(), signal.SIGKILL)
    lease.release()


# ---- workers that do nothing ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def idle(pool: Any, count: int) -> Iterator[list[int]]:
    """`count` processes that have used the pool once, and wait; their numbers."""
    reader, writer = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        workers = [Forked(_use_once, pool, writer) for _ in range(count)]
        stack.enter_context(Crew(*workers))
        there = 0
        while there < count:
            there += len(os.read(reader, count))
        yield [worker.pid for worker in workers]


def _use_once(pool: Any, writer: int) -> None:
    pool.get().release()
    os.write(writer, b".")
    signal.pause()


def idle_workers(options: Options, peer: Peer, most_slots: int) -> list[Line]:
    """What a worker that does nothing costs with its maintenance thread: CPU time and memory of its own."""
    seconds = options.pick(1.0, 4.0)
    cases = options.pick(((8, 8),), ((8, 1), (8, 8), (8, 64), (8, 256), (most_slots, 8)))
    lines, rows = [], []
    for slots, workers in cases:
        config = {"resize_limit": slots, "max_workers": MAX_WORKERS}
        with subject.pool_of(peer.dial_unix, slots, **config) as pool, idle(pool, workers) as pids:
            time.sleep(1.0)  # their threads have begun
            before = [cpu_s(pid) for pid in pids]
            time.sleep(seconds)
            used = Spread.of((cpu_s(pid) - start) / seconds * 1e6 for pid, start in zip(pids, before, strict=True))
            memory = Spread.of(private_kib(pid) for pid in pids)
        what = f"an idle worker, {slots} slots, {workers} of them"
        lines.append(Line("growth", f"{what}: CPU in a second", used, " us", digits=0))
        lines.append(Line("growth", f"{what}: memory of its own", memory, " KiB", digits=0))
        rows.append({"slots": slots, "workers": workers, "cpu_us_a_second": asdict(used), "kib": asdict(memory)})
    options.tables.append({"bench": "growth", "idle_workers": rows})
    return lines


def cpu_s(pid: int) -> float:
    """CPU time of another process, see clock_getcpuclockid(3)."""
    return time.clock_gettime((~pid << 3) | 2)


def private_kib(pid: int) -> float:
    """What the process shares with no other: pages of its parent that it has written to, too."""
    text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(float(line.split()[1]) for line in text.splitlines() if line.startswith("Private_"))


# ---- tables --------------------------------------------------------------------------------------------------------


def show(options: Options, what: str, smallest: int, results: dict[int, Rows]) -> list[Line]:
    """Costs of the smallest in us, of the others as ratios to it; a line for each figure of the largest."""
    largest = max(results)
    width = max(map(len, results[largest]))
    heads = [f"{smallest} {what}", *map(str, results), str(largest)]
    options.say(f"  {'':{width}}" + "".join(f"{head:>13}" for head in heads))
    lines = []
    for name, (small, large, ratio) in results[largest].items():
        cells = [f"{rows[name][2].median:.2f} x" for rows in results.values()]
        cells = [f"{small.median / 1000:.2f} us", *cells, f"{large.median / 1000:.2f} us"]
        options.say(f"  {name:{width}}" + "".join(f"{cell:>13}" for cell in cells))
        lines.append(Line("growth", f"{name}, {largest} {what} / {smallest}", ratio))
    keys = ("small_ns", "ns", "ratio")
    sizes = {
        count: {name: dict(zip(keys, map(asdict, row), strict=True)) for name, row in rows.items()}
        for count, rows in results.items()
    }
    options.tables.append({"bench": "growth", "by": what, "smallest": smallest, "sizes": sizes})
    return lines


def weights(options: Options) -> list[Line]:
    """MiB of the segment at the default number of workers and waiters, for sizes that need not fit here."""
    core = importlib.import_module("shmpool._core")
    config = importlib.import_module("shmpool").PoolConfig(target="tcp://127.0.0.1:1")
    sizes = {}
    for slots in (FEWEST_SLOTS, 64, 512, 4096, MOST_SLOTS):
        sizes[slots] = core.layout(slots, config.max_workers, config.max_waiters)[0] / 2**20
    options.say("  MiB of the segment: " + ", ".join(f"{size:.2f} with {slots} slots" for slots, size in sizes.items()))
    options.tables.append({"bench": "growth", "segment_mib": sizes})
    return [Line("growth", f"segment, {MOST_SLOTS} slots", Spread.of([sizes[MOST_SLOTS]]), " MiB")]
