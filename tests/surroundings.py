"""Surroundings of a test's own: namespaces, mounts, what workers are told in them, stories that are told there.

Processes in namespaces of their own are workers that `unshare` starts (`Company.execute(through=unshare(...))`), or a
whole story in a new interpreter (`in_world`), whose /dev/shm is a tmpfs that nobody else has. A story is a function
without arguments: it fails by an exception, as a test does.

Not here: the tests (test_surroundings), workers (joining).
"""

from __future__ import annotations

import contextlib
import ctypes
import encodings.idna  # noqa: F401 - for who may not read it later, as another user
import math
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

import shmpool
from shmpool import InvalidConfig, Pool, PoolTimeout, PoolUnreachable, attach
from shmpool.doctor import examine
from shmpool.top import Processes
from tests import joining
from tests.joining import ROOT, Company, Mine, Worker, lease_once
from tests.processes import TIMEOUT_S, Family, lease_every_slot, until
from tests.servers import ExclusiveServer
from tests.tools import tool

CAP = 2
TMPFS = "mount -t tmpfs tmpfs /dev/shm"
QUIET: dict[str, Any] = {"max_connections": CAP, "min_connections": 0, "maintenance_interval": math.inf}
OWN_PIDS = ("--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


@lru_cache
def unshare(*options: str) -> tuple[str, ...]:
    """The words that start a command in such namespaces, as the same user; skips the test where that is forbidden."""
    words = ("unshare", *(() if os.getuid() == 0 else ("--map-current-user",)), *options)
    try:
        refused = subprocess.run([*words, "true"], capture_output=True, text=True).stderr
    except FileNotFoundError as error:
        refused = str(error)
    if refused:
        pytest.skip(f"no such namespaces here: {refused.strip()}")
    return words


def in_world(story: Callable[[], None], *options: str, mounts: str = TMPFS) -> None:
    """Run a story in a new interpreter, where these mounts were made."""
    if os.getuid() != 0:
        pytest.skip("only root can mount there, and become another user")
    words = unshare(*OWN_PIDS, *options)
    program = f"from {story.__module__} import {story.__name__} as story; story()"
    environment = {key: value for key, value in os.environ.items() if key != "XDG_RUNTIME_DIR"}
    command = [*words, "sh", "-ec", f'{mounts}; exec "$@"', "sh", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * TIMEOUT_S, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


# What workers are told -----------------------------------------------------------------------------------------------


def own_pid(mine: Mine) -> int:
    del mine
    return os.getpid()


def sees(mine: Mine, name: str) -> list[tuple[int, bool]]:
    """Pid and life of each worker, as an inspector in that process tells them."""
    del mine
    with shmpool.inspect(name) as inspector:
        return [(worker.pid, worker.alive) for worker in inspector.stats().workers]


def attach_without_answer(mine: Mine, name: str) -> tuple[str, float]:
    """How attach() fails when nobody answers, and after how long."""
    del mine
    begun = time.monotonic()
    with pytest.raises(PoolUnreachable) as caught:
        attach(name, timeout=0.3)
    return str(caught.value), time.monotonic() - begun


def waits(worker: Worker, name: str) -> None:
    """Let it wait in the queue for what is out; it does when this returns."""
    worker.tell(lease_once)
    with shmpool.inspect(name) as inspector:
        until(lambda: inspector.stats().waiting == 1, "it waits in the queue")


# Stories: pids that come again ----------------------------------------------------------------------------------------


def next_pid(pid: int) -> None:
    """The next process of this pid namespace gets that pid."""
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))


def die_with_leases(pool: Pool) -> None:
    """A worker that leases all, and is killed."""
    _kept = [pool.get() for _ in range(CAP)]
    os.kill(os.getpid(), signal.SIGKILL)


