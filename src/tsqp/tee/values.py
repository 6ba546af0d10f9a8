"""Converts numbers and token ids of Python, numpy and torch to Python types.

A bool is not a number here, and a float is not an integer even if it has no fraction: both are
mistakes more often than not, and transformers refuses them too.
"""

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence, Set

_MAX_DIGITS = 20


def as_integer(value: object) -> int | None:
    """An integer of Python or numpy, or an array or tensor without dimensions that holds one.

    Returns:
        None for anything else.
    """
    value = _unpacked(value)
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return int(value) if is_integer else None  # type: ignore[call-overload]


def as_number(value: object) -> float | None:
    """The same for real numbers; infinite if float64 cannot hold an integer."""
    value = _unpacked(value)
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return -math.inf if value < 0 else math.inf


def as_bool(value: object) -> bool | None:
    """The same for bools."""
    value = _unpacked(value)
    return value if isinstance(value, bool) else None


def as_key(value: object) -> int | None:
    """An integer, also as decimal digits: the keys of JSON objects are strings."""
    if isinstance(value, str):
        is_decimal = value.isascii() and value.isdecimal() and len(value) <= _MAX_DIGITS
        return int(value) if is_decimal else None
    return as_integer(value)


def as_list(value: object) -> list[object] | None:
    """The items of a list, tuple, range, iterator, array or tensor.

    Returns:
        None for values without items or without an order, and for text and bytes.
    """
    if is_array(value):
        return list(_plain(value)) if value.ndim else None  # type: ignore[attr-defined, call-overload]
    if isinstance(value, str | bytes | bytearray | Mapping | Set) or not isinstance(
        value, Iterable
    ):
        return None
    return list(value)


def as_integers(items: Sequence[object]) -> list[int] | None:
    """Each item as an integer; None if any is something else."""
    integers = [as_integer(item) for item in items]
    return None if None in integers else integers  # type: ignore[return-value]


def is_array(value: object) -> bool:
    """Whether it is an array or a tensor, of numpy, torch, or a library that resembles them."""
    return hasattr(value, "ndim") and hasattr(value, "tolist") and not isinstance(value, type)


def type_of(value: object) -> str:
    """A description of a value that a message must not show: "a float", "an ndarray"."""
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _unpacked(value: object) -> object:
    """The value of an array, a tensor or a numpy scalar without dimensions."""
    return _plain(value) if is_array(value) and value.ndim == 0 else value  # type: ignore[attr-defined]


def _plain(value: object) -> object:
    """Elements as Python's own."""
    return value.tolist()  # type: ignore[attr-defined]
