"""The command line: `shmpool list`, `stats`, `top`, `events`, `export`; `pause`, `resume`, `drain`, `resize`, `evict`,
`recover`, `close`; `doctor`, `unlink`, `demo`. Also `python -m shmpool`.

A command that looks at a pool does it through `inspector`, turns its `PoolStats` into `View`s (rows of texts, some in a
style), and shows those: as plain lines, or, for `top` on a terminal, as a live picture with `rich`. Without `rich` all
of it still works, as plain lines. One that changes a pool calls the function of its name in `steering`, and says in one
line what has happened and what that means. Results go to standard output and errors to standard error; the exit
status is 0, or 1 when the command could not be done, or 2 when it was not understood.

Not here: what the figures mean (`stats`), what is safe to open or to remove (`inspector`), what a change does
(`steering`), the metrics for Prometheus (`exporter`), the demonstration (`demo`).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from . import __version__, slab, steering
from .errors import InvalidConfig, PoolError, PoolNotFound
from .events import KINDS, Event, EventBatch
from .inspector import Inspector, PoolInfo, inspect, list_pools, unlink
from .sockets import pack_peer
from .stats import FAILURES, STATES, ConnectionStats, PoolStats, WorkerStats

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["main"]

FAILED, MISUSED, INTERRUPTED = 1, 2, 130
ROWS_MAX = 50  # of a table that is printed and not cut to a screen
_FOLLOW_S = 0.1  # between looks for new events
_EVENT_PATIENCE_S = 0.5  # an event takes less than a microsecond to write, if its process is not stopped


_Command = Callable[[argparse.Namespace], int]


class _Refusal(Exception):
    """(text, exit status): the command cannot be done as it was given."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale that lacks a character of ours gets a "?" for it
            stream.reconfigure(errors="replace")
    options = _parser().parse_args(arguments)
    command: _Command = options.command
    try:
        status = command(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has seen enough; Python would complain once more while it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except _Refusal as error:
        return _complain(*error.args)
    except InvalidConfig as error:
        return _complain(str(error), MISUSED)
    except PoolNotFound as error:
        return _complain(_with_the_names_there_are(error), FAILED)
    except (PoolError, OSError) as error:
        return _complain(str(error), FAILED)


def _complain(text: str, status: int) -> int:
    print("shmpool:", "\n".join(map(_printable, text.split("\n"))), file=sys.stderr)
    return status


def _with_the_names_there_are(error: PoolNotFound) -> str:
    if type(error) is not PoolNotFound:  # it knows more than that
        return str(error)
    names = ", ".join(info.name for info in list_pools())
    return f"there is no pool {error.name!r} of this user; {f'there are: {names}' if names else 'there is none at all'}"


# The commands -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shmpool",
        description="Look at the connection pools of this host's worker processes, and steer them while they run.",
        epilog="Looking changes nothing and slows nobody. What changes a pool holds for all its processes, at once. "
        "More on each: shmpool COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=f"shmpool {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, command: _Command, about: str, more: str = "") -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}. {more}".strip())
        added.set_defaults(command=command)
        return added

    _add_looking(add)
    _add_steering(add)

    doctor = add("doctor", _doctor, "remove what dead pools of this user left behind, and name what is damaged")
    _add_json(doctor)

    unlinking = add("unlink", _unlink, "remove a pool that no process uses any more")
    unlinking.add_argument("name", metavar="NAME", help="the pool")
    unlinking.add_argument(
        "--force", action="store_true", help="also one in use: its processes keep it, and nobody can look at it"
    )

    demo = add("demo", _demo, "see a pool at work: workers on a Redis of its own, two of them killed on the way")
    demo.add_argument("--seconds", type=_seconds, default=10.0, metavar="S", help="how long (default 10)")
    demo.add_argument("--workers", type=_count, default=6, metavar="N", help="worker processes (default 6)")
    demo.add_argument("--connections", type=_count, default=4, metavar="N", help="the cap (default 4)")
    return parser


class _Add(Protocol):
    """Adds a command: its name, its function, what it does as a phrase, and more of that in sentences."""

    def __call__(self, name: str, command: _Command, about: str, more: str = "") -> argparse.ArgumentParser: ...


def _add_json(added: argparse.ArgumentParser) -> None:
    added.add_argument("--json", action="store_true", help="as JSON")


