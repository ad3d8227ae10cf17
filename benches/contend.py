"""Workers that lease, hold, return, and begin again: what they get of a `Permits`, and how long each waits.

All workers begin at once and end at the same instant. A lease counts if it was had before that; a wait that ended later
is among the waits nevertheless. A hold is one of:

- `asleep`: `time.sleep`; the kernel may make it longer by its timer slack, of 50 us for most processes;
- `exactly`: `select` on nothing with the slack set to 1 ns, which makes the hold as short as it says;
- none at all, for a hold of 0.

Not here: what the permits are (`permits`), which runs there are and how they take turns (`bench_contention`,
`bench_grid`).
"""

from __future__ import annotations

import array
import gc
import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benches import floor
from benches.harness import quantile
from benches.permits import Permits
from benches.workers import Crew, Forked

START, END, IN_PLACE = 0, 1, 2  # words
WARM_UP = 20

Hold = Callable[[], None]


def asleep(seconds: float) -> Hold:
    def hold(sleep: Callable[[float], None] = time.sleep) -> None:
        sleep(seconds)

    return hold


def exactly(seconds: float) -> Hold:
    if not seconds:
        return lambda: None
    floor.load().timer_slack(1)

    def hold(wait: Any = select.select) -> None:
        wait((), (), (), seconds)

    return hold


@dataclass(frozen=True)
class Outcome:
    """One run: leases a second of all workers, quantiles of the waits in us, slowest / fastest worker."""

    rate: float
    p50: float
    p99: float
    p999: float
    longest: float
    fairness: float

    @classmethod
    def of(cls, results: list[tuple[array.array[int], int]], seconds: float) -> Outcome:
        """`results`: of each worker its waits in ns, and how many leases it had in time."""
        counts = [count for _, count in results]
        ordered = sorted(wait for waits, _ in results for wait in waits)
        p50, p99, p999, longest = (quantile(ordered, share) / 1000 for share in (0.5, 0.99, 0.999, 1.0))
        return cls(sum(counts) / seconds, p50, p99, p999, longest, min(counts) / max(counts))

    def text(self) -> str:
        waits = "  ".join(f"{wait:7.0f}" for wait in (self.p50, self.p99, self.p999, self.longest))
        return f"{self.rate:8.0f}  {waits}  {self.fairness:6.2f}"


HEADINGS = f"{'a second':>8}  {'p50':>7}  {'p99':>7}  {'p99.9':>7}  {'max':>7}  slowest/fastest"


def contend(permits: Permits, workers: int, make_hold: Callable[[], Hold], seconds: float) -> Outcome:
    """So many workers for so long; `make_hold` is called in each."""
    words = floor.load().Words()
    with Crew(*(Forked(_worker, words, number, permits, make_hold) for number in range(workers))) as crew:
        for number in range(workers):
            words.sleep_while(IN_PLACE + number, 0)
        words.store(END, time.perf_counter_ns() + int(seconds * 1e9))
        for _ in range(workers):
            words.wake(START, 1)
        return Outcome.of(crew.results(), seconds)


def _worker(words: Any, number: int, permits: Permits, make_hold: Callable[[], Hold]) -> tuple[array.array[int], int]:
    hold, take, give, clock = make_hold(), permits.take, permits.give, time.perf_counter_ns
    waits = array.array("Q")
    permits.enter(number)
    gc.disable()
    for _ in range(WARM_UP):
        permit = take()
        hold()
        give(permit)
    words.wake(IN_PLACE + number, 1)
    words.sleep_while(START, 0)
    end = taken = words.load(END)
    while (began := clock()) < end:
        permit = take()
        taken = clock()
        waits.append(taken - began)
        hold()
        give(permit)
    permits.leave()
    return waits, len(waits) - (taken > end)
