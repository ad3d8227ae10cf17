"""A program that hands a pool to multiprocessing's workers in every way there is, and kills them in every way it can.

    python -m tests.apps.mp_pools '{"recipe": "handed", "method": "spawn", "kind": "Pool", "name": null, ...}'

What: one recipe, proven at its end (`tests.processes.proven`), and its figures as JSON on stdout. It must be a module
that is run as a program: spawned workers import it again, and find what they are to call in it.

Not here: what the figures must be (`tests/test_servers_multiprocessing.py`).
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.pool import MaybeEncodingError  # type: ignore[attr-defined]
from multiprocessing.pool import Pool as WorkerPool
from multiprocessing.process import BaseProcess
from typing import Any

from shmpool import Pool, PooledConnection
from tests.processes import descriptors, lease_every_slot, proven, until, use
from tests.servers import ExclusiveServer, ask

CONNECTIONS, WORKERS, TASKS, DEATHS = 3, 4, 24, 20
RESULT_S = 30


# ---- tasks, and the ways by which a pool comes to them --------------------------------------------------------------

_pool: Pool  # of a worker: by the initializer, or inherited


def keep(pool: Pool) -> None:
    global _pool
    _pool = pool


def by_global(number: int) -> tuple[int, int]:
    return by_argument(_pool, number)


def by_argument(pool: Pool, number: int) -> tuple[int, int]:
    return os.getpid(), use(pool, f"task:{number}")


@dataclass
class Job:
    """Holds the pool beside its other fields."""

    pool: Pool
    number: int

    def run(self) -> tuple[int, int]:
        return by_argument(self.pool, self.number)


def by_dataclass(job: Job) -> tuple[int, int]:
    return job.run()


class Client:
    """Its bound methods are tasks; each takes the object along, and the object its pool."""

    def __init__(self, pool: Pool) -> None:
        self.pools = {"main": pool}

    def by_method(self, number: int) -> tuple[int, int]:
        return by_argument(self.pools["main"], number)


def die(number: int) -> None:
    """Be killed in the middle of an exclusive use."""
    with _pool.get(timeout=RESULT_S) as lease:
        ask(lease.socket, f"BEGIN die:{number}")
        os.kill(os.getpid(), signal.SIGKILL)


def hold(number: int) -> None:
    with _pool.get(timeout=RESULT_S) as lease:
        ask(lease.socket, f"BEGIN hold:{number}")
        while True:
            signal.pause()


def give_away(_number: int) -> PooledConnection:
    return _pool.get(timeout=RESULT_S)


# ---- the two kinds of worker pool, under one face -------------------------------------------------------------------


class Workers:
    """A multiprocessing.Pool or a ProcessPoolExecutor; `go` gives a function that waits for the task's result."""

    def __init__(self, inner: WorkerPool | Executor) -> None:
        self.inner = inner

    def go(self, function: Callable[..., Any], *args: object) -> Callable[[float], Any]:
        if isinstance(self.inner, Executor):
            return self.inner.submit(function, *args).result
        return self.inner.apply_async(function, args).get


@dataclass
class Scene:
    """What a recipe is given."""

    context: BaseContext
    kind: str
    pool: Pool
    server: ExclusiveServer
    seed: int

    @contextlib.contextmanager
    def workers(
        self, initializer: Callable[..., None] | None = None, *initargs: object, **more: Any
    ) -> Iterator[Workers]:
        if self.kind == "Pool":
            with self.context.Pool(WORKERS, initializer, initargs, **more) as inner:
                yield Workers(inner)
        else:
            with ProcessPoolExecutor(WORKERS, self.context, initializer, initargs) as executor:
                yield Workers(executor)


def results(waits: list[Callable[[float], Any]]) -> dict[str, int]:
    found = [wait(RESULT_S) for wait in waits]
    return {"results": len(found), "workers": len({pid for pid, _ in found})}


def sockets() -> int:
    """The open sockets of this process."""
    return sum(what.startswith("socket:") for what in descriptors().values())


# ---- recipes --------------------------------------------------------------------------------------------------------


def handed(scene: Scene) -> dict[str, Any]:
    """The pool comes to the workers' tasks in each of the ways, to new workers each time."""
    pool, client = scene.pool, Client(scene.pool)
    figures: dict[str, Any] = {}
    before = sockets()
    with scene.workers(keep, pool) as workers:
        figures["initializer"] = results([workers.go(by_global, number) for number in range(TASKS)])
    with scene.workers() as workers:
        figures["argument"] = results([workers.go(by_argument, pool, number) for number in range(TASKS)])
    with scene.workers() as workers:
        figures["dataclass"] = results([workers.go(by_dataclass, Job(pool, number)) for number in range(TASKS)])
    with scene.workers() as workers:
        figures["method"] = results([workers.go(client.by_method, number) for number in range(TASKS)])
    if scene.context.get_start_method() == "fork":
        keep(pool)
        with scene.workers() as workers:
            figures["inherited"] = results([workers.go(by_global, number) for number in range(TASKS)])
    gc.collect()  # worker pools are cycles, with pipes and sockets in them
    return {**figures, "more sockets": sockets() - before}


