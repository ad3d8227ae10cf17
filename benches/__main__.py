"""Runs the benches: `python -m benches [names...] [--quick] [--floors] [--json FILE]`."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Sequence

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
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.names) - set(NAMES):
        parser.error(f"no such bench: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    options = Options(quick=chosen.quick, floors_only=chosen.floors)
    lines: list[Line] = []
    for name in chosen.names or NAMES:
        lines += run(name, options)
    if lines:
        options.say("\n" + summary(lines))
    if chosen.json:
        with open(chosen.json, "w") as stream:
            results = [line.to_json() for line in lines]
            json.dump({"machine": machine(), "lines": results, "tables": options.tables}, stream, indent=1)
    return 0


def run(name: str, options: Options) -> list[Line]:
    began = time.monotonic()
    options.say(f"\n{name}")
    lines: list[Line] = importlib.import_module(f"benches.bench_{name}").run(options)
    options.say(f"  ({time.monotonic() - began:.1f} s)")
    return lines


if __name__ == "__main__":
    sys.exit(main())
