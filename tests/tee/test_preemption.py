"""Where memory for keys and values is short, sequences make way and still get the same tokens."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tee_helpers import make_engine
from transformers import LlamaForCausalLM

from pairwise import pairs
from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.errors import OutOfMemory, PromptTooLong, WorkerLost
from tsqp.nn.kv_cache import KvCache
from tsqp.runtime.generate import generate
from tsqp.tee.decoder import Decoder
from tsqp.tee.engine.engine import Engine
from tsqp.tee.offload.local import LocalOffload
from tsqp.tee.offload.offload import Linear, Ready, Request
from tsqp.tee.sampling import Completion, SamplingParams

Tiny = tuple[Checkpoint, LlamaForCausalLM]
BLOCK = 16
TOKEN_BYTES = 3 * 2 * 2 * 8 * 4  # layers, k and v, heads, features, float32
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=1)
PROMPTS = [[5], [9, 3, 77], list(range(40)), [50] * 17, list(range(60, 20, -1))]
MOST = 40 + 40  # tokens of the longest


def limited(
    checkpoint: Checkpoint, blocks: int, **options: int
) -> tuple[Engine, KvCache, LocalOffload]:
    kv = KvCache(3, 2, 8, torch.float32, block=BLOCK, limit_bytes=blocks * BLOCK * TOKEN_BYTES)
    offload = LocalOffload(checkpoint, torch.float32, kv=kv)
    engine = Engine(Decoder(checkpoint, torch.float32), offload, checkpoint.config, **options)
    return engine, kv, offload


def finish(engine: Engine, check: Callable[[], None] = lambda: None) -> dict[int, Completion]:
    done = {}
    while engine.has_unfinished:
        for output in engine.step():
            assert output.error is None
            if output.completion is not None:
                done[output.sequence] = output.completion
        check()
    return done


@pytest.fixture(scope="module")
def expected(tiny: Tiny) -> list[Completion]:
    engine, _ = make_engine(tiny[0])
    return [generate(engine, [prompt], GREEDY)[0] for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("blocks", "options", "tenants"),
    pairs([5, 6, 8, 11, 21], [{}, {"prefill_chunk": 16, "microbatches": 2}], ["", "a", "abcde"]),
)
def test_all_answers_are_those_of_unlimited_memory(
    blocks: int, options: dict[str, int], tenants: str, tiny: Tiny, expected: list[Completion]
) -> None:
    engine, kv, _ = limited(tiny[0], blocks, **options)
    assert kv.most_tokens == blocks * BLOCK

    def check() -> None:
        assert kv.reserved_bytes <= kv.bytes_for(blocks * BLOCK)
        assert 0 <= engine.kv_usage <= 1

    params = replace(GREEDY, prompt_logprobs=1)
    ids = [
        engine.add(prompt, params, tenant=tenants[place % len(tenants)] if tenants else "")
        for place, prompt in enumerate(PROMPTS)
    ]
    done = finish(engine, check)
    for number, answer in zip(ids, expected, strict=True):
        assert done[number].token_ids == answer.token_ids
        assert done[number].prompt_logprobs is not None
        assert len(done[number].prompt_logprobs) == answer.prompt_tokens
        for one, other in zip(done[number].logprobs or (), answer.logprobs or (), strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert (engine.stats.preemptions > 0) == (blocks < 20)
    assert engine.kv_usage == 0
    engine.reset_prefix_cache()
    assert kv.reserved_bytes == 0


def test_memory_is_taken_as_tokens_come(tiny: Tiny) -> None:
    engine, kv, _ = limited(tiny[0], 40)
    engine.add([1, 2, 3], GREEDY)
    engine.step()
    assert kv.reserved_bytes == kv.bytes_for(BLOCK)
    assert engine.kv_usage == 1 / 40
    for _ in range(BLOCK):
        engine.step()
    assert kv.reserved_bytes == kv.bytes_for(2 * BLOCK)


def test_the_first_request_is_not_the_one_that_makes_way(tiny: Tiny) -> None:
    engine, _, _ = limited(tiny[0], 6)
    first = engine.add(PROMPTS[2], GREEDY)
    engine.step()
    second = engine.add(PROMPTS[1], GREEDY)
    order = []
    while engine.has_unfinished:
        order += [output.sequence for output in engine.step() if output.completion]
    assert order == [first, second]
    assert engine.stats.preemptions > 0


def test_a_prompt_that_can_never_fit_is_refused(tiny: Tiny) -> None:
    engine, _, _ = limited(tiny[0], 5)
    assert engine.max_model_len == 5 * BLOCK
    with pytest.raises(PromptTooLong, match="80 tokens, but the memory for keys and values holds"):
        engine.add([1] * 80, GREEDY)
    assert not engine.has_unfinished
    number = engine.add([1] * 79, GREEDY)
    answer = finish(engine)[number]
    assert (len(answer.token_ids), answer.finish_reason) == (1, "length")


def test_an_answer_ends_where_the_memory_does(tiny: Tiny, expected: list[Completion]) -> None:
    engine, _, _ = limited(tiny[0], 4)
    number = engine.add(PROMPTS[2], GREEDY)
    answer = finish(engine)[number]
    assert answer.token_ids == expected[2].token_ids[:24]
    assert answer.finish_reason == "length"


class Fragile(LocalOffload):
    """Loses its worker at the given linear request."""

    def __init__(self, checkpoint: Checkpoint, kv: KvCache, calls: int) -> None:
        super().__init__(checkpoint, torch.float32, kv=kv)
        self._calls_left = calls

    def start(self, request: Request) -> Ready:
        self._calls_left -= isinstance(request, Linear)
        if self._calls_left < 0:
            raise WorkerLost("The worker is gone.")
        return super().start(request)


def test_preemptions_are_no_restarts(tiny: Tiny, expected: list[Completion]) -> None:
    """A request may continue once after a lost worker, however often it made way."""
    checkpoint = tiny[0]
    tight = KvCache(3, 2, 8, torch.float32, block=BLOCK, limit_bytes=6 * BLOCK * TOKEN_BYTES)
    preempted: list[int] = []

    def rebuild(_: object) -> Fragile:
        preempted.append(engine.stats.preemptions)
        return Fragile(checkpoint, tight, 10**6)

    engine = Engine(
        Decoder(checkpoint, torch.float32),
        Fragile(checkpoint, tight, 13 * 70),
        checkpoint.config,
        rebuild=rebuild,
    )
    ids = [engine.add(prompt, GREEDY) for prompt in PROMPTS]
    done = finish(engine)
    assert [done[number].token_ids for number in ids] == [a.token_ids for a in expected]
    assert len(preempted) == 1
    assert preempted[0] > 0
    assert tight.reserved_bytes == 0


def test_memory_of_the_system_that_is_full_is_an_error_of_the_last_request_only(
    tiny: Tiny, expected: list[Completion]
) -> None:
    """The limit may promise more than the machine has left."""

    def check(needed: int, what: str) -> None:
        if kv.reserved_bytes + needed > 4 * BLOCK * TOKEN_BYTES:
            raise OutOfMemory(f"{what} would not fit.")

    checkpoint = tiny[0]
    kv = KvCache(3, 2, 8, torch.float32, check=check, takes_memory_at_once=True, block=BLOCK)
    offload = LocalOffload(checkpoint, torch.float32, kv=kv)
    engine = Engine(Decoder(checkpoint, torch.float32), offload, checkpoint.config)
    good = engine.add(PROMPTS[1], GREEDY)
    bad = engine.add(PROMPTS[2], GREEDY)
    done, errors = {}, {}
    while engine.has_unfinished:
        for output in engine.step():
            if output.error is not None:
                errors[output.sequence] = output.error
            if output.completion is not None:
                done[output.sequence] = output.completion.token_ids
    assert done == {good: expected[1].token_ids}
    assert isinstance(errors[bad], OutOfMemory)
    assert kv.reserved_bytes == 0
