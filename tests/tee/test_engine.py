"""Whole answers: the same in any company, ended for the right reason, and cleaned up after."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tee_helpers import make_engine, write_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from references import greedy_tokens, reference_model
from tsqp.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tsqp.errors import PromptError, WorkerLost
from tsqp.nn.kv_cache import KV_BLOCK
from tsqp.runtime.generate import generate
from tsqp.tee.decoder import Decoder
from tsqp.tee.engine.engine import Engine
from tsqp.tee.offload.local import LocalOffload, Ready
from tsqp.tee.offload.offload import Attention, Linear, Pending, Request
from tsqp.tee.sampling import Completion, SamplingParams
from tsqp.tee.stats import KINDS
from tsqp.tee.text.tokenizer import Tokenizer

Tiny = tuple[Checkpoint, LlamaForCausalLM]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5], [9, 3, 77], list(range(40)), [50] * 17, list(range(100, 0, -1))]


def tokens(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


@pytest.fixture(scope="module")
def one_by_one(tiny: Tiny) -> list[tuple[int, ...]]:
    engine, _ = make_engine(tiny[0])
    return [generate(engine, [prompt], GREEDY)[0].token_ids for prompt in PROMPTS]


def test_greedy_tokens_are_those_of_transformers(
    tiny: Tiny, one_by_one: list[tuple[int, ...]]
) -> None:
    assert one_by_one == [greedy_tokens(tiny[1], prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefill_chunk": 16},
        {"prefill_chunk": 1},
        {"max_num_seqs": 2},
        {"microbatches": 2},
        {"microbatches": 2, "prefill_chunk": 16},
        {"microbatches": 8, "max_num_seqs": 3},
    ],
    ids=str,
)
def test_a_batch_answers_as_one_by_one(
    options: dict[str, int], tiny: Tiny, one_by_one: list[tuple[int, ...]]
) -> None:
    engine, offload = make_engine(tiny[0], **options)
    assert tokens(generate(engine, PROMPTS, GREEDY)) == one_by_one
    assert offload.kv.reserved_bytes == 0


def test_prompts_are_cut_alike_in_any_company(tiny: Tiny) -> None:
    checkpoint = tiny[0]
    prompt = list(range(40))
    seen: list[list[tuple[int, int]]] = []

    class Watching(LocalOffload):
        def start(self, request: Request) -> Ready:
            if isinstance(request, Attention) and request.layer == 0:
                seen.append([(s.sequence, s.length) for s in request.segments])
            return super().start(request)

    def cuts(prompts: list[list[int]]) -> list[int]:
        seen.clear()
        decoder = Decoder(checkpoint, torch.float32)
        offload = Watching(checkpoint, torch.float32)
        engine = Engine(decoder, offload, checkpoint.config, prefill_chunk=16)
        generate(engine, prompts, SamplingParams(temperature=0, max_tokens=1))
        mine = len(prompts) - 1  # ids are given in order
        return [length for step in seen for sequence, length in step if sequence == mine]

    assert cuts([prompt]) == cuts([[1] * 5, [2] * 30, [3], prompt]) == [16, 16, 8]


def test_a_late_request_does_not_change_an_early_one(
    tiny: Tiny, one_by_one: list[tuple[int, ...]]
) -> None:
    engine, _ = make_engine(tiny[0], prefill_chunk=16)
    first = engine.add(PROMPTS[2], GREEDY)
    for _ in range(5):
        engine.step()
    second = engine.add(PROMPTS[4], GREEDY)
    done = {}
    while engine.has_unfinished:
        done |= {o.sequence: o.completion.token_ids for o in engine.step() if o.completion}
    assert done == {first: one_by_one[2], second: one_by_one[4]}


def test_a_seeded_request_draws_the_same_in_company(tiny: Tiny) -> None:
    params = SamplingParams(temperature=0.9, seed=4, max_tokens=10, ignore_eos=True, top_p=0.9)
    engine, _ = make_engine(tiny[0])
    [alone] = generate(engine, [PROMPTS[2]], params)
    together = generate(engine, [PROMPTS[0], PROMPTS[2], PROMPTS[4]], params)
    assert together[1] == alone


def test_the_answer_ends_with_the_eos_token(tmp_path: Path) -> None:
    model = write_llama(tmp_path)
    eos = greedy_tokens(model, PROMPTS[1], 3)[2]
    write_llama(tmp_path, eos_token_id=eos)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.config.eos_token_ids == (eos,)
    engine, offload = make_engine(checkpoint)
    [answer] = generate(engine, [PROMPTS[1]], SamplingParams(temperature=0, max_tokens=12))
    [full] = generate(engine, [PROMPTS[1]], GREEDY)
    assert answer.finish_reason == "stop"
    assert answer.token_ids[-1] == eos
    assert answer.token_ids == full.token_ids[: len(answer.token_ids)]
    assert (full.finish_reason, len(full.token_ids)) == ("length", 12)
    assert offload.kv.reserved_bytes == 0


def test_an_answer_ends_at_the_context_limit(tiny: Tiny) -> None:
    engine, _ = make_engine(tiny[0])
    params = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
    [answer] = generate(engine, [[3] * 630], params)
    assert (len(answer.token_ids), answer.finish_reason) == (10, "length")
    assert answer.prompt_tokens == 630


def test_a_prompt_that_leaves_room_for_one_token_gets_one(tiny: Tiny) -> None:
    engine, _ = make_engine(tiny[0])
    [answer] = generate(engine, [[3] * 639], GREEDY)
    assert (len(answer.token_ids), answer.finish_reason) == (1, "length")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([3] * 640, "maximum context length is 640 tokens"),
        ([101], "vocabulary"),
        ([-1], "vocabulary"),
        ([1.5, 2], "integers"),
        ([True], "integers"),
    ],
    ids=["empty", "too long", "too large an id", "negative id", "a fraction", "a truth value"],
)
def test_prompts_that_cannot_be_served_are_refused(
    prompt: list[int], message: str, tiny: Tiny
) -> None:
    engine, _ = make_engine(tiny[0])
    with pytest.raises(PromptError, match=message):
        engine.add(prompt, GREEDY)
    assert not engine.has_unfinished


def test_one_bad_prompt_leaves_nothing_queued(tiny: Tiny) -> None:
    engine, offload = make_engine(tiny[0])
    with pytest.raises(PromptError):
        generate(engine, [[1], []], GREEDY)
    assert not engine.has_unfinished
    assert offload.kv.reserved_bytes == 0


def test_stop_strings_without_a_tokenizer_are_refused(tiny: Tiny) -> None:
    engine, _ = make_engine(tiny[0], Tokenizer("random:tiny"))
    with pytest.raises(PromptError, match="Stop strings need a tokenizer"):
        engine.add([1], SamplingParams(stop="x"))


def test_memory_is_freed_as_soon_as_an_answer_ends(tiny: Tiny) -> None:
    engine, offload = make_engine(tiny[0])
    engine.add([1, 2], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    engine.add([1, 2], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert offload.kv.reserved_bytes == 0
    engine.step()
    one = offload.kv.reserved_bytes
    assert one == 3 * 2 * 2 * 8 * KV_BLOCK * 4  # layers, k and v, heads, features, tokens, bytes
    while engine.has_unfinished:
        engine.step()
    assert offload.kv.reserved_bytes == 0


def test_an_aborted_sequence_is_freed_and_the_others_go_on(
    tiny: Tiny, one_by_one: list[tuple[int, ...]]
) -> None:
    engine, offload = make_engine(tiny[0], max_num_seqs=2)
    ids = [engine.add(prompt, GREEDY) for prompt in PROMPTS[:4]]
    engine.step()
    engine.abort(ids[0])
    engine.abort(ids[3])
    done = {}
    while engine.has_unfinished:
        done |= {o.sequence: o.completion.token_ids for o in engine.step() if o.completion}
    engine.abort(ids[1])
    assert done == {ids[1]: one_by_one[1], ids[2]: one_by_one[2]}
    assert offload.kv.reserved_bytes == 0


class Failing(LocalOffload):
    """Loses its worker at the n-th linear request."""

    calls_left = 0

    def start(self, request: Request) -> Ready:
        if isinstance(request, Linear):
            self.calls_left -= 1
            if self.calls_left < 0:
                raise WorkerLost("The worker is gone.")
        return super().start(request)


@pytest.mark.parametrize("calls", [0, 5, 12, 13, 30, 61])
@pytest.mark.parametrize("lanes", [1, 2])
def test_a_lost_worker_frees_everything_and_the_engine_can_go_on(
    calls: int, lanes: int, tiny: Tiny, one_by_one: list[tuple[int, ...]]
) -> None:
    checkpoint = tiny[0]
    offload = Failing(checkpoint, torch.float32)
    decoder = Decoder(checkpoint, torch.float32)
    engine = Engine(decoder, offload, checkpoint.config, microbatches=lanes, max_num_seqs=3)
    offload.calls_left = calls
    with pytest.raises(WorkerLost):
        generate(engine, PROMPTS, GREEDY)
    assert not engine.has_unfinished
    assert offload.kv.reserved_bytes == 0
    offload.calls_left = 10_000
    assert tokens(generate(engine, PROMPTS, GREEDY)) == one_by_one


class Later(LocalOffload):
    """Like a worker: the linear layers are not answered when they are asked for."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        super().__init__(checkpoint, dtype)
        self.order: list[tuple[int, int]] = []  # layer and first position of each attention

    def start(self, request: Request) -> Pending:
        if isinstance(request, Attention):
            self.order.append((request.layer, request.segments[0].start))
        answer = super().start(request)
        return Later.Answer(answer) if isinstance(request, Linear) else answer

    class Answer:
        waited_s = 0.0

        def __init__(self, answer: Ready) -> None:
            self._answer = answer

        def __enter__(self) -> Tensor:
            return self._answer.__enter__()

        def __exit__(self, *_: object) -> None:
            pass

        def cancel(self) -> None:
            pass


