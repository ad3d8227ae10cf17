"""Real application servers for the tests: start one, load it over HTTP, kill its workers, end it, prove that nothing
was shared, exceeded, failed or left.

    with ExclusiveServer() as upstream, WebServer(argv, tmp_path, upstream, name="web", max_connections=4) as server:
        with Load(server, "/use") as load:
            server.kill(server.children()[0])
            load.wait(100)                              # so many more answers
        server.finish(load)                             # ends it; asserts all that is written there

What: `WebServer` is a server program (gunicorn, uvicorn, uWSGI, ...) with the app `tests/apps/web.py`, in a session of
its own; `Load` sends requests from threads and keeps a ledger of them; `Journal` is what the app wrote down about each.

How: between the test and the server stands a supervisor (this file, executed). It is the *subreaper* of everything that
the server starts, daemons too: its own end means that no process is left, and when the test ends or is killed it kills
what there is.

What a failed request may be: one whose own worker was killed, by the test (`kill`), by itself (`/die`) or by its server
(`WebServer.doomed`). The app notes each request before it leases anything, so a failed request is known by its worker;
one that no worker noted was lost between accept and app, which each killing may do to as many as a worker has threads.
A refused connection, a silent server and an answer of the app's that says what the pool raised are never allowed.

Not here: the app (`tests/apps/web.py`), what its servers reach (`servers.py`), what is known of single servers
(`test_servers_*.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, final

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
APP = "tests.apps.web"  # `tests.apps.web:application` is WSGI, `tests.apps.web:asgi` is ASGI
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
REQUEST_TIMEOUT_S = 20.0
# A line of the server's output that has one of these in it must be expected.
ALARMING = re.compile(r"warning|error|critical|traceback|exception|fatal|leaked|core dumped|segfault", re.IGNORECASE)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def program(name: str) -> str | None:
    """Path of a program that was installed beside this Python, else of the one on PATH, else None."""
    beside = Path(sysconfig.get_path("scripts"), name)
    return str(beside) if beside.exists() else shutil.which(name)


# --------------------------------------------------------------------------------------------------------------------
# What happened to requests
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One request of the ledger, as its sender saw it."""

    id: str
    path: str
    status: int = 0  # 0: no answer
    body: str = ""
    error: str = ""  # why there was no answer

    @property
    def ok(self) -> bool:
        return self.status == 200

    def json(self) -> dict[str, Any]:
        """The body as the app wrote it; {} when it did not."""
        try:
            answer = json.loads(self.body)
        except ValueError:
            return {}
        return answer if isinstance(answer, dict) else {}

    @property
    def app_error(self) -> str:
        """What the app says went wrong in it; "" when it says nothing, or nothing came."""
        return str(self.json().get("error", ""))


@dataclass
class Ledger:
    """All requests that were sent and have ended. Threads append to it."""

    requests: list[Request] = field(default_factory=list)

    @property
    def ok(self) -> list[Request]:
        return [each for each in self.requests if each.ok]

    @property
    def failed(self) -> list[Request]:
        return [each for each in self.requests if not each.ok]

    def pids(self) -> set[int]:
        """The workers that answered."""
        return {int(each.json()["pid"]) for each in self.ok}


@final
class Journal:
    """What the app wrote down, a line each: `<event> <pid> <request id>`. Events: boot, begin, end, die."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[tuple[str, int, str]]:
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a line that crosses a page can be seen by half
        rows = [line.split(" ", 2) for line in whole.splitlines()]
        return [(event, int(pid), rest) for event, pid, rest in rows]

    def pids(self, event: str) -> list[int]:
        """The processes that wrote `event`, in order, each as often as it did."""
        return [pid for each, pid, _ in self.lines() if each == event]

    def begun_by(self) -> dict[str, int]:
        """Who had a request in hand, by the request's id."""
        return {rest: pid for event, pid, rest in self.lines() if event == "begin"}


# --------------------------------------------------------------------------------------------------------------------
# The server
# --------------------------------------------------------------------------------------------------------------------


