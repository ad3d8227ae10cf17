"""What the benches write: their results are of the schema, README.md and the picture show those of the reference.

No figure is judged here, and no clock is looked at.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import fastjsonschema
import pytest

from benches import report, results
from benches.__main__ import NAMES, main
from benches.permits import Pooled, Unguarded

ROOT = Path(__file__).parent.parent
VALID = fastjsonschema.compile(json.loads((ROOT / "benches" / "result.schema.json").read_text(encoding="utf-8")))
REFERENCE = results.read(results.REFERENCE)
README = report.README.read_text(encoding="utf-8")
PICTURE = results.REFERENCE.with_suffix(".svg")
PICTURE_BYTES_MAX = 200_000


def run(*words: str, program: str = "") -> subprocess.CompletedProcess[str]:
    start = ["-c", f"{program}; from benches.__main__ import main; sys.exit(main(sys.argv[1:]))"]
    command = [sys.executable, *(start if program else ["-m", "benches"]), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


def texts(svg: str) -> set[str]:
    return {"".join(each.itertext()) for each in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}


# A run --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_writes_a_result_and_draws_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "result.json"
    done = run("--quick", "roundtrip", "grid", "--json", str(path))
    assert done.returncode == 0, done.stderr
    result = results.read(path)
    VALID(result)
    assert (result["quick"], result["benches"]) == (True, ["roundtrip", "grid"])
    assert {line["bench"] for line in result["lines"]} == {"roundtrip", "grid"}
    table, cells = results.candidates(result), results.cells(result)
    assert table is not None
    medians = [row["ns"]["median"] for row in table["rows"]]
    assert medians == sorted(medians)
    assert {row["group"] for row in table["rows"]} == {"floor", "shmpool", "for one process", "for several processes"}
    for cell in cells:
        assert {Pooled.name, Unguarded.name} < {each["name"] for each in cell["contenders"]}
    assert "shmpool get/release" in texts(path.with_suffix(".svg").read_text(encoding="utf-8"))
    assert report.refreshed(README, result) != README


def test_a_run_without_matplotlib_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    blocked = "import sys; sys.modules['matplotlib'] = None"
    done = run("--floors", "recovery", "--json", str(path), program=blocked)
    assert (done.returncode, done.stderr) == (0, "")
    assert "not drawn: a picture needs matplotlib: pip install 'shmpool[bench]'\n" in done.stdout
    VALID(results.read(path))
    again = run("--plot", str(path), program=blocked)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == "benches: a picture needs matplotlib: pip install 'shmpool[bench]'\n"
    assert [each.name for each in tmp_path.iterdir()] == ["result.json"]


def test_a_place_that_cannot_be_written_to_is_told_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--json", str(tmp_path / "none" / "result.json")])
    said = capsys.readouterr()
    assert said.out == ""
    assert f"nothing can be written in {tmp_path / 'none'}; choose another place with --json FILE" in said.err
    with pytest.raises(SystemExit, match="2"):
        main(["--json", "result.svg"])
    assert "result.svg is the picture's name; choose one that ends otherwise" in capsys.readouterr().err


# Files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--plot", "--install"])
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is not JSON ("),
        ("[]", "is no result of format 'shmpool benches, 1' but None; "),
        ('{"format": "shmpool benches, 0"}', "but 'shmpool benches, 0'; "),
        (None, "No such file or directory: "),
    ],
)
def test_files_that_are_no_results(
    flag: str, text: str | None, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert main([flag, str(path)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("benches: ")
    assert str(path) in said.err
    assert why in said.err


@pytest.mark.parametrize("change", [{"quick": True}, {"floors_only": True}, {"benches": ["roundtrip"]}])
def test_only_a_whole_run_becomes_the_reference(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "part.json"
    results.write({**REFERENCE, **change}, path)
    assert main(["--install", str(path)]) == 1
    said = f"benches: {path} is not of a whole run; make one with python -m benches, without names or flags\n"
    assert capsys.readouterr() == ("", said)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "again.json"
    results.write(REFERENCE, path)
    assert results.read(path) == REFERENCE
    assert path.read_bytes() == results.REFERENCE.read_bytes()


def places(value: Any, *way: str | int) -> list[tuple[str | int, ...]]:
    """The way to every value in an object of JSON."""
    entries: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, each in entries for place in ((*way, key), *places(each, *way, key))]


def test_the_schema_misses_whatever_is_left_out() -> None:
    """Of an object of each kind: a line, the round trip, a cell."""
    cell = {**results.cells(REFERENCE)[0]}
    cell["contenders"] = cell["contenders"][:1]
    table = {**(results.candidates(REFERENCE) or {})}
    table["rows"] = table["rows"][:1]
    small = {**REFERENCE, "benches": ["grid"], "packages": {}, "lines": REFERENCE["lines"][:1], "tables": [table, cell]}
    VALID(small)
    optional = {("lines", 0), ("tables", 0), ("tables", 1)}
    for place in places(small):
        if place not in optional:
            less = copy.deepcopy(small)
            holder: Any = less
            for key in place[:-1]:
                holder = holder[key]
            del holder[place[-1]]
            with pytest.raises(fastjsonschema.JsonSchemaValueException):
                VALID(less)


# The reference ------------------------------------------------------------------------------------------------------


def test_the_reference_is_of_the_schema() -> None:
    VALID(REFERENCE)


def test_the_reference_names_no_place() -> None:
    told = json.dumps([REFERENCE["machine"], REFERENCE["packages"]])
    assert re.findall(r"/[a-z]+/|@|://", told) == []


def test_the_readme_has_the_figures_of_the_reference() -> None:
    assert report.refreshed(README, REFERENCE) == README, "python -m benches --install benches/results/reference.json"


def test_a_figure_that_changes_is_missed_in_the_readme() -> None:
    for change in ("median", "p10", "p90"):
        other = copy.deepcopy(REFERENCE)
        table = results.candidates(other)
        assert table is not None
        table["rows"][3]["ns"][change] *= 3
        assert report.refreshed(README, other) != README
    with pytest.raises(ValueError, match="0 blocks `<!-- reference: machine -->`"):
        report.refreshed(README.replace("<!-- reference: machine -->", ""), REFERENCE)


def test_what_is_better_than_the_pool_is_told() -> None:
    def cell(**rates: float) -> dict[str, Any]:
        spreads = {name: {"median": rate, "p10": rate - 5, "p90": rate + 5} for name, rate in rates.items()}
        contenders = [{"name": name, "rate": spread} for name, spread in spreads.items()]
        return {"processes": 8, "connections": 4, "hold_us": 0, "contenders": contenders}

    rate = report.MEASURES[0]
    within = report.beaten_text([cell(shmpool=100, pipe=109)], rate)
    assert within == "nothing is better in any of 1 cells."
    beyond = report.beaten_text([cell(shmpool=100, pipe=120, queue=90), cell(shmpool=100, queue=150)], rate)
    assert beyond == (
        "better in 2 of 2 cells are `pipe`, `queue`; by most queue, 8 processes, 4 connections, held 0 us: "
        "150 a second against 100 a second."
    )


def test_the_readme_has_every_bench() -> None:
    told = re.findall(r"^\| `(\w+)` \| ", README[README.index("## What each measures") :], re.MULTILINE)
    assert sorted(told) == sorted(NAMES)


def test_the_readme_has_every_peer() -> None:
    """Under its name, or under what its names begin with."""
    text = README[README.index("## The peers") : README.index("## What each measures")]
    told = tuple(re.findall(r"^\| `([^`]+)` \| ", text, re.MULTILINE))
    table = results.candidates(REFERENCE)
    assert table is not None
    found = {row["name"] for row in table["rows"] if row["group"] in ("for one process", "for several processes")}
    found |= {each["name"] for cell in results.cells(REFERENCE) for each in cell["contenders"]}
    found -= {Pooled.name, Unguarded.name}
    assert sorted(name for name in found if not name.startswith(told)) == []
    assert sorted(name for name in told if not any(each.startswith(name) for each in found)) == []


# The picture --------------------------------------------------------------------------------------------------------


def test_the_picture_is_drawn_from_the_reference(tmp_path: Path) -> None:
    plot = pytest.importorskip("benches.plot", exc_type=ImportError)
    path = tmp_path / "again.svg"
    assert plot.draw(REFERENCE, path)
    svg = path.read_text(encoding="utf-8")
    assert len(svg) < PICTURE_BYTES_MAX
    drawn = {each["name"] for cell in results.cells(REFERENCE) for each in cell["contenders"]} - {Unguarded.name}
    assert drawn | {"shmpool get/release", "processes", "held 1 ms"} <= texts(svg)
    for light, dark in plot.DARK.items():
        assert svg.count(f" {light}") > 2, "a colour that the rule changes is used, else the rule is for nothing"
        assert f":{dark}!important" in svg
    alone = {**REFERENCE, "tables": [results.candidates(REFERENCE)]}
    assert plot.draw(alone, path)
    assert "shmpool get/release" in texts(path.read_text(encoding="utf-8"))
    assert "processes" not in texts(path.read_text(encoding="utf-8"))
    assert not plot.draw({**REFERENCE, "tables": []}, tmp_path / "nothing.svg")
    assert not (tmp_path / "nothing.svg").exists()


def test_the_picture_that_the_readme_shows_is_that_of_the_reference() -> None:
    plot = pytest.importorskip("benches.plot", exc_type=ImportError)
    assert re.search(rf"\]\({PICTURE.relative_to(report.README.parent)}\)", README)
    svg = PICTURE.read_text(encoding="utf-8")
    assert len(svg) < PICTURE_BYTES_MAX
    assert plot.digest(REFERENCE) in svg, "python -m benches --install benches/results/reference.json"
