"""shmpool under a real uWSGI: its ways to start, replace, stop and lose workers, each under load.

Each recipe makes at least `DEATHS` workers end (a reload fewer: it takes uWSGI seconds), and `WebServer.finish()`
asserts what must hold then: no connection had two users, the cap held, every slot can be leased, no request failed but
those in the hands of a killed worker, nothing is left, and uWSGI wrote nothing alarming that is not listed here.

Three ways to share the pool: `preload`, an unnamed pool that the master makes and the workers inherit; `named`, the
same with a name; `lazy` (--lazy-apps), each worker meets the pool by its name.

uWSGI forks behind Python's back: without --py-call-osafterfork no hook of Python's runs in a worker, and none of its
atexit ever runs in the master. Only libc's do.

Not here: the harness (`webservers.py`), the app (`apps/web.py`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.processes import chance, until
from tests.servers import ExclusiveServer
from tests.webservers import APP, Ledger, Load, WebServer, program

UWSGI = program("uwsgi")
pytestmark = pytest.mark.skipif(UWSGI is None, reason="uwsgi is not installed")

Share = Literal["preload", "named", "lazy"]

DEATHS = 20
EXPECTED = (
    r"\*\*\* WARNING: you are running uWSGI as root !!! \(use the --uid flag\) \*\*\*",
    r"\*\*\* WARNING: you are running uWSGI without its master process manager \*\*\*",
)

every_share = pytest.mark.parametrize("share", ["preload", "named", "lazy"])


@contextlib.contextmanager
def serving(
    directory: Path, *options: str, share: Share, workers: int, threads: int = 1, master: bool = True, **more: Any
) -> Iterator[WebServer]:
    """A uWSGI that answers, over an ExclusiveServer of its own."""
    argv = [str(UWSGI), "--http-socket=127.0.0.1:{port}", f"--module={APP}", "--need-app", "--disable-logging"]
    argv += [f"--processes={workers}", *options]
    # It sleeps 2 s when workers end quickly; SIGTERM without --die-on-term is a reload.
    argv += ["--master", "--stats=stats", "--forkbomb-delay=0", "--die-on-term"] if master else []
    argv += ["--lazy-apps"] if share == "lazy" else []
    argv += [f"--threads={threads}"] if threads > 1 else []
    if importlib.util.find_spec("pyuwsgi"):
        # The wheel's uwsgi is a Python script. A reload executes what /proc says it is, which is no environment's.
        argv += [f"--binary-path={sys.executable}"]
    if share != "preload":
        more["name"] = f"uwsgi-{os.getpid()}-{directory.name[:30]}"
    with (
        ExclusiveServer() as upstream,
        WebServer(argv, directory, upstream, expected=EXPECTED, threads_per_worker=threads, **more) as server,
    ):
        if master:
            wait_for_workers(server, workers)
        yield server


def load_on(server: WebServer, rng: random.Random | None = None) -> Load:
    return Load(server, "/use", "/use?n=3", "/hold?ms=2", "/hold?ms=8", rng=rng)


def ended(server: WebServer) -> int:
    """How many workers that took requests are not there any more."""
    return len(set(server.journal.pids("begin")) - set(server.descendants()))


def killed(server: WebServer) -> int:
    return len(server.doomed | set(server.journal.pids("die")))


def accepting(server: WebServer) -> list[int]:
    """The workers that have loaded the app, and listen to signals, as uWSGI's statistics say."""
    with socket.socket(socket.AF_UNIX) as statistics:
        try:
            statistics.connect(str(server.directory / "stats"))
        except (FileNotFoundError, ConnectionRefusedError):  # it is starting
            return []
        with statistics.makefile("rb") as answer:
            workers = json.load(answer)["workers"]
    living = server.children()
    return [each["pid"] for each in workers if each["accepting"] and each["pid"] in living]


def wait_for_workers(server: WebServer, count: int) -> list[int]:
    until(lambda: len(accepting(server)) == count, f"{count} workers accept requests")
    return accepting(server)


