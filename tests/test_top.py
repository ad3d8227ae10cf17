"""The live view: its keys, tables and dialogs on a real pool, on a terminal, and what is there without Textual."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets._toast import Toast

import shmpool
from shmpool import Pool, PoolStats, inspect, steering, top
from shmpool.cli import main
from shmpool.inspector import Inspector, list_pools
from shmpool.top import Board, Chooser, Dialog, History, Looks, Row, Table, Top, sparkline
from tests.members import Members, some_name
from tests.processes import until

DEADLINE_S = 30.0
INTERVAL_S = 0.1
COMMAND = [sys.executable, "-m", "shmpool"]


@pytest.fixture
def url() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def pool(url: str) -> Iterator[Pool]:
    settings: dict[str, Any] = {"min_connections": 0, "maintenance_interval": float("inf")}
    with Pool(url, max_connections=4, name=some_name(), **settings) as made:
        yield made


class Watcher:
    """Who looks at the view and presses its keys."""

    def __init__(self, app: Top, pilot: Pilot[str]) -> None:
        self.app, self.pilot = app, pilot

    @property
    def board(self) -> Board:
        (board,) = [screen for screen in self.app.screen_stack if isinstance(screen, Board)]
        return board

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)

    async def sees(self, condition: Callable[[], object], what: str) -> None:
        """Wait until it is so."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, f"{what}; there is:\n{self.text()}"
            await self.pilot.pause(0.001)

    async def reads(self, pattern: str) -> None:
        """Wait until that is on the screen."""
        await self.sees(lambda: re.search(pattern, self.text(), re.MULTILINE), pattern)

    def text(self) -> str:
        """What is on the board, and in a dialog or a message above it."""
        lines = []
        if any(isinstance(screen, Board) for screen in self.app.screen_stack):
            for widget in self.board.query(top.Lines):
                shown = widget.display and widget.size.height
                lines += [widget.border_title or "", *map(text_of(widget), range(widget.size.height))] if shown else []
        for toast in self.app.screen.query(Toast):
            lines.append(toast._notification.message)
        if isinstance(self.app.screen, Dialog):
            lines += [f"[{self.app.screen._title}]", self.app.screen._text]
        return "\n".join(lines)

    def column(self, heading: str) -> list[str]:
        """The cells of the current table."""
        table = self.board.current
        at = [column.heading for column in table.columns].index(heading)
        return [row.cells[at].text for row in table.rows]


def text_of(widget: top.Lines) -> Callable[[int], str]:
    return lambda y: widget.render_line(y).text


@contextlib.asynccontextmanager
async def watching(name: str, size: tuple[int, int] = (80, 24)) -> AsyncIterator[Watcher]:
    app = Top(inspect(name), INTERVAL_S)
    try:
        async with app.run_test(size=size, notifications=True) as pilot:
            watcher = Watcher(app, pilot)
            await watcher.sees(lambda: isinstance(app.screen, Board), "the board")
            yield watcher
    finally:
        app.let_go()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        await scenario()

    asyncio.run(whole())


# What is shown ------------------------------------------------------------------------------------------------------


def test_the_summary_and_the_tables(pool: Pool, url: str) -> None:
    async def scenario() -> None:
        with pool.get(), pool.get() as second:
            async with watching(pool.name, (140, 40)) as seen:
                await seen.reads(rf"^ {pool.name}  ● open  up .+  cap 4 .*{url} *$")
                await seen.reads(r"^ open +2/4 ▇+·+  2 leased *$")
                await seen.reads(r"^ in use +50.0 % ")
                await seen.reads(r"^ trouble +none *$")
                await seen.reads(rf"^ +{os.getpid()}  \S.* alive +2 +0 +0 ")
                await seen.reads(
                    rf"^ +\d+ +leased +{os.getpid()} .* tcp4 +{url.removeprefix('tcp://')} +[0-9.]+ [a-zµ]+ *$"
                )
                await seen.reads(rf"^ +\d\d:\d\d:\d\d +{os.getpid()} +opened +connection 1 is opened in ")
                second.release()
                await seen.reads(r"^ open +2/4 ▇+·+  1 leased, 1 idle *$")
                await seen.reads(rf"^ +\d+ +idle +~{os.getpid()} ")

    run(scenario)


