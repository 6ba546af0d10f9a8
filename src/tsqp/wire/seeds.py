"""Expands a 256-bit seed into a stream of residues, identically on both sides.

The TEE makes pads and shares from such streams. A worker that receives the seed of a share
[P8] expands the share itself.

The stream is AES-256 in counter mode from counter 0, read as little-endian words of 32 bits, or of
64 bits in the lattice field. The lowest `bits` bits of each word are a candidate. Candidates that
are p or larger are rejected, so the residues are uniform on [0, p).
"""

from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from tsqp.algebra.params import Field
from tsqp.algebra.rejection import accept

SEED_BYTES = 32
CHUNK_WORDS = 2**16

_ZEROS = bytes(8 * CHUNK_WORDS)


def expand(seed: bytes | bytearray, residues_N: NDArray[Any], field: Field) -> None:
    """Fill `residues_N` with the first residues of the stream.

    Args:
        seed: SEED_BYTES bytes, which must not be used for anything else.
        residues_N: contiguous array of the field's dtype; receives values in [0, p).
    """
    assert len(seed) == SEED_BYTES
    stream = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor()
    words = np.empty(CHUNK_WORDS, np.uint32 if field.dtype == np.int32 else np.uint64)
    zeros = memoryview(_ZEROS)
    done = 0
    try:
        while done < residues_N.size:
            count = min(CHUNK_WORDS, residues_N.size - done)
            stream.update_into(zeros[: words.itemsize * count], words[:count].view(np.uint8).data)
            done += accept(words[:count], field.bits, field.p, residues_N[done : done + count])
    finally:
        words[:] = 0  # they may hold a secret [P11]
