"""Keeps the memory of the trusted process out of core dumps, and away from debuggers."""

import ctypes
import logging
import os
from collections.abc import Callable

log = logging.getLogger("tsqp")

PR_SET_DUMPABLE = 4  # of prctl(2)


def harden_process() -> bool:
    """Keep the memory of this process out of core dumps and away from debuggers.

    `tsqp generate` calls this first. `LLM` does not, because it affects the whole process: a
    program that uses `LLM` with secret prompts should call it first. It may be called again, and it
    cannot be undone.

    - RLIMIT_CORE is set to 0: a crash leaves no core file. Children inherit that.
    - PR_SET_DUMPABLE is set to 0 (Linux): a crash handler is not sent a core dump either, and
      processes of the same user can neither attach (gdb, strace, py-spy) nor read /proc/PID/mem or
      /proc/PID/environ. The files in /proc/PID then belong to root. Programs that this process
      starts are dumpable again; a local worker is one, and knows nothing secret.

    Root, and whoever controls the kernel, can still read everything; so can snapshots of a virtual
    machine, and swap.

    Returns:
        whether both could be done. If not, a warning says why.
    """
    done = True
    for what, forbid in (("core dumps", _forbid_core_files), ("debuggers", _forbid_dumps)):
        try:
            forbid()
        except (OSError, ValueError, ImportError, AttributeError) as exc:
            log.warning("this system does not allow TSQP to forbid %s (%s)", what, exc)
            done = False
    return done


def _forbid_core_files() -> None:
    import resource  # not everywhere

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _forbid_dumps() -> None:
    prctl: Callable[..., int] = ctypes.CDLL(None, use_errno=True).prctl
    zero = ctypes.c_ulong(0)
    if prctl(PR_SET_DUMPABLE, zero, zero, zero, zero) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
