"""What the doctor finds: every finding provoked on a real pool, and none on a pool that is well."""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import resource
import secrets
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shmpool
from shmpool import Pool, PooledConnection, slab
from shmpool.cli import main
from shmpool.doctor import Case, Finding, Process, diagnose, examine
from shmpool.inspector import PoolInfo, list_pools
from shmpool.stats import PoolStats
from shmpool.views import gauge
from tests.members import some_name
from tests.processes import Family, until
from tests.servers import ExclusiveServer

LOOK_S = 0.25


@pytest.fixture
def name() -> str:
    return some_name()


@pytest.fixture
def made(server: ExclusiveServer, name: str) -> Iterator[Callable[..., Pool]]:
    pools: list[Pool] = []

    def make(**settings: Any) -> Pool:
        plain: dict[str, Any] = {"max_connections": 2, "min_connections": 0, **settings}
        pools.append(Pool(plain.pop("target", server.url), name=name, **plain))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def found(pool: Pool, code: str, seconds: float = LOOK_S) -> Finding:
    """The finding of that code; there is one."""
    findings = examine(pool.name, seconds=seconds)[pool.name]
    assert [each.code for each in findings].count(code) == 1, findings
    return next(each for each in findings if each.code == code)


def codes(pool: Pool, seconds: float = LOOK_S) -> list[str]:
    return [each.code for each in examine(pool.name, seconds=seconds)[pool.name]]


# Nothing ------------------------------------------------------------------------------------------------------------


def use_for_ever(pool: Pool, hold_s: float = 0.0) -> None:
    while True:
        with pool.get():
            if hold_s:
                time.sleep(hold_s)  # sleep: the load


def test_a_pool_that_is_well(made: Callable[..., Pool], family: Family) -> None:
    """Also one under full load, and one whose workers are killed now and then."""
    pool = made(max_connections=4)
    assert codes(pool) == []
    workers = [family.fork(use_for_ever, pool) for _ in range(3)]
    until(lambda: pool.stats().successes > 1000, "they are at work")
    for _ in range(3):
        assert codes(pool) == []
    workers.pop().kill()
    workers.append(family.fork(use_for_ever, pool))
    until(lambda: pool.stats().recoveries == 1, "the dead one's part is taken back")
    assert codes(pool) == []


def test_clients_come_and_go(made: Callable[..., Pool]) -> None:
    """Nobody is advised to make the timeouts of a server's pool shorter because its clients end their connections."""
    look = made().stats()
    one_each = {**look._snapshot["totals"], "closed_broken": 100}
    kinds = [(100, 0, 0, 0), *look._snapshot["kinds"][1:]]
    snapshot = {**look._snapshot, "totals": {**one_each, "created": 100}, "kinds": kinds}
    for listening, expected in ((False, ["reconnects"]), (True, [])):
        now = PoolStats.from_snapshot({**snapshot, "config": json.dumps({"listening": listening})})
        assert [each.code for each in diagnose(Case(look, now))] == expected


def test_a_timeout_of_the_past_is_no_problem_now(made: Callable[..., Pool]) -> None:
    pool = made(max_connections=1, maintenance_interval=math.inf)
    with pool.get():
        with pytest.raises(shmpool.PoolTimeout):
            pool.get(timeout=0.001)
        assert codes(pool, 0.01) == []


def test_a_pool_that_drains_keeps_no_minimum(made: Callable[..., Pool]) -> None:
    pool = made(min_connections=2)
    until(lambda: pool.stats().prewarm_done, "it has its minimum")
    pool.drain(10)
    until(lambda: not pool.stats().open, "all have ended")
    assert codes(pool, 0.01) == ["state"]


# The slab -----------------------------------------------------------------------------------------------------------


def overwrite(pool: Pool, at: int, value: int) -> None:
    """Put a word into the slab, as a program gone wild might."""
    with open(slab.path_of(pool.name), "r+b") as file, mmap.mmap(file.fileno(), 0) as room:
        ctypes.c_uint64.from_buffer(room, at).value = value


def slot_word_at(pool: Pool) -> int:
    """Where the word of slot 0 stands: it is the one word of the file that differs by a lease's begin and end."""

    def words() -> memoryview:
        return memoryview(Path(slab.path_of(pool.name)).read_bytes()).cast("Q")

    pool.get().release()
    lease = pool.get()
    leased = words()
    lease.release()
    idle = words()
    differ = [at for at, (one, other) in enumerate(zip(leased, idle, strict=True)) if one & 15 == 3 and other & 15 == 4]
    (found,) = [at for at in differ if idle[at] >> 17 == (leased[at] >> 17) + 1]
    return 8 * found