def a_pid_that_comes_again() -> None:
    with ExclusiveServer() as server, Family() as family:
        with Pool(server.url, name="again", **QUIET) as pool:
            dead = family.fork(die_with_leases, pool)
            assert dead.wait() == "SIGKILL"
            next_pid(dead.pid)
            stranger = family.fork(signal.pause)
            assert stranger.pid == dead.pid, "the pid did not come again"
            (row,) = [worker for worker in pool.stats().workers if worker.pid == dead.pid]
            assert (row.alive, row.held) == (False, CAP), row
            processes = Processes()
            processes.update(pool.stats().workers)
            assert (processes.state(row).text, processes.name(row)) == ("ended", ""), "shown as the stranger"
            findings = {finding.code: finding for finding in examine("again", seconds=0.05)["again"]}
            assert f"process {dead.pid} has died with 2 connections" in findings["dead"].what, findings
            assert len(lease_every_slot(pool)) == CAP
            assert [event.pid for event in pool.events().events if event.kind == "died"] == [dead.pid]
            assert stranger.alive(), "the stranger was touched"
        assert server.stats()["violations"] == 0


def a_member_with_the_pid_of_a_dead_one() -> None:
    def wait_with_a_lease(pool: Pool, holds: Any, go: Any) -> int:
        with pool.get() as lease:
            holds.set()
            go.wait()
            return joining.use_of(lease)

    with ExclusiveServer() as server, Family() as family:
        with Pool(server.url, name="twins", **QUIET) as pool:
            dead = family.fork(die_with_leases, pool)
            dead.wait()
            next_pid(dead.pid)
            holds, go = family.latch(), family.latch()
            heir = family.fork(wait_with_a_lease, pool, holds, go)
            assert heir.pid == dead.pid, "the pid did not come again"
            holds.wait()
            pool.recover()
            twins = [(worker.alive, worker.held) for worker in pool.stats().workers if worker.pid == heir.pid]
            assert sorted(twins) in ([(True, 1)], [(False, 0), (True, 1)]), twins
            assert [slot.holder for slot in pool.stats().slots if slot.state == "leased"] == [heir.pid]
            go.set()
            assert heir.result()
            assert len(lease_every_slot(pool)) == CAP
        figures = server.stats()
        assert (figures["violations"], figures["max_open"]) == (0, CAP), figures


# Stories: mounts ------------------------------------------------------------------------------------------------------


