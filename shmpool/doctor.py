"""What is wrong with a pool, in words, and what to change: what `shmpool doctor` says.

    for finding in examine("redis")["redis"]:
        print(finding.severity, finding.what, finding.remedy)

Two looks, some time apart, because a pool under load is never at rest: what the slab must not say counts as damage only
when both looks see it, and loads and rates are those of the time between. A finding is

    damage    the slab says what it cannot: it was overwritten
    problem   callers suffer now
    advice    it works, and could work better

Every check is a function from a `Case` to findings, and stands in CHECKS; nothing is asked of the pool or its
processes, and nothing is changed. Of other processes /proc is read; what cannot be read there is left out.

Not here: the figures (`stats`), segments that cannot be opened at all (`inspector`), removing what dead pools left
(`slab.reap`), printing (`cli`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from . import slab
from .errors import SlabCorrupt
from .events import Event
from .inspector import Inspector, inspect
from .stats import DOWN, HELD, KINDS, STATES, UNCOUNTED, ConnectionStats, PoolStats, made_once
from .views import count_text, time_text

__all__ = ["Case", "Finding", "Process", "Severity", "diagnose", "examine", "remains_of"]

Severity = Literal["damage", "problem", "advice"]

FEW_LEASES = 20  # below, an interval says nothing of the load
BUSY, WISHED = 0.85, 0.8  # shares of the cap: from where it is scarce, and which is comfortable
SOON_S, STARVED_S = 0.1, 1.0
FULL, NEARLY_FULL = 0.95, 0.8  # shares of a limit
NEGLECTED_S, NEGLECTED_TICKS = 5.0, 10
LATELY_S, FEW_DEATHS = 600.0, 3
LONG_S = 300.0  # a lease, in a pool without leak_timeout
ABSURD = 1 << 62
_SHOWN = 3  # of several of a kind, in words


@dataclass(frozen=True)
class Finding:
    """Something that was found: in words, what to do about it, and the figures behind it (plain types)."""

    severity: Severity
    code: str  # "cap", "leak", ... : what it is about
    what: str
    remedy: str
    evidence: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


class Process(NamedTuple):
    """What /proc says of one."""

    name: str
    stopped: bool = False
    descriptors: int = 0
    descriptors_max: float = math.inf

    @classmethod
    def of(cls, pid: int, segment: str | None = None) -> Process | None:
        """None: it has ended, is not ours to look at, or is another one: it does not have that file open (the pool's
        processes may be of another pid namespace)."""
        place = Path("/proc", str(pid))
        try:
            text = (place / "stat").read_text(errors="replace")
            limits = (place / "limits").read_text()
            files = [os.path.realpath(place / "fd" / each) for each in os.listdir(place / "fd")]
        except OSError:
            return None
        if segment is not None and segment not in files:
            return None
        name, state = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2]
        limit = next((line.split()[3] for line in limits.splitlines() if line.startswith("Max open files")), "")
        return cls(name, state in "Tt", len(files), int(limit) if limit.isdigit() else math.inf)


@dataclass(frozen=True)
class Case:
    """All that a check may look at."""

    first: PoolStats
    now: PoolStats
    events: tuple[Event, ...] = ()
    processes: Mapping[int, Process] = field(default_factory=dict)  # living workers, by pid

    @made_once
    def change(self) -> PoolStats:
        """What happened between the two looks."""
        return self.now.diff(self.first)

    @made_once
    def settings(self) -> dict[str, Any]:
        """Those of who created the pool, as far as they can be read."""
        try:
            read = json.loads(self.now._snapshot["config"])
        except (ValueError, RecursionError):
            return {}
        return read if isinstance(read, dict) else {}

    def seconds(self, setting: str, default: float) -> float:
        value = self.settings.get(setting)
        try:
            return float(value) if isinstance(value, (int, float)) else default
        except OverflowError:  # no setting of a pool
            return default

    def who(self, pid: int | None) -> str:
        """A process in words."""
        found = self.processes.get(pid or 0)
        return f"process {pid}{f' ({found.name})' if found else ''}"


def examine(*names: str, seconds: float = 1.0) -> dict[str, list[Finding]]:
    """What is found of each of these pools, the worst first; two looks at all of them, `seconds` apart.

    One that ends meanwhile is left out. Raises a PoolError when one cannot be looked at to begin with.
    """
    with contextlib.ExitStack() as stack:
        first = {}
        for name in names:
            inspector = stack.enter_context(inspect(name))
            first[name] = inspector, inspector.stats()
        time.sleep(seconds)
        return {name: _second_look(*looked) for name, looked in first.items() if looked[0].alive}


def remains_of(name: str) -> Finding:
    """Of a pool that no process has any more."""
    remedy = f"`shmpool unlink {name}` removes what is left; so does `shmpool doctor`, and the next pool that is made"
    return Finding("advice", "remains", "no process uses it any more", remedy)


def _second_look(inspector: Inspector, first: PoolStats) -> list[Finding]:
    try:
        now, events = inspector.stats(), tuple(inspector.events().events)
    except SlabCorrupt as error:
        return [
            Finding("damage", "slab", str(error), f"`shmpool unlink {inspector.name} --force`, and restart its users")
        ]
    pids = [worker.pid for worker in now.workers if worker.alive]
    segment = slab.path_of(inspector.name)
    processes = {pid: found for pid in pids if (found := Process.of(pid, segment)) is not None}
    return diagnose(Case(first, now, events, processes))


def diagnose(case: Case) -> list[Finding]:
    """What all checks say of a case, the worst first. Of a damaged slab nothing but the damage is believed."""
    damage = list(_damage(case))
    found = damage or [finding for check in CHECKS for finding in check(case)]
    return sorted(found, key=lambda each: get_args(Severity).index(each.severity))


# Damage -------------------------------------------------------------------------------------------------------------


def _damage(case: Case) -> Iterator[Finding]:
    before = set(_contradictions(case.first))
    both = [text for text in _contradictions(case.now) if text in before]
    if both:
        shown, more = both[:_SHOWN], len(both) - _SHOWN
        name = case.now.name
        yield Finding(
            "damage",
            "slab",
            "its slab says what it cannot: " + "; ".join(shown) + (f"; and {more} more" if more > 0 else ""),
            "something else has written into it, or the memory is faulty. "
            f"Keep the output of `shmpool stats {name} --json`, then `shmpool close {name}` and restart its processes",
            {"contradictions": both},
        )


def _contradictions(stats: PoolStats) -> Iterator[str]:
    """Sentences that stay equal as long as nothing changes."""
    snapshot = stats._snapshot
    workers = {worker.index for worker in stats.workers}
    if stats.state not in ("open", "paused", "draining", "closed"):
        yield f"the pool is in no state that exists ({stats.state})"
    yield from _slot_contradictions(snapshot, workers)
    for waiter in snapshot["waiters"]:
        at = dict(zip(snapshot["waiter_fields"], waiter, strict=True))
        if at["worker"] not in workers:
            yield f"in place {at['index']} of the queue waits worker {at['worker']}, which was never there"
    for owner, counters in [
        ("the pool", snapshot["totals"]),
        *((f"worker {w.index}", w.counters) for w in stats.workers),
    ]:
        for name, count in counters.items():
            if count >= ABSURD:
                yield f"{name} of {owner} is {count}"
    settled = stats.open - stats.connections["dialing"] - stats.connections["retiring"]
    if not settled <= stats.current <= stats.open:
        yield f"its accounts know {stats.current} connections, its slots {settled}"


def _slot_contradictions(snapshot: Mapping[str, Any], workers: set[int]) -> Iterator[str]:
    slots = [dict(zip(snapshot["slot_fields"], row, strict=True)) for row in snapshot["slots"]]
    ids = Counter(slot["id"] for slot in slots if slot["id"])
    for slot in slots:
        which, state, owner = f"slot {slot['index']}", slot["state"], slot["owner"]
        if state not in STATES:
            yield f"{which} is in no state that exists"
        elif state == "empty" and slot["id"]:
            yield f"{which} is empty and has connection {slot['id']}"
        elif state in HELD and owner not in workers:
            yield f"{which} is {state} by worker {owner}, which was never there"
        elif state in ("leased", "idle") and slot["bucket"] >= len(KINDS):
            yield f"{which} has a connection of no kind that exists"
        if ids[slot["id"]] > 1:
            yield f"{which} has connection {slot['id']}, and so has another"


# Who suffers --------------------------------------------------------------------------------------------------------


def _not_open(case: Case) -> Iterator[Finding]:
    state, name = case.now.state, case.now.name
    if state == "paused":
        suffers = case.now.waiting > 0
        waiting = f"{case.now.waiting} calls wait" if case.now.waiting > 1 else "a call waits"
        text = f"the pool is paused: {waiting if suffers else 'callers wait'}"
        yield Finding("problem" if suffers else "advice", "state", text, f"`shmpool resume {name}` when you are done")
    elif state == "draining":
        refused = case.change.refused
        text = f"the pool drains: calls get PoolClosed{f', {refused} while we looked' if refused else ''}"
        yield Finding("problem" if refused else "advice", "state", text, f"`shmpool resume {name}` opens it again")


def _server(case: Case) -> Iterator[Finding]:
    now = case.now
    if now.upstream in DOWN:
        why = f": {now.upstream_error}" if now.upstream_error else ""
        yield Finding(
            "problem",
            "server",
            f"the server {now.target} has not answered for {time_text(now.upstream_down_for)}{why}",
            "see whether it runs and can be reached from this host; one process tries again by itself"
            + _and_when_down(case),
            {"down_for": now.upstream_down_for, "error": now.upstream_error, "failures": now.upstream_failures},
        )
    elif now.dial_failures >= 5 and now.dial_failure_rate > 0.05:
        yield Finding(
            "problem" if case.change.dial_failures else "advice",
            "dials",
            f"{now.dial_failures} of {now.dial_attempts} dials failed",
            f"`shmpool events {now.name} --kind dial_failed` says why; dial_retries tries again within one call",
            {"attempts": now.dial_attempts, "failures": now.dial_failures},
        )


def _and_when_down(case: Case) -> str:
    return "" if case.settings.get("when_down") == "wait" else '; with when_down="wait" calls wait instead of failing'


def _stuck(case: Case) -> Iterator[Finding]:
    """A call that waits through both looks, beside a connection that would do and was idle through both."""
    if case.now.state != "open":
        return
    free = {
        f"{slot.protocol}{slot.ip_version or ''}": slot.id
        for slot in case.now.slots
        if slot.state == "idle" and not slot.flags and (slot.since or 0.0) >= case.change.interval
    }
    earlier = {(waiter.pid, waiter.thread) for waiter in case.first.waiters}
    for waiter in case.now.waiters:
        fits = [free[kind] for kind in waiter.wants if kind in free]
        if fits and waiter.waited > case.change.interval and (waiter.pid, waiter.thread) in earlier:
            stopped = waiter.pid in case.processes and case.processes[waiter.pid or 0].stopped
            if not stopped:
                yield Finding(
                    "problem",
                    "stuck",
                    f"{case.who(waiter.pid)} waits for {time_text(waiter.waited)}, and connection {fits[0]} is idle",
                    "its process is too busy to take it, or blocked in a signal handler; if it is not, this is a fault "
                    f"of shmpool: please report it with `shmpool stats {case.now.name} --json`",
                    {"pid": waiter.pid, "thread": waiter.thread, "waited": waiter.waited, "connection": fits[0]},
                )


def _starvation(case: Case) -> Iterator[Finding]:
    """Somebody waits for long, and nothing comes back."""
    now = case.now
    limit = case.seconds("get_timeout", math.inf)
    if now.state != "open" or now.upstream in DOWN:
        return  # that is why
    if now.oldest_wait < max(SOON_S, min(STARVED_S, limit / 2)):
        return
    holders = sorted((slot for slot in now.slots if slot.state == "leased"), key=lambda slot: -(slot.since or 0))
    counts = Counter(slot.holder for slot in holders)
    longest: dict[int | None, float] = {}
    for slot in holders:
        longest.setdefault(slot.holder, slot.since or 0.0)
    who = [f"{case.who(pid)} holds {n}, for up to {time_text(longest[pid])}" for pid, n in counts.most_common(_SHOWN)]
    slow = bool(holders) and (holders[-1].since or 0) >= now.oldest_wait
    yield Finding(
        "problem",
        "starvation",
        f"a call has waited for {time_text(now.oldest_wait)}, {_calls(now.waiting)} in all; " + "; ".join(who),
        "all of them keep theirs for longer than that wait: see what they do with it (leak_timeout reports them)"
        if slow
        else "raise max_connections, or hold connections for less time",
        {"oldest_wait": now.oldest_wait, "waiting": now.waiting, "holders": {str(pid): n for pid, n in counts.items()}},
    )


def _cap(case: Case) -> Iterator[Finding]:
    """Little's law, L = rate x time: of the leases, how many are out on average; of the waits, how many calls wait."""
    load, cap = case.change, case.now.max_connections
    if load.successes < FEW_LEASES or case.now.state != "open" or case.now.upstream in DOWN:
        return
    kept = sum(slot.state == "leased" and (slot.since or 0.0) >= load.interval for slot in case.now.slots)
    busy, queue = load.use_latency.total / load.interval, load.wait_latency.total / load.interval
    if busy + kept < BUSY * cap or (queue < 0.5 and not load.timeouts) or 2 * kept >= cap:
        return  # enough; or who keeps them is the trouble
    needed = max(cap + 1, math.ceil((min(busy + kept, cap) + queue) / WISHED))
    more = f", {kept} more {'is' if kept == 1 else 'are'} out for longer than we looked" if kept else ""
    lost = f"; {load.timeouts} calls got none in time" if load.timeouts else ""
    how = (
        f"`shmpool resize {case.now.name} {needed}`, and max_connections={needed} in its settings"
        if needed <= case.now.resize_limit
        else f"max_connections={needed} in its settings (it can be resized to {case.now.resize_limit} as it runs)"
    )
    yield Finding(
        "problem" if load.timeouts else "advice",
        "cap",
        f"the cap of {cap} is too small: {count_text(load.per_second(load.successes))} leases/s of "
        f"{time_text(load.use_latency.mean)} each keep {busy:.1f} connections busy{more}, and {queue:.1f} calls wait "
        f"at any moment, for {time_text(load.wait_latency.mean)} each{lost}",
        f"{how}, if the server bears that; or hold connections for less time",
        {
            "busy": busy,
            "kept": kept,
            "queue": queue,
            "max_connections": cap,
            "wanted": needed,
            "timeouts": load.timeouts,
        },
    )


