"""shmpool under a real gunicorn: its ways to start, replace, stop and kill workers, each under load.

Each recipe makes at least `DEATHS` workers end, and `WebServer.finish()` asserts what must hold then: no connection had
two users, the cap held, every slot can be leased, no request failed but those in the hands of a killed worker, nothing
is left, and gunicorn wrote nothing that is not listed here.

Ways to share the pool: `preload`, an unnamed pool that the arbiter makes and the workers inherit; `named`, a pool with
a name that each worker meets in its own module code; `both`. With the server hooks and without them: they make things
faster, never right.

Not here: the harness (`webservers.py`), the app (`apps/web.py`).
"""

from __future__ import annotations

import _thread
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

import shmpool
from shmpool.integrations import gunicorn as hooks
from tests.processes import chance, until
from tests.servers import ExclusiveServer
from tests.webservers import APP, Ledger, Load, WebServer, program

pytestmark = pytest.mark.skipif(program("gunicorn") is None, reason="gunicorn is not installed")

Share = Literal["preload", "named", "both"]
Worker = Literal["sync", "gthread", "asgi"]

DEATHS = 20
THREADS = 4
# gunicorn leaves sockets of its own to the interpreter's end; those of a pool are of a class of their own.
WARNINGS = "default,ignore:unclosed <socket.socket:ResourceWarning"
# The end of a request in which a signal handler of gunicorn's called sys.exit().
EXIT_IN_REQUEST = r"^\[.*\] \[ERROR\] Error handling request.*\nTraceback .*\n(?:  .*\n)+SystemExit: [01]$"

# What workers write down when they have started: until then gunicorn's own signals to them can be lost.
CONFIG = f"""
def post_worker_init(worker):
    {{first}}
    from {APP} import note
    note("ready")
"""
CONFIG_WITH_HOOKS = f"""
from {hooks.__name__} import {", ".join(hooks.__all__)}
join = post_worker_init
{CONFIG.format(first="join(worker)")}
"""

every_share = pytest.mark.parametrize("share", ["preload", "named"])
every_worker = pytest.mark.parametrize("worker", ["sync", "gthread"])


@contextlib.contextmanager
def serving(
    directory: Path,
    *options: str,
    share: Share,
    worker: Worker = "sync",
    workers: int = 4,
    with_hooks: bool = False,
    upstream_is_down: bool = False,
    **more: Any,
) -> Iterator[WebServer]:
    """A gunicorn that answers, over an ExclusiveServer of its own."""
    config = CONFIG_WITH_HOOKS if with_hooks else CONFIG.format(first="pass")
    (directory / "gunicorn.conf.py").write_text(config, encoding="utf-8")
    argv = [str(program("gunicorn")), "--bind", "127.0.0.1:{port}", "--no-control-socket", f"--workers={workers}"]
    argv += [f"--worker-class={worker}", "--pid=gunicorn.pid", *options]
    argv += ["--threads", f"{THREADS}"] if worker == "gthread" else []
    argv += ["--preload"] if share != "named" else []
    if share != "preload":
        more["name"] = f"gunicorn-{os.getpid()}-{directory.name[:30]}"
    more.setdefault("max_connections", 2)  # fewer than there are requests at once
    with ExclusiveServer() as upstream:
        if upstream_is_down:
            upstream.refuse()
        with WebServer(
            [*argv, f"{APP}:{'asgi' if worker == 'asgi' else 'application'}"],
            directory,
            upstream,
            env={"PYTHONWARNINGS": WARNINGS},
            threads_per_worker=1 if worker == "sync" else THREADS,
            **more,
        ) as server:
            started(server, workers)
            yield server


def started(server: WebServer, workers: int = 4, arbiter: int | None = None) -> set[int]:
    """Wait until an arbiter has all its workers and each has started; their pids."""

    def ready() -> set[int]:
        return set(server.children(arbiter)) & set(server.journal.pids("ready"))

    until(lambda: len(ready()) >= workers, "all workers have started")
    return ready()


