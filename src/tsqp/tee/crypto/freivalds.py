"""Check vectors, which detect a wrong product without computing the right one [P6].

Shape suffixes: D input and F output features of a group.
"""

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tsqp.algebra import digits
from tsqp.algebra.int8_product import int8_product
from tsqp.algebra.params import MAX_WIDTH, WIDE, Field
from tsqp.checkpoint.memory import give_back
from tsqp.errors import IntegrityError, LatticeError
from tsqp.tee.crypto.rng import uniform_check

VECTORS = 2  # each misses a wrong row with probability 2^-31
MAX_FAILURES = 8


@dataclass(frozen=True, slots=True)
class CheckVectors:
    """Two secret vectors for one group, used against one worker until it fails once.

    Attributes:
        k_2F: uniform on [0, P).
        kw_2D: k_i · Wq mod P.
    """

    k_2F: NDArray[np.int32]
    kw_2D: NDArray[np.int32]

    @classmethod
    def draw(cls, weight_FD: Tensor) -> "CheckVectors":
        """[P6] for int8 weights in [-127, 127]."""
        k_2F = uniform_check((VECTORS, weight_FD.shape[0]))
        checks = cls(k_2F, times(k_2F, weight_FD, WIDE))
        give_back()  # blocks of the product: else the gaps that they leave add up over the groups
        return checks


def times(k_VF: NDArray[Any], weight_FD: Tensor, field: Field) -> NDArray[Any]:
    """k · Wq mod p by exact digit products, over at most MAX_WIDTH output features at once.

    Args:
        k_VF: vectors of residues of the field.
        weight_FD: int8 in [-127, 127].
    """
    features, width = weight_FD.shape
    levels, vectors = field.digits, len(k_VF)
    total_VD = np.zeros((vectors, width), np.int64)
    part_VD = np.empty((vectors, width), field.dtype)
    for first in range(0, features, MAX_WIDTH):
        rows = slice(first, first + MAX_WIDTH)
        some_VF = np.ascontiguousarray(k_VF[:, rows])
        digits_LN = np.empty((levels, some_VF.size), np.int8)
        digits.split(some_VF.reshape(-1), field, digits_LN)
        digits_MF = torch.from_numpy(digits_LN).view(levels * vectors, -1)
        products_MD = int8_product(digits_MF, weight_FD[rows])
        digits.join(products_MD.view(levels, -1).numpy(), field, part_VD.reshape(-1))
        total_VD += part_VD
    return np.asarray(total_VD % field.p, field.dtype)


_Wrong = IntegrityError | LatticeError


class FailureLimit:
    """How often workers may fail a check before nothing is offloaded any more [P7].

    Without it an adversary could reconnect, or use many sessions, until a forgery passes.
    """

    def __init__(self, limit: int = MAX_FAILURES) -> None:
        self._left = limit
        self._lock = threading.Lock()

    @property
    def reached(self) -> bool:
        return self._left <= 0

    def check(self) -> None:
        """Raise IntegrityError once the limit is reached; called before every call and answer."""
        if self.reached:
            raise IntegrityError(
                "Workers failed their checks too often in this process, so nothing is offloaded "
                "any more; find the worker that lies, and start again."
            )

    def count(self) -> None:
        """Count a failure."""
        with self._lock:
            self._left -= 1


class Trust:
    """Whether one worker, or all workers of `shares`, may be used: not after a wrong answer [P7].

    The first error is raised again by every later `check`. So it cannot be mistaken for a lost
    worker, after which a new session would begin with the same check vectors.

    Args:
        limit: the limit of the whole process.
    """

    def __init__(self, limit: FailureLimit) -> None:
        self._limit = limit
        self._error: _Wrong | None = None

    def check(self) -> None:
        """Raise IntegrityError or LatticeError if the worker may not be used any more."""
        self._limit.check()
        if self._error is not None:
            raise _without_traceback(self._error)

    def end(self, error: _Wrong) -> None:
        """End the trust. Call this before closing the session, which may take long.

        Args:
            error: IntegrityError counts towards the limit; LatticeError is not the worker's fault.
        """
        self._error = _without_traceback(error)  # which holds check vectors
        if isinstance(error, IntegrityError):
            self._limit.count()


def _without_traceback(error: _Wrong) -> _Wrong:
    return type(error)(*error.args)


process_limit = FailureLimit()  # for all sessions of the process
