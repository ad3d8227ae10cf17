"""Runs the benches: `python -m benches [names...] [--quick] [--floors] [--json FILE]`.

The result is written to a file, and drawn beside it. `--plot FILE` draws one again; `--install FILE` makes it the
reference, whose figures and picture benches/README.md has.

Not here: the benches (`bench_*`), what is made of a result (`results`, `report`, `plot`).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benches import results
from benches.harness import Line, Options, machine, summary

NAMES = (
    "roundtrip",
    "scale",
    "growth",
    "handover",
    "contention",
    "grid",
    "redis",
    "http",
    "recovery",
    "startup",
    "join",
    "inspect",
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches", description="What shmpool costs, as ratios to floors.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"which benches: {', '.join(NAMES)} (all)")
    parser.add_argument("--quick", action="store_true", help="about a minute for all, with wider spreads")
    parser.add_argument("--floors", action="store_true", help="only the floors and the peers, nothing of shmpool")
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=Path,
        default=results.LATEST,
        help="write the result there, and its picture beside it (benches/results/latest.json)",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--plot", metavar="FILE", type=Path, help="run nothing: draw that result again")
    instead.add_argument(
        "--install",
        metavar="FILE",
        type=Path,
        help="run nothing: make that result the reference that benches/README.md shows",
    )
    chosen = parser.parse_args(arguments)
    try:
        if chosen.plot:
            return 0 if draw(results.read(chosen.plot), chosen.plot) else 1
        if chosen.install:
            install(chosen.install)
            return 0
    except (OSError, ValueError, ImportError) as error:
        print(f"benches: {error}", file=sys.stderr)
        return 1
    if unknown := set(chosen.names) - set(NAMES):
        parser.error(f"no such bench: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    if chosen.json.suffix == ".svg":
        parser.error(f"{chosen.json} is the picture's name; choose one that ends otherwise for --json FILE")
    if not os.access(chosen.json.parent, os.W_OK):
        parser.error(f"nothing can be written in {chosen.json.parent}; choose another place with --json FILE")
    options = Options(quick=chosen.quick, floors_only=chosen.floors)
    lines: list[Line] = []
    names, where = chosen.names or NAMES, machine()
    for name in names:
        lines += run(name, options)
    if lines:
        options.say("\n" + summary(lines))
    result = results.make(names, where, lines, options)
    results.write(result, chosen.json)
    try:
        draw(result, chosen.json)
    except ImportError as missing:
        print(f"not drawn: {missing}")
    return 0


def draw(result: results.Result, path: Path) -> bool:
    """Draws a result beside its file. Raises ImportError without matplotlib."""
    plot = importlib.import_module("benches.plot")
    picture = path.with_suffix(".svg")
    drawn: bool = plot.draw(result, picture)
    print(f"drawn: {picture}" if drawn else f"not drawn: {path} has neither a round trip nor a grid")
    return drawn


def install(path: Path) -> None:
    """Makes a result the reference. Raises Unusable for one that is not whole, ImportError without matplotlib."""
    result = results.read(path)
    if result["quick"] or result["floors_only"] or not {"roundtrip", "grid"} <= set(result["benches"]):
        raise results.Unusable(f"{path} is not of a whole run; make one with python -m benches, without names or flags")
    report = importlib.import_module("benches.report")
    readme = report.refreshed(report.README.read_text(encoding="utf-8"), result)
    draw(result, results.REFERENCE)
    results.write(result, results.REFERENCE)
    report.README.write_text(readme, encoding="utf-8")


def run(name: str, options: Options) -> list[Line]:
    began = time.monotonic()
    options.say(f"\n{name}")
    tables = len(options.tables)
    lines: list[Line] = importlib.import_module(f"benches.bench_{name}").run(options)
    for table in options.tables[tables:]:
        table["bench"] = name
    options.say(f"  ({time.monotonic() - began:.1f} s)")
    return lines


if __name__ == "__main__":
    sys.exit(main())
