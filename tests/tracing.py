"""A child run a system call at a time, to be killed, stopped or failed at any of them.

What: `Traced`, over ptrace(2). The child is forked, does what prepares it, and calls `begin()`; from there it is
stopped at each system call, at its entry and at its exit, until it calls `done()`. In between it can be killed, left
standing, or told that the kernel refuses (the call is not made, and returns an error it may return at any time).

Only the thread that calls `begin()` is traced. The thread that waits for the child must be the one that traced it.

Not here: what the child does and what must hold after it (test_system_calls.py). The C core has the same for each
instruction (core/crash.c).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal

from tests.processes import Child

SUPPORTED = platform.machine() == "x86_64"  # registers are read by their names

_TRACEME, _GETREGS, _SETREGS, _SYSCALL, _DETACH, _SETOPTIONS = 0, 12, 13, 24, 17, 0x4200
_TRACESYSGOOD, _EXITKILL = 1, 0x100000
_FUTEX_COMMAND, _FUTEX_WAITS = 0x7F, (0, 9)
_NO_FILE = 0xFFFFFFFF
_LIBC = ctypes.PyDLL(None, use_errno=True)
_LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_LIBC.ptrace.restype = ctypes.c_long


_REGISTERS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)


class Registers(ctypes.Structure):
    """user_regs_struct of x86-64."""

    _fields_ = [(name, ctypes.c_ulonglong) for name in _REGISTERS]
    rax: int
    orig_rax: int
    rsi: int
    r8: int


# What the kernel may answer at any time, by the number of the call: too many descriptors, no memory, no room, no locks.
_REFUSALS: dict[int, tuple[str, tuple[int, ...]]] = {
    2: ("open", (errno.EMFILE,)),
    7: ("poll", (errno.EINTR, errno.ENOMEM)),
    9: ("mmap", (errno.ENOMEM,)),
    32: ("dup", (errno.EMFILE,)),
    41: ("socket", (errno.EMFILE, errno.ENOBUFS)),
    42: ("connect", (errno.ECONNREFUSED, errno.ENETUNREACH)),
    44: ("sendto", (errno.ENOBUFS,)),
    45: ("recvfrom", (errno.ENOMEM, errno.EINTR)),
    46: ("sendmsg", (errno.ENOBUFS, errno.EINTR)),
    47: ("recvmsg", (errno.ENOMEM, errno.EINTR)),
    49: ("bind", (errno.ENOMEM,)),
    50: ("listen", (errno.EADDRINUSE,)),
    51: ("getsockname", (errno.ENOBUFS,)),
    52: ("getpeername", (errno.ENOTCONN,)),
    53: ("socketpair", (errno.EMFILE,)),
    54: ("setsockopt", (errno.ENOMEM,)),
    56: ("clone", (errno.EAGAIN,)),
    72: ("fcntl", (errno.ENOLCK,)),
    77: ("ftruncate", (errno.ENOSPC,)),
    86: ("link", (errno.ENOSPC,)),
    202: ("futex", (errno.EINTR,)),
    257: ("openat", (errno.EMFILE,)),
    265: ("linkat", (errno.ENOSPC,)),
    271: ("ppoll", (errno.EINTR,)),
    285: ("fallocate", (errno.ENOSPC,)),
    288: ("accept4", (errno.EMFILE,)),
    290: ("eventfd2", (errno.EMFILE,)),
    291: ("epoll_create1", (errno.EMFILE,)),
    293: ("pipe2", (errno.EMFILE,)),
    319: ("memfd_create", (errno.EMFILE,)),
    434: ("pidfd_open", (errno.EMFILE,)),
    435: ("clone3", (errno.EAGAIN,)),
}
# Calls that nobody else can notice: to be killed before, in or after one of them is the same. They are passed over:
# read, stat, fstat, lstat, lseek, mprotect, munmap, brk, signal actions and masks, ioctl, pread, access, madvise,
# getpid, getuid, getgid, geteuid, getegid, readlink, statfs, gettid, getdents, clocks, newfstatat, readlinkat, prlimit,
# getrandom.
_UNNOTICED = frozenset(
    {0, 4, 5, 6, 8, 10, 11, 12, 13, 14, 16, 17, 21, 28, 39, 89, 102, 104, 107, 108, 137, 186, 217, 228, 229, 262}
    | {267, 302, 318}
)
_F_DUPFD_CLOEXEC, _LOCKS = 1030, (36, 37)  # fcntl commands; the others cannot fail


def _ptrace(request: int, pid: int = 0, data: int | ctypes.Array[ctypes.c_char] | Registers = 0) -> None:
    where = data if isinstance(data, int) else ctypes.addressof(data)
    ctypes.set_errno(0)
    if _LIBC.ptrace(request, pid, None, where) == -1 and ctypes.get_errno():
        raise OSError(ctypes.get_errno(), f"ptrace request {request:#x}")


def begin() -> None:
    """In the child: system calls count from here."""
    _ptrace(_TRACEME)
    os.kill(os.getpid(), signal.SIGSTOP)


def done() -> None:
    """In the child: and no longer."""
    os.kill(os.getpid(), signal.SIGUSR1)


class Traced:
    """One child that has called `begin()`."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.calls = 0  # entered so far
        self.is_done = self.inside = False
        self._expect(signal.SIGSTOP)
        _ptrace(_SETOPTIONS, self.child.pid, _TRACESYSGOOD | _EXITKILL)

    def _expect(self, wanted: int) -> None:
        status = os.waitpid(self.child.pid, 0)[1]
        assert os.WIFSTOPPED(status), f"the child ended: {status:#x}"
        assert os.WSTOPSIG(status) == wanted, os.WSTOPSIG(status)

    def step(self) -> bool:
        """To the entry of the next call that others can notice, or to the exit of this one. False: it is done."""
        while self._step():
            if not self.inside:
                return True
            if self._registers().orig_rax not in _UNNOTICED:
                self.calls += 1
                return True
            self._step()
        return False

    def _step(self) -> bool:
        number = 0
        while not self.is_done:
            _ptrace(_SYSCALL, self.child.pid, number)
            status = os.waitpid(self.child.pid, 0)[1]
            if not os.WIFSTOPPED(status):
                self.child.status = status
                self.child.result()
            number = os.WSTOPSIG(status)
            if number == signal.SIGTRAP | 0x80:
                self.inside = not self.inside
                return True
            self.is_done = number == signal.SIGUSR1
        return False

    def refusals(self) -> tuple[str, tuple[int, ...]]:
        """At an entry: the call's name, and the errors that it may give now; none for one that is not refused."""
        registers = self._registers()
        name, refusals = _REFUSALS.get(registers.orig_rax, ("", ()))
        if (
            (name == "mmap" and registers.r8 & _NO_FILE == _NO_FILE)  # the interpreter's own memory
            or (name == "futex" and registers.rsi & _FUTEX_COMMAND not in _FUTEX_WAITS)
            or (name == "fcntl" and registers.rsi not in (_F_DUPFD_CLOEXEC, *_LOCKS))
        ):
            return "", ()
        if name == "fcntl" and registers.rsi == _F_DUPFD_CLOEXEC:
            return "dup", (errno.EMFILE,)
        return name, refusals

    def refuse(self, error: int) -> None:
        """At an entry: the call is not made; it returns `error`."""
        registers = self._registers()
        registers.orig_rax = ctypes.c_ulonglong(-1).value
        _ptrace(_SETREGS, self.child.pid, registers)
        assert self.step()
        registers = self._registers()
        registers.rax = ctypes.c_ulonglong(-error).value
        _ptrace(_SETREGS, self.child.pid, registers)

    def _registers(self) -> Registers:
        registers = Registers()
        _ptrace(_GETREGS, self.child.pid, registers)
        return registers

    def let_go(self) -> None:
        """It runs on by itself, from its `done()`."""
        assert self.is_done
        _ptrace(_DETACH, self.child.pid)

    def end(self) -> None:
        """Killed where it stands."""
        if self.child.status is None:
            self.child.kill()
