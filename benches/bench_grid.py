"""Contention as a grid: how many processes, over how many connections, each held for how long.

In each cell the contenders take turns, and each is told beside the *maximum*: as many workers as there are permits to
be had at once, min(processes, connections), who hold and begin again, and ask nobody. That is permits / hold, as far
as the cores, the interpreter and the timers of this machine let it come, measured within the same turn; permits / hold
itself is printed in the head of the cell. Where fewer processes than connections want to run, nobody waits for a
permit, and what is told is the cost of leasing alone. Holds are exact (`contend`).

A hold of 0 leases as fast as it can. With more processes than cores its waits, and its slowest / fastest, are above all
the kernel's sharing of the cores; the row of the maximum shows how much.

The manager's queue is some hundred times slower than the pool; it is in the cells of 8 processes only.

Not here: the cell that has a budget (`bench_contention`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benches.contend import HEADINGS, Outcome, contend, exactly
from benches.harness import Line, Options, Spread
from benches.permits import (
    FreeStack,
    Indices,
    ManagedIndices,
    Permits,
    Pipe,
    Pooled,
    Semaphore,
    StrictQueue,
    Unguarded,
)
from benches.workers import Peer

PROCESSES, CONNECTIONS, HOLDS_US = (2, 4, 8, 16, 32), (4, 64), (0, 100, 1000)
MANAGED = 8  # processes of the cells that have the manager's queue
TURNS = 3


class Cell(NamedTuple):
    processes: int
    connections: int
    hold_us: int

    @property
    def text(self) -> str:
        return f"{self.processes} processes, {self.connections} connections, held {self.hold_us} us"

    @property
    def at_once(self) -> int:
        return min(self.processes, self.connections)


CELLS = tuple(itertools.starmap(Cell, itertools.product(PROCESSES, CONNECTIONS, HOLDS_US)))
QUICK = (Cell(8, 4, 1000), Cell(32, 4, 100))


def run(options: Options) -> list[Line]:
    lines: list[Line] = []
    with Peer() as peer:
        for cell in options.pick(QUICK, CELLS):
            outcomes = take_turns(cell, peer, options)
            options.tables.append({**cell._asdict(), "contenders": list(rows(outcomes))})
            if not options.floors_only and cell.processes > cell.connections:
                share = of_maximum(outcomes, Pooled.name)
                lines.append(Line("grid", f"{cell.text}: throughput / the maximum", share))
    return lines


def makers(cell: Cell, peer: Peer, options: Options) -> list[Callable[[], Permits]]:
    permits, processes = cell.connections, cell.processes
    found: list[Callable[[], Permits]] = [] if options.floors_only else [lambda: Pooled(permits, peer)]
    found += [Unguarded, lambda: Semaphore(permits), lambda: Pipe(permits), lambda: StrictQueue(permits, processes)]
    found += [lambda: FreeStack(permits), lambda: Indices(permits)]
    return [*found, lambda: ManagedIndices(permits)] if processes == MANAGED else found


def take_turns(cell: Cell, peer: Peer, options: Options) -> dict[str, list[Outcome]]:
    """The outcomes of each contender, a turn each."""
    contenders, outcomes = makers(cell, peer, options), dict[str, list[Outcome]]()
    for turn in range(options.pick(1, TURNS)):
        first = turn % len(contenders)
        for make in [*contenders[first:], *contenders[:first]]:
            permits = make()
            try:
                outcomes.setdefault(permits.name, []).append(_contend(permits, cell, options))
            finally:
                permits.close()
    _show(cell, outcomes, options)
    return outcomes


def _contend(permits: Permits, cell: Cell, options: Options) -> Outcome:
    workers = cell.at_once if permits.name == Unguarded.name else cell.processes
    seconds = options.pick(0.2, 0.4 if cell.hold_us else 0.25)
    return contend(permits, workers, lambda: exactly(cell.hold_us / 1e6), seconds)


def of_maximum(outcomes: dict[str, list[Outcome]], name: str) -> Spread:
    pairs = zip(outcomes[name], outcomes[Unguarded.name], strict=True)
    return Spread.of(one.rate / most.rate for one, most in pairs)


def rows(outcomes: dict[str, list[Outcome]]) -> Iterator[dict[str, Any]]:
    """Of each contender: leases a second, share of the maximum, waits in us, slowest / fastest; as spreads."""
    for name, each in outcomes.items():
        spreads = {"of_maximum": of_maximum(outcomes, name)}
        spreads |= {what: Spread.of(getattr(one, what) for one in each) for what in Outcome.__dataclass_fields__}
        yield {"name": name, **{what: spread.to_json() for what, spread in spreads.items()}}


def _show(cell: Cell, outcomes: dict[str, list[Outcome]], options: Options) -> None:
    ideal = f"{cell.at_once / cell.hold_us * 1e6:.0f} a second" if cell.hold_us else "no bound"
    options.say(f"  {cell.text} (permits / hold: {ideal}); wait in us, medians of {len(outcomes[Unguarded.name])}")
    width = max(map(len, outcomes))
    options.say(f"  {'':{width}}  {HEADINGS}  of the maximum")
    for name, each in outcomes.items():
        middle = Outcome(
            *(Spread.of(getattr(one, what) for one in each).median for what in Outcome.__dataclass_fields__)
        )
        options.say(f"  {name:{width}}  {middle.text()}           {of_maximum(outcomes, name).median:6.1%}")
