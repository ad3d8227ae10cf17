"""Faults that an attacker found in the life of a connection, each with the shortest way to it.

Each test names what the user saw. Not here: what the parts are for (test_leaks, test_steering, test_serving, ...).
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shmpool import ClosedConnection, DialRequest, LeaseExpired, Pool, PooledConnection, PoolTimeout
from tests.processes import Family, descriptors, states, until
from tests.servers import ExclusiveServer

BY_HAND: dict[str, Any] = {"maintenance_interval": math.inf}
REVOKING: dict[str, Any] = {"leak_action": "revoke", "leak_timeout": 0.05, "min_connections": 0}
BRIEF_S = 5.0  # much longer than a call may take here, and much shorter than for ever


# ---- leases that are taken away --------------------------------------------------------------------------------------


def test_a_lease_that_has_just_begun_is_not_overdue(server: ExclusiveServer, family: Family) -> None:
    """The connection was idle for longer than leak_timeout, and for a moment its slot's row had the lease before."""
    with Pool(server.url, max_connections=1, **REVOKING, **BY_HAND) as pool:
        pool.get().release()

        def scan() -> None:
            while True:
                for slot, word, *_ in pool._overdue(pool.config.leak_timeout, False):
                    pool._revoke(slot, word)

        scanner = family.fork(scan)
        for _ in range(60):
            time.sleep(0.06)  # sleep: longer than leak_timeout, unused
            with pool.get() as conn:
                assert conn.socket
        scanner.kill()
        assert pool.stats().closed["revoked"] == 0


@pytest.mark.parametrize("touches", [True, False])
@pytest.mark.parametrize("timeout", [1.0, 0.0])
def test_a_hook_that_outlasts_every_lease(server: ExclusiveServer, touches: bool, timeout: float) -> None:
    """on_borrow takes longer than leak_timeout, always. Breaks when get() goes on for ever, or returns what is over."""

    def borrow(conn: PooledConnection) -> None:
        time.sleep(0.15)  # sleep: a slow hook
        if touches:
            assert conn.socket

    settings: dict[str, Any] = {**REVOKING, "maintenance_interval": 0.02, "on_borrow": borrow}
    with Pool(server.url, max_connections=4, **settings) as pool:
        begun = time.monotonic()
        with pytest.raises(PoolTimeout):
            pool.get(timeout=timeout)
        assert time.monotonic() - begun < BRIEF_S


def test_a_holder_that_is_woken_by_its_revocation_leaves_nothing(server: ExclusiveServer) -> None:
    """It ends its lease while the revocation is under way. Breaks when its socket is kept for ever."""
    settings: dict[str, Any] = {**REVOKING, "leak_timeout": 0.02, "maintenance_interval": 0.01, "socket_timeout": None}
    with Pool(server.url, max_connections=4, **settings) as pool:
        before = len(descriptors())
        for _ in range(20):
            with contextlib.suppress(LeaseExpired), pool.get() as conn:
                conn.socket.recv(1)  # until it is taken away
            del conn
        until(lambda: pool.stats().closed["revoked"] == 20, "all were taken away, and the last has ended")

        def at_home() -> bool:
            gc.collect()
            pool._close_stale()
            return len(descriptors()) <= before + 1

        until(at_home, "every socket is closed")


# ---- permits ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_versions() -> Iterator[tuple[ExclusiveServer, ExclusiveServer]]:
    with ExclusiveServer("tcp4") as v4, ExclusiveServer("tcp6") as v6:
        yield v4, v6


@pytest.mark.parametrize("call", ["get", "try_get"])
def test_after_a_resize_idle_ones_of_another_kind_make_room(
    two_versions: tuple[ExclusiveServer, ExclusiveServer], call: str
) -> None:
    """Slots beyond the cap are empty, but no permits. Breaks when a caller of another kind starves beside idle ones."""

    def dial(request: DialRequest) -> socket.socket:
        server = two_versions[request.ip_version == 6]
        return socket.create_connection((server.host, server.port), timeout=request.timeout)

    with Pool(dial=dial, max_connections=4, min_connections=0, **BY_HAND) as pool:
        pool.resize(3)
        for lease in [pool.get(ip_version=4) for _ in range(3)]:
            lease.release()
        with pool.get(timeout=2, ip_version=6) if call == "get" else pool.try_get(ip_version=6) as conn:
            assert conn.ip_version == 6
        assert states(pool)["idle"] == 3