@final
class WebServer:
    """One running server program with the app.

    `argv` are its words, with {port} where the port belongs (on 127.0.0.1). `directory` (tmp_path) takes its output,
    its runtime directory and the journal; it runs in `cwd`, or there. `name` and the other settings are those of the
    app's Pool: without a name it makes an unnamed one. `expected` are regular expressions of what it may write although
    that looks like trouble; ^ and $ are those of lines, one may span lines, {port} is the port. `env` is added to the
    environment.

    Attributes: `pid` of the program, `port`, `journal`, `doomed` (pids whose requests may fail: add what the server
    itself kills), `killed`, `pool_name` as the app says it.
    """

    def __init__(
        self,
        argv: Sequence[str],
        directory: Path,
        upstream: Any,
        *,
        name: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        expected: Iterable[str] = (),
        threads_per_worker: int = 1,
        ready: str = "/pid",
        **settings: Any,
    ) -> None:
        self.upstream = upstream
        self.settings: dict[str, Any] = {"max_connections": 4, "min_connections": 0, **settings}
        self.directory = directory
        self.threads_per_worker = threads_per_worker
        self.runtime = directory / "run"
        self.runtime.mkdir(mode=0o700)
        self.log = directory / "server.log"
        self.journal = Journal(directory / "journal")
        self.pool_name = ""
        self.killed: list[int] = []
        self.doomed: set[int] = set()
        self.dropped_max = 0  # requests that the server itself may drop before the app sees them
        self._ids = itertools.count()
        self._port_holder = _held_port()
        self.port: int = self._port_holder.getsockname()[1]
        self.expected = [pattern.replace("{port}", str(self.port)) for pattern in expected]
        self._started = self._start([word.replace("{port}", str(self.port)) for word in argv], cwd, name, env or {})
        try:
            self.pid = self._server_pid()
            self.pool_name = str(self._wait_until_it_answers(ready).get("pool", ""))
        except BaseException:
            self.close()
            raise

    def _start(
        self, argv: list[str], cwd: Path | None, name: str | None, env: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "COV"))}
        given = {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONWARNINGS": "default",
            "PYTHONFAULTHANDLER": "1",
            "PYTHONUNBUFFERED": "1",
            "XDG_RUNTIME_DIR": str(self.runtime),
            "SHMPOOL_APP_UPSTREAM": self.upstream.url,
            "SHMPOOL_APP_NAME": name or "",
            "SHMPOOL_APP_SETTINGS": json.dumps(self.settings),
            "SHMPOOL_APP_JOURNAL": str(self.journal.path),
        }
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-S", "-E", str(HERE), "supervise", *argv],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=cwd or self.directory,
                env={**inherited, **given, **env},
                start_new_session=True,
            )

    def _server_pid(self) -> int:
        assert self._started.stdout is not None
        line = self._started.stdout.readline()
        assert line.startswith(b"started "), line
        return int(line.split()[1])

    def _wait_until_it_answers(self, path: str) -> dict[str, Any]:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            answer = self.get(path)
            if answer.ok:
                return answer.json()
            assert not answer.app_error, f"the app cannot work: {answer.app_error}\n{self.output()}"
            assert self.running(), f"the server ended instead of answering:\n{self.output()}"
            time.sleep(0.01)  # sleep: a port that does not answer yet gives nothing to wait for
        raise AssertionError(f"no answer on port {self.port} within {START_TIMEOUT_S} s:\n{self.output()}")

    # -- talking to it -----------------------------------------------------------------------------------------------

    def get(self, path: str, timeout_s: float = REQUEST_TIMEOUT_S) -> Request:
        """One request on a connection of its own; it never raises for what the server does."""
        number = f"{next(self._ids)}"
        full = f"{path}{'&' if '?' in path else '?'}id={number}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request("GET", full, headers={"Connection": "close"})
            with connection.getresponse() as response:
                return Request(number, path, response.status, response.read().decode(errors="replace"))
        except (OSError, http.client.HTTPException) as error:
            return Request(number, path, error=f"{type(error).__name__}: {error}")
        finally:
            connection.close()

    def ask(self, path: str) -> dict[str, Any]:
        """The app's answer to a request that must succeed."""
        answer = self.get(path)
        assert answer.ok, f"{path}: {answer}\n{self.output()}"
        return answer.json()

    def use_every_slot(self) -> None:
        """No permit was lost: one worker can lease them all at once. For the end, when nobody else does it."""
        numbers = self.ask("/every")["connections"]
        assert len(set(numbers)) == len(numbers) == self.settings["max_connections"], numbers

    # -- its processes -----------------------------------------------------------------------------------------------

    def running(self) -> bool:
        """Whether any process of it is left."""
        return self._started.poll() is None

    def children(self, pid: int | None = None) -> list[int]:
        """The living children of the server's first process (or of `pid`), without Python's resource tracker."""
        living = (each for each in _children(pid or self.pid) if _state(each) not in ("Z", "X", ""))
        return [each for each in living if "multiprocessing.resource_tracker" not in _command(each)]

    def wait_for_children(self, count: int, pid: int | None = None, timeout_s: float = 30.0) -> list[int]:
        """Its children (or those of `pid`), as soon as there are so many."""
        deadline = time.monotonic() + timeout_s
        while len(found := self.children(pid)) < count:
            assert time.monotonic() < deadline, f"{len(found)} of {count} workers after {timeout_s} s\n{self.output()}"
            time.sleep(0.005)  # sleep: between two looks at another process's children
        return found

    def descendants(self) -> list[int]:
        """All living processes of it."""
        found, left = [], _children(self._started.pid)
        while left:
            pid = left.pop()
            left += _children(pid)
            if _state(pid) not in ("Z", "X", ""):
                found.append(pid)
        return sorted(found)

    def send_signal(self, number: int, pid: int | None = None) -> None:
        """A signal to the server's first process (or to `pid`), without a note in the books."""
        os.kill(pid or self.pid, number)

    def kill(self, pid: int, number: int = signal.SIGKILL) -> bool:
        """Kill a worker; False when it was gone already. Requests that it had in hand may fail from now on."""
        self.doomed.add(pid)
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        self.killed.append(pid)
        return True

    # -- its end -----------------------------------------------------------------------------------------------------

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Ask its first process to end; asserts that it and all that it started have ended when this returns."""
        if self.running():
            self.send_signal(number)
        self.wait_for_end(timeout_s)

    def wait_for_end(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Wait until no process of it is left."""
        try:
            self._started.wait(timeout_s)
        except subprocess.TimeoutExpired:
            left = {pid: _command(pid) for pid in self.descendants()}
            self.close()
            raise AssertionError(f"processes left after {timeout_s} s: {left}\n{self.output()}") from None

    def close(self) -> None:
        """End it by force, with everything that it started. Done at the end of the block, also when the test fails."""
        assert self._started.stdin is not None
        assert self._started.stdout is not None
        self._started.stdin.close()  # the supervisor kills what there is
        self._started.wait()
        self._started.stdout.close()
        self._port_holder.close()
        for segment in self._segments():  # nobody is left who could
            segment.unlink(missing_ok=True)

    def __enter__(self) -> WebServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close()
        if kind is not None:
            print(f"output of the server:\n{self.output()}")

    # -- what must hold ----------------------------------------------------------------------------------------------

    def output(self) -> str:
        """All that it wrote so far, to standard output and standard error."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def finish(self, *ledgers: Load | Ledger, stop: Callable[[], None] | None = None, cap: int | None = None) -> None:
        """End it (`stop`, or SIGTERM to its first process), then assert all that must hold of any server:

        it ended by itself with every process; no connection had two users, the cap held, none is left; nothing is
        left in shared memory and in its runtime directory; only requests of killed workers failed; it wrote nothing
        alarming. `cap` is that of the settings, if none is given.
        """
        (stop or self.stop)()
        self.wait_for_end()
        self.check_upstream(cap)
        self.check_nothing_left()
        self.check_ledgers(*(each.ledger if isinstance(each, Load) else each for each in ledgers))
        self.check_output()

    def check_upstream(self, cap: int | None = None) -> None:
        """What the server behind the pool saw: no connection with two users, never more than the cap, none left."""
        deadline = time.monotonic() + 5
        while (figures := self.upstream.stats())["open"] and time.monotonic() < deadline:
            time.sleep(0.002)  # sleep: between two looks at another process
        assert figures["violations"] == 0, figures["violation_log"]
        limit = cap if cap is not None else self.settings["max_connections"]
        assert figures["max_open"] <= limit, f"{figures['max_open']} connections at once; the cap is {limit}"
        assert figures["open"] == 0, f"{figures['open']} connections outlived the server"

    def check_nothing_left(self) -> None:
        assert not (left := self._segments()), f"segments left: {left}"
        files = sorted(str(each.relative_to(self.runtime)) for each in self.runtime.rglob("*") if not each.is_dir())
        assert not files, f"left in the runtime directory: {files}"

    def _segments(self) -> list[Path]:
        """The shared memory of its pool, and what there may be of a pool that its first process was making."""
        names = filter(None, [self.pool_name, f"{self.pid}-*", f".{self.pid}-*"])
        found = (Path("/dev/shm").glob(f"shmpool-{os.getuid()}-{name}") for name in names)
        return sorted(set(itertools.chain.from_iterable(found)))

    def check_output(self) -> None:
        text = self.output()
        for pattern in self.expected:
            text = re.sub(pattern, "", text, flags=re.MULTILINE)
        alarming = [line for line in text.splitlines() if ALARMING.search(line)]
        assert not alarming, "the server wrote:\n" + "\n".join(alarming) + f"\n\nin all:\n{self.output()}"

    def check_ledgers(self, *ledgers: Ledger) -> None:
        """Only requests whose own worker was killed have failed."""
        begun_by = self.journal.begun_by()
        died = self.doomed | set(self.journal.pids("die"))
        lost, wrong = 0, []
        for request in itertools.chain.from_iterable(each.failed for each in ledgers):
            worker = begun_by.get(request.id)
            if request.app_error or "Refused" in request.error or "Timeout" in request.error:
                wrong.append((request, worker))
            elif worker is None:
                lost += 1
            elif worker not in died:
                wrong.append((request, worker))
        assert not wrong, f"{len(wrong)} requests failed that should not have, with their workers: {wrong[:5]}"
        allowed = len(died) * self.threads_per_worker + self.dropped_max
        assert lost <= allowed, f"{lost} requests were lost before the app; {len(died)} killings explain {allowed}"


def _held_port() -> socket.socket:
    """A port of loopback that a server with SO_REUSEADDR can listen on, and that nobody else is given meanwhile."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):  # the process has ended meanwhile
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):  # the task has
                found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return sorted(found)