def _leaks(case: Case) -> Iterator[Finding]:
    limit = case.seconds("leak_timeout", LONG_S)
    limit = LONG_S if math.isinf(limit) else limit
    for slot in case.now.slots:
        if slot.state == "leased" and (slot.since or 0.0) > limit:
            yield _leak(case, slot, limit)
    if case.now.leaks:
        yield Finding(
            "problem" if case.change.leaks else "advice",
            "dropped",
            f"{_leases(case.now.leaks)} dropped without release(), and ended by the garbage collector",
            "lease with `with pool.get() as conn:`",
            {"leaks": case.now.leaks},
        )


def _leak(case: Case, slot: ConnectionStats, limit: float) -> Finding:
    since = case.now.created_at + case.now.interval - (slot.since or 0.0)
    stack = [
        event.text
        for event in case.events
        if event.kind == "taken_at" and event.connection_id == slot.id and event.time >= since
    ]
    where = f", taken in {' < '.join(stack)}" if stack else ""
    advice = "" if stack or case.settings.get("leak_stacks") else "; leak_stacks=True tells where it was taken"
    return Finding(
        "problem",
        "leak",
        f"connection {slot.id} is leased by {case.who(slot.holder)} for {time_text(slot.since or 0.0)}"
        f" (leak_timeout {limit:g} s){where}",
        f'see why it is not returned{advice}; leak_action="revoke" takes such leases away; when process {slot.holder} '
        "ends, the others get it back",
        {"connection_id": slot.id, "pid": slot.holder, "since": slot.since, "stack": stack},
    )


