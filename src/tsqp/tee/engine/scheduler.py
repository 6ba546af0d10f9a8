"""Decides which sequences run, and which of their tokens the next step computes.

This module does not depend on a model, a worker or a clock.
"""

from collections import Counter, deque
from collections.abc import Iterator
from itertools import zip_longest

from tsqp.tee.engine.sequence import Chunk, Sequence


class Scheduler:
    """Decodes first, and divides what is left of a step among the prompts of all tenants.

    Each step computes the next token of every decoding sequence, and at most `prefill_chunk` tokens
    of prompts, so that a long prompt never stops the others.

    Fairness: the tenant with the fewest running sequences is next to run another one, and tenants
    take turns with their prompts. The sequences of a tenant begin to run in the order of arrival.
    While one of its prompts takes several steps, other prompts of the same tenant take turns with
    it.

    Args:
        max_num_seqs: maximum number of sequences that run at the same time; the others wait.
        prefill_chunk: maximum number of prompt tokens in one step. A prompt is always divided at
            multiples of this number, so a sequence's attention does not depend on other sequences.
    """

    def __init__(self, *, max_num_seqs: int, prefill_chunk: int) -> None:
        assert min(max_num_seqs, prefill_chunk) >= 1
        self._max_num_seqs = max_num_seqs
        self._prefill_chunk = prefill_chunk
        self._waiting: dict[str, deque[Sequence]] = {}  # by tenant, in the order of their turns
        self._running: list[Sequence] = []
        self._step = 0
        self._served: dict[str, int] = {}  # the last step that computed a prompt of each tenant

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def running(self) -> list[Sequence]:
        """A copy of the list of running sequences, in the order in which they began to run."""
        return list(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return sum(map(len, list(self._waiting.values())))  # other threads ask, too

    def num_waiting_of(self, tenant: str) -> int:
        """Number of waiting sequences of one tenant; any thread may ask."""
        return len(self._waiting.get(tenant, ()))

    def is_running(self, sequence: Sequence) -> bool:
        """Whether a sequence runs."""
        return sequence in self._running

    @property
    def unfinished(self) -> list[Sequence]:
        """All unfinished sequences; the running ones come first."""
        return [*self._running, *(each for queue in self._waiting.values() for each in queue)]

    def add(self, sequence: Sequence) -> None:
        """Add a sequence to the waiting ones."""
        self._waiting.setdefault(sequence.tenant, deque()).append(sequence)

    def next_to_admit(self) -> Sequence | None:
        """The next waiting sequence, if another one may run.

        A sequence that waits for another one to compute its prompt lets those behind it pass.
        """
        if len(self._running) >= self._max_num_seqs:
            return None
        running = Counter(each.tenant for each in self._running)
        for tenant in sorted(self._waiting, key=running.__getitem__):
            for sequence in self._waiting[tenant]:
                if not sequence.must_wait:
                    return sequence
        return None

    def admit(self, sequence: Sequence) -> None:
        """Let the sequence of `next_to_admit` run."""
        queue = self._waiting.pop(sequence.tenant)
        queue.remove(sequence)
        if queue:
            self._waiting[sequence.tenant] = queue  # at the end: the others have their turn
        sequence.served = self._step
        self._running.append(sequence)

    def schedule(self) -> list[Chunk]:
        """The tokens of the next step: one for each decoding sequence, and chunks of prompts.

        Chunks of prompts and of restarted sequences together have at most `prefill_chunk` tokens.
        """
        self._step += 1
        chunks = [Chunk(each, each.computed, 1) for each in self._running if each.decodes]
        budget = self._prefill_chunk
        for sequence in self._prompts_in_turn():
            to_cut = self._prefill_chunk - sequence.computed % self._prefill_chunk
            length = min(sequence.remaining, to_cut)
            if length > budget:
                break  # later sequences must not overtake
            budget -= length
            chunks.append(Chunk(sequence, sequence.computed, length))
            sequence.served = self._served[sequence.tenant] = self._step
        return chunks

    def next_to_preempt(self) -> Sequence:
        """The running sequence that makes way when memory is short.

        It is the youngest one of the tenant that has the most tokens in memory.
        """
        sizes: Counter[str] = Counter()
        for each in self._running:
            sizes[each.tenant] += each.computed
        [(tenant, _)] = sizes.most_common(1)
        return max((s for s in self._running if s.tenant == tenant), key=lambda s: s.id)

    def preempt(self, sequence: Sequence) -> None:
        """Let a running sequence wait again, in front of the others of its tenant."""
        self._running.remove(sequence)
        self._waiting.setdefault(sequence.tenant, deque()).appendleft(sequence)

    def requeue(self) -> None:
        """Let all running sequences wait again, in front and in the same order."""
        for sequence in reversed(self.running):
            self.preempt(sequence)

    def remove(self, sequence: Sequence) -> bool:
        """Remove a sequence; returns whether it was running. Does nothing if it is unknown."""
        if sequence in self._running:
            self._running.remove(sequence)
            return True
        queue = self._waiting.get(sequence.tenant, deque())
        if sequence in queue:
            queue.remove(sequence)
            if not queue:
                del self._waiting[sequence.tenant]
        return False

    def find(self, number: int) -> Sequence | None:
        """The unfinished sequence with this id, if there is one."""
        return next((each for each in self.unfinished if each.id == number), None)

    def _prompts_in_turn(self) -> Iterator[Sequence]:
        """The running sequences with more than one token to compute; tenants take turns.

        Those that were served least recently come first. Of two that were served in the same step,
        the one that began later does: a new prompt does not wait for all of a long one.
        """
        lines: dict[str, list[Sequence]] = {}
        for sequence in self._running:
            if not sequence.decodes:
                lines.setdefault(sequence.tenant, []).append(sequence)
        for line in lines.values():
            line.sort(key=lambda s: (s.served, s.computed, s.id))
        self._served = {tenant: self._served.get(tenant, self._step - 1) for tenant in lines}
        tenants = sorted(
            lines, key=lambda t: (self._served[t], lines[t][0].computed, lines[t][0].id)
        )
        for turn in zip_longest(*(lines[tenant] for tenant in tenants)):
            yield from (sequence for sequence in turn if sequence is not None)
