"""A pool in the workers of multiprocessing: by initializer, by argument, inside other objects, for each start method.

Each test runs `tests/apps/mp_pools.py` as a program of its own, for spawned workers import the program they belong to.
What must hold for all: no connection had two users, the cap held (the program asserts both), the program says nothing
on stderr, no warning and no traceback, and it leaves no process, no segment and no socket.

Not here: multiprocessing's own weak points, which no pool can mend: `mp.Pool` never answers for a task whose worker was
killed, and can stand still when one is killed while it holds a lock of the queues.
"""

from __future__ import annotations

import copy
import ctypes
import json
import os
import pickle
import secrets
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest

import shmpool
from tests.processes import chance, until

ROOT = Path(__file__).parent.parent
CONNECTIONS, WORKERS, TASKS = 3, 4, 24
METHODS = ["fork", "forkserver", "spawn"]
_PR_CAPBSET_DROP, _CAP_SYS_ADMIN, _CAP_SYS_RESOURCE = 24, 21, 24

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a recipe as a program; its figures, when everything else is as it must be."""

    def run_recipe(recipe: str, method: str, *, kind: str = "Pool", ignore: str = "", **more: Any) -> dict[str, Any]:
        seed = chance().randrange(1 << 32)
        spec = {"recipe": recipe, "method": method, "kind": kind, "name": None, "connections": CONNECTIONS, "files": 0}
        environment = {
            **os.environ,
            "XDG_RUNTIME_DIR": str(tmp_path),
            "PYTHONWARNINGS": f"default{_forks(recipe, method)}{ignore}",
        }
        program = subprocess.Popen(
            [sys.executable, "-m", "tests.apps.mp_pools", json.dumps({**spec, "seed": seed, **more})],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_be_ordinary if more.get("files") else None,
        )
        try:
            out, err = program.communicate(timeout=60)
        finally:
            program.kill()
            program.wait()
        assert err == ""
        assert program.returncode == 0
        until(lambda: not _session(program.pid), "the program's last process ends", 5)
        assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []
        figures: dict[str, Any] = json.loads(out)
        return figures

    return run_recipe


def _forks(recipe: str, method: str) -> str:
    """mp.Pool and the executor have threads, and fork: Python says so from 3.12 on, with any pool and without one."""
    return ",ignore:This process:DeprecationWarning" if method == "fork" and recipe != "processes" else ""


def _be_ordinary() -> None:
    """In the program to be: lose what exempts root from the limit on descriptors in flight between processes."""
    libc = ctypes.CDLL(None)
    for capability in (_CAP_SYS_ADMIN, _CAP_SYS_RESOURCE):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)


def _session(leader: int) -> list[int]:
    """The living processes of a session."""
    living = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:  # gone meanwhile
            continue
        if int(session) == leader and state not in "ZX":
            living.append(int(path.parent.name))
    return living


@pytest.fixture(params=["unnamed", "named"])
def name(request: pytest.FixtureRequest) -> str | None:
    return f"mp-{secrets.token_hex(4)}" if request.param == "named" else None


# ---- the pool comes to its workers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["Pool", "Executor"])
def test_the_pool_comes_to_the_workers(run: Run, kind: str, method: str, name: str | None) -> None:
    figures = run("handed", method, kind=kind, name=name)
    assert figures.pop("more sockets") <= 1  # the one at which a pool without a name, once pickled, can be asked for
    ways = ["initializer", "argument", "dataclass", "method"] + ["inherited"] * (method == "fork")
    assert {way: each["results"] for way, each in figures.items()} == dict.fromkeys(ways, TASKS)


@pytest.mark.quick
@pytest.mark.parametrize("method", METHODS)
def test_processes_and_their_ends(run: Run, method: str, name: str | None) -> None:
    """multiprocessing.Process: by argument, by keyword, inside an object; each returns, exits, or is killed."""
    assert run("processes", method, name=name) == {"codes": [0, 3, -9, 4] * 3}


@pytest.mark.parametrize("method", METHODS)
def test_many_at_once_without_privileges(run: Run, method: str, name: str | None) -> None:
    """Descriptors on their way between processes are limited, to as many in all as a process may have open."""
    figures = run("crowd", method, name=name, connections=400, files=1024)
    assert {way: each["results"] for way, each in figures.items()} == {"initializer": TASKS, "argument": 10 * TASKS}


# ---- workers end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_killed_workers_are_replaced(run: Run, method: str, name: str | None) -> None:
    figures = run("killed", method, name=name)
    assert figures["results"] == 2 * TASKS
    assert figures["workers"] > WORKERS


@pytest.mark.parametrize("method", METHODS)
def test_a_broken_executor_leaves_the_pool_whole(run: Run, method: str) -> None:
    assert run("broken", method, kind="Executor") == {"breaks": 4}


@pytest.mark.parametrize("method", METHODS)
def test_terminated_within_leases(run: Run, method: str) -> None:
    assert run("terminated", method) == {"whole": CONNECTIONS}


# ---- what cannot travel ---------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["Pool", "Executor"])
def test_a_lease_is_not_a_result(run: Run, kind: str) -> None:
    figures = run("given_away", "fork", kind=kind, ignore=",ignore:shmpool:ResourceWarning")  # it says that it was lost
    assert len(figures["says"]) == 2 * CONNECTIONS
    assert all("a lease cannot be pickled: it belongs to this process" in each for each in figures["says"])
    assert figures["results"] == TASKS


@pytest.mark.quick
@pytest.mark.parametrize("how", [pickle.dumps, ForkingPickler.dumps, copy.copy, copy.deepcopy])
def test_a_lease_stays_in_its_process(make: Callable[..., shmpool.Pool], how: Callable[[object], object]) -> None:
    pool = make()
    with pool.get() as lease:
        with pytest.raises(TypeError, match=r"^a lease cannot be pickled: it belongs to this process\. Let the other"):
            how(lease)
        with pytest.raises(TypeError, match="PooledSocket"):
            how(lease.socket)
    assert pool.stats().connections["idle"] == 1


@pytest.mark.quick
@pytest.mark.parametrize("setting", ["on_borrow", "on_return", "dial"])
def test_callables_that_cannot_travel(make: Callable[..., shmpool.Pool], setting: str) -> None:
    pool = make(**{setting: lambda _: None})
    with pytest.raises(
        TypeError, match=rf"^a Pool travels with its callables, but {setting}=.* cannot be pickled .*top level"
    ):
        pickle.dumps(pool)


@pytest.mark.quick
def test_a_closed_pool_does_not_travel(make: Callable[..., shmpool.Pool]) -> None:
    pool = make()
    pool.close()
    with pytest.raises(shmpool.PoolClosed):
        pickle.dumps(pool)


@pytest.mark.quick
@pytest.mark.parametrize("connections", [1, 1000])
def test_a_pickle_holds_no_descriptor_for_a_connection(make: Callable[..., shmpool.Pool], connections: int) -> None:
    """forkserver takes 256 descriptors at most, and there may be many pickles."""
    pool = make(max_connections=connections)
    pickle.dumps(pool)
    before = len(os.listdir("/proc/self/fd"))
    pickles = [pickle.dumps(pool) for _ in range(50)]
    assert len(os.listdir("/proc/self/fd")) <= before
    assert max(map(len, pickles)) < 1000
    assert all(pickle.loads(each) is pool for each in pickles)
    assert pickle.loads(pickles[0]) is pool


@pytest.mark.quick
def test_a_copy_is_the_pool(make: Callable[..., shmpool.Pool]) -> None:
    pool = make()
    assert copy.copy(pool) is copy.deepcopy(pool) is pool
