"""Calls a function when nobody holds an object any more."""

import weakref
from collections.abc import Callable

_watched: set[weakref.ref[object]] = set()


def call_when_dropped(owner: object, call: Callable[[], object]) -> None:
    """Call `call` when the last reference to `owner` is gone, but not because Python ends.

    This is `weakref.finalize`, whose registry Python walks at its end. That walk fails if a thread
    drops an object meanwhile.

    Args:
        call: must not refer to `owner`.
    """

    def dropped(reference: weakref.ref[object]) -> None:
        _watched.discard(reference)
        call()

    _watched.add(weakref.ref(owner, dropped))
