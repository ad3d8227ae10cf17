"""What a few permits are shared with among processes: the pool, and what one would write with the standard library.

Each is a `Permits`: made in the parent with their count, used by workers forked after that. `take()` waits for a
permit and returns it, `give(permit)` gives it back. All guard the same number of permits; only the pool's are
connections. Each is set up as its users would for speed: what can be bound directly has no Python around it.

Of `multiprocessing`, a queue and a manager are filled in a process of their own: a queue's feeder thread, and the
connection to a manager, would not survive the bare fork of a worker.

Not here: the workers and the clock (`contend`), which cells (`bench_contention`, `bench_grid`).
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

from benches import subject
from benches.workers import Peer

_FORK = multiprocessing.get_context("fork")


class Permits:
    """What they have in common. A name may say how it is made; it is the same in all results."""

    name: str
    take: Callable[[], Any]
    give: Callable[[Any], None]

    def enter(self, number: int) -> None:
        """In each worker, before its first `take()`; workers are numbered from 0."""

    def leave(self) -> None:
        """In each worker, after its last `give()`."""

    def close(self) -> None:
        """In the parent, when no worker is left."""


class Pooled(Permits):
    """The pool itself."""

    name = "shmpool"

    def __init__(self, permits: int, peer: Peer) -> None:
        self.pool = subject.make_pool(peer.dial_tcp, permits)
        self.take = self.pool.get

    def give(self, permit: Any) -> None:
        permit.release()

    def close(self) -> None:
        self.pool.close()


class Unguarded(Permits):
    """Nothing at all: everybody has a permit. With as many workers as permits it is the most a machine can do."""

    name = "nothing (the maximum)"

    def take(self) -> None: ...

    def give(self, _permit: None) -> None: ...


class Semaphore(Permits):
    """A semaphore of the C library in shared memory: whoever runs takes."""

    name = "BoundedSemaphore"

    def __init__(self, permits: int) -> None:
        self.semaphore = _FORK.BoundedSemaphore(permits)

    def take(self) -> None:
        self.semaphore.acquire()

    def give(self, _permit: None) -> None:
        self.semaphore.release()


class Pipe(Permits):
    """Permits as bytes in a pipe: whoever reads one has one."""

    name = "pipe"

    def __init__(self, permits: int) -> None:
        self.reader, self.writer = os.pipe()
        os.write(self.writer, b"." * permits)

    def take(self) -> bytes:
        return os.read(self.reader, 1)

    def give(self, permit: bytes) -> None:
        os.write(self.writer, permit)

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


class StrictQueue(Permits):
    """A permit given back goes to the longest waiter, nobody passes."""

    name = "strict queue"

    def __init__(self, permits: int, workers: int) -> None:
        self.lock = _FORK.Lock()
        self.bells = [_FORK.Semaphore(0) for _ in range(workers)]
        self.ring = _FORK.RawArray("i", workers)
        self.free_head_tail = _FORK.RawArray("i", [permits, 0, 0])
        self.workers, self.number = workers, 0

    def enter(self, number: int) -> None:
        self.number = number

    def take(self) -> None:
        state = self.free_head_tail
        with self.lock:
            if state[0]:
                state[0] -= 1
                return
            self.ring[state[2] % self.workers] = number = self.number
            state[2] += 1
        self.bells[number].acquire()

    def give(self, _permit: None) -> None:
        state = self.free_head_tail
        with self.lock:
            if state[1] == state[2]:
                state[0] += 1
                return
            first = self.ring[state[1] % self.workers]
            state[1] += 1
        self.bells[first].release()


class FreeStack(Permits):
    """A semaphore that counts, and a stack of free indices under a lock: the pool that a textbook has."""

    name = "BoundedSemaphore + Lock + Array"

    def __init__(self, permits: int) -> None:
        self.semaphore, self.lock = _FORK.BoundedSemaphore(permits), _FORK.Lock()
        self.stack, self.height = _FORK.RawArray("i", range(permits)), _FORK.RawValue("i", permits)

    def take(self) -> int:
        self.semaphore.acquire()
        with self.lock:
            self.height.value = top = self.height.value - 1
            return int(self.stack[top])

    def give(self, permit: int) -> None:
        with self.lock:
            top = self.height.value
            self.stack[top] = permit
            self.height.value = top + 1
        self.semaphore.release()


class SimpleIndices(Permits):
    """Indices in a `SimpleQueue`: a pipe with a lock at each end."""

    name = "multiprocessing.SimpleQueue"

    def __init__(self, permits: int) -> None:
        self.queue: Any = _FORK.SimpleQueue()
        for index in range(permits):
            self.queue.put(index)
        self.take, self.give = self.queue.get, self.queue.put

    def close(self) -> None:
        self.queue.close()


class Indices(Permits):
    """Indices in a `multiprocessing.Queue`: what is put goes through a thread of the process."""

    name = "multiprocessing.Queue"

    def __init__(self, permits: int) -> None:
        self.queue: Any = _FORK.Queue()
        _fill_elsewhere(self.queue, permits)
        self.take, self.give = self.queue.get, self.queue.put

    def leave(self) -> None:
        self.queue.close()
        self.queue.join_thread()  # or what was put last would be lost

    close = leave


class ManagedIndices(Permits):
    """Indices in a queue of a manager: each step is a request to its process."""

    name = "Manager().Queue"

    def __init__(self, permits: int) -> None:
        self.manager = _FORK.Manager()
        self.queue: Any = self.manager.Queue()
        _fill_elsewhere(self.queue, permits)
        self.take, self.give = self.queue.get, self.queue.put

    def close(self) -> None:
        self.manager.shutdown()


def _fill_elsewhere(queue: Any, permits: int) -> None:
    filler = _FORK.Process(target=lambda: [queue.put(index) for index in range(permits)])
    filler.start()
    filler.join()
