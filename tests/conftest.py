"""What every test gets: proof that its descriptors and segments came home, and a port that refuses.

Not here: servers to connect to (`servers.py`).
"""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

SEGMENTS = Path("/dev/shm")


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
