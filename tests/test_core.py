"""The core's own tests, in C: compiled here, run here.

`core/test_<stem>.c` tests one stem; `core/crash.c` ends or stops a worker at every step; `core/interleave.c` walks
through the orders of steps; `core/stress.c` is for the sanitizers. Mutants: faults put into a copy of the core, each of
which one of these programs must find; a test that never fails proves nothing.

The walk through the orders is short by default; SHMPOOL_INTERLEAVE_SECONDS gives each scenario longer.
SHMPOOL_SEED gives the random parts another seed; every program prints its own.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "core"
CORE = Path(__file__).parent.parent / "shmpool" / "core"
CC = shlex.split(os.environ.get("CC", "cc"))
CFLAGS = ["-std=c11", "-D_GNU_SOURCE", "-g", "-Wall", "-Wextra", "-pthread"]
SECONDS = os.environ.get("SHMPOOL_INTERLEAVE_SECONDS", "0.6")
SEED = os.environ.get("SHMPOOL_SEED", "0x9e3779b97f4a7c15")
STEMS = sorted(path.stem.removeprefix("test_") for path in HERE.glob("test_*.c"))


@dataclass(frozen=True)
class Flavour:
    """How core and tests are compiled together; `special` adds flags for one file."""

    name: str
    flags: tuple[str, ...]
    special: dict[str, tuple[str, ...]] = field(default_factory=dict, hash=False)

    def of(self, source: Path) -> list[str]:
        return [*CFLAGS, *self.flags, *self.special.get(source.stem, ())]


def _stand_ins(*names: str, prefix: str = "stand_in_") -> tuple[str, ...]:
    return tuple(f"-D{name}={prefix}{name}" for name in names)


SEATS = _stand_ins(
    "seat_open", "seat_close", "byte_lock", "byte_unlock", "byte_is_locked", "family_join", prefix="core_"
)
PLAIN = Flavour("plain", ("-O1",))
CRASH = Flavour("crash", ("-O1", "-DSHMPOOL_HOOKS", *_stand_ins("clock_gettime")))
INTERLEAVE = Flavour(
    "interleave",
    ("-O2", "-DSHMPOOL_HOOKS", *_stand_ins("syscall", "clock_gettime", "usleep", "sched_yield")),
    {"worker": SEATS},
)
ADDRESS = Flavour("address", ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"))
THREAD = Flavour("thread", ("-O1", "-fsanitize=thread"))


def _sources(core: Path) -> list[Path]:
    return sorted(path for path in core.glob("*.c") if not path.stem.startswith("module"))


def _run(*command: object, seconds: float = 110) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=seconds, check=False, errors="replace"
    )
    print(shlex.join(map(str, command)), done.stdout, done.stderr, sep="\n")
    return done


class Builder:
    """Compiles each file once for each flavour."""

    def __init__(self, room: Path) -> None:
        self.room = room
        self.made: dict[tuple[str, Path], Path] = {}

    def program(self, test: str, flavour: Flavour, core: Path = CORE, room: Path | None = None) -> Path:
        """The program of tests/core/<test>.c with this core. In a mutated core only what differs is compiled anew."""
        source = HERE / f"{test}.c"
        room = room or self.room
        out = room / f"{flavour.name}-{test}"
        if (flavour.name, out) not in self.made:
            parts = [self._object(path, flavour, core, room) for path in [*_sources(core), source]]
            self._compile([*CFLAGS, *flavour.flags, *map(str, parts), "-o", str(out)], core)
            self.made[flavour.name, out] = out
        return out

    def _object(self, source: Path, flavour: Flavour, core: Path, room: Path) -> Path:
        if core != CORE and not self._differs(source, core):
            return self._object(source if source.parent == HERE else CORE / source.name, flavour, CORE, self.room)
        out = room / f"{flavour.name}-{source.stem}.o"
        if (flavour.name, out) not in self.made:
            self._compile([*flavour.of(source), f"-I{core}", f"-I{HERE}", "-c", str(source), "-o", str(out)], core)
            self.made[flavour.name, out] = out
        return out

    @staticmethod
    def _differs(source: Path, core: Path) -> bool:
        headers = any(path.read_bytes() != (CORE / path.name).read_bytes() for path in core.glob("*.h"))
        return headers or (source.parent == core and source.read_bytes() != (CORE / source.name).read_bytes())

    @staticmethod
    def _compile(arguments: list[str], core: Path) -> None:
        done = _run(*CC, *arguments)
        assert done.returncode == 0, done.stderr
        assert core != CORE or "warning:" not in done.stderr, done.stderr


@pytest.fixture(scope="session")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("core"))


def check(program: Path, *arguments: str) -> None:
    done = _run(program, *arguments)
    assert done.returncode == 0, f"{done.stderr or done.stdout}\nended with {done.returncode}"


# ---- the tests ----


def test_every_stem_of_the_core_has_a_test() -> None:
    stems = {path.stem for path in CORE.glob("*.[ch]")} - {"atomics"}
    assert {stem for stem in stems if not stem.startswith("module")} == set(STEMS)


@pytest.mark.parametrize("stem", STEMS)
def test_stem(builder: Builder, stem: str) -> None:
    check(builder.program(f"test_{stem}", PLAIN))


@pytest.mark.parametrize("how", ["ended", "stopped"])
@pytest.mark.parametrize("part", ["0/3", "1/3", "2/3"])
def test_crash_at_every_step(builder: Builder, part: str, how: str) -> None:
    check(builder.program("crash", CRASH), part, how)


@pytest.mark.parametrize("part", ["0/4", "1/4", "2/4", "3/4"])
@pytest.mark.timeout(0 if "SHMPOOL_INTERLEAVE_SECONDS" in os.environ else 120)
def test_every_order_of_steps(builder: Builder, part: str) -> None:
    done = _run(builder.program("interleave", INTERLEAVE), part, SECONDS, SEED, seconds=100 + 10 * float(SECONDS))
    assert done.returncode == 0, done.stderr


def test_stress(builder: Builder) -> None:
    check(builder.program("stress", PLAIN), "20000", SEED)


@pytest.mark.sanitize
@pytest.mark.parametrize("stem", STEMS)
def test_stem_under_address_sanitizer(builder: Builder, stem: str) -> None:
    check(builder.program(f"test_{stem}", ADDRESS))


@pytest.mark.sanitize
@pytest.mark.parametrize("stem", ["descriptors", "pool", "rendezvous", "steering", "upstream"])
def test_stem_under_thread_sanitizer(builder: Builder, stem: str) -> None:
    check(builder.program(f"test_{stem}", THREAD))


@pytest.mark.sanitize
@pytest.mark.parametrize("flavour", [ADDRESS, THREAD], ids=lambda flavour: flavour.name)
def test_stress_under_sanitizers(builder: Builder, flavour: Flavour) -> None:
    check(builder.program("stress", flavour), "20000", SEED)


# ---- mutants ----


@dataclass(frozen=True)
class Mutant:
    """A fault: `old` in `file` of the core becomes `new`; `program arguments` must then fail."""

    name: str
    file: str
    old: str
    new: str
    program: str
    arguments: tuple[str, ...] = ()
    needs_root: bool = False  # to become another user

    @property
    def flavour(self) -> Flavour:
        return {"crash": CRASH, "interleave": INTERLEAVE, "stress": THREAD}.get(self.program, PLAIN)


def _walk(scenario: str, seconds: float = 8) -> tuple[str, tuple[str, ...]]:
    return "interleave", (scenario, str(seconds), SEED)


MUTANTS = [
    Mutant(
        "a change of a slot is check, then store",
        "slot.h",
        "if (!SHM_CAS_SEQ(slot, slot->word, &expected, next))\n        return false;",
        "if (slot_load(slot) != expected)\n        return false;\n    SHM_STORE_RELEASE(slot, slot->word, next);",
        *_walk("lease"),
    ),
    Mutant(
        "a release is check, then store",
        "pool.h",
        "if (!slot_move(row, &claim->word, pool->worker, SLOT_IDLE))\n        return RELEASE_STALE;",
        "SHM_STORE_RELEASE(slot, row->word, slot_next(claim->word, pool->worker, SLOT_IDLE));",
        *_walk("twins-quiet"),
    ),
    Mutant(
        "the sequence is not raised",
        "slot.h",
        "slot_word(slot_sequence(word) + 1, owner, state)",
        "slot_word(slot_sequence(word), owner, state)",
        "test_pool",
    ),
    Mutant(
        "the change of a slot is relaxed",
        "slot.h",
        "if (!SHM_CAS_SEQ(slot, slot->word, &expected, next))",
        "if (!atomic_compare_exchange_strong_explicit(&slot->word, &expected, next, memory_order_relaxed,"
        " memory_order_relaxed))",
        "stress",
        ("5000", SEED),
    ),
    Mutant(
        "a releaser does not look at the queue after it has released",
        "pool.h",
        "if (SHM_UNLIKELY(SHM_LOAD_SEQ(queue, pool->slab.header->summary)))\n        pool_release_late",
        "if (0)\n        pool_release_late",
        *_walk("wait"),
    ),
    Mutant(
        "a waiter does not say that it waits",
        "waiter.c",
        "    assert_summary(slab, place->cell);\n}",
        "    (void)assert_summary;\n}",
        *_walk("wait"),
    ),
    Mutant(
        "an offer is not checked once more",
        "waiter.c",
        "if (SHM_LOAD_SEQ(offer, slab->waiter_words[seen.cell]) == matched) {",
        "if (matched) {",
        *_walk("offer-or-leave"),
    ),
    Mutant(
        "a group seen empty is not looked at again",
        "waiter.c",
        "if (!search_group(slab, group, WAITER_ANY_BUCKET, &seen, &found))\n        return;",
        "(void)seen, (void)found;\n    if (group < 64)\n        return;",
        *_walk("summary"),
    ),
    Mutant(
        "a leaver keeps the wake-up that it does not need",
        "waiter.c",
        "if (SHM_LOAD_SEQ(futex, slab->waiters[place->cell].futex)",
        "if (0 && SHM_LOAD_SEQ(futex, slab->waiters[place->cell].futex)",
        *_walk("two-waiters"),
    ),
    Mutant(
        "two wake-ups fall together in one waiter",
        "waiter.c",
        "continue; /* another releaser woke it",
        "return; /* another releaser woke it",
        *_walk("two-waiters"),
    ),
    Mutant(
        "an offer swallows the wake-up before it",
        "waiter.c",
        "if (had || SHM_LOAD_SEQ(",
        "if (SHM_LOAD_SEQ(",
        *_walk("two-waiters"),
    ),
    Mutant(
        "a promise that did not come is kept",
        "waiter.c",
        "if (!matched || !SHM_CAS_SEQ(offer, slab->waiter_words[place->cell], &word, again))",
        "if (!matched || word != again)",
        "test_waiter",
    ),
    Mutant(
        "tickets do not wrap around",
        "waiter.h",
        "return (int32_t)((a - b) << 5) < 0;",
        "return a < b;",
        "test_waiter",
    ),
    Mutant("offers never expire", "pool.c", "now - since > WAITER_OFFER_TTL_NS", "now < since", "test_waiter"),
    Mutant(
        "the list of empty slots is trusted",
        "pool.c",
        "taken == EMPTY_NOT && slot < bound; slot++)",
        "taken == EMPTY_NOT && slot < bound * 0; slot++)",
        "crash",
        ("dial", "ended"),
    ),
    Mutant(
        "the lists are not idempotent",
        "freelist.c",
        "if (!(SHM_LOAD(freelist, *word) & bit))",
        "if (SHM_ADD(freelist, *word, bit), false)",
        "test_freelist",
    ),
    Mutant(
        "recovery looks for life, and does not lock",
        "recovery.c",
        "byte_is_locked(fd, index) || !byte_lock(fd, index)",
        "byte_is_locked(fd, index)",
        *_walk("newcomer"),
    ),
    Mutant(
        "recovery passes over offers",
        "recovery.c",
        "if (slot_owner(word) != dead || state == SLOT_EMPTY)",
        "if (slot_owner(word) != dead || state == SLOT_EMPTY || state == SLOT_OFFERED)",
        "test_recovery",
    ),
    Mutant(
        "recovery does not go on where a recoverer died",
        "recovery.c",
        "if (slot_owner(word) != dead || state == SLOT_EMPTY)",
        "if (slot_owner(word) != dead || state == SLOT_EMPTY || state == SLOT_RETIRING)",
        "crash",
        ("recover", "ended"),
    ),
    Mutant(
        "recovery leaves the dead in the queue",
        "waiter.c",
        "while (word != WAITER_FREE_WORD && waiter_owner(word) == owner)",
        "while (word != WAITER_FREE_WORD && !owner)",
        "crash",
        ("enter-and-leave", "ended"),
    ),
    Mutant(
        "who takes an index does not sweep what is left there",
        "pool.c",
        "    recovery_sweep(pool, pool->worker);",
        "    (void)recovery_sweep;",
        *_walk("newcomer"),
    ),
    Mutant(
        "who leaves closes the seat under a sweep",
        "pool.c",
        "while (atomic_exchange_explicit(&pool->recovering, true, memory_order_acquire))",
        "while (0)",
        *_walk("leave-under-sweep"),
    ),
    Mutant(
        "a forked child keeps the seats",
        "worker.c",
        "seat = seat->next)\n        close_now(seat);",
        "seat = seat->next)\n        (void)close_now;",
        "test_worker",
    ),
    Mutant("a fork does not wipe", "worker.c", "madvise(page, size, MADV_WIPEONFORK)", "0", "test_worker"),
    Mutant("two descriptors in a letter are taken", "mailbox.c", "count == 1)", "count >= 1)", "test_mailbox"),
    Mutant(
        "a child that runs another program keeps the letters", "mailbox.c", " | MSG_CMSG_CLOEXEC", "", "test_mailbox"
    ),
    Mutant(
        "the middle of a set may be of another slab",
        "descriptors.c",
        "memcmp(head->slab_id, first->slab_id, sizeof head->slab_id) == 0 && ",
        "",
        "test_descriptors",
    ),
    Mutant(
        "a surplus descriptor stays open",
        "descriptors.c",
        "set->count, count)) {\n            for (uint32_t i = 0; i < count; i++)",
        "set->count, count)) {\n            for (uint32_t i = 0; i < 0 * count; i++)",
        "test_descriptors",
    ),
    Mutant(
        "what came of a set that breaks off stays open",
        "descriptors.c",
        "    if (error)\n        descriptors_close(set);",
        "    if (error)\n        set->count = 0, descriptors_close(set);",
        "test_descriptors",
    ),
    Mutant(
        "a message with descriptors that found no room is taken for another kind of fault",
        "descriptors.c",
        "message.msg_flags & MSG_CTRUNC ? EMFILE",
        "message.msg_flags & MSG_OOB ? EMFILE",
        "test_descriptors",
    ),
    Mutant(
        "a program that is run keeps the received descriptors",
        "descriptors.c",
        " | MSG_CMSG_CLOEXEC",
        "",
        "test_descriptors",
    ),
    Mutant(
        "a send that waits cannot be stopped",
        "descriptors.c",
        "stop < 0 ? 1 : 2",
        "stop < 0 ? 1 : 1",
        "test_descriptors",
    ),
    Mutant(
        "another user is answered",
        "rendezvous.c",
        " && who.uid == geteuid()",
        "",
        "test_rendezvous",
        needs_root=True,
    ),
    Mutant(
        "a fork does not end the thread",
        "rendezvous.c",
        "door->ended_by_fork = atomic_load(&door->open);\n        end_locked(door);",
        "door->ended_by_fork = atomic_load(&door->open);",
        "test_rendezvous",
    ),
    Mutant(
        "a thread that was joined is taken to be gone",
        "rendezvous.c",
        "tries < GONE_TRIES && ",
        "tries < 0 && ",
        "test_rendezvous",
    ),
    Mutant(
        "one of two removers does not wait for the other",
        "segment.c",
        "REMOVER_TRIES = 100",
        "REMOVER_TRIES = 1",
        "test_segment",
    ),
    Mutant(
        "remains are removed without a look whether anybody has them",
        "segment.c",
        "return byte_lock(fd, SHM_FAMILY_BYTE);",
        "return true;",
        "test_segment",
    ),
    Mutant(
        "a child keeps the descriptors of its parent's thread",
        "rendezvous.c",
        "    close_descriptors(door);\n    atomic_store",
        "    forget_descriptors(door);\n    atomic_store",
        "test_rendezvous",
    ),
    Mutant(
        "a child by clone() waits for its parent's thread",
        "rendezvous.c",
        "if (door->pid == getpid()) {",
        "if (door->pid) {",
        "test_rendezvous",
    ),
    Mutant(
        "a child by clone() takes its parent's thread for its own",
        "rendezvous.c",
        "door->pid != getpid())",
        "!door->pid)",
        "test_rendezvous",
    ),
    Mutant(
        "a handler of the program may run on the thread",
        "rendezvous.c",
        "sigfillset(&all);",
        "sigemptyset(&all);",
        "test_rendezvous",
    ),
    Mutant(
        "a member that shall stop answers as long as newcomers come",
        "rendezvous.c",
        "while (!is_stopped(door, 0));",
        "while (door->set);",
        "test_rendezvous",
    ),
    Mutant(
        "a member without room keeps newcomers for itself",
        "rendezvous.c",
        "|| door->spare < 0)",
        "|| door->spare > 0)",
        "test_rendezvous",
    ),
    Mutant(
        "a parent does not answer again after a fork",
        "rendezvous.c",
        "if (door->ended_by_fork && door->fork)",
        "if (0)",
        "test_pool",
    ),
    Mutant(
        "an attached set may have another mailbox",
        "pool.c",
        "if (inode_of(pool->mailboxes[i]) != pool->slab.slots[i].mailbox_inode)",
        "if (!pool->slab.slots[i].mailbox_inode)",
        "test_pool",
    ),
    Mutant(
        "an attached set may have another listener",
        "pool.c",
        "inode_of(pool->shared.listener) != pool->slab.header->listener_inode)",
        "!pool->shared.listener)",
        "test_pool",
    ),
    Mutant(
        "an attached set may have more mailboxes than the slab has slots",
        "pool.c",
        "return set->count == slab->layout.max_slots && ",
        "return set->count >= slab->layout.max_slots && ",
        "test_pool",
    ),
    Mutant(
        "an attached set may be announced as that of another slab",
        "pool.c",
        " && memcmp(slab->header->id, set->slab_id, sizeof set->slab_id) == 0",
        "",
        "test_pool",
    ),
    Mutant(
        "an attached slab may be another user's",
        "pool.c",
        " || status.st_uid != geteuid()",
        "",
        "test_pool",
        needs_root=True,
    ),
    Mutant("who attaches is not of the family", "pool.c", "!family_join(pool->slab_fd) || ", "", "test_pool"),
    Mutant(
        "who left answers newcomers",
        "pool.c",
        "    uint32_t phase = FORK_READY;\n    if (pool->door)\n        rendezvous_close(pool->door);",
        "    uint32_t phase = FORK_READY;",
        "test_pool",
    ),
    # the state of the server
    Mutant(
        "a dial that began earlier counts as another failure",
        "upstream.c",
        "if (upstream_is_down(word) && word != seen)",
        "if (upstream_is_down(word) && !seen)",
        "test_upstream",
    ),
    Mutant(
        "an older failure changes the state of the server",
        "upstream.c",
        "if (upstream_is_down(word) && word != seen)",
        "if (upstream_is_down(word) && !seen)",
        *_walk("probe-late-failure"),
    ),
    Mutant(
        "who may dial is check, then store",
        "upstream.c",
        "} while (!SHM_CAS_SEQ(upstream, slab->header->upstream, &word, next));\n    *seen = next;",
        "} while (word != load(slab) && (word = load(slab), true));\n"
        "    SHM_SWAP_SEQ(upstream, slab->header->upstream, next);\n    *seen = next;",
        *_walk("probe"),
    ),
    Mutant("the time to the next probe does not double", "upstream.c", "length *= 2;", "length += 0;", "test_upstream"),
    Mutant(
        "a failed probe is the first failure again",
        "upstream.c",
        "upstream_is_down(word) ? upstream_step(word) + 1 : 1;",
        "1;",
        "test_upstream",
    ),
    Mutant(
        "a probe begins early by rounding",
        "upstream.c",
        "(retry_ns + 999999) / 1000000",
        "retry_ns / 1000000",
        "test_upstream",
    ),
    Mutant(
        "a herd dials when nothing is known of the server",
        "upstream.c",
        "if (!due && waits)",
        "if (!due && waits && !owner)",
        "test_upstream",
    ),
    Mutant(
        "who cannot wait waits for another to find out",
        "upstream.c",
        "if (!due && waits)",
        "if (!due)",
        "test_upstream",
    ),
    Mutant(
        "a probe that said nothing keeps the right to probe",
        "upstream.c",
        "    SHM_CAS_SEQ(upstream, slab->header->upstream, &word, next);\n}\n\nvoid upstream_suspect",
        "    (void)next, (void)word;\n}\n\nvoid upstream_suspect",
        "test_upstream",
    ),
    Mutant(
        "recovery leaves the right to probe with the dead",
        "recovery.c",
        "    upstream_forget(&pool->slab, dead, clock_now());",
        "    (void)upstream_forget;",
        "crash",
        ("probe-fails", "ended"),
    ),
    Mutant(
        "the first success wakes nobody",
        "upstream.c",
        "            waiter_wake_all(slab); /* those",
        "            (void)waiter_wake_all; /* those",
        *_walk("herd"),
    ),
    Mutant(
        "a connection that the server closed is no news of it",
        "pool.c",
        "if (reason == SHM_T_closed_broken)",
        "if (reason == SHM_T_COUNT)",
        "test_upstream",
    ),
    Mutant(
        "the server is down, and who waits for a lease that is out is refused",
        "pool.c",
        "if (taken == TAKEN_DOWN && place && (*saw & SAW_BUSY))",
        "if (taken == TAKEN_DOWN && !mask)",
        "test_pool",
    ),
    # dials under way
    Mutant(
        "a dial that somebody waits for is adopted",
        "pool.c",
        "|| !SHM_CAS_SEQ(queue, row->mark, &marked, 0))",
        "|| (SHM_SWAP_SEQ(queue, row->mark, 0), marked != word))",
        "test_pool",
    ),
    Mutant(
        "the mark of an orphan is not compared with the dial",
        "pool.c",
        "uint64_t word = slot_load(row), marked = word;",
        "uint64_t word = slot_load(row), marked = SHM_LOAD_SEQ(queue, row->mark);",
        "test_pool",
    ),
    Mutant(
        "an adoption is check, then store",
        "pool.c",
        "|| !SHM_CAS_SEQ(queue, row->mark, &marked, 0))",
        "||\n            SHM_LOAD_SEQ(queue, row->mark) != marked || (SHM_SWAP_SEQ(queue, row->mark, 0), false))",
        *_walk("adopt-once"),
    ),
    Mutant("a dial for other kinds is adopted", "pool.c", " || (wanted & ~mask) || ", " || !mask || ", "test_pool"),
    Mutant(
        "a caller with a dial under way begins another",
        "pool.c",
        "if (place && place->dialling)",
        "if (place && place->dialling && !mask)",
        "test_pool",
    ),
    Mutant(
        "who leaves its dial too late makes the next one an orphan",
        "pool.c",
        "    if (slot_load(&pool->slab.slots[claim->slot]) == claim->word)\n"
        "        SHM_STORE(hint, pool->slab.slots[claim->slot].mark, claim->word);",
        "    SHM_STORE(hint, pool->slab.slots[claim->slot].mark, slot_load(&pool->slab.slots[claim->slot]));",
        "test_pool",
    ),
    Mutant(
        "the end of a dial whose process died is told as that of a connection",
        "pool.c",
        "bool was_there = ",
        "bool was_there = true || ",
        "test_pool",
    ),
    # the cap
    Mutant(
        "the cap is looked at before the claim only",
        "pool.c",
        "if (SHM_LIKELY(steering_has_permit(&pool->slab, slot))) {",
        "if (SHM_LIKELY(slot < SHM_MAX_SLOTS)) {",
        *_walk("last-permit"),
    ),
    Mutant(
        "permits are counted before the claim",
        "pool.c",
        "slot >= steering_cap(&pool->slab) || !slot_move(row, &word, pool->worker, SLOT_DIALING))\n"
        "        return EMPTY_NOT;\n    if (SHM_LIKELY(steering_has_permit(&pool->slab, slot))) {",
        "slot >= steering_cap(&pool->slab) || !steering_has_room(&pool->slab) ||\n"
        "        !slot_move(row, &word, pool->worker, SLOT_DIALING))\n"
        "        return EMPTY_NOT;\n    if (SHM_LIKELY(slot < SHM_MAX_SLOTS)) {",
        *_walk("last-permit"),
    ),
    Mutant(
        "what is beyond the cap does not count",
        "steering.c",
        "count_used(slab, 0, cap) + beyond <= cap",
        "count_used(slab, 0, cap) <= cap",
        "test_steering",
    ),
    Mutant(
        "two who step back leave the permit to nobody",
        "pool.c",
        "if (steering_has_room(&pool->slab)) /* two",
        "if (!claim) /* two",
        *_walk("last-permit-waiting"),
    ),
    Mutant(
        "the bound is raised after the cap",
        "steering.c",
        "    while (bound < cap && !SHM_CAS_SEQ(cap, slab->header->bound, &bound, cap))\n        ;\n"
        "    uint32_t before = SHM_SWAP_SEQ(cap, slab->header->cap, cap);",
        "    uint32_t before = SHM_SWAP_SEQ(cap, slab->header->cap, cap);\n"
        "    while (bound < cap && !SHM_CAS_SEQ(cap, slab->header->bound, &bound, cap))\n        ;",
        *_walk("grow"),
    ),
    Mutant(
        "a smaller cap lets what is beyond it go on",
        "steering.c",
        "    steering_enforce(slab); /* also",
        "    (void)steering_enforce; /* also",
        "test_steering",
    ),
    Mutant(
        "a larger cap wakes nobody",
        "steering.c",
        "    if (cap > before)\n        waiter_wake_all(slab);",
        "    (void)waiter_wake_all;",
        *_walk("grow"),
    ),
    Mutant(
        "a dial that ends beyond the cap is kept",
        "pool.c",
        "if (claim->slot >= steering_cap(&pool->slab)) /*",
        "if (claim->slot >= SHM_MAX_SLOTS) /*",
        "test_steering",
    ),
    Mutant(
        "a condemned connection comes back like any other",
        "pool.h",
        "(SHM_KIND_UNMAILED | SHM_KIND_ENDING))",
        "SHM_KIND_UNMAILED)",
        "test_steering",
    ),
    Mutant(
        "whichever connection the slot has is condemned",
        "steering.c",
        "if (SHM_LOAD(row, row->connection) != connection || ",
        "if (!connection || ",
        "test_steering",
    ),
    # the states
    Mutant(
        "who steers writes over what was said meanwhile",
        "steering.c",
        "} while (!SHM_CAS_SEQ(queue, slab->header->summary, &summary, said));",
        "} while (SHM_SWAP_SEQ(queue, slab->header->summary, said) == said);",
        *_walk("steer-and-close"),
    ),
    Mutant(
        "who steers wakes nobody",
        "steering.c",
        "    waiter_wake_all(slab);\n    return true;",
        "    return true;",
        *_walk("resume"),
    ),
    Mutant(
        "a pool that is closed can be opened",
        "steering.c",
        "if (state == SHM_POOL_CLOSED || ",
        "if (",
        "test_steering",
    ),
    Mutant(
        "a pause gives to who asks",
        "pool.c",
        "        return TAKEN_PAUSED;",
        "        return TAKEN_LEASED;",
        *_walk("pause"),
    ),
    Mutant(
        "a pause ends what comes back",
        "pool.c",
        "else if (state != SHM_POOL_PAUSED && ",
        "else if (",
        "test_steering",
    ),
    Mutant(
        "a late release wakes in a pause",
        "pool.c",
        "if (state == SHM_POOL_OPEN || (state",
        "if (state == SHM_POOL_OPEN || state == SHM_POOL_PAUSED || (state",
        "test_steering",
    ),
    Mutant(
        "a release in a pause wakes nobody, and the pool is open meanwhile",
        "pool.c",
        "    case SHM_POOL_PAUSED:\n        return release_and_wake(pool, claim, mask);",
        "    case SHM_POOL_PAUSED:\n        (void)release_and_wake;\n"
        "        return slot_move(&pool->slab.slots[claim->slot], &claim->word, pool->worker, SLOT_IDLE) ? RELEASED"
        " : RELEASE_STALE;",
        *_walk("resume"),
    ),
    Mutant(
        "who waits is refused when the pool is drained",
        "pool.c",
        "return place && place->queued ? TAKEN_LEASED : TAKEN_DRAINING;",
        "return TAKEN_DRAINING;",
        "test_steering",
    ),
    Mutant(
        "who comes later is served when the pool is drained",
        "pool.c",
        "return place && place->queued ? TAKEN_LEASED : TAKEN_DRAINING;",
        "return place ? TAKEN_LEASED : TAKEN_DRAINING;",
        "test_steering",
    ),
    Mutant(
        "a drained pool ends what somebody waits for",
        "pool.c",
        "        if (!waiter_first(&pool->slab, mask, &seen))\n            return RELEASE_RETIRE;\n        break;",
        "        (void)seen;\n        return RELEASE_RETIRE;",
        "test_steering",
    ),
    # checks, revoked leases, maintainers
    Mutant(
        "a lease is checked",
        "pool.c",
        "if (slot_state(word) != SLOT_IDLE || !check_is_due(",
        "if (slot_state(word) == SLOT_EMPTY || !check_is_due(",
        "test_pool",
    ),
    Mutant(
        "another's private connection is checked",
        "pool.c",
        "bool usable = is_private ? SHM_LOAD(row, row->private_owner) == pool->worker : ",
        "bool usable = is_private ? pool->worker != 0 : ",
        "test_pool",
    ),
    Mutant(
        "the end of a check wakes nobody",
        "pool.c",
        "    freelist_put_idle(&pool->slab, claim->slot);\n"
        "    if (SHM_LOAD_SEQ(queue, pool->slab.header->summary))\n        pool_release_late(",
        "    freelist_put_idle(&pool->slab, claim->slot);\n    if (!claim)\n        pool_release_late(",
        *_walk("check"),
    ),
    Mutant(
        "the end of a check is not listed",
        "pool.c",
        "    freelist_put_idle(&pool->slab, claim->slot);\n    if (SHM_LOAD_SEQ(",
        "    if (SHM_LOAD_SEQ(",
        "test_pool",
    ),
    Mutant(
        "recovery leaves what the dead one checked",
        "recovery.c",
        "if (slot_owner(word) != dead || state == SLOT_EMPTY)",
        "if (slot_owner(word) != dead || state == SLOT_EMPTY || state == SLOT_CHECKING)",
        "crash",
        ("check-well", "ended"),
    ),
    Mutant(
        "a slot is revoked, whoever has it by now",
        "pool.c",
        "    return slot_move(&pool->slab.slots[claim->slot], &claim->word, pool->worker, SLOT_RETIRING);",
        "    claim->word = slot_load(&pool->slab.slots[claim->slot]);\n"
        "    return slot_may_move(slot_state(claim->word), SLOT_RETIRING) &&\n"
        "           slot_move(&pool->slab.slots[claim->slot], &claim->word, pool->worker, SLOT_RETIRING);",
        *_walk("revoke"),
    ),
    Mutant(
        "nobody helps a maintainer that is stopped",
        "pool.c",
        "now - last > MAINTAINER_PATIENCE_NS",
        "now < last",
        "test_pool",
    ),
    Mutant(
        "who resigns stays the maintainer",
        "pool.c",
        "        byte_unlock(fd, SHM_MAINTAINER_BYTE);",
        "        (void)byte_unlock;",
        "test_pool",
    ),
]


def _marks(mutant: Mutant) -> list[pytest.MarkDecorator]:
    marks = [pytest.mark.sanitize] if mutant.flavour is THREAD else [pytest.mark.servers]
    if mutant.needs_root:
        marks.append(pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user"))
    return marks


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(
            mutant,
            id=re.sub(r"\W+", "-", mutant.name),
            marks=_marks(mutant),
        )
        for mutant in MUTANTS
    ],
)
def test_mutant_is_found(builder: Builder, mutant: Mutant, tmp_path: Path) -> None:
    core = tmp_path / "mutated"
    shutil.copytree(CORE, core, ignore=shutil.ignore_patterns("module*"))
    text = (core / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, f"{mutant.file} has changed: the mutant must be written anew"
    (core / mutant.file).write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    done = _run(builder.program(mutant.program, mutant.flavour, core, tmp_path), *mutant.arguments)
    assert done.returncode != 0, f"nobody finds that {mutant.name}"