def test_the_later_part_of_a_long_prompt_follows_the_earlier_in_another_lane(tiny: Tiny) -> None:
    checkpoint, model = tiny
    offload = Later(checkpoint, torch.float32)
    engine = Engine(Decoder(checkpoint, torch.float32), offload, checkpoint.config, microbatches=2)
    prompt = [n % 101 for n in range(500)]
    assert tokens(generate(engine, [prompt], GREEDY)) == [greedy_tokens(model, prompt, 12)]
    assert offload.order[:6] == [(layer, start) for layer in range(3) for start in (0, 256)]


def test_lanes_are_closed_when_one_of_them_fails(tiny: Tiny) -> None:
    checkpoint = tiny[0]
    closed: list[int] = []

    class Watched(Decoder):
        def forward(self, batch, stats):  # type: ignore[no-untyped-def]
            try:
                return (yield from super().forward(batch, stats))
            except GeneratorExit:
                closed.append(len(batch.segments))
                raise

    class FailingLater(Failing, Later):
        pass

    offload = FailingLater(checkpoint, torch.float32)
    offload.calls_left = 7
    engine = Engine(Watched(checkpoint, torch.float32), offload, checkpoint.config, microbatches=2)
    with pytest.raises(WorkerLost):
        generate(engine, PROMPTS[:2], GREEDY)
    assert closed == [1, 1]


