"""Gives sequences room for their keys and values, and reuses what earlier sequences computed."""

from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress

from tsqp.errors import OutOfMemory, TSQPError
from tsqp.model.config import ModelConfig
from tsqp.nn.kv_cache import KvCache
from tsqp.tee.conversation import Conversation
from tsqp.tee.engine.prefix_index import Holder, PrefixIndex
from tsqp.tee.engine.sequence import Sequence
from tsqp.tee.offload.offload import Kv


class SequenceKv:
    """The keys and values of running sequences, and of ended ones as long as there is memory.

    A sequence reuses the KV of another one of its scope as far as the tokens agree: it copies them,
    or takes them over from a sequence that has ended. Scopes share nothing with each other. Ended
    sequences make way for running ones, those of the same tenant first.

    With reused KV, a prompt is divided into other pieces than without, so floating-point results
    may differ in the last bits. Keys that dynamic rotary scaling made for another length are not
    reused. A worker's KV cannot be copied, so there it is only taken over.

    Of conversations, only the last one keeps its KV.
    """

    def __init__(self, kv: Kv, config: ModelConfig) -> None:
        self.kv = kv
        self._blocks = kv if isinstance(kv, KvCache) else None
        self._max_positions = config.max_positions
        self._steady_positions = config.steady_positions
        self._index = PrefixIndex()
        self._conversation: Conversation | None = None

    @property
    def most_tokens(self) -> int | None:
        """Number of tokens that fit, of all sequences together; None if there is no limit."""
        return None if self._blocks is None else self._blocks.most_tokens

    @property
    def can_copy(self) -> bool:
        """Whether sequences can reuse the KV of a running one."""
        return self._blocks is not None

    def usage(self, running: Iterable[Sequence]) -> float:
        """The part of all memory that these sequences have taken; 0 if there is no limit."""
        most = self.most_tokens
        return sum(self.kv.capacity(each.kv_id) for each in running) / most if most else 0.0

    def admit(self, sequence: Sequence, running: int) -> None:
        """Make room for a sequence, and reuse KV as far as the token ids agree.

        Args:
            running: number of running sequences. There stays room for a block of each.

        Raises:
            OutOfMemory: it does not fit.
        """
        source, length = self._find(sequence)
        if source is None:
            self._alloc(sequence, running)
        elif self._should_take_over(source, length):
            if not self._take_over(source, length, sequence):
                self._alloc(sequence, running)
        else:
            self._copy(source, length, sequence, running)

    def extend(self, sequence: Sequence) -> None:
        """Make room for the next token of a sequence.

        Raises:
            OutOfMemory: there is none, and no KV is kept for reuse any more.
        """
        blocks, needed = self._blocks, sequence.computed + 1
        if blocks is not None and blocks.capacity(sequence.kv_id) < needed:
            self._with_room(lambda: blocks.extend(sequence.kv_id, needed), sequence.tenant)

    def share(self, sequence: Sequence) -> None:
        """Let the scope of a running sequence reuse the prompt that it has just computed."""
        if self._blocks is not None and _is_wanted(sequence):
            self._index.keep(_holder(sequence, idle=False))

    def release(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Free the KV of a sequence that has ended, or keep it for others of its scope."""
        if not (keep and _is_wanted(sequence)):
            self.free(sequence)
            return
        ended = _holder(sequence, idle=True)
        self._index.forget(sequence.kv_id)  # which would be found before others
        if isinstance(sequence.scope, Conversation):
            self.drop_conversation()
            self._conversation = sequence.scope
        earlier, same = self._index.find(ended.scope, ended.token_ids)
        if earlier is not None and earlier.idle:
            if same == len(ended.token_ids):
                self._index.use(earlier)
                self.free(sequence)  # another one has all of it
                return
            if same == len(earlier.token_ids):
                self._free(earlier)
        self._index.keep(ended)

    def free(self, sequence: Sequence) -> None:
        """Free the KV of a sequence."""
        self._index.forget(sequence.kv_id)
        with suppress(TSQPError):  # a worker that is gone cannot free anything
            self.kv.free(sequence.kv_id)

    def drop(self, scope: Hashable = None) -> None:
        """Free what is kept for reuse, of one scope or of all."""
        for holder in self._index.idle(scope):
            self._free(holder)

    def drop_shared(self, sequence: Sequence) -> None:
        """Free a prompt that was kept for the other answers to it, if none of them waits for it."""
        shared = sequence.shared
        if shared is not None and shared is sequence.scope and not shared.waiting:
            self.drop(shared)

    def truncate(self, sequences: Iterable[Sequence]) -> None:
        """Forget what a step that failed has added to the KV of these sequences.

        Raises:
            TSQPError: the worker that keeps it does not answer.
        """
        for sequence in sequences:
            self.kv.truncate(sequence.kv_id, sequence.computed)

    def drop_conversation(self) -> None:
        """Free what is kept of a conversation."""
        if self._conversation is not None:
            self.drop(self._conversation)
            self._conversation = None

    def _find(self, sequence: Sequence) -> tuple[Holder | None, int]:
        """Where to reuse how many tokens.

        The last token is computed for its logits, unless the sequence gets them from a sibling.
        """
        if sequence.scope is None:
            return None, 0
        shared, tokens = sequence.shared, sequence.token_ids
        gets_logits = shared is not None and shared.logits_V is not None
        is_new = len(tokens) == sequence.prompt_tokens
        limit = len(tokens) if gets_logits and is_new else len(tokens) - 1
        source, length = self._index.find(sequence.scope, tokens[:limit])
        if source is None or max(len(source.token_ids), len(tokens)) > self._steady_positions:
            return None, 0
        if sequence.rates_prompt and not (gets_logits and length == len(tokens)):
            return None, 0
        if self._blocks is None and not self._should_take_over(source, length):
            return None, 0
        return source, length

    def _should_take_over(self, source: Holder, length: int) -> bool:
        """Whether nothing that others may want is lost when a sequence goes on with this KV."""
        is_ours = isinstance(source.scope, Conversation) or length == len(source.token_ids)
        return source.idle and is_ours

    def _take_over(self, source: Holder, length: int, sequence: Sequence) -> bool:
        """Go on with the KV of an ended sequence; if it has no room for this one, free it."""
        kv_id, blocks = source.kv_id, self._blocks
        needed = sequence.capacity if blocks is None else _needed_tokens(sequence)
        self.kv.truncate(kv_id, length)
        try:
            if blocks is not None:
                self._with_room(lambda: blocks.extend(kv_id, needed), sequence.tenant, source)
            elif self.kv.capacity(kv_id) < needed:
                raise OutOfMemory("The kept KV has no room for this sequence.")
        except OutOfMemory:
            self._free(source)
            return False
        sequence.kv_id, sequence.computed = kv_id, length
        self._index.keep(_holder(sequence, idle=False))
        return True

    def _copy(self, source: Holder, length: int, sequence: Sequence, running: int) -> None:
        assert self._blocks is not None
        try:
            self._alloc(sequence, running, source)
        except OutOfMemory:
            if not source.idle:
                raise
            if not self._take_over(source, length, sequence):
                self._alloc(sequence, running)
            return
        self._blocks.copy(source.kv_id, sequence.kv_id, length)
        self._index.use(source)
        sequence.computed = length

    def _alloc(self, sequence: Sequence, running: int, spared: Holder | None = None) -> None:
        kv_id, blocks = sequence.kv_id, self._blocks
        if blocks is not None:
            needed, spare = _needed_tokens(sequence), running * blocks.block
            self._with_room(lambda: blocks.alloc(kv_id, needed, spare), sequence.tenant, spared)
            return
        if isinstance(sequence.scope, Conversation):
            # Reserve more than this sequence needs, for later turns: what outgrows it is lost.
            self.drop()
            with suppress(OutOfMemory):
                self.kv.alloc(kv_id, min(2 * sequence.capacity, self._max_positions))
                return
        self._with_room(lambda: self.kv.alloc(kv_id, sequence.capacity), sequence.tenant)

    def _with_room(
        self, take: Callable[[], None], tenant: str, spared: Holder | None = None
    ) -> None:
        """Take memory, and free KV that is kept for reuse until there is enough.

        Raises:
            OutOfMemory: there is nothing left to free.
        """
        while True:
            try:
                take()
                return
            except OutOfMemory:
                holder = self._index.next_to_evict(tenant, spared)
                if holder is None:
                    raise
                self._free(holder)

    def _free(self, holder: Holder) -> None:
        self._index.forget(holder.kv_id)
        with suppress(TSQPError):  # a worker that is gone cannot free anything
            self.kv.free(holder.kv_id)


def _holder(sequence: Sequence, *, idle: bool) -> Holder:
    tokens = sequence.token_ids[: sequence.computed]
    return Holder(sequence.kv_id, sequence.scope, sequence.tenant, tokens, idle)


def _is_wanted(sequence: Sequence) -> bool:
    """Whether another sequence may reuse its KV."""
    if sequence.scope is None or not sequence.computed:
        return False
    shared = sequence.shared
    return shared is None or sequence.scope is not shared or bool(shared.waiting)


def _needed_tokens(sequence: Sequence) -> int:
    """Number of tokens for which a sequence needs room when it begins to run."""
    return min(len(sequence.token_ids) + 1, sequence.capacity)
