"""Granian started from Python instead of its command line: the app, and so its pool, is imported before the workers are
forked, and each of them inherits it; an unnamed pool will do.

    python asgi_granian.py <port> <workers> <asgi|wsgi> <seconds of a worker's life, or 0>

Granian takes no lifetime below a minute, and looks at that before its startup hooks run: here the hook sets it.

Not here: the app (`web.py`), who runs this (`tests/test_servers_asgi.py`).
"""

from __future__ import annotations

import sys

from granian import Granian
from granian.constants import Interfaces

from tests.apps import web


def main(port: str, workers: str, interface: str, lifetime_s: str) -> None:
    server = Granian(
        f"{web.__name__}:{'application' if interface == 'wsgi' else 'asgi'}",
        port=int(port),
        workers=int(workers),
        interface=Interfaces(interface),
        respawn_failed_workers=True,
        respawn_interval=0.1,
    )
    if float(lifetime_s):
        server.on_startup(lambda: setattr(server, "workers_lifetime", float(lifetime_s)))
    server.serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
