"""Processes for the benches: forked workers, a peer that accepts connections, pinning, descriptor limits.

Not here: any timing.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import pickle
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from benches import floor


def cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def pin(core: int) -> None:
    """Keeps the calling process on one core (its index among those allowed)."""
    allowed = cores()
    os.sched_setaffinity(0, {allowed[core % len(allowed)]})


class Forked:
    """A function running in a forked child; `result()` waits for what it returns."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        sys.stdout.flush()
        reader, writer = os.pipe()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            floor.load().die_with_parent(parent)
            os._exit(_run(writer, function, args))
        os.close(writer)
        self._reader = reader
        self._reaped = False
        self._fate = ""

    def result(self) -> Any:
        with os.fdopen(self._reader, "rb") as stream:
            data = stream.read()
        status = self._reap()
        self._fate = "" if data else f"worker {self.pid} ended without a result: {_ending(status)}"
        if data:
            held, value = pickle.loads(data)
            if held:
                return value
            self._fate = f"worker {self.pid} failed:\n{value}"
        raise RuntimeError(self._fate)

    def wait_killed(self) -> None:
        """For a child that is meant to be killed: reaps it."""
        os.close(self._reader)
        self._reap()

    def end(self) -> str:
        """Kills it if it still runs. Returns how it failed, "" if it did not."""
        if self._reaped:
            return self._fate
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait_killed()
            return f"worker {self.pid} was still at work"
        with contextlib.suppress(RuntimeError):
            self.result()
        return self._fate

    def _reap(self) -> int:
        self._reaped = True
        return os.waitpid(self.pid, 0)[1]


def _ending(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


class Crew:
    """Workers that belong together. If something fails, RuntimeError says what befell each; none is left behind."""

    def __init__(self, *workers: Forked) -> None:
        self._workers = workers

    def results(self) -> list[Any]:
        """What all of them return, in their order."""
        return [worker.result() for worker in self._workers]

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        fates = [fate for worker in self._workers if (fate := worker.end())]
        if fates and isinstance(error, Exception):
            raise RuntimeError("\n".join(fates)) from error


def _run(writer: int, function: Callable[..., Any], args: tuple[Any, ...]) -> int:
    try:
        answer: tuple[bool, Any] = (True, function(*args))
    except Exception:  # noqa: BLE001  (told to the parent, whatever it is)
        answer = (False, traceback.format_exc())
    with os.fdopen(writer, "wb") as stream:
        pickle.dump(answer, stream)
    return 0 if answer[0] else 1


class Asleep:
    """Tells whether the main thread of another process sleeps in the kernel."""

    def __init__(self, pid: int) -> None:
        self._fd = os.open(f"/proc/{pid}/task/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)

    def __call__(self) -> bool:
        text = os.pread(self._fd, 256, 0)
        return text[text.rindex(b")") + 2 : text.rindex(b")") + 3] == b"S"

    def close(self) -> None:
        os.close(self._fd)


class Peer:
    """A process that accepts connections on loopback TCP and on a unix socket, keeps them, and closes on EOF.

    `dial_tcp` and `dial_unix` fit as `dial=` of a pool. It ends when this object is closed or its owner dies.
    """

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="shmpool-bench-")
        self.path = str(pathlib.Path(self._directory.name, "peer"))
        script = pathlib.Path(__file__).with_name("peer_process.py")
        self._process = subprocess.Popen(
            [sys.executable, "-S", str(script), self.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def dial_tcp(self, _request: object = None) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port))

    def dial_unix(self, _request: object = None) -> socket.socket:
        end = socket.socket(socket.AF_UNIX)
        end.connect(self.path)
        return end

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._directory.cleanup()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def allow_descriptors(wanted: int) -> int:
    """Raises the limit of open files to `wanted` if that is allowed; returns the limit there is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted:
        return soft
    for limits in ((wanted, max(hard, wanted)), (hard, hard)):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        except (ValueError, OSError):
            continue
        break
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
