"""The command line: `shmpool list`, `stats`, `top`, `events`, `serve`, `export`; `pause`, `resume`, `drain`, `resize`,
`evict`, `recover`, `close`; `doctor`, `unlink`, `demo`. Also `python -m shmpool`.

A command that looks at a pool does it through `inspector`, turns its `PoolStats` into views, and shows those: as plain
lines, or, for `top` on a terminal, live (`top`). One that changes a pool calls the function of its name in
`steering`, and says in one line what has happened and what that means. Results go to standard output and errors to
standard error; the exit status is 0, or 1 when the command could not be done, or 2 when it was not understood.

Not here: how the figures look (`views`), what they mean (`stats`), what is safe to open or to remove (`inspector`),
what a change does (`steering`), the web view (`web`), the metrics for Prometheus (`exporter`), the demonstration
(`demo`).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from . import __version__, slab, steering
from .doctor import Finding, examine, remains_of
from .errors import InvalidConfig, PoolError, PoolNotFound
from .events import KINDS, Event, EventBatch
from .inspector import Inspector, PoolInfo, inspect, list_pools, unlink
from .sockets import pack_peer
from .stats import PoolStats
from .views import can_draw, live_screen, on_a_terminal, pool_views, pools_view, print_views, printable

__all__ = ["main"]

FAILED, MISUSED, INTERRUPTED = 1, 2, 130
_FOLLOW_S = 0.1  # between looks for new events
_EVENT_PATIENCE_S = 0.5  # an event takes less than a microsecond to write, if its process is not stopped


_Command = Callable[[argparse.Namespace], int]
_Look = tuple[PoolStats, PoolStats, bool]  # now, what an interval has changed, whether a process has the pool


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
    print("shmpool:", "\n".join(map(printable, text.split("\n"))), file=sys.stderr)
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
    _add_serving(add)
    _add_steering(add)

    doctor = add(
        "doctor",
        _doctor,
        "say what is wrong with pools and what to change; remove what dead ones left behind",
        "Of each pool two looks are compared: its slab, leaks, starvation, whether the cap is large enough, "
        "reconnects, descriptors, stopped and dead processes. With NAME nothing is removed. The status is 1 when a "
        "pool is damaged or its callers suffer.",
    )
    doctor.add_argument("name", metavar="NAME", nargs="?", help="only this pool")
    doctor.add_argument("--seconds", type=_seconds, default=1.0, metavar="S", help="between the two looks (default 1)")
    _add_json(doctor)

    unlinking = add("unlink", _unlink, "remove a pool that no process uses any more")
    unlinking.add_argument("name", metavar="NAME", help="the pool")
    unlinking.add_argument(
        "--force", action="store_true", help="also one in use: its processes keep it, and nobody can look at it"
    )
    _add_json(unlinking)

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

    top = add(
        "top",
        _top,
        "show a pool at work, live; q ends it",
        "On a terminal it is a view with keys (? tells them), with `pip install 'shmpool[cli]'`; elsewhere it is plain "
        "text, a look each interval.",
    )
    name_of(top)
    top.add_argument("--interval", type=_seconds, default=1.0, metavar="S", help="seconds between looks (default 1)")
    top.add_argument("--once", action="store_true", help="print one look, over one interval, and end")
    top.add_argument("--json", action="store_true", help="as JSON, a look a line")

    export = add(
        "export",
        _export,
        "serve the figures of all pools to Prometheus",
        "Every pool of this user is reported at each scrape of /metrics. Ctrl-C ends it. Anybody who can reach the "
        "address can read them.",
    )
    export.add_argument(
        "--host", type=_address, default="127.0.0.1", metavar="ADDRESS", help="where to listen (default 127.0.0.1)"
    )
    export.add_argument("--port", type=_port, default=9464, metavar="N", help="default 9464; 0: any that is free")
    export.add_argument("--once", action="store_true", help="print the figures of this moment, and end")


def _add_serving(add: _Add) -> None:
    serve = add(
        "serve",
        _serve,
        "show the pools in a web browser, with plots of the last ten minutes",
        "Ctrl-C ends it. Anybody who can reach the address can look; nothing can be changed there.",
    )
    serve.add_argument("name", metavar="NAME", nargs="?", help="only this pool, which may come later (default: all)")
    serve.add_argument(
        "--host", type=_address, default="127.0.0.1", metavar="ADDRESS", help="where to listen (default 127.0.0.1)"
    )
    serve.add_argument("--port", type=_port, default=9465, metavar="N", help="default 9465; 0: any that is free")


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


def _address(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must be an address of this host; all of them: 0.0.0.0 or ::")
    return text


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
    if not (options.once or options.json) and on_a_terminal() and sys.stdin.isatty():
        try:
            from .top import run
        except ImportError as error:
            print(f"shmpool: {error}", file=sys.stderr)
        else:
            choosing = options.name is None and len(list_pools()) > 1
            if said := run(None if choosing else _name(options), options.interval):
                print(said)
            return 0
    with inspect(_name(options)) as inspector, contextlib.suppress(KeyboardInterrupt):  # the way to end it
        looks = _looks(inspector, options.interval)
        _print_looks(itertools.islice(looks, 1) if options.once else looks, options)
        if not (options.once or options.json):
            closed = inspector.stats().state == "closed"
            print(f"pool {inspector.name!r} {'is closed' if closed else 'is used by no process any more'}")
    return 0


def _print_looks(looks: Iterable[_Look], options: argparse.Namespace) -> None:
    if options.json:
        for _, change, alive in looks:
            print(json.dumps({**change.to_dict(), "alive": alive}), flush=True)
    elif can_draw() and not options.once:
        with live_screen(alternate=True) as draw:
            for now, change, alive in looks:
                draw(pool_views(now, change, alive=alive))
    else:
        for now, change, alive in looks:
            print_views(pool_views(now, change, alive=alive))
            print(end="" if options.once else "\n", flush=True)


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
        print(json.dumps(event.to_dict()) if options.json else printable(_event_line(event)), flush=options.follow)


def _event_line(event: Event) -> str:
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time)) + f".{int(event.time * 1000) % 1000:03d}"
    return f"{moment}  {event.pid:>7}  {event.kind:<11}  {event.describe()}"


def _looks(inspector: Inspector, interval: float) -> Iterator[_Look]:
    """What each interval brought, until the pool ends."""
    before = inspector.stats()
    while True:
        time.sleep(interval)
        now, alive = inspector.stats(), inspector.alive
        yield now, now.diff(before), alive
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
    """0: nothing is wrong any more, or nothing that anybody suffers from."""
    removed = [] if options.name else slab.reap()
    pools = [info for info in list_pools() if options.name in (None, info.name)]
    if options.name and not pools:
        raise PoolNotFound(name=options.name)
    damaged = [info for info in pools if info.error]
    living = [info.name for info in pools if info.alive and not info.error]
    findings = {info.name: [remains_of(info.name)] for info in pools if not info.alive and not info.error}
    findings |= _examined(living, options)
    worst = {name: found[0].severity for name, found in findings.items() if found}
    if options.json:
        told = [
            {**dataclasses.asdict(info), "findings": [each.to_dict() for each in findings.get(info.name, [])]}
            for info in pools
        ]
        print(json.dumps({"removed": removed, "pools": told}, indent=2))
    else:
        _tell_findings(removed, damaged, findings)
        broken = len(damaged) + sum(severity == "damage" for severity in worst.values())
        well = len(pools) - len(damaged) - len(worst)
        others = len(pools) - well - broken
        print(f"pools: {well} well, {others} with findings, {broken} damaged, {len(removed)} removed")
    return FAILED if damaged or {"damage", "problem"} & set(worst.values()) else 0


def _examined(names: Sequence[str], options: argparse.Namespace) -> dict[str, list[Finding]]:
    """What is found of these pools; who did not ask for one by its name is not told that it has ended just now."""
    while names:
        try:
            return examine(*names, seconds=options.seconds)
        except PoolNotFound as gone:
            if options.name:
                raise
            names = [name for name in names if name != gone.name]
    return {}


def _tell_findings(removed: Iterable[str], damaged: Iterable[PoolInfo], findings: dict[str, list[Finding]]) -> None:
    for each in removed:
        print(f"removed {each}: no process uses it any more")
    for info in damaged:
        print(f"{info.name}: {printable(info.error)}")
    for name, found in findings.items():
        if not found:
            print(f"{name}: nothing is wrong")
        for finding in found:
            print(printable(f"{name}: {finding.severity}: {finding.what}"))
            print(printable(f"    {finding.remedy}"))


def _unlink(options: argparse.Namespace) -> int:
    unlink(options.name, force=options.force)
    return _tell(options, f"removed {options.name}", removed=True)


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


def _serve(options: argparse.Namespace) -> int:
    from .web import serve

    serve(options.name, options.host, options.port)
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
