"""Looking at pools from outside, and at whatever else may lie under a pool's name."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import resource
import secrets
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shmpool import (
    InvalidConfig,
    Pool,
    PoolError,
    PoolInUse,
    PoolNotFound,
    SlabCorrupt,
    SlabVersionMismatch,
    _core,
    slab,
)
from shmpool.inspector import PoolInfo, inspect, list_pools, unlink

HEADER_BYTES = 8192  # slab.h
TEXT_BYTES = {"name": 72, "target": 256, "config": 4096}
OFFSETS = {"magic": 0, "version": 8, "format": 12, "size": 16, "id": 24, "slots": 56, "name": 72}
STEERED_BYTES = 256
OFFSETS["steered"] = HEADER_BYTES - 128 - STEERED_BYTES
OFFSETS["summary"] = HEADER_BYTES - 128
STATES = ("open", "paused", "draining", "closed")  # 0, 1, ... in the upper two bits of the summary


@pytest.fixture
def name() -> str:
    return f"test-{os.getpid()}-{secrets.token_hex(4)}"


@pytest.fixture
def url() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def pool(url: str, name: str) -> Iterator[Pool]:
    with Pool(url, max_connections=3, name=name, maintenance_interval=math.inf) as made:
        yield made


@pytest.fixture
def whole(url: str) -> bytes:
    """The bytes of a sound slab."""
    with Pool(url, max_connections=3, maintenance_interval=math.inf) as made:
        return Path(slab.path_of(made.name)).read_bytes()


@contextlib.contextmanager
def segment(name: str, data: bytes, mode: int = 0o600, *, locked: bool = True) -> Iterator[Path]:
    """A file under a pool's name. Locked as a family locks its slab, or any new pool would tidy it away."""
    path = Path(slab.path_of(name))
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
    try:
        os.fchmod(fd, mode)
        if locked:
            lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, _core.FAMILY_BYTE, 1, 0)
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
        os.write(fd, data)
        yield path
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)


def patched(whole: bytes, field: str, value: bytes) -> bytes:
    at = OFFSETS[field]
    return whole[:at] + value + whole[at + len(value) :]


def find(name: str) -> PoolInfo:
    (info,) = [each for each in list_pools() if each.name == name]
    return info


# A pool that is there -----------------------------------------------------------------------------------------------


def test_the_figures_are_the_pools_own(pool: Pool) -> None:
    with pool.get(), inspect(pool.name) as inspector:
        seen, own = inspector.stats(), pool.stats()
        assert inspector.alive
        assert (seen.name, seen.target, seen.created_at) == (own.name, own.target, own.created_at)
        assert (seen.in_use, seen.successes, seen.created) == (1, 1, 1)
        assert seen.slots[0].holder == os.getpid()
        assert inspector.snapshot()["max_connections"] == 3
    assert pool.stats().diff(seen).successes == 0


def test_one_inspector_sees_what_happens(pool: Pool) -> None:
    with inspect(pool.name) as inspector:
        before = inspector.stats()
        for _ in range(10):
            pool.get().release()
        assert inspector.stats().diff(before).successes == 10


def test_a_pool_that_ends_stays_visible_to_who_looks(pool: Pool) -> None:
    with inspect(pool.name) as inspector:
        pool.close()
        assert inspector.stats().state == "closed"
        with pytest.raises(PoolNotFound):
            inspect(pool.name)


def test_looking_changes_nothing(pool: Pool) -> None:
    path = Path(slab.path_of(pool.name))
    before = path.read_bytes()
    with inspect(pool.name) as inspector:
        inspector.stats()
        list_pools()
        maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if pool.name in line]
        assert sorted(line.split()[1] for line in maps) == ["r--s", "rw-s"]  # the inspector's, the pool's
    assert path.read_bytes() == before


def test_an_unrelated_process_looks_and_ends_without_a_trace(pool: Pool) -> None:
    program = f"import shmpool; i = shmpool.inspect({pool.name!r}); print(i.stats().max_connections, i.alive)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("3 True\n", "")
    assert Path(slab.path_of(pool.name)).exists()
    assert len(pool.stats().workers) == 1  # it was no worker


def test_a_closed_inspector(pool: Pool) -> None:
    inspector = inspect(pool.name)
    inspector.close()
    inspector.close()
    with pytest.raises(ValueError, match="closed"):
        inspector.snapshot()
    assert not inspector.alive
    assert repr(inspector) == f"<Inspector of {pool.name!r}, closed>"


def test_list_tells_the_pools_there_are(pool: Pool, url: str) -> None:
    with Pool(url, max_connections=7) as other:
        assert find(pool.name) == PoolInfo(
            name=pool.name,
            pid=os.getpid(),
            alive=True,
            state="open",
            size=Path(slab.path_of(pool.name)).stat().st_size,
            max_connections=3,
            target=url,
            upstream="unproved",
            created_at=pool.stats().created_at,
        )
        assert find(other.name).max_connections == 7
        names = [info.name for info in list_pools()]
        assert names == sorted(names)
    assert other.name not in [info.name for info in list_pools()]