def test_waiters_are_shown(members: Callable[..., Members], name: str) -> None:
    one = members(max_connections=1)
    _, gives_back = one.holder()
    waiter = one.waiter()

    async def scenario() -> None:
        async with watching(name) as seen:
            await seen.press("3")
            await seen.reads(rf"^ +\d.* m?s +{waiter.pid} +{waiter.pid} +\S.* waiting")
            await seen.reads(r"^ waiting +1 .* oldest ")
            gives_back.set()
            await seen.sees(lambda: not seen.board.current.rows, "it waits no more")

    run(scenario)


def test_an_outage_is_shown(deaf_port: int) -> None:
    async def scenario() -> None:
        with Pool(f"tcp://127.0.0.1:{deaf_port}", dial_backoff=(60.0, 60.0), name=some_name()) as pool:
            until(lambda: pool.stats().prewarm_done, "the first dial has failed")
            async with watching(pool.name, (140, 40)) as seen:
                await seen.reads("● server down ")
                await seen.reads(r"^ trouble +server down for .+s, next dial in \d+.*s: .*refused")

    run(scenario)


def test_what_has_ended_comes_last(members: Callable[..., Members], name: str) -> None:
    two = members(max_connections=2, maintenance_interval=float("inf"))
    living, (dead, _) = two.keeper(), two.holder()

    async def scenario() -> None:
        async with watching(name) as seen:
            await seen.sees(lambda: set(seen.column("pid")) == {str(living.pid), str(dead.pid)}, "both")
            dead.kill()
            await seen.sees(lambda: seen.column("pid") == [str(living.pid), f"†{dead.pid}"], "one has ended")
            await seen.press("r")
            assert seen.column("pid") == [str(living.pid), f"†{dead.pid}"]
            assert seen.column("process")[1], "its name is kept"

    run(scenario)


SIZES = [(80, 24), (140, 40), (200, 50), (40, 12)]


def test_no_figure_is_cut(pool: Pool) -> None:
    """Of the columns that are shown; words may be cut, and say so."""

    def assert_whole(table: Table) -> None:
        lines = [text_of(table)(y) for y in range(table.size.height)]
        for row, line in zip(table.rows, lines[1:], strict=False):
            for at, width in table._places:
                text, column = row.cells[at].text, table.columns[at]
                assert text in line if not column.has_words or len(text) <= width else "…" in line
        assert all(len(line) == table.size.width for line in lines)

    async def scenario() -> None:
        leases = [pool.get() for _ in range(3)]
        async with watching(pool.name) as seen:
            for width, height in SIZES:
                await seen.pilot.resize_terminal(width, height)
                for number, heading in (("1", "pid"), ("2", "id"), ("3", "waits for"), ("4", "time")):
                    await seen.press("space", number)
                    await seen.sees(lambda: seen.board.current.size.width > 0, "the table")
                    await seen.reads(rf"[ ▼]{heading}\b")
                    assert_whole(seen.board.current)
                    await seen.press("space")
        for lease in leases:
            lease.release()

    run(scenario)


def test_as_many_tables_as_there_is_room_for(pool: Pool) -> None:
    async def scenario() -> None:
        async with watching(pool.name) as seen:
            for width, height in [*SIZES, *SIZES]:
                await seen.pilot.resize_terminal(width, height)
                expected = 4 if height >= 34 else 1
                await seen.sees(lambda: sum(t.display for t in seen.board.tables) == expected, "tables")  # noqa: B023
                await seen.sees(lambda: all(t.size.height >= 2 for t in seen.board.tables if t.display), "their rows")
                await seen.reads(r"^[ .]*\? help  q quit ")

    run(scenario)


def test_columns_that_are_not_shown_are_counted(pool: Pool) -> None:
    async def scenario() -> None:
        async with watching(pool.name, (40, 20)) as seen:
            await seen.press("2")
            shown = len(seen.board.current._places)
            assert 0 < shown < len(top.CONNECTIONS)
            missing = len(top.CONNECTIONS) - shown
            await seen.sees(lambda: seen.board.current.note(40).startswith(f"{missing} more column"), "the note")

    run(scenario)


# Keys ---------------------------------------------------------------------------------------------------------------


