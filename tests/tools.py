"""Programs that come in Debian packages (`make tools`): where they are missing, a test is left out, and says so.

Under `make check` nothing is left out: there a missing program is a failure.
"""

from __future__ import annotations

import os
import shutil

import pytest


def tool(name: str) -> str:
    """The path of a program; skips the test, or fails it, when there is none."""
    path = shutil.which(name)
    if path is None:
        text = f"{name} is not installed: make tools"
        if os.environ.get("SHMPOOL_TEST_TOOLS") == "required":
            pytest.fail(text)
        pytest.skip(text)
    return path