def test_remains_are_removed(tmp_path: Path, url: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # In a directory of its own: where pools are made, the next one would tidy it away.
    remains = tmp_path / f"{slab.prefix()}{name}"
    with Pool(url, name=name) as pool:
        remains.write_bytes(Path(slab.path_of(pool.name)).read_bytes())
    monkeypatch.setattr(slab, "DIRECTORY", str(tmp_path))
    unlink(name)
    assert not remains.exists()


# What is not there, and what cannot be -------------------------------------------------------------------------------


def test_no_such_pool(name: str) -> None:
    for act in (inspect, unlink):
        with pytest.raises(PoolNotFound, match=name) as caught:
            act(name)
        assert caught.value.name == name


@pytest.mark.parametrize("bad", ["", "a b", "../../etc/passwd", ".hidden", "a/b", "x" * 65, "é", "a\0b", "-x"])
def test_names_that_nobody_can_have(bad: str) -> None:
    for act in (inspect, unlink):
        with pytest.raises(InvalidConfig) as caught:
            act(bad)
        assert (caught.value.field, caught.value.value) == ("name", bad)


# What else may lie there --------------------------------------------------------------------------------------------

DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "smaller than a header"),
    "short": (lambda _: os.urandom(100), "smaller than a header"),
    "noise": (lambda whole: os.urandom(len(whole)), "does not begin with shmpool's magic"),
    "zeroed": (lambda whole: bytes(len(whole)), "does not begin with shmpool's magic"),
    "cut to a header": (lambda whole: whole[:HEADER_BYTES], "smaller than a header"),
    "cut by a page": (lambda whole: whole[:-4096], "sizes contradict"),
    "longer": (lambda whole: whole + bytes(4096), "sizes contradict"),
    "other magic": (lambda whole: patched(whole, "magic", b"\0"), "magic"),
    "more slots": (lambda whole: patched(whole, "slots", b"\xff\xff\xff\xff"), "sizes contradict"),
    "no slots": (lambda whole: patched(whole, "slots", bytes(4)), "sizes contradict"),
    "endless name": (lambda whole: patched(whole, "name", b"x" * TEXT_BYTES["name"]), "does not end"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_slabs(damage: str, whole: bytes, name: str) -> None:
    change, expected = DAMAGES[damage]
    with segment(name, change(whole)):
        with pytest.raises(SlabCorrupt, match=expected) as caught:
            inspect(name)
        assert caught.value.name == name
        info = find(name)
        assert expected in info.error
        assert (info.alive, info.size) == (True, len(change(whole)))


def test_a_sound_copy_is_sound(whole: bytes, name: str) -> None:
    with segment(name, whole), inspect(name) as inspector:
        assert inspector.stats().max_connections == 3


@pytest.mark.parametrize("state", STATES)
def test_each_state_that_there_is(state: str, whole: bytes, name: str) -> None:
    with segment(name, patched(whole, "summary", (STATES.index(state) << 62).to_bytes(8, "little"))):
        with inspect(name) as inspector:
            assert inspector.stats().state == state
        assert find(name).state == state


def test_figures_that_cannot_be_are_shown_as_they_may_be(whole: bytes, name: str) -> None:
    """What members change while the pool lives is believed by nobody: it is bounded at each reading."""
    with segment(name, patched(whole, "steered", b"\xff" * STEERED_BYTES)), inspect(name) as inspector:
        stats = inspector.stats()
        assert stats.max_connections == stats.resize_limit
        assert (stats.upstream, stats.upstream_error) == ("invalid", "")
        assert stats.connections["empty"] == stats.resize_limit


@pytest.mark.parametrize(
    ("field", "found"), [("version", "version 77"), ("format", f"version {_core.SLAB_VERSION} of another build")]
)
def test_foreign_layouts(field: str, found: str, whole: bytes, name: str) -> None:
    with segment(name, patched(whole, field, (77).to_bytes(4, "little"))):
        with pytest.raises(SlabVersionMismatch) as caught:
            inspect(name)
        assert (caught.value.name, caught.value.found) == (name, found)
        assert str(caught.value.expected).startswith(f"version {_core.SLAB_VERSION}")
        assert found in find(name).error


def test_a_name_that_is_no_text(whole: bytes, name: str) -> None:
    with (
        segment(name, patched(whole, "name", b"\xff\xfe")),
        pytest.raises(SlabCorrupt, match="no UTF-8"),
    ):
        inspect(name)


def test_every_header_byte_may_be_wrong(whole: bytes, name: str) -> None:
    """Whatever single byte of the header is changed, but for the texts: an error of ours, or a snapshot."""
    with segment(name, whole) as path, open(path, "r+b", buffering=0) as file:
        for at in (*range(OFFSETS["name"]), *range(OFFSETS["steered"], HEADER_BYTES)):
            os.pwrite(file.fileno(), bytes([whole[at] ^ 0xFF]), at)
            with contextlib.suppress(PoolError), inspect(name) as inspector:
                inspector.stats()
            os.pwrite(file.fileno(), whole[at : at + 1], at)


def test_a_slab_that_is_cut_while_it_is_looked_at(whole: bytes, name: str) -> None:
    with segment(name, whole) as path, inspect(name) as inspector:
        os.truncate(path, 4096)
        with pytest.raises(SlabCorrupt, match="cut to 4096 bytes"):
            inspector.stats()


def test_who_has_no_descriptor_left_is_told_so(pool: Pool) -> None:
    """And not that the slab is damaged."""
    fd, limits = slab.open_checked(pool.name), resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4, limits[1]))
        with pytest.raises(OSError, match="Too many open files"):
            _core.SlabView(fd)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.close(fd)


