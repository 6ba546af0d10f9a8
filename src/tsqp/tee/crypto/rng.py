"""Secret uniform residues: the operating system's entropy, stretched by a stream cipher.

Every call draws a fresh seed. So no generator state outlives a call: a forked process cannot
inherit it, and a snapshot cannot keep it for longer.
"""

import secrets
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsqp.algebra.params import CHECK_MODULUS, WIDE, Field
from tsqp.wire.seeds import SEED_BYTES, expand


def fresh_seed() -> bytes:
    """256 bits from the operating system."""
    return secrets.token_bytes(SEED_BYTES)


def uniform(shape: tuple[int, ...], field: Field) -> NDArray[Any]:
    """Independent residues of the field's dtype, uniform on [0, p)."""
    residues = np.empty(shape, field.dtype)
    expand(fresh_seed(), residues.reshape(-1), field)
    return residues


def uniform_check(shape: tuple[int, ...]) -> NDArray[np.int32]:
    """Independent residues, uniform on [0, P)."""
    assert WIDE.p == CHECK_MODULUS
    return uniform(shape, WIDE)
