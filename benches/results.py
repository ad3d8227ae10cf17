"""The result of a run as a file: JSON, as `result.schema.json` says it; a line of text for each line and table in it.

A result names no host, no path and nobody. What stands in it is what was measured, to four digits, with the machine,
the versions, and the load at the start, so that a reader can judge it.

Not here: what is made of a result (`report`, `plot`).
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benches.harness import Line, Options

FORMAT = "shmpool benches, 1"
DIRECTORY = Path(__file__).with_name("results")
LATEST, REFERENCE = DIRECTORY / "latest.json", DIRECTORY / "reference.json"
PACKAGES = (
    "DBUtils",
    "SQLAlchemy",
    "connection_pool",
    "generic-connection-pool",
    "psycopg_pool",
    "redis",
    "urllib3",
)

Result = dict[str, Any]


class Unusable(ValueError):
    """The file cannot be used; the text says why and what to do."""


def make(benches: Sequence[str], machine: dict[str, Any], lines: Iterable[Line], options: Options) -> Result:
    return {
        "format": FORMAT,
        "quick": options.quick,
        "floors_only": options.floors_only,
        "benches": list(benches),
        "machine": machine,
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "lines": [line.to_json() for line in lines],
        "tables": options.tables,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def write(result: Result, path: Path) -> None:
    def text(value: Any) -> str:
        if not isinstance(value, list) or not value:
            return json.dumps(value)
        return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"

    entries = (f" {json.dumps(key)}: {text(value)}" for key, value in result.items())
    path.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")


def read(path: Path) -> Result:
    """Raises Unusable if it is none, OSError if it cannot be read."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Unusable(f"{path} is not JSON ({error}); python -m benches --json FILE writes a result") from error
    found = result.get("format") if isinstance(result, dict) else None
    if found != FORMAT:
        raise Unusable(
            f"{path} is no result of format {FORMAT!r} but {found!r}; python -m benches --json FILE writes one"
        )
    return dict(result)


def candidates(result: Result) -> dict[str, Any] | None:
    """The table of the round trip, if that was measured."""
    return next((table for table in result["tables"] if table["bench"] == "roundtrip"), None)


def cells(result: Result) -> list[dict[str, Any]]:
    """The cells of the grid that were measured."""
    return [table for table in result["tables"] if table["bench"] == "grid"]
