"""RMS norm, by torch or as one compiled loop.

torch composes the norm of seven operators on the CPU, which take 24 µs for a single row. The loop
takes a few, and rounds differently in the last bits. Modes that compile loops in any case use it;
the others do not wait for a compiler. Shape suffixes: T rows; D features.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tsqp.algebra.native import compiled, reordered
from tsqp.nn import ops

Norm = Callable[[Tensor], Tensor]  # of the last dimension, in the dtype of what is normed


def torch_norm(weight_D: Tensor, eps: float) -> Norm:
    """`ops.rms_norm` with a weight."""
    return partial(ops.rms_norm, weight_D=weight_D, eps=eps)


class CompiledNorm:
    """The same as a compiled loop, computed in float32 and rounded once to the input's dtype.

    The result for a row does not depend on the other rows.
    """

    def __init__(self, weight_D: Tensor, eps: float) -> None:
        self._run = _rms_norm.function
        self._weight_D = weight_D.float().numpy()
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        is_plain = x.dtype == torch.float32 and x.dim() == 2
        rows = x if is_plain else x.float().reshape(-1, self._weight_D.size)
        x_TD = rows.contiguous().numpy()
        y_TD = np.empty_like(x_TD)
        self._run(x_TD, self._weight_D, self._eps, y_TD)
        y = torch.from_numpy(y_TD)
        return y if is_plain else y.view(x.shape).to(x.dtype)


@reordered
def _sum_of_squares(x_D: NDArray[np.float32]) -> float:
    total = 0.0
    for d in range(x_D.size):
        total += np.float64(x_D[d]) * np.float64(x_D[d])
    return total


@compiled("void(float32[:, ::1], float32[::1], float64, float32[:, ::1])")
def _rms_norm(
    x_TD: NDArray[np.float32],
    weight_D: NDArray[np.float32],
    eps: float,
    y_TD: NDArray[np.float32],
) -> None:
    for t in range(x_TD.shape[0]):
        x_D, y_D = x_TD[t], y_TD[t]
        scale = np.float32(1.0 / np.sqrt(_sum_of_squares(x_D) / x_D.size + eps))
        for d in range(x_D.size):
            y_D[d] = x_D[d] * scale * weight_D[d]
