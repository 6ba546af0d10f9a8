"""Keeps the keys and values of a conversation from one answer to the next."""

from itertools import takewhile

from tsqp.errors import OutOfMemory
from tsqp.model.config import ModelConfig
from tsqp.tee.conversation import Conversation
from tsqp.tee.engine.sequence import Sequence
from tsqp.tee.offload.offload import Offload


class ConversationKv:
    """Holds the KV of a finished sequence for the next sequence of its conversation.

    A sequence of another conversation, or of no conversation, never uses it.

    With kept KV, a prompt is divided into different pieces than without, so floating-point results
    may differ in the last bits. Keys that dynamic rotary scaling made for another length are not
    reused.
    """

    def __init__(self, offload: Offload, config: ModelConfig) -> None:
        self._offload = offload
        self._max_positions = config.max_positions
        self._steady_positions = config.steady_positions
        self._held: Sequence | None = None

    def admit(self, sequence: Sequence) -> None:
        """Make room for a sequence, and reuse the kept KV as far as the token ids agree.

        Raises:
            OutOfMemory: it does not fit.
        """
        held, self._held = self._held, None
        if held is not None:
            ours = held.conversation is sequence.conversation
            same = self._in_common(held, sequence) if ours else 0
            if same and sequence.capacity <= held.reserved:
                self._offload.truncate(held.kv_id, same)
                sequence.kv_id, sequence.reserved = held.kv_id, held.reserved
                sequence.computed = same
                return
            self._offload.free(held.kv_id)
        # Reserve more than this sequence needs, for later turns: KV that outgrows its room is lost.
        sequence.reserved = min(2 * sequence.capacity, self._max_positions)
        try:
            self._offload.alloc(sequence.kv_id, sequence.reserved)
        except OutOfMemory:
            sequence.reserved = sequence.capacity
            self._offload.alloc(sequence.kv_id, sequence.reserved)

    def hold(self, sequence: Sequence) -> None:
        """Keep the KV of a sequence that has ended."""
        self.drop()
        self._held = sequence

    def drop(self, conversation: Conversation | None = None) -> None:
        """Free the kept KV of one conversation, or of any; does nothing if there is none."""
        if conversation is not None and (
            self._held is None or self._held.conversation is not conversation
        ):
            return
        held, self._held = self._held, None
        if held is not None:
            self._offload.free(held.kv_id)

    def _in_common(self, held: Sequence, sequence: Sequence) -> int:
        """Number of leading tokens whose KV can be reused; the last token is always computed."""
        longest = max(len(held.token_ids), len(sequence.token_ids))
        if sequence.rates_prompt or longest > self._steady_positions:
            return 0
        pairs = zip(held.token_ids[: held.computed], sequence.token_ids[:-1], strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
