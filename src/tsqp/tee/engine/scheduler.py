"""Which sequences run, and which of their tokens the next step computes.

Nothing here knows a model, a worker or a clock.
"""

from collections import deque

from tsqp.tee.engine.sequence import Chunk, Sequence


class Scheduler:
    """First come, first served: a sequence that waits never overtakes one before it.

    Args:
        max_num_seqs: sequences that run at the same time; the others wait.
        prefill_chunk: most prompt tokens in one step. A prompt is cut at its multiples whatever
            else runs, so a sequence's attention is computed alike in any company.
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
    def running(self) -> list[Sequence]:
        """A copy of the list of running sequences, in order of arrival."""
        return list(self._running)

    @property
    def unfinished(self) -> list[Sequence]:
        """All sequences, those that run first."""
        return [*self._running, *self._waiting]

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        self._waiting.append(sequence)

    def next_to_admit(self) -> Sequence | None:
        """The sequence whose turn it is to run, if there is a place for it."""
        if not self._waiting or len(self._running) >= self._max_num_seqs:
            return None
        return self._waiting[0]

    def admit(self) -> None:
        """Let the sequence of `next_to_admit` run."""
        self._running.append(self._waiting.popleft())

    def schedule(self) -> list[Chunk]:
        """The tokens of the next step: one of each sequence that decodes, and prompts in chunks.

        All prompt chunks of a step together have at most `prefill_chunk` tokens.
        """
        chunks = []
        budget = self._prefill_chunk
        for sequence in self._running:
            length = min(sequence.remaining, self._prefill_chunk)
            chunk = Chunk(sequence, sequence.computed, length)
            if not sequence.in_prompt:
                chunks.append(chunk)
            elif length <= budget:
                budget -= length
                chunks.append(chunk)
            else:
                budget = 0  # who comes later does not overtake
        return chunks

    def remove(self, sequence: Sequence) -> bool:
        """Forget a sequence; whether it was running. One that was forgotten before is no error."""
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
        """Send all running sequences back to the front of those that wait, in the same order."""
        self._waiting.extendleft(reversed(self._running))
        self._running.clear()
