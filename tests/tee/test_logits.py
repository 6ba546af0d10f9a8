"""Penalties, biases and limits, against transformers' processors and plain formulas."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tsqp.tee import logits
from tsqp.tee.sampler import Sampler
from tsqp.tee.sampling import SamplingParams

V = 16
rows = st.lists(st.floats(-30, 30, width=32), min_size=V, max_size=V, unique=True)
some_ids = st.lists(st.integers(0, V - 1), min_size=1, max_size=30)


@given(rows, some_ids, st.floats(0.1, 5))
def test_the_repetition_penalty_is_that_of_transformers(
    row: list[float], ids: list[int], penalty: float
) -> None:
    logits_V, ids_N = torch.tensor(row), torch.tensor(ids)
    [expected_V] = RepetitionPenaltyLogitsProcessor(penalty)(ids_N[None], logits_V[None].clone())
    assert torch.equal(logits.penalize_repetition(logits_V, ids_N, penalty), expected_V)


@given(rows, some_ids, st.floats(-2, 2), st.floats(-2, 2))
def test_presence_and_frequency_follow_their_formula(
    row: list[float], ids: list[int], presence: float, frequency: float
) -> None:
    counts = Counter(ids)
    expected = [
        logit - frequency * counts[i] - presence * (i in counts) for i, logit in enumerate(row)
    ]
    penalized_V = logits.penalize_occurrence(
        torch.tensor(row), torch.tensor(ids), presence, frequency
    )
    torch.testing.assert_close(
        penalized_V.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=2e-5
    )


@given(
    rows,
    st.floats(0.2, 3),
    st.integers(0, V),
    st.sampled_from([1.0, 0.95, 0.5, 0.1]),
    st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)
def test_the_candidates_are_those_of_transformers(
    row: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    ids_N = torch.zeros(1, 1, dtype=torch.int64)
    logits_V = torch.tensor(row)
    [warped_V] = warpers(ids_N, logits_V.double()[None])
    ids_C, weight_C = logits.candidates(logits_V, temperature, top_k, top_p, min_p)
    found_V = torch.zeros(V, dtype=torch.float64).index_add(0, ids_C, weight_C / weight_C.sum())
    torch.testing.assert_close(found_V, warped_V.softmax(0), rtol=1e-9, atol=1e-12)


def test_a_bias_is_added_to_its_tokens_alone() -> None:
    biased_V = logits.add_bias(torch.tensor([1.0, 2.0, 3.0]), {0: 5.0, 2: -1.5})
    assert biased_V.tolist() == [6.0, 2.0, 1.5]


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_bias_of_100_forces_a_token_and_of_minus_100_forbids_it(temperature: float) -> None:
    row = torch.linspace(-10, 10, V)
    forced = Sampler(SamplingParams(temperature=temperature, seed=1, logit_bias={3: 100}))
    assert {forced.sample(row) for _ in range(50)} == {3}
    others = {i: -100.0 for i in range(V) if i not in (2, 5)}
    limited = Sampler(SamplingParams(temperature=temperature, seed=1, logit_bias=others))
    drawn = {limited.sample(row * 0.1) for _ in range(50)}
    assert drawn == ({2, 5} if temperature else {5})


@given(
    st.lists(rows, min_size=4, max_size=8),
    st.lists(st.integers(0, V - 1), min_size=1, max_size=5),
    st.floats(0.5, 3),
    st.floats(-2, 2),
    st.floats(-2, 2),
)
def test_repetition_counts_the_prompt_and_the_others_the_answer_alone(
    steps: list[list[float]],
    prompt: list[int],
    repetition: float,
    presence: float,
    frequency: float,
) -> None:
    params = SamplingParams(
        temperature=0,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    sampler = Sampler(params, prompt)
    answer: list[int] = []
    for row in steps:
        scores_V = [
            (logit / repetition if logit > 0 else logit * repetition)
            if i in (*prompt, *answer)
            else logit
            for i, logit in enumerate(row)
        ]
        scores_V = [
            score - frequency * answer.count(i) - presence * (i in answer)
            for i, score in enumerate(scores_V)
        ]
        token_id = sampler.sample(torch.tensor(row))
        assert scores_V[token_id] >= max(scores_V) - 1e-4  # float32 against float64
        answer.append(token_id)


def test_tokens_that_end_the_answer_are_not_drawn_before_min_tokens() -> None:
    row = torch.zeros(V)
    row[3] = 50
    sampler = Sampler(SamplingParams(min_tokens=4, seed=2), ending_ids={3, 4})
    drawn = [sampler.sample(row) for _ in range(5)]
    assert not {3, 4} & set(drawn[:4])
    assert drawn[4] == 3


def test_a_vocabulary_of_ending_tokens_alone_still_gives_one() -> None:
    sampler = Sampler(SamplingParams(min_tokens=1, seed=2), ending_ids={0, 1})
    assert sampler.sample(torch.tensor([1.0, 2.0])) in (0, 1)


@pytest.mark.parametrize("penalty", [1e-300, 1e300])
def test_a_penalty_beyond_float32_leaves_numbers(penalty: float) -> None:
    row = torch.tensor([5.0, -5.0, 0.0, 1.0])
    penalized_V = logits.penalize_repetition(row, torch.tensor([0, 1, 2]), penalty)
    assert penalized_V.isfinite().all()
    sampler = Sampler(SamplingParams(repetition_penalty=penalty, frequency_penalty=-2), [0, 1, 2])
    assert all(0 <= sampler.sample(row) < 4 for _ in range(20))


def test_the_logits_that_are_given_are_left_as_they_are() -> None:
    row = torch.linspace(-1, 1, V)
    before = row.clone()
    params = SamplingParams(
        logit_bias={1: 5}, repetition_penalty=2, presence_penalty=1, min_tokens=3, min_p=0.1
    )
    sampler = Sampler(params, [1, 2], {0})
    for _ in range(5):
        sampler.sample(row)
    assert torch.equal(row, before)
    assert math.isfinite(float(row.sum()))
