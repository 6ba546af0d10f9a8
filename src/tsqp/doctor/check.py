"""One check after the other: each says what it found, or what is wrong and what to do."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from tsqp.errors import RemoteError, TSQPError
from tsqp.runtime.tracebacks import without_foreign_messages

State = Literal["ok", "bad", "skipped"]
NOT_SERVED = "start it with --serve"  # what a worker says that serves the other modes


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found.

    Attributes:
        found: in a few words; of a check that failed, the whole cause and what to do.
        traceback: where the cause is one that nobody foresaw, and what a worker said of its own.
    """

    name: str
    state: State
    seconds: float
    found: str
    traceback: str = ""


class Wrong(Exception):
    """A check that failed: one sentence, what is wrong and what to do."""


class Skipped(Exception):
    """A check that does not apply: one sentence, why."""


def run_check(name: str, check: Callable[[], str]) -> Check:
    """Run one check, whatever it raises."""
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
