"""What every test gets: proof that its descriptors and segments came home. What many want: a server, processes, pools.

Not here: the servers themselves (`servers.py`), how processes are run (`processes.py`).
"""

from __future__ import annotations

import gc
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shmpool import Pool
from tests.members import Members, members_of, some_name
from tests.processes import Family, until
from tests.servers import ExclusiveServer

SEGMENTS = Path("/dev/shm")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # begun in a shell's background, where Ctrl-C is not heard
    signal.signal(signal.SIGINT, signal.default_int_handler)
LONG_FILES = (
    "test_servers_",
    "test_serving",
    "test_life",
    "test_outage",
    "test_day",
    "test_hostile",
    "test_surroundings",
)
OWN_TARGETS = ("quick", "sanitize")


def _held_descriptors() -> dict[int, str]:
    """The open sockets and pool segments of this process; pipes and files belong to pytest and its plugins too."""
    held: dict[int, str] = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            what = str(entry.readlink())
        except FileNotFoundError:  # the directory being listed
            continue
        if what.startswith(("socket:", f"{SEGMENTS}/shmpool-")):
            held[int(entry.name)] = what
    return held


@pytest.fixture(autouse=True)
def descriptors_come_home() -> Iterator[None]:
    before = _held_descriptors()
    yield
    if _held_descriptors().items() - before.items():
        gc.collect()
    left = _held_descriptors().items() - before.items()
    assert not left, f"descriptors left open: {sorted(left)}"


def _segments() -> set[str]:
    return {entry.name for entry in SEGMENTS.glob(f"shmpool-{os.getuid()}-*")}


def _mapped_segments() -> str:
    """All that any living process maps: a segment named here is in use, by whomever."""
    maps = []
    for path in Path("/proc").glob("[0-9]*/maps"):
        try:
            maps.append(path.read_text(errors="replace"))
        except OSError:  # gone meanwhile, or not ours
            continue
    return "\n".join(maps)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Recipes for real servers, and long scenarios, are for `make servers`, but for those marked as quick."""
    for item in items:
        if item.path.name.startswith(LONG_FILES) and not any(map(item.get_closest_marker, OWN_TARGETS)):
            item.add_marker("servers")


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        session.config.stash[_BEFORE] = _segments()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """The process that started the workers looks last, when all of them have ended."""
    if _BEFORE not in session.config.stash:
        return
    before: set[str] = session.config.stash[_BEFORE]
    new = _segments() - before
    mapped = _mapped_segments() if new else ""
    left = sorted(name for name in new if f"{SEGMENTS}/{name}" not in mapped)
    if left:
        print(f"\nsegments left in {SEGMENTS}: {' '.join(left)}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


_BEFORE = pytest.StashKey[set[str]]()


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A TCP port of loopback that refuses connections, and that nobody else can get meanwhile."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


@pytest.fixture
def server() -> Iterator[ExclusiveServer]:
    """A server of the test's own; files with many tests have one of theirs for all."""
    with ExclusiveServer() as server:
        yield server


@pytest.fixture
def family() -> Iterator[Family]:
    with Family() as family:
        yield family


@pytest.fixture
def make(server: ExclusiveServer) -> Iterator[Callable[..., Pool]]:
    """Make pools of one connection; at the end they are closed, and nothing may be out or left at the server."""
    made: list[Pool] = []

    def make_pool(**settings: Any) -> Pool:
        defaults: dict[str, Any] = {"max_connections": 1, "min_connections": 0}
        if "dial" not in settings:
            defaults["target"] = server.url
        made.append(Pool(**{**defaults, **settings}))
        return made[-1]

    creator = os.getpid()
    yield make_pool
    if os.getpid() == creator:
        out = [pool.close() for pool in made]
        assert not any(out), f"leases left out: {out}"
        until(lambda: server.stats()["open"] == 0, "every connection is closed")


@pytest.fixture
def name() -> str:
    """For a pool of this test alone."""
    return some_name()


@pytest.fixture
def members(name: str, family: Family, server: ExclusiveServer) -> Iterator[Callable[..., Members]]:
    """Makes processes with a pool that this process has no part in."""
    with members_of(name, family, server) as make:
        yield make
