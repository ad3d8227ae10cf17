"""What a killed process held comes back: every slot, soon, exactly once, and no connection outlives its permit.

Times are printed and only bounded generously: speed is the benches' business. What is exact: `lease_every_slot` at the
end of each test, and the server's own count of connections and of violations.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from shmpool import Pool, PoolError, PoolExhausted, PoolTimeout
from tests.processes import (
    LONG,
    Counters,
    Family,
    chance,
    descriptors,
    lease_every_slot,
    proven,
    states,
    until,
    use,
)
from tests.servers import ExclusiveServer, Kind, ask, exclusive_use

SOON_S = 1.0  # the promise is 60 ms while somebody waits


def hold(pool: Pool, held: Any, **wanted: Any) -> None:
    """In a child: lease, say so, wait for the end."""
    lease = pool.get(**wanted)
    ask(lease.socket, f"BEGIN {os.getpid()}:held")
    held.set()
    signal.pause()
    del lease


def timed_full_capacity(pool: Pool, what: str) -> float:
    begun = time.monotonic()
    lease_every_slot(pool, timeout_s=10)
    took = time.monotonic() - begun
    print(f"{what}: every slot back after {took * 1e3:.1f} ms")
    assert took < SOON_S
    return took


# ---- killed in each state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tcp4", "unix", "udp4"])
@pytest.mark.parametrize("connections", [1, 4])
def test_killed_while_leasing(kind: Kind, connections: int, family: Family) -> None:
    with ExclusiveServer(kind) as server, proven(server, connections) as pool:
        for _ in range(5):
            holders = []
            for _ in range(connections):
                held = family.latch()
                holders.append(family.fork(hold, pool, held))
                held.wait()
            assert states(pool) == {"leased": connections}
            for holder in holders:
                holder.kill()
            timed_full_capacity(pool, f"{connections} holders")
        assert pool._snapshot()["totals"]["recovered_leases"] == 5 * connections


def test_killed_while_leasing_and_somebody_waits(server: ExclusiveServer, family: Family) -> None:
    """The waiter, asleep in the queue, gets the permit; measured from the kill to its lease."""

    def wait() -> float:
        waiting.set()
        with pool.get(timeout=20) as lease:
            got = time.monotonic()
            exclusive_use(lease.socket, "waiter:1")
        return got

    times = []
    with proven(server, 1) as pool:
        for _ in range(10):
            held, waiting = family.latch(), family.latch()
            holder = family.fork(hold, pool, held)
            held.wait()
            waiter = family.fork(wait)
            until(lambda: len(pool._snapshot()["waiters"]) == 1, "the waiter")
            killed = time.monotonic()
            holder.kill()
            times.append(waiter.result() - killed)
        print("back after", " ".join(f"{took * 1e3:.1f}" for took in sorted(times)), "ms")
        assert max(times) < SOON_S


@pytest.mark.parametrize("holders", [1, 8])
def test_killed_while_leasing_and_the_server_does_not_close(
    server: ExclusiveServer, family: Family, holders: int
) -> None:
    """Ending a connection waits a moment for the server's end; the permits come back all the same."""
    with proven(server, holders) as pool:
        children = []
        for _ in range(holders):
            held = family.latch()
            children.append(family.fork(hold, pool, held))
            held.wait()
        server.pause("ALL")
        for child in children:
            os.kill(child.pid, signal.SIGKILL)
        for child in children:
            child.wait()
        begun = time.monotonic()
        first = pool.get(timeout=10)
        print(f"first permit after {(time.monotonic() - begun) * 1e3:.1f} ms")
        first.release()
        timed_full_capacity(pool, f"{holders} holders, paused server")
        server.resume("ALL")


