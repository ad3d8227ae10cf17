"""What is strange around a pool: pids that come again, namespaces, clocks that are set, limits, a hidden /proc.

After each of them the same must hold: no slot is lost, no connection has two users, and who cannot go on says why.

Not here: descriptors that run out (test_failures), memory that is missing when a pool is made (test_slab), how the
surroundings are made (surroundings).
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shmpool import InvalidConfig, attach, slab
from tests import joining, surroundings
from tests.joining import Company, Mine, Runtime, every_slot, fresh_name, give_back, hold, lease_once, make
from tests.processes import TIMEOUT_S, Family, lease_every_slot, until, use
from tests.servers import ExclusiveServer
from tests.surroundings import CAP, OWN_PIDS, TMPFS, in_world, own_pid, sees, unshare, waits


@pytest.fixture(scope="module")
def one_server() -> Iterator[ExclusiveServer]:
    with ExclusiveServer() as server:
        yield server


@pytest.fixture
def server(one_server: ExclusiveServer) -> Iterator[ExclusiveServer]:
    yield from joining.proving(one_server)


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    yield from joining.own_runtime(monkeypatch)


@pytest.fixture
def name(server: ExclusiveServer) -> Iterator[str]:
    """Free at the end, when the last member has gone; before the server looks for what is left."""
    del server
    name = fresh_name()
    yield name
    until(lambda: slab.remove_remains(name), "the last member ends")


@pytest.fixture
def company(name: str, runtime: Runtime) -> Iterator[Company]:
    del name, runtime
    with Company() as company:
        yield company


@pytest.fixture
def settings(server: ExclusiveServer, name: str) -> dict[str, Any]:
    return {"target": server.url, "name": name, "max_connections": CAP, "min_connections": 0}


# Pids that come again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "story", [surroundings.a_pid_that_comes_again, surroundings.a_member_with_the_pid_of_a_dead_one]
)
def test_pids_that_come_again(story: Callable[[], None]) -> None:
    """A lock says who lives, never a pid. Breaks when a process with the dead one's pid keeps its leases."""
    in_world(story)


# Pid namespaces -------------------------------------------------------------------------------------------------------


def test_members_of_the_same_pid_in_two_namespaces(company: Company, settings: dict[str, Any], name: str) -> None:
    """Neither is in the other's /proc. Breaks wherever a pid says who is who, or who lives."""
    here, there = company.execute(through=unshare(*OWN_PIDS)), company.execute(through=unshare(*OWN_PIDS))
    assert here.do(make, **settings) == there.do(make, **settings)
    assert here.do(own_pid) == there.do(own_pid) == 1
    assert here.do(lease_once) == there.do(lease_once), "they share a connection"
    for holder, other in ((here, there), (there, here)):
        numbers = {holder.do(hold), holder.do(hold)}
        waits(other, name)
        holder.do(give_back, 0, "release")
        assert other.answer() in numbers
        holder.do(give_back, 0, "release")
        assert sees(Mine(), name) == other.do(sees, name) == [(1, True), (1, True)]
    with attach(name) as pool:
        assert len(lease_every_slot(pool)) == CAP


@pytest.mark.parametrize("who", [0, 1])
def test_one_is_killed_in_its_pid_namespace(company: Company, settings: dict[str, Any], name: str, who: int) -> None:
    members = [company.execute(through=unshare(*OWN_PIDS)) for _ in range(2)]
    for member in members:
        member.do(make, **settings)
    victim, other = members[who], members[1 - who]
    for _ in range(CAP):
        victim.do(hold)
    waits(other, name)
    victim.kill()
    other.answer()
    assert len(other.do(every_slot)) == CAP
    assert sorted(other.do(sees, name)) == [(1, False), (1, True)]


def test_a_member_out_of_sight_is_not_copied_from(company: Company, settings: dict[str, Any], name: str) -> None:
    """It is stopped, so it cannot answer; who is in another pid namespace fails in its time, and says who the members
    are; who sees it joins."""
    member, apart = company.execute(), company.execute(through=unshare(*OWN_PIDS))
    member.do(make, **settings)
    member.stop()
    text, took = apart.do(surroundings.attach_without_answer, name)
    assert f"process {member.pid}" in text, text
    assert 0.3 <= took < TIMEOUT_S
    if joining.can_copy_descriptors():
        with attach(name) as pool:
            use(pool)
    member.resume()
    apart.do(joining.attach, name)
    apart.do(lease_once)


# Mounts ---------------------------------------------------------------------------------------------------------------


def test_a_dev_shm_that_fills_up() -> None:
    """Breaks when memory is not reserved at creation (SIGBUS), or when a refused pool leaves something."""
    in_world(surroundings.a_dev_shm_that_fills_up, mounts="mount -t tmpfs -o size=8m,nr_inodes=64 tmpfs /dev/shm")


def test_a_proc_that_hides_others() -> None:
    in_world(surroundings.a_proc_that_hides_others, mounts=f"{TMPFS}; mount -o remount,hidepid=2 /proc")


def test_no_proc_at_all() -> None:
    in_world(surroundings.no_proc_at_all)


def test_an_inspector_that_may_not_write() -> None:
    in_world(surroundings.an_inspector_that_may_not_write)


# Refusals of the kernel -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_container_that_forbids_to_copy(company: Company, settings: dict[str, Any], name: str, number: int) -> None:
    """Who asks is answered; who is not answered says so in its time."""
    member, newcomer = company.execute(), company.execute()
    member.do(make, **settings)
    newcomer.do(surroundings.refuse_copying, number)
    newcomer.do(joining.attach, name)
    assert newcomer.do(lease_once) == member.do(lease_once)
    newcomer.do(joining.leave)
    member.stop()
    text, _ = newcomer.do(surroundings.attach_without_answer, name)
    assert f"process {member.pid}" in text
    assert "see that one of them uses it, or stop them" in text
    member.resume()
    newcomer.do(joining.attach, name)
    newcomer.do(lease_once)


