"""Choosing the next token, reproducibly, whatever else runs beside.

Shape suffixes: V vocabulary; C candidates.
"""

import hashlib
import os

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

from tsqp.tee.sampling import SamplingParams

_KEY_DOMAIN = b"tsqp sampler v1\0"


class Sampler:
    """One request's source of tokens.

    Its randomness is a ChaCha20 keystream of its own, so neither the other requests of a batch
    nor the order of steps can change what it draws.
    """

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        seed = os.urandom(32) if params.seed is None else str(params.seed).encode()
        key = hashlib.sha256(_KEY_DOMAIN + seed).digest()
        self._keystream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def sample(self, logits_V: Tensor) -> int:
        """The id of one token. `logits_V` must be finite; equal logits go to the lowest id."""
        params = self._params
        if params.temperature == 0:
            return int(logits_V.argmax())
        ids_C, weight_C = candidates(logits_V, params.temperature, params.top_k, params.top_p)
        total_C = weight_C.cumsum(0)
        # The draw lies strictly below the last total, in rounded arithmetic too, so the search
        # ends on a candidate, and on one whose weight is not zero.
        draw = total_C[-1] * self._uniform()
        return int(ids_C[torch.searchsorted(total_C, draw, right=True)])

    def _uniform(self) -> float:
        """53 random bits as a number in [0, 1)."""
        word = int.from_bytes(self._keystream.update(bytes(8)), "little")
        return (word >> 11) * 2.0**-53


def candidates(
    logits_V: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn and their weights.

    Returns:
        ids_C, int64, and weight_C, float64, which are softmax(logits / temperature) of all
        tokens; they add up to less than 1 where tokens were dropped. Sorted if any were.
    """
    weight_V = torch.softmax((logits_V.double() - logits_V.max()) / temperature, dim=0)
    vocabulary = len(weight_V)
    keep = top_k if 0 < top_k < vocabulary else vocabulary
    if keep == vocabulary and top_p == 1:
        return torch.arange(vocabulary), weight_V
    if keep < vocabulary:
        eligible_V = logits_V >= logits_V.topk(keep).values[-1]  # more than `keep` if some tie
    else:  # all that are less likely than this add up to less than 1 - top_p
        eligible_V = weight_V >= (1 - top_p) / vocabulary
    ids_C = eligible_V.nonzero()[:, 0]
    # Stable: which of several equal tokens is dropped must not depend on the sorting network.
    ids_C = ids_C[logits_V[ids_C].sort(descending=True, stable=True).indices[:keep]]
    weight_C = weight_V[ids_C]
    if top_p < 1:
        total_C = weight_C.cumsum(0)
        mass = top_p * (total_C[-1] if keep < vocabulary else 1.0)
        count = int((total_C - weight_C < mass).sum())
        ids_C, weight_C = ids_C[:count], weight_C[:count]
    return ids_C, weight_C
