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
@pytest.mark.parametrize("stem", ["descriptors", "pool", "rendezvous"])
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
        "    for (uint32_t slot = 0; slot < pool->slab.layout.max_slots; slot++)\n        if (take_empty_slot(",
        "    for (uint32_t slot = 0; slot < 0; slot++)\n        if (take_empty_slot(",
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
]


def _marks(mutant: Mutant) -> list[pytest.MarkDecorator]:
    marks = [pytest.mark.sanitize] if mutant.flavour is THREAD else []
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