# What could be better -----------------------------------------------------------------------------------------------

_REMEDIES = {
    "broken": "the server closes them: make idle_timeout and max_lifetime shorter than its own limits, or see its log",
    "dirty": "bytes were left unread: read each answer to its end before the release",
    "error": "the code that holds them raises or calls discard(): `shmpool events {name} --kind discarded` says why",
    "leaked": "leases are dropped without release(): lease with `with pool.get() as conn:`",
    "idle": "they are idle too long, or more than max_idle_connections: raise that, idle_timeout or min_connections",
    "lifetime": "max_lifetime is short for so many connections: raise it",
    "refused": "on_created or on_borrow refuses them: see why in its log",
    "evicted": "kinds of connections displace each other, or evict() is called: raise max_connections",
    "letter": "descriptors cannot travel: raise the limit of open files (RLIMIT_NOFILE) of all processes",
    "owner_died": "processes die while they hold them: see who kills them (a server's timeout, the OOM killer)",
    "unhealthy": "health_check refuses them: see what it finds",
    "revoked": "leases are out for longer than leak_timeout: see who keeps them",
}


def _reconnects(case: Case) -> Iterator[Finding]:
    """Connections that live for a few leases only."""
    change = case.change
    load = change if change.created >= FEW_LEASES else case.now
    closed = {reason: count for reason, count in load.closed.items() if count > 0 and reason != UNCOUNTED}
    if load.created < FEW_LEASES or load.successes > 10 * load.created or not closed:
        return
    reason = max(closed, key=lambda each: closed[each])
    if reason in ("shutdown", "resized") or (reason == "broken" and case.settings.get("listening")):
        return  # clients come and go
    ends = f"{closed[reason]} of {sum(closed.values())} ended as {reason.replace('_', ' ')}"
    yield Finding(
        "advice",
        "reconnects",
        f"a connection serves {load.successes / load.created:.1f} leases on average: {count_text(load.created)} were "
        f"opened in {time_text(load.interval)}, and {ends}",
        _REMEDIES.get(reason, "see `shmpool events {name} --kind closed`").format(name=case.now.name),
        {"created": load.created, "leases": load.successes, "closed": closed},
    )


