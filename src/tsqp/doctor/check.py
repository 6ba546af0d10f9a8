"""Runs single checks. A check reports what it found, or what is wrong and what to do."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from tsqp.errors import RemoteError, TSQPError
from tsqp.runtime.tracebacks import without_foreign_messages

State = Literal["ok", "bad", "skipped"]
NOT_SERVED = "start it with --serve"  # part of the message of a worker that serves other modes


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    Attributes:
        found: the finding in a few words; if the check failed, the cause and what to do.
        traceback: traceback of an unexpected error, here or reported by a worker.
    """

    name: str
    state: State
    seconds: float
    found: str
    traceback: str = ""


class Wrong(Exception):
    """Raised by a check that fails; one sentence says what is wrong and what to do."""


class Skipped(Exception):
    """Raised by a check that does not apply; one sentence says why."""


def run_check(name: str, check: Callable[[], str]) -> Check:
    """Run one check; turns any exception into a result."""
    began = perf_counter()

    def ended(state: State, found: object, trace: str = "") -> Check:
        return Check(name, state, perf_counter() - began, str(found), trace)

    try:
        return ended("ok", check())
    except Skipped as exc:
        return ended("skipped", exc)
    except RemoteError as exc:
        return ended("bad", exc, exc.remote_traceback)
    except (Wrong, TSQPError) as exc:
        return ended("bad", exc)
    except Exception as exc:
        trace = without_foreign_messages(exc)
        return ended("bad", "This check failed unexpectedly.", trace)
