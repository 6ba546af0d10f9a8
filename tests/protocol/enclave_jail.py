"""Runs a Python program under the restrictions of Gramine that Linux can impose.

    python enclave_jail.py SEGMENT FOLDER python (-m MODULE | -c CODE) ARGUMENTS…

The program may write only into FOLDER, which stands for a tmpfs of the enclave, and to SEGMENT. It
ends with SIGSYS if it tries what Gramine cannot do, so that no fallback hides the attempt.
"""

import ctypes
import errno
import os
import platform
import runpy
import struct
import sys
from pathlib import Path

IS_POSSIBLE = sys.platform == "linux" and platform.machine() == "x86_64"
LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2

KILL, ALLOW = 0x80000000, 0x7FFF0000
LOAD, JUMP_EQUAL, JUMP_SET, AND, RETURN = 0x20, 0x15, 0x45, 0x54, 0x06  # of BPF
NUMBER, ARCHITECTURE, X86_64 = 0, 4, 0xC000003E
X32 = 0x40000000

GETSOCKOPT, SOCKET, CLONE, FUTEX, CLONE3 = 55, 41, 56, 202, 435
CLONE_THREAD = 0x10000
FUTEX_PRIVATE, FUTEX_CLOCK_REALTIME, FUTEX_WAIT_BITSET = 128, 256, 9
TCP, TCP_INFO = 6, 11
FORBIDDEN = {
    "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "futex_waitv": 449, "futex_wake": 454,
    "futex_wait": 455, "futex_requeue": 456,
}  # fmt: skip
ABSENT = {  # a program may ask for these, and go on without
    "clone3": CLONE3, "inotify_init1": 294, "io_uring_setup": 425, "memfd_create": 319,
    "msgget": 68, "pidfd_open": 434, "process_vm_readv": 310, "semget": 64, "shmget": 29,
}  # fmt: skip

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
WRITE_FILE, TRUNCATE = 1 << 1, 1 << 14
MAKE_OR_REMOVE = sum(1 << bit for bit in range(4, 13))
TRUNCATE_SINCE = 3  # version of Landlock


def no(number: int) -> int:
    """The result of a system call that fails with this error."""
    return 0x00050000 | number


class Filter:
    """A seccomp filter: each method adds a rule, and the first that fits decides."""

    def __init__(self) -> None:
        self._program = [
            (LOAD, 0, 0, ARCHITECTURE),
            (JUMP_EQUAL, 1, 0, X86_64),
            (RETURN, 0, 0, KILL),
        ]
        self._program += [(LOAD, 0, 0, NUMBER), (JUMP_SET, 0, 1, X32), (RETURN, 0, 0, KILL)]

    def call(self, number: int, result: int, *test: tuple[int, int, int, int]) -> None:
        """Give `result` to a system call if it gets through `test`, which leaves by its jumps."""
        self._program += [(LOAD, 0, 0, NUMBER), (JUMP_EQUAL, 0, len(test) + 1, number)]
        self._program += [*test, (RETURN, 0, 0, result)]

    def install(self) -> None:
        self._program.append((RETURN, 0, 0, ALLOW))
        packed = b"".join(struct.pack("=HBBI", *each) for each in self._program)
        code = ctypes.create_string_buffer(packed, len(packed))
        program = struct.pack("=HxxxxxxQ", len(self._program), ctypes.addressof(code))
        check(LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program))


def argument(place: int) -> int:
    """The lower half of an argument of a system call; the upper half of these is unused."""
    return 16 + 8 * place


def forbid_calls() -> None:
    """Forbid new processes, all sockets but TCP, and futexes that wake other processes."""
    rules = Filter()
    for number in FORBIDDEN.values():
        rules.call(number, KILL)
    for number in ABSENT.values():
        rules.call(number, no(errno.ENOSYS))
    rules.call(CLONE, KILL, (LOAD, 0, 0, argument(0)), (JUMP_SET, 1, 0, CLONE_THREAD))
    # Not netlink, nor the sockets of a resolver: UDP, and Unix sockets to a name service.
    rules.call(
        SOCKET, KILL, (LOAD, 0, 0, argument(0)), (JUMP_EQUAL, 2, 0, 2), (JUMP_EQUAL, 1, 0, 10)
    )
    rules.call(SOCKET, KILL, (LOAD, 0, 0, argument(1)), (AND, 0, 0, 0xF), (JUMP_EQUAL, 1, 0, 1))
    # To join a thread, the C library waits without the flag; then the kernel itself wakes it.
    rules.call(
        FUTEX, KILL, (LOAD, 0, 0, argument(1)), (JUMP_SET, 3, 0, FUTEX_PRIVATE),
        (AND, 0, 0, 0xFFFFFFFF ^ FUTEX_CLOCK_REALTIME), (JUMP_EQUAL, 1, 0, FUTEX_WAIT_BITSET),
    )  # fmt: skip
    rules.call(
        GETSOCKOPT, no(errno.ENOPROTOOPT), (LOAD, 0, 0, argument(1)), (JUMP_EQUAL, 0, 3, TCP),
        (LOAD, 0, 0, argument(2)), (JUMP_EQUAL, 0, 1, TCP_INFO),
    )  # fmt: skip
    rules.install()


def landlock_version() -> int:
    """The version of Landlock, or 0 where there is none."""
    return max(0, LIBC.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1))


def forbid_writing(segment: Path, folder: Path) -> None:
    """Let this process write into `folder`, and to memory that others made beside `segment`."""
    to_file = WRITE_FILE | (TRUNCATE if landlock_version() >= TRUNCATE_SINCE else 0)
    handled = to_file | MAKE_OR_REMOVE
    rules = check(LIBC.syscall(LANDLOCK_CREATE, struct.pack("=Q", handled), ctypes.c_size_t(8), 0))
    for path, rights in (
        (folder, handled),
        (segment.parent, WRITE_FILE),
        (Path(os.devnull), to_file),
    ):
        place = os.open(path, os.O_PATH)
        rule = struct.pack("=Qi", rights, place)
        check(LIBC.syscall(LANDLOCK_ADD, rules, 1, rule, 0))
        os.close(place)
    check(LIBC.syscall(LANDLOCK_RESTRICT, rules, 0))
    os.close(rules)

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(f"{segment.parent}/"):
            path = Path(str(arguments[0]))
            # `tempfile` opens its folder, with an opener that makes a file there.
            if path not in (segment, folder) and folder not in path.parents:
                raise PermissionError(f"{path} is not the file of shared memory")

    sys.addaudithook(watch)


def check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def main(segment: str, folder: str, _python: str, kind: str, program: str, *rest: str) -> None:
    check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    forbid_writing(Path(segment), Path(folder))
    forbid_calls()
    sys.path[0] = ""
    sys.argv = [program if kind == "-m" else "-c", *rest]
    if kind == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main(*sys.argv[1:])
