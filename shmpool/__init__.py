"""One connection pool for all worker processes of a host: no proxy, no broker, no lock.

    pool = shmpool.Pool("tcp://127.0.0.1:6379", max_connections=32)   # before the fork

    with pool.get() as conn:
        conn.socket.sendall(b"PING\\r\\n")

This file only exports. What a process that only uses a pool has no need of is imported when it is asked for: figures,
events, the look from outside; integrations (`shmpool.integrations`) and the command line as well.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from . import errors
from ._core import PooledConnection
from .config import IPVersion, PoolConfig, Protocol
from .dialing import DialRequest
from .errors import (
    CannotListen,
    DescriptorsLost,
    DialError,
    ForeignUser,
    InvalidConfig,
    LeaseExpired,
    NoConnectionForIPVersion,
    NoConnectionForProtocol,
    PoolClosed,
    PoolError,
    PoolExhausted,
    PoolExists,
    PoolInUse,
    PoolNotFound,
    PoolTimeout,
    PoolUnreachable,
    SlabCorrupt,
    SlabVersionMismatch,
)
from .hooks import ClosedConnection, LeakReport
from .pool import Pool, attach, pools

if TYPE_CHECKING:
    from .events import Event, EventBatch
    from .inspector import inspect, list_pools
    from .stats import PoolStats

_LATER = {
    "Event": "events",
    "EventBatch": "events",
    "PoolStats": "stats",
    "inspect": "inspector",
    "list_pools": "inspector",
}

__version__ = "0.1.0"

__all__ = [
    "CannotListen",
    "ClosedConnection",
    "DescriptorsLost",
    "DialError",
    "DialRequest",
    "Event",
    "EventBatch",
    "ForeignUser",
    "IPVersion",
    "InvalidConfig",
    "LeakReport",
    "LeaseExpired",
    "NoConnectionForIPVersion",
    "NoConnectionForProtocol",
    "Pool",
    "PoolClosed",
    "PoolConfig",
    "PoolError",
    "PoolExhausted",
    "PoolExists",
    "PoolInUse",
    "PoolNotFound",
    "PoolStats",
    "PoolTimeout",
    "PoolUnreachable",
    "PooledConnection",
    "Protocol",
    "SlabCorrupt",
    "SlabVersionMismatch",
    "__version__",
    "attach",
    "errors",
    "inspect",
    "list_pools",
    "pools",
]


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f".{_LATER[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