@pytest.mark.parametrize("moment", ["before the connect", "in the connect", "connected"])
def test_killed_while_dialling(server: ExclusiveServer, family: Family, moment: str) -> None:
    dialling = family.latch()

    def dial(_request: object) -> socket.socket:
        if slow[0]:
            sock = server.connect() if moment == "connected" else None
            dialling.set()
            signal.pause()
            del sock
        return server.connect()

    with contextlib.ExitStack() as stack:
        if moment == "in the connect":
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
            for _ in range(4):
                filler = stack.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(listener.getsockname())
            pool = Pool(f"tcp://127.0.0.1:{listener.getsockname()[1]}", max_connections=1, min_connections=0)
        else:
            pool = Pool(dial=dial, max_connections=1, min_connections=0)
        stack.callback(pool.close)
        slow = [True]
        dialler = family.fork(pool.get)
        until(lambda: states(pool) == {"dialing": 1}, "the dial")
        if moment != "in the connect":
            dialling.wait()
        slow[0] = False
        dialler.kill()
        if moment == "in the connect":
            until(lambda: pool._recover() or states(pool) == {"empty": 1}, "the permit", SOON_S)
            assert states(pool) == {"empty": 1}
        else:
            timed_full_capacity(pool, "dialler")
            until(lambda: server.stats()["open"] == 1, "the dead dialler's connection is gone", 5)


def test_killed_while_waiting_in_the_queue(server: ExclusiveServer, family: Family) -> None:
    """Its place is freed: a release is not promised to the dead, and the queue does not fill up with them."""
    with proven(server, 1, max_waiters=3, maintenance_interval=math.inf) as pool:
        lease = pool.get()
        for _ in range(6):
            waiters = [family.fork(pool.get, 30) for _ in range(2)]
            until(lambda: len(pool._snapshot()["waiters"]) == 2, "two waiters")
            for waiter in waiters:
                waiter.kill()
            pool._recover()
            assert not pool._snapshot()["waiters"]
        waiters = [family.fork(pool.get, 30) for _ in range(3)]
        until(lambda: len(pool._snapshot()["waiters"]) == 3, "three waiters")
        for waiter in waiters:
            waiter.kill()
        living = family.fork(use, pool)  # the queue is full of the dead
        until(lambda: living.pid in _waiting(pool) or not living.alive(), "the living one waits")
        lease.release()
        living.result(5)


def _waiting(pool: Pool) -> set[int]:
    snapshot = pool._snapshot()
    pids = {row[0]: row[1] for row in snapshot["workers"]}
    return {pids[row[1]] for row in snapshot["waiters"]}


def test_killed_with_an_offer_in_its_hands(server: ExclusiveServer, family: Family) -> None:
    """Stopped in the queue, given the connection by hand-over, killed: the connection lives on for the next."""
    with proven(server, 1) as pool:
        number = use(pool)
        for _ in range(5):
            lease = pool.get()
            waiter = family.fork(use, pool)
            until(lambda: len(pool._snapshot()["waiters"]) == 1, "the waiter")
            waiter.stop()
            since = pool._snapshot()["waiters"][0][4]
            until(lambda since=since: pool._snapshot()["now"] - since > 2e6, "hand-over is due")  # type: ignore[misc]
            lease.release()
            seen = states(pool)
            waiter.kill()
            begun = time.monotonic()
            assert use(pool, timeout_s=5) == number
            print(seen, f"back after {(time.monotonic() - begun) * 1e3:.1f} ms")
            assert time.monotonic() - begun < SOON_S


def test_killed_just_after_the_release(server: ExclusiveServer, family: Family) -> None:
    """What lies in a dead process's cache is everybody's, and no new connection is opened for it."""
    with proven(server, 3) as pool:
        for _ in range(10):
            released = family.latch()

            def release(released: Any = released) -> None:
                lease_every_slot(pool)
                released.set()
                signal.pause()

            child = family.fork(release)
            released.wait()
            child.kill()
            lease_every_slot(pool, timeout_s=2)
        assert server.stats()["accepted"] == 3