def test_sorting(pool: Pool) -> None:
    first, second, third = (pool.get() for _ in range(3))
    third.release()
    for _ in range(4):
        pool.get().release()
    second.release()

    async def scenario() -> None:
        async with watching(pool.name, (100, 24)) as seen:
            await seen.press("2")
            await seen.sees(lambda: len(seen.column("id")) == 3, "three connections")
            assert seen.column("state") == ["leased", "idle", "idle"], "what is in use comes first"
            for heading in ("holder", "since", "age", "uses"):
                await seen.press("greater_than_sign")
                await seen.reads(rf"▼{heading}\b")
            assert seen.column("uses") == sorted(seen.column("uses"), reverse=True)
            assert len(set(seen.column("uses"))) > 1
            await seen.press("r")
            await seen.reads("▲uses")
            assert seen.column("uses") == sorted(seen.column("uses"))
            await seen.press("less_than_sign")
            await seen.reads("▼age")
            await seen.pilot.click(seen.board.current, offset=(3, 0))
            await seen.reads("▼id")
            assert seen.column("id") == ["3", "2", "1"]

    run(scenario)
    first.release()


def test_filtering(pool: Pool) -> None:
    async def scenario() -> None:
        with pool.get(), pool.get() as second:
            second.release()
            async with watching(pool.name) as seen:
                await seen.press("2", "slash", *"IDLE")
                await seen.sees(lambda: seen.column("state") == ["idle"], "what matches")
                await seen.reads("1 of 2 match")
                await seen.press("enter")
                await seen.reads("filter: idle")
                await seen.press("1")
                await seen.reads("0 of 1 match")
                await seen.press("escape")
                await seen.sees(lambda: seen.column("pid") == [str(os.getpid())], "all")
                await seen.press("slash", *str(os.getpid()), "escape", "2")
                await seen.sees(lambda: len(seen.column("id")) == 2, "all")
                assert "filter:" not in seen.text()
                await seen.press("q")
        assert seen.app.return_value == ""

    run(scenario)


def test_the_chosen_row_is_followed(pool: Pool) -> None:
    leases = [pool.get() for _ in range(3)]

    async def scenario() -> None:
        async with watching(pool.name) as seen:
            await seen.press("2")
            await seen.sees(lambda: len(seen.column("id")) == 3, "three connections")
            table = seen.board.current
            await seen.press("down", "down")
            chosen = table.rows[1].key
            assert table.chosen == chosen
            await seen.press("less_than_sign")
            await seen.reads("▼id")
            assert table.chosen == chosen
            await seen.press("home")
            assert table.chosen == table.rows[0].key
            await seen.press("end")
            assert table.chosen == table.rows[-1].key
            await seen.press("pageup")
            assert table.chosen == table.rows[0].key
            await seen.pilot.click(table, offset=(5, 2))
            assert table.chosen == table.rows[1].key
            await seen.press("escape")
            assert table.chosen is None

    run(scenario)
    for lease in leases:
        lease.release()


def test_long_tables_scroll(url: str) -> None:
    async def scenario() -> None:
        with Pool(url, max_connections=40, min_connections=0, name=some_name()) as pool:
            leases = [pool.get() for _ in range(40)]
            async with watching(pool.name) as seen:
                await seen.press("2", "less_than_sign")
                await seen.reads("1–14 of 40")
                await seen.press("end")
                await seen.reads("27–40 of 40")
                await seen.reads(r"^ +1 +leased ")
                await seen.press("home")
                await seen.reads("1–14 of 40")
            for lease in leases:
                lease.release()

    run(scenario)


def test_freezing(pool: Pool) -> None:
    async def scenario() -> None:
        async with watching(pool.name) as seen:
            await seen.press("space")
            await seen.reads(" frozen ")
            before, taken = seen.text(), seen.board._history._count
            with pool.get():
                await seen.sees(lambda: seen.board._history._count > taken + 2, "it goes on looking")
                assert seen.text() == before
                await seen.press("space")
                await seen.reads("1 leased")
            assert " frozen " not in seen.text()

    run(scenario)


def test_help(pool: Pool) -> None:
    async def scenario() -> None:
        async with watching(pool.name) as seen:
            await seen.press("question_mark")
            for key, does in top.KEYS:
                assert key in seen.text()
                assert does in seen.text()
            (box,) = seen.app.screen.query("#dialog")
            assert box.max_scroll_y == 0, "it fits"
            await seen.press("p", "escape")
            assert isinstance(seen.app.screen, Board)
            assert pool.stats().state == "open"

    run(scenario)


# Steering -----------------------------------------------------------------------------------------------------------


