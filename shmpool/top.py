"""`shmpool top`: a live view of one pool that is looked at, sorted, filtered and steered with keys; made with Textual.

    shmpool top redis                   # or top.run("redis", interval=1.0)

Needs `pip install 'shmpool[cli]'`; importing this module without it is an ImportError that says so.

A timer takes a `Look` at each interval: a snapshot, and what has happened since the one before. Of a look come the
lines of the summary and the rows of each table that is shown. `Lines` draws such lines and tells Textual which parts
of them differ from those on the screen, so that a second costs what has changed in it. A terminal that has room for
all tables has them all; a smaller one has the table that was chosen, and columns go, the least important first, before
a figure is cut. Only words are ever cut, and end with "…" then.

Invariants: the segment is mapped read-only; what changes the pool is a function of `steering`, called in a thread,
after a dialog that names what will happen. A frozen picture goes on looking: its history has no hole, and the end of
the pool is seen. No text from a slab or a process reaches the terminal but through `printable`.

Not here: the commands, and what is shown without a terminal or without Textual (`cli`, `views`); what the figures mean
(`stats`), what a change does (`steering`).
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

try:
    from rich.cells import cell_len, set_cell_size
    from rich.segment import Segment
    from rich.style import Style
    from textual import events, work
    from textual.app import App, ComposeResult
    from textual.binding import Binding, BindingType
    from textual.containers import Container, Vertical
    from textual.geometry import Region
    from textual.message import Message
    from textual.screen import ModalScreen, Screen
    from textual.strip import Strip
    from textual.widget import Widget
    from textual.widgets import Input, OptionList, Static
    from textual.widgets.option_list import Option
except ModuleNotFoundError as missing:
    raise ImportError("the view with keys needs textual: pip install 'shmpool[cli]'") from missing

from . import steering
from .errors import PoolError
from .events import Event
from .inspector import Inspector, inspect, list_pools
from .stats import DOWN, KINDS, STATES, ConnectionStats, PoolStats, WorkerStats
from .views import (
    count_text,
    missing_text,
    outage_text,
    plain_lines,
    pools_view,
    printable,
    share_text,
    time_text,
    troubles_of,
)

__all__ = ["run"]

HISTORY_S = 120.0  # what a sparkline shows, about
SAMPLES_MAX = 600  # of a sparkline; with a short interval it shows less than HISTORY_S
EVENTS_MAX = 300  # that are kept for the table
TALL_ROWS, TALL_COLUMNS, WIDE_ROWS, WIDE_COLUMNS = 34, 100, 30, 170  # what all tables need: above, beside each other
ROWS_OF_SUMMARY = 16  # with fewer it is two lines

GROUND, RAISED, CHOSEN = "#0d1117", "#161b22", "#1f3a5f"
STYLES = {
    name: Style.parse(f"{look} on {GROUND}")
    for name, look in {
        "": "#c9d1d9",
        "strong": "bold #f0f6fc",
        "dim": "#8b949e",
        "faint": "#484f58",
        "head": "bold #58a6ff",
        "good": "#3fb950",
        "calm": "#39c5cf",
        "warn": "#d29922",
        "bad": "bold #f85149",
        "key": "bold #58a6ff",
    }.items()
}
STYLES |= {f"{name}+": style + Style(bgcolor=CHOSEN) for name, style in STYLES.items()}  # of a chosen row
STYLES["tab"] = STYLES["strong+"]


class Part(NamedTuple):
    """A piece of a line; `style` is a name in STYLES."""

    text: str
    style: str = ""


Line = tuple[Part, ...]


def run(name: str | None, interval: float = 1.0) -> str:
    """Show the pool of that name, or with None let the user choose one, until its end or a key.

    `interval` is in seconds. Returns what there is to say of the end; "" when the user ended it. Raises as
    `shmpool.inspect()`.
    """
    app = Top(None if name is None else inspect(name), interval)
    often, *seldom = gc.get_threshold()
    gc.set_threshold(100 * often, *seldom)  # a snapshot is thousands of tuples, and none of them in a cycle
    try:
        said = app.run()
    finally:
        gc.set_threshold(often, *seldom)
        app.let_go()
    if app.failure is not None:
        raise app.failure
    if app.return_code:  # it has shown what went wrong
        raise SystemExit(app.return_code)
    return said or ""


# Looking ------------------------------------------------------------------------------------------------------------


class Look(NamedTuple):
    """A pool: its gauges, and what has happened since the look before, are `now`; its life's counters are `life`."""

    now: PoolStats
    life: PoolStats
    alive: bool


class Looks:
    """Takes looks at a pool, each the change since the one before."""

    def __init__(self, inspector: Inspector) -> None:
        self._inspector = inspector
        self._earlier: PoolStats | None = None

    def take(self) -> Look:
        """The first look has an interval of 0, and no change."""
        life = self._inspector.stats()
        now = life.diff(self._earlier or life)
        self._earlier = life
        return Look(now, life, self._inspector.alive)


class Processes:
    """What the processes of a pool are called; the last name that one had is kept when it has ended."""

    def __init__(self) -> None:
        self._names: dict[tuple[int, int], str] = {}
        self._stopped: set[int] = set()

    def update(self, workers: Iterable[WorkerStats]) -> None:
        """Read the names of those that live, since a process may change its own, and whether they are stopped."""
        living = [worker for worker in workers if worker.alive]
        for worker in living:
            self._names[worker.index, worker.generation] = process_name(worker.pid)
        self._stopped = {worker.pid for worker in living if is_stopped(worker.pid)}

    def state(self, worker: WorkerStats) -> Cell:
        """Alive, stopped (by SIGSTOP, or a debugger), or ended."""
        if not worker.alive:
            return Cell("ended", 2)
        return Cell("stopped", 1, "bad") if worker.pid in self._stopped else Cell("alive", 0, "good")

    def name(self, worker: WorkerStats) -> str:
        """ "" when it was never seen alive."""
        return self._names.get((worker.index, worker.generation), "")


