"""The far end of the benches' connections: accepts, keeps, closes on EOF, until its standard input ends."""

from __future__ import annotations

import resource
import select
import socket
import sys


def main(path: str) -> None:
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for most in (max(hard, 65536), hard):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        except (ValueError, OSError):
            continue
        break
    tcp = socket.create_server(("127.0.0.1", 0), backlog=4096)
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(path)
    unix.listen(4096)
    print(tcp.getsockname()[1], flush=True)
    serve({tcp.fileno(): tcp, unix.fileno(): unix})


def serve(listeners: dict[int, socket.socket]) -> None:
    connections: dict[int, socket.socket] = {}
    poll = select.epoll()
    poll.register(sys.stdin.fileno(), select.EPOLLIN)
    for fd in listeners:
        poll.register(fd, select.EPOLLIN)
    while True:
        for fd, _event in poll.poll():
            if fd == sys.stdin.fileno():
                return
            if fd in listeners:
                connection, _address = listeners[fd].accept()
                connections[connection.fileno()] = connection
                poll.register(connection.fileno(), select.EPOLLIN)
            elif not connections[fd].recv(4096):
                poll.unregister(fd)
                connections.pop(fd).close()


if __name__ == "__main__":
    main(sys.argv[1])
