"""A real HTTP server for the benches, in a process of its own, on a free loopback port.

Not here: the app (`http_process.py`), any timing.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import socket
import subprocess
import sys
import time
from types import TracebackType

HOST = "127.0.0.1"
START_TIMEOUT_S = 15.0


class HttpServer:
    """Attributes: `port`, `pid`. It ends when this object is closed or its owner dies. ModuleNotFoundError without
    Granian, RuntimeError when it does not start."""

    def __init__(self) -> None:
        if importlib.util.find_spec("granian") is None:
            raise ModuleNotFoundError("no HTTP server: pip install granian")
        for _ in range(10):  # another process may take the port between our look and the server's bind
            with socket.create_server((HOST, 0)) as probe:
                self.port = probe.getsockname()[1]
            root = str(pathlib.Path(__file__).resolve().parent.parent)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benches.http_process", str(self.port)],
                stdin=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": root},
            )
            self.pid = self._process.pid
            if self._answers():
                return
            self.close()
        raise RuntimeError("the HTTP server did not start on any of ten ports; see its output above")

    def _answers(self) -> bool:
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                with socket.create_connection((HOST, self.port), START_TIMEOUT_S) as client:
                    client.sendall(b"GET / HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
                    while client.recv(4096):
                        pass
                return True
            except ConnectionRefusedError:
                time.sleep(0.005)
        return False

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> HttpServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
