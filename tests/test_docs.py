"""What the guides say is so: their programs run, their tables have what the code has."""

from __future__ import annotations

import argparse
import ast
import os
import re
import selectors
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple, get_args

import pytest

from shmpool import Pool, PoolConfig, cli
from shmpool.hooks import CloseReason
from tests.mutants import MUTANTS
from tests.processes import Family
from tests.weakenings import WEAKENINGS

ROOT = Path(__file__).parent.parent
PRODUCTION = ROOT / "docs" / "guide" / "production.md"
OBSERVING = ROOT / "docs" / "guide" / "observing.md"
VERIFICATION = ROOT / "docs" / "verification.md"
README = ROOT / "README.md"


def sections(path: Path) -> dict[str, str]:
    """The text under each heading, by its words."""
    parts = re.split(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text: str) -> list[list[str]]:
    """The cells of the tables in a text, without headings."""
    lines = [line.strip("| ").replace("\\|", "\0") for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip().replace("\0", "|") for cell in re.split(r" ?\| ?", line)] for line in lines]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# Programs -----------------------------------------------------------------------------------------------------------


class Program(NamedTuple):
    where: str
    text: str


def programs(path: Path) -> Iterator[Program]:
    """The blocks of Python that are whole: they begin with an import. Redis's own client needs a Redis."""
    for heading, text in sections(path).items():
        for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)):
            if block.startswith("import ") and "import redis" not in block:
                yield Program(f"{path.name}: {heading} {number}", block)


PROGRAMS = [*programs(PRODUCTION), *programs(OBSERVING), *programs(README)]
# What some of them print, at the least.
PRINTED = {
    'when_down="fail"': r"b'\+PONG\\r\\n'",
    "prewarm_retries": r"^4 [34] 0 (True|False)$",
    "stats.health_checks": r"^\d+ 0$",
    'leak_action="revoke"': r"taken at:\n +File .*\n +conn = pool.get\(\)\n+connection 1 is not leased here any more",
    "on_close=note": r"connection \d to \('127.0.0.1', \d+\) ended: shutdown, [01] leases",
    "udp://": "b'question'",
    "steering.resize": r"before: 4\nevicted: \d\nleases left: 0",
    "from_toml": "'when_down': 'wait'",
    "math.inf": "^2$",
    "os.fork()": r"b'\+PONG",
    "batch.events": r"'joined'.*'opened'.*'discarded'.*'closed'.*\] 0$",
}


class Ports(NamedTuple):
    tcp: int
    udp: int


