"""Looking at pools is safe: whatever lies under a pool's name, and for the pool that is looked at.

Slabs: bytes of a living pool, with connections, waiters, events and a dead worker, are damaged (damage.py), and every
command and call is tried on each, in an interpreter of its own with a watchdog. Marked `sanitize`: the same with a core
that was built with AddressSanitizer and UBSan, and with guards around what it maps (core/guarded.c), so that a load
beyond the end of a slab is seen. The first seed is printed; SHMPOOL_TEST_SEED sets it, SHMPOOL_TEST_SLABS how many
slabs there are. One seed again:

    SHMPOOL_TEST_SEED=7 SHMPOOL_TEST_SLABS=1 pytest tests/test_hostile.py -k damaged

Disturbance: inspectors look, and are killed at any moment, while a pool is under load; afterwards its books agree.

Not here: what each kind of damage is told to be (test_inspector.py), the core's own tests (test_core.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import io
import itertools
import mmap
import os
import random
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmpool import Pool, PoolError, SlabCorrupt, _core, cli, inspect, slab, steering
from tests.books import Ledger, audit
from tests.damage import CAPACITIES, FIELDS, LOOKS, SETTINGS, Map, number, text
from tests.members import Members, members_of, some_name
from tests.processes import LONG, Counters, Family, Latch, chance, lease_every_slot, ready, until
from tests.servers import ExclusiveServer, exclusive_use
from tests.test_core import ADDRESS, CC, CFLAGS, CORE, HERE
from tests.test_inspector import segment

CHOSEN = LONG or "SHMPOOL_TEST_SLABS" in os.environ
SLABS = int(os.environ.get("SHMPOOL_TEST_SLABS", 5000 if LONG else 40))
PARTS = 2  # processes that share them, for two cores
KILLS = 500 if LONG else 30
LOOKS_AT_REST = 1000 if LONG else 80
HANG_S = 120.0  # for all that is done with one slab; a hundred times what it takes
ROOT = Path(__file__).parent.parent


@pytest.fixture
def members(family: Family, server: ExclusiveServer) -> Iterator[Members]:
    """A pool that this process is no member of."""
    with members_of(some_name(), family, server) as make:
        yield make(**SETTINGS)


@pytest.fixture
def donor(members: Members) -> bytes:
    """The slab of a pool at work. Nobody answers at its socket: who wants to join copies the descriptors."""
    stopped = [members.holder(count)[0] for count in (2, 1)]
    dead, _ = members.holder(1)
    for _ in range(3):
        members.waiter()
    dead.kill()
    for child in stopped:
        child.stop()
    whole = Path(slab.path_of(members.name)).read_bytes()
    at, size = FIELDS["rendezvous"]
    return whole[:at] + b"/nowhere/at-all".ljust(size, b"\0") + whole[at + size :]


def test_the_map_of_the_slab_is_the_cores(donor: bytes, members: Members) -> None:
    capacities = [number(donor, name) for name in CAPACITIES]
    assert capacities == [6, 8, 70]
    assert (Map.of(*capacities).size, len(donor)) == (_core.layout(*capacities)[0], number(donor, "total_size"))
    assert text(donor, "name") == members.name
    assert text(donor, "config").startswith("{")
    assert (number(donor, "cap"), number(donor, "bound")) == (4, 4)
    with inspect(members.name) as inspector:
        assert 0 < number(donor, "next_event") <= inspector.events().next  # some may have happened since


# Damage -------------------------------------------------------------------------------------------------------------


def sanitized(room: Path) -> dict[str, str]:
    """Build the extension with sanitizers into a package in `room`; the environment that has it."""
    package = room / "shmpool"
    package.mkdir()
    for path in (ROOT / "shmpool").iterdir():
        if path.name not in ("core", "__pycache__") and path.suffix != ".so":
            (package / path.name).symlink_to(path)
    include = sysconfig.get_path("include")
    flags = (*CFLAGS, *ADDRESS.flags, "-fPIC", f"-I{include}")
    objects = []
    for source in (*sorted(CORE.glob("*.c")), HERE / "guarded.c"):
        objects.append(room / f"{source.stem}.o")
        subprocess.run([*CC, *flags, "-c", str(source), "-o", str(objects[-1])], check=True)
    extension = package / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    wrapped = "-Wl,--wrap=mmap,--wrap=mmap64,--wrap=munmap"
    subprocess.run([*CC, *flags, "-shared", wrapped, *map(str, objects), "-o", str(extension)], check=True)
    library = subprocess.run([*CC, "-print-file-name=libasan.so"], check=True, capture_output=True, text=True)
    return {
        "LD_PRELOAD": library.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": f"{room}{os.pathsep}{ROOT}",
    }


@pytest.mark.parametrize("build", ["plain", pytest.param("sanitized", marks=pytest.mark.sanitize)])
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.timeout(0 if CHOSEN else 110)
def test_damaged_slabs(build: str, part: int, donor: bytes, server: ExclusiveServer, tmp_path: Path) -> None:
    count = len(range(part, SLABS, PARTS))
    if not count:
        pytest.skip("the other part has the only slab")
    first = int(os.environ.get("SHMPOOL_TEST_SEED", random.randrange(1 << 32))) + part * len(range(0, SLABS, PARTS))
    print(f"SHMPOOL_TEST_SEED={first}")
    room = tmp_path / "build"
    room.mkdir()
    environment = sanitized(room) if build == "sanitized" else {"PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    (tmp_path / "slab").write_bytes(donor)
    endure([str(tmp_path / "slab"), server.url, str(first), str(count)], environment, room)


def endure(arguments: list[str], environment: dict[str, str], room: Path) -> None:
    """Run the ordeals; asserts that they end, and well."""
    command = [sys.executable, "-m", "tests.damage", *arguments]
    with (
        open(room / "faults", "w+") as faults,
        subprocess.Popen(
            command, cwd=room, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=faults
        ) as child,
    ):
        assert child.stdout is not None
        out, said = child.stdout.fileno(), b""
        while ready(out, HANG_S) and (more := os.read(out, 1 << 16)):
            said += more
        if hung := child.poll() is None and not ready(out, 0):
            child.kill()
        status = child.wait()
        last = said.decode().splitlines()[-1] if said else "nothing was begun"
        print(last)
        how = "hung" if hung else f"status {status}"
        assert not status, f"{how} at {last}\n{(room / 'faults').read_text()[-20000:]}"


def test_a_cut_at_any_moment(donor: bytes, family: Family) -> None:
    """Also between the check of the size and the look: the look is refused, and nobody gets a SIGBUS."""
    name, rounds = some_name(), 100 if LONG else 10
    seed = chance().randrange(1 << 32)
    with segment(name, donor) as path:
        enough = family.latch()
        cutter = family.fork(cut_and_mend, path, donor, enough, seed)
        looker = family.fork(look_at_cuts, name, rounds)
        try:
            assert looker.result(timeout_s=100.0) >= rounds
        finally:
            enough.set()
        cutter.result()


def cut_and_mend(path: Path, whole: bytes, enough: Latch, seed: int) -> None:
    rng, fd = random.Random(seed), os.open(path, os.O_RDWR)
    while not enough.is_set():
        os.pwrite(fd, whole, 0)
        for _ in range(rng.randrange(20_000)):  # somebody begins to look meanwhile
            pass
        os.ftruncate(fd, rng.choice((0, 4096, rng.randrange(len(whole)))))
    os.close(fd)


def look_at_cuts(name: str, wanted: int) -> int:
    """Look until so many looks were cut in the middle."""
    found = 0
    for steer in itertools.cycle((steering.pause, steering.resume)):
        try:
            steer(name)
            with inspect(name) as inspector:
                while True:
                    inspector.stats()
                    inspector.events()
        except PoolError as error:
            found += isinstance(error, SlabCorrupt) and "while it was read" in str(error)
        if found >= wanted:
            return found
    raise AssertionError


def test_the_signal_of_a_cut_is_taken_for_the_time_of_a_look(members: Members) -> None:
    """Whoever has a use for SIGBUS of his own has it before and after."""
    members.keeper()
    program = (
        "import os, signal, sys, shmpool\n"
        "caught = lambda: [each for each in open('/proc/self/status') if each.startswith('SigCgt')]\n"
        "before = caught()\n"
        "shmpool.inspect(sys.argv[1]).stats()\n"
        "assert caught() == before\n"
        "os.kill(os.getpid(), signal.SIGBUS)"
    )
    environment = {**os.environ, "PYTHONFAULTHANDLER": ""}
    done = subprocess.run([sys.executable, "-c", program, members.name], check=False, env=environment)
    assert done.returncode == -7


# Disturbance --------------------------------------------------------------------------------------------------------


def test_looking_changes_no_byte(members: Members) -> None:
    members.holder(2)
    path = Path(slab.path_of(members.name))
    before = path.read_bytes()
    for command in itertools.islice(itertools.cycle(LOOKS), LOOKS_AT_REST):
        with contextlib.redirect_stdout(io.StringIO()):
            assert cli.main([members.name if word == "NAME" else word for word in command]) == 0
    assert path.read_bytes() == before


def look_without_end(name: str, looks: Counters) -> None:
    while True:
        with inspect(name) as inspector:
            for _ in range(20):
                inspector.stats()
                inspector.events()
                looks[0] += 1


def work(pool: Pool, stop: Latch, turns: Counters, me: int) -> Ledger:
    """Lease, use and release as fast as possible, now and then holding two."""
    ledger = Ledger()
    while not stop.is_set():
        leases = [ledger.call(pool.get, timeout=30.0) for _ in range(1 + (turns[me] % 5 == 0))]
        for lease in filter(None, leases):
            exclusive_use(lease.socket, f"{os.getpid()}:{turns[me]}")
            lease.release()
        turns[me] += 1
    return ledger


@pytest.mark.timeout(0 if LONG else 110)
def test_inspectors_that_are_killed_at_any_moment(family: Family, server: ExclusiveServer) -> None:
    rng, name, crew = chance(), some_name(), 4
    turns, looks, stop = Counters(crew), Counters(1), family.latch()
    with members_of(name, family, server) as make:
        members = make(**{**SETTINGS, "max_connections": 6})
        workers = [members.fork(work, stop, turns, me) for me in range(crew)]
        until(lambda: all(turns.list()), "everybody is at work")
        for _ in range(KILLS):
            seen, wanted = looks[0], rng.choice((0, 1, rng.randrange(30)))
            inspector = family.fork(look_without_end, name, looks)
            until(lambda seen=seen, wanted=wanted: looks[0] >= seen + wanted, "it looks")  # type: ignore[misc]
            assert inspector.kill() == "SIGKILL"
            family.forget(inspector)
        done = sum(turns.list())
        until(lambda: sum(turns.list()) > done, "the work goes on")
        stayer = members.keeper()
        stop.set()
        calls = sum((worker.result() for worker in workers), Ledger())
        assert Path(slab.path_of(name)).exists()
        with members.pool() as pool:
            stats = audit(pool, calls, server)
            assert {each.pid for each in stats.workers if each.alive} == {stayer.pid, os.getpid()}
            assert stats.recoveries == 0  # no inspector was a worker that died
            lease_every_slot(pool)
    assert server.stats()["violations"] == 0


def in_maps(pid: int | str, name: str) -> list[tuple[int, str]]:
    """Where a process has the segment, and how."""
    found = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if name in line]
    return [(int(line[0].partition("-")[0], 16), line[1]) for line in found]


def test_an_inspector_cannot_write(members: Members, family: Family) -> None:
    members.keeper()
    path = slab.path_of(members.name)
    ready_to_write, may_write = family.latch(), family.latch()

    def write() -> None:
        faulthandler.disable()  # nobody wants to read of it
        with inspect(members.name):
            ((at, _),) = in_maps("self", members.name)
            libc = ctypes.CDLL(None, use_errno=True)
            refused = libc.mprotect(ctypes.c_void_p(at), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)
            assert (refused, ctypes.get_errno()) == (-1, 13)  # EACCES: its descriptor is for reading
            ready_to_write.set()
            may_write.wait()
            ctypes.memset(at, 1, 1)

    child = family.fork(write)
    ready_to_write.wait()
    assert [how for _, how in in_maps(child.pid, members.name)] == ["r--s"]
    links = [entry for entry in Path(f"/proc/{child.pid}/fd").iterdir() if os.readlink(entry) == path]
    assert links
    for link in links:
        flags = Path(f"/proc/{child.pid}/fdinfo/{link.name}").read_text().split()
        assert int(flags[flags.index("flags:") + 1], 8) & os.O_ACCMODE == os.O_RDONLY
    before = Path(path).read_bytes()
    may_write.set()
    assert child.wait() == "SIGSEGV"
    assert Path(path).read_bytes() == before