def ledger_request(server: WebServer, ledger: Ledger, path: str) -> None:
    ledger.requests.append(server.get(path))


def load_on(server: WebServer, rng: random.Random | None = None) -> Load:
    return Load(server, "/use", "/use?n=3", "/hold?ms=2", "/hold?ms=8", rng=rng)


def expect_killed(server: WebServer) -> None:
    """gunicorn reports each worker that was killed; the report of any other one is not expected."""
    for pid in server.doomed | set(server.journal.pids("die")):
        ends = r"was sent SIGKILL! Perhaps out of memory\?|exited with code 7\."
        server.expected.append(rf"\[ERROR\] Worker \(pid:{pid}\) (?:{ends})$")


def ended(server: WebServer) -> int:
    """How many workers that had started are not there any more."""
    return len(set(server.journal.pids("ready")) - set(server.descendants()))


# ---- workers that end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("worker", "share", "with_hooks"),
    [
        ("sync", "preload", False),
        ("sync", "named", True),
        ("sync", "both", False),
        ("gthread", "preload", True),
        ("gthread", "named", False),
        ("gthread", "both", True),
        ("asgi", "named", True),
    ],
)
def test_killed_workers(tmp_path: Path, worker: Worker, share: Share, with_hooks: bool) -> None:
    """SIGKILL from outside at any moment, of one or all, and deaths of a worker's own in the middle of a lease."""
    rng, suicides = chance(), Ledger()
    with serving(tmp_path, share=share, worker=worker, with_hooks=with_hooks) as server:
        with load_on(server, rng) as load:
            while ended(server) < DEATHS:
                what = rng.choice(["one", "one", "one", "all", "/die", "/die?how=exit"])
                if what.startswith("/"):
                    suicides.requests.append(server.get(what))
                else:
                    pids = server.wait_for_children(1)
                    for pid in pids if what == "all" else [rng.choice(pids)]:
                        server.kill(pid)
                load.wait(rng.randrange(8))
        server.use_every_slot()
        started(server)
        expect_killed(server)
        server.finish(load, suicides)


@every_share
@every_worker
def test_reload(tmp_path: Path, worker: Worker, share: Share) -> None:
    """HUP: new workers first, then the old ones end. No request fails."""
    with serving(tmp_path, share=share, worker=worker) as server:
        with load_on(server) as load:
            while ended(server) < DEATHS:
                old = started(server)
                load.wait(4)
                server.send_signal(signal.SIGHUP)
                until(lambda old=old: not old & set(server.children()), "the old workers end")
                load.wait(4)
        server.use_every_slot()
        started(server)
        server.finish(load)
        assert not load.ledger.failed


@every_share
@every_worker
def test_max_requests(tmp_path: Path, worker: Worker, share: Share) -> None:
    """Workers that end after some requests, each after another number. No request fails."""
    options = ("--max-requests=10", "--max-requests-jitter=10")
    with serving(tmp_path, *options, share=share, worker=worker) as server:
        with load_on(server) as load:
            until(lambda: ended(server) >= DEATHS, "so many workers were replaced")
        server.use_every_slot()
        started(server)
        server.finish(load)
        assert not load.ledger.failed


@pytest.mark.quick
@pytest.mark.parametrize("workers", [1, 2])
def test_pool_that_comes_and_goes(tmp_path: Path, workers: int) -> None:
    """Few workers that end often: the pool ends with the last one, and the next one makes it anew."""
    options = ("--max-requests=2", "--max-requests-jitter=2")
    with serving(tmp_path, *options, share="named", workers=workers) as server:
        with load_on(server) as load:
            until(lambda: ended(server) >= DEATHS, "so many workers were replaced")
        server.use_every_slot()
        started(server, workers)
        server.finish(load)
        assert not load.ledger.failed


