"""Several answers, what ends them, what stops them, and what their progress says."""

from dataclasses import replace

import pytest
from tee_helpers import make_engine
from transformers import LlamaForCausalLM

from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.errors import PromptError
from tsqp.runtime.generate import generate
from tsqp.tee.engine.engine import Engine
from tsqp.tee.sampling import SamplingParams
from tsqp.tee.text.tokenizer import Tokenizer

Tiny = tuple[Checkpoint, LlamaForCausalLM]
PROMPTS = [[5], [9, 3, 77], list(range(40))]


def sampled(seed: int, **options: int) -> SamplingParams:
    return SamplingParams(temperature=0.9, seed=seed, max_tokens=8, ignore_eos=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"microbatches": 3}, {"max_num_seqs": 2}], ids=str)
def test_each_of_n_answers_is_that_of_the_next_seed(options: dict[str, int], tiny: Tiny) -> None:
    engine, offload = make_engine(tiny[0], **options)
    answers = generate(engine, PROMPTS, sampled(5, n=3))
    assert [answer.index for answer in answers] == [0, 1, 2] * 3
    alone = [
        generate(engine, [prompt], sampled(5 + index))[0].token_ids
        for prompt in PROMPTS
        for index in range(3)
    ]
    assert [answer.token_ids for answer in answers] == alone
    assert len(set(alone)) == 9
    assert offload.kv.reserved_bytes == 0


def test_unseeded_answers_to_one_prompt_differ(tiny: Tiny) -> None:
    engine, _ = make_engine(tiny[0])
    params = SamplingParams(n=3, max_tokens=16, ignore_eos=True)
    assert len({answer.token_ids for answer in generate(engine, [[5]], params)}) == 3


def test_text_comes_with_the_place_of_its_answer(real: Engine, tokenizer: Tokenizer) -> None:
    pieces: dict[int, str] = {}
    prompts = [tokenizer.encode(text) for text in ("Once upon a time", "The sea")]

    def collect(place: int, text: str) -> None:
        pieces[place] = pieces.get(place, "") + text

    answers = generate(real, prompts, replace(sampled(1, n=2), max_tokens=3), collect)
    assert pieces == {place: answer.text for place, answer in enumerate(answers)}
    assert len(pieces) == 4


def test_a_stop_token_ends_the_answer_and_is_its_last_token(tiny: Tiny) -> None:
    engine, offload = make_engine(tiny[0])
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    [whole] = generate(engine, [PROMPTS[2]], params)
    stop = whole.token_ids[4]
    first = whole.token_ids.index(stop)
    params = replace(params, stop_token_ids=[99, stop])
    [answer] = generate(engine, [PROMPTS[2]], params)
    assert answer.token_ids == whole.token_ids[: first + 1]
    assert answer.finish_reason == "stop"
    assert offload.kv.reserved_bytes == 0


def test_a_stop_token_gives_no_text(real: Engine, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("The capital of France is")
    [whole] = generate(real, [prompt], SamplingParams(temperature=0, max_tokens=6))
    last = whole.token_ids[2]
    assert last not in whole.token_ids[:2]
    params = SamplingParams(temperature=0, max_tokens=6, stop_token_ids=(last,))
    [answer] = generate(real, [prompt], params)
    assert answer.token_ids == whole.token_ids[:3]
    assert answer.text == tokenizer.decode(whole.token_ids[:2]) != whole.text


def test_an_answer_has_its_least_length(tiny: Tiny) -> None:
    engine, _ = make_engine(tiny[0])
    always = {7: 100.0}  # the end-of-sequence token
    [short] = generate(engine, [[5]], SamplingParams(logit_bias=always, max_tokens=9))
    assert (short.token_ids, short.finish_reason) == ((7,), "stop")
    [long] = generate(engine, [[5]], SamplingParams(logit_bias=always, max_tokens=9, min_tokens=5))
    assert 7 not in long.token_ids[:5]
    assert (long.token_ids[5:], long.finish_reason) == ((7,), "stop")


def test_a_bias_holds_in_every_step(tiny: Tiny) -> None:
    engine, _ = make_engine(tiny[0])
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logit_bias={42: 100})
    assert generate(engine, [[5]], params)[0].token_ids == (42,) * 5


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(logit_bias={101: 1.0}), "logit_bias has a token id outside"),
        (SamplingParams(stop_token_ids=[5, 101]), "stop_token_ids has a token id outside"),
    ],
    ids=["logit_bias", "stop_token_ids"],
)
def test_ids_that_the_model_does_not_have_are_refused(
    params: SamplingParams, message: str, tiny: Tiny
) -> None:
    engine, _ = make_engine(tiny[0])
    with pytest.raises(PromptError, match=f"{message} the model's vocabulary of 101"):
        engine.add([1], params)
    assert not engine.has_unfinished


def test_progress_ends_where_all_prompts_are_read(tiny: Tiny) -> None:
    engine, _ = make_engine(tiny[0], prefill_chunk=16)
    seen: list[tuple[int, int]] = []
    generate(engine, PROMPTS, sampled(1), on_progress=lambda *each: seen.append(each))
    assert [total for _, total in seen] == [44] * len(seen)
    done = [count for count, _ in seen]
    assert done == sorted(set(done))
    assert len(done) >= 3
    assert done[-1] == 44


def test_a_stopped_answer_keeps_what_it_has(tiny: Tiny) -> None:
    engine, offload = make_engine(tiny[0], max_num_seqs=2)
    whole = generate(engine, PROMPTS, sampled(1))
    asked = iter([False] * 4 + [True])
    answers = generate(engine, PROMPTS, sampled(1), should_stop=lambda: next(asked))
    assert [answer.finish_reason for answer in answers] == ["abort"] * 3
    assert [len(answer.token_ids) for answer in answers] == [4, 4, 0]
    for answer, complete in zip(answers, whole, strict=True):
        assert answer.token_ids == complete.token_ids[: len(answer.token_ids)]
    assert offload.kv.reserved_bytes == 0
    assert generate(engine, PROMPTS, sampled(1)) == whole


def test_a_stopped_answer_releases_the_text_it_held(real: Engine, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("The capital of France is")
    params = SamplingParams(temperature=0, max_tokens=6, stop=" Paris, the city that never")
    pieces: list[str] = []
    asked = iter([False] * 2 + [True])
    [answer] = generate(
        real, [prompt], params, lambda _, text: pieces.append(text), should_stop=lambda: next(asked)
    )
    assert answer.text == "".join(pieces) == tokenizer.decode(answer.token_ids) != ""