def wait_for_the_end(server: WebServer, workers: set[int]) -> None:
    until(lambda: not workers & set(server.children()), "the workers end")


def end_most(server: WebServer, workers: int, rng: random.Random, suicides: Ledger) -> None:
    """End all workers but one: by a signal from outside, or by the worker itself in the middle of a lease. Returns when
    there are as many as before; the master looks for dead ones once a second."""
    for pid in rng.sample(wait_for_workers(server, workers), workers)[1:]:
        if rng.random() < 0.7:
            server.kill(pid)
        else:
            suicides.requests.append(server.get(rng.choice(["/die", "/die?how=exit"])))
    server.wait_for_children(workers)


def stop(server: WebServer, workers: int) -> None:
    """A worker that is told to end while it loads the app does not hear it, and the master waits for it a minute."""
    wait_for_workers(server, workers)
    server.stop()


# ---- workers that end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
@every_share
def test_killed_workers(tmp_path: Path, share: Share, threads: int) -> None:
    """SIGKILL from outside at any moment, and deaths of a worker's own in the middle of a lease."""
    kill_them(tmp_path, "--enable-threads", share=share, threads=threads)


@pytest.mark.parametrize("share", ["preload", "lazy"])
def test_without_threads_of_python(tmp_path: Path, share: Share) -> None:
    """Without --enable-threads a worker never lets go of the interpreter's lock, not even while it has no request."""
    kill_them(tmp_path, share=share)


@pytest.mark.parametrize("share", ["preload", "named"])
def test_with_fork_hooks(tmp_path: Path, share: Share) -> None:
    """--py-call-osafterfork: Python's hooks for children run in the worker, those for parents nowhere."""
    kill_them(tmp_path, "--enable-threads", "--py-call-osafterfork", share=share)


def kill_them(directory: Path, *options: str, share: Share, threads: int = 1) -> None:
    rng, suicides, workers = chance(), Ledger(), 8
    with serving(directory, *options, share=share, workers=workers, threads=threads) as server:
        with load_on(server, rng) as load:
            while killed(server) < DEATHS:
                end_most(server, workers, rng, suicides)
                load.wait(10)
        server.use_every_slot()
        server.finish(load, suicides, stop=lambda: stop(server, workers))


@every_share
def test_max_requests(tmp_path: Path, share: Share) -> None:
    """Workers that end after some requests. No request fails."""
    workers = 8
    options = ("--enable-threads", "--max-requests=5", "--min-worker-lifetime=0")
    with serving(tmp_path, *options, share=share, workers=workers) as server:
        with load_on(server) as load:
            until(lambda: ended(server) >= DEATHS, "so many workers were replaced")
        server.finish(load, stop=lambda: stop(server, workers))
        assert not load.ledger.failed