def _descriptors(case: Case) -> Iterator[Finding]:
    for pid, process in case.processes.items():
        share = process.descriptors / max(1, process.descriptors_max)  # a process may have forbidden itself any more
        if share >= NEARLY_FULL:
            yield Finding(
                "problem" if share >= FULL else "advice",
                "descriptors",
                f"{case.who(pid)} has {process.descriptors} of {process.descriptors_max:.0f} descriptors open",
                "raise its limit of open files (ulimit -n, LimitNOFILE=): a pool needs two for each connection in each "
                "process",
                {"pid": pid, "open": process.descriptors, "limit": process.descriptors_max},
            )
    if case.now.failed_deposits:
        yield Finding(
            "advice",
            "deposits",
            f"{_connections(case.now.failed_deposits)} could not be shared: too many descriptors were in flight",
            "raise the limit of open files (RLIMIT_NOFILE) of the user's processes: it also limits what is on its way",
            {"failed_deposits": case.now.failed_deposits},
        )


def _places(case: Case) -> Iterator[Finding]:
    """Limits of the slab itself, which are set when the pool is made."""
    alive = sum(worker.alive for worker in case.now.workers)
    used = {"max_workers": alive, "max_waiters": case.now.waiting}
    for setting, count in used.items():
        limit = case.now._snapshot[setting]
        if count >= NEARLY_FULL * limit and limit > 1:
            what = "processes use the pool" if setting == "max_workers" else "calls wait"
            yield Finding(
                "advice",
                setting,
                f"{count} {what}; it has places for {limit}",
                f"raise {setting}; the others are refused",
                {"used": count, "limit": limit},
            )