def test_pausing_asks_first(pool: Pool) -> None:
    async def scenario() -> None:
        async with watching(pool.name) as seen:
            for no in ("n", "escape", "enter", "q"):
                await seen.press("p")
                await seen.reads(rf"^\[pause {pool.name}\]$")
                await seen.press(no)
                assert isinstance(seen.app.screen, Board)
            assert pool.stats().state == "open"
            await seen.press("p", "y")
            await seen.reads("^It is paused: callers wait; p resumes it.$")
            assert pool.stats().state == "paused"
            await seen.reads("● paused")
            await seen.press("p")
            await seen.reads(rf"^\[resume {pool.name}\]$")
            await seen.press("y")
            await seen.reads("^It is open again: callers are served.$")
            assert pool.stats().state == "open"

    run(scenario)


def test_evicting(pool: Pool) -> None:
    leased, idle = pool.get(), pool.get()
    id_of_leased, id_of_idle = leased.id, idle.id
    idle.release()

    def endings() -> dict[int, tuple[str, ...]]:
        return {slot.id: slot.flags for slot in pool.stats().slots}

    async def scenario() -> None:
        async with watching(pool.name) as seen:
            await seen.press("e")
            await seen.reads("^Choose a connection first")
            assert isinstance(seen.app.screen, Board)
            await seen.press("E")
            await seen.reads(r"1 of 2 at the moment; the 1 in use stay")
            await seen.press("y")
            await seen.reads("^1 evicted.$")
            assert endings() == {id_of_leased: (), id_of_idle: ("ending",)}
            await seen.press("2", "down", "e")
            await seen.reads(rf"^\[evict connection {id_of_leased} of {pool.name}\]$")
            await seen.reads(rf"^It is leased, held by process {os.getpid()}, to .* It ends when it is returned;")
            await seen.press("y")
            await seen.sees(lambda: "ending" in endings()[id_of_leased], "it is to end")

    run(scenario)
    leased.release()
    assert id_of_leased not in endings()


def test_recovering(members: Callable[..., Members], name: str) -> None:
    two = members(max_connections=2)
    keeper = two.keeper()

    async def scenario() -> None:
        async with watching(name) as seen:
            await seen.press("R")
            await seen.reads(rf"^\[recover {name}\]$")
            await seen.press("y")
            await seen.reads("^None has died.$")
            keeper.stop()
            two.holder()[0].kill()
            await seen.press("R", "y")
            keeper.resume()
            await seen.sees(lambda: two.stats().in_use == 0, "it is taken back")

    run(scenario)


