"""The shared segment as a file: its name and mode, who may have the name, what is reaped, and what if there is no room.

Not here: what is in it (tests/core), looking at it (test_inspector).
"""

from __future__ import annotations

import gc
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shmpool
from shmpool import InvalidConfig, Pool, SlabCorrupt, _core, slab
from tests.processes import Family, descriptors, until

URL = "tcp://127.0.0.1:1"  # nobody listens: these pools never connect
SMALL = {"max_connections": 2, "min_connections": 0, "max_workers": 4, "max_waiters": 4}


@pytest.fixture
def name() -> Iterator[str]:
    """A name that no other test has; whatever bears it at the end is removed."""
    chosen = f"test-{secrets.token_hex(6)}"
    yield chosen
    path = Path(slab.path_of(chosen))
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def segments(of_pid: int | str = "") -> list[str]:
    """The segments there are, public and private; those that a process named, if one is given."""
    mark = f"{slab.prefix()}"
    return sorted(entry for entry in os.listdir(slab.DIRECTORY) if entry.startswith(mark) and f"{of_pid}-" in entry)


# Name and mode --------------------------------------------------------------------------------------------------------


def test_the_segment_bears_the_name_and_is_private_to_the_user(name: str) -> None:
    with Pool(URL, name=name, **SMALL) as pool:
        assert pool.name == name
        status = os.stat(slab.path_of(name))
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert status.st_uid == os.getuid()
        assert status.st_size == _core.layout(2 * 2, 4, 4)[0], "resize() may go up to twice max_connections"
        assert status.st_blocks * 512 >= status.st_size, "its memory is reserved"
    assert not os.path.lexists(slab.path_of(name))


@pytest.mark.parametrize("mask", [0o000, 0o077, 0o777])
def test_the_mode_does_not_depend_on_the_umask(name: str, mask: int) -> None:
    before = os.umask(mask)
    try:
        with Pool(URL, name=name, **SMALL):
            assert stat.S_IMODE(os.stat(slab.path_of(name)).st_mode) == 0o600 & ~mask
    finally:
        os.umask(before)


def test_pools_without_a_name_have_different_ones() -> None:
    with Pool(URL, **SMALL) as first, Pool(URL, **SMALL) as second:
        assert first.name != second.name
        assert {f"{slab.prefix()}{pool.name}" for pool in (first, second)} <= set(segments())


def test_every_name_that_is_allowed_works(name: str) -> None:
    longest = (name + "._-" + "x" * 64)[:64]
    for wanted in ("Z", longest, "9.9"):
        with Pool(URL, name=wanted, **SMALL):
            assert os.path.exists(slab.path_of(wanted))


