"""The app that servers run in the tests: `application` is WSGI, `asgi` is ASGI, `answer()` is what both do.

    /pid               who answers, and the pool's name; leases nothing
    /use?n=1           lease a connection, use it exclusively n times, give it back
    /hold?ms=100       the same, and hold the lease so long
    /die?how=kill      end this process in the middle of its use: `kill` (SIGKILL), `exit` (os._exit(7))
    /hang?s=60         sleep in the middle of its use; `&deaf=1`: with SIGABRT and SIGTERM blocked
    /every             lease every slot of the pool at once, use each connection
    /stats             the pool's counts

The answer is JSON: {"pid", "pool", ...}; 500 with {"error": ...} for whatever an endpoint raised. Each request is
written to the journal (tests/webservers.py, `Journal`) before it leases anything.

The pool is made in module code, as a user would, from the environment: SHMPOOL_APP_UPSTREAM, _NAME, _SETTINGS (JSON).

Not here: who runs it. It is imported by servers, never by tests.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401 - for getaddrinfo(): a worker that changed its user may not be able to load it
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import parse_qsl

import shmpool
from tests.servers import ask, exclusive_use

_journal = os.open(os.environ["SHMPOOL_APP_JOURNAL"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def note(event: str, rest: str = "-") -> None:
    """One line of the journal; one write of a few bytes is not torn."""
    os.write(_journal, f"{event} {os.getpid()} {rest}\n".encode())


note("boot")
_settings: dict[str, Any] = json.loads(os.environ["SHMPOOL_APP_SETTINGS"])
if _name := os.environ["SHMPOOL_APP_NAME"]:
    _settings["name"] = _name
pool = shmpool.Pool(os.environ["SHMPOOL_APP_UPSTREAM"], **_settings)


def _use(query: dict[str, str]) -> dict[str, Any]:
    with pool.get() as lease:
        token = f"{os.getpid()}:{query['id']}"
        return {"connection": exclusive_use(lease.socket, token, int(query.get("n", "1"))), "slot": lease.id}


def _begin(lease: shmpool.PooledConnection, query: dict[str, str]) -> tuple[str, int]:
    """Open a stretch of exclusive use: until it is ended, whoever else uses this connection is seen as a violation."""
    token = f"{os.getpid()}:{query['id']}"
    begun = ask(lease.socket, f"BEGIN {token}")
    assert begun.startswith("OK "), begun
    return token, int(begun[3:])


def _end(lease: shmpool.PooledConnection, token: str) -> None:
    for request in ("USE", "END"):
        answer = ask(lease.socket, f"{request} {token}")
        assert answer == "OK", answer


def _hold(query: dict[str, str]) -> dict[str, Any]:
    with pool.get() as lease:
        token, number = _begin(lease, query)
        time.sleep(float(query.get("ms", "100")) / 1000)  # sleep: the lease is to be held so long
        _end(lease, token)
        return {"connection": number}


def _die(query: dict[str, str]) -> dict[str, Any]:
    with pool.get() as lease:
        _begin(lease, query)
        note("die", query["id"])
        if query.get("how") == "exit":
            os._exit(7)
        os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a process that killed itself goes on")


def _hang(query: dict[str, str]) -> dict[str, Any]:
    with pool.get() as lease:
        token, number = _begin(lease, query)
        if query.get("deaf"):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGABRT, signal.SIGTERM})
        note("hang", query["id"])
        time.sleep(float(query.get("s", "60")))  # sleep: it is to hang until it is killed
        _end(lease, token)
    return {"connection": number}


def _every(query: dict[str, str]) -> dict[str, Any]:
    leases: list[shmpool.PooledConnection] = []
    try:
        while len(leases) < pool.config.max_connections:
            leases.append(pool.get())
        return {"connections": [exclusive_use(each.socket, f"{os.getpid()}:{query['id']}") for each in leases]}
    finally:
        for each in leases:
            each.release()


def _stats(_: dict[str, str]) -> dict[str, Any]:
    stats = pool.stats()
    workers = [{"pid": each.pid, "alive": each.alive, "held": each.held} for each in stats.workers]
    counts = {name: getattr(stats, name) for name in ("open", "in_use", "idle", "created", "recovered_leases")}
    return {**counts, "workers": workers, "connections": stats.connections}


ENDPOINTS: dict[str, Callable[[dict[str, str]], dict[str, Any]]] = {
    "/pid": lambda _: {"maintained": pool._maintenance.is_running()},
    "/use": _use,
    "/hold": _hold,
    "/die": _die,
    "/hang": _hang,
    "/every": _every,
    "/stats": _stats,
}


def answer(path: str, query_string: str) -> tuple[int, bytes]:
    """Status and body for a request."""
    query = {"id": "-", **dict(parse_qsl(query_string))}
    note("begin", query["id"])
    known = {"pid": os.getpid(), "pool": pool.name}
    try:
        status, said = 200, ENDPOINTS[path](query)
    except Exception as error:  # noqa: BLE001 - the test wants to see whatever it is
        status, said = 500, {"error": f"{type(error).__name__}: {error}"}
    note("end", query["id"])
    return status, json.dumps({**known, **said}).encode()


def application(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    status, body = answer(environ["PATH_INFO"], environ.get("QUERY_STRING", ""))
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    start_response("200 OK" if status == 200 else "500 Internal Server Error", headers)
    return [body]


async def asgi(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    import asyncio  # here, because it costs a worker of a WSGI server more than all else

    if scope["type"] == "lifespan":
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": f"{message['type']}.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    status, body = await asyncio.to_thread(answer, scope["path"], scope["query_string"].decode())
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
