"""One connection pool for all worker processes of a host: no proxy, no broker, no lock.

    pool = shmpool.Pool("tcp://127.0.0.1:6379", max_connections=32)   # before the fork

    with pool.get() as conn:
        conn.socket.sendall(b"PING\\r\\n")

This file only exports. Integrations (`shmpool.integrations`) and the command line are imported when they are used.
"""

from __future__ import annotations

from . import errors
from ._core import PooledConnection
from .config import IPVersion, PoolConfig, Protocol
from .dialing import DialRequest
from .errors import (
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
from .events import Event, EventBatch
from .hooks import ClosedConnection, LeakReport
from .inspector import inspect, list_pools
from .pool import Pool, attach, pools
from .stats import PoolStats

__version__ = "0.1.0"

__all__ = [
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
