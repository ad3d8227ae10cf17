"""Bans that no linter knows, each with what to do instead. A rule is a function from the project to its offences."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ROOT / "shmpool" / "core"
TEXT_SUFFIXES = {".c", ".cfg", ".h", ".ini", ".md", ".py", ".pyi", ".sh", ".toml", ".yml", ""}
OURS = ("shmpool", "tests", "benches", "docs", "examples", ".ci", ".github")
FUNCTION_LINES_MAX = 60

Offences = Iterator[str]
RULES: list[tuple[str, Callable[[Path], Offences]]] = []


def rule(instead: str) -> Callable[[Callable[[Path], Offences]], Callable[[Path], Offences]]:
    """Register a rule, with what to do in place of what it bans."""

    def register(check: Callable[[Path], Offences]) -> Callable[[Path], Offences]:
        RULES.append((instead, check))
        return check

    return register


def files(root: Path, *suffixes: str, under: tuple[str, ...] = OURS) -> Iterator[Path]:
    """Files of the project by suffix, without what builds and tools put there."""
    for top in under:
        for path in sorted((root / top).rglob("*")):
            inner = path.relative_to(root / top).parts
            built = any(part.startswith((".", "__pycache__")) or part == "build" for part in inner)
            if path.is_file() and path.suffix in suffixes and not built:
                yield path


def lines(root: Path, paths: Iterator[Path], pattern: str) -> Iterator[tuple[str, str]]:
    """(where, line) for each line that the pattern is found in."""
    wanted = re.compile(pattern)
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if wanted.search(line):
                yield f"{path.relative_to(root)}:{number}", line.strip()


@rule("use tmp_path, tempfile, sys.executable or a path relative to the file")
def machine_paths(root: Path) -> Offences:
    tops = (path for path in sorted(root.iterdir()) if path.is_file() and not path.name.endswith((".so", ".log")))
    every = (path for paths in (tops, files(root, *TEXT_SUFFIXES)) for path in paths if path.suffix in TEXT_SUFFIXES)
    # Spelt in pieces, so that this file does not offend itself.
    roots = "|".join(("work", "root", "home", "Users", "farm", "t" + "mp"))
    for where, line in lines(root, every, rf"(?<![\w.$}}/-])/({roots})/[A-Za-z0-9_.]"):
        yield f"{where}: {line}"


@rule("wait for the thing itself (event, socket, process, lock); where only time will do, say `# sleep: why`")
def sleeps_in_tests(root: Path) -> Offences:
    for path in files(root, ".py", under=("tests",)):
        text = path.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(ast.parse("\n".join(text))):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.sleep", "sleep")):
                continue
            if not re.search(r"# sleep: \w", text[node.lineno - 1]):
                yield f"{path.relative_to(root)}:{node.lineno}: {text[node.lineno - 1].strip()}"


@rule("keep the core free of Python: only core/module.h includes Python.h")
def python_in_the_core(root: Path) -> Offences:
    others = (path for path in files(root, ".c", ".h", under=("shmpool",)) if path.name != "module.h")
    for where, _ in lines(root, others, r"#\s*include\s*[<\"](Python|structmember)\.h"):
        yield where


@rule("include atomics.h and use its macros: each names its ORDER")
def atomics_elsewhere(root: Path) -> Offences:
    others = (path for path in files(root, ".c", ".h", under=("shmpool",)) if path.name != "atomics.h")
    for where, _ in lines(root, others, r"#\s*include\s*<stdatomic\.h>|\b__(atomic|sync)_\w+\("):
        yield where


@rule("explain the tag where it is used: `ORDER(tag): ordering. Pairs with … Weaker is wrong because …`")
def orders_without_reason(root: Path) -> Offences:
    sources = [path.read_text(encoding="utf-8") for path in files(root, ".c", ".h", under=("shmpool",))]
    explained = {tag for text in sources for tag in re.findall(r"\bORDER\((\w+)\):", text)}
    macros = (CORE / "atomics.h").read_text(encoding="utf-8")
    taking_a_tag = set(re.findall(r"^#define (\w+)\(tag\b", macros, re.MULTILINE))
    for path in files(root, ".c", ".h", under=("shmpool",)):
        for name, tag in re.findall(r"\b(\w+)\((\w+)\s*[,)]", _without_comments(path.read_text(encoding="utf-8"))):
            if name in taking_a_tag and tag != "tag" and tag not in explained:
                yield f"{path.relative_to(root)}: {name}({tag}, …)"


@rule("use the tag, or drop its explanation")
def orders_without_use(root: Path) -> Offences:
    sources = {path: path.read_text(encoding="utf-8") for path in files(root, ".c", ".h", under=("shmpool",))}
    code = "\n".join(_without_comments(text) for text in sources.values())
    for path, text in sources.items():
        for tag in re.findall(r"\bORDER\((\w+)\):", text):
            if tag != "tag" and not re.search(rf"\b\w+\({tag}\s*[,)]", code):
                yield f"{path.relative_to(root)}: ORDER({tag})"


def _without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)


@rule(f"split it: a function of the core has at most {FUNCTION_LINES_MAX} lines")
def long_functions(root: Path) -> Offences:
    for path in files(root, ".c", ".h", under=("shmpool",)):
        for name, first, last in _c_functions(path.read_text(encoding="utf-8")):
            if last - first + 1 > FUNCTION_LINES_MAX:
                yield f"{path.relative_to(root)}:{first}: {name}() has {last - first + 1} lines"


def _c_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """(name, first line, last line) of each function, in the layout that we write: its closing brace in column 0."""
    name, first = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        opening = re.match(r"[A-Za-z_][^;=#]*?\b(\w+)\(", line)
        if opening and not line.startswith(("typedef", "struct", "enum", "_Static_assert")):
            name, first = opening.group(1), number
        elif line.startswith("}") and name:
            yield name, first, number
            name = ""
        elif re.match(r"[^\s{}].*;\s*$", line):  # it was a declaration
            name = ""


@rule("open the file with what it is, why, and what is not here")
def silent_files(root: Path) -> Offences:
    for path in files(root, ".c", ".h", ".py", ".pyi", under=("shmpool",)):
        if not path.read_text(encoding="utf-8").lstrip().startswith(("/*", "//", '"""', 'r"""')):
            yield str(path.relative_to(root))


@rule("catch what you expect; what you do not expect must be seen")
def swallowed_errors(root: Path) -> Offences:
    for path in files(root, ".py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler) and _swallows(node):
                yield f"{path.relative_to(root)}:{node.lineno}: {ast.unparse(node).splitlines()[0]}"


def _swallows(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    broad = ast.unparse(handler.type) in ("Exception", "BaseException")
    return broad and all(isinstance(node, ast.Pass) or _is_ellipsis(node) for node in handler.body)


def _is_ellipsis(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.value.value is ...


@rule("import upwards only: integrations, cli -> pool -> dialing, inspector -> config -> errors")
def imports_that_run_back(root: Path) -> Offences:
    allowed = {"errors": set[str](), "config": {"errors"}, "dialing": {"errors", "config"}}
    for stem, below in allowed.items():
        path = root / "shmpool" / f"{stem}.py"
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # not inside `if TYPE_CHECKING:`
            if isinstance(node, ast.ImportFrom) and node.level and node.module not in below:
                yield f"shmpool/{stem}.py:{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize(("instead", "check"), [pytest.param(*entry, id=entry[1].__name__) for entry in RULES])
def test_tidy(instead: str, check: Callable[[Path], Offences]) -> None:
    offences = list(check(ROOT))
    assert not offences, f"{instead}:\n  " + "\n  ".join(offences)


# The rules themselves: each finds its offence in a project made for it.

OFFENDERS: list[tuple[Callable[[Path], Offences], str, str]] = [
    (machine_paths, "docs/a.md", "see " + "/ho" + "me/me/x"),
    (sleeps_in_tests, "tests/test_a.py", "import time\ntime." + "sleep(1)\n"),
    (python_in_the_core, "shmpool/core/slot.c", "#include <Python.h>\n"),
    (atomics_elsewhere, "shmpool/core/slot.c", "#include <stdatomic.h>\n"),
    (atomics_elsewhere, "shmpool/core/slot.c", "x = __atomic_load_n(&y, __ATOMIC_RELAXED);\n"),
    (orders_without_reason, "shmpool/core/slot.c", "int x = SHM_LOAD(nowhere, y);\n"),
    (orders_without_use, "shmpool/core/slot.c", "/* ORDER(nowhere): relaxed. */\n"),
    (long_functions, "shmpool/core/slot.c", "int f(int a,\n      int b)\n{\n" + "    a++;\n" * 60 + "}\n"),
    (silent_files, "shmpool/a.py", "import os\n"),
    (swallowed_errors, "shmpool/a.py", "try:\n    x\nexcept:\n    raise\n"),
    (swallowed_errors, "tests/a.py", "try:\n    x\nexcept Exception:\n    pass\n"),
    (imports_that_run_back, "shmpool/errors.py", "from .config import PoolConfig\n"),
]


@pytest.mark.parametrize(("check", "name", "text"), OFFENDERS)
def test_each_rule_bites(check: Callable[[Path], Offences], name: str, text: str, tmp_path: Path) -> None:
    for stem in ("errors", "config", "dialing"):
        path = tmp_path / "shmpool" / f"{stem}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text('"""."""\n', encoding="utf-8")
    assert list(check(tmp_path)) == []
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    assert len(list(check(tmp_path))) == 1


def test_every_rule_has_an_offender() -> None:
    assert {check for check, _, _ in OFFENDERS} == {check for _, check in RULES}