def _stopped(case: Case) -> Iterator[Finding]:
    for worker in case.now.workers:
        process = case.processes.get(worker.pid)
        if worker.alive and process is not None and process.stopped and (worker.held or worker.waiting):
            yield Finding(
                "problem" if worker.held else "advice",
                "stopped",
                f"{case.who(worker.pid)} is stopped, and has {_connections(worker.held)} in its hands",
                f"it was sent SIGSTOP, or a debugger has it: `kill -CONT {worker.pid}`, or end it",
                {"pid": worker.pid, "held": worker.held},
            )


def _deaths(case: Case) -> Iterator[Finding]:
    now = case.now
    waiting = [worker for worker in now.workers if not worker.alive and worker.held]
    for worker in waiting:
        if any(first.pid == worker.pid and not first.alive for first in case.first.workers):
            yield Finding(
                "advice",
                "dead",
                f"process {worker.pid} has died with {_connections(worker.held)} in its hands",
                f"they are taken back as soon as a process needs one; `shmpool recover {now.name}` does it now",
                {"pid": worker.pid, "held": worker.held},
            )
    lately = [event for event in case.events if event.kind == "died" and time.time() - event.time < LATELY_S]
    taken = sum(event.count or 0 for event in lately)
    if len(lately) >= FEW_DEATHS and taken:
        yield Finding(
            "advice",
            "deaths",
            f"{len(lately)} processes died in the last {time_text(LATELY_S)}, {_connections(taken)} in their hands",
            "see who kills them: a timeout of the server (gunicorn --timeout), the kernel's OOM killer (dmesg)",
            {"deaths": len(lately), "taken_back": taken},
        )