# Clocks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", ["36000", "-5"])
def test_another_time_namespace_is_refused(company: Company, settings: dict[str, Any], name: str, offset: str) -> None:
    """Its CLOCK_MONOTONIC is another: it would take living leases for overdue, and hold back everybody's dials for
    hours. Breaks when it may join; who has the same offset may."""
    ahead = unshare("--time", "--monotonic", offset, "--fork", "--kill-child")
    one, same, other = company.execute(through=ahead), company.execute(through=ahead), company.execute()
    one.do(make, **settings)
    same.do(joining.attach, name)
    assert same.do(lease_once) == one.do(lease_once)
    for join in (lambda: other.do(make, **settings), lambda: other.do(joining.attach, name)):
        with pytest.raises(InvalidConfig, match=rf"time namespace of '{offset} 0'.* this one of '0 0'"):
            join()
    same.do(joining.leave)
    one.do(joining.leave)
    other.do(make, **settings)
    with pytest.raises(InvalidConfig, match=rf"time namespace of '0 0'.* this one of '{offset} 0'"):
        one.do(make, **settings)
    other.do(lease_once)


# Limits ---------------------------------------------------------------------------------------------------------------

NO_MEMORY = "Cannot allocate memory, so slab '{name}' cannot be mapped"


@pytest.mark.parametrize(
    ("what", "value", "make_fails", "join_fails"),
    [
        ("FSIZE", 0, "RLIMIT_FSIZE", ""),
        ("FSIZE", 4096, "RLIMIT_FSIZE", ""),
        ("AS", 1 << 20, NO_MEMORY, NO_MEMORY),
        ("MEMLOCK", 0, "", ""),
        ("SIGPENDING", 0, "", ""),
        ("STACK", 1 << 16, "", ""),
    ],
)
def test_limits(
    company: Company, settings: dict[str, Any], name: str, what: str, value: int, make_fails: str, join_fails: str
) -> None:
    """Each call says what is missing, or does not mind; no slot is lost, and nothing is left of what was refused."""
    keeper, poor, joiner, user = (company.fork() for _ in range(4))
    user_pool = keeper.do(make, **settings)
    assert user.do(joining.attach, name) == user_pool
    for worker in (poor, joiner, user):
        worker.do(surroundings.limit, what, value)
    user.do(surroundings.tend)
    before = set(joining.segment_of(name).parent.glob(f"{slab.prefix()}.{poor.pid}-*"))
    for worker, task, args, fails in (
        (poor, make, (settings["target"],), make_fails),
        (joiner, joining.attach, (name,), join_fails),
    ):
        if fails:
            with pytest.raises((OSError, InvalidConfig), match=fails.format(name=".*")):
                worker.do(task, *args)
        else:
            worker.do(task, *args)
            worker.do(surroundings.tend)
            worker.do(joining.leave)
    assert set(joining.segment_of(name).parent.glob(f"{slab.prefix()}.{poor.pid}-*")) == before == set()
    assert len(keeper.do(every_slot)) == CAP


def test_no_more_threads() -> None:
    """RLIMIT_NPROC: nobody answers newcomers or maintains, and whoever calls is served."""
    in_world(surroundings.no_more_threads)


def test_a_wall_clock_that_is_set_to_and_fro(
    company: Company, settings: dict[str, Any], name: str, tmp_path: Path
) -> None:
    """Breaks when a timeout, an age or a lifetime is taken from it: by the clock of one member hours have passed."""
    shim = surroundings.clock_setter(tmp_path)
    settings |= {"idle_timeout": 600.0, "max_lifetime": 1200.0, "leak_timeout": 900.0, "leak_action": "revoke"}
    settings["maintenance_interval"] = math.inf
    odd, other = company.execute(LD_PRELOAD=shim, CLOCK_STEP_S="36000"), company.execute()
    odd.do(make, **settings)
    other.do(make, **settings)
    looks = odd.do(surroundings.wall_clock)
    assert max(looks) - min(looks) > 70_000, "the shim does nothing"
    numbers = odd.do(every_slot)
    for holder, worker in ((odd, other), (other, odd)):
        assert {holder.do(hold), holder.do(hold)} == numbers
        for process in (odd, other):
            process.do(surroundings.maintain)
            took, ages, use = process.do(surroundings.times_of)
            assert 0.05 <= took < TIMEOUT_S
            assert all(age is not None and 0 <= age < 600 for age in ages), ages
            assert 0 <= use < 600
        waits(worker, name)
        holder.do(give_back, 0, "release")
        assert worker.answer() in numbers
        holder.do(give_back, 0, "release")
    with attach(name) as pool:
        assert lease_every_slot(pool) == numbers, "a connection was ended"
        assert not any(pool.stats().closed.values())
        assert pool.stats().connections["idle"] == CAP


# Signals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("handler", ["runs", "uses", "raises"])
@pytest.mark.parametrize("act", ["get", "drain", "close", "wait_ready"])
def test_a_timer_during_a_wait(server: ExclusiveServer, family: Family, act: str, handler: str) -> None:
    """Each wait lasts its time whatever handlers do meanwhile, and ends at once by what one raises."""
    ran, ended = family.fork(surroundings.under_a_timer, server.url, act, handler).result()
    assert ran >= 20, "the handler did not run during the wait"
    assert (ended == "Rude") == (handler == "raises")
    assert ended in ("Rude", {"drain": "int", "close": "int"}.get(act, "PoolTimeout"))