def _add_looking(add: _Add) -> None:
    def name_of(added: argparse.ArgumentParser) -> None:
        added.add_argument("name", metavar="NAME", nargs="?", help="the pool; may be left out when there is just one")

    _add_json(add("list", _list, "list the pools of this user"))

    stats = add("stats", _stats, "print all figures of a pool")
    name_of(stats)
    _add_json(stats)

    events = add(
        "events",
        _events,
        "print what happened to a pool: dials, ends and why, the server down and up, deaths, steering",
        "The last 1024 events of all its processes are kept, also of those that are gone.",
    )
    name_of(events)
    events.add_argument("--follow", "-f", action="store_true", help="go on as they happen; Ctrl-C ends it")
    events.add_argument(
        "--last", type=_events_wanted, default=50, metavar="N", help="begin with the last N (default 50)"
    )
    events.add_argument(
        "--kind",
        action="append",
        choices=KINDS,
        metavar="KIND",
        help=f"only these, repeatedly: {', '.join(KINDS)}",
    )
    events.add_argument("--json", action="store_true", help="as JSON, an object a line")

    top = add("top", _top, "show a pool at work; Ctrl-C ends it")
    name_of(top)
    top.add_argument("--interval", type=_seconds, default=1.0, metavar="S", help="seconds between looks (default 1)")
    top.add_argument("--once", action="store_true", help="print one look, over one interval, and end")

    export = add(
        "export",
        _export,
        "serve the figures of all pools to Prometheus",
        "Every pool of this user is reported at each scrape of /metrics. Ctrl-C ends it. Anybody who can reach the "
        "address can read them.",
    )
    export.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default 127.0.0.1)")
    export.add_argument("--port", type=_port, default=9464, metavar="N", help="default 9464; 0: any that is free")
    export.add_argument("--once", action="store_true", help="print the figures of this moment, and end")


def _add_steering(add: _Add) -> None:
    """The commands that change a pool; none guesses which."""

    def on_a_pool(name: str, command: _Command, about: str, more: str = "") -> argparse.ArgumentParser:
        added = add(name, command, about, more)
        added.add_argument("name", metavar="NAME", help="the pool")
        _add_json(added)
        return added

    on_a_pool(
        "pause",
        _pause,
        "give nothing out until resume: callers wait",
        "They wait at most their timeout. Connections in use stay in use, and are returned as always.",
    )
    on_a_pool("resume", _resume, "go on after pause or drain")
    drain = on_a_pool(
        "drain",
        _drain,
        "let what is under way finish, and refuse the rest",
        "Who waits already is served, later calls get PoolClosed; idle connections end, those in use when they are "
        "returned. The exit status is 1 when some are still in use after the timeout; the pool drains on.",
    )
    drain.add_argument(
        "--timeout", type=_seconds, default=30.0, metavar="S", help="how long to wait for it (default 30 seconds)"
    )
    resizing = on_a_pool(
        "resize",
        _resize,
        "change how many connections a pool may have",
        "A larger number serves waiting callers at once. With a smaller one idle connections end, and those in use "
        "when they are returned, until no more are left than that.",
    )
    resizing.add_argument("connections", type=int, metavar="N", help="from its min_connections to its resize_limit")
    evicting = on_a_pool(
        "evict",
        _evict,
        "end connections: all idle ones, one, or those to one peer",
        "New ones are opened as they are needed.",
    )
    evicting.add_argument("--id", type=int, metavar="N", help="the connection of this number, in use or not")
    evicting.add_argument(
        "--peer", type=_peer, metavar="ADDRESS[:PORT]", help="connections to this peer, in use or not"
    )
    evicting.add_argument("--leased", action="store_true", help="also those in use: they end when they are returned")
    recover = on_a_pool(
        "recover",
        _recover,
        "see that what dead processes held is taken back",
        "Nobody has to: whoever needs a connection does it. The exit status is 1 when it is not done in time.",
    )
    recover.add_argument(
        "--timeout", type=_seconds, default=10.0, metavar="S", help="how long to wait for it (default 10 seconds)"
    )
    closing = on_a_pool(
        "close",
        _close,
        "close a pool for all its processes, and free its name",
        "Waiting and later calls get PoolClosed; idle connections end, those in use when they are returned.",
    )
    closing.add_argument(
        "--timeout", type=_seconds, metavar="S", help="wait so long for those in use; status 1 when some are left"
    )


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError("must be seconds, more than 0 and at most a day")
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 64:
        raise argparse.ArgumentTypeError("must be from 1 to 64")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError("must be from 0 to 65535")
    return value


