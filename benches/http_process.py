"""The far end of the HTTP bench: Granian with one app, in this process, until its standard input ends.

Not here: who runs this (`http_server.py`).
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from typing import Any

from granian.constants import HTTPModes
from granian.server.embed import Server

BODY = "x" * 100  # bytes


async def app(_scope: Any, protocol: Any) -> None:
    protocol.response_str(200, [("content-type", "text/plain")], BODY)


def end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


def main(port: int) -> None:
    threading.Thread(target=end_with_input, daemon=True).start()
    asyncio.run(Server(app, port=port, http=HTTPModes.http1, websockets=False, log_enabled=False).serve())


if __name__ == "__main__":
    main(int(sys.argv[1]))