def _state(pid: int) -> str:
    """The letter of /proc/<pid>/stat; "" when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip() or f"({_state(pid)})"
    except OSError:
        return "gone"


# --------------------------------------------------------------------------------------------------------------------
# Load
# --------------------------------------------------------------------------------------------------------------------


@final
class Load:
    """Threads that send requests one after the other while the block runs; `ledger` has what became of them.

    `paths` are chosen from by chance (by `rng`, or evenly in turn without one). Each request has a connection of its
    own.
    """

    def __init__(
        self, server: WebServer, *paths: str, threads: int = 4, pause_s: float = 0.001, rng: random.Random | None = None
    ) -> None:
        self.ledger = Ledger()
        self._server = server
        self._pause_s = pause_s
        self._ended = threading.Event()
        self._news = threading.Condition()
        seeds = [rng.random() if rng else number for number in range(threads)]
        self._threads = [
            threading.Thread(target=self._run, args=(paths or ("/use",), random.Random(seed))) for seed in seeds
        ]

    def _run(self, paths: Sequence[str], rng: random.Random) -> None:
        while not self._ended.is_set():
            request = self._server.get(rng.choice(paths))
            with self._news:
                self.ledger.requests.append(request)
                self._news.notify_all()
            self._ended.wait(self._pause_s)

    def wait(self, more: int = 1, timeout_s: float = 30.0) -> None:
        """Wait until so many more requests were answered well."""
        with self._news:
            seen = len(self.ledger.requests)
            deadline = time.monotonic() + timeout_s
            while sum(each.ok for each in self.ledger.requests[seen:]) < more:
                late = time.monotonic() > deadline or not self._server.running()
                assert not late, f"not {more} good answers, of a server that may have ended: {self.ledger.failed[-3:]}"
                self._news.wait(0.1)

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


# --------------------------------------------------------------------------------------------------------------------
# The supervisor (its own process)
# --------------------------------------------------------------------------------------------------------------------


def _supervise(argv: list[str]) -> NoReturn:
    """Run `argv` and end when it and all that it started have ended; kill it all when the test goes away."""
    test_pid = os.getppid()
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    news, notify = os.pipe()
    os.set_blocking(notify, False)
    os.set_blocking(news, False)
    signal.set_wakeup_fd(notify, warn_on_full_buffer=False)
    told_to_end: list[int] = []
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: told_to_end.append(1))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.getppid() != test_pid:
        os._exit(0)
    first = _spawn(argv)
    os.write(1, b"started %d\n" % first)
    poll = select.poll()
    poll.register(news, select.POLLIN)
    poll.register(0, select.POLLIN)
    while _reap():
        events = dict(poll.poll())
        if 0 in events or told_to_end:
            _kill_all()
            break
        if news in events:
            os.read(news, 4096)
    os._exit(0)


def _spawn(argv: list[str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(2, 1)
        os.execvp(argv[0], argv)
    finally:
        os._exit(127)


def _reap() -> bool:
    """Reap what has ended; whether a child is left. As the subreaper this process has them all in the end."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _kill_all() -> None:
    """Kill children until none is left; each one's own children become ours when it ends."""
    while True:
        for pid in _children(os.getpid()):
            os.kill(pid, signal.SIGKILL)  # a child of ours is there until we reap it
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


if __name__ == "__main__":
    assert sys.argv[1] == "supervise", sys.argv
    _supervise(sys.argv[2:])
