"""Only the C extension; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup

CORE = Path("shmpool", "core")

setup(
    ext_modules=[
        Extension(
            "shmpool._core",
            sources=sorted(map(str, CORE.glob("*.c"))),
            # What makes an extension that was built in place stale, besides its sources.
            depends=[*sorted(map(str, CORE.glob("*.h"))), "setup.py"],
            extra_compile_args=[
                "-std=c11",
                "-D_GNU_SOURCE",
                "-O3",
                "-Wall",
                "-Wextra",
                "-fvisibility=hidden",
                "-pthread",
            ],
            extra_link_args=["-pthread"],
        )
    ]
)