def put_fifo(path: Path) -> None:
    os.mkfifo(path, 0o600)


def put_directory(path: Path) -> None:
    path.mkdir(0o700)


def put_link(path: Path) -> None:
    path.symlink_to("/dev/zero")


def put_loose_link(path: Path) -> None:
    path.symlink_to(f"nothing-{secrets.token_hex(8)}")


def put_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


SQUATTERS = [
    (put_fifo, "it is a FIFO"),
    (put_directory, "it is a directory"),
    (put_link, "it is a symbolic link"),
    (put_loose_link, "it is a symbolic link"),
    (put_socket, "it is a socket"),
]


@pytest.mark.parametrize(("put", "expected"), SQUATTERS)
def test_what_is_no_file(put: Callable[[Path], None], expected: str, name: str) -> None:
    path = Path(slab.path_of(name))
    put(path)
    try:
        with pytest.raises(SlabCorrupt, match=expected):
            inspect(name)  # and does not block
        info = find(name)
        assert expected in info.error
        assert not info.alive
        if path.is_dir():
            with pytest.raises(PoolError, match="cannot be removed"):
                unlink(name)
        else:
            unlink(name)
            assert not path.is_symlink()
            assert not path.exists()
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o602])
def test_a_slab_that_others_may_open(mode: int, whole: bytes, name: str) -> None:
    with segment(name, whole, mode), pytest.raises(SlabCorrupt, match=f"mode 0{mode:o} lets other users in"):
        inspect(name)


def test_a_slab_with_two_names(whole: bytes, name: str) -> None:
    with segment(name, whole) as path:
        second = path.with_name(f"other-{name}")
        os.link(path, second)
        try:
            with pytest.raises(SlabCorrupt, match="it has 2 names"):
                inspect(name)
        finally:
            second.unlink()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_a_slab_of_another_user(whole: bytes, name: str) -> None:
    with segment(name, whole) as path:
        os.chown(path, 12345, 12345)
        with pytest.raises(SlabCorrupt, match="belongs to user 12345"):
            inspect(name)


# Removing -----------------------------------------------------------------------------------------------------------


def test_a_pool_in_use_is_not_removed(pool: Pool) -> None:
    with pytest.raises(PoolInUse, match=f"in use by process {os.getpid()};") as caught:
        unlink(pool.name)
    assert caught.value.pids == (os.getpid(),)
    with inspect(pool.name):
        pass


def test_damage_does_not_make_a_segment_unused(name: str) -> None:
    with segment(name, b"x" * 10000) as path:
        with pytest.raises(PoolInUse, match=r"in use;"):
            unlink(name)
        assert path.exists()
        unlink(name, force=True)
        assert not path.exists()


def test_a_forced_removal_leaves_the_pool_to_its_processes(pool: Pool) -> None:
    with inspect(pool.name) as inspector:
        unlink(pool.name, force=True)
        with pytest.raises(PoolNotFound):
            inspect(pool.name)
        with pool.get():
            assert inspector.stats().in_use == 1


def test_what_a_killed_process_left_is_dead_and_removable(url: str, name: str) -> None:
    ready, tell = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            left = Pool(url, name=name)
            os.write(tell, b"x")
            signal.pause()
            left.close()
        finally:
            os._exit(1)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    os.close(tell)
    with inspect(name) as inspector:
        assert (find(name).pid, find(name).alive) == (pid, True)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert not inspector.alive
        assert [(each.pid, each.alive) for each in inspector.stats().workers] == [(pid, False)]
    # The next pool that is made may have tidied it away already.
    with contextlib.suppress(PoolNotFound):
        unlink(name)
    assert not Path(slab.path_of(name)).exists()


def test_errors_survive_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(PoolInUse(name="x", pids=(1, 2))))
    assert str(error) == str(PoolInUse(name="x", pids=(1, 2)))
    assert error.pids == (1, 2)