def _peer(text: str) -> tuple[str, int] | str:
    """1.2.3.4, 1.2.3.4:5, ::1, [::1] or [::1]:5."""
    found = re.fullmatch(r"\[(?P<six>[^]]*)\](:(?P<port>[0-9]+))?|(?P<four>[^:]*):(?P<port4>[0-9]+)", text)
    peer: tuple[str, int] | str = text
    if found:
        address, port = found["six"] or found["four"] or "", found["port"] or found["port4"]
        peer = (address, int(port)) if port else address
    try:
        pack_peer(peer)
    except ValueError:
        remedy = "is no address, nor ADDRESS:PORT; names of hosts are not looked up"
        raise argparse.ArgumentTypeError(f"{text!r} {remedy}") from None
    return peer


def _events_wanted(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return value


# As argparse calls what cannot be converted.
_seconds.__name__ = "number of seconds"
_count.__name__ = _port.__name__ = _events_wanted.__name__ = "number"


def _list(options: argparse.Namespace) -> int:
    pools = list_pools()
    if options.json:
        print(json.dumps([dataclasses.asdict(info) for info in pools], indent=2))
    elif pools:
        print_views([pools_view(pools)])
    else:
        print("there are no pools of this user")
    return 0


def _stats(options: argparse.Namespace) -> int:
    with inspect(_name(options)) as inspector:
        stats, alive = inspector.stats(), inspector.alive
    if options.json:
        print(json.dumps({**stats.to_dict(), "alive": alive}, indent=2))
    else:
        print_views(pool_views(stats, stats, alive=alive))
    return 0


def _top(options: argparse.Namespace) -> int:
    with inspect(_name(options)) as inspector:
        looks = _looks(inspector, options.interval)
        try:
            if options.once:
                print_views(next(looks))
            elif can_draw():
                with live_screen(alternate=True) as draw:
                    for views in looks:
                        draw(views)
            else:
                for views in looks:
                    print_views(views)
                    print(flush=True)
        except KeyboardInterrupt:  # the way to end it
            return 0
        if not options.once:
            closed = inspector.stats().state == "closed"
            print(f"pool {inspector.name!r} {'is closed' if closed else 'is used by no process any more'}")
    return 0


def _events(options: argparse.Namespace) -> int:
    wanted = frozenset(options.kind or KINDS)
    with inspect(_name(options)) as inspector:
        batch = inspector.events()
        chosen = [event for event in batch.events if event.kind in wanted]
        _print_events(chosen[max(0, len(chosen) - options.last) :], 0, options)
        if not options.follow:
            if not chosen and not options.json:
                print("nothing has happened yet" if wanted == frozenset(KINDS) else "none of these has happened yet")
            return 0
        with contextlib.suppress(KeyboardInterrupt):  # the way to end it
            for news in _following(inspector, batch.next):
                _print_events([event for event in news.events if event.kind in wanted], news.lost, options)
    return 0


def _following(inspector: Inspector, after: int) -> Iterator[EventBatch]:
    """What happens from event `after` on, until the pool has ended."""
    stuck_since = math.inf  # since when the next event is half written: for ever, if its process died
    while True:
        is_over = inspector.snapshot()["state"] == "closed" or not inspector.alive  # before the last look at events
        batch = inspector.events(after, patient=not is_over and time.monotonic() - stuck_since < _EVENT_PATIENCE_S)
        if batch.next > after:
            yield batch
        is_stuck = batch.next == after and inspector.events(after).next > after
        stuck_since = min(stuck_since, time.monotonic()) if is_stuck else math.inf
        after = batch.next
        if is_over:
            return
        time.sleep(_FOLLOW_S)


def _print_events(events: Iterable[Event], lost: int, options: argparse.Namespace) -> None:
    if lost:
        print(f"({lost} events were lost: overwritten, or their process died while it wrote)", file=sys.stderr)
    for event in events:
        print(json.dumps(event.to_dict()) if options.json else _printable(_event_line(event)), flush=options.follow)


def _event_line(event: Event) -> str:
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time)) + f".{int(event.time * 1000) % 1000:03d}"
    return f"{moment}  {event.pid:>7}  {event.kind:<11}  {event.describe()}"


def _looks(inspector: Inspector, interval: float) -> Iterator[list[View]]:
    """What each interval brought, until the pool ends."""
    before = inspector.stats()
    while True:
        time.sleep(interval)
        now, alive = inspector.stats(), inspector.alive
        yield pool_views(now, now.diff(before), alive=alive)
        if now.state == "closed" or not alive:
            return
        before = now


def _pause(options: argparse.Namespace) -> int:
    name = options.name
    new = steering.pause(name)
    text = f"{name} {'is paused' if new else 'was paused already'}: callers wait until `shmpool resume {name}`"
    return _tell(options, text, state="paused", changed=new)


