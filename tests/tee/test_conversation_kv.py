"""A conversation goes on with the keys and values that it has, as if all were computed anew."""

from collections.abc import Callable

import pytest
import torch
from tee_helpers import make_engine
from transformers import LlamaForCausalLM

from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.errors import OutOfMemory, WorkerLost
from tsqp.nn.kv_cache import KV_BLOCK, KvCache
from tsqp.runtime.generate import generate
from tsqp.tee.conversation import Conversation
from tsqp.tee.decoder import Decoder
from tsqp.tee.engine.engine import Engine
from tsqp.tee.offload.local import LocalOffload, Ready
from tsqp.tee.offload.offload import Linear, Request
from tsqp.tee.sampling import Completion, SamplingParams

Tiny = tuple[Checkpoint, LlamaForCausalLM]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3)
FIRST = list(range(40))
TALK = Conversation(lambda _: None)


def ask(
    engine: Engine,
    prompt: list[int],
    params: SamplingParams = GREEDY,
    conversation: Conversation = TALK,
) -> Completion:
    [answer] = generate(engine, [prompt], params, conversation=conversation)
    return answer


@pytest.fixture(scope="module")
def fresh(tiny: Tiny) -> Engine:
    """Computes everything anew."""
    return make_engine(tiny[0])[0]


Reused = Callable[..., int]


@pytest.fixture
def reused(fresh: Engine) -> Reused:
    """How many tokens of a prompt are not computed again; the answer is checked."""

    def reused(engine: Engine, prompt: list[int], params: SamplingParams = GREEDY) -> int:
        stats = engine.stats
        computed, kept = stats.prefill_tokens, stats.reused_tokens
        answer = ask(engine, prompt, params)
        check(answer, generate(fresh, [prompt], GREEDY)[0])
        kept = stats.reused_tokens - kept
        assert stats.prefill_tokens - computed == len(prompt) - kept
        return kept

    return reused


def check(answer: Completion, expected: Completion) -> None:
    assert answer.token_ids == expected.token_ids
    assert answer.logprobs is not None
    assert expected.logprobs is not None
    for given, wanted in zip(answer.logprobs, expected.logprobs, strict=True):
        assert given.logprob == pytest.approx(wanted.logprob, abs=1e-4)


def test_a_longer_conversation_computes_what_is_new(tiny: Tiny, reused: Reused) -> None:
    engine, _ = make_engine(tiny[0])
    answer = ask(engine, FIRST)
    second = [*FIRST, *answer.token_ids, 8, 9]
    # The KV of the last token of an answer was never computed.
    assert reused(engine, second) == len(FIRST) + 5
    assert reused(engine, [*second[:30], 3, 4]) == 30  # what was undone is cut off
    assert reused(engine, [*second[:30], 3, 4]) == 31  # the last token's logits are wanted


def test_nothing_in_common_begins_anew(tiny: Tiny, reused: Reused) -> None:
    engine, offload = make_engine(tiny[0])
    ask(engine, FIRST)
    assert reused(engine, [50, 51, 52]) == 0
    reserved = offload.kv.reserved_bytes
    assert reserved == 3 * 2 * 2 * 8 * KV_BLOCK * 4  # layers, k and v, heads, features, tokens


def test_another_conversation_begins_anew_whatever_its_text(tiny: Tiny, reused: Reused) -> None:
    engine, _ = make_engine(tiny[0])
    other = Conversation(engine.forget)
    ask(engine, FIRST)
    ask(engine, FIRST, conversation=other)
    assert engine.stats.reused_tokens == 0
    assert reused(engine, FIRST) == 0  # the other one took its place


def test_a_conversation_that_is_closed_keeps_nothing(tiny: Tiny) -> None:
    engine, offload = make_engine(tiny[0])
    first, second = Conversation(engine.forget), Conversation(engine.forget)
    ask(engine, FIRST, conversation=first)
    second.close()
    assert offload.kv.reserved_bytes > 0
    with first:
        pass
    assert offload.kv.reserved_bytes == 0
    first.close()