@pytest.mark.parametrize("with_hooks", [False, True])
def test_timeout(tmp_path: Path, with_hooks: bool) -> None:
    """Workers that hang in a lease: gunicorn aborts them, and kills those that do not hear it."""
    hanging = DEATHS // 2
    more: dict[str, Any] = {"workers": hanging + 1, "max_connections": hanging + 2}
    hangs = Ledger()
    with serving(tmp_path, "--timeout=1", share="preload", with_hooks=with_hooks, **more) as server:
        with load_on(server) as load:
            for _ in range(2):
                paths = [f"/hang?deaf={number % 2 or ''}" for number in range(hanging)]
                threads = [threading.Thread(target=ledger_request, args=(server, hangs, path)) for path in paths]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            load.wait(10)
        server.doomed |= set(server.journal.pids("hang"))
        assert len(server.doomed) >= DEATHS
        server.use_every_slot()
        started(server, hanging + 1)
        expect_killed(server)
        server.expected.append(EXIT_IN_REQUEST)
        server.expected += [rf"\[CRITICAL\] WORKER TIMEOUT \(pid:{pid}\)$" for pid in server.doomed]
        server.finish(load, hangs)
        assert len(hangs.failed) == 2 * hanging


@pytest.mark.parametrize("share", ["preload", "named", "both"])
@every_worker
def test_upgrade(tmp_path: Path, worker: Worker, share: Share) -> None:
    """USR2: a new arbiter beside the old one, which then ends by TERM (no request fails) or QUIT (those in hand do).

    No QUIT for `gthread`: gunicorn's handler stops the thread pool, and waits for ever if the signal comes while the
    worker hands its threads a request.
    """
    workers, upgrades = DEATHS // 2, 2
    with serving(tmp_path, share=share, worker=worker, workers=workers) as server:
        with load_on(server) as load:
            for number in range(upgrades):
                old, new = server.pid, upgraded(server, workers)
                until(lambda new=new: load.ledger.pids() & set(server.children(new)), "a new worker has answered")
                quits = worker == "sync" and number == 1
                if quits:
                    server.doomed |= set(server.children(old))
                server.send_signal(signal.SIGQUIT if quits else signal.SIGTERM, old)
                promoted(server, old, new)
                load.wait(4)
        assert ended(server) >= DEATHS
        server.use_every_slot()
        started(server, workers)
        server.expected.append(EXIT_IN_REQUEST)
        # Two unnamed pools live side by side for a while: one per arbiter. A named one is one.
        cap = server.settings["max_connections"]
        server.finish(load, cap=cap if share != "preload" else 2 * cap)


def upgraded(server: WebServer, workers: int) -> int:
    """Start a new arbiter by USR2; its pid, when it has all its workers."""
    pidfile = server.directory / "gunicorn.pid.2"
    server.send_signal(signal.SIGUSR2)
    until(lambda: pidfile.exists() and pidfile.read_text().strip(), "the new arbiter is there")
    new = int(pidfile.read_text())
    started(server, workers, new)
    return new


def promoted(server: WebServer, old: int, new: int) -> None:
    """Wait until the old arbiter is gone, and the new one knows that it is the first now."""
    until(lambda: old not in server.descendants(), "the old arbiter ends")
    server.pid = new
    server.send_signal(signal.SIGWINCH)  # makes an arbiter that is no daemon look round, and nothing else
    pidfile = server.directory / "gunicorn.pid"
    until(lambda: pidfile.exists() and pidfile.read_text().strip() == str(new), "the new arbiter takes over")


@pytest.mark.parametrize("share", ["preload", "named", "both"])
def test_killed_arbiter(tmp_path: Path, share: Share) -> None:
    """Workers whose arbiter was killed end by themselves; the last one takes the pool with it."""
    with serving(tmp_path, "--timeout=1", share=share) as server:
        with load_on(server) as load:
            load.wait(20)
        server.kill(server.pid)
        server.finish(load, stop=server.wait_for_end)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root")
def test_workers_of_another_user(tmp_path: Path) -> None:
    """The `post_fork` hook: workers take their place in the pool while they may."""
    options = ("--user=65534", "--group=65534")
    with serving(tmp_path, *options, share="preload", with_hooks=True, min_connections=2) as server:
        with load_on(server) as load:
            server.kill(min(started(server)))
            load.wait(50)
        server.use_every_slot()
        assert all(os.stat(f"/proc/{pid}").st_uid == 65534 for pid in started(server))
        expect_killed(server)
        server.finish(load)


