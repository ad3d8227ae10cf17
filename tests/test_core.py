"""The core's own tests, in C: compiled here, run here.

`core/test_<stem>.c` tests one stem; `core/crash.c` ends or stops a worker at every step; `core/interleave.c` walks
through the orders of steps, once with plain memory and once with that of a weak machine (`core/weak.h`, which
`core/litmus.c` tests); `core/stress.c` is for the sanitizers. Mutants: faults put into a copy of the core, each of
which one of these programs must find (mutants.py). Weakenings: each order of the core made weaker (weakenings.py).

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

from tests.mutants import MUTANTS, SEED, Mutant
from tests.processes import LONG
from tests.weakenings import MACROS, WEAKENINGS, Weakening, steps_down

HERE = Path(__file__).parent / "core"
CORE = Path(__file__).parent.parent / "shmpool" / "core"
CC = shlex.split(os.environ.get("CC", "cc"))
CFLAGS = ["-std=c11", "-D_GNU_SOURCE", "-g", "-Wall", "-Wextra", "-pthread"]
SECONDS = os.environ.get("SHMPOOL_INTERLEAVE_SECONDS")
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
SHIPPED = Flavour("shipped", ("-O3", "-DNDEBUG", *_stand_ins("clock_gettime")))
WALK = _stand_ins("syscall", "clock_gettime", "usleep", "sched_yield")
KERNEL = {"worker": SEATS, "service": _stand_ins("epoll_ctl", "epoll_wait", "poll", "fstat", "close")}
INTERLEAVE = Flavour("interleave", ("-O2", "-DSHMPOOL_HOOKS", *WALK), KERNEL)
WEAK = Flavour("weak", ("-O2", "-DSHMPOOL_MACHINE", *WALK), KERNEL)
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

    def alone(self, test: str, flavour: Flavour) -> Path:
        """The program of tests/core/<test>.c without any of the core but its headers."""
        out = self.room / f"{flavour.name}-{test}"
        self._compile([*CFLAGS, *flavour.flags, f"-I{CORE}", str(HERE / f"{test}.c"), "-o", str(out)], CORE)
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


@pytest.mark.parametrize(
    "part", ["release", "dial", "retire", *(pytest.param(part, marks=pytest.mark.servers) for part in ("0/2", "1/2"))]
)
def test_killed_after_every_instruction(builder: Builder, part: str) -> None:
    """The code as it is shipped, compiled with the same optimisation and without hooks."""
    check(builder.program("crash", SHIPPED), part, "killed")


@pytest.mark.servers
@pytest.mark.timeout(0)
@pytest.mark.parametrize("part", [f"{number}/8" for number in range(8)] if LONG else ["release"])
def test_the_recovery_killed_after_every_instruction(builder: Builder, part: str) -> None:
    done = _run(builder.program("crash", SHIPPED), part, "twice", seconds=3600)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("part", ["0/4", "1/4", "2/4", "3/4"])
@pytest.mark.timeout(0 if "SHMPOOL_INTERLEAVE_SECONDS" in os.environ else 120)
def test_every_order_of_steps(builder: Builder, part: str) -> None:
    _walk(builder, INTERLEAVE, part, SECONDS or "0.6")


@pytest.mark.servers
@pytest.mark.parametrize("part", ["0/4", "1/4", "2/4", "3/4"])
@pytest.mark.timeout(0 if "SHMPOOL_INTERLEAVE_SECONDS" in os.environ else 120)
def test_every_order_of_steps_in_weak_memory(builder: Builder, part: str) -> None:
    _walk(builder, WEAK, part, SECONDS or "0.3")


def _walk(builder: Builder, flavour: Flavour, part: str, seconds: str) -> None:
    done = _run(builder.program("interleave", flavour), part, seconds, SEED, seconds=100 + 20 * float(seconds))
    assert done.returncode == 0, done.stderr


def test_the_weak_memory_is_that_of_c11(builder: Builder) -> None:
    check(builder.alone("litmus", WEAK))


def test_stress(builder: Builder) -> None:
    check(builder.program("stress", PLAIN), "20000", SEED)


@pytest.mark.sanitize
@pytest.mark.parametrize("stem", STEMS)
def test_stem_under_address_sanitizer(builder: Builder, stem: str) -> None:
    check(builder.program(f"test_{stem}", ADDRESS))


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "stem", ["account", "descriptors", "events", "pool", "rendezvous", "service", "steering", "upstream"]
)
def test_stem_under_thread_sanitizer(builder: Builder, stem: str) -> None:
    check(builder.program(f"test_{stem}", THREAD))


@pytest.mark.sanitize
@pytest.mark.parametrize("flavour", [ADDRESS, THREAD], ids=lambda flavour: flavour.name)
def test_stress_under_sanitizers(builder: Builder, flavour: Flavour) -> None:
    check(builder.program("stress", flavour), "20000", SEED)


# ---- weakenings ----


def test_each_order_of_the_core_is_weakened() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(CORE.glob("*.[ch]")) if path.stem != "atomics")
    asked = {(tag, macro) for macro, tag in re.findall(rf"\b({'|'.join(MACROS)})\((\w+)", text)}
    assert [(each.tag, each.macro, each.to) for each in sorted(WEAKENINGS, key=_place)] == [
        (tag, macro, to) for tag, macro in sorted(asked) for to in steps_down(macro)
    ]


def test_each_macro_asks_for_the_order_that_is_weakened() -> None:
    text = re.sub(r"\\\n\s*", "", (CORE / "atomics.h").read_text(encoding="utf-8"))
    said = re.findall(r"#define (\w+)\(tag, .*SHM_CALL\(tag, (\w+), .*?memory_order_(\w+)", text)
    assert {macro: (call, order) for macro, call, order in said if order != "relaxed"} == MACROS


def _place(weakening: Weakening) -> tuple[str, str, int]:
    return weakening.tag, weakening.macro, steps_down(weakening.macro).index(weakening.to)


@pytest.mark.servers
@pytest.mark.timeout(0 if "SHMPOOL_INTERLEAVE_SECONDS" in os.environ else 120)
@pytest.mark.parametrize(
    "weakening",
    [pytest.param(each, id=f"{each.switch[7:]}-{each.scenario}") for each in WEAKENINGS if each.scenario],
)
def test_a_weaker_order_is_found_or_not(builder: Builder, weakening: Weakening) -> None:
    """Where this says that one is found which is said not to be: its order is needed after all; say so in the list."""
    assert weakening.scenario
    seconds = "60" if weakening.found else SECONDS or "0.3"
    program = builder.program("interleave", WEAK)
    done = _run(program, weakening.switch, weakening.scenario, seconds, SEED, seconds=100 + float(seconds))
    assert done.returncode == weakening.found, done.stderr
    if weakening.found:
        [line] = re.findall(r"^replay: interleave (.+)$", done.stderr, re.MULTILINE)
        again = _run(program, *line.split())
        assert again.returncode == 1
        assert "which is older than" in again.stdout


# ---- mutants ----

TRIES = 8  # of a program that races: one run finds each fault in eight of ten, or more


def _flavour(mutant: Mutant) -> Flavour:
    return {"crash": CRASH, "interleave": INTERLEAVE, "stress": THREAD}.get(mutant.program, PLAIN)


def _marks(mutant: Mutant) -> list[pytest.MarkDecorator]:
    marks = [pytest.mark.sanitize] if _flavour(mutant) is THREAD else [pytest.mark.servers]
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
    program = builder.program(mutant.program, _flavour(mutant), core, tmp_path)
    for _ in range(TRIES):
        try:
            done = _run(program, *mutant.arguments, seconds=30 if _flavour(mutant) is PLAIN else 110)
        except subprocess.TimeoutExpired:  # it waits for what will never be: that is found, too
            return
        if done.returncode != 0:
            return
    pytest.fail(f"nobody finds that {mutant.name}")
