"""What is shown of a pool: `View`s, made of a `PoolStats`, and how they come onto a terminal.

A `View` is a table: rows of texts, some in a style. `pool_views()` makes those of a pool; `print_views()` prints them
as plain lines, `live_screen()` draws them again and again in one place, with `rich`. Every text of a `View` is
printable: what a target or an error of a damaged slab holds cannot steer the terminal.

Not here: what the figures mean (`stats`), the commands (`cli`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .inspector import PoolInfo
from .stats import DOWN, FAILURES, STATES, ConnectionStats, PoolStats, WorkerStats

if TYPE_CHECKING:
    from rich.console import RenderableType

ROWS_MAX = 50  # of a table that is printed and not cut to a screen


@dataclass(frozen=True)
class View:
    """A table: headings (or none), rows, and for each row a style by name. `left` are the columns that hold words."""

    headings: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)
    left: frozenset[int] = frozenset()
    widths: tuple[int, ...] = ()  # at least; so that a live table stands still

    def add(self, *cells: str, style: str = "") -> None:
        """One more row."""
        self.rows.append(tuple(map(printable, cells)))
        self.styles.append(style)

    def cut(self, most: int) -> View:
        """At most that many rows, the last of which tells how many there are not."""
        hidden = len(self.rows) - most
        if hidden <= 0:
            return self
        shown = View(
            self.headings, self.rows[: max(0, most - 1)], self.styles[: max(0, most - 1)], self.left, self.widths
        )
        if most > 0:
            shown.add(f"… {hidden + 1} more", style="dim")
        return shown

    @property
    def height(self) -> int:
        """Lines that it takes."""
        return bool(self.headings) + len(self.rows)


def pools_view(pools: Iterable[PoolInfo]) -> View:
    """A row per pool."""
    view = View(("name", "state", "creator", "connections", "memory", "age", "target"), left=frozenset({0, 1, 6}))
    for info in pools:
        size, created = size_text(info.size), time_text(time.time() - info.created_at)
        if info.error:
            view.add(info.name, "damaged", "", "", size, "", info.error, style="red")
        else:
            down = ", server down" if info.upstream in DOWN else ""
            state = info.state + down if info.alive else "dead"
            style = "dim" if not info.alive else "" if state == "open" else "yellow"
            connections = f"{info.open} of {info.max_connections}"
            cells = (info.name, state, str(info.pid), connections, size, created, info.target)
            view.add(*cells, style=style)
    return view


def pool_views(now: PoolStats, change: PoolStats, *, alive: bool = True) -> list[View]:
    """A pool: its gauges and life as `now` has them, rates and latencies as `change` has them."""
    head = head_view(now, change, alive=alive)
    return [head, summary_view(now, change), workers_view(change), connections_view(now)]


def head_view(now: PoolStats, change: PoolStats | None = None, *, alive: bool = True) -> View:
    """Which pool this is, and, when its rates (`change`) are those of its life, that they are."""
    view = View(left=frozenset({0}))
    age = time_text(time.time() - now.created_at)
    dead = not alive and now.state != "closed"
    state = "dead: no process has it any more" if dead else _STATES.get(now.state, now.state)
    view.add(f"{now.name}  {now.target}  {state}  {age} old", style="bold")
    if change is now:
        view.add(
            "rates and times: of its life, a worker's also of those before it; of now: shmpool top --once",
            style="dim",
        )
    return view


_STATES = {"paused": "paused: callers wait", "draining": "draining: callers are refused"}


def summary_view(now: PoolStats, change: PoolStats) -> View:
    """The totals, a subject per row."""
    view = View(left=frozenset({0, 1}))
    states = [f"{count} {state}" for state, count in now.connections.items() if count and state != "empty"]
    view.add("connections", f"{gauge(now)} {_list_of(states, 'none open')} of {now.max_connections}")
    if now.upstream in DOWN:
        view.add("server", outage_text(now), style="red")
    if missing := missing_text(now):
        view.add("prewarming", missing, style="yellow")
    sources = {
        "own cache": change.hits,
        "shared list": change.freelist,
        "stolen": change.steals,
        "handed over": change.handovers,
        "new": change.dials,
        "spoke again": change.spoken,
    }
    shares = [f"{share_text(count, change.successes)} {source}" for source, count in sources.items() if count]
    view.add("leases", f"{_rate(change, change.successes)}/s: {_list_of(shares, 'none')}")
    waits = [f"{now.waiting} now", f"oldest {time_text(now.oldest_wait)}"] if now.waiting else ["nobody now"]
    view.add("waiting", ", ".join([*waits, f"{_rate(change, change.waits)}/s"]))
    latencies = {
        "get": change.get_latency,
        "wait": change.wait_latency,
        "use": change.use_latency,
        "dial": change.dial_latency,
    }
    times = [f"{what} {time_text(each.p50)} / {time_text(each.p99)}" for what, each in latencies.items() if each.count]
    view.add("p50 / p99", _list_of(times, "nothing was timed"))
    view.add("opened", _opened(now))
    troubles = troubles_of(now)
    view.add("trouble", _list_of(troubles, "none"), style="yellow" if troubles else "")
    return view


def missing_text(now: PoolStats) -> str:
    """What there is to say of a minimum that is not open."""
    there = now.open - now.connections.get("dialing", 0)
    if there >= now.prewarm_target:
        return ""
    if not now.prewarm_done:
        return f"{there} of {now.prewarm_target} are open"
    failed = f"{count_text(now.prewarm_failed)} could not be opened"
    return f"began with {now.prewarm_created} of {now.prewarm_target}: {failed}" if now.prewarm_failed else ""


def outage_text(now: PoolStats) -> str:
    retry = "one dial is under way" if now.upstream == "probing" else f"next dial in {time_text(now.upstream_retry_in)}"
    why = f": {now.upstream_error}" if now.upstream_error else ""
    return f"down for {time_text(now.upstream_down_for)}, {retry}{why}"


def _opened(now: PoolStats) -> str:
    reasons = [f"{count_text(count)} {reason.replace('_', ' ')}" for reason, count in now.closed.items() if count]
    opened = f"{count_text(now.created)}, of {count_text(now.reuse_average)} leases each"
    return f"{opened}; closed: {', '.join(reasons)}" if reasons else opened


def troubles_of(now: PoolStats) -> list[str]:
    counts = {
        **{name.replace("_", " "): getattr(now, name) for name in FAILURES},
        "dead workers": now.recoveries,
        "leases taken back": now.recovered_leases,
        "leaks": now.leaks,
        "leases overdue": now.overdue_leases,
        "failed checks": now.health_failures,
        "failed deposits": now.failed_deposits,
    }
    return [f"{what} {count_text(count)}" for what, count in counts.items() if count]


def gauge(now: PoolStats, width: int = 24) -> str:
    """The slots as a bar: in use, idle, otherwise busy, empty."""
    cap = max(1, now.max_connections)  # no cap is 0, but that of a damaged slab
    cells = width // cap * cap or width
    filled = "█▒░·" if _has("█▒░·") else "#=+."
    marks = zip(filled, (now.in_use, now.idle, now.open - now.in_use - now.idle), strict=False)
    bar, seen, drawn = "", 0, 0
    for mark, count in marks:
        seen += count
        end = min(cells, round(seen / cap * cells))
        bar += mark * (end - drawn)
        drawn = end
    return f"[{bar:{filled[-1]}<{cells}}]"


def _has(text: str) -> bool:
    """Whether standard output can show it."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def workers_view(change: PoolStats, workers: Iterable[WorkerStats] | None = None) -> View:
    """A row per worker, or for those given, the busiest first; those that have ended, marked †, last."""
    headings = ("worker", "held", "idle", "wait", "gets/s", "hit %", "steals/s", "waits/s", "get p50", "p99")
    view = View(headings, widths=(7, 4, 4, 4, 6, 5, 8, 7, 7, 7))
    for worker in sorted(
        change.workers if workers is None else workers, key=lambda each: (not each.alive, -each.gets, each.index)
    ):
        view.add(*_worker_cells(worker, change), style="" if worker.alive else "dim")
    return view