@pytest.mark.parametrize("with_hooks", [False, True])
def test_threads_finish(tmp_path: Path, with_hooks: bool) -> None:
    """A `gthread` worker that has to go waits `graceful_timeout` for its threads, then calls the hook `worker_exit`.

    They finish nevertheless what they have begun, be they leasing or waiting.
    """
    ledger, grace = Ledger(), "--graceful-timeout=1"
    with serving(tmp_path, grace, share="named", worker="gthread", workers=2, with_hooks=with_hooks) as server:
        threads = [
            threading.Thread(target=ledger_request, args=(server, ledger, "/hold?ms=700")) for _ in range(2 * THREADS)
        ]
        for thread in threads:
            thread.start()
        until(lambda: len(server.journal.pids("begin")) >= 1 + len(threads), "all have begun")
        old = started(server, 2)
        server.send_signal(signal.SIGHUP)
        until(lambda: not old & set(server.children()), "the old workers end")
        for thread in threads:
            thread.join()
        assert len(ledger.ok) == len(threads)
        started(server, 2)
        server.finish(ledger)


# ---- the hooks -------------------------------------------------------------------------------------------------------


@every_share
def test_a_killed_workers_slot_is_back_at_once(tmp_path: Path, share: Share) -> None:
    """With the hooks, nobody needs to want it: looked at from outside, which changes nothing."""
    with (
        serving(tmp_path, share=share, with_hooks=True, workers=2) as server,
        shmpool.inspect(server.pool_name) as look,
    ):
        for number in range(3):
            hang = threading.Thread(target=server.get, args=("/hang",))
            hang.start()
            until(lambda number=number: len(server.journal.pids("hang")) > number, "a lease hangs")
            assert look.stats().in_use == 1
            server.kill(server.journal.pids("hang")[-1])
            until(lambda number=number: look.stats().recovered_leases > number, "it is taken back")
            until(lambda: look.stats().in_use == 0, "its slot is free")
            hang.join()
            started(server, 2)
        expect_killed(server)
        server.finish()


@every_share
def test_connections_are_open_before_requests(tmp_path: Path, share: Share) -> None:
    with serving(
        tmp_path, share=share, with_hooks=True, max_connections=4, min_connections=3, ready="/stats"
    ) as server:
        assert server.ask("/stats")["idle"] >= 3
        assert server.upstream.stats()["begins"] == 0
        server.finish()


@every_share
def test_an_upstream_that_is_down_stops_no_worker(tmp_path: Path, share: Share) -> None:
    # The first requests come before the next dial is due.
    settings: dict[str, Any] = {"min_connections": 1, "when_down": "wait"}
    with serving(tmp_path, share=share, with_hooks=True, upstream_is_down=True, **settings) as server:
        lines = rf"\[WARNING\] shmpool: pool '{server.pool_name}': .*Connection refused.*; the worker starts without.*$"
        assert re.search(lines, server.output(), re.MULTILINE)
        server.expected.append(lines)
        server.upstream.listen()
        server.use_every_slot()
        server.finish()


class Log:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def warning(self, message: str, /, *args: object) -> None:
        self.lines.append(message % args)


class Side:
    """What gunicorn gives to hooks, as far as they look: an arbiter or a worker."""

    def __init__(self, pid: int = 0) -> None:
        self.pid = pid or os.getpid()
        self.log = Log()

    def notify(self) -> None:
        pass


@pytest.mark.quick
def test_gunicorn_takes_the_hooks() -> None:
    config = pytest.importorskip("gunicorn.config").Config()
    for name in hooks.__all__:
        config.set(name, getattr(hooks, name))
        assert getattr(config, name) is getattr(hooks, name)