def test_what_cannot_be_done_is_told(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> bool:
        raise shmpool.PoolClosed(pool=name)

    monkeypatch.setattr(steering, "pause", refuse)

    async def scenario() -> None:
        async with watching(pool.name) as seen:
            await seen.press("p", "y")
            await seen.reads(rf"^.*{pool.name}.* closed")

    run(scenario)


# The end, and the beginning -----------------------------------------------------------------------------------------


def test_it_ends_with_the_pool(url: str) -> None:
    async def scenario() -> None:
        with Pool(url, name=some_name(), min_connections=0) as pool:
            async with watching(pool.name) as seen:
                await seen.press("space")  # a frozen picture too
                pool.close()
                await seen.sees(lambda: seen.app.return_value, "it ends")
            assert seen.app.return_value == f"pool {pool.name!r} is closed"

    run(scenario)


def test_it_ends_with_the_last_process(members: Callable[..., Members], name: str) -> None:
    keeper = members(max_connections=1).keeper()

    async def scenario() -> None:
        async with watching(name) as seen:
            keeper.kill()
            await seen.sees(lambda: seen.app.return_value, "it ends")
        assert seen.app.return_value == f"pool {name!r} is used by no process any more"

    run(scenario)


def test_a_pool_is_chosen(pool: Pool, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(other: Pool) -> None:
        mine = {pool.name, other.name}
        monkeypatch.setattr(top, "list_pools", lambda: [each for each in list_pools() if each.name in mine])
        app = Top(None, INTERVAL_S)
        try:
            async with app.run_test(size=(80, 24)) as pilot:
                seen = Watcher(app, pilot)
                await seen.sees(lambda: isinstance(app.screen, Chooser), "the pools")
                await seen.press(*(["down"] if sorted(mine)[1] == other.name else []), "enter")
                await seen.sees(lambda: isinstance(app.screen, Board), "the board")
                await seen.reads(rf"^ {other.name}  ● open ")
        finally:
            app.let_go()

    with Pool(url, name=some_name(), min_connections=0) as other:
        run(lambda: scenario(other))


# Figures ------------------------------------------------------------------------------------------------------------


class Taken(Inspector):
    """An inspector with snapshots that were taken before."""

    alive = True

    def __init__(self, *snapshots: dict[str, Any]) -> None:
        self._left = list(snapshots)

    def stats(self) -> PoolStats:
        return PoolStats.from_snapshot(self._left.pop(0))


def test_a_look_is_the_difference(pool: Pool) -> None:
    snapshots = []
    with inspect(pool.name) as inspector:
        for _ in range(3):
            for _ in range(300):
                pool.get().release()
            snapshots.append(inspector.snapshot())
    looks = Looks(Taken(*snapshots))
    first = looks.take()
    assert (first.now.gets, first.now.interval) == (0, 0)
    for earlier, later in itertools.pairwise(snapshots):
        look = looks.take()
        now = PoolStats.from_snapshot(later)
        assert look.now.to_dict() == now.diff(PoolStats.from_snapshot(earlier)).to_dict()
        assert look.now.get_latency.count > 0
        assert (look.life.gets, look.life.created) == (now.gets, now.created)


def test_sparklines() -> None:
    assert sparkline([], 4, 1.0) == "    "
    assert sparkline([0.0, 0.0], 4, 0.0) == "  ▁▁"
    assert sparkline([0.0, 1e-9, 0.5, 1.0, 2.0], 6, 1.0) == " ▁▂▄▇▇"


def test_spans_stand_still(pool: Pool) -> None:
    history = History(1.0)
    look = pool.stats()
    stats = look.diff(look)
    seen: list[list[float]] = []
    for number in range(1, 200):
        history.add(dataclasses.replace(stats, connections={"leased": number}))
        seen.append(history.spans("in_use", 12))
    assert [len(spans) for spans in seen[:30:10]] == [1, 2, 3]
    assert all(later[:-1] in (earlier[:-1], earlier[-11:]) for earlier, later in itertools.pairwise(seen[120:]))
    assert seen[-1] == [*range(90, 200, 10), 199]


def test_rows_beyond_what_a_column_had() -> None:
    """A column grows with what it holds, and stays so."""
    table = Table("workers", (top.Column("n"), top.Column("words", least=3)), "n")
    for text in ("1", "1,000,000", "2"):
        table.show([Row(0, (top.Cell(text, text), top.Cell("a", "a")))])
    assert table._widths == [9, 5]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["{script}"], "serve.py"),
        (["{odd}"], "a?[31mb.py"),
        (["-u", "{script}", "--port", "1"], "serve.py"),
        (["-c", "input()"], "python"),
        (["-m", "serve"], "serve"),
    ],
)
def test_names_of_processes(words: list[str], name: str, tmp_path: Any) -> None:
    scripts = {"{script}": tmp_path / "serve.py", "{odd}": tmp_path / "a\x1b[31mb.py"}
    for script in scripts.values():
        script.write_text("input()\n", encoding="utf-8")
    program = [sys.executable, *(str(scripts.get(word, word)) for word in words)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, cwd=tmp_path) as process:
        until(lambda: top.process_name(process.pid).startswith(name), f"it is called {name}")
        process.communicate(b"\n")
    assert top.process_name(process.pid) == ""


# On a terminal ------------------------------------------------------------------------------------------------------