def killed(scene: Scene) -> dict[str, Any]:
    """mp.Pool replaces its dead workers, and those that did their number of tasks. What the dead were to return never
    comes, so nobody waits for it."""
    orders = [(by_global, number) for number in range(2 * TASKS)] + [(die, number) for number in range(DEATHS)]
    random.Random(scene.seed).shuffle(orders)
    with scene.workers(keep, scene.pool, maxtasksperchild=6) as workers:
        waits = [(function, workers.go(function, number)) for function, number in orders]
        figures = results([wait for function, wait in waits if function is by_global])
        until(lambda: scene.server.stats()["by_prefix"].get("die") == DEATHS, "each doomed task has begun")
    assert len(lease_every_slot(scene.pool)) == CONNECTIONS
    until(lambda: scene.server.stats()["abandoned"] == DEATHS, "the connections of the dead end")
    return figures


def broken(scene: Scene) -> dict[str, Any]:
    """An executor breaks with its first dead worker, and ends the others; the pool stays whole."""
    breaks = 0
    for _ in range(4):
        with scene.workers(keep, scene.pool) as workers:
            waits = [workers.go(by_global if number != 5 else die, number) for number in range(TASKS)]
            try:
                results(waits[5:6])
            except BrokenProcessPool:
                breaks += 1
        assert len(lease_every_slot(scene.pool)) == CONNECTIONS
    return {"breaks": breaks}


def terminated(scene: Scene) -> dict[str, Any]:
    """mp.Pool.terminate() ends workers that hold all leases, and one that waits for one."""
    with scene.workers(keep, scene.pool) as workers:
        for number in range(CONNECTIONS + 1):
            workers.go(hold, number)
        until(lambda: scene.server.stats()["begins"] == CONNECTIONS, "all connections are held")
    return {"whole": len(lease_every_slot(scene.pool))}


def given_away(scene: Scene) -> dict[str, Any]:
    """A lease is not a result: the task fails, and its connection is not lost."""
    says = []
    with scene.workers(keep, scene.pool) as workers:
        for number in range(2 * CONNECTIONS):
            try:
                workers.go(give_away, number)(RESULT_S)
            except (TypeError, MaybeEncodingError) as error:
                says.append(str(error))
        after = results([workers.go(by_global, number) for number in range(TASKS)])
    return {"says": says, **after}


def work(pool: Pool, how: str) -> None:
    """In a child: use the pool, then end in the middle of another use."""
    for number in range(3):
        use(pool, f"work:{os.getpid()}-{number}")
    if how == "return":
        return
    with pool.get(timeout=RESULT_S) as lease:
        ask(lease.socket, f"BEGIN end:{os.getpid()}")
        if how == "_exit":
            os._exit(3)
        if how == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        sys.exit(4)


def work_by_dataclass(job: Job, how: str) -> None:
    work(job.pool, how)


def processes(scene: Scene) -> dict[str, Any]:
    """multiprocessing.Process: as argument, by keyword, inside an object."""
    ways = ["return", "_exit", "SIGKILL", "exit"]
    new: Any = scene.context.Process  # type: ignore[attr-defined]
    started: list[BaseProcess] = [new(target=work, args=(scene.pool, how)) for how in ways]
    started += [new(target=work, kwargs={"pool": scene.pool, "how": how}) for how in ways]
    started += [new(target=work_by_dataclass, args=(Job(scene.pool, 0), how)) for how in ways]
    for each in started:
        each.start()
    for each in started:
        each.join(RESULT_S)
    codes = [each.exitcode for each in started]
    assert len(lease_every_slot(scene.pool)) == CONNECTIONS
    return {"codes": codes}


def crowd(scene: Scene) -> dict[str, Any]:
    """Many workers come at once to a pool of many connections, and many tasks with the pool in them wait to be read."""
    with scene.workers(keep, scene.pool) as workers:
        figures = {"initializer": results([workers.go(by_global, number) for number in range(TASKS)])}
    with scene.workers() as workers:
        figures["argument"] = results([workers.go(by_argument, scene.pool, number) for number in range(10 * TASKS)])
    return figures


RECIPES: dict[str, Callable[[Scene], dict[str, Any]]] = {
    each.__name__: each for each in (handed, killed, broken, terminated, given_away, processes, crowd)
}


def main(spec: dict[str, Any]) -> None:
    context = multiprocessing.get_context(spec["method"])
    if spec["files"]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (spec["files"], resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with ExclusiveServer() as server:
        with proven(server, spec["connections"], every_slot=not spec["files"], name=spec["name"]) as pool:
            figures = RECIPES[spec["recipe"]](Scene(context, spec["kind"], pool, server, spec["seed"]))
        print(json.dumps(figures))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
