"""A process killed, stopped or refused at every system call of everything that it does with a pool.

Real processes, a real server, the code as it is installed. For each scenario, for n = 1, 2, 3, ... until it is done
before that: a child does it and

    killed    is killed at the n-th entry into, or exit from, a system call that others can notice. The others recover:
              every slot can be leased once, the books agree, the server saw no more connections than the cap, nothing
              is left behind.
    stopped   stands there. The others have whatever it does not hold; then it is killed, and as above.
    refused   is told by the kernel that the call cannot be made: no descriptor, no memory, no room, no lock, a signal.
              The scenario may fail with an error that says so. Then the same process leases and returns as ever, with
              as many descriptors as before; and it leaves in order.

Not here: what lies between system calls (core/crash.c kills there), and how calls are intercepted (tracing.py).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shmpool import Pool, PoolClosed, PoolError
from tests import tracing
from tests.books import audit
from tests.joining import fresh_name
from tests.processes import LONG, Child, Family, Latch, descriptors, lease_every_slot, proven, states, until, use
from tests.servers import ExclusiveServer, exclusive_use

pytestmark = pytest.mark.skipif(not tracing.SUPPORTED, reason="system calls are intercepted on x86-64 only")
SLOTS = 3


def nothing(_pool: Pool) -> None: ...


@dataclass(frozen=True)
class Scenario:
    """`prepare` is for the parent, `begin` for the child; `act`, with what `begin` returned, is what is looked at."""

    prepare: Callable[[Pool], None]
    begin: Callable[[Pool], Any]
    act: Callable[[Pool, Any], object]
    settings: tuple[tuple[str, Any], ...] = ()
    ends: bool = False  # the pool, for all


def all_idle(pool: Pool) -> None:
    lease_every_slot(pool)


def one_idle(pool: Pool) -> None:
    use(pool)


def all_silent(pool: Pool) -> None:
    """Idle for longer than they may be."""
    lease_every_slot(pool)
    time.sleep(0.01)  # sleep: idle_timeout


def holds_one(pool: Pool) -> Any:
    lease = pool.get()
    exclusive_use(lease.socket, f"{os.getpid()}:begin")
    return lease


def get(pool: Pool, _begun: object) -> Any:
    lease = pool.get(timeout=5)
    assert lease.socket.fileno() >= 0
    return lease


def get_all(pool: Pool, _begun: object) -> Any:
    return [get(pool, None) for _ in range(SLOTS)]


def wait_in_vain(pool: Pool, _begun: object) -> None:
    held = [pool.get() for _ in range(SLOTS)]
    with contextlib.suppress(PoolError):
        pool.get(timeout=0.002)
    for lease in held:
        lease.release()


def maintain_at_once(pool: Pool, _begun: object) -> None:
    pool.maintain()


def replace(pool: Pool, lease: Any) -> None:
    """Whoever finds the peer gone dials another."""
    with contextlib.suppress(OSError, EOFError):
        lease.socket.shutdown(2)
    lease.release()
    get(pool, None).release()


def steer(pool: Pool, _begun: object) -> None:
    pool.resize(1)
    pool.pause()
    pool.resume()
    pool.resize(SLOTS)


def drain(pool: Pool, _begun: object) -> None:
    pool.drain(timeout=5)
    pool.resume()


SCENARIOS = {
    "dial": Scenario(nothing, nothing, get),
    "steal": Scenario(all_idle, nothing, get_all),
    "release": Scenario(nothing, holds_one, lambda _pool, lease: lease.release()),
    "discard": Scenario(all_idle, holds_one, lambda _pool, lease: lease.discard()),
    "replace": Scenario(nothing, holds_one, replace, (("alive_bypass", 0),)),
    "wait": Scenario(all_idle, nothing, wait_in_vain),
    "prewarm": Scenario(nothing, nothing, maintain_at_once, (("min_connections", 2),)),
    "reap": Scenario(all_silent, nothing, maintain_at_once, (("idle_timeout", 0.005),)),
    "check": Scenario(
        all_idle,
        nothing,
        maintain_at_once,
        (("health_check", lambda _sock: None), ("health_check_interval", 0.003), ("health_check_timeout", 0.002)),
    ),
    "evict": Scenario(all_idle, nothing, lambda pool, _begun: pool.evict()),
    "steer": Scenario(all_idle, nothing, steer),
    "drain": Scenario(all_idle, nothing, drain),
    "leave": Scenario(one_idle, holds_one, lambda pool, _begun: pool.leave()),
    "close": Scenario(all_idle, holds_one, lambda pool, _begun: pool.close(), ends=True),
}
QUICK = ("dial", "discard")


@contextlib.contextmanager
def a_pool(server: ExclusiveServer, scenario: Scenario) -> Iterator[Pool]:
    settings = {"maintenance_interval": math.inf, "max_workers": 4, "max_waiters": 4, **dict(scenario.settings)}
    with proven(server, SLOTS, every_slot=not scenario.ends, **settings) as pool:
        scenario.prepare(pool)
        yield pool


def traced(family: Family, pool: Pool, scenario: Scenario) -> tracing.Traced:
    def work() -> None:
        begun = scenario.begin(pool)
        tracing.begin()
        kept = scenario.act(pool, begun)
        tracing.done()
        del kept

    return tracing.Traced(family.fork(work))


def steer_back(pool: Pool) -> None:
    """Somebody else ends a pause and an emergency, too."""
    if pool.state in ("paused", "draining"):
        pool.resume()
    if pool.max_connections < SLOTS:
        pool.resize(SLOTS)


def others_go_on(pool: Pool) -> None:
    """Whatever is idle, offered or empty is had while somebody stands still."""
    if pool.closed:
        return
    steer_back(pool)
    found = states(pool)
    reachable = found.get("idle", 0) + found.get("offered", 0) + found.get("empty", 0)
    leases = []
    for _ in range(reachable):
        try:
            leases.append(pool.get(timeout=10))
        except PoolClosed:
            break
    for lease in leases:
        lease.release()


def runs() -> list[Any]:
    """In the short form all are killed, some are stopped."""
    chosen = []
    for name, how in itertools.product(SCENARIOS, ("killed", "stopped")):
        marks = [] if name in QUICK else [pytest.mark.servers]
        if how == "stopped" and name not in (*QUICK, "steal", "check"):
            marks.append(pytest.mark.skipif(not LONG, reason="SHMPOOL_TEST_LONG=1 asks for it"))
        chosen.append(pytest.param(name, how, marks=marks))
    return chosen


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "how"), runs())
def test_at_every_system_call(server: ExclusiveServer, family: Family, name: str, how: str) -> None:
    scenario, point, ran_through = SCENARIOS[name], 0, False
    while not ran_through:
        point += 1
        with a_pool(server, scenario) as pool:
            child = traced(family, pool, scenario)
            ran_through = not all(child.step() for _ in range(point))
            if how == "stopped":
                others_go_on(pool)
            child.end()
            family.forget(child.child)
            if not pool.closed:
                pool.recover()
                steer_back(pool)
                lease_every_slot(pool)
                audit(pool)
    print(f"{name}: {how} at {point - 1} points")
    assert point > 2, "nothing was traced"


def refuse(child: tracing.Traced, point: int, which: int) -> tuple[str, bool]:
    """Run it to its end; the point-th call of those that can be refused gets its which-th error. What it was ("" for
    none), and whether there is another error to try."""
    found, what, more = 0, "", False
    while child.step():
        name, errors = child.refusals() if child.inside else ("", ())
        found += bool(errors)
        if errors and found == point:  # which call that is may differ a little from run to run
            error, more = errors[min(which, len(errors) - 1)], which + 1 < len(errors)
            what = f"{name} -> {errno.errorcode[error]}"
            child.refuse(error)
    child.let_go()
    return what, more


def attempt(action: Callable[[], object]) -> tuple[object, str]:
    """What it returns, and what came of it: nothing, or an error that tells what is missing."""
    try:
        return action(), "done"
    except (OSError, PoolError, MemoryError, RuntimeError) as error:
        said = str(error)
        assert "unlink" not in said, f"what this process lacks is blamed on the pool: {said}"
        return None, f"{type(error).__name__}: {error}"


def refused_at(server: ExclusiveServer, family: Family, scenario: Scenario, point: int, which: int) -> tuple[str, bool]:
    with a_pool(server, scenario) as pool:

        def work() -> str:
            begun = scenario.begin(pool)
            before = sorted(descriptors().values())
            tracing.begin()
            kept, outcome = attempt(functools.partial(scenario.act, pool, begun))
            tracing.done()
            del begun, kept
            gc.collect()
            if not pool.closed:
                steer_back(pool)
                lease_every_slot(pool)
            pool.leave()
            left = [one for one in sorted(descriptors().values()) if one not in before]
            assert not left, f"{outcome}; left open: {left}"
            return outcome

        child = tracing.Traced(family.fork(work))
        what, more = refuse(child, point, which)
        print(f"{point}: {what}: {child.child.result()}")
        family.forget(child.child)
        if not pool.closed:
            steer_back(pool)
            lease_every_slot(pool)
            audit(pool)
    return what, more


def all_refusals(run: Callable[[int, int], tuple[str, bool]]) -> int:
    """Each error of each call that can be refused, one a run; how many calls there were."""
    point, which, what = 1, 0, "first"
    while what:
        what, more = run(point, which)
        point, which = (point, which + 1) if more else (point + 1, 0)
    return point - 2


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.servers) for name in SCENARIOS]
)
def test_every_system_call_refused(server: ExclusiveServer, family: Family, name: str) -> None:
    calls = all_refusals(lambda point, which: refused_at(server, family, SCENARIOS[name], point, which))
    assert calls > 1 or name == "release", "nothing was refused"


# ---- a pool's beginning ----


@pytest.fixture
def own_sockets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sockets half made stay for a minute, too."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


NAMED: dict[str, Any] = {"max_connections": SLOTS, "min_connections": 1, "maintenance_interval": math.inf}


def beginner(family: Family, server: ExclusiveServer, name: str, there: Latch) -> Child:
    """A child that will begin with the pool of that name, once `there` is set."""

    def work() -> str:
        there.wait()
        tracing.begin()
        pool, outcome = attempt(lambda: Pool(server.url, name=name, **NAMED))
        tracing.done()
        pool = pool or Pool(server.url, name=name, **NAMED)
        assert isinstance(pool, Pool)
        use(pool)
        pool.leave()
        assert not any("shmpool-" in what for what in descriptors().values()), f"{outcome}; {descriptors()}"
        return outcome

    return family.fork(work)


@contextlib.contextmanager
def beginning(server: ExclusiveServer, family: Family, how: str) -> Iterator[tracing.Traced]:
    """A child about to create a named pool, or to join one. Afterwards it is as good as new for others, and nothing is
    left of it."""
    name = fresh_name()
    there = Latch()
    child = beginner(family, server, name, there)
    first = Pool(server.url, name=name, **NAMED) if how == "join" else None
    there.set()
    there.close()
    yield tracing.Traced(child)
    for unborn in Path("/dev/shm").glob(f"shmpool-{os.getuid()}-.{child.pid}-*"):
        unborn.unlink()  # of who died while making it; the next pool of this user would do so in a minute
    family.forget(child)
    pool = Pool(server.url, name=name, **NAMED)
    lease_every_slot(pool)
    pool.close()
    if first is not None:
        first.close()
    left = [path.name for path in Path("/dev/shm").glob(f"*{name}*")]
    assert not left
    until(lambda: server.stats()["open"] == 0, "no connection is left")


@pytest.mark.servers
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("own_sockets")
@pytest.mark.parametrize("how", ["create", "join"])
def test_killed_while_it_begins(server: ExclusiveServer, family: Family, how: str) -> None:
    point, ran_through = 0, False
    while not ran_through:
        point += 1
        with beginning(server, family, how) as child:
            ran_through = not all(child.step() for _ in range(point))
            child.end()
    assert point > 20


@pytest.mark.servers
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("own_sockets")
@pytest.mark.parametrize("how", ["create", "join"])
def test_refused_while_it_begins(server: ExclusiveServer, family: Family, how: str) -> None:
    def run(point: int, which: int) -> tuple[str, bool]:
        with beginning(server, family, how) as child:
            what, more = refuse(child, point, which)
            print(f"{point}: {what}: {child.child.result()}")
        return what, more

    assert all_refusals(run) > 10
