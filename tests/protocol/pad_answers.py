"""What the tests of `pad` ask: whole answers, and single requests to the offload."""

import pytest
from torch import Tensor

from tsqp import LLM, SamplingParams
from tsqp.algebra.params import FIELDS
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.offload.offload import Linear

EVERY = pytest.mark.parametrize("field", list(FIELDS))
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
PROMPTS = [[5, 6, 7], list(range(100, 260)), [9]]
FEW_PROMPTS = [[5, 6, 7], list(range(100, 130)), [9]]


def tokens(llm: LLM, prompts: list[list[int]] = PROMPTS) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in llm.generate(prompts, GREEDY)]


def linear(llm: LLM, group: LinearGroup, x_TD: Tensor) -> Tensor:
    """What the offload answers to one request."""
    assert llm._offload is not None
    with llm._offload.start(Linear(group, x_TD)) as y_TF:
        return y_TF.clone()
