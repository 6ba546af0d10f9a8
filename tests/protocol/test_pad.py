"""`pad` computes what `tee --fixed-point` computes, to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pad_answers import EVERY, FEW_PROMPTS, PROMPTS, linear, tokens
from torch import Tensor
from transformers import LlamaForCausalLM

from tsqp import LLM
from tsqp.model.config import layer_groups, linear_groups
from tsqp.model.linear_group import LinearGroup

REAL: dict[str, Any] = {
    "privacy": "pad", "dtype": "float32", "prefill_chunk": 100, "timeout": 60
}  # fmt: skip


def every_group(llm: LLM) -> dict[LinearGroup, Tensor]:
    """The answers of all groups to rows that depend on nothing but their width."""
    generator = torch.Generator().manual_seed(5)
    return {
        group: linear(llm, group, torch.randn(3, group.width, generator=generator))
        for group in linear_groups(llm.config)
    }


@pytest.mark.parametrize(
    ("field", "prompts", "budget"),
    [
        pytest.param("wide", FEW_PROMPTS, 2**28, marks=pytest.mark.slow),
        pytest.param("wide", PROMPTS, None, marks=pytest.mark.slow),
        pytest.param("compact", PROMPTS, None, marks=pytest.mark.slow),
        pytest.param("lattice", PROMPTS, None, marks=pytest.mark.slow),
    ],
    ids=["wide-few", "wide", "compact", "lattice"],
)
def test_whole_answers_of_a_real_model_equal_the_fixed_point_reference(
    field: str, prompts: list[list[int]], budget: int | None, demo_path: Path
) -> None:
    with LLM("demo", privacy="tee", fixed_point=True, field=field, dtype="float32") as reference:
        expected = tokens(reference, prompts)
    with LLM("demo", worker="local", pad_memory=budget, field=field, **REAL) as ahead:
        ahead.fill_pads()
        assert tokens(ahead, prompts) == expected
        assert ahead.pads is not None and ahead.pads.ahead_rows > 0


@pytest.mark.slow
@pytest.mark.parametrize("field", ["wide", "compact", "lattice"])
def test_groups_of_a_real_model_equal_the_fixed_point_reference(
    field: str, demo_path: Path
) -> None:
    with LLM("demo", privacy="tee", fixed_point=True, field=field, dtype="float32") as reference:
        expected, groups = tokens(reference, PROMPTS), every_group(reference)
    with LLM("demo", worker="inproc", pad_memory=0, field=field, **REAL) as inline:
        assert tokens(inline, PROMPTS) == expected
        found = every_group(inline)
    assert len(groups) == 30 * 4 + 1
    assert all(torch.equal(found[group], y_TF) for group, y_TF in groups.items())


@EVERY
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_group_of_a_model_with_biases_is_bit_equal(
    field: str, dtype: str, small_llama: Path
) -> None:
    options = {"field": field, "dtype": dtype}
    generator = torch.Generator().manual_seed(3)
    with (
        LLM(str(small_llama), privacy="tee", fixed_point=True, **options) as reference,
        LLM(str(small_llama), privacy="pad", worker="inproc", **options) as padded,
    ):
        for group in linear_groups(padded.config):
            for rows in (1, 2, 300):
                x_TD = torch.randn(rows, group.width, generator=generator).to(reference.dtype)
                y_TF = linear(padded, group, x_TD)
                assert y_TF.dtype == reference.dtype
                assert torch.equal(y_TF, linear(reference, group, x_TD))


@EVERY
def test_the_fixed_point_product_is_that_of_float64(field: str, small_llama: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    exact = LlamaForCausalLM.from_pretrained(small_llama, dtype=torch.float64).model.layers[1]
    with LLM(
        str(small_llama), privacy="tee", fixed_point=True, field=field, dtype="float32"
    ) as llm:
        x_TD = torch.randn(50, 48, generator=generator)
        y_TF = linear(llm, layer_groups(llm.config, 1).o, x_TD).double()
        weight_FD = exact.self_attn.o_proj.weight.detach()
        scale_F = weight_FD.abs().amax(1, keepdim=True) / 127
        rounded_FD = (weight_FD / scale_F).round() * scale_F
        expected_TF = x_TD.double() @ rounded_FD.t() + exact.self_attn.o_proj.bias.detach()
        # What is left are 48 activations rounded to steps of 1/a, far below a weight's rounding.
        step = 2.0**-12 if field == "compact" else 2.0**-20
        assert (y_TF - expected_TF).abs().max() < 48 * step


@pytest.mark.parametrize(
    "field", ["wide", "lattice", pytest.param("compact", marks=pytest.mark.slow)]
)
def test_lanes_and_chunks_do_not_change_the_tokens(field: str, small_llama: Path) -> None:
    answers = []
    for lanes, chunk in ((1, 512), (2, 512), (2, 37)):
        options: dict[str, Any] = {"microbatches": lanes, "prefill_chunk": chunk, "timeout": 60}
        with LLM(str(small_llama), worker="local", field=field, pad_memory=2**25, **options) as llm:
            answers.append(tokens(llm, [[n % 199 for n in p] for p in PROMPTS]))
    assert answers[0] == answers[1] == answers[2]
