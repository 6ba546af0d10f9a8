"""CBOR from outside: sizes, types and form are checked, and tags are not interpreted.

cbor2 makes dates, regular expressions and shared references from tags. None of it is needed here,
so that none of it is reachable: every tag is refused before its decoder is looked up.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import cbor2

from tsqp.errors import AttestationError

MAX_DEPTH = 4


def encode_canonical(value: Any) -> bytes:
    """The only encoding that `decode_canonical` accepts for a value."""
    return cbor2.dumps(value, canonical=True)


def decode_canonical(data: bytes, limit: int, what: str) -> Any:
    """Decode bytes that `encode_canonical` could have made of strings, numbers, lists and maps.

    Args:
        limit: maximum number of bytes.
        what: names the bytes in errors, at the beginning of a sentence.

    Raises:
        AttestationError: they are longer, not CBOR, not in the canonical form, or have a tag.
    """
    if len(data) > limit:
        raise AttestationError(f"{what} has {len(data):,} bytes; at most {limit:,} are allowed.")
    file = io.BytesIO(data)
    try:
        value = cbor2.CBORDecoder(
            file,
            semantic_decoders=_EveryTag(),
            max_depth=MAX_DEPTH,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            strict_hashable_types=True,
        ).decode()
        is_canonical = encode_canonical(value) == data  # which also compares the length
    except (cbor2.CBORError, ValueError, TypeError, OverflowError, RecursionError):
        raise AttestationError(f"{what} cannot be read: it is cut short or not CBOR.") from None
    if not is_canonical:
        raise AttestationError(f"{what} is not in CBOR's canonical form.")
    return value


class _EveryTag(Mapping[int, Callable[..., Any]]):
    """Has the same decoder for each of the 2**64 tags: one that refuses."""

    def __getitem__(self, tag: int) -> Callable[..., Any]:
        return _refuse

    def __iter__(self) -> Iterator[int]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _refuse(*_: object) -> Any:
    raise ValueError("tags are refused")