class Terminal:
    """A process on a terminal of its own, and all that it has written there."""

    def __init__(self, *words: str, program: list[str] = COMMAND, rows: int = 24, columns: int = 80) -> None:
        self.pid, self._fd = pty.fork()
        if not self.pid:
            try:
                environment = {key: value for key, value in os.environ.items() if key not in ("LINES", "COLUMNS")}
                termios.tcsetwinsize(0, (rows, columns)) if sys.version_info >= (3, 11) else resize(0, rows, columns)
                os.execve(program[0], [*program, *words], {**environment, "TERM": "xterm"})
            finally:
                os._exit(127)
        self.text = ""

    def read_until(self, wanted: str) -> None:
        """From where it was read before."""
        begin, deadline = len(self.text), time.monotonic() + DEADLINE_S
        while wanted not in self.text[begin:]:
            assert select.select([self._fd], [], [], deadline - time.monotonic())[0], self.text
            self.text += os.read(self._fd, 65536).decode(errors="replace")

    def press(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def resize(self, rows: int, columns: int) -> None:
        resize(self._fd, rows, columns)

    def end(self) -> int:
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while data := os.read(self._fd, 65536):
                self.text += data.decode(errors="replace")
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def resize(fd: int, rows: int, columns: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def assert_given_back(terminal: Terminal) -> None:
    """The screen, and the cursor."""
    assert "Traceback" not in terminal.text
    assert terminal.text.count("\x1b[?1049h") == terminal.text.count("\x1b[?1049l") == 1
    assert terminal.text.rindex("\x1b[?25h") > terminal.text.rindex("\x1b[?25l")


@pytest.mark.parametrize("how", [b"q", b"\x03", signal.SIGINT, signal.SIGTERM])
def test_on_a_terminal(pool: Pool, how: bytes | signal.Signals) -> None:
    terminal = Terminal("top", pool.name, "--interval", "0.05")
    terminal.read_until("▼gets/s")
    with pool.get():
        terminal.read_until("1 leased")
    if isinstance(how, bytes):
        terminal.press(how)
    else:
        os.kill(terminal.pid, how)
    assert terminal.end() == 0
    assert_given_back(terminal)


def test_a_resize_is_followed(pool: Pool) -> None:
    terminal = Terminal("top", pool.name, "--interval", "0.05")
    terminal.read_until("3 waiters 0")
    assert "╭" not in terminal.text
    terminal.resize(40, 140)
    terminal.read_until("╭")
    terminal.resize(12, 50)
    terminal.read_until(" more columns when wider")
    terminal.press(b"q")
    assert terminal.end() == 0
    assert_given_back(terminal)


def test_the_end_of_the_pool_is_told_on_the_normal_screen(pool: Pool) -> None:
    terminal = Terminal("top", pool.name, "--interval", "0.05")
    terminal.read_until("▼gets/s")
    pool.close()
    assert terminal.end() == 0
    assert_given_back(terminal)
    assert f"pool {pool.name!r} is closed" in terminal.text.rpartition("\x1b[?1049l")[2]


def without(*modules: str) -> list[str]:
    blocked = "".join(f"sys.modules[{module!r}] = None; " for module in modules)
    return [sys.executable, "-c", f"import sys; {blocked}from shmpool.cli import main; sys.exit(main(sys.argv[1:]))"]


REMEDY = "the view with keys needs textual: pip install 'shmpool[cli]'"


def test_without_textual(pool: Pool) -> None:
    terminal = Terminal("top", pool.name, "--interval", "0.05", program=without("textual"))
    terminal.read_until("get p50")
    with pool.get():
        terminal.read_until("leased")
    terminal.press(b"\x03")
    assert terminal.end() == 0
    assert_given_back(terminal)
    assert terminal.text.count(REMEDY) == 1


def test_without_textual_and_rich(pool: Pool) -> None:
    terminal = Terminal("top", pool.name, "--interval", "0.05", program=without("textual", "rich"))
    terminal.read_until("get p50")
    terminal.press(b"\x03")
    assert terminal.end() == 0
    assert "\x1b[" not in terminal.text
    assert terminal.text.count(REMEDY) == 1


def test_a_terminal_that_cannot_move_its_cursor(pool: Pool) -> None:
    terminal = Terminal("top", pool.name, "--once", "--interval", "0.01")
    assert terminal.end() == 0
    assert "\x1b[" not in terminal.text
    assert pool.name in terminal.text


def test_importing_it_without_textual() -> None:
    program = "import sys; sys.modules['textual'] = None; import shmpool.top"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 1
    assert done.stderr.endswith(f"\nImportError: {REMEDY}\n")


def test_the_package_does_not_import_it() -> None:
    program = "import sys, shmpool, shmpool.cli; sys.exit('textual' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=DEADLINE_S).returncode == 0


# In a pipe ----------------------------------------------------------------------------------------------------------


def test_json_once(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    pool.get().release()
    assert main(["top", pool.name, "--json", "--once", "--interval", "0.01"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    figures = json.loads(line)
    assert figures.keys() == {*pool.stats().to_dict(), "alive"}
    assert (figures["name"], figures["gets"], figures["idle"], figures["alive"]) == (pool.name, 0, 1, True)
    assert figures["interval"] < DEADLINE_S


def test_json_is_a_line_each_interval(pool: Pool) -> None:
    with subprocess.Popen(
        [*COMMAND, "top", pool.name, "--json", "--interval", "0.01"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert json.loads(process.stdout.readline())["gets"] == 0
        pool.get().release()
        while not json.loads(process.stdout.readline())["gets"]:
            pass
        pool.close()
        last = json.loads(process.stdout.read().splitlines()[-1])
    assert process.returncode == 0
    assert (last["state"], last["gets"]) == ("closed", 0)
