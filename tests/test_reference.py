"""A pool of many processes against a model that fits on a page: whatever is done to it, in whatever order, both agree.

Hypothesis draws stories: workers are forked, spawned, executed, and fork themselves; they lease, return, discard, wait,
leave, are stopped, go on and are killed; the pool is resized, paused, evicted; the server closes what is idle. After
each step the model says which connections are leased and by whom, which lie idle, how every call ended, why every
connection ended; the pool's own statistics, and the server, must say the same. A story that fails is printed;
SHMPOOL_TEST_SEED, which is printed too, draws the same stories again, and SHMPOOL_TEST_SHRINK=1 cuts one down to its
shortest form (minutes).

    SHMPOOL_TEST_STORIES=5000 pytest tests/test_reference.py     # how many; else 25, or 1500

Not here: what happens at the same time (test_storm, test_day, core/interleave.c). Here one thing is done at a time.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from shmpool import Pool, PoolExhausted, PoolTimeout
from shmpool.stats import FAILURES, SOURCES
from tests.joining import (
    Company,
    Way,
    Worker,
    attach,
    fork_and_lease,
    fresh_name,
    give_back,
    keep_one,
    leave,
    use_kept_one,
)
from tests.processes import LONG, chance, lease_every_slot, until
from tests.servers import ExclusiveServer

STORIES = int(os.environ.get("SHMPOOL_TEST_STORIES", 1500 if LONG else 25))
STEPS, MOST, WORKERS = 40, 4, 4
SETTINGS: dict[str, Any] = {
    "max_connections": 3,
    "resize_limit": MOST,
    "min_connections": 0,
    "max_workers": 64,
    "local_cache_size": 2,
    "alive_bypass": 0,
    "maintenance_interval": math.inf,
}
IN_VAIN_S = 0.002


# ---- the model -------------------------------------------------------------------------------------------------------


@dataclass
class Member:
    """A worker, and the numbers of what it has on lease, in the order in which it got them."""

    worker: Worker
    leased: list[int] = field(default_factory=list)
    stopped: bool = False


class Story(RuleBasedStateMachine):
    """What there must be, kept beside what there is."""

    server: ExclusiveServer
    company: Company

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(self.server.url, name=fresh_name(), **SETTINGS)
        self.members: list[Member] = []
        self.idle: set[int] = set()
        self.cut: set[int] = set()  # idle ones that the server has closed
        self.doomed: dict[int, str] = {}  # leased ones that end at their return, and what for
        self.slot: dict[int, int] = {}  # in which each lies; those from the cap on are beyond it
        self.cap, self.paused = SETTINGS["max_connections"], False
        self.calls: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()

    # -- who there is --

    def able(self) -> list[Member]:
        return [member for member in self.members if not member.stopped]

    def holders(self) -> list[Member]:
        return [member for member in self.able() if member.leased]

    def leased(self) -> list[int]:
        return [number for member in self.members for number in member.leased]

    def has_one_free(self) -> bool:
        return not self.paused and (len(self.leased()) < self.cap or bool(self.idle))

    @initialize()
    def begin(self) -> None:
        self.hire("fork")
        self.hire("fork")

    @rule(way=st.sampled_from(["fork"] * 12 + ["spawn", "forkserver", "execute"]))
    def hire(self, way: Way) -> None:
        if len(self.members) == WORKERS:
            return
        worker = self.company.start(way, None if way == "execute" else self.pool)
        if way == "execute":
            worker.do(attach, self.pool.name)
        self.members.append(Member(worker))

    # -- leasing --

    @precondition(lambda self: self.able())
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        member = data.draw(st.sampled_from(self.able()))
        if not self.has_one_free():
            self.calls["exhausted"] += 1
            with pytest.raises(PoolExhausted):
                member.worker.do(keep_one)
            self.take_note_of_the_cut()
            return
        before = self.idle | self.cut
        number = member.worker.do(keep_one)
        self.calls["successes"] += 1
        assert number not in self.cut
        assert number in self.idle or not self.idle or number > max([*before, *self.leased()]), "it was not reused"
        assert number in self.idle or not self.idle, "a new one was opened beside an idle one"
        self.idle.discard(number)
        member.leased.append(number)
        self.take_note_of_the_cut()

    @precondition(lambda self: self.able() and not self.has_one_free())
    @rule(data=st.data())
    def wait_in_vain(self, data: st.DataObject) -> None:
        member = data.draw(st.sampled_from(self.able()))
        self.calls["timeouts"] += 1
        with pytest.raises(PoolTimeout):
            member.worker.do(keep_one, timeout=IN_VAIN_S)
        self.take_note_of_the_cut()

    @precondition(lambda self: self.holders())
    @rule(data=st.data(), how=st.sampled_from(["release", "release", "release", "discard"]))
    def give_back(self, data: st.DataObject, how: str) -> None:
        member = data.draw(st.sampled_from(self.holders()))
        place = data.draw(st.integers(0, len(member.leased) - 1))
        member.worker.do(give_back, place, how)
        self.returned(member.leased.pop(place), how)

    def returned(self, number: int, how: str) -> None:
        reason = self.doomed.pop(number, None)
        if how == "discard":
            self.ended["error"] += 1
        elif reason is not None:
            self.ended[reason] += 1
        else:
            self.idle.add(number)

    @precondition(lambda self: self.holders())
    @rule(data=st.data())
    def use_it(self, data: st.DataObject) -> None:
        member = data.draw(st.sampled_from(self.holders()))
        member.worker.do(use_kept_one, data.draw(st.integers(0, len(member.leased) - 1)))

    @precondition(lambda self: len(self.able()) > 1 and self.holders() and not self.has_one_free() and not self.paused)
    @rule(data=st.data())
    def hand_over(self, data: st.DataObject) -> None:
        """Somebody waits; what is returned is his."""
        giver = data.draw(st.sampled_from(self.holders()))
        taker = data.draw(st.sampled_from([member for member in self.able() if member is not giver]))
        number = giver.leased[0]
        taker.worker.tell(keep_one, timeout=20)
        until(lambda: self.pool.stats().waiting == 1, "it waits")
        goes_on = number not in self.doomed
        giver.worker.do(give_back, 0, "release")
        giver.leased.pop(0)
        if not goes_on:
            self.returned(number, "release")
        if not goes_on and not self.has_one_free():
            taker.worker.kill()  # it would wait for longer than this story lasts
            assert self.pool.recover() == len(taker.leased)
            self.gone(taker, "owner_died")
            return
        got = taker.worker.answer()
        assert (got == number) is goes_on
        taker.leased.append(got)
        self.calls["successes"] += 1
        self.take_note_of_the_cut()

    @precondition(lambda self: self.able())
    @rule(data=st.data())
    def fork_and_lease(self, data: st.DataObject) -> None:
        member = data.draw(st.sampled_from(self.able()))
        free = self.has_one_free()
        outcome = member.worker.do(fork_and_lease)
        assert outcome == ("leased" if free else "exhausted")
        self.calls["successes" if free else "exhausted"] += 1
        if free and not self.idle:
            self.look_for_the_new_one()
        self.take_note_of_the_cut()

    def look_for_the_new_one(self) -> None:
        """It was opened, used and returned; nobody told us its number."""
        self.idle |= {one.id for one in self.pool.stats().slots if one.state == "idle"} - self.cut

    # -- ends --

    def gone(self, member: Member, reason: str) -> None:
        self.members.remove(member)
        self.ended[reason] += len(member.leased)
        for number in member.leased:
            self.doomed.pop(number, None)

    @precondition(lambda self: len(self.members) > 1)
    @rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        member = data.draw(st.sampled_from(self.members))
        member.worker.kill()
        assert self.pool.recover() == len(member.leased)
        self.gone(member, "owner_died")

    @precondition(lambda self: len(self.able()) > 1)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        member = data.draw(st.sampled_from(self.able()))
        member.worker.do(leave)
        member.worker.end()
        self.gone(member, "shutdown")

    @precondition(lambda self: len(self.able()) > 1)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        member = data.draw(st.sampled_from(self.able()))
        member.worker.stop()
        member.stopped = True

    @precondition(lambda self: len(self.able()) < len(self.members))
    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        member = data.draw(st.sampled_from([member for member in self.members if member.stopped]))
        member.worker.resume()
        member.stopped = False

    # -- the pool --

    @rule(cap=st.integers(1, MOST))
    def resize(self, cap: int) -> None:
        self.pool.resize(cap)
        self.cap = cap
        beyond = {number for number in self.idle | self.cut if self.slot[number] >= cap}
        self.ended["resized"] += len(beyond)
        self.idle -= beyond
        self.cut -= beyond
        self.doomed |= {number: "resized" for number in self.leased() if self.slot[number] >= cap}

    @rule()
    def pause_or_resume(self) -> None:
        self.pool.resume() if self.paused else self.pool.pause()
        self.paused = not self.paused

    @rule(leased=st.booleans())
    def evict(self, leased: bool) -> None:
        found = len(self.idle) + len(self.cut) + (len(self.leased()) if leased else 0)
        assert self.pool.evict(leased=leased) == found
        self.ended["evicted"] += len(self.idle) + len(self.cut)
        self.idle.clear()
        self.cut.clear()
        if leased:
            # What lies beyond the cap ends for that, whoever else has named it: evict() looks after the cap, too.
            self.doomed |= {one: "resized" if self.slot[one] >= self.cap else "evicted" for one in self.leased()}

    @precondition(lambda self: self.idle)
    @rule()
    def server_closes_what_is_idle(self) -> None:
        """Which those are only the server knows; the leased ones have no word under way, so it asks us."""
        if self.leased():
            return
        self.server.close_connections()
        self.cut |= self.idle
        self.idle.clear()

    def take_note_of_the_cut(self) -> None:
        """Some were met, and ended."""
        left = {one.id for one in self.pool.stats().slots if one.state == "idle"}
        self.ended["broken"] += len(self.cut - left)
        self.cut &= left

    # -- and both agree --

    @invariant()
    def agree(self) -> None:
        stats = self.pool.stats()
        for one in stats.slots:
            assert self.slot.setdefault(one.id, one.index) == one.index
        there = {one.id: (one.state, one.holder) for one in stats.slots}
        expected: dict[int, tuple[str, int | None]] = dict.fromkeys(self.idle | self.cut, ("idle", None))
        for member in self.members:
            expected |= dict.fromkeys(member.leased, ("leased", member.worker.pid))
        assert there == expected
        assert (stats.max_connections, stats.state) == (self.cap, "paused" if self.paused else "open")
        ended = {reason: count for reason, count in stats.closed.items() if count}
        assert ended == {reason: count for reason, count in self.ended.items() if count}
        assert stats.created == len(expected) + sum(self.ended.values())
        calls = {name: getattr(stats, name) for name in FAILURES}
        calls["successes"] = sum(getattr(stats, name) for name in SOURCES)
        assert {name: count for name, count in calls.items() if count} == {
            name: count for name, count in self.calls.items() if count
        }
        assert stats.waiting == 0
        figures = self.server.stats()
        assert figures["violations"] == 0, figures["violation_log"]
        until(lambda: self.server.stats()["open"] == len(expected) - len(self.cut), "the server agrees", 5)

    def teardown(self) -> None:
        for member in self.members:
            member.worker.close()
        if self.paused:
            self.pool.resume()
        self.pool.recover()
        if self.cap == self.pool.config.max_connections:
            lease_every_slot(self.pool)
        self.pool.close()
        until(lambda: self.server.stats()["open"] == 0, "nothing is left")


@pytest.mark.timeout(0 if STORIES > 100 else 120)
def test_pool_and_model_agree(server: ExclusiveServer) -> None:
    with Company() as company:
        Story.server, Story.company = server, company
        chosen = settings(
            max_examples=STORIES,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, *([Phase.shrink] if "SHMPOOL_TEST_SHRINK" in os.environ else [])],
        )
        run_state_machine_as_test(seed(chance().randrange(1 << 32))(Story), settings=chosen)  # type: ignore[no-untyped-call]
