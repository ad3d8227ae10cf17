"""What it takes until a pool can be used: imports, a pool with its connections, the first lease; and what it weighs.

Floors: `import socket`; a loop that opens as many plain connections; one plain connection in the same new process.
Imports are timed inside a new interpreter, from its first line on, with all modules compiled (interpreters).

Not here: joining a named pool (bench_join).
"""

from __future__ import annotations

import functools
import importlib
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from operator import methodcaller
from typing import Any

from benches.harness import Candidate, Line, Options, Spread, interleave
from benches.interpreters import ROOT, Interpreters
from benches.workers import Crew, Forked, Peer

IMPORT = """
from time import perf_counter_ns, process_time_ns
began, cpu = perf_counter_ns(), process_time_ns()
import {module}
print(perf_counter_ns() - began, process_time_ns() - cpu)
"""
IMPORT_LIMIT_MS = 15.0
PEERS = ("redis", "urllib3", "psycopg_pool", "sqlalchemy")
FIRST_LEASE = """
import sys, time
began = time.perf_counter_ns()
import shmpool
imported = time.perf_counter_ns()
with shmpool.Pool(sys.argv[1], min_connections=0) as pool:
    made = time.perf_counter_ns()
    with pool.get() as lease:
        lease.socket
        print(made - imported, time.perf_counter_ns() - made, time.perf_counter_ns() - began)
"""
FIRST_CONNECTION = """
import socket, sys, time
host, port = sys.argv[1].removeprefix("tcp://").split(":")
began = time.perf_counter_ns()
socket.socket().connect((host, int(port)))
print(time.perf_counter_ns() - began)
"""


def run(options: Options) -> list[Line]:
    with Interpreters() as interpreters, Peer() as peer:
        lines = imports(options, interpreters)
        if options.floors_only:
            return lines
        lines += ready(options, peer)
        lines += first_leases(options, interpreters, f"tcp://127.0.0.1:{peer.port}")
        lines += forked_leases(options, peer)
    return lines + sizes(options)


# ---- imports -------------------------------------------------------------------------------------------------------


def imports(options: Options, interpreters: Interpreters) -> list[Line]:
    wanted = ("socket", *(() if options.floors_only else ("shmpool",)), *options.pick(PEERS[:2], PEERS))
    names = [name for name in wanted if interpreters.has(name)]
    if missing := sorted(set(wanted) - set(names)):
        options.say(f"  left out: {', '.join(missing)}: not installed")
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(options.pick(3, 25)):
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:
            wall_ns, cpu_ns = map(int, interpreters.output(IMPORT.format(module=name)).split())
            wall[name].append(wall_ns / 1e6)
            cpu[name].append(cpu_ns / 1e6)
    for name in names:
        spreads = {"wall": Spread.of(wall[name]), "cpu": Spread.of(cpu[name])}
        options.say(f"  import {name:12}  " + ", ".join(f"{kind} {each.text(' ms')}" for kind, each in spreads.items()))
        row = {kind: asdict(each) for kind, each in spreads.items()}
        options.tables.append({"bench": "startup", "import": name, "ms": row})
    if options.floors_only:
        return []
    ours = Spread.of(wall["shmpool"])
    lines = [
        Line("startup", "import shmpool, in a new interpreter", ours, " ms", limit=IMPORT_LIMIT_MS),
        Line("startup", "  CPU time of it", Spread.of(cpu["shmpool"]), " ms"),
    ]
    for name in names:
        if name != "shmpool":
            ratio = Spread.of(one / other for one, other in zip(cpu["shmpool"], cpu[name], strict=True))
            lines.append(Line("startup", f"  over that of import {name}", ratio))
    return lines


# ---- pools and leases ----------------------------------------------------------------------------------------------


def ready(options: Options, peer: Peer) -> list[Line]:
    """From Pool(...) until its connections are open, beside a loop that opens as many."""
    shmpool: Any = importlib.import_module("shmpool")
    target = f"tcp://127.0.0.1:{peer.port}"

    def pool_of(count: int) -> Any:
        pool = shmpool.Pool(target, min_connections=count, max_connections=count)
        pool.wait_ready()
        return pool

    def plain_ones(count: int) -> list[socket.socket]:
        return [peer.dial_tcp() for _ in range(count)]

    lines = []
    for count in options.pick((1, 8), (1, 8, 64)):
        plain, pooled = f"{count} plain connections in a loop", f"Pool() until {count} connections are open"
        candidates = [
            Candidate(plain, timed(functools.partial(plain_ones, count), hang_up)),
            Candidate(pooled, timed(functools.partial(pool_of, count), methodcaller("close"))),
        ]
        table = interleave(candidates, rounds=options.pick(2, 20), slice_ms=1.0)
        table.show(options, plain)
        in_ms = Spread.of(figure / 1e6 for figure in table.times[pooled])
        lines.append(Line("startup", pooled, in_ms, " ms"))
        lines.append(Line("startup", f"  over {plain}", table.ratio(pooled, plain)))
    return lines


