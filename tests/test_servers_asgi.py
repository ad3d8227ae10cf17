"""shmpool under real ASGI servers, uvicorn and Granian (which serves WSGI too): their ways to start, replace, stop and
lose workers, each under load.

Where a server replaces workers quickly at least `DEATHS` of them end, and `WebServer.finish()` asserts what must hold
then: no connection had two users, the cap held, no request failed but those in the hands of a killed worker, nothing is
left, and the server wrote nothing alarming that is not listed here.

uvicorn spawns its workers and Granian forks them, and neither has imported the app before: each worker meets the pool
by its name. Only Granian started from Python (`apps/asgi_granian.py`) can have one to hand on.

Not here: the harness (`webservers.py`), the apps (`apps/web.py`, `apps/asgi_*.py`).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

import shmpool
from tests.processes import chance, until
from tests.servers import ExclusiveServer
from tests.webservers import APP, Ledger, Load, WebServer, program

Interface = Literal["asgi", "wsgi"]
Serving = contextlib.AbstractContextManager[WebServer]

DEATHS = 20
CLIENTS = 4
HERE = Path(__file__).parent
UVICORN, GRANIAN = program("uvicorn"), program("granian")

needs_uvicorn = pytest.mark.skipif(UVICORN is None, reason="uvicorn is not installed")
needs_granian = pytest.mark.skipif(GRANIAN is None, reason="granian is not installed")
every_interface = pytest.mark.parametrize("interface", ["asgi", "wsgi"])
both_lifespans = pytest.mark.parametrize("app", [APP, "tests.apps.asgi_lifespan"], ids=["bare", "lifespan"])

# What uvicorn leaves to the interpreter's end: its listening socket, and the standard input of spawned workers.
UVICORN_EXPECTED = (
    r"ResourceWarning: unclosed <socket.socket fd=\d+, family=\S+, type=\S+, proto=\d, laddr=\('127.0.0.1', {port}\)>",
    r"ResourceWarning: unclosed file <_io.TextIOWrapper name=0 mode='r' encoding='[-\w]+'>",
    r"ResourceWarning: Enable tracemalloc to get the object allocation traceback",
)
GRANIAN_EXPECTED = (
    r"\[WARNING\] Configuration allows spawning up to \d+ Python threads",
    r"\[WARNING\] Configured number of workers appears to be higher than the amount of CPU cores",
    r"\[WARNING\] Workers respawn is configured, but the net.ipv4.tcp_migrate_req sysctl is not enabled",
    # From Python 3.12 on: it forks while its own threads wait for the other workers.
    r"DeprecationWarning: This process \(pid=\d+\) is multi-threaded, use of fork\(\) may lead to deadlocks",
)


@contextlib.contextmanager
def serving(
    directory: Path, argv: list[str], workers: int, expected: tuple[str, ...], **settings: Any
) -> Iterator[WebServer]:
    """A server that answers, over an ExclusiveServer of its own."""
    settings.setdefault("name", f"asgi-{os.getpid()}-{directory.name[:30]}")
    with (
        ExclusiveServer() as upstream,
        WebServer(argv, directory, upstream, expected=expected, threads_per_worker=CLIENTS, **settings) as server,
    ):
        server.wait_for_children(workers)
        yield server


def uvicorn(directory: Path, *options: str, app: str = APP, workers: int = 4) -> Serving:
    argv = [str(UVICORN), "--port={port}", "--log-level=warning", f"--workers={workers}", *options, f"{app}:asgi"]
    return serving(directory, argv, workers, UVICORN_EXPECTED)


def granian(directory: Path, interface: Interface, *options: str, workers: int = 4) -> Serving:
    argv = [str(GRANIAN), "--port={port}", f"--workers={workers}", f"--interface={interface}", *options]
    return serving(directory, [*argv, f"{APP}:{callable_of(interface)}"], workers, GRANIAN_EXPECTED)


def granian_from_python(directory: Path, interface: Interface, *, workers: int, lifetime_s: float = 0) -> Serving:
    argv = [sys.executable, str(HERE / "apps" / "asgi_granian.py"), "{port}", str(workers), interface, str(lifetime_s)]
    return serving(directory, argv, workers, GRANIAN_EXPECTED, name=None)


def callable_of(interface: Interface) -> str:
    return "application" if interface == "wsgi" else "asgi"


def load_on(server: WebServer, rng: random.Random | None = None) -> Load:
    return Load(server, "/use", "/use?n=3", "/hold?ms=2", "/hold?ms=8", threads=CLIENTS, rng=rng)


def wait_for_the_end(server: WebServer, workers: set[int]) -> None:
    until(lambda: not workers & set(server.children()), "the workers end")


def end_most(server: WebServer, workers: int, rng: random.Random, suicides: Ledger) -> None:
    """End all workers but one: by a signal from outside, or by the worker itself in the middle of a lease. Returns when
    there are as many as before."""
    for pid in rng.sample(server.wait_for_children(workers), workers)[1:]:
        if rng.random() < 0.7:
            server.kill(pid)
        else:
            suicides.requests.append(server.get(rng.choice(["/die", "/die?how=exit"])))
    server.wait_for_children(workers)


def killed(server: WebServer) -> int:
    return len(server.doomed | set(server.journal.pids("die")))


def ended(server: WebServer) -> int:
    """How many workers that took requests are not there any more."""
    return len(set(server.journal.pids("begin")) - set(server.descendants()))


def let_connections_be_lost(server: WebServer, load: Load) -> None:
    """These servers end a worker that has accepted, or has in its backlog, connections that it has not read from: its
    clients see them reset. What any worker has taken in hand must succeed even so; called when no worker was killed."""
    begun = server.journal.begun_by()
    broken = [request for request in load.ledger.failed if request.id in begun or request.status]
    assert not broken, broken[:5]
    server.doomed |= set(server.journal.pids("begin")) - set(server.descendants())


# ---- uvicorn ---------------------------------------------------------------------------------------------------------


def stop_uvicorn(server: WebServer) -> None:
    """After its shutdown a worker of uvicorn ends by SIGTERM's default action. Without a leave() at the lifespan's end
    nobody removes the pool's name then; the next pool of this user does."""
    server.stop()
    if not server.journal.pids("left"):
        shmpool.Pool(server.upstream.url).close()


