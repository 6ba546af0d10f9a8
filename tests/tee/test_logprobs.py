"""The log-probabilities of an answer and its prompt, against transformers' log_softmax."""

from itertools import pairwise

import pytest
import torch
from tee_helpers import make_engine
from torch import Tensor
from transformers import LlamaForCausalLM

from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.errors import PromptError
from tsqp.runtime.generate import generate
from tsqp.tee.sampling import SamplingParams, TokenLogprobs

Tiny = tuple[Checkpoint, LlamaForCausalLM]
PROMPT = [1, *((37 * i + i * i) % 101 for i in range(300))]
OTHERS = [[5], list(range(40))]
PARAMS = SamplingParams(
    temperature=0.7,
    seed=3,
    max_tokens=6,
    ignore_eos=True,
    repetition_penalty=1.5,
    logit_bias={4: 3.0},
    logprobs=4,
    prompt_logprobs=3,
)


def reference(model: LlamaForCausalLM, ids: list[int]) -> Tensor:
    """logprobs_TV of the token after each of `ids`."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(1)


def check(given: TokenLogprobs, expected_V: Tensor, token_id: int, count: int) -> None:
    assert given.token_id == token_id
    assert given.logprob == pytest.approx(float(expected_V[token_id]), abs=1e-4)
    assert len(given.top) == count
    for each in given.top:
        assert each.logprob == pytest.approx(float(expected_V[each.token_id]), abs=1e-4)
    values = [each.logprob for each in given.top]
    assert values == sorted(values, reverse=True)
    assert values == pytest.approx(expected_V.topk(count).values.tolist(), abs=1e-4)
    likelier = int((expected_V > expected_V[token_id] + 1e-4).sum())
    as_likely = int((expected_V > expected_V[token_id] - 1e-4).sum())
    assert likelier < given.rank <= as_likely


@pytest.mark.parametrize(
    "options", [{}, {"prefill_chunk": 16}, {"prefill_chunk": 1}, {"microbatches": 2}], ids=str
)
def test_they_are_those_of_the_raw_distribution(options: dict[str, int], tiny: Tiny) -> None:
    engine, offload = make_engine(tiny[0], **options)
    answers = generate(engine, [OTHERS[0], PROMPT, OTHERS[1]], PARAMS)
    answer = answers[1]
    logprobs_TV = reference(tiny[1], [*PROMPT, *answer.token_ids])
    assert answer.logprobs is not None
    assert answer.prompt_logprobs is not None
    assert (len(answer.logprobs), len(answer.prompt_logprobs)) == (6, len(PROMPT))
    for position, given in enumerate(answer.logprobs, len(PROMPT)):
        token_id = answer.token_ids[position - len(PROMPT)]
        check(given, logprobs_TV[position - 1], token_id, 4)
    assert answer.prompt_logprobs[0] is None
    for position, rated in enumerate(answer.prompt_logprobs[1:], 1):
        assert rated is not None
        check(rated, logprobs_TV[position - 1], PROMPT[position], 3)
    assert offload.kv.reserved_bytes == 0


def test_asking_for_them_changes_no_token(tiny: Tiny) -> None:
    engine, _ = make_engine(tiny[0])
    plain = SamplingParams(temperature=0.7, seed=3, max_tokens=8, ignore_eos=True)
    rated = SamplingParams(
        temperature=0.7, seed=3, max_tokens=8, ignore_eos=True, logprobs=0, prompt_logprobs=0
    )
    [answer], [other] = generate(engine, [PROMPT], plain), generate(engine, [PROMPT], rated)
    assert answer.token_ids == other.token_ids
    assert (answer.logprobs, answer.prompt_logprobs) == (None, None)
    assert other.logprobs is not None
    assert all(each.top == () for each in other.logprobs)


def test_the_greedy_token_has_rank_one(tiny: Tiny) -> None:
    engine, _ = make_engine(tiny[0])
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
    [answer] = generate(engine, [PROMPT], params)
    assert answer.logprobs is not None
    assert [each.rank for each in answer.logprobs] == [1] * 8
    assert [each.top[0].token_id for each in answer.logprobs] == list(answer.token_ids)


def test_the_score_of_a_text_is_what_its_prompt_logprobs_say(tiny: Tiny) -> None:
    engine, _ = make_engine(tiny[0])
    [answer] = generate(engine, [PROMPT], SamplingParams(prompt_logprobs=0, max_tokens=1))
    assert answer.prompt_logprobs is not None
    rated = [each.logprob for each in answer.prompt_logprobs[1:] if each is not None]
    assert rated == pytest.approx(engine.score(PROMPT).logprobs_T.tolist(), abs=1e-4)


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_more_than_the_vocabulary_is_refused(name: str, tiny: Tiny) -> None:
    engine, _ = make_engine(tiny[0])
    assert generate(engine, [[1, 2]], SamplingParams(**{name: 101}, max_tokens=1))  # type: ignore[arg-type]
    with pytest.raises(PromptError, match=f"{name} asks for 102 tokens of a vocabulary of 101"):
        engine.add([1], SamplingParams(**{name: 102}))  # type: ignore[arg-type]
    assert not engine.has_unfinished


def test_the_reference_tells_neighbours_apart(tiny: Tiny) -> None:
    logprobs_TV = reference(tiny[1], PROMPT)
    assert all((a - b).abs().max() > 0.1 for a, b in pairwise(logprobs_TV))
