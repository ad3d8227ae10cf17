"""Many workers, few connections: throughput, waiting and fairness, which no simple tool has all at once.

Workers lease, hold for 100 us, return, and begin again, for some seconds. The peers guard the same number of permits: a
`multiprocessing.BoundedSemaphore` (whoever runs takes: fast, long waits for some); a pipe with one byte a permit, whose
sleeping readers the kernel wakes in turn, while a running one may still come first; and a strict queue, in which every
return goes to the longest waiter (fair, each turn costs a wake-up). Runs take turns (pool, semaphore, pipe, queue,
pool, ...); ratios are taken within a turn.

Both kinds of hold are measured, by `time.sleep` and exactly (`contend`); the budget speaks of the first.

Not here: other numbers of workers, permits and holds (`bench_grid`).
"""

from __future__ import annotations

from collections.abc import Callable

from benches.contend import HEADINGS, Outcome, asleep, contend, exactly
from benches.harness import Line, Options, Spread
from benches.permits import Permits, Pipe, Pooled, Semaphore, StrictQueue
from benches.workers import Peer

WORKERS, PERMITS, HOLD = 8, 4, 100e-6
HOLDS = {"sleep": asleep, "select": exactly}


def run(options: Options) -> list[Line]:
    lines: list[Line] = []
    turns, seconds = options.pick(2, 7), options.pick(0.7, 2.0)
    with Peer() as peer:
        makers: list[Callable[[], Permits]] = [] if options.floors_only else [lambda: Pooled(PERMITS, peer)]
        makers += [lambda: Semaphore(PERMITS), lambda: Pipe(PERMITS), lambda: StrictQueue(PERMITS, WORKERS)]
        for hold in ("sleep",) if options.quick else tuple(HOLDS):
            outcomes = take_turns(makers, hold, turns, seconds, options)
            if not options.floors_only:
                lines += judge(outcomes, hold)
    return lines


def take_turns(
    makers: list[Callable[[], Permits]], hold: str, turns: int, seconds: float, options: Options
) -> dict[str, list[Outcome]]:
    options.say(f"  {WORKERS} workers, {PERMITS} permits, held 100 us by {hold}; wait in us")
    options.say(f"  {'':18}  {HEADINGS}")
    outcomes: dict[str, list[Outcome]] = {}
    for turn in range(turns):
        first = turn % len(makers)
        for maker in [*makers[first:], *makers[:first]]:
            permits = maker()
            try:
                outcome = contend(permits, WORKERS, lambda: HOLDS[hold](HOLD), seconds)
            finally:
                permits.close()
            outcomes.setdefault(permits.name, []).append(outcome)
            options.say(f"  {permits.name:18}  {outcome.text()}")
    return outcomes


def judge(outcomes: dict[str, list[Outcome]], hold: str) -> list[Line]:
    ours = outcomes[Pooled.name]
    rates = Spread.of(one.rate / other.rate for one, other in zip(ours, outcomes[Semaphore.name], strict=True))
    tails = Spread.of(one.p99 / 1000 for one in ours)
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
        Line("contention", f"  {name}: p99 wait ({hold})", Spread.of(one.p99 / 1000 for one in figures), " ms"),
        Line("contention", f"  {name}: slowest / fastest ({hold})", Spread.of(one.fairness for one in figures)),
    ]
    if name != Semaphore.name:
        lines.insert(0, Line("contention", f"  {name}: throughput / semaphore ({hold})", rates))
    return lines