def test_no_resource_tracker_knows_of_it(name: str) -> None:
    """Before Python 3.13 the tracker would unlink a living pool when any process ends that has touched it."""
    script = (
        "import sys, shmpool; pool = shmpool.Pool({!r}, name={!r}, min_connections=0); sys.stdin.read(1); pool._leave()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script.format(URL, name)], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        until(lambda: os.path.exists(slab.path_of(name)), "it is made")
        assert process.stdin is not None
        assert process.stderr is not None
        shmpool.inspect(name).close()
        subprocess.run(
            [sys.executable, "-c", f"import shmpool; shmpool.inspect({name!r}).stats()"], check=True, timeout=30
        )
        assert os.path.exists(slab.path_of(name)), "whoever looked at it has gone, it is still there"
        process.stdin.write(b"x")
        process.stdin.close()
        assert process.wait(30) == 0
        assert process.stderr.read() == b""
    # That process left without removing the name: it was still there, or the exit removed it; never the tracker.
    assert not os.path.exists(slab.path_of(name)) or slab.remove_remains(name)


# Who has the name -----------------------------------------------------------------------------------------------------


def test_a_living_pool_keeps_its_name(name: str) -> None:
    with Pool(URL, name=name, **SMALL) as pool:
        before = set(descriptors().items()), segments(os.getpid())
        for _ in range(3):
            with pytest.raises(InvalidConfig, match=f"max_connections=.*{name}"):
                Pool(URL, name=name, **{**SMALL, "max_connections": SMALL["max_connections"] + 1})
            Pool(URL, name=name, **SMALL).leave()
        gc.collect()
        assert (set(descriptors().items()), segments(os.getpid())) == before
        assert not pool.closed
        assert os.path.exists(slab.path_of(name))


def test_the_name_is_free_after_close(name: str) -> None:
    for _ in range(3):
        with Pool(URL, name=name, **SMALL):
            pass
    first = Pool(URL, name=name, **SMALL)
    first.close()
    with Pool(URL, name=name, **SMALL):
        first.close()
        del first
        gc.collect()
        assert os.path.exists(slab.path_of(name)), "the end of the old pool is not the end of the new one"


def test_a_child_keeps_the_name_when_its_parent_is_dead(name: str) -> None:
    with Family() as family:
        go_on = family.latch()

        def parent() -> int:
            pool = Pool(URL, name=name, **SMALL)
            pid = os.fork()
            if pid == 0:
                go_on.wait()
                os._exit(0 if not pool.closed else 1)
            return pid

        family.fork(parent).result()
        with Pool(URL, name=name, **SMALL) as pool, shmpool.inspect(name) as inspector:
            assert inspector.snapshot()["creator_pid"] != os.getpid(), "it was joined, not made anew"
            assert not pool.closed
        assert os.path.exists(slab.path_of(name)), "the child keeps it"
        go_on.set()
        until(lambda: slab.remove_remains(name), "the last of the family has gone")


@pytest.mark.parametrize("own_name", [True, False])
def test_remains_of_the_dead_are_reaped(name: str, own_name: bool) -> None:
    def die() -> None:
        pool = Pool(URL, name=name, **SMALL)
        os.kill(os.getpid(), signal.SIGKILL if not pool.closed else signal.SIGTERM)

    with Family() as family:
        assert family.fork(die).wait() == "SIGKILL"
    if own_name:
        with Pool(URL, name=name, **SMALL):
            pass
    else:
        Pool(URL, **SMALL).close()
    assert not os.path.exists(slab.path_of(name))


def test_reap_names_what_it_removed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = f"shmpool-test-{secrets.token_hex(4)}-"  # pools of other tests reap what they see
    monkeypatch.setattr(slab, "prefix", lambda: own)

    def end_without_a_word() -> None:
        pool = Pool(URL, name=name, **SMALL)
        os._exit(0 if not pool.closed else 1)

    with Pool(URL, **SMALL) as living:
        with Family() as family:
            family.fork(end_without_a_word).wait()
        assert os.path.exists(slab.path_of(name))
        assert slab.reap() == [name]
        assert not os.path.exists(slab.path_of(name))
        assert os.path.exists(slab.path_of(living.name))


def test_a_foreign_file_is_left_alone(name: str) -> None:
    path = Path(slab.path_of(name))
    for content in (b"", b"mine", os.urandom(100_000), bytes(8192)):
        path.write_bytes(content)
        Pool(URL, **SMALL).close()
        slab.reap()
        assert path.read_bytes() == content
        with pytest.raises(SlabCorrupt) as caught:
            Pool(URL, name=name, **SMALL)
        assert caught.value.name == name
        assert path.read_bytes() == content


def _fifo(path: str) -> None:
    os.mkfifo(path)


def _socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)


def _dangling(path: str) -> None:
    os.symlink("/nonexistent/target", path)


def _link_to_null(path: str) -> None:
    os.symlink(os.devnull, path)


@pytest.mark.parametrize("occupy", [os.mkdir, _fifo, _socket, _dangling, _link_to_null])
def test_whatever_has_the_name_is_no_trouble(name: str, occupy: Callable[[str], None]) -> None:
    path = slab.path_of(name)
    occupy(path)
    kind = stat.S_IFMT(os.lstat(path).st_mode)
    before = set(descriptors().items()), segments(os.getpid())
    with pytest.raises(SlabCorrupt):
        Pool(URL, name=name, **SMALL)
    Pool(URL, **SMALL).close()
    slab.reap()
    gc.collect()
    assert (set(descriptors().items()), segments(os.getpid())) == before
    assert stat.S_IFMT(os.lstat(path).st_mode) == kind


def test_an_abandoned_private_segment_is_removed_in_time() -> None:
    old = Path(slab.DIRECTORY, f"{slab.prefix()}.1-{secrets.token_hex(8)}")
    new = Path(slab.DIRECTORY, f"{slab.prefix()}.1-{secrets.token_hex(8)}")
    try:
        for path in (old, new):
            path.touch(0o600)
        hour_ago = time.time() - 3600
        os.utime(old, (hour_ago, hour_ago))
        Pool(URL, **SMALL).close()
        assert not old.exists()
        assert new.exists(), "somebody may still be making it"
    finally:
        for path in (old, new):
            path.unlink(missing_ok=True)


def test_a_segment_whose_name_was_removed_still_works(name: str) -> None:
    with Pool(URL, name=name, **SMALL) as pool, Pool(URL, **SMALL) as witness:
        os.unlink(slab.path_of(name))
        assert not pool.closed
        assert pool.stats().name == name
        with Pool(URL, name=name, **SMALL):
            pool.close()
            assert os.path.exists(slab.path_of(name)), "the name is another pool's now"
        assert not witness.closed


