"""Lattice masks: a mask and its product with the weights, in O(log N) an element [P10]-[P14].

For a secret s and noise e, row t of a batch has coefficient t of r_d = a_d · s + e_d as its mask,
and coefficient t of u_f = H_f · s for its product: Wq · r = u + Wq · e. The rounding of [P12] takes
the small Wq · e away. Whoever sees masked rows sees RLWE samples.

A secret is fresh for each batch of N rows of one group and is used for nothing else. It and all
noise of the batch come from one key, and both are erased after the last row. Classes of rows are
made one at a time, each once. Shape suffixes: N roots and rows of a batch; M rows of a class;
G blocks of features; B features of a block; D input and F output features.
"""

import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from tsqp.algebra import ring as ring_module
from tsqp.algebra.params import LATTICE
from tsqp.algebra.ring import BLOCK, ClassTransform, products_of_class
from tsqp.model.config import Key
from tsqp.tee.crypto.hints import Polynomials
from tsqp.wire.seeds import SEED_BYTES, expand

DEGREE = 2048  # N
_ZEROS = memoryview(bytes(4 * DEGREE * BLOCK))
NO_NOISE = np.empty((0, 0, BLOCK), np.uint32)
CLASS_COUNTERS = 2**64  # blocks of the key's stream that belong to one class, and to the secret


@dataclass(frozen=True, slots=True)
class Masks:
    """Rows of one group, residues mod q in two parts.

    Attributes:
        r_low_MD, r_high_MD: masks.
        u_low_MF, u_high_MF: H · s, their products with the weights but for Wq · e.
    """

    r_low_MD: NDArray[np.uint32]
    r_high_MD: NDArray[np.uint16]
    u_low_MF: NDArray[np.uint32]
    u_high_MF: NDArray[np.uint16]

    def __len__(self) -> int:
        return len(self.r_low_MD)


class _Batch:
    """The secret of N rows of one group; `next_class` gives out each class once."""

    def __init__(self, classes: int) -> None:
        self._key = bytearray(secrets.token_bytes(SEED_BYTES))
        self._s_N = np.empty(DEGREE, np.int64)
        expand(bytes(self._key), self._s_N, LATTICE)  # the stream's blocks from 0 on
        self._classes = classes
        self._next = 0
        self._out = 0
        self._lock = threading.Lock()

    def next_class(self) -> int | None:
        """A class that nobody has been given; None once all are."""
        with self._lock:
            if self._next == self._classes:
                return None
            row_class, self._next = self._next, self._next + 1
            self._out += 1
            return row_class

    def secret(self, transform: ClassTransform, row_class: int) -> NDArray[np.float64]:
        """What the values at the roots are multiplied by for this class; to be erased."""
        return transform.secret(self._s_N, row_class)

    def noise(self, row_class: int, block: int, words_MB: NDArray[np.uint32]) -> None:
        """Fill with the uniform bits of the noise of one block of features."""
        first = CLASS_COUNTERS * (1 + row_class) + block * words_MB.nbytes // 16
        mode = modes.CTR(first.to_bytes(16, "big"))
        stream = Cipher(algorithms.AES256(bytes(self._key)), mode).encryptor()
        stream.update_into(_ZEROS[: words_MB.nbytes], words_MB.reshape(-1).view(np.uint8).data)

    def end_class(self) -> None:
        """A class has been made, or given up; after the last one the secret is erased."""
        with self._lock:
            self._out -= 1
            if self._out == 0 and self._next == self._classes:
                self._erase()

    def erase(self) -> None:
        """Forget the secret, and with it the classes that have not been made."""
        with self._lock:
            self._next = self._classes
            if self._out == 0:
                self._erase()

    def _erase(self) -> None:
        self._key[:] = bytes(SEED_BYTES)
        self._s_N[:] = 0


class LatticeProvider:
    """Makes masks of a group, M rows at a time.

    Args:
        public: a_d for all input features of the widest group.
        hints: of each group.
        widths: D of each group.
        classes: k; M = N / k rows are made at once.
    """

    def __init__(
        self,
        public: Polynomials,
        hints: Mapping[Key, Polynomials],
        widths: Mapping[Key, int],
        transform: ClassTransform,
    ) -> None:
        assert transform.ring.q == LATTICE.p and transform.ring.degree == DEGREE
        self._public = public
        self._hints = dict(hints)
        self._widths = dict(widths)
        self._transform = transform
        self._batches: dict[Key, _Batch] = {}
        self._lock = threading.Lock()

    @property
    def rows(self) -> int:
        """M."""
        return self._transform.rows

    def make(self, key: Key) -> Masks:
        """The next class of a group's rows, never given out before."""
        batch, row_class = self._next_class(key)
        try:
            return self._make(batch, row_class, self._hints[key], self._widths[key])
        finally:
            batch.end_class()

    def forget(self) -> None:
        """Erase all secrets."""
        with self._lock:
            batches, self._batches = self._batches, {}
        for batch in batches.values():
            batch.erase()

    def _next_class(self, key: Key) -> tuple[_Batch, int]:
        with self._lock:
            while True:
                batch = self._batches.get(key)
                if batch is not None and (row_class := batch.next_class()) is not None:
                    return batch, row_class
                self._batches[key] = _Batch(self._transform.classes)

    def _make(self, batch: _Batch, row_class: int, hints: Polynomials, width: int) -> Masks:
        transform, rows = self._transform, self._transform.rows
        work = ring_module.work_space(rows)
        noise_1MB = np.empty((1, rows, BLOCK), np.uint32)
        secret_N = batch.secret(transform, row_class)
        masks = Masks(
            np.empty((rows, width), np.uint32),
            np.empty((rows, width), np.uint16),
            np.empty((rows, hints.count), np.uint32),
            np.empty((rows, hints.count), np.uint16),
        )
        try:
            for g in range(-(-width // BLOCK)):
                batch.noise(row_class, g, noise_1MB[0])
                products_of_class(
                    self._public.low_GNB,
                    self._public.high_GNB,
                    secret_N,
                    transform,
                    noise_1MB,
                    work,
                    masks.r_low_MD,
                    masks.r_high_MD,
                    g,
                    g + 1,
                )
            products_of_class(
                hints.low_GNB,
                hints.high_GNB,
                secret_N,
                transform,
                NO_NOISE,
                work,
                masks.u_low_MF,
                masks.u_high_MF,
                0,
                len(hints.low_GNB),
            )
        finally:
            secret_N[:] = 0
            noise_1MB[:] = 0
            work[:] = 0
        return masks