@needs_uvicorn
@both_lifespans
def test_uvicorn_killed_workers(tmp_path: Path, app: str) -> None:
    """Its first process looks every half second for workers that have ended, and starts others."""
    rng, suicides = chance(), Ledger()
    with uvicorn(tmp_path, app=app, workers=6) as server:
        with load_on(server, rng) as load:
            while killed(server) < DEATHS:
                end_most(server, 6, rng, suicides)
                load.wait(10)
        server.use_every_slot()
        server.finish(load, suicides, stop=lambda: stop_uvicorn(server))


@needs_uvicorn
@both_lifespans
def test_uvicorn_request_limit(tmp_path: Path, app: str) -> None:
    """Workers that end after some requests. By default uvicorn may wait 5 s for a word of one that is just ending."""
    with uvicorn(tmp_path, "--limit-max-requests=4", "--timeout-worker-healthcheck=1", app=app, workers=6) as server:
        with load_on(server) as load:
            until(lambda: ended(server) >= DEATHS, "so many workers were replaced", timeout_s=90)
        let_connections_be_lost(server, load)
        server.finish(load, stop=lambda: stop_uvicorn(server))


@pytest.mark.quick
@needs_uvicorn
@both_lifespans
def test_uvicorn_reload(tmp_path: Path, app: str) -> None:
    """HUP: one worker after the other is replaced, the new one first."""
    with uvicorn(tmp_path, app=app, workers=4) as server:
        with load_on(server) as load:
            old = set(server.children())
            load.wait(4)
            server.send_signal(signal.SIGHUP)
            wait_for_the_end(server, old)
            load.wait(4)
        let_connections_be_lost(server, load)
        server.use_every_slot()
        if app != APP:
            until(lambda: set(server.journal.pids("left")) >= old, "they have left the pool")
        server.finish(load, stop=lambda: stop_uvicorn(server))