def test_the_times_of_an_answer_add_up(tiny: Tiny) -> None:
    engine, _ = make_engine(tiny[0])
    generate(engine, PROMPTS, GREEDY)
    stats = engine.stats
    assert stats.prefill_tokens == sum(map(len, PROMPTS))
    assert stats.decode_tokens == 11 * len(PROMPTS)
    assert {kind for kind in KINDS if stats.time(kind).calls} == set(KINDS) - {"softmax", "layer"}
    operations = sum(stats.time(kind).seconds for kind in KINDS)
    total = stats.prefill_s + stats.decode_s
    assert 0.2 * total < operations <= total
    assert stats.tee_s + stats.wait_s == pytest.approx(total)
    assert stats.prefill_s > 0
    assert stats.decode_s > 0
    assert stats.tee_cpu_s > 0
    stats.reset()
    assert set(stats.timings().values()) == {0.0}


# The real model.


@pytest.fixture(scope="module")
def real_reference(smollm: Checkpoint) -> Iterator[LlamaForCausalLM]:
    yield reference_model(smollm, torch.float32)


TEXTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a land far away, there lived",
]


@pytest.mark.slow
def test_the_real_model_answers_as_transformers(
    real: Engine, real_reference: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    prompts = [tokenizer.encode(text) for text in TEXTS]
    answers = generate(real, prompts, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
    assert tokens(answers) == [greedy_tokens(real_reference, prompt, 16) for prompt in prompts]
    assert [a.text for a in answers] == [tokenizer.decode(a.token_ids) for a in answers]


@pytest.mark.slow
def test_the_real_model_knows_the_capital_of_france(real: Engine, tokenizer: Tokenizer) -> None:
    question = "What is the capital of France? Answer in one sentence."
    prompt = tokenizer.encode_chat([{"role": "user", "content": question}])
    pieces: list[str] = []
    collect: Callable[[int, str], None] = lambda _, text: pieces.append(text)  # noqa: E731
    [answer] = generate(real, [prompt], SamplingParams(temperature=0, max_tokens=32), collect)
    assert answer.text == "The capital of France is Paris."
    assert answer.finish_reason == "stop"
    assert "".join(pieces) == answer.text
    assert len(pieces) > 3


@pytest.mark.slow
def test_a_stop_string_ends_the_answer_before_it(real: Engine, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(TEXTS[0])
    [whole] = generate(real, [prompt], SamplingParams(temperature=0, max_tokens=16))
    stop = whole.text[9:16]  # begins and ends inside tokens
    params = SamplingParams(temperature=0, max_tokens=16, stop=["never to be seen", stop])
    pieces: list[str] = []
    [answer] = generate(real, [prompt], params, lambda _, text: pieces.append(text))
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert answer.finish_reason == "stop"
    assert "".join(pieces) == answer.text
    assert len(answer.token_ids) < len(whole.token_ids)
