"""Requests of one tenant reuse each other's keys and values, and those of others never."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tee_helpers import make_engine
from transformers import LlamaForCausalLM

from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.errors import OutOfMemory, WorkerLost
from tsqp.nn.kv_cache import KvCache
from tsqp.runtime.generate import generate
from tsqp.tee.decoder import Decoder
from tsqp.tee.engine.engine import Engine
from tsqp.tee.offload.local import LocalOffload
from tsqp.tee.offload.offload import Linear, Ready, Request
from tsqp.tee.sampling import Completion, SamplingParams

Tiny = tuple[Checkpoint, LlamaForCausalLM]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1, seed=3, max_tokens=6, ignore_eos=True, n=3)
FIRST = list(range(40))


def finish(engine: Engine) -> dict[int, tuple[Completion, int]]:
    """The answers of all requests, and how many tokens of each prompt were reused."""
    done = {}
    while engine.has_unfinished:
        for output in engine.step():
            assert output.error is None
            if output.completion is not None:
                done[output.sequence] = output.completion, output.cached_tokens
    return done


def ask(engine: Engine, prompt: Sequence[int], tenant: str, salt: str = "") -> int:
    """How many tokens were reused; the answer is that of an engine without any."""
    before, reused = engine.stats.prefill_tokens, engine.stats.reused_tokens
    number = engine.add(prompt, GREEDY, tenant=tenant, cache_salt=salt)
    [(_, (completion, cached))] = finish(engine).items()
    assert number is not None
    assert completion.token_ids == EXPECTED(prompt)
    assert engine.stats.reused_tokens - reused == cached
    assert engine.stats.prefill_tokens - before == len(prompt) - cached
    return cached


class Expected:
    """Greedy tokens of an engine that computes everything."""

    engine: Engine

    def __call__(self, prompt: Sequence[int]) -> tuple[int, ...]:
        return generate(self.engine, [prompt], GREEDY)[0].token_ids


EXPECTED = Expected()


@pytest.fixture(autouse=True, scope="module")
def _expected(tiny: Tiny) -> None:
    EXPECTED.engine = make_engine(tiny[0])[0]


def test_a_tenant_computes_only_what_is_new(tiny: Tiny) -> None:
    engine, _ = make_engine(tiny[0])
    assert ask(engine, FIRST, "a") == 0
    assert ask(engine, FIRST, "a") == 39  # the last token's logits are wanted
    assert ask(engine, [*FIRST[:30], 3, 4], "a") == 30
    assert ask(engine, [*FIRST[:30], 3, 4, 5], "a") == 32  # of the second one
    longer = [*FIRST, *EXPECTED(FIRST)[:5], 9]
    assert ask(engine, longer, "a") == 45  # an answer is reused, too


def test_what_another_answer_has_too_is_kept_once(tiny: Tiny) -> None:
    engine, offload = make_engine(tiny[0])
    ask(engine, FIRST, "a")
    once = offload.kv.reserved_bytes
    ask(engine, FIRST, "a")
    ask(engine, FIRST[:30], "a")  # its answer differs, so it stays
    ask(engine, FIRST[:30], "a")
    assert offload.kv.reserved_bytes == 2 * once
    engine.add(FIRST, replace(GREEDY, max_tokens=2), tenant="a")
    finish(engine)
    assert offload.kv.reserved_bytes == 2 * once


def test_nothing_is_reused_between_tenants_and_salts(tiny: Tiny) -> None:
    engine, offload = make_engine(tiny[0])
    assert ask(engine, FIRST, "") == 0
    assert ask(engine, FIRST, "") == 0
    assert offload.kv.reserved_bytes == 0  # without a tenant, nothing is kept
    assert ask(engine, FIRST, "a") == 0
    assert ask(engine, FIRST, "b") == 0
    assert ask(engine, FIRST, "a", "salt") == 0
    assert ask(engine, FIRST, "") == 0
    assert ask(engine, FIRST, "a", "salt") == 39
    assert ask(engine, FIRST, "b") == 39
    engine.reset_prefix_cache()
    assert offload.kv.reserved_bytes == 0
    assert ask(engine, FIRST, "b") == 0


def test_a_running_request_lends_its_prompt(tiny: Tiny) -> None:
    engine, _ = make_engine(tiny[0])
    first = engine.add(FIRST, GREEDY, tenant="a")
    engine.step()
    second = engine.add([*FIRST, 50], GREEDY, tenant="a")
    other = engine.add([*FIRST, 50], GREEDY, tenant="b")
    done = finish(engine)
    assert done[second][1] == 40
    assert done[first][1] == done[other][1] == 0
    assert done[second][0].token_ids == done[other][0].token_ids == EXPECTED([*FIRST, 50])


def test_what_is_kept_makes_way_for_what_runs(tiny: Tiny) -> None:
    checkpoint = tiny[0]
    tokens = 16 * 8
    kv = KvCache(3, 2, 8, torch.float32, block=16, limit_bytes=tokens * 3 * 2 * 2 * 8 * 4)
    offload = LocalOffload(checkpoint, torch.float32, kv=kv)
    engine = Engine(Decoder(checkpoint, torch.float32), offload, checkpoint.config)
    texts = [[number] * 30 for number in range(7)]
    for text in texts:
        assert ask(engine, text, "a") == 0
        assert kv.reserved_bytes <= kv.bytes_for(tokens)
        assert engine.kv_usage == 0
    assert ask(engine, texts[-1], "a") > 0  # the last used ones are kept longest
    assert ask(engine, texts[0], "a") == 0
    assert ask(engine, list(range(100)), "b") == 0
    assert engine.stats.preemptions == 0


def rated(answer: Completion) -> list[float]:
    """All log-probabilities of an answer and of its prompt."""
    found = [*(answer.logprobs or ()), *(answer.prompt_logprobs or ())[1:]]
    return [each.logprob for each in found if each is not None]


@pytest.mark.parametrize("options", [{}, {"prefill_chunk": 16}, {"max_num_seqs": 2}], ids=str)
@pytest.mark.parametrize("tenant", ["", "a"])
def test_answers_of_one_prompt_share_its_computation(
    options: dict[str, int], tenant: str, tiny: Tiny
) -> None:
    engine, offload = make_engine(tiny[0], **options)
    params = replace(SAMPLED, logprobs=2, prompt_logprobs=2)
    alone = [generate(engine, [FIRST], params.of_answer(index))[0] for index in range(3)]
    before = engine.stats.prefill_tokens
    first = engine.add(FIRST, params.of_answer(0), tenant=tenant)
    others = [
        engine.add(FIRST, params.of_answer(index), tenant=tenant, sibling=first) for index in (1, 2)
    ]
    done = finish(engine)
    for number, expected in zip((first, *others), alone, strict=True):
        answer = done[number][0]
        assert answer.token_ids == expected.token_ids
        assert rated(answer) == pytest.approx(rated(expected), abs=1e-4)
    assert engine.stats.prefill_tokens - before == len(FIRST)
    assert {cached for _, cached in done.values()} == {0}  # no earlier request computed any
    engine.reset_prefix_cache()
    assert offload.kv.reserved_bytes == 0


def test_answers_of_one_generate_share_the_prompt(tiny: Tiny) -> None:
    engine, offload = make_engine(tiny[0])
    steps: list[int] = []
    generate(engine, [FIRST, [5] * 20], SAMPLED, on_progress=lambda done, _: steps.append(done))
    assert engine.stats.prefill_tokens == len(FIRST) + 20
    assert steps[0] == len(FIRST) + 20  # one prompt does not wait for all answers to another
    assert offload.kv.reserved_bytes == 0


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_the_other_answers_go_on_when_the_first_is_given_up(steps: int, tiny: Tiny) -> None:
    engine, offload = make_engine(tiny[0], prefill_chunk=16, max_num_seqs=2)
    alone = [generate(engine, [FIRST], SAMPLED.of_answer(index))[0] for index in range(3)]
    first = engine.add(FIRST, SAMPLED.of_answer(0))
    others = [engine.add(FIRST, SAMPLED.of_answer(index), sibling=first) for index in (1, 2)]
    for _ in range(steps):
        engine.step()
    engine.abort(first)
    done = finish(engine)
    assert [done[number][0].token_ids for number in others] == [a.token_ids for a in alone[1:]]
    assert offload.kv.reserved_bytes == 0


class Fragile(LocalOffload):
    """Loses its worker at the given linear request; keeps the KV on this side."""

    def __init__(self, checkpoint: Checkpoint, kv: KvCache, calls: int) -> None:
        super().__init__(checkpoint, torch.float32, kv=kv)
        self._calls_left = calls

    def start(self, request: Request) -> Ready:
        self._calls_left -= isinstance(request, Linear)
        if self._calls_left < 0:
            raise WorkerLost("The worker is gone.")
        return super().start(request)


def test_after_a_lost_worker_only_the_last_step_is_computed_again(tiny: Tiny) -> None:
    checkpoint = tiny[0]
    kv = KvCache(3, 2, 8, torch.float32)
    step = 3 * 4 + 1  # linear requests
    decoder = Decoder(checkpoint, torch.float32)
    engine = Engine(
        decoder,
        Fragile(checkpoint, kv, 3 * step + 5),
        checkpoint.config,
        rebuild=lambda _: Fragile(checkpoint, kv, 10_000),
    )
    number = engine.add(FIRST, GREEDY, tenant="a")
    assert finish(engine)[number][0].token_ids == EXPECTED(FIRST)
    assert engine.stats.prefill_tokens == len(FIRST)
    assert ask(engine, FIRST, "a") == 39  # what is kept is still there


def test_a_request_whose_copy_does_not_fit_takes_the_kept_one_over(tiny: Tiny) -> None:
    checkpoint = tiny[0]
    kv = KvCache(3, 2, 8, torch.float32, block=16, limit_bytes=16 * 5 * 3 * 2 * 2 * 8 * 4)
    offload = LocalOffload(checkpoint, torch.float32, kv=kv)
    engine = Engine(Decoder(checkpoint, torch.float32), offload, checkpoint.config)
    assert ask(engine, FIRST, "a") == 0
    assert ask(engine, [*FIRST[:35], 7], "a") == 35
    with pytest.raises(OutOfMemory):
        kv.alloc(99, 16 * 3)
