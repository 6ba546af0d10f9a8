"""Lattice masks: a mask and its product with the weights, in O(log N) an element [P10]-[P14].

For a secret s and noise e, row t of a batch has coefficient t of r_d = a_d · s + e_d as its mask,
and coefficient t of u_f = H_f · s for its product: Wq · r = u + Wq · e. The rounding of [P12] takes
the small Wq · e away. Whoever sees masked rows sees RLWE samples.

A secret is fresh for each batch of N rows of one group and is used for nothing else. It and all
noise of the batch come from one key, and both are erased after the last row. Classes of rows are
made one at a time, each once. Shape suffixes: N roots and rows of a batch; M rows of a class;
G blocks of features; B features of a block; D input and F output features.

There are no locks, as in `pad_pool`: what two threads must not both take is taken from a deque in
one step of the interpreter.
"""

import os
import secrets
import weakref
from collections import deque
from collections.abc import Mapping
from contextlib import suppress

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from tsqp.algebra import ring as ring_module
from tsqp.algebra.hints import Polynomials
from tsqp.algebra.params import DEGREE, LATTICE
from tsqp.algebra.residue_blocks import BLOCK
from tsqp.algebra.ring import ClassTransform, products_of_class
from tsqp.errors import LatticeError, TSQPError
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto.pads import Pads, row_bytes_in_stock
from tsqp.wire.seeds import SEED_BYTES, expand

_ZEROS = memoryview(bytes(4 * DEGREE * BLOCK))
NO_NOISE = np.empty((0, 0, BLOCK), np.uint32)
MIN_ROWS = 32  # fewest rows of a class; making one reads all hints
CLASS_COUNTERS = 2**64  # blocks of the key's stream that belong to one class, and to the secret


class _Batch:
    """The secret of N rows of one group, from which each class of them is made once.

    Its memory is overwritten once every class has ended, that is, has been made or given up. If an
    exception interrupts a class, its memory is freed with the batch.
    """

    def __init__(self, classes: int) -> None:
        self._key = bytearray(secrets.token_bytes(SEED_BYTES))
        self._s_N = np.empty(DEGREE, np.int64)
        expand(self._key, self._s_N, LATTICE)  # the stream's blocks from 0 on
        self._to_end = deque(range(classes))
        self._unmade = set(range(classes))
        _batches.add(self)

    def secret(self, transform: ClassTransform, row_class: int) -> NDArray[np.float64]:
        """The factors of the values at the roots, for this class, once. The caller erases them.

        Raises:
            LatticeError: the secret was erased, or this class has been begun before: its rows would
                be masks that were used already.
        """
        if not any(self._key):
            raise LatticeError("A secret was about to be used after its end.")
        try:
            self._unmade.remove(row_class)  # one step of the interpreter: of two threads, one fails
        except KeyError:
            raise LatticeError("A class of rows was about to be made twice.") from None
        return transform.secret(self._s_N, row_class)

    def noise(self, row_class: int, block: int, words_MB: NDArray[np.uint32]) -> None:
        """Fill with the uniform bits of the noise of one block of features."""
        if not any(self._key):
            raise LatticeError("A key was about to be used after its end.")
        first = CLASS_COUNTERS * (1 + row_class) + block * words_MB.nbytes // 16
        mode = modes.CTR(first.to_bytes(16, "big"))
        stream = Cipher(algorithms.AES256(self._key), mode).encryptor()
        stream.update_into(_ZEROS[: words_MB.nbytes], words_MB.reshape(-1).view(np.uint8).data)

    def end_class(self) -> None:
        """A class has been made, or given up; to be called once for each."""
        with suppress(IndexError):
            self._to_end.popleft()
        if not self._to_end:
            self.erase()

    def erase(self) -> None:
        """Overwrite the secret. Call it only while no class is being made."""
        self._key[:] = bytes(SEED_BYTES)
        self._s_N[:] = 0

    def __del__(self) -> None:
        with suppress(AttributeError):  # of one that was never finished
            self.erase()