@pytest.mark.parametrize("share", ["preload", "lazy"])
def test_harakiri(tmp_path: Path, share: Share) -> None:
    """Workers that hang in a lease are killed by the master. It kills those that wait for a lease too, if they do it
    for so long: here they need not."""
    hangs = Ledger()
    options, workers = ("--enable-threads", "--harakiri=2"), DEATHS + 3
    with serving(tmp_path, *options, share=share, workers=workers, max_connections=DEATHS + 2) as server:
        with Load(server, "/use", threads=2) as load:
            threads = [
                threading.Thread(target=lambda: hangs.requests.append(server.get("/hang"))) for _ in range(DEATHS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            server.doomed |= set(server.journal.pids("hang"))
            wait_for_the_end(server, server.doomed)
            load.wait(10)
        wait_for_workers(server, workers)
        server.use_every_slot()
        server.expected.append(r"\*\*\* WARNING: you have enabled harakiri without post buffering\.")
        server.finish(load, hangs, stop=lambda: stop(server, workers))
        assert not load.ledger.failed
        assert len(hangs.failed) == len(server.doomed) == DEATHS


# ---- new workers for old ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["hup", "touch"])
@every_share
def test_reload(tmp_path: Path, share: Share, how: str) -> None:
    """All workers end, then the master executes itself again: nothing of the pool is left, and the new program makes
    its own. The listening socket is kept: no request fails, but one that a worker has accepted at the very moment.

    uWSGI's fault: its handler of the signal (gracefully_kill) exits unless in_request is set, which is after accept().
    """
    workers = 4
    touched = tmp_path / "reload"
    touched.touch()
    with serving(tmp_path, "--enable-threads", f"--touch-reload={touched}", share=share, workers=workers) as server:
        with load_on(server) as load:
            for _ in range(2):
                old = set(wait_for_workers(server, workers))
                load.wait(10)
                if how == "hup":
                    server.send_signal(signal.SIGHUP)
                else:
                    os.utime(touched, (0, os.stat(touched).st_mtime + 10))
                wait_for_the_end(server, old)
                load.wait(4)
        server.pool_name = server.ask("/pid")["pool"]
        server.use_every_slot()
        server.dropped_max = 2 * workers
        server.finish(load, stop=lambda: stop(server, workers))
        assert len(set(server.journal.pids("boot"))) == (1 if share != "lazy" else 3 * workers)


def test_chain_reload(tmp_path: Path) -> None:
    """One worker after the other, each when the one before takes requests: only with --lazy-apps."""
    workers = 3
    touched = tmp_path / "reload"
    touched.touch()
    options = ("--enable-threads", f"--touch-chain-reload={touched}")
    with serving(tmp_path, *options, share="lazy", workers=workers) as server:
        with load_on(server) as load:
            old = set(wait_for_workers(server, workers))
            load.wait(10)
            os.utime(touched, (0, os.stat(touched).st_mtime + 10))
            wait_for_the_end(server, old)
            load.wait(4)
        server.use_every_slot()
        server.finish(load, stop=lambda: stop(server, workers))
        assert not load.ledger.failed


@every_share
def test_maintenance(tmp_path: Path, share: Share) -> None:
    """Workers have the pool's thread. The master has not: it forks without the interpreter's lock, and a child of a
    fork in the middle of a tick would wait for it for ever."""
    workers = 2
    maintained: dict[int, bool] = {}

    def all_have_answered() -> bool:
        answer = server.ask("/pid")
        maintained[answer["pid"]] = answer["maintained"]
        return set(maintained) >= set(server.children())

    with serving(tmp_path, "--enable-threads", share=share, workers=workers) as server:
        with load_on(server) as load:
            for pid in wait_for_workers(server, workers):
                load.wait(20)
                assert len([*Path(f"/proc/{server.pid}/task").iterdir()]) == 1
                server.kill(pid)
                server.wait_for_children(workers)
        wait_for_workers(server, workers)
        server.use_every_slot()
        until(all_have_answered, "every worker has answered")
        assert all(maintained.values())
        server.finish(load, stop=lambda: stop(server, workers))


@pytest.mark.quick
def test_without_a_master(tmp_path: Path) -> None:
    """The first worker is the process that made the pool; nobody replaces the others. Each has maintenance, the first
    from its first request on."""
    workers = 4
    maintained: dict[int, bool] = {}
    with serving(tmp_path, "--enable-threads", share="preload", workers=workers, master=False) as server:

        def all_are_maintained() -> bool:
            answer = server.ask("/pid")
            maintained[answer["pid"]] = answer["maintained"]
            return len(maintained) == workers and all(maintained.values())

        with load_on(server, chance()) as load:
            try:
                until(all_are_maintained, "every worker has maintenance")
            except AssertionError as error:
                raise AssertionError(f"{error}: {maintained}") from error
            for pid in server.wait_for_children(workers - 1):
                load.wait(10)
                server.kill(pid)
            load.wait(10)
        server.use_every_slot()
        server.finish(load, stop=lambda: server.stop(signal.SIGINT))
