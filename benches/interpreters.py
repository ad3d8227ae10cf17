"""New interpreters for the benches, whose modules are compiled before the clock runs.

A developer's environment may forbid Python to write bytecode, and then each new process compiles what it imports. Users
have installed packages, which are compiled; so a private cache of bytecode is used, which the first run fills.

Not here: any timing.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
from types import TracebackType

ROOT = pathlib.Path(__file__).resolve().parent.parent
MISSING = 3  # exit status
HAS = f"""
import importlib.util, sys
if importlib.util.find_spec({{module!r}}) is None:
    sys.exit({MISSING})
import {{module}}
print({{module!r}})
"""


class Interpreters:
    """Runs programs in new interpreters that find this source tree. The cache goes with this object."""

    def __init__(self) -> None:
        self._cache = tempfile.TemporaryDirectory(prefix="shmpool-bench-")
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": self._cache.name}
        self._environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def output(self, program: str, *arguments: str) -> str:
        """What the program prints. CalledProcessError when it fails."""
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=self._environment)
        return done.stdout

    def has(self, module: str) -> bool:
        """Whether it can be imported; it is compiled then."""
        try:
            return bool(self.output(HAS.format(module=module)))
        except subprocess.CalledProcessError as error:
            if error.returncode == MISSING:
                return False
            raise

    def close(self) -> None:
        self._cache.cleanup()

    def __enter__(self) -> Interpreters:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