def _resume(options: argparse.Namespace) -> int:
    new = steering.resume(options.name)
    text = f"{options.name} {'is open again: callers are served' if new else 'was open already'}"
    return _tell(options, text, state="open", changed=new)


def _drain(options: argparse.Namespace) -> int:
    name = options.name
    left = steering.drain(name, options.timeout)
    try:
        with inspect(name) as inspector:
            stats = inspector.stats()
        state, still_open = stats.state, stats.open
    except PoolNotFound:  # its processes have ended, as they may when it is drained
        state, still_open = "closed", 0
    after = f"callers get PoolClosed until `shmpool resume {name}`"
    if state not in ("draining", "closed"):
        text = f"{name} is not drained: somebody has made it {state} meanwhile; {_connections(left)} in use"
    elif left:
        text = f"{name} still drains: {_connections(left)} in use after {options.timeout:g} s; {after}"
    else:
        idle = f", {_connections(still_open)} idle" if still_open else ""
        text = f"{name} is drained: nothing is in use{idle}; {after}"
    status = FAILED if left or state not in ("draining", "closed") else 0
    return _tell(options, text, status, state=state, leases_left=left, open=still_open)


def _resize(options: argparse.Namespace) -> int:
    before = steering.resize(options.name, options.connections)
    with inspect(options.name) as inspector:
        surplus = max(0, inspector.stats().open - options.connections)
    text = f"{options.name} may have {_connections(options.connections)}, before {before}"
    if surplus:
        text += f"; {surplus} more {'is' if surplus == 1 else 'are'} open, and end when they are idle or returned"
    return _tell(options, text, max_connections=options.connections, before=before, surplus=surplus)


def _evict(options: argparse.Namespace) -> int:
    found = steering.evict(options.name, options.id, options.peer, leased=options.leased)
    if not found:
        text = f"{options.name} has no such connection"
    else:
        in_use = options.leased or options.id is not None or options.peer is not None
        when = "those in use end when they are returned, idle ones now" if in_use else "nobody gets them any more"
        text = f"evicted {_connections(found)} of {options.name}: {when}"
    return _tell(options, text, evicted=found)


def _recover(options: argparse.Namespace) -> int:
    dead = steering.recover(options.name, options.timeout)
    processes = f"{dead} dead process{'' if dead == 1 else 'es'}"
    text = f"recovered what {processes} of {options.name} held" if dead else f"no process of {options.name} has died"
    return _tell(options, text, recovered=dead)


def _close(options: argparse.Namespace) -> int:
    left = steering.close(options.name, options.timeout or 0.0)
    text = f"{options.name} is closed: callers get PoolClosed, the name is free"
    if left:
        text += f"; {_connections(left)} in use, which end when they are returned"
    return _tell(options, text, FAILED if left and options.timeout else 0, state="closed", leases_left=left)


def _tell(options: argparse.Namespace, text: str, status: int = 0, **figures: object) -> int:
    """What has happened, in words or as JSON."""
    print(json.dumps({"name": options.name, **figures}, indent=2) if options.json else text)
    return status


def _connections(count: int) -> str:
    return f"{count} connection{'' if count == 1 else 's'}"


def _doctor(options: argparse.Namespace) -> int:
    """0: nothing is wrong any more."""
    removed = slab.reap()
    pools = list_pools()
    damaged = [info for info in pools if info.error]
    if options.json:
        found = {"removed": removed, "pools": [dataclasses.asdict(info) for info in pools]}
        print(json.dumps(found, indent=2))
        return FAILED if damaged else 0
    for each in removed:
        print(f"removed {each}: no process uses it any more")
    for info in damaged:
        print(f"{info.name}: {_printable(info.error)}")
    sound = len(pools) - len(damaged)
    print(f"{sound} {'pool is' if sound == 1 else 'pools are'} sound, {len(damaged)} damaged, {len(removed)} removed")
    return FAILED if damaged else 0


def _unlink(options: argparse.Namespace) -> int:
    unlink(options.name, force=options.force)
    print(f"removed {options.name}")
    return 0


def _export(options: argparse.Namespace) -> int:
    try:
        from .exporter import exposition, serve
    except ImportError as error:
        raise _Refusal(str(error), FAILED) from None
    if options.once:
        print(exposition(), end="")
    else:
        serve(options.host, options.port)
    return 0


def _demo(options: argparse.Namespace) -> int:
    from .demo import run

    return run(seconds=options.seconds, workers=options.workers, connections=options.connections)


