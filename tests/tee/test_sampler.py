"""What the sampler may draw, how often, and that nothing else decides it."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tsqp.errors import PromptError
from tsqp.tee.logits import candidates
from tsqp.tee.sampler import Sampler
from tsqp.tee.sampling import SamplingParams

logit_lists = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40)
temperatures = st.floats(0.05, 5)


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_temperature_zero_takes_the_first_of_the_largest() -> None:
    sampler = Sampler(SamplingParams(temperature=0))
    assert sampler.sample(torch.tensor([0.0, 3.0, -1.0, 3.0])) == 1


@given(logit_lists, temperatures)
def test_without_limits_the_weights_are_the_softmax(logits: list[float], t: float) -> None:
    ids, weights = candidates(torch.tensor(logits), t, 0, 1.0)
    assert ids.tolist() == list(range(len(logits)))
    expected = (torch.tensor(logits, dtype=torch.float32).double() / t).softmax(0)
    torch.testing.assert_close(weights, expected)


@given(logit_lists, temperatures, st.integers(1, 50))
def test_top_k_keeps_k_and_none_likelier_is_left_out(
    logits: list[float], t: float, top_k: int
) -> None:
    ids, _ = candidates(torch.tensor(logits), t, top_k, 1.0)
    kept = set(ids.tolist())
    assert len(kept) == len(ids) == min(top_k, len(logits))
    left_out = [x for i, x in enumerate(logits) if i not in kept]
    assert not left_out or max(left_out) <= min(logits[i] for i in kept)


@given(logit_lists, temperatures, st.floats(0.01, 0.999))
def test_top_p_keeps_the_fewest_that_reach_the_mass(
    logits: list[float], t: float, top_p: float
) -> None:
    _, weights = candidates(torch.tensor(logits), t, 0, top_p)
    assert float(weights.sum()) >= top_p - 1e-9
    assert float(weights[:-1].sum()) < top_p + 1e-9


def test_of_equal_tokens_the_lowest_ids_are_kept() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0, 1.0, 1.0])
    assert candidates(logits, 1.0, 4, 1.0)[0].tolist() == [1, 3, 2, 4]


def test_top_p_of_a_flat_distribution_keeps_its_share() -> None:
    ids, _ = candidates(torch.zeros(1000), 1.0, 0, 0.25)
    assert ids.tolist() == list(range(250))


def test_top_p_counts_the_mass_that_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    ids, _ = candidates(logits, 1.0, 2, 0.5)  # 0.4 is 57 % of what top_k left
    assert ids.tolist() == [0]


@given(st.integers(1 - 2**64, 2**64 - 1), st.sampled_from([0, 3]), st.sampled_from([1.0, 0.8]))
def test_a_seed_decides_every_draw(seed: int, top_k: int, top_p: float) -> None:
    params = SamplingParams(seed=seed, top_k=top_k, top_p=top_p)
    logits = torch.linspace(-1, 1, 50)
    first, second = Sampler(params), Sampler(params)
    assert [first.sample(logits) for _ in range(8)] == [second.sample(logits) for _ in range(8)]


def test_seeds_differ_and_so_do_unseeded_requests() -> None:
    logits = torch.zeros(1000)

    def draws(seed: int | None) -> tuple[int, ...]:
        sampler = Sampler(SamplingParams(seed=seed))
        return tuple(sampler.sample(logits) for _ in range(8))

    assert len({draws(1), draws(-1), draws(10), draws(None), draws(None)}) == 5


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_they_should(seed: int, temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 1.5, -0.5, 0.2])
    sampler = Sampler(SamplingParams(seed=seed, temperature=temperature))
    drawn = torch.tensor([sampler.sample(logits) for _ in range(4000)])
    counts = torch.bincount(drawn, minlength=8).double()
    # 24.3 is exceeded once in a thousand with 7 degrees of freedom; the seeds are fixed.
    assert chi_square(counts, (logits.double() / temperature).softmax(0)) < 24.3


def test_limited_draws_come_as_often_as_the_rest_allows() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    sampler = Sampler(SamplingParams(seed=5, top_k=3, top_p=0.9))
    drawn = torch.tensor([sampler.sample(logits) for _ in range(4000)])
    counts = torch.bincount(drawn, minlength=4).double()
    assert counts[3] == 0
    assert chi_square(counts[:3], torch.tensor([4 / 9, 3 / 9, 2 / 9])) < 13.8


def test_a_token_of_no_weight_is_never_drawn() -> None:
    logits = torch.tensor([-1e30, 0.0, -1e30])
    sampler = Sampler(SamplingParams(seed=0))
    assert {sampler.sample(logits) for _ in range(200)} == {1}


def test_a_tiny_temperature_takes_the_largest() -> None:
    assert Sampler(SamplingParams(temperature=1e-300)).sample(torch.tensor([1.0, 1.5])) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"temperature": 10**400},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"top_k": -2},
        {"top_k": 1.5},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": [1]},
        {"stop": 5},
        {"seed": "x"},
        {"seed": 2**64},
        {"seed": -(10**5000)},
        {"n": 0},
        {"n": 2, "temperature": 0},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"min_p": float("nan")},
        {"repetition_penalty": 0},
        {"repetition_penalty": float("inf")},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"frequency_penalty": float("nan")},
        {"logit_bias": [1]},
        {"logit_bias": {-1: 0.0}},
        {"logit_bias": {"x": 0.0}},
        {"logit_bias": {"-1": 0.0}},
        {"logit_bias": {"1": 0.0, 1: 0.0}},
        {"logit_bias": {1: "0"}},
        {"logit_bias": {True: 0.0}},
        {"max_tokens": 16.0},
        {"max_tokens": np.float64(16)},
        {"max_tokens": np.bool_(True)},
        {"max_tokens": np.array([16])},
        {"max_tokens": torch.tensor(True)},
        {"max_tokens": "16"},
        {"temperature": True},
        {"temperature": np.array([1.0])},
        {"temperature": 1j},
        {"ignore_eos": 1},
        {"stop_token_ids": {5}},
        {"stop_token_ids": "5"},
        {"stop_token_ids": np.array([[5]])},
        {"stop_token_ids": np.array([5.0])},
        {"stop": b"a"},
        {"stop": {"a": 1}},
        {"logit_bias": {1: 100.5}},
        {"logit_bias": {1: float("nan")}},
        {"logprobs": -1},
        {"logprobs": True},
        {"prompt_logprobs": 1.0},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": ["x"]},
        {"stop_token_ids": 5},
        {"min_tokens": -1},
        {"min_tokens": 17},
    ],
)
def test_impossible_parameters_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match=r"^[^.]+(\.\d[^.]*)?\.$"):  # one sentence
        SamplingParams(**wrong)


def test_the_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (1.0, 1.0, 0, 16)
    assert (params.stop_strings, params.seed, params.ignore_eos) == ((), None, False)
    assert (params.n, params.min_p, params.min_tokens) == (1, 0.0, 0)
    assert (params.repetition_penalty, params.presence_penalty) == (1.0, 0.0)
    assert (params.frequency_penalty, params.logit_bias) == (0.0, None)
    assert (params.logprobs, params.prompt_logprobs, params.stop_token_ids) == (None, None, None)


def small_tensor(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int8)


@pytest.mark.parametrize(
    "made", [np.int64, np.int8, np.uint16, np.array, torch.tensor, small_tensor]
)
def test_integers_of_other_libraries_become_pythons(made: Callable[[int], Any]) -> None:
    params = SamplingParams(
        top_k=made(5), max_tokens=made(9), seed=made(7), n=made(2), logprobs=made(3),
        min_tokens=made(1), stop_token_ids=[made(4)], logit_bias={made(6).item(): 1},
    )  # fmt: skip
    assert params == SamplingParams(
        top_k=5, max_tokens=9, seed=7, n=2, logprobs=3, min_tokens=1, stop_token_ids=(4,),
        logit_bias={6: 1.0},
    )  # fmt: skip
    assert type(params.top_k) is type(params.seed) is int


@pytest.mark.parametrize("made", [np.float32, np.float64, np.array, torch.tensor, float])
def test_numbers_of_other_libraries_become_pythons(made: Callable[[float], Any]) -> None:
    params = SamplingParams(
        temperature=made(0.5), top_p=made(0.25), min_p=made(0.125), repetition_penalty=made(2),
        presence_penalty=made(1), frequency_penalty=made(-1.5), logit_bias={1: made(0.5)},
    )  # fmt: skip
    assert params == SamplingParams(
        0.5, 0.25, 0, 16, None, None, False, 1, 0.125, 2, 1, -1.5, {1: 0.5}
    )
    assert type(params.temperature) is float


@pytest.mark.parametrize(
    "made", [list, tuple, np.array, torch.tensor, iter, lambda ids: np.array(ids, np.uint8)]
)
def test_stop_tokens_may_be_any_series(made: Callable[[list[int]], Any]) -> None:
    assert SamplingParams(stop_token_ids=made([3, 1, 2])).stop_token_ids == (3, 1, 2)
    assert SamplingParams(stop_token_ids=range(3)).stop_token_ids == (0, 1, 2)


def test_stop_strings_and_flags_of_numpy_become_pythons() -> None:
    params = SamplingParams(stop=np.array(["ab", "c"]), ignore_eos=np.True_)  # type: ignore[arg-type]
    assert (params.stop, params.ignore_eos) == (("ab", "c"), True)
    assert type(SamplingParams(stop=np.str_("ab")).stop) is str


def test_keys_of_a_json_object_are_token_ids() -> None:
    bias = json.loads('{"1": 2, "50256": -100, "7": 0.5}')
    assert SamplingParams(logit_bias=bias).logit_bias == {1: 2.0, 50256: -100.0, 7: 0.5}
    for key in ("", " 1", "1.0", "+1", "1_0", "٣", "9" * 5000):
        with pytest.raises(PromptError, match="Each key of logit_bias must be a token id"):
            SamplingParams(logit_bias={key: 1})  # type: ignore[dict-item]


def test_parameters_do_not_change_with_what_they_were_made_from() -> None:
    stop, bias = [5], {1: 2.0}
    params = SamplingParams(stop_token_ids=stop, logit_bias=bias)
    stop.append(6)
    bias[2] = 3.0
    assert (params.stop_token_ids, params.logit_bias) == ((5,), {1: 2.0})


def test_a_value_of_another_type_is_named_and_not_shown() -> None:
    with pytest.raises(PromptError) as caught:
        SamplingParams(max_tokens="zyzzyva")  # type: ignore[arg-type]
    assert str(caught.value) == "max_tokens must be an integer, not a str."