def test_a_slab_that_was_overwritten(made: Callable[..., Pool], capsys: pytest.CaptureFixture[str]) -> None:
    pool = made(max_connections=1, maintenance_interval=math.inf)
    at = slot_word_at(pool)
    whole = int.from_bytes(Path(slab.path_of(pool.name)).read_bytes()[at : at + 8], "little")
    for damaged, says in (
        (whole | 15, "slot 0 is in no state that exists"),
        (whole & ~15 | 1, "slot 0 is empty and has"),
    ):
        overwrite(pool, at, damaged)
        finding = found(pool, "slab")
        assert finding.severity == "damage"
        assert says in finding.what
        assert main(["doctor", pool.name, "--seconds", "0.01"]) == 1
        assert f"{pool.name}: damage: its slab says what it cannot: {says}" in capsys.readouterr().out
    overwrite(pool, at, whole & ~(((1 << 13) - 1) << 4) & ~15 | 99 << 4 | 3)
    assert "slot 0 is leased by worker 98, which was never there" in found(pool, "slab").what
    overwrite(pool, at, whole)
    assert codes(pool) == []


# Who suffers --------------------------------------------------------------------------------------------------------


def test_a_leak_with_its_stack(made: Callable[..., Pool]) -> None:
    pool = made(leak_timeout=0.05, leak_stacks=True, maintenance_interval=math.inf)

    def forget(pool: Pool) -> PooledConnection:
        return pool.get()

    kept = forget(pool)

    def is_reported() -> bool:
        pool.maintain()
        return pool.stats().overdue_leases == 1

    until(is_reported, "it is overdue")
    finding = found(pool, "leak", seconds=0.01)
    assert finding.severity == "problem"
    assert f"connection {kept.id} is leased by process {os.getpid()}" in finding.what
    assert finding.evidence["stack"][0].startswith("forget (")
    assert "test_doctor.py:" in finding.evidence["stack"][0]
    assert " < test_a_leak_with_its_stack (" in finding.what
    assert f"when process {os.getpid()} ends" in finding.remedy
    kept.release()
    assert codes(pool, 0.01) == []


def test_leaked_connections_do_not_make_the_cap_too_small(made: Callable[..., Pool], family: Family) -> None:
    """Breaks when what is never returned counts as load: a larger cap would only leak more."""
    pool = made(max_connections=2, get_timeout=60)
    kept = pool.get()
    for _ in range(4):
        family.fork(use_for_ever, pool, 0.002)
    until(lambda: pool.stats().waiting >= 2, "they wait")
    assert "cap" not in codes(pool, 0.5)
    kept.release()


