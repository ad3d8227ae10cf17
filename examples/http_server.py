"""An HTTP/1.1 server with keep-alive and forked workers: `python examples/http_server.py [port] [workers]`.

Connections belong to nobody between two requests: whichever worker is free answers the next one. Try

    curl -s http://127.0.0.1:8080/[1-9]          # one connection, nine requests, several processes

Ctrl-C lets the requests that are being answered finish.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import sys

import shmpool

ENDS = (signal.SIGINT, signal.SIGTERM)


def answer(method: str, path: str, body: bytes) -> bytes:
    text = f"{method} {path} ({len(body)} bytes) answered by process {os.getpid()}\n".encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % len(text) + text


def receive(sock: socket.socket, data: bytes) -> bytes:
    part = sock.recv(65536)
    if not part:
        raise ConnectionError("the client has gone")
    return data + part


def serve(sock: socket.socket) -> bool:
    """Answer what the client has sent; False: it wants no more. Nothing is left unanswered: the next worker could not
    see what this one has taken off the socket."""
    data = receive(sock, b"")
    while data:
        while b"\r\n\r\n" not in data:
            data = receive(sock, data)
        head, _, data = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, version = first.split(" ")
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        size = int(fields.get("content-length", "0"))
        while len(data) < size:
            data = receive(sock, data)
        body, data = data[:size], data[size:]
        sock.sendall(answer(method, path, body))
        if version != "HTTP/1.1" or fields.get("connection", "").lower() == "close":
            return False
    return True


def work(pool: shmpool.Pool) -> None:
    while True:
        try:
            with pool.get() as conn:
                if not serve(conn.socket):
                    conn.discard("the client wants no more")
        except shmpool.PoolClosed:
            return
        except (OSError, ValueError) as error:  # a client that went, is slow, or does not speak HTTP
            print(f"process {os.getpid()}: {error}", file=sys.stderr)


def start(pool: shmpool.Pool) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)  # a child that has just begun must not take one for its own
    if os.fork() == 0:
        try:
            for number in ENDS:
                signal.signal(number, signal.SIG_IGN)  # the parent drains the pool, and that ends the child's loop
            work(pool)
        finally:
            os._exit(0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)


def main(port: int = 8080, workers: int = 4) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    limits = {"max_connections": 200, "idle_timeout": 15.0, "socket_timeout": 5.0, "get_timeout": math.inf}
    with shmpool.Pool.listen(f"tcp://127.0.0.1:{port}", **limits) as pool:
        for _ in range(workers):
            start(pool)
        try:
            print("http://{}:{}".format(*pool.address), flush=True)
            while True:  # one that dies is replaced; its client is told, the others notice nothing
                os.wait()
                start(pool)
        except KeyboardInterrupt:
            pool.drain(timeout=5.0)
        with contextlib.suppress(ChildProcessError):  # there is none any more
            while True:
                os.wait()
        stats = pool.stats()
        print(f"\n{stats.created} connections, served {stats.successes} times", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
