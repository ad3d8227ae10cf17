"""The books of a pool: what its counters say, against themselves, against what callers counted, and against the server.

What: `Ledger` counts calls of one caller by how they ended; `audit` asserts that all accounts agree, once nothing is
under way any more.

Why: a counter that drifts is seen only by who keeps one of his own. The server's account is the third: it knows nothing
of the pool.

Not here: pools, processes (`processes.py`), servers (`servers.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from shmpool import DialError, Pool, PoolClosed, PooledConnection, PoolExhausted, PoolStats, PoolTimeout
from shmpool.stats import FAILURES, SOURCES
from tests.processes import states, until
from tests.servers import ExclusiveServer

ABSURD = 1 << 48  # a counter that went below zero is larger
ENDINGS: tuple[tuple[type[BaseException], str], ...] = (
    (PoolClosed, "refused"),
    (PoolExhausted, "exhausted"),
    (PoolTimeout, "timeouts"),
    (DialError, "dial_errors"),
    (BaseException, "interrupted"),
)


class Ledger(Counter[str]):
    """How the calls of one caller ended: "successes", or a name of FAILURES. Plain: it travels between processes.

    And "unborn": connections that the server accepted, whose dialler died before it could install them.
    """

    def call(self, get: Callable[..., PooledConnection], *args: Any, **named: Any) -> PooledConnection | None:
        """What `get` returns, None when it raises a PoolError; what else it raises goes on. Counted in any case."""
        try:
            lease = get(*args, **named)
        except BaseException as error:
            ending = next(name for kind, name in ENDINGS if isinstance(error, kind))
            self[ending] += 1
            if ending == "interrupted":
                raise
            return None
        self["successes"] += 1
        return lease


def settle(pool: Pool) -> None:
    """Until nothing is on its way: no dial, no end of a connection, no check, no offer."""
    until(lambda: not states(pool).keys() & {"dialing", "retiring", "checking", "offered"}, "the pool has settled")


def audit(pool: Pool, calls: Mapping[str, int] | None = None, server: ExclusiveServer | None = None) -> PoolStats:
    """Assert that the accounts agree.

    `calls`: all calls of get() and try_get() that there were, by how they ended (a Ledger); None: that is not known.
    """
    settle(pool)
    stats = pool.stats()
    totals = pool._snapshot()["totals"]
    for name, count in [*totals.items(), *((n, c) for worker in stats.workers for n, c in worker.counters.items())]:
        assert 0 <= count < ABSURD, f"{name} is {count}"
    assert 0 <= stats.open <= stats.max_connections, stats.connections
    assert stats.created == sum(stats.closed.values()) + stats.open, (stats.created, stats.closed, stats.connections)
    assert totals["dial_attempts"] == stats.created + totals["dial_failures"], totals
    calls = dict(calls or {})
    unborn = calls.pop("unborn", 0)
    if calls:
        found = {name: getattr(stats, name) for name in FAILURES} | {
            "successes": sum(getattr(stats, n) for n in SOURCES)
        }
        assert {name: count for name, count in found.items() if count} == {n: c for n, c in calls.items() if c}
        assert stats.gets == sum(calls.values())
    if server is not None:
        until(lambda: server.stats()["open"] == stats.open, f"the server counts {stats.open} open connections")
        figures = server.stats()
        accepted = figures["accepted"] + figures["resets"]
        assert accepted == stats.created + unborn, (accepted, stats.created, unborn, totals)
    return stats