def timed(make: Callable[[], Any], end: Callable[[Any], object]) -> Callable[[int], int]:
    """Times `make` alone; what it has made is ended while no clock runs."""

    def run(turns: int, clock: Callable[[], int] = time.perf_counter_ns) -> int:
        taken = 0
        for _ in range(turns):
            began = clock()
            made = make()
            taken += clock() - began
            end(made)
        return taken

    return run


def hang_up(connections: list[socket.socket]) -> None:
    for connection in connections:
        connection.close()


def first_leases(options: Options, interpreters: Interpreters, target: str) -> list[Line]:
    plain: list[float] = []
    made: list[float] = []
    leased: list[float] = []
    whole: list[float] = []
    for program in (FIRST_LEASE, FIRST_CONNECTION):
        interpreters.output(program, target)
    for _ in range(options.pick(3, 25)):
        plain.append(int(interpreters.output(FIRST_CONNECTION, target)) / 1e6)
        figures = [int(word) / 1e6 for word in interpreters.output(FIRST_LEASE, target).split()]
        for figure, kept in zip(figures, (made, leased, whole), strict=True):
            kept.append(figure)
    return [
        Line("startup", "a new process: Pool() without connections", Spread.of(made), " ms"),
        Line("startup", "  its first lease, which dials", Spread.of(leased), " ms"),
        Line("startup", "  its first plain connection", Spread.of(plain), " ms"),
        Line("startup", "  from before `import shmpool` until it has a lease", Spread.of(whole), " ms"),
    ]


def forked_leases(options: Options, peer: Peer) -> list[Line]:
    """The first lease of a forked worker, of a connection that its parent has opened; and its second."""
    shmpool: Any = importlib.import_module("shmpool")
    firsts, seconds = [], []
    with shmpool.Pool(f"tcp://127.0.0.1:{peer.port}", max_connections=8, min_connections=1) as pool:
        pool.wait_ready()
        for _ in range(options.pick(10, 60)):
            with Crew(Forked(_two_leases, pool)) as crew:
                ((first, second),) = crew.results()
            firsts.append(first / 1e3)
            seconds.append(second / 1e3)
    return [
        Line("startup", "a forked worker's first lease", Spread.of(firsts), " us", digits=0),
        Line("startup", "  its second", Spread.of(seconds), " us", digits=1),
    ]


def _two_leases(pool: Any) -> tuple[int, int]:
    times = []
    for _ in range(2):
        began = time.perf_counter_ns()
        with pool.get() as lease:
            lease.socket  # noqa: B018 (it is made at the first look)
            times.append(time.perf_counter_ns() - began)
    first, second = times
    return first, second


# ---- sizes ---------------------------------------------------------------------------------------------------------


def sizes(options: Options) -> list[Line]:
    """Of the wheel, built in a temporary directory, and of what it installs."""
    if options.quick:
        options.say("  left out: the size of the wheel (--quick)")
        return []
    with tempfile.TemporaryDirectory(prefix="shmpool-bench-") as directory:
        source = pathlib.Path(directory, "source")
        shutil.copytree(ROOT / "shmpool", source / "shmpool", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
            shutil.copy(ROOT / name, source)
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", directory]
        done = subprocess.run([*command, str(source)], capture_output=True, text=True)
        if done.returncode:
            options.say(f"  left out: the size of the wheel: {done.stderr.strip().splitlines()[-1:]}")
            return []
        (wheel,) = pathlib.Path(directory).glob("*.whl")
        return [
            Line("startup", "the wheel", Spread.of([wheel.stat().st_size / 1024]), " KiB", digits=0),
            Line("startup", "  installed", Spread.of([installed(wheel) / 1024]), " KiB", digits=0),
        ]


def installed(wheel: pathlib.Path) -> int:
    with zipfile.ZipFile(wheel) as archive:
        return sum(entry.file_size for entry in archive.infolist())