@pytest.mark.quick
def test_gunicorn_is_not_needed() -> None:
    code = f"import sys; sys.modules['gunicorn'] = None; import {hooks.__name__}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def call(name: str, arbiter: Side, worker: Side) -> None:
    """The hook of that name, with what gunicorn gives it."""
    arguments = {"post_worker_init": (worker,), "on_exit": (arbiter,)}.get(name, (arbiter, worker))
    hook: Callable[..., None] = getattr(hooks, name)
    hook(*arguments)
    hook(*arguments)


@pytest.mark.quick
@pytest.mark.parametrize("name", hooks.__all__)
def test_hooks_without_a_pool(name: str) -> None:
    arbiter, worker = Side(), Side()
    call(name, arbiter, worker)
    assert not arbiter.log.lines + worker.log.lines


@pytest.mark.quick
@pytest.mark.parametrize("name", hooks.__all__)
def test_hooks_with_a_closed_pool(name: str, make: Callable[..., shmpool.Pool]) -> None:
    pool = make()
    pool.close()
    arbiter, worker = Side(), Side()
    call(name, arbiter, worker)
    assert not arbiter.log.lines + worker.log.lines


@pytest.mark.quick
@pytest.mark.parametrize("name", hooks.__all__)
def test_hooks_log_what_goes_wrong(
    name: str, make: Callable[..., shmpool.Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make()

    def fail(_: shmpool.Pool) -> None:
        raise shmpool.PoolError from OSError("deeper")

    for method in ("maintain", "recover", "leave"):
        monkeypatch.setattr(shmpool.Pool, method, fail)
    arbiter, worker = Side(), Side()
    call(name, arbiter, worker)
    lines = arbiter.log.lines + worker.log.lines
    assert lines
    assert all(re.match(rf"shmpool: pool '{pool.name}': the pool failed \(deeper\); ", line) for line in lines)


@pytest.mark.quick
def test_the_arbiter_does_not_leave_for_a_worker(make: Callable[..., shmpool.Pool]) -> None:
    """gunicorn calls `worker_exit` in the arbiter too, for a worker that is gone."""
    pool = make()
    hooks.worker_exit(Side(), Side(pid=1))
    pool.get().release()


@pytest.mark.quick
@pytest.mark.parametrize("begun_by", ["Python", "another"])
def test_a_worker_with_threads_leaves_at_its_end(make: Callable[..., shmpool.Pool], begun_by: str) -> None:
    """gunicorn calls `worker_exit` although threads still have requests in hand."""
    pool, begun, end = make(), threading.Event(), threading.Event()

    def serve() -> None:
        threading.current_thread()  # Python knows of it from now on
        begun.set()
        end.wait()

    before = tasks()
    threading.Thread(target=serve).start() if begun_by == "Python" else _thread.start_new_thread(serve, ())
    try:
        assert begun.wait(10)
        hooks.worker_exit(Side(), Side())
        pool.get().release()
    finally:
        end.set()
    until(lambda: tasks() <= before, "it has ended")
    hooks.worker_exit(Side(), Side())
    with pytest.raises(shmpool.PoolClosed):
        pool.get()


def tasks() -> set[str]:
    """The threads of this process, by the kernel's account."""
    return set(os.listdir("/proc/self/task"))


@pytest.mark.quick
def test_a_worker_leaves_although_its_pools_have_threads(make: Callable[..., shmpool.Pool]) -> None:
    first, second = make(), make()
    assert sum(thread.name.startswith("shmpool-") for thread in threading.enumerate()) >= 2
    hooks.worker_exit(Side(), Side())
    for pool in (first, second):
        with pytest.raises(shmpool.PoolClosed):
            pool.get()


@pytest.mark.quick
def test_a_server_that_is_away_is_a_line_in_the_log(make: Callable[..., shmpool.Pool], deaf_port: int) -> None:
    pool = make(target=f"tcp://127.0.0.1:{deaf_port}", min_connections=1)
    worker = Side()
    for _ in range(2):
        hooks.post_worker_init(worker)
    assert len(worker.log.lines) == 2
    for line in worker.log.lines:
        assert re.match(
            rf"shmpool: pool '{pool.name}': .*[Rr]efused.*; the worker starts without its connections$", line
        )
