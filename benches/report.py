"""A result in words: the tables of README.md that are made from the reference, and never written by hand.

A block of README.md begins with `<!-- reference: NAME -->` and ends with `<!-- end -->`; `refreshed()` puts into each
what `blocks()` makes of the result. What is said of a cell to be better than the pool is so beyond the spreads: the
worst of its turns is better than the pool's best.

Not here: the picture (`plot`), the file (`results`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benches.bench_grid import Cell
from benches.permits import Pooled, Unguarded
from benches.results import Result, candidates, cells

README = Path(__file__).with_name("README.md")
IDLE_LOAD = 1.0  # at most, of a machine that does nothing else
OURS = ("shmpool get/release", "shmpool with get() as c: c.socket")


class Measure(NamedTuple):
    """Of a cell of the grid: its key in the result, its name, how it is written, whether more is better."""

    key: str
    name: str
    form: str
    more: bool

    def times(self, one: dict[str, Any], other: dict[str, Any]) -> float:
        """How many times better one is than the other."""
        greater, less = (one, other) if self.more else (other, one)
        return float(greater[self.key]["median"] / max(less[self.key]["median"], 1e-9))

    def beyond(self, one: dict[str, Any], other: dict[str, Any]) -> bool:
        """Whether one is better beyond the spreads."""
        greater, less = (one, other) if self.more else (other, one)
        return bool(greater[self.key]["p10"] > less[self.key]["p90"])


MEASURES = (
    Measure("rate", "throughput", "{:,.0f} a second", more=True),
    Measure("p50", "median wait", "{:,.1f} us", more=False),
    Measure("p99", "p99 wait", "{:,.1f} us", more=False),
    Measure("p999", "p99.9 wait", "{:,.1f} us", more=False),
    Measure("fairness", "slowest / fastest worker", "{:.2f}", more=True),
)


def blocks(result: Result) -> dict[str, str]:
    """Markdown, by the name of the block."""
    makers = {
        "machine": machine,
        "budget": budget,
        "roundtrip": roundtrip,
        "grid": grid,
        "better": better,
    }
    return {name: "\n".join(make(result)) for name, make in makers.items()}


def refreshed(readme: str, result: Result) -> str:
    """The text of README.md with the figures of the result."""
    for name, block in blocks(result).items():
        pattern = rf"(<!-- reference: {name} -->\n).*?(<!-- end -->)"
        readme, found = re.subn(pattern, lambda at: f"{at[1]}{block}\n{at[2]}", readme, flags=re.DOTALL)  # noqa: B023
        if found != 1:
            raise ValueError(f"README.md has {found} blocks `<!-- reference: {name} -->` … `<!-- end -->`, not one")
    return readme


def machine(result: Result) -> Iterator[str]:
    of = result["machine"]
    peers = ", ".join(f"{name} {version}" for name, version in result["packages"].items())
    busy = " The machine had other work to do: the spreads are wide." if of["load"][0] > IDLE_LOAD else ""
    yield (
        f"{of['cores']} cores of {of['processor']} ({of['machine']}), Linux {of['kernel']}, {of['implementation']} "
        f"{of['python']}, {of['at'][:10]}, load {of['load'][0]:.1f} at the start; {peers}.{busy}"
    )


def budget(result: Result) -> Iterator[str]:
    yield from head("bench", "what", "must be", "measured", "")
    for line in result["lines"]:
        if line["limit"] is not None:
            measured = spread_text(line["measured"], line["digits"], line["unit"])
            yield row(line["bench"], line["what"].strip(), line["must"], measured, line["verdict"])


def roundtrip(result: Result) -> Iterator[str]:
    table = candidates(result)
    if table is None:
        yield "Not measured."
        return
    yield from head("", "ns", f"x `{table['floor']}`", "what it is")
    for each in table["rows"]:
        mark = "**" if each["group"] == "shmpool" else ""
        yield row(
            f"{mark}{each['name']}{mark}", spread_text(each["ns"], 0), spread_text(each["ratio"], 2), each["group"]
        )


def grid(result: Result) -> Iterator[str]:
    """The pool in each cell, and who of the others has the best throughput there, and the shortest p99."""
    yield from head(
        "processes", "connections", "hold, us", "leases a second", "of the maximum", "p50 / p99 / p99.9 / max, us",
        "slowest / fastest", "most of the others", "their shortest p99, us",
    )  # fmt: skip
    for cell in cells(result):
        ours, others = contenders(cell)
        if ours is None:
            continue
        waits = " / ".join(us_text(ours[what]) for what in ("p50", "p99", "p999", "longest"))
        most = max(others, key=lambda other: float(other["rate"]["median"]))
        soonest = min(others, key=lambda other: float(other["p99"]["median"]))
        yield row(
            *(str(cell[what]) for what in ("processes", "connections", "hold_us")),
            f"{ours['rate']['median']:,.0f}",
            f"{ours['of_maximum']['median']:.0%}",
            waits,
            f"{ours['fairness']['median']:.2f}",
            f"{most['of_maximum']['median']:.0%}, {most['name']}",
            f"{us_text(soonest['p99'])}, {soonest['name']}",
        )


def better(result: Result) -> Iterator[str]:
    """Where the pool is not the best."""
    missed = [line["what"].strip() for line in result["lines"] if line["verdict"] == "missed"]
    yield f"- Budget lines missed: {'; '.join(missed) or 'none'}."
    table = candidates(result)
    costs = {each["name"]: each["ns"]["median"] for each in table["rows"]} if table else {}
    for ours in OURS:
        if ours in costs:
            peers = [each for each in table["rows"] if each["group"].startswith("for ")] if table else []
            cheaper = [each["name"] for each in peers if costs[each["name"]] < costs[ours]]
            yield f"- Cheaper than `{ours}`: {', '.join(cheaper) or 'nothing'}."
    for measure in MEASURES:
        # Where nobody waits there is nothing to be said of waits.
        told = [cell for cell in cells(result) if measure.key == "rate" or cell["processes"] > cell["connections"]]
        yield f"- {measure.name[0].upper()}{measure.name[1:]}: {beaten_text(told, measure)}"


def beaten_text(of_cells: list[dict[str, Any]], measure: Measure) -> str:
    found = list(beaten(of_cells, measure))
    if not found:
        return f"nothing is better in any of {len(of_cells)} cells."
    names = ", ".join(sorted({f"`{best['name']}`" for _, best, _ in found}))
    most = max(found, key=lambda each: measure.times(each[1], each[2]))
    cell, best, ours = most
    where = Cell(cell["processes"], cell["connections"], cell["hold_us"]).text
    figures = " against ".join(measure.form.format(each[measure.key]["median"]) for each in (best, ours))
    return f"better in {len(found)} of {len(of_cells)} cells are {names}; by most {best['name']}, {where}: {figures}."


def beaten(of_cells: list[dict[str, Any]], measure: Measure) -> Iterator[tuple[dict[str, Any], ...]]:
    """(cell, the best of those who are better than the pool there, the pool)."""
    for cell in of_cells:
        ours, others = contenders(cell)
        ahead = [other for other in others if ours and measure.beyond(other, ours)]
        if ours and ahead:
            yield cell, max(ahead, key=lambda other: measure.times(other, ours)), ours


def contenders(cell: dict[str, Any]) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The pool, and the others that guard something."""
    by_name = {each["name"]: each for each in cell["contenders"]}
    others = [each for name, each in by_name.items() if name not in (Pooled.name, Unguarded.name)]
    return by_name.get(Pooled.name), others


def us_text(spread: dict[str, float]) -> str:
    return f"{spread['median']:,.{1 if spread['median'] < 9.95 else 0}f}"


def spread_text(spread: dict[str, float], digits: int, unit: str = "") -> str:
    return f"{spread['median']:,.{digits}f}{unit} ({spread['p10']:,.{digits}f}..{spread['p90']:,.{digits}f})"


def head(*cells: str) -> Iterator[str]:
    yield row(*cells)
    yield row(*("---" for _ in cells))


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