def test_a_conversation_takes_blocks_as_it_grows(tiny: Tiny, reused: Reused) -> None:
    engine, offload = make_engine(tiny[0])
    ask(engine, FIRST)
    longer = [*FIRST, *range(100)]
    assert reused(engine, longer) == 40
    assert reused(engine, [*longer, *range(100), *range(100)]) == 140
    assert offload.kv.reserved_bytes == offload.kv.bytes_for(3 * KV_BLOCK)


def test_a_rated_prompt_is_computed_as_a_whole(tiny: Tiny, reused: Reused) -> None:
    engine, _ = make_engine(tiny[0])
    ask(engine, FIRST)
    rated = SamplingParams(
        temperature=0, max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=1
    )
    assert reused(engine, [*FIRST, 1], rated) == 0


def test_a_stopped_answer_leaves_its_keys_and_values(tiny: Tiny, reused: Reused) -> None:
    engine, _ = make_engine(tiny[0])
    asked = iter([False] * 3 + [True])
    [answer] = generate(engine, [FIRST], GREEDY, should_stop=lambda: next(asked), conversation=TALK)
    assert len(answer.token_ids) == 3
    assert reused(engine, [*FIRST, *answer.token_ids, 1]) == len(FIRST) + 2


def test_anything_else_frees_it(tiny: Tiny, reused: Reused) -> None:
    engine, offload = make_engine(tiny[0])
    for use in (lambda: generate(engine, [[1]], GREEDY), lambda: engine.score([1, 2])):
        ask(engine, FIRST)
        assert offload.kv.reserved_bytes > 0
        use()
        assert offload.kv.reserved_bytes == 0
    assert reused(engine, FIRST) == 0


class Fixed:
    """Room that a sequence gets at once, as on a worker; at most 60 tokens."""

    def __init__(self) -> None:
        self._cache = KvCache(3, 2, 8, torch.float32)
        self.capacity, self.truncate = self._cache.capacity, self._cache.truncate
        self.free = self._cache.free

    def alloc(self, sequence: int, capacity: int) -> None:
        if capacity > 60:
            raise OutOfMemory("The KV cache would not fit.")
        self._cache.alloc(sequence, capacity)


class FixedOffload(LocalOffload):
    def __init__(self, checkpoint: Checkpoint) -> None:
        kv = Fixed()
        super().__init__(checkpoint, torch.float32, kv=kv._cache)
        self.kv = kv  # type: ignore[assignment]


def test_a_conversation_that_outgrows_a_fixed_room_begins_anew(tiny: Tiny, reused: Reused) -> None:
    checkpoint = tiny[0]
    offload = FixedOffload(checkpoint)
    engine = Engine(Decoder(checkpoint, torch.float32), offload, checkpoint.config)
    assert reused(engine, FIRST[:20]) == 0  # with room for 2 * 26
    assert reused(engine, FIRST) == 20
    assert reused(engine, [*FIRST, *range(8)]) == 0  # it got no more than it needs
    assert reused(engine, FIRST) == 39
    with pytest.raises(OutOfMemory):
        ask(engine, [*FIRST, *FIRST])
    assert offload.kv._cache.reserved_bytes == 0


class Failing(LocalOffload):
    """Loses its worker at the n-th linear request."""

    calls_left = 10_000

    def start(self, request: Request) -> Ready:
        self.calls_left -= isinstance(request, Linear)
        if self.calls_left < 0:
            raise WorkerLost("The worker is gone.")
        return super().start(request)


@pytest.mark.parametrize("calls", [0, 5, 40])
def test_a_failure_keeps_nothing(calls: int, tiny: Tiny, reused: Reused) -> None:
    checkpoint = tiny[0]
    offload = Failing(checkpoint, torch.float32)
    engine = Engine(Decoder(checkpoint, torch.float32), offload, checkpoint.config)
    ask(engine, FIRST)
    offload.calls_left = calls
    with pytest.raises(WorkerLost):
        ask(engine, [*FIRST, 1, 2])
    assert offload.kv.reserved_bytes == 0
    offload.calls_left = 10_000
    assert reused(engine, FIRST) == 0
