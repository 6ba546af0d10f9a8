"""Attacks that search for the prompt's tokens in the rows that the first linear layer received.

Shape suffixes: T tokens of the prompt; V vocabulary; D features; N rows of noise.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tsqp.audit.finding import Finding
from tsqp.audit.p_values import poisson_tail, projection_tail
from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.checkpoint.weights import check_memory, norm_weight, read_embedding, read_norm
from tsqp.model.config import layer_norms
from tsqp.nn import ops

BLOCK_ROWS = 256
MAX_NOISE = 4096
NOISE_WORK = 2**36  # multiplications spent on estimating the hits of noise
RANK_TOLERANCE = 1e-10


class Vocabulary:
    """The input of the first linear layer for every token: its normalised embedding.

    Rows are matched by cosine similarity, so their scale does not matter. This is the attack of
    "Hidden No More" (arXiv 2505.18332), with the embedding table instead of a forward pass.
    """

    def __init__(self, table_VD: Tensor) -> None:
        self.unit_VD = F.normalize(table_VD)
        self._noise_V: Tensor | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Vocabulary":
        """Read the embedding table and the weights of the first norm."""
        config = checkpoint.config
        check_memory(16 * config.vocab_size * config.hidden_size, "The audit's embedding tables")
        table_VD = read_embedding(checkpoint, torch.float32)
        name = layer_norms(config, 0)["attention"]
        norm_D = norm_weight(config, read_norm(checkpoint, name, torch.float32))
        rows_VD = table_VD.mul_(config.embedding_multiplier)
        return cls(ops.rms_norm(rows_VD, norm_D, config.rms_norm_eps))

    def sorted(self) -> "Vocabulary":
        """The same tokens with the values of each row sorted, which undoes any permutation."""
        return SortedVocabulary(self.unit_VD)

    def nearest(self, rows_TD: Tensor) -> Tensor:
        """The token with the highest cosine similarity to each row, [T]."""
        blocks = [
            (rows_TD[first : first + BLOCK_ROWS] @ self.unit_VD.t()).argmax(1)
            for first in range(0, len(rows_TD), BLOCK_ROWS)
        ]
        return torch.cat(blocks)

    @property
    def noise_V(self) -> Tensor:
        """Estimated probability that a row of noise is nearest to each token, [V]; above 0."""
        if self._noise_V is None:
            tokens, width = self.unit_VD.shape
            rows = max(BLOCK_ROWS, min(MAX_NOISE, NOISE_WORK // (tokens * width)))
            generator = torch.Generator().manual_seed(0)
            noise_ND = torch.rand(rows, width, generator=generator) * 2 - 1
            counts_V = self.nearest(noise_ND).bincount(minlength=tokens)
            self._noise_V = counts_V.double() / rows
            self._least = 1 / rows  # a token with a count of 0 may have up to this probability
        return self._noise_V

    def chance(self, ids_T: Tensor) -> tuple[float, float]:
        """The expected number of hits of noise on these tokens: an estimate, and an upper bound."""
        each_T = self.noise_V[ids_T]
        # A hit is Bernoulli: stochastically below a Poisson variable with the same P(0).
        above_T = -torch.log1p(-(each_T + self._least).clamp(max=1 - 1e-9))
        return float(each_T.sum()), float(above_T.sum())


class SortedVocabulary(Vocabulary):
    """Tokens described by their sorted values, regardless of the order of features."""

    def __init__(self, table_VD: Tensor) -> None:
        super().__init__(table_VD.sort(dim=1).values)

    def nearest(self, rows_TD: Tensor) -> Tensor:
        return super().nearest(rows_TD.sort(dim=1).values)


def match_in_place(
    vocabulary: Vocabulary, rows_TD: Tensor, ids: Sequence[int], attack: str, subject: str
) -> tuple[Finding, list[int]]:
    """Count rows whose nearest token is the prompt's token there; also returns all nearest."""
    ids_T, nearest_T = torch.tensor(ids), vocabulary.nearest(rows_TD)
    hits = int((nearest_T == ids_T).sum())
    chance, above = vocabulary.chance(ids_T)
    p = poisson_tail(hits, above)
    finding = Finding(attack, subject, "tokens", hits, len(ids), chance, p)
    return finding, nearest_T.tolist()


def match_in_any_order(
    vocabulary: Vocabulary, nearest: Sequence[int], ids: Sequence[int], attack: str, subject: str
) -> Finding:
    """Count tokens of the prompt among the rows' nearest tokens, in any order."""
    hits = (Counter(nearest) & Counter(ids)).total()
    chance, above = vocabulary.chance(_distinct(ids))
    rows = len(nearest)
    p = poisson_tail(hits, rows * above)
    return Finding(attack, subject, "tokens", hits, len(ids), rows * chance, p)


def match_row_space(
    vocabulary: Vocabulary, rows_TD: Tensor, ids: Sequence[int], attack: str, subject: str
) -> Finding:
    """Test whether the prompt's tokens lie in the row space, which a product M·X preserves.

    Tokens are ranked by the share of their squared length that a projection on that space keeps.
    The p-value is that of the prompt's best token, times the number of distinct tokens of the
    prompt. This correction holds however similar the tokens are.
    """
    ids_M = _distinct(ids)
    width = rows_TD.shape[1]
    _, values, basis = torch.linalg.svd(rows_TD.double(), full_matrices=False)
    dimensions = int((values > RANK_TOLERANCE * values[0]).sum())
    if not 0 < dimensions < width:
        note = f"not applicable: the rows span {dimensions} of {width} dimensions"
        return Finding(attack, subject, "tokens", note=note)
    kept_V = (vocabulary.unit_VD @ basis[:dimensions].float().t()).square().sum(1)
    found = int(torch.isin(ids_M, kept_V.topk(len(ids_M)).indices).sum())
    best = projection_tail(float(kept_V[ids_M].max()), dimensions, width)
    chance = len(ids_M) ** 2 / len(kept_V)
    p = min(1.0, len(ids_M) * best)
    return Finding(attack, subject, "tokens", found, len(ids_M), chance, p)


def _distinct(ids: Sequence[int]) -> Tensor:
    return torch.tensor(sorted(set(ids)))
