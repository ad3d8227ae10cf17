"""Timing that a noisy machine cannot fool, and the words in which results are given.

Every figure is a *ratio to a floor that was timed beside it*: the candidates of a bench take turns in short slices
(milliseconds), round after round, in an order that is turned each round. A slow phase of the machine then hits all of
them alike, and a ratio is taken within each round, never across rounds. What is reported is the median of these ratios
and their spread (10th to 90th percentile). A bare time is printed only beside a ratio, to help thought.

Not here: what is measured (bench_*.py), and any judgement that fails a run. A missed line is printed as missed.
"""

from __future__ import annotations

import gc
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TextIO

UNROLL = 8


Group = Literal["floor", "shmpool", "for one process", "for several processes"]


@dataclass(frozen=True)
class Candidate:
    """Something to be timed: `run(n)` does it n times and returns the nanoseconds that took."""

    name: str
    run: Callable[[int], int]
    group: Group = "shmpool"


@dataclass(frozen=True)
class Spread:
    """The middle of many figures, and how far they lie apart."""

    median: float
    p10: float
    p90: float
    count: int

    @classmethod
    def of(cls, figures: Iterable[float]) -> Spread:
        ordered = sorted(figures)
        if not ordered:
            raise ValueError("no figures")
        return cls(statistics.median(ordered), quantile(ordered, 0.1), quantile(ordered, 0.9), len(ordered))

    def to_json(self) -> dict[str, float]:
        """To four digits, which is more than any of them means."""
        return {name: float(f"{value:.4g}") for name, value in asdict(self).items()}

    def text(self, unit: str, digits: int = 2) -> str:
        return f"{self.median:.{digits}f}{unit} ({self.p10:.{digits}f}..{self.p90:.{digits}f})"


def quantile(ordered: Sequence[float], share: float) -> float:
    """The figure below which `share` of the sorted figures lie."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(frozen=True)
class Line:
    """One line of the result. `limit` is None in a line that is only told."""

    bench: str
    what: str
    measured: Spread
    unit: str = " x"
    limit: float | None = None
    at_least: bool = False
    must: str = ""
    digits: int = 2

    @property
    def verdict(self) -> str:
        if self.limit is None:
            return ""
        held = self.measured.median >= self.limit if self.at_least else self.measured.median <= self.limit
        return "ok" if held else "missed"

    @property
    def must_text(self) -> str:
        if self.must or self.limit is None:
            return self.must
        return f"{'>=' if self.at_least else '<='} {self.limit:g}{self.unit}"

    def to_json(self) -> dict[str, Any]:
        measured = self.measured.to_json()
        return {**asdict(self), "measured": measured, "must": self.must_text, "verdict": self.verdict}


@dataclass(frozen=True)
class Options:
    """How much time a bench may take, and where it prints."""

    quick: bool = False
    floors_only: bool = False
    tables: list[dict[str, Any]] = field(default_factory=list)
    out: TextIO = field(default_factory=lambda: sys.stdout)

    def pick(self, quick: Any, full: Any) -> Any:
        return quick if self.quick else full

    def say(self, text: str = "") -> None:
        print(text, file=self.out, flush=True)


def loop(statement: str, setup: str = "", **names: Any) -> Callable[[int], int]:
    """A function that runs `statement` n times (n a multiple of UNROLL) and returns nanoseconds.

    The statement is compiled into the loop, several times over, so that the turn of the loop weighs little; the names
    are locals of the function, as they would be in a program that cares.
    """
    parameters = ", ".join(["_n", *(f"{name}={name}" for name in names)])
    body = "\n".join("        " + line for line in statement.splitlines()) + "\n"
    begin = "".join(f"    {line}\n" for line in setup.splitlines())
    source = (
        f"def timed({parameters}, _repeat=_repeat, _clock=_clock):\n{begin}"
        f"    _turns = _repeat(None, _n // {UNROLL})\n    _began = _clock()\n"
        f"    for _ in _turns:\n{body * UNROLL}    return _clock() - _began\n"
    )
    scope: dict[str, Any] = {**names, "_repeat": itertools.repeat, "_clock": time.perf_counter_ns}
    exec(compile(source, f"<timed {statement.splitlines()[0]!r}>", "exec"), scope)
    timed: Callable[[int], int] = scope["timed"]
    return timed


class Table:
    """What the rounds gave: for each candidate, the nanoseconds of one turn in each round."""

    def __init__(self, times: dict[str, list[float]], groups: dict[str, Group]) -> None:
        self.times, self.groups = times, groups

    def cost(self, name: str) -> Spread:
        return Spread.of(self.times[name])

    def ratio(self, name: str, floor: str) -> Spread:
        return self.derive(lambda round_: round_[name] / round_[floor])

    def derive(self, figure: Callable[[dict[str, float]], float]) -> Spread:
        """A figure made of the times of one round, over all rounds."""
        rounds = zip(*self.times.values(), strict=True)
        return Spread.of(figure(dict(zip(self.times, one, strict=True))) for one in rounds)

    def show(self, options: Options, floor: str) -> None:
        """Prints it, the cheapest first, and keeps it for the result."""
        names = sorted(self.times, key=lambda name: self.cost(name).median)
        width = max(len(name) for name in names)
        rows = []
        options.say(f"  {'':{width}}  {'ns':>9}  ratio to `{floor}` (p10..p90)")
        for name in names:
            cost, ratio = self.cost(name), self.ratio(name, floor)
            rows.append({"name": name, "group": self.groups[name], "ns": cost.to_json(), "ratio": ratio.to_json()})
            options.say(f"  {name:{width}}  {cost.median:9.1f}  {ratio.text(' x')}")
        options.tables.append({"floor": floor, "rows": rows})


def interleave(candidates: Sequence[Candidate], rounds: int, slice_ms: float = 2.0) -> Table:
    """Times the candidates in turns: one short slice of each in every round, the order turned by one each round."""
    sizes = {candidate.name: _turns_in(candidate, slice_ms * 1e6) for candidate in candidates}
    times: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            first = number % len(candidates)
            for candidate in [*candidates[first:], *candidates[:first]]:
                turns = sizes[candidate.name]
                times[candidate.name].append(candidate.run(turns) / turns)
    finally:
        if collecting:
            gc.enable()
    return Table(times, {candidate.name: candidate.group for candidate in candidates})


def _turns_in(candidate: Candidate, slice_ns: float, tries: int = 3) -> int:
    """How many fill a slice. The shortest try counts: one that was interrupted would make all slices too short."""
    candidate.run(UNROLL)
    turns = UNROLL
    while (taken := min(candidate.run(turns) for _ in range(tries))) < slice_ns / 4:
        turns *= 4
    return max(UNROLL, round(turns * slice_ns / max(taken, 1)) // UNROLL * UNROLL)


def machine() -> dict[str, Any]:
    """What a reader of the figures must know of where they come from."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "compiler": platform.python_compiler(),
        "load": os.getloadavg(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _processor() -> str:
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith(("model name", "CPU part")):
                return line.partition(":")[2].strip()
    return "unknown"


def summary(lines: Sequence[Line]) -> str:
    """The table at the end: what, must be, measured, verdict."""
    rows = [("what", "must be", "measured (p10..p90)", "")]
    rows += [(line.what, line.must_text, line.measured.text(line.unit, line.digits), line.verdict) for line in lines]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    texts = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    texts.insert(1, "-" * max(map(len, texts)))
    return "\n".join(texts)
