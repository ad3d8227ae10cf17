"""The public API as a user writes it. mypy strict and pyright read this file; nobody runs it."""

from __future__ import annotations

import math
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import shmpool
from shmpool import DialRequest, IPVersion, Pool, PoolConfig, PooledConnection, PoolStats, Protocol, errors

if TYPE_CHECKING:
    from typing_extensions import assert_type


def dial(request: DialRequest) -> socket.socket:
    protocol: Protocol | None = request.protocol
    ip_version: IPVersion | None = request.ip_version
    if protocol is Protocol.UDP or ip_version is IPVersion.V6:
        raise errors.NoConnectionForProtocol(protocol="udp", available=("tcp",))
    assert_type(request.attempt, int)
    return socket.create_connection(("127.0.0.1", 6379), request.timeout)


def dial_with_metadata(request: DialRequest) -> tuple[socket.socket, bytes]:
    return dial(request), b"primary"


def log_in(conn: PooledConnection) -> None:
    conn.session = object()


def make() -> list[Pool]:
    return [
        Pool("tcp://127.0.0.1:6379", max_connections=4),
        Pool(dial=dial, name="redis", get_timeout=math.inf),
        Pool(dial=dial_with_metadata, on_borrow=log_in, socket_timeout=None),
        Pool(config=PoolConfig(target="unix:///run/redis.sock")),
        Pool(config=PoolConfig(dial=dial_with_metadata)),
    ]


def use(pool: Pool) -> bytes:
    with pool.get() as conn:
        assert_type(conn, PooledConnection)
        conn.socket.sendall(b"PING\r\n")
        answer = conn.socket.recv(64)
    with pool.get(timeout=0.5, protocol="udp", ip_version=6) as conn:
        assert_type(conn.socket, socket.socket)
    with pool.get(protocol=Protocol.TCP, ip_version=IPVersion.V4), pool.try_get(protocol="tcp", ip_version=4):
        pass
    for conn in (pool.get_tcp(), pool.get_udp(timeout=1), pool.get_ipv4(), pool.get_ipv6()):
        conn.release()
    return answer


def look_at(conn: PooledConnection) -> None:
    assert_type(conn.id, int)
    assert_type(conn.age, float)
    assert_type(conn.created_at, float)
    assert_type(conn.reuse_count, int)
    metadata: bytes | None = conn.metadata
    same_protocol: bool = conn.protocol == "tcp"
    same_version: bool = conn.ip_version == 4
    peer: object = conn.peer
    print(metadata, same_protocol, same_version, peer, conn.session)
    conn.discard()
    conn.discard("why")
    conn.discard(reason="why")


def manage(pool: Pool) -> None:
    assert_type(pool.stats(), PoolStats)
    assert_type(pool.name, str)
    assert_type(pool.closed, bool)
    assert_type(pool.config, PoolConfig)
    pool.maintain()
    pool.close(timeout=1.0)
    with Pool("tcp://127.0.0.1:6379") as other:
        other.close()


def configure(path: Path) -> PoolConfig:
    config = PoolConfig.from_toml(path, on_return=print)
    config = PoolConfig.from_dict({**config.to_dict(), "max_connections": 5})
    assert_type(config.target, str | None)
    assert_type(config.effective_min_connections, int)
    print(config.to_json())
    return config.replace(name="redis")


def handle(pool: Pool) -> None:
    try:
        pool.get().release()
    except errors.PoolTimeout as error:
        assert_type(error.waited, float)
        leased: int = error.counts["leased"]
        print(leased, error.__cause__)
    except shmpool.InvalidConfig as error:
        for part in error.errors:
            print(part.field, part.value, part.remedy)
    except (shmpool.PoolError, TimeoutError, ConnectionError) as error:
        print(error)


def watch() -> None:
    for found in shmpool.list_pools():
        print(found)
    print(shmpool.inspect("redis"))
