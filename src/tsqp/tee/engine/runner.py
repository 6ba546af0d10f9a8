"""Computes chunks of sequences, and scores prompts, on whichever offload it is given.

Shape suffixes: R rows of logits; V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress

from torch import Tensor

from tsqp.errors import TSQPError
from tsqp.tee.decoder import Decoder
from tsqp.tee.engine.batch import flat_batch, split_into_microbatches
from tsqp.tee.engine.interleave import run_interleaved
from tsqp.tee.engine.scoring import Scores, score
from tsqp.tee.engine.sequence import Chunk
from tsqp.tee.offload.offload import Offload
from tsqp.tee.stats import Stats


class Runner:
    """Runs forward passes; see `Engine` for the arguments.

    Attributes:
        cancelled: set by any thread, it is raised before the next operation of a pass.
    """

    def __init__(
        self, decoder: Decoder, stats: Stats, microbatches: int, prefill_chunk: int
    ) -> None:
        assert microbatches >= 1
        self._decoder = decoder
        self._stats = stats
        self._microbatches = microbatches
        self._prefill_chunk = prefill_chunk
        self.cancelled: TSQPError | None = None

    def run(self, offload: Offload, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, Tensor]]:
        """Each chunk, or piece of one, with logits_RV of the rows that it wants.

        Raises TSQPError before it gives any of them.
        """
        # A worker that keeps the KV must get a prompt in order, which two passes do not promise.
        may_cut = offload.placement.kv_in_tee
        parts = split_into_microbatches(chunks, self._microbatches, may_cut=may_cut)
        passes = [self._decoder.forward(flat_batch(part), self._stats) for part in parts]
        logits = run_interleaved(offload, passes, self._stats, self._check)
        for part, logits_RV in zip(parts, logits, strict=True):
            rows = logits_RV.split_with_sizes([len(chunk.wanted) for chunk in part])
            yield from zip(part, rows, strict=True)

    def score(self, offload: Offload, number: int, prompt_ids: Sequence[int]) -> Scores:
        """Score a prompt under an unused id."""
        offload.kv.alloc(number, len(prompt_ids))
        try:
            return score(
                self._decoder, offload, number, prompt_ids, self._prefill_chunk, self._stats
            )
        finally:
            with suppress(TSQPError):  # a worker that is gone cannot free anything
                offload.kv.free(number)

    def _check(self) -> None:
        if self.cancelled is not None:
            raise self.cancelled
