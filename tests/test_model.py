"""The model of the core's protocols (verify/model/pool.pml), run by spin: it holds, and each of its mutants is found.

What: `CONFIGS` are the sizes and parts that are searched exhaustively, `MUTANTS` the faults, each with the words of the
property that must fail. SHMPOOL_TEST_LONG=1 searches the large ones too (`make verify-model`): half an hour.
The model and the code are held together by the table of changes of a slot: core/slot.c has it as data, the model makes
exactly those changes, and so do the core's own test programs, on a copy of the core that says which it makes.

Memory: 1.5 GB at most in the short form, 7.5 GB in the long one. Not here: what the model says and leaves out (its
opening comment), what that proves (docs/verification.md).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.processes import LONG
from tests.test_core import CC, CORE, CRASH, PLAIN, Builder
from tests.tools import tool

MODEL = Path(__file__).parent.parent / "verify" / "model" / "pool.pml"
MEMORY_MB = 7500 if LONG else 1500

pytestmark = [pytest.mark.servers, pytest.mark.timeout(0 if LONG else 120)]

Defines = tuple[str, ...]
SLOTS: Defines = ("N=2", "S=2", "ROUNDS=2", "DISCARDS", "FAILS", "CHECKS", "EVICTS", "REVOKES")
QUEUE: Defines = ("N=2", "S=1", "FULL", "WAITS")
AWAKE: Defines = (*QUEUE, "NO_SLICE", "KILLS=0")  # no wake-up is lost: nobody ever needs a slice


class Config(NamedTuple):
    """What is searched; `bits` by bitstate, for at most that many minutes."""

    name: str
    defines: Defines
    long: bool = False
    bitstate_minutes: int = 0


CONFIGS = [
    Config("slots", (*SLOTS, "KILLS=1")),
    Config("hints", ("N=2", "S=2", "ROUNDS=2", "KILLS=1", "FULL", "HINTS")),
    Config("queue", (*QUEUE, "GIVES_UP", "KILLS=1", "EARLY=1")),
    Config("offers come to an end", (*QUEUE, "KILLS=1", "OFFERS_END")),
    Config("no wake-up is lost", (*AWAKE, "ROUNDS=2", "GIVES_UP")),
    Config("queue, evicted and revoked", (*QUEUE, "GIVES_UP", "KILLS=0", "EVICTS", "REVOKES", "DISCARDS")),
    Config("slots, 2 kills", (*SLOTS, "KILLS=2"), long=True),
    Config("queue, 2 kills", (*QUEUE, "GIVES_UP", "KILLS=2"), long=True),
    Config("2 workers, 2 slots, all parts, 2 kills", (*SLOTS, "WAITS", "GIVES_UP", "KILLS=2", "ROUNDS=1"), long=True),
    Config("3 workers, no wake-up is lost", (*AWAKE, "N=3"), long=True),
    Config("3 workers, all parts", (*SLOTS, "N=3", "WAITS", "GIVES_UP", "KILLS=1"), long=True, bitstate_minutes=10),
]


class Mutant(NamedTuple):
    """MUTANT_<name> in these sizes and parts must break `property`, the words of an assertion or of an end state."""

    name: str
    defines: Defines
    property: str


EXCLUSIVE = "user[s]==0"
LEASABLE = "state[s]==1"
PERMIT = "open[s]"
STILL = "invalid end state"
MUTANTS = [
    Mutant("RELEASE_IS_CHECK_THEN_STORE", SLOTS, EXCLUSIVE),
    Mutant("SEQUENCE_NOT_RAISED", SLOTS, "state[old]"),
    Mutant("STALE_RELEASE_ACCEPTED", SLOTS, "state[old]"),
    Mutant("LOOK_THEN_SWEEP", SLOTS, "registered[d]"),
    Mutant("NEWCOMER_DOES_NOT_SWEEP", SLOTS, LEASABLE),
    Mutant("ROW_FREED_BEFORE_THE_SWEEP", (*SLOTS, "KILLS=2"), LEASABLE),
    Mutant("HINT_TRUSTED", ("ROUNDS=2", "FULL", "HINTS"), "listed[s]"),
    Mutant("LETTER_NOT_DRAINED", SLOTS, "letter[s]==0"),
    Mutant("LETTER_OF_ANOTHER", SLOTS, "letter[s]==1"),
    Mutant("RECOVERY_DOES_NOT_END", SLOTS, PERMIT),
    Mutant("CONNECT_BEFORE_DEPOSIT", SLOTS, PERMIT),
    Mutant("WAITERS_OF_THE_DEAD_STAY", QUEUE, "cell[c]==0"),
    Mutant("OFFER_OF_THE_DEAD_FORGOTTEN", (*QUEUE, "OFFERS_END"), "state[s]!=7"),
    Mutant("OFFER_WITHOUT_A_TERM", (*QUEUE, "GIVES_UP"), LEASABLE),
    Mutant("OFFER_NOT_TAKEN_BACK", (*QUEUE, "GIVES_UP", "KILLS=0", "OFFERS_END"), "state[s]!=7"),
    Mutant("RELEASE_DOES_NOT_LOOK_AGAIN", AWAKE, STILL),
    Mutant("WAITER_DOES_NOT_LOOK_AGAIN", AWAKE, STILL),
    Mutant("BIT_CLEARED_WITHOUT_A_SECOND_LOOK", (*AWAKE, "ROUNDS=2", "GIVES_UP"), STILL),
    Mutant("WAKE_UP_NOT_PASSED_ON", (*AWAKE, "N=3", "GIVES_UP"), STILL),
    Mutant("WAKE_UP_TRUSTED", QUEUE, STILL),
    Mutant("SLICE_WITHOUT_RECOVERY", QUEUE, "quiet"),
]


def _run(room: Path, *command: object) -> str:
    done = subprocess.run(list(map(str, command)), cwd=room, capture_output=True, text=True, check=False)
    print(*command, done.stdout, done.stderr, sep="\n")
    assert done.returncode == 0, done.stderr or done.stdout
    return done.stdout


def searched(room: Path, defines: Defines, bitstate_minutes: int = 0) -> str:
    """What pan says of the model with these defines; of two for one name the later counts."""
    chosen = {define.split("=")[0]: define for define in defines}
    _run(room, tool("spin"), "-a", *(f"-D{define}" for define in chosen.values()), MODEL)
    store = ["-DBITSTATE"] if bitstate_minutes else ["-DCOLLAPSE"]
    _run(room, *CC, "-O2" if LONG else "-O0", "-w", "-DSAFETY", f"-DMEMLIM={MEMORY_MB}", *store, "-o", "pan", "pan.c")
    limits = ["-w30", f"-Q{bitstate_minutes}"] if bitstate_minutes else []
    return _run(room, "nice", "./pan", "-m1000000", *limits)


@pytest.mark.parametrize("config", [pytest.param(each, id=re.sub(r"\W+", "-", each.name)) for each in CONFIGS])
def test_the_model_holds(config: Config, tmp_path: Path) -> None:
    if config.long and not LONG:
        pytest.skip("SHMPOOL_TEST_LONG=1 searches this too")
    said = searched(tmp_path, config.defines, config.bitstate_minutes)
    assert re.search(r"errors: 0$", said, re.MULTILINE)
    assert "search depth too small" not in said
    assert config.bitstate_minutes or "Search not completed" not in said


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.lower())
def test_mutant_of_the_model_is_found(mutant: Mutant, tmp_path: Path) -> None:
    said = searched(tmp_path, (*mutant.defines, f"MUTANT_{mutant.name}"))
    broken = re.search(r"^pan:1: (.*)$", said, re.MULTILINE)
    assert broken, f"spin finds nothing wrong with {mutant.name}"
    assert mutant.property in broken[1]


def test_every_mutant_of_the_model_is_listed() -> None:
    assert set(re.findall(r"MUTANT_(\w+)", MODEL.read_text(encoding="utf-8"))) - {"x"} == {
        mutant.name for mutant in MUTANTS
    }


# The model and the code ----------------------------------------------------------------------------------------------

Moves = set[tuple[str, str]]


def table() -> Moves:
    """The changes of a slot that core/slot.c allows."""
    text = (CORE / "slot.c").read_text(encoding="utf-8")
    rows = re.findall(r"^ *\[SLOT_(\w+)\] = (TO\(.*)$", text, re.MULTILINE)
    return {(start, to) for start, row in rows for to in re.findall(r"TO\((\w+)\)", row)}


def told(said: str) -> Moves:
    return set(re.findall(r"^move (\w+) (\w+)$", said, re.MULTILINE))


def test_the_model_makes_the_changes_of_the_table(tmp_path: Path) -> None:
    """Its text has no others, and each of them is made in some run."""
    text = MODEL.read_text(encoding="utf-8")
    written = set(re.findall(r"\bmove\(\w+, ([A-Z]+), ([A-Z]+),", text)) - {("FROM", "TO")}
    made: Moves = set()
    for defines in ((*SLOTS, "KILLS=1"), (*QUEUE, "KILLS=0", "ROUNDS=2", "EVICTS")):
        made |= told(searched(tmp_path, defines))
    assert len(table()) == 17
    assert written == made == table()


def _programs(builder: Builder, core: Path, room: Path) -> Iterator[list[str]]:
    for stem in ("pool", "recovery", "steering"):
        yield [str(builder.program(f"test_{stem}", PLAIN, core, room))]
    yield [str(builder.program("crash", CRASH, core, room)), "recover", "ended"]


def test_the_code_makes_the_changes_of_the_table(tmp_path: Path) -> None:
    """The core's test programs on a copy of the core that says which changes it makes: all of the table, no others."""
    core = tmp_path / "telling"
    shutil.copytree(CORE, core, ignore=shutil.ignore_patterns("module*"))
    old = "    *word = next;\n    return true;"
    new = (
        "    static unsigned char said[SLOT_STATE_COUNT][SLOT_STATE_COUNT];\n"
        "    if (!said[slot_state(expected)][state]++)\n"
        '        printf("\\nmove %d %d\\n", (int)slot_state(expected), (int)state), fflush(stdout);\n'
    )
    text = (core / "slot.h").read_text(encoding="utf-8")
    assert text.count(old) == 1, "slot.h has changed: say anew where a change is made"
    text = text.replace(old, new + old).replace('#include "slab.h"', '#include "slab.h"\n#include <stdio.h>')
    (core / "slot.h").write_text(text, encoding="utf-8")
    names = ["INVALID", *re.findall(r"^ *X\((\w+), ", text, re.MULTILINE)]
    made: Moves = set()
    for command in _programs(Builder(tmp_path), core, tmp_path):
        made |= {(names[int(start)], names[int(to)]) for start, to in told(_run(tmp_path, *command))}
    assert made == table()
