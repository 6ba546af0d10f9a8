"""Decides which sequences run, and which of their tokens the next step computes.

This module does not depend on a model, a worker or a clock.
"""

from collections import deque

from tsqp.tee.engine.sequence import Chunk, Sequence


class Scheduler:
    """First come, first served: a waiting sequence never overtakes an earlier one.

    Args:
        max_num_seqs: maximum number of sequences that run at the same time; the others wait.
        prefill_chunk: maximum number of prompt tokens in one step. A prompt is always divided at
            multiples of this number, so a sequence's attention does not depend on other sequences.
    """

    def __init__(self, *, max_num_seqs: int, prefill_chunk: int) -> None:
        assert min(max_num_seqs, prefill_chunk) >= 1
        self._max_num_seqs = max_num_seqs
        self._prefill_chunk = prefill_chunk
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> list[Sequence]:
        """A copy of the list of running sequences, in order of arrival."""
        return list(self._running)

    @property
    def unfinished(self) -> list[Sequence]:
        """All unfinished sequences; the running ones come first."""
        return [*self._running, *self._waiting]

    def add(self, sequence: Sequence) -> None:
        """Add a sequence to the waiting ones."""
        self._waiting.append(sequence)

    def next_to_admit(self) -> Sequence | None:
        """The next waiting sequence, if another one may run."""
        if not self._waiting or len(self._running) >= self._max_num_seqs:
            return None
        return self._waiting[0]

    def admit(self) -> None:
        """Let the sequence of `next_to_admit` run."""
        self._running.append(self._waiting.popleft())

    def schedule(self) -> list[Chunk]:
        """The tokens of the next step: one for each decoding sequence, and chunks of prompts.

        Chunks of prompts and of restarted sequences together have at most `prefill_chunk` tokens.
        """
        chunks = []
        budget = self._prefill_chunk
        for sequence in self._running:
            length = min(sequence.remaining, self._prefill_chunk)
            chunk = Chunk(sequence, sequence.computed, length)
            if length == 1 and not sequence.in_prompt:
                chunks.append(chunk)
            elif length <= budget:
                budget -= length
                chunks.append(chunk)
            else:
                budget = 0  # later sequences must not overtake
        return chunks

    def remove(self, sequence: Sequence) -> bool:
        """Remove a sequence; returns whether it was running. Does nothing if it is unknown."""
        if sequence in self._running:
            self._running.remove(sequence)
            return True
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        return False

    def find(self, number: int) -> Sequence | None:
        """The unfinished sequence with this id, if there is one."""
        return next((each for each in self.unfinished if each.id == number), None)

    def requeue(self) -> None:
        """Move all running sequences back to the front of the waiting ones, in the same order."""
        self._waiting.extendleft(reversed(self._running))
        self._running.clear()
