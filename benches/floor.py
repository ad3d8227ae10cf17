"""Builds `_floor.c` for the running interpreter at the first use and loads it.

The built file lies under `benches/.build`, or in the user's temporary directory where the tree cannot be written to,
and is named after the interpreter and the source, so that neither an edit nor another Python finds a stale one.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import pathlib
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from types import ModuleType

SOURCE = pathlib.Path(__file__).with_name("_floor.c")


def build_directory() -> pathlib.Path:
    beside = SOURCE.parent / ".build"
    try:
        beside.mkdir(exist_ok=True)
    except OSError:
        return pathlib.Path(tempfile.mkdtemp(prefix="shmpool-benches-"))
    if os.access(beside, os.W_OK):
        return beside
    return pathlib.Path(tempfile.mkdtemp(prefix="shmpool-benches-"))


def build() -> pathlib.Path:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    digest = hashlib.sha256(SOURCE.read_bytes() + sys.version.encode()).hexdigest()[:12]
    built = build_directory() / f"_floor-{digest}{suffix}"
    if built.exists():
        return built
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    unfinished = built.with_name(f"{os.getpid()}-{built.name}")
    command = [
        *compiler,
        "-std=gnu11",
        "-O2",
        "-fPIC",
        "-shared",
        "-Wall",
        "-Wextra",
        "-Wno-missing-field-initializers",
    ]
    command += [f"-I{sysconfig.get_path('include')}", str(SOURCE), "-o", str(unfinished)]
    subprocess.run(command, check=True)
    return unfinished.replace(built)


def load() -> ModuleType:
    """The floor module; every caller gets the same one."""
    name = "benches._floor"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location("_floor", build())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module
