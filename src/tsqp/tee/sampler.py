"""Samples the next token. The result does not depend on other requests.

Shape suffixes: V vocabulary; N token ids; C candidates.
"""

import hashlib
import os
from collections.abc import Collection, Sequence

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

from tsqp.tee import logits
from tsqp.tee.guided.guide import Guide
from tsqp.tee.sampling import SamplingParams

_KEY_DOMAIN = b"tsqp sampler v1\0"


class Sampler:
    """Samples the tokens of one request.

    Its randomness is a separate ChaCha20 keystream, so neither the other requests of a batch nor
    the order of steps can change what it draws.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int] = (),
        ending_ids: Collection[int] = (),
        guide: Guide | None = None,
    ) -> None:
        """Start an answer.

        Args:
            prompt_ids: the prompt's tokens, which `repetition_penalty` applies to as well.
            ending_ids: tokens that end the answer. They are not drawn before `min_tokens`.
            guide: which tokens the grammar of the answer allows. A token that ends the answer is
                also allowed where the grammar may end.
        """
        self._params = params
        counted = () if params.repetition_penalty == 1 else set(prompt_ids)
        self._prompt_N = torch.tensor(sorted(counted), dtype=torch.int64)
        self._ending_ids = ending_ids
        self._guide = guide
        self._answer_ids: list[int] = []
        seed = os.urandom(32) if params.seed is None else str(params.seed).encode()
        key = hashlib.sha256(_KEY_DOMAIN + seed).digest()
        self._keystream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    @property
    def is_complete(self) -> bool:
        """Whether the answer follows a grammar that allows no token after it."""
        return self._guide is not None and self._guide.mask_V is None

    def sample(self, logits_V: Tensor) -> int:
        """Choose one token and add it to the answer; returns its id.

        `logits_V` must be finite; equal logits go to the lowest id.

        Raises:
            PromptError: the grammar of the answer cannot be followed after this token.
        """
        token_id = self._draw(self._adjust(logits_V))
        self._answer_ids.append(token_id)
        if self._guide is not None and token_id not in self._ending_ids:
            self._guide.advance(token_id)
        return token_id

    def _adjust(self, logits_V: Tensor) -> Tensor:
        params = self._params
        if params.logit_bias:
            logits_V = logits.add_bias(logits_V, params.logit_bias)
        if params.repetition_penalty != 1:
            seen_N = torch.cat([self._prompt_N, self._answer_N])
            logits_V = logits.penalize_repetition(logits_V, seen_N, params.repetition_penalty)
        if params.presence_penalty or params.frequency_penalty:
            logits_V = logits.penalize_occurrence(
                logits_V, self._answer_N, params.presence_penalty, params.frequency_penalty
            )
        if len(self._answer_ids) < params.min_tokens:
            logits_V = logits.forbid(logits_V, self._ending_ids)
        if self._guide is not None:
            logits_V = logits.allow_only(logits_V, self._allowed(self._guide))
        return logits_V

    def _allowed(self, guide: Guide) -> Tensor:
        """Which tokens the grammar and the end of the answer allow, a bool for each."""
        assert guide.mask_V is not None
        if not (guide.may_end and self._ending_ids):
            return guide.mask_V
        allowed_V = guide.mask_V.clone()
        allowed_V[list(self._ending_ids)] = True
        return allowed_V

    def _draw(self, logits_V: Tensor) -> int:
        params = self._params
        if params.temperature == 0:
            return int(logits_V.argmax())
        ids_C, weight_C = logits.candidates(
            logits_V, params.temperature, params.top_k, params.top_p, params.min_p
        )
        total_C = weight_C.cumsum(0)
        # The draw is strictly below the last total, even in rounded arithmetic. So the search ends
        # on a candidate, and on one whose weight is not zero.
        draw = total_C[-1] * self._uniform()
        return int(ids_C[torch.searchsorted(total_C, draw, right=True)])

    @property
    def _answer_N(self) -> Tensor:
        return torch.tensor(self._answer_ids, dtype=torch.int64)

    def _uniform(self) -> float:
        """53 random bits as a number in [0, 1)."""
        word = int.from_bytes(self._keystream.update(bytes(8)), "little")
        return (word >> 11) * 2.0**-53