def _worker_cells(worker: WorkerStats, change: PoolStats) -> tuple[str, ...]:
    gets, timed = worker.gets, worker.get_latency
    return (
        f"{'' if worker.alive else '†'}{worker.pid}",
        str(worker.held),
        str(worker.cached),
        str(worker.waiting),
        _rate(change, gets),
        f"{worker.hit_rate:.1%}".removesuffix("%") if worker.successes else "-",
        _rate(change, worker.counters.get("steals", 0)),
        _rate(change, worker.counters.get("waits", 0)),
        time_text(timed.p50) if timed.count else "-",
        time_text(timed.p99) if timed.count else "-",
    )


def connections_view(now: PoolStats) -> View:
    """A row per connection, what is in use first; ~ marks the process in whose cache an idle one lies."""
    headings = ("conn", "state", "holder", "age", "since", "uses", "peer")
    view = View(headings, left=frozenset({1, 6}), widths=(7, 8, 7, 7, 7, 7))
    order = {state: place for place, state in enumerate(("leased", "offered", *STATES))}
    for slot in sorted(now.slots, key=lambda each: (order.get(each.state, 99), -(each.since or 0), each.index)):
        style = "green" if slot.state == "leased" else "" if slot.state == "idle" else "yellow"
        view.add(*_connection_cells(slot), style=style)
    return view


def _connection_cells(slot: ConnectionStats) -> tuple[str, ...]:
    holder = str(slot.holder or "-") if slot.cached_by is None else f"~{slot.cached_by}"
    kind = "" if slot.protocol in ("tcp", "unix", "") else f" {slot.protocol}"
    return (
        str(slot.id),
        slot.state,
        holder,
        "-" if slot.age is None else time_text(slot.age),
        "-" if slot.since is None else time_text(slot.since),
        count_text(slot.uses),
        " ".join(filter(None, (slot.peer + kind, *slot.flags))),
    )