def _name(options: argparse.Namespace) -> str:
    """The name that was given, or that of the only pool."""
    if options.name is not None:
        return str(options.name)
    names = [info.name for info in list_pools()]
    if not names:
        raise _Refusal("there are no pools of this user", FAILED)
    if len(names) > 1:
        raise _Refusal(f"there are several pools, name one: {', '.join(names)}", MISUSED)
    return names[0]


# What is shown ------------------------------------------------------------------------------------------------------


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
        self.rows.append(tuple(map(_printable, cells)))
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
            down = ", server down" if info.upstream in _DOWN else ""
            state = info.state + down if info.alive else "dead"
            style = "dim" if not info.alive else "" if state == "open" else "yellow"
            cells = (info.name, state, str(info.pid), str(info.max_connections), size, created, info.target)
            view.add(*cells, style=style)
    return view


def pool_views(now: PoolStats, change: PoolStats, *, alive: bool = True) -> list[View]:
    """A pool: its gauges and life as `now` has them, rates and latencies as `change` has them."""
    return [head_view(now, alive=alive), summary_view(now, change), workers_view(change), connections_view(now)]


def head_view(now: PoolStats, *, alive: bool = True) -> View:
    """One line: which pool this is."""
    view = View(left=frozenset({0}))
    age = time_text(time.time() - now.created_at)
    dead = not alive and now.state != "closed"
    state = "dead: no process has it any more" if dead else _STATES.get(now.state, now.state)
    view.add(f"{now.name}  {now.target}  {state}  {age} old", style="bold")
    return view


_STATES = {"paused": "paused: callers wait", "draining": "draining: callers are refused"}
_DOWN = ("down", "probing")


def summary_view(now: PoolStats, change: PoolStats) -> View:
    """The totals, a subject per row."""
    view = View(left=frozenset({0, 1}))
    states = [f"{count} {state}" for state, count in now.connections.items() if count and state != "empty"]
    view.add("connections", f"{gauge(now)} {_list_of(states, 'none open')} of {now.max_connections}")
    if now.upstream in _DOWN:
        view.add("server", _outage(now), style="red")
    if missing := _missing(now):
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
    troubles = _troubles(now)
    view.add("trouble", _list_of(troubles, "none"), style="yellow" if troubles else "")
    return view


def _missing(now: PoolStats) -> str:
    """What there is to say of a minimum that is not open."""
    there = now.open - now.connections.get("dialing", 0)
    if there >= now.prewarm_target:
        return ""
    if not now.prewarm_done:
        return f"{there} of {now.prewarm_target} are open"
    failed = f"{count_text(now.prewarm_failed)} could not be opened"
    return f"began with {now.prewarm_created} of {now.prewarm_target}: {failed}" if now.prewarm_failed else ""


def _outage(now: PoolStats) -> str:
    retry = "one dial is under way" if now.upstream == "probing" else f"next dial in {time_text(now.upstream_retry_in)}"
    why = f": {now.upstream_error}" if now.upstream_error else ""
    return f"down for {time_text(now.upstream_down_for)}, {retry}{why}"


def _opened(now: PoolStats) -> str:
    reasons = [f"{count_text(count)} {reason.replace('_', ' ')}" for reason, count in now.closed.items() if count]
    opened = f"{count_text(now.created)}, of {count_text(now.reuse_average)} leases each"
    return f"{opened}; closed: {', '.join(reasons)}" if reasons else opened


def _troubles(now: PoolStats) -> list[str]:
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
    cells = width // now.max_connections * now.max_connections or width
    marks = ("█", now.in_use), ("▒", now.idle), ("░", now.open - now.in_use - now.idle)
    bar, seen, drawn = "", 0, 0
    for mark, count in marks:
        seen += count
        end = min(cells, round(seen / now.max_connections * cells))
        bar += mark * (end - drawn)
        drawn = end
    return f"[{bar:·<{cells}}]"


def workers_view(change: PoolStats) -> View:
    """A row per worker, the busiest first; those that have ended, marked †, last."""
    headings = ("worker", "held", "idle", "wait", "gets/s", "hit %", "steals/s", "waits/s", "get p50", "p99")
    view = View(headings, widths=(7, 4, 4, 4, 6, 5, 8, 7, 7, 7))
    for worker in sorted(change.workers, key=lambda each: (not each.alive, -each.gets, each.index)):
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


def _printable(text: str) -> str:
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


def can_draw() -> bool:
    """Whether a live picture is possible: on a terminal that can move its cursor, with `pip install 'shmpool[cli]'`."""
    terminal = sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    return terminal and importlib.util.find_spec("rich") is not None


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
