"""A prompt that several answers share.

Shape suffixes: V vocabulary.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from tsqp.tee.sampling import TokenLogprobs

if TYPE_CHECKING:
    from tsqp.tee.engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class SharedPrompt:
    """What the sequences of one prompt have in common: the first one computes it for all.

    The others wait until it is computed. Then they copy its keys and values, and choose their first
    tokens by the same logits, so each of them is what it would be without the others.

    Attributes:
        leader: the sequence that computes the prompt, or has computed it; None if the next one that
            begins to run will do so.
        waiting: ids of the sequences that have not begun to run.
        logits_V: the logits after the prompt, once they are computed.
        prompt_logprobs: the rating of the prompt, if it was asked for.
        cached_tokens: number of tokens of the prompt that were not computed but reused.
    """

    leader: "Sequence | None"
    waiting: set[int] = field(default_factory=set)
    logits_V: Tensor | None = None
    prompt_logprobs: "list[TokenLogprobs | None]" = field(default_factory=list)
    cached_tokens: int = 0

    def is_computed_by_another(self, sequence: "Sequence") -> bool:
        """Whether a sequence should wait for the prompt."""
        leader = self.leader
        return leader is not None and leader is not sequence and leader.in_prompt

    def begin(self, sequence: "Sequence") -> None:
        """Take note that a sequence begins to run."""
        self.leave(sequence)
        if self.leader is None:
            self.leader = sequence

    def finish(self, sequence: "Sequence", logits_V: Tensor) -> None:
        """Take the logits after the prompt, if another sequence waits for them."""
        if self.waiting and self.logits_V is None:
            self.logits_V = logits_V.clone()
            self.prompt_logprobs = list(sequence.prompt_logprobs)
            self.cached_tokens = sequence.cached_tokens

    def leave(self, sequence: "Sequence") -> None:
        """Take note that a sequence has ended, or must compute everything again."""
        self.waiting.discard(sequence.id)
        if self.leader is sequence:
            self.leader = None
        if not self.waiting:
            self.logits_V = None
            self.prompt_logprobs = []


def share_prompt(first: "Sequence", other: "Sequence") -> None:
    """Let a new sequence share the prompt of one that is not finished."""
    prompt = first.token_ids[: first.prompt_tokens]
    assert (first.tenant, prompt) == (other.tenant, other.token_ids), "not the same prompt"
    if first.shared is None:
        first.shared = SharedPrompt(first)
        first.scope = first.shared if first.scope is None else first.scope
    other.shared, other.scope = first.shared, first.scope
    other.shared.waiting.add(other.id)
