"""The public API as a user writes it. mypy strict and pyright read this file; nobody runs it."""

from __future__ import annotations

import math
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY

import shmpool
from shmpool import (
    ClosedConnection,
    DialRequest,
    IPVersion,
    LeakReport,
    Pool,
    PoolConfig,
    PooledConnection,
    PoolStats,
    Protocol,
    errors,
    exporter,
    steering,
)

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


def is_well(conn: PooledConnection) -> bool:
    conn.socket.sendall(b"PING\r\n")
    return conn.socket.recv(64) == b"+PONG\r\n"


def ended(closed: ClosedConnection) -> None:
    assert_type(closed.age, float)
    same_reason: bool = closed.reason == "owner_died"
    print(closed.id, closed.slot, closed.protocol, closed.ip_version, closed.peer, closed.uses, same_reason)


def leaked(report: LeakReport) -> None:
    assert_type(report.held, float)
    assert_type(report.stack, str | None)
    print(report.connection_id, report.slot, report.pid, report.thread, report.revoked)


def take_client(listener: socket.socket) -> tuple[socket.socket, bytes]:
    client, _ = listener.accept()
    return client, b"plain"


def make() -> list[Pool]:
    return [
        Pool("tcp://127.0.0.1:6379", max_connections=4),
        Pool(dial=dial, name="redis", get_timeout=math.inf),
        Pool(dial=dial_with_metadata, on_borrow=log_in, socket_timeout=None),
        Pool(config=PoolConfig(target="unix:///run/redis.sock")),
        Pool(config=PoolConfig(dial=dial_with_metadata)),
        Pool("tcp://127.0.0.1:6379", on_created=log_in, on_close=ended, on_leak=leaked, health_check=is_well),
        Pool(config=PoolConfig(target="tcp://127.0.0.1:6379", on_close=ended, on_leak=leaked, health_check=is_well)),
        Pool(config=PoolConfig(dial=dial, leak_action="revoke", when_down="wait", tcp_keepalive=(60, 5, 3))),
        Pool.listen("tcp://127.0.0.1:0", max_connections=100, acceptor=take_client),
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
    pool.wait_ready(timeout=5)
    pool.resize(8)
    pool.pause()
    pool.resume()
    assert_type(pool.drain(timeout=1.0), int)
    assert_type(pool.evict(), int)
    pool.evict(connection_id=7)
    pool.evict(peer=("127.0.0.1", 6379), leased=True)
    assert_type(pool.recover(), int)
    assert_type(pool.max_connections, int)
    state: str = pool.state
    address: tuple[str, int] | str = pool.address
    print(state, address)
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


def export(pool: Pool) -> None:
    REGISTRY.register(exporter.collector())
    REGISTRY.register(exporter.collector(pool, shmpool.inspect("redis")))
    assert_type(exporter.exposition(), str)


def figures(stats: PoolStats) -> None:
    assert_type(stats.upstream, str)
    assert_type(stats.upstream_retry_in, float)
    assert_type(stats.prewarm_done, bool)
    assert_type(stats.health_success_rate, float)
    assert_type(stats.diff(stats).dial_failure_rate, float)
    print(stats.connections["empty"], stats.closed["unhealthy"], stats.resize_limit, stats.overdue_leases)


def steer(name: str) -> None:
    steering.pause(name)
    steering.resume(name)
    steering.resize(name, 8)
    steering.evict(name)
    assert_type(steering.drain(name, timeout=1.0), int)
    assert_type(steering.close(name), int)
    assert_type(steering.recover(name), int)