def answer(tcp: socket.socket, udp: socket.socket) -> None:
    """+PONG for each line over TCP, the same again over UDP; for ever."""
    selector = selectors.DefaultSelector()
    selector.register(tcp, selectors.EVENT_READ)
    selector.register(udp, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            assert isinstance(key.fileobj, socket.socket)
            sock = key.fileobj
            if sock is tcp:
                selector.register(tcp.accept()[0], selectors.EVENT_READ)
            elif sock is udp:
                udp.sendto(*udp.recvfrom(2048))
            elif lines := sock.recv(2048).count(b"\n"):
                sock.sendall(b"+PONG\r\n" * lines)
            else:
                selector.unregister(sock)
                sock.close()


@pytest.fixture(scope="module")
def ports() -> Iterator[Ports]:
    with (
        Family() as family,
        socket.create_server(("127.0.0.1", 0), backlog=64) as tcp,
        socket.socket(type=socket.SOCK_DGRAM) as udp,
    ):
        udp.bind(("127.0.0.1", 0))
        family.fork(answer, tcp, udp)
        yield Ports(tcp.getsockname()[1], udp.getsockname()[1])


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.where)
def test_programs_run(program: Program, ports: Ports, tmp_path: Path) -> None:
    text = program.text.replace("tcp://127.0.0.1:6379", f"tcp://127.0.0.1:{ports.tcp}")
    text = text.replace("udp://127.0.0.1:5353", f"udp://127.0.0.1:{ports.udp}")
    text = re.sub(r'"guide"|"redis"', lambda found: f'{found[0][:-1]}-{os.getpid()}"', text)
    path = tmp_path / "program.py"
    path.write_text(text, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SHMPOOL_")}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0, done.stderr
    if "import logging" in text:
        assert "Traceback" not in done.stderr
        assert re.search(r" shmpool\.pool INFO ", done.stderr)
    else:
        assert done.stderr == ""
    for hint, printed in PRINTED.items():
        if hint in program.text:
            assert re.search(printed, done.stdout, re.MULTILINE), done.stdout


def test_every_expectation_has_a_program() -> None:
    assert [hint for hint in PRINTED if sum(hint in program.text for program in PROGRAMS) != 1] == []


def test_the_example_runs(ports: Ports) -> None:
    example = ROOT / "examples" / "production.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(example), f"tcp://127.0.0.1:{ports.tcp}"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert re.search(r"^\d+ turns by 4 workers over [1-4] connections", done.stdout, re.MULTILINE), done.stdout


# Tables -------------------------------------------------------------------------------------------------------------


def test_the_settings_are_those_of_the_configuration() -> None:
    table = {names(name)[0]: cells for name, *cells in rows(sections(PRODUCTION)["Configuration"])}
    assert list(table) == [setting.name for setting in fields(PoolConfig)]
    for setting in fields(PoolConfig):
        default, _, whose, *_ = table[setting.name]
        assert ast.literal_eval(names(default)[0]) == setting.default, setting.name
        assert whose == ("own" if setting.metadata["own"] else "shared"), setting.name


def test_every_reason_is_told() -> None:
    told = [name for cells in rows(sections(PRODUCTION)["How connections end"]) for name in names(cells[0])]
    assert sorted(told) == sorted(get_args(CloseReason))


def test_every_hook_is_told() -> None:
    told = [names(cells[0])[0] for cells in rows(sections(PRODUCTION)["Hooks"])]
    assert told == [setting.name for setting in fields(PoolConfig) if setting.name.startswith("on_")]


def test_every_logger_is_told() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "shmpool").rglob("*.py"))
    made = set(re.findall(r'getLogger\("(shmpool\.[a-z.]+)"\)', sources))
    told = {names(cells[0])[0] for cells in rows(sections(PRODUCTION)["Logging"])}
    assert told == {name for name in made if not name.startswith("shmpool.integrations")}


def test_the_figures_exist(ports: Ports) -> None:
    with Pool(f"tcp://127.0.0.1:{ports.tcp}", min_connections=0) as pool:
        stats = pool.stats()
    for cells in rows(sections(PRODUCTION)["What to watch"]):
        for name in names(cells[0]):
            assert eval(f"stats.{name}", {"stats": stats}) is not None, name


def test_the_commands_exist() -> None:
    (commands,) = [action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction)]
    for path in (PRODUCTION, README):
        text = path.read_text(encoding="utf-8")
        used = re.findall(r"(?:^    |`)shmpool ([a-z]+)\b", text, re.MULTILINE)
        assert used
        assert set(used) <= set(commands.choices), path.name
    assert set(commands.choices) <= set(re.findall(r"\bshmpool ([a-z]+)\b", README.read_text(encoding="utf-8"))), (
        "the README has all of them"
    )


def test_the_anchors_exist() -> None:
    for path in (PRODUCTION, README):
        text = path.read_text(encoding="utf-8")
        there = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in sections(path)}
        assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= there, path.name
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (path.parent / target).exists(), target


# Verification -------------------------------------------------------------------------------------------------------


def test_the_table_of_mutants_is_that_of_the_tests() -> None:
    told = [line for line in sections(VERIFICATION)["Mutants"].splitlines() if line.startswith("| ")][2:]
    assert told == [
        f"| {each.name} | `{each.file}` | `{' '.join((each.program, *each.arguments[:1]))}` |" for each in MUTANTS
    ]


def test_the_table_of_weaker_orders_is_that_of_the_tests() -> None:
    told = [line for line in sections(VERIFICATION)["Weak memory"].splitlines() if line.startswith("| ")][2:]
    assert told == [
        f"| {each.tag} | `{each.macro}` | {each.to} | {each.scenario or '-'} |"
        f" {'needed' if each.found else 'not shown'} | {each.why} |"
        for each in WEAKENINGS
    ]


def test_the_targets_of_verification_exist() -> None:
    targets = set(re.findall(r"`make ([a-z-]+)`", VERIFICATION.read_text(encoding="utf-8")))
    assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert len(targets) > 5
