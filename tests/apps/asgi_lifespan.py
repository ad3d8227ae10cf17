"""The ASGI app of `web.py` with the pool tied to the server's lifespan events: connections are opened before the worker
takes requests, and its place in the pool is given back when it is told to end. That makes things faster, never right.

The pool is synchronous: what may wait runs in a thread.

Not here: the endpoints (`web.py`), who runs it (`tests/test_servers_asgi.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from tests.apps.web import asgi as endpoints
from tests.apps.web import note, pool


async def asgi(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    if scope["type"] != "lifespan":
        await endpoints(scope, receive, send)
        return
    await receive()
    await asyncio.to_thread(pool.maintain)
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await asyncio.to_thread(pool.leave)
    note("left")
    await send({"type": "lifespan.shutdown.complete"})