class LatticeProvider:
    """Makes masks of a group, M rows at a time [P14].

    Args:
        public: a_d for all input features of the widest group.
        hints: the hints of each group.
        transform: says M.
    """

    field = LATTICE

    def __init__(
        self,
        public: Polynomials,
        hints: Mapping[LinearGroup, Polynomials],
        transform: ClassTransform,
    ) -> None:
        assert transform.ring.q == LATTICE.p and transform.ring.degree == DEGREE
        self._public = public
        self._hints = dict(hints)
        self._transform = transform
        self._is_over = False
        # Classes that nobody has been given, each with the batch that it belongs to.
        self._classes: dict[LinearGroup, deque[tuple[_Batch, int]]]
        self._classes = {key: deque() for key in hints}

    @property
    def classes(self) -> int:
        """k: in how many classes the rows of a batch are made [P14]."""
        return self._transform.classes

    def stock_rows(self, memory_rows: int) -> int:
        """Whole classes, and at least one: the rest of a class made when needed is kept."""
        rows = self._transform.rows
        return max(rows, memory_rows - memory_rows % rows)

    def batch_rows(self, key: LinearGroup, room: int, memory_rows: int) -> int:
        """One class."""
        rows = self._transform.rows
        return rows if room >= rows else 0

    def rows_made(self, key: LinearGroup, rows: int) -> int:
        """One class."""
        return self._transform.rows

    def make(self, key: LinearGroup, pads: Pads, place: list[int]) -> None:
        """The next class of a group's rows, never given out before."""
        batch, row_class = self._take_class(key)
        try:
            self._make(batch, row_class, key, pads, np.array(place))
        except BaseException:
            self._give_up(key, batch)
            raise
        finally:
            batch.end_class()

    def forget(self) -> None:
        """Erase all secrets; those that masks are being made from, once they are made."""
        self._is_over = True
        for key in self._classes:
            self._give_up(key, None)

    def _take_class(self, key: LinearGroup) -> tuple[_Batch, int]:
        classes = self._classes[key]
        while True:
            if self._is_over:  # also one that was begun while `forget` was at work
                self._give_up(key, None)
                raise TSQPError("The masks of this session are gone; begin a new one.")
            with suppress(IndexError):
                return classes.popleft()
            batch = _Batch(self._transform.classes)
            classes.extend((batch, row_class) for row_class in range(self._transform.classes))

    def _give_up(self, key: LinearGroup, which: _Batch | None) -> None:
        """Make no more classes of a batch, or of any."""
        kept = []
        with suppress(IndexError):
            while True:
                batch, row_class = self._classes[key].popleft()
                if which is None or batch is which:
                    batch.end_class()
                else:
                    kept.append((batch, row_class))
        self._classes[key].extend(kept)
        if self._is_over and which is not None:  # `forget` did not see those that were kept
            self._give_up(key, None)

    def _make(
        self,
        batch: _Batch,
        row_class: int,
        key: LinearGroup,
        pads: Pads,
        places_M: NDArray[np.int64],
    ) -> None:
        transform, public, hints = self._transform, self._public, self._hints[key]
        work_MB = ring_module.work_space(transform.rows)
        noise_1MB = np.empty((1, transform.rows, BLOCK), np.uint32)
        secret_N = batch.secret(transform, row_class)
        try:
            low_GNB, high_GNB = public.low_GNB, public.high_GNB
            for g in range(len(pads.r_ND)):
                batch.noise(row_class, g, noise_1MB[0])
                products_of_class(
                    low_GNB, high_GNB, secret_N, transform, noise_1MB, work_MB, pads.r_ND,
                    places_M, g, g + 1,
                )  # fmt: skip
            products_of_class(
                hints.low_GNB, hints.high_GNB, secret_N, transform, NO_NOISE, work_MB, pads.u_NF,
                places_M, 0, len(pads.u_NF),
            )  # fmt: skip
        finally:
            secret_N[:] = 0
            noise_1MB[:] = 0
            work_MB[:] = 0


def rows_of_a_class(shapes: Mapping[LinearGroup, tuple[int, int]], memory_bytes: int) -> int:
    """M for a stock of this much memory.

    Args:
        shapes: (F, D) of each group.
    """
    row_bytes = sum(row_bytes_in_stock(LATTICE, *shape) for shape in shapes.values())
    return class_rows(memory_bytes // row_bytes)


def class_rows(rows: int) -> int:
    """M for a stock of so many rows: the largest of which two fit, so that one is always ready."""
    most = DEGREE
    while most > MIN_ROWS and 2 * most > rows:
        most //= 2
    return most


_batches: weakref.WeakSet[_Batch] = weakref.WeakSet()


def _forget_in_child() -> None:
    """A child has a copy of the parent's secrets; using one would be using it twice."""
    for batch in list(_batches):
        batch.erase()


os.register_at_fork(after_in_child=_forget_in_child)