def _maintenance(case: Case) -> Iterator[Finding]:
    """Nobody does what is to be done in the background."""
    interval = case.seconds("maintenance_interval", math.inf)
    now: int = case.now._snapshot["now"]
    last: int = case.now._snapshot["maintained_ns"]
    for_so_long = (now - last) / 1e9 if last else case.now.interval
    if math.isinf(interval) or not any(worker.alive for worker in case.now.workers) or case.now.state == "closed":
        return
    if for_so_long > max(NEGLECTED_S, NEGLECTED_TICKS * interval):
        yield Finding(
            "advice",
            "maintenance",
            f"nobody has looked after the pool for {time_text(for_so_long)}: nothing is opened ahead or expires",
            "its processes are stopped, hold the interpreter, or a hook (health_check, on_leak, on_close) does not "
            "return",
            {"seconds": for_so_long},
        )


def _minimum(case: Case) -> Iterator[Finding]:
    now = case.now
    there = now.open - now.connections["dialing"]
    is_kept = now.state == "open" and now.prewarm_done
    if is_kept and there < now.prewarm_target and case.first.open < now.prewarm_target:
        yield Finding(
            "advice",
            "minimum",
            f"{there} connections are open, and min_connections is {now.prewarm_target}",
            f"see `shmpool events {now.name} --kind dial_failed`: they cannot be opened, or end as fast as they are",
            {"open": there, "min_connections": now.prewarm_target},
        )
    if now.health_checks >= 10 and now.health_success_rate < 0.9:
        yield Finding(
            "advice",
            "health",
            f"{now.health_failures} of {now.health_checks} checks of idle connections failed",
            "make idle_timeout shorter than the server's own, or see what health_check finds",
            {"checks": now.health_checks, "failures": now.health_failures},
        )


CHECKS: tuple[Callable[[Case], Iterable[Finding]], ...] = (
    _not_open,  # causes come before what they bring about
    _server,
    _stuck,
    _leaks,
    _stopped,
    _starvation,
    _cap,
    _reconnects,
    _descriptors,
    _places,
    _deaths,
    _maintenance,
    _minimum,
)


def _calls(count: int) -> str:
    return f"{count} call{'' if count == 1 else 's'}"


def _leases(count: int) -> str:
    return f"{count} lease{' was' if count == 1 else 's were'}"


def _connections(count: int) -> str:
    return f"{count} connection{'' if count == 1 else 's'}"