def fill_up(place: Path) -> None:
    """Until not a byte and not a file more has room there."""
    with (place / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    with contextlib.suppress(OSError):
        for number in range(1 << 16):
            (place / f"filler-{number}").touch()


def a_dev_shm_that_fills_up() -> None:
    there = Path("/dev/shm")
    with ExclusiveServer() as server, Company() as company:
        settings = {**QUIET, "target": server.url, "max_workers": 8}
        with Pool(**settings, name="full") as pool, Pool(**settings) as unnamed:
            fill_up(there)
            names = {path.name for path in there.rglob("*")}
            for name, what in ((None, "shared memory"), ("another", "shared memory")):
                with pytest.raises(InvalidConfig, match=what):
                    Pool(**settings, name=name)
            with pytest.raises(InvalidConfig, match="No space left on device"):
                pickle.dumps(unnamed)  # its socket has no room
            assert {path.name for path in there.rglob("*")} == names, "something is left"
            newcomer, victim = company.execute(), company.execute()
            newcomer.do(joining.attach, "full")
            victim.do(joining.attach, "full")
            for _ in range(CAP):
                victim.do(joining.hold)
            waits(newcomer, "full")
            victim.kill()
            newcomer.answer()
            assert len(lease_every_slot(pool)) == len(newcomer.do(joining.every_slot)) == CAP
            assert len(lease_every_slot(unnamed)) == CAP
            assert {"joined", "opened", "died"} <= {event.kind for event in pool.events().events}
            newcomer.end()
        assert server.stats()["violations"] == 0
    assert not list(there.glob("shmpool-*"))


def a_proc_that_hides_others() -> None:
    """For members that are not root: with hidepid=2 they do not see who is."""
    with ExclusiveServer() as server, Company() as company:
        settings = {**QUIET, "target": server.url, "name": "hidden"}
        members = [company.fork() for _ in range(2)]
        for member in members:
            member.do(joining.become_nobody)
            member.do(joining.make, **settings)
        victim, other = members
        for _ in range(CAP):
            victim.do(joining.hold)
        other.tell(joining.lease_once)
        victim.kill()
        other.answer()
        assert len(other.do(joining.every_slot)) == CAP
        other.do(joining.leave)
        assert server.stats()["violations"] == 0


def no_proc_at_all() -> None:
    """Nobody can register: the error says so, and nothing is left. Who had the pool before goes on."""
    with ExclusiveServer() as server, Family() as family:
        pool = Pool(server.url, name="before", **QUIET)
        dead = family.fork(die_with_leases, pool)
        dead.wait()
        assert ctypes.CDLL(None).mount(b"none", b"/proc", b"tmpfs", 0, None) == 0
        assert not os.path.exists("/proc/self")
        assert len(lease_every_slot(pool)) == CAP, "what the dead one had is not taken back"
        names = os.listdir("/dev/shm")
        with pytest.raises(FileNotFoundError, match="/proc/self/fd"):
            Pool(server.url, name="after", **QUIET)
        with pytest.raises(FileNotFoundError, match="mount /proc in its container"):
            family.fork(pool.get).result()
        assert os.listdir("/dev/shm") == names, "something is left"
        assert len(lease_every_slot(pool)) == CAP
        pool.close()
        assert server.stats()["violations"] == 0


def an_inspector_that_may_not_write() -> None:
    """In a mount namespace of its own, where /dev/shm is read-only."""
    with ExclusiveServer() as server, Pool(server.url, name="seen", **QUIET) as pool, Company() as company:
        looker = company.execute(
            through=unshare("--mount", "sh", "-ec", 'mount -o remount,bind,ro /dev/shm; "$@"', "sh")
        )
        with pool.get():
            assert looker.do(sees, "seen") == [(os.getpid(), True)]
            assert looker.do(commands, "seen") == dict.fromkeys(("list", "stats", "doctor"), (0, ""))


# Refusals of the kernel -----------------------------------------------------------------------------------------------

_BPF_LOAD_NUMBER, _BPF_EQUAL, _BPF_RETURN = 0x20, 0x15, 0x06
_SECCOMP_ERRNO, _SECCOMP_ALLOW = 0x00050000, 0x7FFF0000
_PIDFD_OPEN = 434


def refuse_copying(mine: Mine, number: int) -> None:
    """From now on pidfd_open() and pidfd_getfd() end with that errno here, as containers have it."""
    del mine
    steps = [
        (_BPF_LOAD_NUMBER, 0, 0, 0),
        (_BPF_EQUAL, 1, 0, _PIDFD_OPEN),
        (_BPF_EQUAL, 0, 1, joining.PIDFD_GETFD),
        (_BPF_RETURN, 0, 0, _SECCOMP_ERRNO | number),
        (_BPF_RETURN, 0, 0, _SECCOMP_ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, program, 0, 0) == 0, os.strerror(ctypes.get_errno())  # PR_SET_SECCOMP
    assert libc.syscall(_PIDFD_OPEN, os.getpid(), 0) == -1
    assert ctypes.get_errno() == number


def commands(mine: Mine, name: str) -> dict[str, tuple[int, str]]:
    """How the commands that only look end, and what they complain of."""
    del mine
    lines = {"list": ["list"], "stats": ["stats", name], "doctor": ["doctor", "--seconds", "0.05"]}
    ran = {
        what: subprocess.run([sys.executable, "-m", "shmpool", *line], capture_output=True, text=True, cwd=ROOT)
        for what, line in lines.items()
    }
    return {what: (done.returncode, done.stderr) for what, done in ran.items()}


# Limits ---------------------------------------------------------------------------------------------------------------


def limit(mine: Mine, what: str, value: int) -> None:
    """From now on, for this process alone."""
    del mine
    resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (value, value))


def tend(mine: Mine) -> None:
    """Spoil a connection, open another, do what maintenance does."""
    lease_once(mine, discard=True)
    lease_once(mine)
    mine.pool.maintain()


def no_more_threads() -> None:
    """For members that are not root: root may always start one."""
    with ExclusiveServer() as server, Company() as company:
        maker, newcomer = company.fork(), company.fork()
        for member in (maker, newcomer):
            member.do(joining.become_nobody, copyable=True)  # newcomers copy what nobody hands over
            member.do(limit, "NPROC", 1)
        settings = {"target": server.url, "name": "threadless", "max_connections": CAP, "min_connections": 0}
        maker.do(joining.make, **settings)
        assert maker.do(joining.count) == 1, "a thread was started"
        assert len(maker.do(joining.every_slot)) == CAP
        maker.do(tend)
        newcomer.do(joining.attach, "threadless")
        for _ in range(CAP):
            newcomer.do(joining.hold)
        newcomer.kill()
        assert len(maker.do(joining.every_slot)) == CAP
        maker.do(joining.leave)
        assert server.stats()["violations"] == 0


# Clocks ---------------------------------------------------------------------------------------------------------------

# The wall clock of a process, set by the hours that stand in the environment, to and fro with each look.
_SET_CLOCK = r"""
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
static long step(void)
{
    static _Thread_local long looks;
    return atol(getenv("CLOCK_STEP_S")) * (looks++ % 3 - 1);
}
int clock_gettime(clockid_t clock, struct timespec *time)
{
    int result = (int)syscall(SYS_clock_gettime, clock, time);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)
        time->tv_sec += step();
    return result;
}
"""


def clock_setter(where: Path) -> str:
    """A library that makes a process's CLOCK_REALTIME jump, for LD_PRELOAD."""
    source, library = where / "clock.c", where / "clock.so"
    source.write_text(_SET_CLOCK)
    subprocess.run([tool("cc"), "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return str(library)


def maintain(mine: Mine) -> None:
    mine.pool.maintain()


def wall_clock(mine: Mine) -> list[float]:
    """Three looks at it."""
    del mine
    return [time.time() for _ in range(3)]


def times_of(mine: Mine) -> tuple[float, list[float | None], float]:
    """How long a get() in vain waits; how old connections and their states are; how long leases were."""
    begun = time.monotonic()
    with pytest.raises(PoolTimeout):
        mine.pool.get(timeout=0.05)
    took = time.monotonic() - begun
    stats = mine.pool.stats()
    return took, [each for slot in stats.slots for each in (slot.age, slot.since)], stats.use_latency.p99


# Signals --------------------------------------------------------------------------------------------------------------


class Rude(BaseException):
    """Of a handler."""


def under_a_timer(url: str, act: str, handler: str) -> tuple[int, str]:
    """In the main thread of a child: a call while a handler runs each millisecond; how often; how it ended."""
    pool, ran = Pool(url, **QUIET), 0
    nobody = socket.socket()
    nobody.bind(("127.0.0.1", 0))  # and does not listen
    down = Pool(f"tcp://127.0.0.1:{nobody.getsockname()[1]}", **{**QUIET, "min_connections": 1})
    leases = [pool.get() for _ in range(CAP)]

    def handle(*_: object) -> None:
        nonlocal ran
        ran += 1
        if handler == "uses":
            with contextlib.suppress(shmpool.PoolError), pool.try_get():
                pool.stats()
        elif handler == "raises" and ran == 20:
            raise Rude

    acts: dict[str, Callable[[], object]] = {
        "get": lambda: pool.get(timeout=0.2),
        "drain": lambda: pool.drain(timeout=0.2),
        "close": lambda: pool.close(timeout=0.2),
        "wait_ready": lambda: down.wait_ready(timeout=0.2),
    }
    signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        ended = type(acts[act]()).__name__
    except BaseException as error:  # noqa: BLE001 - what it is, the test says
        ended = type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    for lease in leases:
        lease.release()
    if pool.state == "open":
        assert len(lease_every_slot(pool)) == CAP
    pool.close()
    down.close()
    nobody.close()
    return ran, ended