def test_killed_while_retiring(server: ExclusiveServer, family: Family) -> None:
    """The server does not close, so the retirement takes its 20 ms; the kill comes inside of it."""
    random = chance()
    caught = 0

    def retire(held: Any, go: Any) -> None:
        lease = pool.get()
        held.set()
        go.wait()
        lease.discard()
        signal.pause()

    with proven(server, 2) as pool:
        for _ in range(15):
            held, go = family.latch(), family.latch()
            child = family.fork(retire, held, go)
            held.wait()
            server.pause("ALL")
            go.set()
            until(lambda: "leased" not in states(pool), "the discard")
            time.sleep(random.uniform(0, 0.018))  # sleep: to reach every moment of the retirement
            caught += states(pool).get("retiring", 0)
            child.kill()
            server.resume("ALL")
            timed_full_capacity(pool, "retiring")
            family.forget(child)
        print(f"{caught} of 15 killed while retiring")
        assert caught


def test_killed_while_recovering(server: ExclusiveServer, family: Family) -> None:
    """Recovery may itself be killed: the next one finishes what both left."""
    random = chance()
    caught = 0
    with proven(server, 3, maintenance_interval=math.inf) as pool:
        for _ in range(15):
            held = [family.latch() for _ in range(3)]
            holders = [family.fork(hold, pool, latch) for latch in held]
            for latch in held:
                latch.wait()
            server.pause("ALL")
            for holder in holders:
                holder.kill()
            recoverer = family.fork(pool._recover)
            until(lambda: "retiring" in states(pool), "the recovery")
            time.sleep(random.uniform(0, 0.05))  # sleep: to reach every moment of the recovery
            caught += "retiring" in states(pool)
            recoverer.kill()
            server.resume("ALL")
            timed_full_capacity(pool, "recovering")
        print(f"{caught} of 15 killed while recovering")
        assert caught


def test_a_recoverer_that_is_stopped_holds_up_only_what_it_has(server: ExclusiveServer, family: Family) -> None:
    with proven(server, 2, maintenance_interval=math.inf) as pool:
        held = family.latch()
        holder = family.fork(hold, pool, held)
        held.wait()
        server.pause("ALL")
        holder.kill()
        recoverer = family.fork(pool._recover)
        until(lambda: "retiring" in states(pool), "the recovery")
        recoverer.stop()
        stuck = states(pool)
        server.resume("ALL")
        use(pool, timeout_s=2)
        newcomer = family.fork(use, pool)
        newcomer.result(5)
        recoverer.resume()
        recoverer.wait()
        print(f"while it was stopped: {stuck}")


# ---- killed at any moment ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["get and release", "discard", "hand over", "dial", "first touch"])
def test_killed_at_a_random_moment(server: ExclusiveServer, family: Family, act: str) -> None:
    """Hundreds of short lives, each ended after a random number of microseconds; then every slot is leased."""
    random = chance()
    rounds = 1000 if LONG else 120

    def work(turns: Counters) -> None:
        while True:
            with pool.get() as lease:
                if act != "first touch":
                    exclusive_use(lease.socket, f"{os.getpid()}:1")
                if act == "discard":
                    lease.discard()
            turns[0] += 1

    with proven(server, 2, alive_bypass=0 if act in ("discard", "dial") else 0.5) as pool:
        turns = Counters(1)
        slowest = 0.0
        for _ in range(rounds):
            before = turns[0]
            children = [family.fork(work, turns) for _ in range(3 if act == "hand over" else 1)]
            if act in ("get and release", "hand over"):
                until(lambda before=before: turns[0] > before, "it works")  # type: ignore[misc]
            if act == "dial":
                server.close_idle()
            _spin(random.uniform(0, 0.002))
            for child in children:
                os.kill(child.pid, signal.SIGKILL)
            for child in children:
                child.wait()
                family.forget(child)
            begun = time.monotonic()
            lease_every_slot(pool, timeout_s=5)
            slowest = max(slowest, time.monotonic() - begun)
        print(f"{rounds} rounds, slowest recovery {slowest * 1e3:.1f} ms")
        assert slowest < SOON_S