def _list_of(parts: Sequence[str], nothing: str) -> str:
    return ", ".join(parts) or nothing


def _rate(change: PoolStats, count: int) -> str:
    return count_text(change.per_second(count))


# Figures as texts ---------------------------------------------------------------------------------------------------


def time_text(seconds: float) -> str:
    """At most seven characters: 65 ns, 12.3 µs, 1.2 s, 3m12s, 2h05m, 3d04h."""
    for unit, scale in (("ns", 1e9), ("µs", 1e6), ("ms", 1e3), ("s", 1.0)):
        value = seconds * scale
        if value < (999.5 if unit != "s" else 59.5):
            return f"{_three_digits(value)} {unit}"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02}h"
    return f"{hour}h{minute:02}m" if hour else f"{minute}m{second:02}s"


def count_text(count: float) -> str:
    """At most seven characters: 0, 0.25, 7, 12,345, 1.23 M."""
    if count < 10:
        return f"{count:.2f}".rstrip("0").rstrip(".")
    if count < 99_999.5:
        return f"{round(count):,}"
    for unit, scale in (("k", 1e3), ("M", 1e6), ("G", 1e9)):
        if count / scale < 999.5:
            return f"{_three_digits(count / scale)} {unit}"
    return f"{count:.3g}"


def size_text(size: float) -> str:
    """Bytes: 512 B, 2.09 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if size < 999.5:
            return f"{_three_digits(size)} {unit}"
        size /= 1024
    return f"{_three_digits(size)} GiB"


def share_text(part: float, whole: float) -> str:
    """98.2 %"""
    return f"{part / whole if whole else 0:.1%}".replace("%", " %")


def _three_digits(value: float) -> str:
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.{1 if value >= 9.995 else 2}f}".rstrip("0").rstrip(".")


def printable(text: str) -> str:
    """A target or an error may hold what a terminal would obey."""
    return "".join(each if each.isprintable() else "?" for each in text)


# Showing it: plain --------------------------------------------------------------------------------------------------


def print_views(views: Sequence[View]) -> None:
    """Plain lines on standard output, a blank one between the views."""
    print("\n\n".join("\n".join(plain_lines(view.cut(ROWS_MAX))) for view in views if view.rows))


def plain_lines(view: View) -> Iterator[str]:
    """The lines of a view, columns under each other. What stands in the first column alone takes the line."""
    table = [view.headings, *view.rows] if view.headings else view.rows
    whole = [row for row in table if len(row) > 1]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    for row in table:
        if len(row) == 1:
            yield row[0]
            continue
        cells = (
            text.ljust(width) if at in view.left else text.rjust(width)
            for at, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


# Showing it: with rich, live ----------------------------------------------------------------------------------------


def on_a_terminal() -> bool:
    """Whether standard output is a terminal that can move its cursor."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def can_draw() -> bool:
    """Whether a live picture is possible: on such a terminal, with `pip install 'shmpool[cli]'`."""
    return on_a_terminal() and importlib.util.find_spec("rich") is not None


@contextlib.contextmanager
def live_screen(*, alternate: bool) -> Iterator[Callable[[Sequence[View]], None]]:
    """A function that draws views in place of those before, cut to the terminal; needs rich.

    No thread is started, so forking meanwhile is safe.
    """
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    with Live(console=console, screen=alternate, auto_refresh=False, vertical_overflow="crop") as live:

        def draw(views: Sequence[View]) -> None:
            height = console.size.height - (0 if alternate else 1)
            live.update(_picture(fit(views, height)), refresh=True)

        yield draw


def fit(views: Sequence[View], height: int) -> list[View]:
    """The views in at most `height` lines: those with headings give rows, the longest first."""
    fitted = list(views)

    def excess() -> int:
        shown = [view.height for view in fitted if view.rows]
        return sum(shown) + len(shown) - 1 - height

    while excess() > 0:
        longest = max((view for view in fitted if view.headings), key=lambda view: len(view.rows), default=None)
        if longest is None or len(longest.rows) <= 2:
            break
        at = fitted.index(longest)
        original = next(view for view in views if view.headings == longest.headings)
        fitted[at] = original.cut(len(longest.rows) - 1)
    return fitted


def _picture(views: Sequence[View]) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    for view in filter(lambda each: each.rows, views):
        parts.extend([Text("")] if parts else [])
        parts.append(_rich_table(view))
    return Group(*parts)


def _rich_table(view: View) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    width = max((len(row) for row in view.rows), default=len(view.headings))
    table = Table(
        box=None, show_header=bool(view.headings), header_style="bold cyan", pad_edge=False, padding=(0, 2, 0, 0)
    )
    for at in range(width):
        heading = view.headings[at] if view.headings else ""
        label = not view.headings and width > 1 and at == 0
        table.add_column(
            heading,
            min_width=view.widths[at] if at < len(view.widths) else None,
            justify="left" if at in view.left else "right",
            style="dim" if label else None,
            no_wrap=True,
            overflow="ellipsis",
        )
    for row, style in zip(view.rows, view.styles, strict=True):
        table.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in row), style=style or None)
    return table