def process_name(pid: int) -> str:
    """What it runs: of an interpreter the script or module, else the title that it set itself, or the program."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as file:
            words = (file.read(4096) or b"").decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return ""
    program = words[0].rpartition("/")[2]
    if not program.startswith("python"):
        return printable(words[0] if " " in words[0] else program)
    if "-m" in words[:-1]:
        return printable(words[words.index("-m") + 1])
    script = next((word for word in words[1:] if not word.startswith("-")), "")
    return printable(program if "-c" in words or not script else script.rpartition("/")[2])


def is_stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            return (file.read(512) or b"").rpartition(b") ")[2][:1] in (b"T", b"t")
    except OSError:
        return False


class Sample(NamedTuple):
    """What the sparklines are made of."""

    leases: float  # a second
    in_use: float
    waiting: float
    p99: float  # seconds; 0 when no call was timed


class History:
    """The last samples, and their sparklines."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._samples: deque[Sample] = deque(maxlen=SAMPLES_MAX)
        self._count = 0

    def add(self, change: PoolStats) -> None:
        leases = change.per_second(change.successes)
        self._samples.append(Sample(leases, change.in_use, change.waiting, change.get_latency.p99))
        self._count += 1

    def spans(self, field: str, width: int) -> list[float]:
        """The greatest values of `width` spans of time, the last of which is under way."""
        size = max(1, min(SAMPLES_MAX // width, round(HISTORY_S / (width * self._interval))))
        values = [getattr(sample, field) for sample in self._samples]
        first = -((self._count - len(values)) % size)  # spans stand still while samples come
        return [max(values[max(0, at) : at + size]) for at in range(first, len(values), size)][-width:]


def sparkline(values: Sequence[float], width: int, most: float) -> str:
    """The values from the right, as bars up to `most`; zero is the lowest, and only zero is."""
    bars = "▁▂▃▄▅▆▇"
    heights = (0 if value <= 0 or most <= 0 else min(6, math.ceil(value / most * 6)) for value in values)
    return "".join(bars[height] for height in heights).rjust(width)


# The summary --------------------------------------------------------------------------------------------------------

LABEL, FIGURE = 10, 7
_STATES = ("leased", "idle", *(state for state in STATES if state not in ("leased", "idle", "empty")))


def summary(look: Look, history: History, width: int, *, frozen: bool) -> list[Line]:
    """Seven lines: which pool, its connections, four figures with their history, and what is wrong."""
    now = look.now
    chart = max(8, min(60, (width - LABEL - FIGURE) * 2 // 5))
    sources = {
        "own cache": now.hits,
        "shared list": now.freelist,
        "stolen": now.steals,
        "handed over": now.handovers,
        "new": now.dials,
        "spoke again": now.spoken,
    }
    shares = [f"{share_text(count, now.successes)} {source}" for source, count in sources.items() if count]
    states = [f"{now.connections[state]} {state}" for state in _STATES if now.connections.get(state)]
    use, wait, dial = now.use_latency, now.wait_latency, now.dial_latency

    def plotted(label: str, text: str, field: str, style: str, notes: Iterable[str], most: float = 0.0) -> Line:
        values = history.spans(field, chart)
        peak = max(values, default=0.0)
        top = [f"peak {time_text(peak) if field == 'p99' else count_text(peak)}"] if peak else []
        bars = sparkline(values, chart, most or peak)
        return _summary_line(label, text, (Part(bars, style),), [*top, *notes], width)

    queue = [f"oldest {time_text(now.oldest_wait)}"] if now.waiting else []
    queue += [f"{_rate(now, now.waits)} waits/s"]
    queue += [f"waited p50 {time_text(wait.p50)}, p99 {time_text(wait.p99)}"] if wait.count else []
    used = [f"leased p50 {time_text(use.p50)}, p99 {time_text(use.p99)}"] if use.count else []
    used += [f"{count_text(look.life.reuse_average)} leases a connection"]
    timed = now.get_latency
    got = [f"p50 {time_text(timed.p50)}"] if timed.count else []
    got += [f"dial p99 {time_text(dial.p99)}"] if dial.count else []
    return [
        _head(now, width, alive=look.alive, frozen=frozen),
        _summary_line(
            "open", f"{now.open}/{now.max_connections}", _gauge(now, chart), [", ".join(states) or "none"], width
        ),
        plotted("in use", share_text(now.utilisation, 1), "in_use", "good", used, now.max_connections),
        plotted("leases/s", _rate(now, now.successes), "leases", "calm", shares),
        plotted("waiting", str(now.waiting), "waiting", "warn", queue),
        plotted("get p99", time_text(timed.p99) if timed.count else "-", "p99", "calm", got),
        _alerts(look, width),
    ]


def _summary_line(label: str, figure: str, chart: Line, notes: Iterable[str], width: int) -> Line:
    start = (Part(f" {label:<{LABEL - 1}}", "dim"), Part(f"{figure:>{FIGURE}} ", "strong"), *chart, Part("  "))
    return (*start, Part(_that_fit(notes, width - _length(start) - 1), "dim"))


def _head(now: PoolStats, width: int, *, alive: bool, frozen: bool) -> Line:
    state, style = now.state, {"open": "good", "closed": "bad"}.get(now.state, "warn")
    if now.upstream in DOWN and state == "open":
        state, style = "server down", "bad"
    if not alive:
        state, style = "dead", "bad"
    limit = f" (up to {now.resize_limit})" if now.resize_limit > now.max_connections else ""
    facts = f"  up {time_text(time.time() - now.created_at)}  cap {now.max_connections}{limit}"
    stopped = (Part("  "), Part(" frozen ", "tab")) if frozen else ()
    start = (Part(f" {printable(now.name)}", "strong"), Part(f"  ● {state}", style), *stopped, Part(facts))
    return (*start, Part(_cut(f"  {printable(now.target)}", width - _length(start) - 1), "dim"))


def _alerts(look: Look, width: int) -> Line:
    """What is wrong now; or what was, since the pool began."""
    now = look.now
    room = width - LABEL - 2
    label = Part(f" {'trouble':<{LABEL - 1}}", "dim")
    if now.upstream in DOWN:
        return label, Part(_cut(f" server {printable(outage_text(now))}", room), "bad")
    if now.state == "paused":
        return label, Part(_cut(" paused: callers wait; p resumes it", room), "warn")
    if now.state == "draining":
        return label, Part(_cut(" draining: callers are refused; p resumes it", room), "warn")
    if lacking := missing_text(now):
        return label, Part(_cut(f" prewarming: {lacking}", room), "warn")
    troubles = troubles_of(look.life)
    if not troubles:
        return label, Part(" none", "dim")
    since = " since it began: " if room > 40 else " "
    return label, Part(since, "dim"), Part(_that_fit(troubles, room - len(since)), "warn")


def _gauge(now: PoolStats, width: int) -> Line:
    """The slots as a bar: in use, idle, otherwise busy, empty."""
    counts = (now.in_use, "good"), (now.idle, "calm"), (now.open - now.in_use - now.idle, "warn")
    parts, seen, drawn = [], 0, 0
    for count, style in counts:
        seen += count
        end = min(width, math.ceil(seen / max(1, now.max_connections) * width) if count else drawn)
        parts.append(Part("▇" * max(0, end - drawn), style))
        drawn = max(drawn, end)
    return (*parts, Part("·" * (width - drawn), "faint"))


def _rate(change: PoolStats, count: int) -> str:
    return count_text(change.per_second(count))


def _length(line: Iterable[Part]) -> int:
    return sum(_width(part.text) for part in line)


def _width(text: str) -> int:
    """In columns of the terminal; most texts are plain, and quickly measured."""
    return len(text) if text.isascii() else cell_len(text)


def _filled(text: str, width: int) -> str:
    return text.ljust(width) if text.isascii() else set_cell_size(text, width)


def _cut(text: str, width: int) -> str:
    """The text, or its beginning and "…"."""
    if _width(text) <= width:
        return text
    return set_cell_size(text, width - 1) + "…" if width > 0 else ""


def _that_fit(parts: Iterable[str], width: int) -> str:
    """As many of them as there is room for, whole."""
    text = ""
    for part in parts:
        longer = f"{text}, {part}" if text else part
        if _width(longer) > width:
            break
        text = longer
    return text


# Tables: what they show ---------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A text, what it is sorted by, and the name of a style, or "" for that of its row."""

    text: str
    value: Any
    style: str = ""


class Row(NamedTuple):
    """`key` is what it is known by from look to look. Rows that are `over` come last."""

    key: Hashable
    cells: tuple[Cell, ...]
    style: str = ""
    over: bool = False


@dataclass(frozen=True)
class Column:
    """`rank`: of those for which there is no room the greatest go first, 0 never. `least`: words, cut to no less."""

    heading: str
    rank: int = 0
    least: int = 0
    is_found: bool = False  # the filter looks here

    @property
    def has_words(self) -> bool:
        return self.least > 0


WORKERS = (
    Column("pid", is_found=True),
    Column("process", rank=2, least=8, is_found=True),
    Column("state", rank=9, least=7, is_found=True),
    Column("held"),
    Column("idle"),
    Column("wait"),
    Column("gets/s"),
    Column("hit %", rank=1),
    Column("steal/s", rank=5),
    Column("get p50", rank=4),
    Column("p99", rank=1),
    Column("error/s", rank=3),
    Column("use p99", rank=8),
    Column("age", rank=7),
)
CONNECTIONS = (
    Column("id", is_found=True),
    Column("state", least=8, is_found=True),
    Column("holder", is_found=True),
    Column("since"),
    Column("age", rank=3),
    Column("uses", rank=2),
    Column("proto", rank=5, least=5, is_found=True),
    Column("peer", rank=1, least=21, is_found=True),
    Column("checked", rank=6),
    Column("flags", rank=4, least=5, is_found=True),
)
WAITERS = (
    Column("waits for"),
    Column("pid", is_found=True),
    Column("thread", is_found=True),
    Column("process", rank=1, least=8, is_found=True),
    Column("wants", rank=3, least=4, is_found=True),
    Column("state", rank=2, least=7, is_found=True),
)
EVENTS = (
    Column("time"),
    Column("pid", rank=1, is_found=True),
    Column("event", least=11, is_found=True),
    Column("what", least=12, is_found=True),
)


def worker_rows(look: Look, processes: Processes) -> Iterator[Row]:
    change = look.now
    for worker in change.workers:
        timed, used = worker.get_latency, worker.use_latency
        failed = worker.gets - worker.successes + worker.counters.get("errors", 0)
        cells = (
            Cell(f"{'' if worker.alive else '†'}{worker.pid}", worker.pid),
            Cell(processes.name(worker), processes.name(worker), "dim"),
            processes.state(worker),
            _number(worker.held, "good"),
            _number(worker.cached, "calm"),
            _number(worker.waiting, "warn"),
            _per_second(change, worker.gets),
            Cell(f"{worker.hit_rate * 100:.1f}" if worker.successes else "-", worker.hit_rate),
            _per_second(change, worker.counters.get("steals", 0)),
            _seconds(timed.p50 if timed.count else None),
            _seconds(timed.p99 if timed.count else None),
            _per_second(change, failed, "bad"),
            _seconds(used.p99 if used.count else None),
            _seconds(worker.age if worker.alive else None),
        )
        yield Row((worker.index, worker.generation), cells, "" if worker.alive else "faint", not worker.alive)


def connection_rows(look: Look) -> Iterator[Row]:
    order = {state: place for place, state in enumerate(("empty", "idle", "retiring", "checking", "dialing"))}
    for slot in look.now.slots:
        holder, mark = (slot.holder, "") if slot.cached_by is None else (slot.cached_by, "~")
        style = {"leased": "good", "idle": "calm"}.get(slot.state, "warn")
        cells = (
            Cell(str(slot.id), slot.id),
            Cell(slot.state, (order.get(slot.state, 9), slot.since or 0.0), style),
            Cell(f"{mark}{holder}" if holder else "-", holder or 0, "dim" if mark else ""),
            _seconds(slot.since),
            _seconds(slot.age),
            Cell(count_text(slot.uses), slot.uses),
            Cell(_protocol(slot), _protocol(slot), "dim"),
            Cell(printable(slot.peer), slot.peer),
            _seconds(slot.checked),
            Cell(" ".join(slot.flags), slot.flags, "warn"),
        )
        yield Row(slot.id, cells)


def _protocol(slot: ConnectionStats) -> str:
    return f"{slot.protocol}{slot.ip_version or ''}"


def waiter_rows(look: Look, processes: Processes) -> Iterator[Row]:
    by_pid = {worker.pid: worker for worker in look.now.workers}
    for waiter in look.now.waiters:
        worker = by_pid.get(waiter.pid or 0)
        name = processes.name(worker) if worker else ""
        wants = "any" if waiter.wants == KINDS else " ".join(waiter.wants)
        cells = (
            _seconds(waiter.waited, "warn"),
            Cell(str(waiter.pid or "-"), waiter.pid or 0),
            Cell(str(waiter.thread), waiter.thread),
            Cell(name, name, "dim"),
            Cell(wants, wants, "dim"),
            Cell(waiter.state, waiter.state, "dim"),
        )
        yield Row((waiter.pid, waiter.thread), cells)


_EVENT_STYLES = {
    **dict.fromkeys(("died", "down"), "bad"),
    **dict.fromkeys(("dial_failed", "discarded", "overdue"), "warn"),
    **dict.fromkeys(("up", "joined"), "good"),
    **dict.fromkeys(("state", "resized", "evicted"), "calm"),
}


def event_row(event: Event) -> Row:
    style, text = _EVENT_STYLES.get(event.kind, "dim"), printable(event.describe())
    cells = (
        Cell(time.strftime("%H:%M:%S", time.localtime(event.time)), event.number, "dim"),
        Cell(str(event.pid), event.pid),
        Cell(event.kind, event.kind, style),
        Cell(text, text),
    )
    return Row(event.number, cells)


def _number(count: int, style: str) -> Cell:
    return Cell(str(count), count, style if count else "faint")


def _per_second(change: PoolStats, count: int, style: str = "") -> Cell:
    return Cell(_rate(change, count), count, style if count else "faint")


def _seconds(seconds: float | None, style: str = "") -> Cell:
    return Cell("-", -1.0, "faint") if seconds is None else Cell(time_text(seconds), seconds, style)


# Widgets ------------------------------------------------------------------------------------------------------------


class Lines(Widget):
    """Lines of text; what is put in the place of others is drawn where it differs from them."""

    ALLOW_SELECT = False

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._lines: list[Line] = []

    def put(self, lines: Sequence[Line]) -> None:
        """Show these."""
        pairs = itertools.zip_longest(self._lines, lines, fillvalue=())
        changed = [self._difference(y, old, new) for y, (old, new) in enumerate(pairs) if old != new]
        self._lines = list(lines)
        if changed:
            self.refresh(*changed)

    def _difference(self, y: int, old: Line, new: Line) -> Region:
        """Between the first part that differs and the last, when all have kept their places; else the line."""
        width = self.size.width
        if [len(part.text) for part in old] != [len(part.text) for part in new]:
            return Region(0, y, width, 1)
        ends = list(itertools.accumulate((_width(part.text) for part in new), initial=0))
        differing = [at for at, (one, other) in enumerate(zip(old, new, strict=True)) if one != other]
        first, last = ends[differing[0]], min(width, ends[differing[-1] + 1])
        return Region(first, y, max(1, last - first), 1)

    def render_line(self, y: int) -> Strip:
        line = self._lines[y] if y < len(self._lines) else ()
        segments = [Segment(part.text, STYLES[part.style]) for part in line if part.text]
        return Strip(segments).adjust_cell_length(self.size.width, STYLES[""])


class Table(Lines):
    """Rows under headings: sorted, filtered, moved through. The chosen row is known by its key, wherever it moves."""

    def __init__(self, name: str, columns: tuple[Column, ...], sorted_by: str) -> None:
        super().__init__(id=name, classes="table")
        self.columns = columns
        self.sorted_by = [column.heading for column in columns].index(sorted_by)
        self.descending = True
        self.words: list[str] = []  # of the filter, in lower case
        self.chosen: Hashable = None
        self.rows: list[Row] = []  # sorted and filtered
        self._all: list[Row] = []
        self._top = 0
        self._widths = [len(column.heading) for column in columns]  # they only grow, so that the table stands still
        self._places: list[tuple[int, int]] = []  # the columns that are shown, and their widths
        self._gap = 1

    def show(self, rows: Iterable[Row]) -> None:
        """The rows as they are now."""
        self._all = list(rows)
        self.redraw()

    def redraw(self) -> None:
        """Sort, filter and draw the rows again."""
        found = [row for row in self._all if self._has_words(row)]
        found.sort(key=lambda row: row.cells[self.sorted_by].value, reverse=self.descending)
        self.rows = sorted(found, key=lambda row: row.over)
        at = self._position()
        if at is not None:
            self._top = min(max(self._top, at - self.room + 1), at)
        self._top = max(0, min(self._top, len(self.rows) - self.room))
        shown = self.rows[self._top : self._top + self.room]
        self._measure(shown)
        self.put([self._headings(), *map(self._line, shown)])

    @property
    def room(self) -> int:
        """For so many rows."""
        return max(1, self.size.height - 1)

    def note(self, width: int) -> str:
        """What of it is not to be seen, if anything."""
        last = min(len(self.rows), self._top + self.room)
        notes = [f"{self._top + 1}–{last} of {len(self.rows)}"] if len(self.rows) > self.room else []
        if len(self.rows) < len(self._all):
            notes.append(f"{len(self.rows)} of {len(self._all)} match")
        if hidden := len(self.columns) - len(self._places):
            notes.append(f"{hidden} more column{'' if hidden == 1 else 's'} when wider")
        return _that_fit(notes, width)

    def move(self, by: int) -> None:
        """Choose another row, so many further; the first or last when there are no more. With none, the first."""
        if not self.rows:
            return
        at = self._position()
        at = 0 if at is None and abs(by) == 1 else (at or 0) + by
        self.chosen = self.rows[max(0, min(at, len(self.rows) - 1))].key
        self.redraw()

    def sort_by(self, column: int) -> None:
        """By that column; once more, the other way round. Figures begin with the greatest, words with the first."""
        same = column == self.sorted_by
        self.descending = not self.descending if same else not self.columns[column].has_words
        self.sorted_by = column
        self.redraw()

    def sort_next(self, step: int) -> None:
        """By the column beside it, of those that are shown."""
        shown = [column for column, _ in self._places]
        at = shown.index(self.sorted_by) if self.sorted_by in shown else 0
        self.sort_by(shown[(at + step) % len(shown)])

    def _position(self) -> int | None:
        return next((at for at, row in enumerate(self.rows) if row.key == self.chosen), None)

    def _has_words(self, row: Row) -> bool:
        if not self.words:
            return True
        found = " ".join(cell.text for cell, column in zip(row.cells, self.columns, strict=True) if column.is_found)
        return all(word in found.lower() for word in self.words)

    def _measure(self, rows: Sequence[Row]) -> None:
        """Which columns there is room for, and where."""
        for row in rows:
            for at, cell in enumerate(row.cells):
                self._widths[at] = max(self._widths[at], _width(cell.text))
        least = [
            min(width, max(column.least, len(column.heading))) if column.has_words else width
            for width, column in zip(self._widths, self.columns, strict=True)
        ]
        marked = len(self.columns[self.sorted_by].heading) + 1
        least[self.sorted_by] = max(least[self.sorted_by], marked)
        chosen = list(range(len(self.columns)))
        room = self.size.width - 1  # the gap before a column is in front of the first one too
        while sum(least[at] + 1 for at in chosen) > room and any(self.columns[at].rank for at in chosen):
            chosen.remove(max(chosen, key=lambda at: self.columns[at].rank))
        self._gap = 2 if sum(self._widths[at] + 2 for at in chosen) <= room else 1
        spare = room - sum(least[at] + self._gap for at in chosen)
        self._places = []
        for at in chosen:
            more = max(0, min(spare, self._widths[at] - least[at]))
            spare -= more
            self._places.append((at, least[at] + more))

    def _headings(self) -> Line:
        parts = []
        for at, width in self._places:
            column, mark = self.columns[at], " "
            if at == self.sorted_by:
                mark = "▼" if self.descending else "▲"
            text = f"{mark}{column.heading}"  # the mark stands in the gap
            placed = text.ljust(width + 1) if column.has_words else text.rjust(width + 1)
            parts.append(Part(" " * (self._gap - 1) + placed, "strong" if at == self.sorted_by else "head"))
        return tuple(parts)

    def _line(self, row: Row) -> Line:
        chosen = "+" if row.key == self.chosen else ""
        parts = []
        for at, width in self._places:
            cell = row.cells[at]
            text = _filled(_cut(cell.text, width), width) if self.columns[at].has_words else cell.text.rjust(width)
            parts.append(Part(" " * self._gap + text, (row.style or cell.style) + chosen))
        used = sum(self._gap + width for _, width in self._places)
        return (*parts, Part(" " * max(0, self.size.width - used), chosen))

    def on_resize(self) -> None:
        self.redraw()
        self.post_message(self.Resized())

    def on_click(self, event: events.Click) -> None:
        """On a heading: sort by it; on a row: choose it."""
        self.post_message(self.Touched(self))
        if event.y > 0:
            at = self._top + event.y - 1
            self.chosen = self.rows[at].key if at < len(self.rows) else None
            self.redraw()
            return
        end = 0
        for column, width in self._places:
            end += self._gap + width
            if event.x < end:
                self.sort_by(column)
                return

    def on_mouse_scroll_down(self) -> None:
        self._scroll(3)

    def on_mouse_scroll_up(self) -> None:
        self._scroll(-3)

    def _scroll(self, by: int) -> None:
        self.chosen = None  # else it would be brought back into sight
        self._top += by
        self.redraw()

    class Resized(Message):
        """There is room for other rows and columns."""

    class Touched(Message):
        """Somebody clicked on it."""

        def __init__(self, table: Table) -> None:
            super().__init__()
            self.table = table


# Screens ------------------------------------------------------------------------------------------------------------


class Question(NamedTuple):
    """What a key is about to do. `does` does it and returns what has happened."""

    title: str
    text: str
    does: Callable[[], str]


class Dialog(ModalScreen[bool]):
    """A question, or with `answers` "" a text; what is no answer closes it and does nothing."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("y", "answer(True)"), Binding("n,escape,q,enter", "answer(False)")]

    def __init__(self, title: str, text: str, answers: str) -> None:
        super().__init__()
        self._title, self._text, self._answers = title, text, answers

    def compose(self) -> ComposeResult:
        box = Vertical(Static(self._text, markup=False), id="dialog")
        box.border_title, box.border_subtitle = self._title, self._answers
        yield box

    def action_answer(self, answer: bool) -> None:
        self.dismiss(answer)


class Chooser(Screen[str]):
    """Which of the pools."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("q,escape", "app.end")]

    def compose(self) -> ComposeResult:
        pools = list_pools()
        heading, *lines = plain_lines(pools_view(pools))
        yield Static(f"   {heading}", id="heading", markup=False)
        names = [info.name for info in pools]
        yield OptionList(*(Option(line, id=name) for name, line in zip(names, lines, strict=True)), markup=False)
        yield Static(" ↑ ↓ and enter choose a pool, q quits", id="help", markup=False)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(event.option.id or "")


KEYS = (
    ("1 2 3 4, tab", "the workers, connections, waiters, events; the next table"),
    ("arrows ↑ ↓", "choose a row, as a click does; also pages, home, end"),
    ("<  >  r", "sort by the column beside; the other way round"),
    ("/", "show the rows that have these words, as a pid or state"),
    ("esc", "all rows again, none of them chosen"),
    ("space", "freeze the picture; go on"),
    ("p", "pause the pool: callers wait; resume it"),
    ("e", "evict the chosen connection"),
    ("E", "evict all idle connections"),
    ("R", "recover what dead processes held"),
    ("q, ctrl+c", "end this view; the pool does not notice"),
)
LEGEND = (
    "p e E R ask before they do it. Rates, hit % and times are of the last interval. † marks a process that has "
    "ended, ~ the one in whose cache an idle connection lies. A sparkline has two minutes, the newest on the right."
)
HINTS = (
    ("?", "help"),
    ("q", "quit"),
    ("tab", "table"),
    ("↑↓", "row"),
    ("< >", "sort"),
    ("r", "reverse"),
    ("/", "filter"),
    ("space", "freeze"),
    ("p", "pause"),
    ("e E", "evict"),
    ("R", "recover"),
)


class Board(Screen[None]):
    """The view of one pool."""

    AUTO_FOCUS: ClassVar[str | None] = ""  # else the filter would have the keys
    BINDINGS: ClassVar[list[BindingType]] = [
        *(Binding(str(number + 1), f"table({number})") for number in range(4)),
        Binding("tab", "next_table(1)", priority=True),
        Binding("shift+tab", "next_table(-1)", priority=True),
        Binding("down,j", "move(1)"),
        Binding("up,k", "move(-1)"),
        Binding("pagedown", "page(1)"),
        Binding("pageup", "page(-1)"),
        Binding("home", "move(-1000000)"),
        Binding("end", "move(1000000)"),
        Binding("less_than_sign,left", "sort(-1)"),
        Binding("greater_than_sign,right", "sort(1)"),
        Binding("r", "reverse"),
        Binding("slash", "filter"),
        Binding("escape", "clear"),
        Binding("space", "freeze"),
        Binding("p", "pause"),
        Binding("e", "evict"),
        Binding("E", "evict_idle"),
        Binding("R", "recover"),
        Binding("question_mark", "help"),
        Binding("q", "app.end"),
    ]

    def __init__(self, inspector: Inspector, interval: float, failed: Callable[[PoolError], None]) -> None:
        super().__init__()
        self._inspector, self._interval, self._failed = inspector, interval, failed
        self._looks, self._history, self._processes = Looks(inspector), History(interval), Processes()
        self._look = self._looks.take()
        self._events: deque[Row] = deque(maxlen=EVENTS_MAX)
        self._next_event = 0
        self._summary, self._tabs, self._help = Lines(id="summary"), Lines(id="tabs"), Lines(id="help")
        self.tables = (
            Table("workers", WORKERS, "gets/s"),
            Table("connections", CONNECTIONS, "state"),
            Table("waiters", WAITERS, "waits for"),
            Table("events", EVENTS, "time"),
        )
        self.current = self.tables[0]
        self.frozen = False
        self._grid_rows = ""
        self._body = Container(*self.tables, id="tables")
        self._filter = Input(placeholder="a pid, a state, a peer …", id="filter", compact=True)

    def compose(self) -> ComposeResult:
        yield self._summary
        yield self._tabs
        yield self._body
        self._filter.cursor_blink = False
        self._filter.display = False
        yield self._filter
        yield self._help

    def on_mount(self) -> None:
        self._take_events()
        self._processes.update(self._look.now.workers)
        self.set_interval(self._interval, self._tick)

    def on_resize(self, event: events.Resize) -> None:
        """As many tables as there is room for."""
        width, height = event.size
        is_wide = width >= WIDE_COLUMNS and height >= WIDE_ROWS
        is_tall = not is_wide and width >= TALL_COLUMNS and height >= TALL_ROWS
        self._body.set_class(is_wide, "wide")
        self._body.set_class(is_tall, "tall")
        self._tabs.display = not (is_wide or is_tall)
        self._summary.styles.height = 7 if height >= ROWS_OF_SUMMARY else 2
        self._choose(self.current)
        self.call_after_refresh(self.draw)

    @property
    def has_room(self) -> bool:
        """For all tables."""
        return self._body.has_class("wide") or self._body.has_class("tall")

    # Looking

    def _tick(self) -> None:
        """Look, and draw what that changes."""
        try:
            self._look = self._looks.take()
            self._take_events()
        except PoolError as error:
            self._failed(error)
            return
        self._history.add(self._look.now)
        self._processes.update(self._look.now.workers)
        if self._look.now.state == "closed" or not self._look.alive:
            ended = "closed" if self._look.now.state == "closed" else "used by no process any more"
            self.app.exit(f"pool {self._inspector.name!r} is {ended}")
        elif not self.frozen:
            self.draw()

    def _take_events(self) -> None:
        batch = self._inspector.events(self._next_event)
        self._events.extend(map(event_row, batch.events))
        self._next_event = batch.next

    def draw(self) -> None:
        """All that is shown, as the last look has it."""
        width = self.size.width
        lines = summary(self._look, self._history, width, frozen=self.frozen)
        self._summary.put(lines if self._summary.size.height > 2 else [lines[0], lines[-1]])
        for table in self.tables:
            if table.display:
                table.show(self._rows(table))
        self._share_room()
        self._draw_titles()
        self._help.put([self._hints(width)])

    def _rows(self, table: Table) -> Iterable[Row]:
        if table.id == "workers":
            return worker_rows(self._look, self._processes)
        if table.id == "connections":
            return connection_rows(self._look)
        if table.id == "waiters":
            return waiter_rows(self._look, self._processes)
        return self._events

    def _share_room(self) -> None:
        """Where tables are above each other, the workers take what they need, at most as much as the connections."""
        if self._body.has_class("tall"):
            alive = sum(worker.alive for worker in self._look.now.workers)
            height = min(max(alive, 3) + 4, (self._body.size.height - 8) // 2)
            rows = f"{height} 1fr 8"
            if rows != self._grid_rows:
                self._grid_rows = self._body.styles.grid_rows = rows

    def _draw_titles(self) -> None:
        """How much is in each table, and what of it is not to be seen: on their borders, or as a line of tabs."""
        now = self._look.now
        counts = (sum(worker.alive for worker in now.workers), now.open, now.waiting, len(self._events))
        names = [
            f"{number} {table.id} {count}"
            for number, (table, count) in enumerate(zip(self.tables, counts, strict=True), 1)
        ]
        named = list(zip(self.tables, names, strict=True))
        if self.has_room:
            for table, name in named:
                titles = name, table.note(table.size.width - 4)
                if (table.border_title, table.border_subtitle) != titles:  # else it would be drawn again
                    table.border_title, table.border_subtitle = titles
        tabs = [Part(f" {name} ", "tab" if table is self.current else "dim") for table, name in named]
        if _length(tabs) > self.size.width:
            tabs = [tab if tab.style == "tab" else Part(tab.text[:2], "dim") for tab in tabs]
        note = self.current.note(self.size.width - _length(tabs) - 2)
        fill = " " * max(0, self.size.width - _length(tabs) - _width(note) - 1)
        self._tabs.put([(*tabs, Part(f"{fill}{note}", "dim"))])

    def _hints(self, width: int) -> Line:
        """The keys, as many as there is room for."""
        parts = [Part(f" filter: {' '.join(self.current.words)} ", "tab"), Part(" esc ", "key"), Part("clears ", "dim")]
        line: list[Part] = parts if self.current.words else []
        for key, does in HINTS:
            if key == "p" and self._look.now.state != "open":
                does = "resume"
            more = [Part(f" {key} ", "key"), Part(f"{does} ", "dim")]
            if _length(line) + _length(more) > width:
                break
            line += more
        return tuple(line)

    # Keys

    def action_table(self, number: int) -> None:
        self._choose(self.tables[number])
        self.draw()

    def action_next_table(self, step: int) -> None:
        self.action_table((self.tables.index(self.current) + step) % len(self.tables))

    def on_table_resized(self) -> None:
        self._draw_titles()

    def on_table_touched(self, message: Table.Touched) -> None:
        self._choose(message.table)
        self.draw()

    def _choose(self, table: Table) -> None:
        self.current = table
        for each in self.tables:
            each.display = self.has_room or each is table
            each.set_class(each is table, "current")

    def action_move(self, by: int) -> None:
        self.current.move(by)
        self._draw_titles()

    def action_page(self, direction: int) -> None:
        self.action_move(direction * max(2, self.current.room - 1))

    def action_sort(self, step: int) -> None:
        self.current.sort_next(step)

    def action_reverse(self) -> None:
        self.current.sort_by(self.current.sorted_by)

    def action_filter(self) -> None:
        self._filter.display, self._help.display = True, False
        self._filter.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        for table in self.tables:
            table.words = event.value.lower().split()
        self.draw()

    def on_input_submitted(self) -> None:
        self._leave_filter()

    def _leave_filter(self) -> None:
        self.set_focus(None)
        self._filter.display, self._help.display = False, True
        self.draw()

    def action_clear(self) -> None:
        self._filter.value = ""
        self.current.chosen = None
        self._leave_filter()

    def action_freeze(self) -> None:
        self.frozen = not self.frozen
        self.draw()

    def action_help(self) -> None:
        width = max(len(key) for key, _ in KEYS)
        lines = "\n".join(f"{key:<{width}}  {does}" for key, does in KEYS)
        self.app.push_screen(Dialog("shmpool top", f"{lines}\n\n{LEGEND}", "esc closes this"))

    # Steering

    def action_pause(self) -> None:
        name, now = self._inspector.name, self._look.now
        if now.state == "open":
            text = (
                "No process gets a connection until it is resumed: callers wait, at most their timeout. "
                f"The {now.in_use} in use go on and are returned as always."
            )
            self._ask(Question(f"pause {name}", text, lambda: _paused(name)))
        else:
            text = f"It is {now.state} now. All its processes get connections again; {now.waiting} callers wait."
            self._ask(Question(f"resume {name}", text, lambda: _resumed(name)))

    def action_evict(self) -> None:
        name, chosen = self._inspector.name, self.tables[1].chosen
        slot = next((slot for slot in self._look.now.slots if slot.id == chosen), None)
        if slot is None:
            self.app.notify("Choose a connection first: 2, then ↑ or ↓.", severity="warning")
            return
        which = f"connection {slot.id}"
        whose = f", held by process {slot.holder}" if slot.holder else ""
        when = "ends now" if slot.state == "idle" else "ends when it is returned"
        text = f"It is {slot.state}{whose}, to {printable(slot.peer)}. It {when}; another is opened as it is needed."
        self._ask(Question(f"evict {which} of {name}", text, lambda: _evicted(name, slot.id)))

    def action_evict_idle(self) -> None:
        name, now = self._inspector.name, self._look.now
        text = (
            f"All that are idle end, {now.idle} of {now.open} at the moment; the {now.in_use} in use stay. "
            "Others are opened as they are needed."
        )
        self._ask(Question(f"evict the idle connections of {name}", text, lambda: _evicted(name, None)))

    def action_recover(self) -> None:
        name = self._inspector.name
        text = (
            "What processes held that have died is taken back now. "
            f"It waits for that at most {steering.RECOVER_TIMEOUT_S:.0f} s."
        )
        self._ask(Question(f"recover {name}", text, lambda: _recovered(name)))

    def _ask(self, question: Question) -> None:
        def answered(answer: bool | None) -> None:
            if answer:
                self._do(question)

        self.app.push_screen(Dialog(question.title, question.text, "y: do it   n: leave it"), answered)

    @work(thread=True)
    def _do(self, question: Question) -> None:
        try:
            said = question.does()
        except (PoolError, OSError) as error:
            self.app.notify(printable(str(error)), title=question.title, severity="error", markup=False)
        else:
            self.app.notify(said, title=question.title, markup=False)


def _paused(name: str) -> str:
    return f"It is paused{'' if steering.pause(name) else ' already'}: callers wait; p resumes it."


def _resumed(name: str) -> str:
    return "It is open again: callers are served." if steering.resume(name) else "It was open already."


def _evicted(name: str, connection_id: int | None) -> str:
    found = steering.evict(name, connection_id)
    return f"{found} evicted." if found else "There is no such connection any more."


def _recovered(name: str) -> str:
    dead = steering.recover(name)
    return f"What {dead} dead process{'' if dead == 1 else 'es'} held is taken back." if dead else "None has died."


class Top(App[str]):
    """The program: chooses a pool if need be, and shows its board."""

    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [Binding("ctrl+c,ctrl+q", "end", priority=True)]
    CSS = f"""
    Screen {{ background: {GROUND}; color: #c9d1d9; }}
    #summary {{ height: 7; }}
    #tabs {{ height: 1; }}
    #help, #filter {{ height: 1; }}
    #filter {{ background: {RAISED}; border: none; }}
    #tables {{ height: 1fr; }}
    .table {{ height: 1fr; width: 1fr; }}
    .tall, .wide {{ layout: grid; grid-gutter: 0; }}
    .tall {{ grid-size: 2 3; grid-rows: 1fr 1fr 8; grid-columns: 2fr 3fr; }}
    .wide {{ grid-size: 2 2; grid-rows: 1fr 12; }}
    .tall #workers, .tall #connections {{ column-span: 2; }}
    .tall .table, .wide .table {{
        border: round #30363d; border-title-color: #8b949e; border-subtitle-color: #8b949e; border-title-style: bold;
    }}
    .tall .current, .wide .current {{ border: round #58a6ff; border-title-color: #f0f6fc; }}
    Dialog {{ align: center middle; background: {GROUND} 60%; }}
    #dialog {{
        width: 78; max-width: 100%; height: auto; max-height: 100%; padding: 1 2; background: {RAISED};
        border: round #58a6ff; border-title-color: #f0f6fc; border-title-style: bold; border-subtitle-color: #58a6ff;
        overflow-y: auto;
    }}
    #dialog Static {{ width: 1fr; }}
    #heading {{ height: 1; color: #58a6ff; text-style: bold; }}
    OptionList {{ height: 1fr; border: none; background: {GROUND}; }}
    Toast {{ background: {RAISED}; }}
    """

    def __init__(self, inspector: Inspector | None, interval: float) -> None:
        super().__init__()
        self.animation_level = "none"
        self._inspector, self._interval = inspector, interval
        self.failure: PoolError | None = None

    def on_mount(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.action_end)
        if self._inspector is None:
            self.push_screen(Chooser(), self._show)
        else:
            self._show(self._inspector.name)

    def _show(self, name: str | None) -> None:
        try:
            self._inspector = self._inspector or inspect(name or "")
            self.push_screen(Board(self._inspector, self._interval, self.end_with))
        except PoolError as error:
            self.end_with(error)

    def end_with(self, error: PoolError) -> None:
        """End, and let `run()` raise it."""
        self.failure = error
        self.exit()

    def action_end(self) -> None:
        self.exit("")

    def let_go(self) -> None:
        """Close what is looked at."""
        if self._inspector is not None:
            self._inspector.close()