def _spin(seconds: float) -> None:
    """A pause of microseconds, which no sleep can make."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


# ---- the table of workers ------------------------------------------------------------------------------------------


def test_short_lived_children_reuse_the_worker_table(server: ExclusiveServer, family: Family) -> None:
    random = chance()
    with proven(server, 4, max_workers=16) as pool:

        def live() -> None:
            for _ in range(random.randrange(3)):
                use(pool)
            how = random.randrange(3)
            if how == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if how == 1:
                pool._leave()

        living = []
        for at in range(1000):
            random.seed(random.randrange(1 << 30) + at)
            living.append(family.fork(live))
            if len(living) == 12:
                ended = living.pop(random.randrange(12))
                assert ended.wait() in ("exit 0", "SIGKILL")
                if ended.status == 0:
                    ended.result()
                family.forget(ended)
        for child in living:
            child.wait()
        assert len(pool._snapshot()["workers"]) <= 16


def test_a_worker_table_that_is_just_large_enough(server: ExclusiveServer, family: Family) -> None:
    """A worker dies; its successor registers while a sibling recovers the very place that it needs."""
    with proven(server, 2, max_workers=3) as pool:
        use(pool)
        for _ in range(20):
            held = [family.latch(), family.latch()]
            holders = [family.fork(hold, pool, latch) for latch in held]
            for latch in held:
                latch.wait()
            server.pause("ALL")
            for holder in holders:
                holder.kill()
            recovery = threading.Thread(target=pool._recover)
            recovery.start()
            successors = [family.fork(use, pool), family.fork(use, pool)]
            recovery.join()
            server.resume("ALL")
            for successor in successors:
                successor.result()
                family.forget(successor)


def test_more_processes_than_places(server: ExclusiveServer, family: Family) -> None:
    """One too many is refused with the reason; a place that somebody left or died in is free again."""
    with proven(server, 4, max_workers=2) as pool:
        use(pool)
        held = family.latch()
        holder = family.fork(hold, pool, held)
        held.wait()
        with pytest.raises(PoolExhausted, match="worker"):
            family.fork(use, pool).result()
        holder.kill()
        family.fork(use, pool).result()
        family.fork(use, pool).result()


# ---- connections of several kinds ----------------------------------------------------------------------------------


class Plain:
    """The bare TCP connection under an SSLSocket that has not shaken hands: enough to talk to a plain server."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def sendall(self, data: bytes) -> None:
        socket.socket.sendall(self.sock, data)

    def recv(self, size: int) -> bytes:
        return socket.socket.recv(self.sock, size)


def private_dial(server: ExclusiveServer) -> Callable[[object], socket.socket]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE

    def dial(_request: object) -> socket.socket:
        return context.wrap_socket(server.connect(), do_handshake_on_connect=False)

    return dial


@pytest.mark.parametrize("leased", [False, True])
@pytest.mark.parametrize("how", ["KILL", "exit", "lives"])
def test_private_connections_whose_owner_goes(server: ExclusiveServer, family: Family, how: str, leased: bool) -> None:
    """A TLS connection is of use to its opener alone. When that one dies, or another needs the permit, it is ended."""
    owned, go = family.latch(), family.latch()

    def own() -> None:
        lease = pool.get()
        assert isinstance(lease.socket, ssl.SSLSocket)
        exclusive_use(Plain(lease.socket), "owner:1")  # type: ignore[arg-type]
        if not leased:
            lease.release()
        owned.set()
        if how == "KILL":
            signal.pause()
        if how == "exit":
            os._exit(0)
        go.wait()
        if leased:
            lease.release()
        with pool.get(timeout=5) as mine:  # after the other took the permit: a new one
            exclusive_use(Plain(mine.socket), "owner:2")  # type: ignore[arg-type]

    with Pool(dial=private_dial(server), max_connections=1, min_connections=0) as pool:
        owner = family.fork(own)
        owned.wait()
        if how == "KILL":
            owner.kill()
        elif how == "exit":
            owner.wait()
        elif leased:
            with pytest.raises(PoolTimeout):
                pool.get(timeout=0.1)
            go.set()
        begun = time.monotonic()
        with pool.get(timeout=5) as lease:
            assert exclusive_use(Plain(lease.socket), "taker:1") > 1  # type: ignore[arg-type]
        print(f"after {(time.monotonic() - begun) * 1e3:.1f} ms")
        go.set()
        if how == "lives":
            owner.result()
        assert server.stats()["max_open"] == 1
        assert server.stats()["violations"] == 0
    until(lambda: server.stats()["open"] == 0, "all ended", 5)