# ---- Granian ---------------------------------------------------------------------------------------------------------


def wait_until_started(server: WebServer, workers: int) -> None:
    """Granian's workers lose a SIGTERM that comes before they listen, and it waits for their end for ever: signals are
    for those that have started."""

    def all_started() -> bool:
        text = server.output()
        pairs = [(f"Spawning worker-{each} ", f"Started worker-{each}\n") for each in range(1, workers + 1)]
        return all(
            text.rfind(spawning) < text.rfind(started)
            or text.count(spawning) == text.count(started)  # a worker may say so before its parent has
            for spawning, started in pairs
        )

    until(all_started, "all workers have started")


def stop_granian(server: WebServer, workers: int) -> None:
    """They say that they have started a moment before they listen to signals; when they answer, they do."""
    wait_until_started(server, workers)
    waiting = set(server.children())

    def all_have_answered() -> bool:
        waiting.discard(server.ask("/pid")["pid"])
        return not waiting

    until(all_have_answered, "each worker has answered")
    server.stop()


@needs_granian
@every_interface
def test_granian_killed_workers(tmp_path: Path, interface: Interface) -> None:
    """It replaces a worker at once. It would end if the same one went again within 5.5 s, unless another went between:
    so the oldest goes first."""
    rng, workers = chance(), 4
    with granian(tmp_path, interface, "--respawn-failed-workers", workers=workers) as server:
        with load_on(server, rng) as load:
            for _ in range(DEATHS):
                wait_until_started(server, workers)
                oldest = server.children()[0]
                server.kill(oldest)
                wait_for_the_end(server, {oldest})
                server.wait_for_children(workers)
                load.wait(rng.randrange(8))
        server.use_every_slot()
        server.expected.append(r"\[ERROR\] Unexpected exit from worker-\d$")
        server.finish(load, stop=lambda: stop_granian(server, workers))
        assert server.output().count("Unexpected exit") == DEATHS


@needs_granian
@every_interface
def test_granian_reload(tmp_path: Path, interface: Interface) -> None:
    """HUP: one worker after the other is replaced, the new one first, if it can listen within the interval. There are
    many, so that some always do."""
    workers = DEATHS
    with granian(tmp_path, interface, "--respawn-interval=0.1", workers=workers) as server:
        wait_until_started(server, workers)
        with load_on(server) as load:
            old = set(server.children())
            load.wait(4)
            server.send_signal(signal.SIGHUP)
            wait_for_the_end(server, old)
            load.wait(4)
        let_connections_be_lost(server, load)
        server.use_every_slot()
        server.finish(load, stop=lambda: stop_granian(server, workers))


@needs_granian
@every_interface
def test_granian_from_python(tmp_path: Path, interface: Interface) -> None:
    """An unnamed pool that its first process made and the workers inherited, and workers that do not live long."""
    workers = DEATHS // 2
    with granian_from_python(tmp_path, interface, workers=workers, lifetime_s=1.5) as server:
        with load_on(server) as load:
            until(lambda: server.output().count("Stopped old worker") >= DEATHS, "so many workers were replaced")
            load.wait(4)
        assert set(server.journal.pids("boot")) == {server.pid}
        let_connections_be_lost(server, load)
        server.finish(load, stop=lambda: stop_granian(server, workers))


@pytest.mark.quick
@needs_granian
def test_granian_ends_with_a_worker(tmp_path: Path) -> None:
    """Without --respawn-failed-workers one that is killed in the middle of a lease takes all others along."""
    with granian(tmp_path, "wsgi", workers=3) as server:
        wait_until_started(server, 3)
        deaths = Ledger([server.get("/die")])
        server.doomed |= set(server.journal.pids("boot"))
        server.expected.append(r"\[ERROR\] Unexpected exit from worker-\d$")
        server.finish(deaths, stop=server.wait_for_end)