def test_a_dead_pool(
    made: Callable[..., Pool],
    family: Family,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = f"shmpool-test-{secrets.token_hex(4)}-"  # pools of other tests remove what is dead
    monkeypatch.setattr(slab, "prefix", lambda: own)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    def die() -> None:
        made()
        os.kill(os.getpid(), signal.SIGKILL)

    family.fork(die).wait()
    assert main(["doctor", name]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{name}: advice: no process uses it any more"
    assert f"shmpool unlink {name}" in said[1]
    assert said[2:] == ["pools: 0 well, 1 with findings, 0 damaged, 0 removed"]
    assert main(["unlink", name]) == 0


def test_a_leak_without(made: Callable[..., Pool]) -> None:
    pool = made(leak_timeout=0.01, maintenance_interval=math.inf)
    kept = pool.get()
    until(lambda: (pool.stats().slots[0].since or 0) > 0.02, "it is out for longer")
    assert "leak_stacks=True" in found(pool, "leak", 0.01).remedy
    kept.release()


def test_leases_that_were_dropped(made: Callable[..., Pool]) -> None:
    pool = made()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        pool.get()
    assert found(pool, "dropped", 0.01).evidence == {"leaks": 1}


def test_starvation_names_the_holders(made: Callable[..., Pool], family: Family) -> None:
    pool = made(max_connections=1, get_timeout=60)
    kept = pool.get()
    family.fork(pool.get)
    until(lambda: pool.stats().oldest_wait > 1, "somebody waits for long")
    finding = found(pool, "starvation", 0.05)
    assert finding.severity == "problem"
    assert f"process {os.getpid()} (" in finding.what
    assert "1 call in all" in finding.what
    assert "all of them keep theirs" in finding.remedy
    kept.release()
    until(lambda: not pool.stats().waiting, "it has it")
    assert "starvation" not in codes(pool, 0.05)


def test_a_cap_that_is_too_small(made: Callable[..., Pool], family: Family) -> None:
    """Six callers hold 5 ms each: six busy, or one busy and five waiting."""
    pool = made(max_connections=1, resize_limit=4, get_timeout=60)
    for _ in range(6):
        family.fork(use_for_ever, pool, 0.005)
    until(lambda: pool.stats().waiting >= 4, "they wait")
    first = found(pool, "cap", 0.5)
    assert first.severity == "advice"
    assert first.what.startswith("the cap of 1 is too small: ")
    assert 0.85 <= first.evidence["busy"] <= 1.05, "as many leases times as long as they take"
    assert first.evidence["queue"] > 3
    assert 4 <= first.evidence["wanted"] <= 9
    assert f"max_connections={first.evidence['wanted']}" in first.remedy
    assert "can be resized to 4" in first.remedy or f"shmpool resize {pool.name} 4" in first.remedy
    pool.resize(4)
    until(lambda: pool.stats().open == 4, "all are open")
    assert "cap" not in [each.code for each in examine(pool.name, seconds=0.5)[pool.name]] or pool.stats().waiting


def test_a_paused_and_a_draining_pool(made: Callable[..., Pool], family: Family) -> None:
    pool = made(get_timeout=60)
    pool.pause()
    assert found(pool, "state").severity == "advice"
    caller = family.fork(lambda: pool.get().release())
    until(lambda: pool.stats().waiting == 1, "it waits")
    finding = found(pool, "state")
    assert (finding.severity, finding.what) == ("problem", "the pool is paused: a call waits")
    assert f"shmpool resume {pool.name}" in finding.remedy
    pool.resume()
    caller.result()
    pool.drain(0)
    assert "drains" in found(pool, "state").what
    pool.resume()


def test_a_server_that_is_down(made: Callable[..., Pool], server: ExclusiveServer) -> None:
    server.refuse()
    pool = made(alive_bypass=0)
    with pytest.raises(shmpool.DialError):
        pool.get()
    finding = found(pool, "server")
    assert finding.severity == "problem"
    assert "Connection refused" in finding.what
    assert 'when_down="wait"' in finding.remedy
    server.listen()
    until(lambda: pool.stats().upstream_retry_in == 0, "the next dial may begin")
    pool.get().release()
    assert "server" not in codes(pool)


def test_a_stopped_process_that_has_a_connection(made: Callable[..., Pool], family: Family) -> None:
    pool = made()

    def hold() -> None:
        with pool.get():
            signal.pause()

    child = family.fork(hold)
    until(lambda: pool.stats().in_use == 1, "it has one")
    os.kill(child.pid, signal.SIGSTOP)
    until(lambda: (Process.of(child.pid) or Process("")).stopped, "it is stopped")
    finding = found(pool, "stopped")
    assert finding.what.startswith(f"process {child.pid} (")
    assert f"kill -CONT {child.pid}" in finding.remedy
    os.kill(child.pid, signal.SIGCONT)


# What could be better -----------------------------------------------------------------------------------------------


def test_connections_that_serve_one_lease_each(made: Callable[..., Pool]) -> None:
    pool = made(maintenance_interval=math.inf)
    for _ in range(25):
        pool.get().discard("for a test")
    finding = found(pool, "reconnects")
    assert finding.severity == "advice"
    assert "a connection serves 1.0 leases on average: 25 were opened" in finding.what
    assert "25 of 25 ended as error" in finding.what
    assert f"discard(): `shmpool events {pool.name} --kind discarded` says" in finding.remedy
    for _ in range(300):
        pool.get().release()
    assert codes(pool) == []


def test_descriptors_near_the_limit(made: Callable[..., Pool], family: Family) -> None:
    pool = made(maintenance_interval=math.inf)

    def crowd() -> None:
        pool.get().release()
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        while len(os.listdir("/proc/self/fd")) < 97:
            os.open("/dev/null", os.O_RDONLY)
        signal.pause()

    child = family.fork(crowd)
    until(lambda: (Process.of(child.pid) or Process("")).descriptors >= 96, "it has as many")
    finding = found(pool, "descriptors")
    assert (finding.severity, finding.evidence["limit"]) == ("problem", 100)
    assert f"process {child.pid} (" in finding.what


def test_a_process_that_may_have_no_descriptors(made: Callable[..., Pool]) -> None:
    look = made().stats()
    findings = diagnose(Case(look, look, processes={os.getpid(): Process("sandboxed", descriptors_max=0)}))
    assert findings == []


def test_settings_of_no_pool(made: Callable[..., Pool]) -> None:
    look = made().stats()
    strange = PoolStats.from_snapshot({**look._snapshot, "config": f'{{"leak_timeout": 1{"0" * 400}}}'})
    assert diagnose(Case(strange, strange)) == []


def test_processes_that_die_with_connections(made: Callable[..., Pool], family: Family) -> None:
    pool = made(maintenance_interval=math.inf)

    def hold() -> None:
        kept = pool.get()
        signal.pause()
        kept.release()

    for turn in range(3):
        child = family.fork(hold)
        until(lambda: pool.stats().in_use == 1, "it has one")
        child.kill()
        assert found(pool, "dead").evidence == {"pid": child.pid, "held": 1}
        assert ("deaths" in codes(pool, 0.01)) == (turn > 3)
        pool.recover()
    assert found(pool, "deaths").what == "3 processes died in the last 10m00s, 3 connections in their hands"


def test_who_has_not_the_segment_is_another_process(made: Callable[..., Pool]) -> None:
    """As the numbers of processes in another pid namespace may be."""
    pool = made()
    pool.get().release()
    assert Process.of(os.getpid(), slab.path_of(pool.name)) is not None
    assert Process.of(os.getppid(), slab.path_of(pool.name)) is None


def test_places_that_run_out(made: Callable[..., Pool], family: Family) -> None:
    pool = made(max_workers=2)
    pool.get().release()
    assert codes(pool) == []
    family.fork(use_for_ever, pool)
    until(lambda: len(pool.stats().workers) == 2, "there are two")
    assert found(pool, "max_workers").evidence == {"used": 2, "limit": 2}


def test_a_pool_that_nobody_looks_after(made: Callable[..., Pool]) -> None:
    """Its one process has a maintenance thread, or should."""
    pool = made()
    pool.get().release()
    look = pool.stats()
    later = dict(look._snapshot) | {"now": look._snapshot["now"] + 60 * 10**9}
    findings = diagnose(Case(look, PoolStats.from_snapshot(later)))
    assert "maintenance" in [each.code for each in findings]
    assert diagnose(Case(look, pool.stats())) == []


def test_a_minimum_that_cannot_be_kept(made: Callable[..., Pool], deaf_port: int) -> None:
    pool = made(target=f"tcp://127.0.0.1:{deaf_port}", min_connections=2, maintenance_interval=0.05)
    until(lambda: pool.stats().prewarm_done, "it has given up")
    assert found(pool, "minimum", 0.01).evidence == {"open": 0, "min_connections": 2}


# The command --------------------------------------------------------------------------------------------------------


def test_the_command(made: Callable[..., Pool], capsys: pytest.CaptureFixture[str]) -> None:
    pool = made()
    assert main(["doctor", pool.name, "--seconds", "0.01"]) == 0
    assert (
        capsys.readouterr().out
        == f"{pool.name}: nothing is wrong\npools: 1 well, 0 with findings, 0 damaged, 0 removed\n"
    )
    pool.pause()
    assert main(["doctor", pool.name, "--seconds", "0.01"]) == 0, "nobody suffers"
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [
        f"{pool.name}: advice: the pool is paused: callers wait",
        f"    `shmpool resume {pool.name}` when you are done",
    ]
    assert main(["doctor", pool.name, "--seconds", "0.01", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["pools"]
    (finding,) = told["findings"]
    assert (told["name"], finding["severity"], finding["code"]) == (pool.name, "advice", "state")
    pool.resume()
    assert main(["doctor", "nobody-has-this"]) == 1
    assert "there is no pool 'nobody-has-this'" in capsys.readouterr().err


def test_a_pool_that_ends_before_it_is_looked_at(
    made: Callable[..., Pool], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = made()
    gone = PoolInfo(name=some_name(), alive=True)
    (there,) = (info for info in list_pools() if info.name == pool.name)
    monkeypatch.setattr("shmpool.cli.list_pools", lambda: [gone, there])
    monkeypatch.setattr(slab, "reap", list)
    assert main(["doctor", "--seconds", "0.01"]) == 0
    assert f"{pool.name}: nothing is wrong\n" in capsys.readouterr().out
    assert main(["doctor", gone.name, "--seconds", "0.01"]) == 1


def test_a_cap_that_was_overwritten(made: Callable[..., Pool]) -> None:
    stats = made().stats()
    damaged = PoolStats.from_snapshot({**stats._snapshot, "max_connections": 0})
    assert gauge(damaged).startswith("[")