def test_without_descriptors_no_permit_is_free_before_its_connection_has_ended(
    server: ExclusiveServer, family: Family
) -> None:
    """A process that ends connections it never used, and has no descriptor to fetch them with. Breaks when the slots
    are empty while another process still holds the connections: the server sees more than the cap."""
    with Pool(server.url, max_connections=8, min_connections=0, **BY_HAND) as pool:
        opened, ended = family.latch(), family.latch()

        def other() -> None:
            leases = [pool.get() for _ in range(8)]
            for lease in leases:
                lease.release()
            opened.set()
            ended.wait()

        def starved() -> tuple[int, int, int]:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            pool.recover()
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(descriptors()) + 2, hard))
            stolen: list[int] = []
            over = threading.Event()

            def hungry() -> None:  # an accept loop at its limit, say
                while not over.is_set():
                    with contextlib.suppress(OSError):
                        stolen.append(os.open("/dev/null", os.O_RDONLY))

            thread = threading.Thread(target=hungry)
            thread.start()
            until(lambda: stolen, "nothing is left")
            pool.evict()
            over.set()
            thread.join()
            for fd in stolen:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            there, open_now = pool.stats().open, server.stats()["open"]
            pool.recover()
            return there, open_now, pool.stats().open

        holder = family.fork(other)
        opened.wait()
        there, open_then, left = family.fork(starved).result()
        assert there >= open_then, "each connection that there is has its permit"
        assert left == 0
        until(lambda: server.stats()["open"] == 0, "and in the end they have all ended")
        ended.set()
        holder.result()


def test_a_pause_is_a_timeout_for_get_whatever_its_timeout(server: ExclusiveServer) -> None:
    with Pool(server.url, max_connections=1, **BY_HAND) as pool:
        pool.pause()
        for timeout in (0, 0.001):
            with pytest.raises(PoolTimeout) as caught:
                pool.get(timeout=timeout)
            assert caught.value.paused


# ---- a pool that listens ---------------------------------------------------------------------------------------------


def test_clients_that_come_to_nothing_do_not_keep_a_call(family: Family) -> None:
    """Breaks when get() looks at its deadline only when no client is there."""
    with Pool.listen("tcp://127.0.0.1:0", max_connections=8, on_created=lambda _: False) as pool:
        address = pool.address

        def flood() -> None:
            while True:
                clients = []
                for _ in range(50):
                    client = socket.socket()
                    client.setblocking(False)
                    client.connect_ex(address)
                    clients.append(client)
                for client in clients:
                    client.close()

        flooding = [family.fork(flood) for _ in range(2)]
        until(lambda: pool.stats().closed["refused"] or (not pool.maintain() and _refuses(pool)), "they come")
        for timeout in (0.5, 0.0):
            begun = time.monotonic()
            with pytest.raises(PoolTimeout):
                pool.get(timeout=timeout)
            assert time.monotonic() - begun < BRIEF_S
        for child in flooding:
            child.kill()


def _refuses(pool: Pool) -> bool:
    with contextlib.suppress(PoolTimeout):
        pool.get(timeout=0.01)
    return bool(pool.stats().closed["refused"])


def test_books_of_a_worker_that_dies_while_it_accepts(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a connection is counted as closed that was never created."""
    with Pool.listen("tcp://127.0.0.1:0", max_connections=4, **BY_HAND) as pool:
        monkeypatch.setattr(Pool, "_accept_client", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        for _ in range(3):
            worker = family.fork(pool.get)
            with socket.create_connection(pool.address):
                until(lambda worker=worker: not worker.alive(), "it is dead")  # type: ignore[misc]
            pool.recover()
        stats = pool.stats()
        assert stats.created == sum(stats.closed.values()) + stats.open == 0
        assert stats.dial_failures == 3


# ---- the end ---------------------------------------------------------------------------------------------------------


def test_an_interrupt_in_a_hook_leaves_nothing_half_done(server: ExclusiveServer) -> None:
    """KeyboardInterrupt while on_close runs, during close(). Breaks when the others are not told, or the name stays."""
    told: list[int] = []

    def on_close(closed: ClosedConnection) -> None:
        told.append(closed.id)
        if len(told) == 1:
            raise KeyboardInterrupt

    pool = Pool(server.url, max_connections=4, name=f"interrupted-{os.getpid()}", on_close=on_close, **BY_HAND)
    for lease in [pool.get() for _ in range(4)]:
        lease.release()
    with pytest.raises(KeyboardInterrupt):
        pool.close()
    assert len(told) == 4
    assert not Path(f"/dev/shm/shmpool-{os.getuid()}-{pool.name}").exists()
    pool.close()