def test_several_kinds_under_one_cap_while_holders_die(family: Family) -> None:
    """tcp, udp and unix share two permits: whoever needs another kind evicts an idle one; holders are killed."""
    random = chance()
    with ExclusiveServer("tcp4") as tcp, ExclusiveServer("udp4") as udp, ExclusiveServer("unix") as unix:
        servers = {"tcp": tcp, "udp": udp, "unix": unix}

        def dial(request: Any) -> socket.socket:
            return servers[request.protocol or "tcp"].connect()

        def work(kinds: list[str]) -> None:
            while True:
                for kind in kinds:
                    use(pool, protocol=kind)

        with Pool(dial=dial, max_connections=2, min_connections=0) as pool:
            children = [family.fork(work, random.sample([*servers], 3)) for _ in range(3)]
            for _ in range(40):
                children.append(family.fork(work, random.sample([*servers], 3)))
                time.sleep(random.uniform(0.002, 0.03))  # sleep: to let them work for a random while
                killed = children.pop(random.randrange(len(children)))
                killed.kill()
                for number, seen in udp.stats()["connections"].items():
                    # No server sees the end of a datagram socket, and the next one may draw its port.
                    if seen["token"].startswith(f"{killed.pid}:"):
                        udp.close_connections(number)
                family.forget(killed)
            for child in children:
                child.kill()
            for kind, server in servers.items():
                leases = [pool.get(timeout=5, protocol=kind) for _ in range(2)]
                for lease in leases:
                    exclusive_use(lease.socket, f"end:{lease.id}")
                    assert lease.protocol == kind
                    lease.release()
                figures = server.stats()
                assert figures["violations"] == 0, (kind, figures["violation_log"])
                assert figures["max_open"] <= 2
                assert figures["begins"] > 50
            assert sum(server.stats()["open"] for server in (tcp, unix)) <= 2
        for server in (tcp, unix):
            until(lambda server=server: server.stats()["open"] == 0, "all ended", 5)  # type: ignore[misc]


# ---- a recoverer in trouble ----------------------------------------------------------------------------------------


def test_a_recoverer_without_descriptors_does_not_break_the_cap(server: ExclusiveServer, family: Family) -> None:
    """It must end the dead holder's connection, of which a sibling has a copy: it cannot, so it must not forget it."""
    met, end, held = family.latch(), family.latch(), family.latch()

    def meet() -> None:
        use(pool)
        met.set()
        end.wait()

    def starve() -> None:
        limit = max(descriptors()) + 2
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        taken = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        os.close(taken.pop())  # for its seat
        with contextlib.suppress(OSError, PoolError):
            pool._recover()

    with proven(server, 1, maintenance_interval=math.inf) as pool:
        family.fork(meet)
        met.wait()
        holder = family.fork(hold, pool, held)
        held.wait()
        holder.kill()
        family.fork(starve).result()
        use(pool)  # proven() compares what the server saw with the cap
        end.set()


def test_survivors_keep_no_descriptors_of_the_dead(server: ExclusiveServer, family: Family) -> None:
    with proven(server, 3) as pool:
        lease_every_slot(pool)
        before = len(descriptors())
        for _ in range(30):
            held = family.latch()
            holder = family.fork(hold, pool, held)
            held.wait()
            holder.kill()
            family.forget(holder)
            held.close()
            family._latches.remove(held)
            lease_every_slot(pool)
        pool.maintain()
        assert len(descriptors()) <= before