# No room --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_no_room_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    before = set(descriptors().items()), segments(os.getpid())
    wanted = InvalidConfig if isinstance(error, OSError) else type(error)
    with pytest.raises(wanted) as caught:
        Pool(URL, **SMALL)
    if isinstance(error, OSError):
        assert "MiB" in str(caught.value)
        assert caught.value.__cause__ is error
    assert (set(descriptors().items()), segments(os.getpid())) == before


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("step", ["create", "publish"])
def test_an_interrupt_while_it_is_made_leaves_nothing_behind(
    step: str, named: bool, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    where, what = (_core.PoolBase, "_create") if step == "create" else (slab, "publish")
    done = getattr(where, what)

    def interrupt(*arguments: object) -> None:
        done(*arguments)  # Python looks at signals when this has returned, before the next step
        raise KeyboardInterrupt

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(Pool if step == "create" else slab, what, interrupt)
    before = set(descriptors().items()), segments(os.getpid())
    with pytest.raises(KeyboardInterrupt) as caught:
        Pool(URL, name=name if named else None, **SMALL)
    del caught
    gc.collect()
    assert (set(descriptors().items()), segments(os.getpid())) == before
    assert list(tmp_path.iterdir()) == []


def in_namespace(mounts: str, script: str) -> str:
    """Run a script where /dev/shm is another one: in user and mount namespaces of its own."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no namespaces of one's own here")
    shell = f'{mounts}; exec "$@"'
    command = ["unshare", "-rm", "sh", "-ec", shell, "sh", sys.executable, "-c", textwrap.dedent(script)]
    environment = {**os.environ, "PYTHONPATH": str(Path(shmpool.__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


TRY_TO_MAKE = f"""
    import os
    from shmpool import InvalidConfig, Pool
    try:
        Pool({URL!r}, max_connections=1000)
    except InvalidConfig as error:
        left = os.listdir("/dev/shm") if os.path.exists("/dev/shm") else None
        print(error, "|", type(error.__cause__).__name__, left)
"""


def test_a_full_dev_shm() -> None:
    """Memory is reserved at creation: a full one is an error then, not a SIGBUS later."""
    output = in_namespace("mount -t tmpfs -o size=256k tmpfs /dev/shm", TRY_TO_MAKE)
    assert "0.2 MiB are free" in output, output
    assert "No space left" in output
    assert "lower max_workers" in output
    assert output.strip().endswith("OSError []"), "nothing is left"


def test_a_dev_shm_that_has_just_room_for_it() -> None:
    size = _core.layout(2, 4, 4)[0]
    script = f"""
        from shmpool import InvalidConfig, Pool
        settings = {SMALL!r}
        with Pool({URL!r}, **settings):
            try:
                Pool({URL!r}, **settings)
            except InvalidConfig as error:
                print("full")
        with Pool({URL!r}, **settings) as pool:
            print(pool.stats().max_connections)
    """
    pages = -(-size // 4096) + 2
    assert in_namespace(f"mount -t tmpfs -o size={pages * 4}k tmpfs /dev/shm", script).split() == ["full", "2"]


def test_no_dev_shm() -> None:
    output = in_namespace("mount -t tmpfs tmpfs /dev", TRY_TO_MAKE)
    assert "cannot be used" in output, output
    assert output.strip().endswith("None")


def test_a_read_only_dev_shm() -> None:
    output = in_namespace("mount -t tmpfs -o ro tmpfs /dev/shm", TRY_TO_MAKE)
    assert "Read-only file system" in output, output


# The largest ----------------------------------------------------------------------------------------------------------


def test_the_largest_slab_by_its_layout() -> None:
    total, slot, worker = _core.layout(_core.MAX_SLOTS, _core.MAX_WORKERS, _core.MAX_WAITERS)
    assert slot <= 192
    assert worker <= 16384
    assert total < 100 * 2**20
    for capacities in ((0, 1, 1), (_core.MAX_SLOTS + 1, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, _core.MAX_WAITERS + 1)):
        with pytest.raises(ValueError, match="out of range"):
            _core.layout(*capacities)


@pytest.mark.slow
def test_as_many_slots_as_there_may_be() -> None:
    """100 000, or as many as this process may have descriptors for."""

    def make() -> tuple[int, int, dict[str, int]]:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        for wanted in (_core.MAX_SLOTS, (hard - 200) // 2):
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (2 * wanted + 200,) * 2)
                break
            except (ValueError, OSError):
                continue
        with Pool(URL, max_connections=wanted, min_connections=0) as pool:
            with pytest.raises(shmpool.DialError):
                pool.get()
            counts = pool._counts()
            made = len(os.listdir("/proc/self/fd"))
        return wanted, made, counts

    with Family() as family:
        wanted, made, counts = family.fork(make).result(100)
    assert counts["empty"] == wanted
    assert made > wanted, "a mailbox each"
