"""Damaged slabs: how one is made out of a sound one, and all that may be done with it.

    damage = Damage(whole, seed)          # `damage.data`: the bytes; `damage.what`: what was done to them, in words
    Ordeal(damage, "tcp://...").run()     # every command and every call, on a segment with these bytes

The same sound bytes and the same seed give the same damage. `Map` is the byte map of core/slab.h, computed here a
second time, so that a field, a row or an event can be hit on purpose. An event that is damaged gets a sum that fits, or
nobody would read what it says.

`python -m tests.damage FILE URL FIRST COUNT` runs the ordeals of some seeds on the slab in FILE, a line before each one
on standard output. So whoever started it knows which seed it was that ended, or hung, the process. Faults go to
standard error, and make the status 1.

Invariant: no ordeal raises anything but `Fault`.

Not here: the slab that is damaged, the sanitizers, the watchdog (test_hostile.py).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import shmpool
from shmpool import Pool, PoolError, cli, slab
from shmpool import pool as pool_module
from tests.test_inspector import segment

PAGE = 4096
HEADER_BYTES, TOTALS_BYTES = 8192, 256 + 2 * 8 * 992
EVENTS, EVENT_BYTES, EVENT_WORDS, EVENT_TEXT = 1024, 128, 13, 64
WORKER_BYTES, WAITER_BYTES, SLOT_BYTES, ACCOUNT_BYTES, BITMAPS = 16384, 64, 128, 48, 6
SETTINGS: dict[str, Any] = {  # of that pool
    "max_connections": 4,
    "resize_limit": 6,
    "min_connections": 0,
    "max_workers": 8,
    "max_waiters": 70,
    "maintenance_interval": 1000.0,
}
MASK64 = (1 << 64) - 1
CAPACITIES = {"max_slots": 100_000, "max_workers": 4096, "max_waiters": 62 * 64}  # the most there may be of each

# Of struct header_shm: where each field begins, and its bytes.
FIELDS: dict[str, tuple[int, int]] = {
    "magic": (0, 8),
    "version": (8, 4),
    "format": (12, 4),
    "total_size": (16, 8),
    "id": (24, 16),
    "created_realtime_ns": (40, 8),
    "creator_uid": (48, 4),
    "creator_pid": (52, 4),
    "max_slots": (56, 4),
    "max_workers": (60, 4),
    "max_waiters": (64, 4),
    "listening": (68, 4),
    "name": (72, 72),
    "target": (144, 256),
    "config": (400, 4096),
    "rendezvous": (4496, 512),
    "listener_inode": (5008, 8),
    "cap": (7808, 4),
    "bound": (7812, 4),
    "prewarm": (7816, 12),
    "service": (7828, 20),
    "maintained_ns": (7848, 8),
    "upstream": (7856, 8),
    "upstream_failures": (7864, 8),
    "upstream_since_ns": (7872, 8),
    "upstream_error": (7880, 128),
    "summary": (8064, 8),
    "next_connection": (8128, 8),
    "next_ticket": (8136, 8),
    "recovery_checked_ns": (8144, 8),
    "next_event": (8152, 8),
    "listed": (8160, 4),
}
TEXTS = ("name", "target", "config", "rendezvous", "upstream_error")


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


class Map(NamedTuple):
    """Where each part of a slab begins, and its bytes."""

    parts: dict[str, tuple[int, int]]
    size: int

    @classmethod
    def of(cls, slots: int, workers: int, waiters: int) -> Map:
        """As slab_layout() does."""
        parts: dict[str, tuple[int, int]] = {}
        at = 0

        def add(name: str, size: int, unit: int = 1) -> None:
            nonlocal at
            at = _round_up(at, unit)
            parts[name] = (at, size)
            at += size

        add("header", HEADER_BYTES)
        add("totals", TOTALS_BYTES)
        add("events", EVENTS * EVENT_BYTES, PAGE)
        add("workers", workers * WORKER_BYTES, PAGE)
        add("waiter words", _round_up(waiters, 64) * 8)
        add("waiters", waiters * WAITER_BYTES, 64)
        add("bitmaps", BITMAPS * _round_up(slots, 512) // 8)
        add("slots", slots * SLOT_BYTES)
        add("accounts", slots * ACCOUNT_BYTES)
        return cls(parts, _round_up(at, PAGE))


def number(data: bytes, field: str) -> int:
    """A field of the header."""
    at, size = FIELDS[field]
    return int.from_bytes(data[at : at + size], "little")


def text(data: bytes, field: str) -> str:
    """A text of the header."""
    at, size = FIELDS[field]
    return data[at : at + size].partition(b"\0")[0].decode()


# Damage -------------------------------------------------------------------------------------------------------------

HOSTILE_TEXTS: tuple[bytes, ...] = (
    b"\x1b]0;owned\x07\x1b[2J\x1b[31mred",
    b"\x9b31m\xc2\x9b31m",
    b"\xff\xfe\x80 no UTF-8 \xed\xa0\x80 \xc0\xaf \xf4\x90\x80\x80",
    b"a line\nanother\r\nand \x08\x08\x08 back\x7f\ttab",
    "from right to left \u202egnp.exe, \u2028 a line \u0085 another".encode(),
    b"[bold red]markup[/] {0} %s %n",
    b'quote " backslash \\ }{ # HELP x\n',
    b"os|99999999999999999999|too large for an errno",
    "os|²|no number that int() takes".encode(),
    b"resolver|--5|two signs",
    b"os||nothing",
    b"|||||",
    b"tcp://[",
    b"unix:///\x1b[2J",
    b"",
)
HOSTILE_VALUES = (-1, 0, 1 << 40, 1 << 80, -(1 << 63), 0.5, 1e308, "x", "\x1b[2J", None, True, [], {}, [[]], "5")
HOSTILE_CONFIGS: tuple[bytes, ...] = (
    b"[" * 4095,
    b'{"a":' * 800 + b"1" + b"}" * 90,
    b"[" * 2000 + b"]" * 2000,
    b"",
    b"null",
    b"[]",
    b"1",
    b'"text"',
    b"{}",
    b"NaN",
    b"{",
    b'{"target": "tcp://127.0.0.1:1", "max_connections": Infinity}',
    b'{"target": "tcp://127.0.0.1:1", "min_connections": NaN, "max_connections": 1e999}',
    b'{"target": "tcp://127.0.0.1:1", "max_connections": 1' + b"0" * 3900 + b"}",
    b'{"max_idle_connections": "x", "listening": 7}',
    b'{"target": "tcp://127.0.0.1:1", "no such setting \\u001b[2J": 1}',
)


class Damage:
    """A sound slab's bytes with one to three kinds of damage; `cut` is where to cut the file while it is open."""

    def __init__(self, whole: bytes, seed: int) -> None:
        self.seed, self.whole = seed, whole
        self.random = random.Random(seed)
        self.data = bytearray(whole)
        self.name = text(whole, "name")
        self.settings = json.loads(text(whole, "config"))  # they say the name as well
        self.map = Map.of(*(number(whole, name) for name in CAPACITIES))
        self.what: list[str] = []
        kinds = self.random.choices(
            list(_KINDS), [weight for _, weight in _KINDS.values()], k=self.random.choice(_MANY)
        )
        for kind in sorted(kinds, key=list(_KINDS).index):  # what changes the size is the last
            note = _KINDS[kind][0](self)
            self.what.append(f"{kind}: {note}" if note else kind)
        self.cut = self.random.choice((0, 1, 8191, PAGE, 2 * PAGE, self.random.randrange(len(self.data) + 1)))
        self.locked = self.random.random() < 0.85

    def __repr__(self) -> str:
        return f"seed {self.seed}: {'; '.join(self.what)}"

    def put(self, at: int, value: bytes) -> None:
        """Write bytes where they fit."""
        fits = value[: max(0, len(self.data) - at)]
        self.data[at : at + len(fits)] = fits

    def hostile(self, size: int) -> bytes:
        """A number of so many bytes that a careless reader would stumble over."""
        pick, most = self.random.choice, 1 << 8 * size
        near = pick((number(self.data, pick(list(CAPACITIES))), EVENTS, 1 << 31, 1 << 63, 0, most, most // 2))
        chosen = pick((near + pick((-2, -1, 0, 1, 2)), self.random.randrange(most), self.random.randrange(256)))
        return (chosen % most).to_bytes(size, "little")

    def part(self) -> tuple[str, int, int]:
        """Some part of the slab, the small ones as often as the large ones: its name, its begin and its bytes."""
        name = self.random.choice(list(self.map.parts))
        return (name, *self.map.parts[name])


def _flip_anywhere(damage: Damage) -> str:
    count = min(4096, int(2 ** (damage.random.random() * 12.5)))
    for _ in range(count):
        bit = damage.random.randrange(8 * len(damage.data))
        damage.data[bit // 8] ^= 1 << bit % 8
    return f"{count} bits"


def _flip_in_a_part(damage: Damage) -> str:
    name, at, size = damage.part()
    count = damage.random.randint(1, 64)
    for _ in range(count):
        damage.data[at + damage.random.randrange(size)] ^= 1 << damage.random.randrange(8)
    return f"{count} bits of the {name}"


def _hostile_words(damage: Damage) -> str:
    name, at, size = damage.part()
    width = damage.random.choice((4, 8))
    count = damage.random.choice((1, 3, 30, size // width))
    for _ in range(count):
        damage.put(at + damage.random.randrange(size // width) * width, damage.hostile(width))
    return f"{count} of the {name}"


def _hostile_row(damage: Damage) -> str:
    """Every word of one row that is in use: all combinations come with many seeds."""
    name, width = damage.random.choice((("slots", SLOT_BYTES), ("waiters", WAITER_BYTES), ("accounts", ACCOUNT_BYTES)))
    at, size = damage.map.parts[name]
    row = damage.random.randrange(min(8, size // width))
    for offset in range(0, width, 8):
        damage.put(at + row * width + offset, damage.hostile(8))
    return f"{row} of the {name}"


def _hostile_fields(damage: Damage) -> str:
    names = damage.random.sample([name for name in FIELDS if name not in TEXTS], damage.random.randint(1, 4))
    for name in names:
        at, size = FIELDS[name]
        damage.put(at, damage.hostile(4 if size % 8 else 8) * (size // (4 if size % 8 else 8)))
    return ", ".join(names)


def _texts(damage: Damage) -> str:
    names = damage.random.sample(TEXTS, damage.random.randint(1, 3))
    for name in names:
        at, size = FIELDS[name]
        hostile = damage.random.choice(HOSTILE_TEXTS)
        if damage.random.random() < 0.2:  # no end, or just one
            hostile = (hostile or b"x") * size
        if damage.random.random() < 0.7:
            hostile = hostile[: size - 1] + b"\0"
        damage.put(at, hostile[:size])
        if name == "upstream_error":  # shown while the server is down
            damage.put(FIELDS["upstream"][0], damage.random.choice((3, 4)).to_bytes(8, "little"))
    return ", ".join(names)


def _config(damage: Damage) -> str:
    at, size = FIELDS["config"]
    config = damage.random.choice(HOSTILE_CONFIGS)
    note = repr(config[:60])
    if damage.random.random() < 0.6:
        names = damage.random.sample(list(damage.settings), damage.random.randint(1, 4))
        changed = {name: damage.random.choice(HOSTILE_VALUES) for name in names}
        config, note = json.dumps({**damage.settings, **changed}).encode(), repr(changed)
    damage.put(at, config[: size - 1].ljust(size, b"\0"))
    return note


def _events(damage: Damage) -> str:
    """Whole events that say what they like; then perhaps a count of them that cannot be."""
    begin = damage.map.parts["events"][0]
    count = damage.random.choice((8, EVENTS))
    first = damage.random.choice((0, 5, number(damage.data, "next_event"), (1 << 63) - 8, (1 << 64) - EVENTS - 1))
    for event in range(first, first + count):
        kind = damage.random.choice((damage.random.randrange(13), 1, 10, 13, 255))  # 1, 10: those with a reason
        words = [int.from_bytes(damage.hostile(8), "little") for _ in range(5)]
        words[4] = damage.random.randrange(256) << 8 | kind
        said = damage.random.choice(HOSTILE_TEXTS) * damage.random.choice((1, 9))
        packed = struct.pack("<5Q", *words) + said[:EVENT_TEXT].ljust(EVENT_TEXT, b"\0")
        total = event & MASK64
        for (word,) in struct.iter_unpack("<Q", packed):
            total = (total ^ word) * 0x9E3779B97F4A7C15 & MASK64
            total ^= total >> 29
        cell = struct.pack("<Q", 2 * event + 2 & MASK64) + packed + struct.pack("<Q", total)
        damage.put(begin + (event % EVENTS) * EVENT_BYTES, cell)
    damage.put(FIELDS["next_event"][0], struct.pack("<Q", first + count & MASK64))
    return f"{count} from number {first} on"


def _fill(damage: Damage) -> str:
    name, at, size = damage.part()
    begin = at + damage.random.randrange(size)
    length = damage.random.choice((8, 64, PAGE, at + size - begin))
    kind = damage.random.choice(("zeroes", "ones", "noise"))
    fill = {"zeroes": bytes(length), "ones": b"\xff" * length, "noise": damage.random.randbytes(length)}[kind]
    damage.put(begin, fill)
    return f"{length} bytes in the {name}, {kind}"


def _capacities(damage: Damage) -> str:
    """Numbers of rows that the slab does not have."""
    names = damage.random.sample(list(CAPACITIES), damage.random.randint(1, 3))
    for name in names:
        damage.put(FIELDS[name][0], damage.hostile(4))
    return ", ".join(names)


def _consistent_lie(damage: Damage) -> str:
    """Other capacities, and every size such that they fit: it opens, and the rows are not where they were."""
    pick = damage.random.choice
    counts = [pick((1, 2, 3, 63, 64, 65)) for _ in CAPACITIES]
    fill = pick((b"\0", b"\xff", b"\2"))
    if damage.random.random() < 0.1:  # a large one of zeroes: what is there is shown, and a row takes its time
        counts, fill = [pick((1, most)) for most in (20_000, 1000, 62 * 64)], b"\0"
    for name, count in zip(CAPACITIES, counts, strict=True):
        damage.put(FIELDS[name][0], count.to_bytes(4, "little"))
    size = Map.of(*counts).size
    damage.put(FIELDS["total_size"][0], size.to_bytes(8, "little"))
    del damage.data[size:]
    damage.data.extend(fill * (size - len(damage.data)))
    return ", ".join(map(str, counts))


def _cut(damage: Damage) -> str:
    size = damage.random.choice((0, 1, 8191, 8192, 8193, damage.random.randrange(len(damage.data) + 1)))
    del damage.data[size:]
    return f"at {size}"


def _lengthen(damage: Damage) -> str:
    more = damage.random.choice((1, PAGE, 1 << 20))
    damage.data.extend(bytes(more))
    return f"by {more}"


def _nothing_left(damage: Damage) -> str:
    kind, size = damage.random.choice(("zeroes", "ones", "noise")), len(damage.data)
    damage.data[:] = {"zeroes": bytes(size), "ones": b"\xff" * size, "noise": damage.random.randbytes(size)}[kind]
    return kind


# By name: what does it, and how often.
_KINDS: dict[str, tuple[Callable[[Damage], str], int]] = {
    "flips": (_flip_anywhere, 3),
    "flips in a part": (_flip_in_a_part, 4),
    "hostile words": (_hostile_words, 6),
    "a hostile row": (_hostile_row, 3),
    "header fields": (_hostile_fields, 6),
    "texts": (_texts, 5),
    "config": (_config, 4),
    "events": (_events, 4),
    "filled": (_fill, 3),
    "capacities": (_capacities, 1),
    "consistent lie": (_consistent_lie, 3),
    "cut": (_cut, 1),
    "lengthened": (_lengthen, 1),
    "nothing left": (_nothing_left, 3),
}
_MANY = (1, 1, 1, 2, 2, 3)


# What is done with it -----------------------------------------------------------------------------------------------

LOOKS: tuple[tuple[str, ...], ...] = (
    ("list",),
    ("list", "--json"),
    ("stats", "NAME"),
    ("stats", "NAME", "--json"),
    ("top", "NAME", "--once", "--interval", "0.0001"),
    ("events", "NAME"),
    ("events", "NAME", "--json"),
    ("export", "--once"),
)
STEPS: tuple[tuple[str, ...], ...] = (
    ("pause", "NAME"),
    ("resume", "NAME"),
    ("resize", "NAME", "1"),
    ("resize", "NAME", "4"),
    ("resize", "NAME", "99999"),
    ("evict", "NAME"),
    ("evict", "NAME", "--leased"),
    ("evict", "NAME", "--id", "3"),
    ("evict", "NAME", "--peer", "127.0.0.1"),
    ("recover", "NAME", "--timeout", "0.001"),
    ("drain", "NAME", "--timeout", "0.001"),
    ("resume", "NAME", "--json"),
    ("close", "NAME", "--timeout", "0.001"),
)
ENDS: tuple[tuple[str, ...], ...] = (
    ("doctor",),
    ("doctor", "--json"),
    ("unlink", "NAME"),
    ("unlink", "NAME", "--force"),
)


class Fault(Exception):
    """What must not be: of which seed, in which act, and what it was."""


class Ordeal:
    """Everything that can be done with the slab of one damage."""

    def __init__(self, damage: Damage, url: str) -> None:
        self.damage, self.url = damage, url
        self.name = damage.name
        self.slowest = (0.0, "")

    def run(self) -> None:
        """Raises Fault."""
        data = bytes(self.damage.data)
        with self._laid(locked=True) as path:
            for command in LOOKS:
                self._command(*command)
            self._act("inspect()", self._inspect)
            if path.read_bytes() != data:
                raise Fault(f"{self.damage!r}: looking has changed it")
            self._act("a cut while it is open", lambda: self._cut(path))
        with segment(self.name, self.damage.whole) as path:
            self._act("damage while it is open", lambda: self._late(path))
        for what, join in (("attach()", self._attach), ("Pool()", self._make)):
            with self._laid():
                self._act(what, join)
        for step in STEPS:
            with self._laid():
                self._command(*step)
        with self._laid():
            for end in ENDS:
                self._command(*end)

    def _laid(self, locked: bool = False) -> contextlib.AbstractContextManager[Path]:
        """One that nobody has locked is the remains of the dead: it may be tidied away at any moment."""
        return segment(self.name, bytes(self.damage.data), locked=locked or self.damage.locked)

    def _act(self, what: str, act: Callable[[], object]) -> None:
        """Whatever goes well, or is refused with an error of ours."""
        begun = time.monotonic()
        try:
            act()
        except PoolError as error:
            if not str(error):
                raise Fault(f"{self.damage!r}\n{what}: an error without a text") from error
        except Exception as error:  # whatever it is, it is looked for
            raise Fault(f"{self.damage!r}\n{what}: {traceback.format_exc()}") from error
        self.slowest = max(self.slowest, (time.monotonic() - begun, what))

    def _command(self, *words: str) -> None:
        said = io.StringIO()

        def act() -> None:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                status = cli.main([self.name if word == "NAME" else word for word in words])
            output = said.getvalue()
            if status not in (0, 1, 2) or (status and not output.strip()):
                raise AssertionError(f"status {status}, {output!r}")
            if unprintable := {each for each in output if each != "\n" and not each.isprintable()}:
                raise AssertionError(f"it prints {unprintable}: {output[:2000]!r}")
            if "--json" in words and not status:
                check_json(output)

        self._act(" ".join(words), act)

    def _inspect(self) -> None:
        with shmpool.inspect(self.name) as inspector:
            stats = inspector.stats()
            repr((stats.slots, stats.workers, stats.waiters, stats.counts(), inspector.alive))
            check_json(json.dumps(stats.to_dict()))
            check_json(json.dumps(inspector.stats().diff(stats).to_dict()))
            batch = inspector.events()
            for event in batch.events:
                event.describe()
            check_json(json.dumps([event.to_dict() for event in batch.events]))
            for after in (1, batch.next, (1 << 64) - 1):
                inspector.events(after, patient=True)

    def _cut(self, path: Path) -> None:
        """What is open is cut; it must be told, not believed."""
        with shmpool.inspect(self.name) as inspector:
            os.truncate(path, min(self.damage.cut, len(self.damage.data) - 1))
            for look in (inspector.stats, inspector.events):
                try:
                    look()
                except PoolError:
                    continue
                raise AssertionError(f"cut to {self.damage.cut} bytes, and it has not noticed")

    def _late(self, path: Path) -> None:
        """What was found good is damaged when it is open: nothing that was checked may be believed."""
        with shmpool.inspect(self.name) as inspector, slab.view(self.name, writable=True) as view:
            with open(path, "r+b") as file:
                file.write(self.damage.data[: len(self.damage.whole)])
            inspector.stats().to_dict()
            inspector.events()
            for look in (view.identity, view.members, view.workers, view.mailboxes, view.limits, view.snapshot):
                look()
            for state in ("paused", "open", "draining"):
                view.steer(state)
            for cap in (1, 6):
                view.resize(cap)
            view.evict(0, b"", True)

    def _attach(self) -> None:
        shmpool.attach(self.name, timeout=0.001).leave()

    def _make(self) -> None:
        Pool(self.url, name=self.name, **SETTINGS).close()


def check_json(text: str) -> None:
    """Raises ValueError for what is no JSON: other programs do not know NaN."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    for each in [text] if text.startswith(("{\n", "[\n", "[]")) or "\n" not in text.strip() else text.splitlines():
        if each.strip():
            json.loads(each, parse_constant=refuse)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """The pools of this process are the only ones there are, and nobody waits long for an answer."""
    own, directory = f"shmpool-h{os.getpid()}-", tempfile.mkdtemp(prefix="hostile-")
    slab.prefix = lambda: own
    pool_module.JOIN_TIMEOUT_S = 0.001
    parser = cli._parser()
    cli._parser = lambda: parser  # it is most of the time of a command
    os.environ["XDG_RUNTIME_DIR"] = directory
    try:
        yield
    finally:
        for left in Path(slab.DIRECTORY).glob(f"{own}*"):
            left.unlink(missing_ok=True)
        shutil.rmtree(directory)


def main(file: str, url: str, first: str, count: str) -> int:
    whole, faults, slowest = Path(file).read_bytes(), 0, (0.0, "", 0)
    with alone():
        for seed in range(int(first), int(first) + int(count)):
            damage = Damage(whole, seed)
            print(damage, flush=True)
            ordeal = Ordeal(damage, url)
            try:
                ordeal.run()
            except Fault as fault:
                faults += 1
                print(fault, file=sys.stderr, flush=True)
            slowest = max(slowest, (*ordeal.slowest, damage.seed))
    print(f"{count} slabs, {faults} faults; the slowest act took {slowest[0]:.3f} s: {slowest[1]} of seed {slowest[2]}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
