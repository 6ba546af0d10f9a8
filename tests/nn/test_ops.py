"""Each operation against its formula in float64, or against transformers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tsqp.model.rope import Llama3Scaling, Rope, frequencies
from tsqp.nn import ops

GENERATOR_SEED = 3


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(GENERATOR_SEED))


def rotary(head_dim: int, theta: float, scaling: Llama3Scaling | None) -> LlamaRotaryEmbedding:
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": theta}
    if scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    config = LlamaConfig(
        hidden_size=6 * head_dim,
        num_attention_heads=6,
        head_dim=head_dim,
        rope_parameters=rope,
        max_position_embeddings=8192,
    )
    return LlamaRotaryEmbedding(config)


ROPES = [
    (64, 100_000.0, None),
    (8, 10_000.0, None),
    (64, 500_000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192)),
    (128, 500_000.0, Llama3Scaling(32.0, 1.0, 4.0, 8192)),
    (16, 10_000.0, Llama3Scaling(2.0, 0.5, 3.0, 64)),
]


@pytest.mark.parametrize(("head_dim", "theta", "scaling"), ROPES)
def test_rope_frequencies_equal_those_of_transformers(
    head_dim: int, theta: float, scaling: Llama3Scaling | None
) -> None:
    expected = rotary(head_dim, theta, scaling).inv_freq
    assert torch.equal(frequencies(Rope(theta, scaling), head_dim), expected)


@pytest.mark.parametrize(("head_dim", "theta", "scaling"), ROPES)
def test_rope_rotates_like_transformers(
    head_dim: int, theta: float, scaling: Llama3Scaling | None
) -> None:
    positions = torch.tensor([0, 1, 5, 4000])
    x_TNK = randn(4, 3, head_dim)
    cos, sin = rotary(head_dim, theta, scaling)(x_TNK, positions[None])
    expected, _ = apply_rotary_pos_emb(x_TNK[None], x_TNK[None], cos, sin, unsqueeze_dim=2)
    frequency = frequencies(Rope(theta, scaling), head_dim)
    tables = ops.rope_tables(positions, frequency, torch.float32)
    torch.testing.assert_close(ops.rope(x_TNK, *tables), expected[0], atol=1e-6, rtol=1e-6)


def test_rope_leaves_its_input_alone() -> None:
    x_TNK = randn(2, 3, 8)
    before = x_TNK.clone()
    frequency = frequencies(Rope(1e4), 8)
    ops.rope(x_TNK, *ops.rope_tables(torch.tensor([1, 2]), frequency, torch.float32))
    assert torch.equal(x_TNK, before)


def test_rms_norm_is_its_formula() -> None:
    x, weight, eps = 5 * randn(7, 33), randn(33), 0.05
    x64, weight64 = x.double(), weight.double()
    expected = x64 / (x64.square().mean(-1, keepdim=True) + eps).sqrt() * weight64
    torch.testing.assert_close(ops.rms_norm(x, weight, eps).double(), expected, atol=1e-5, rtol=0)


def test_silu_mul_gates_the_second_half_with_the_first() -> None:
    x = 3 * randn(5, 14)
    gate, up = x.double().chunk(2, -1)
    before = x.clone()
    expected = gate / (1 + (-gate).exp()) * up
    torch.testing.assert_close(ops.silu_mul(x).double(), expected, atol=1e-5, rtol=0)
    assert torch.equal(x, before)


def plain_attention(
    q_THK: Tensor,
    k_JSK: Tensor,
    v_JSK: Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Row by row, in float64."""
    q, k, v = q_THK.double(), k_JSK.double(), v_JSK.double()
    (rows, heads, features), (kv_heads, length, _) = q.shape, k.shape
    y = torch.empty(rows, heads, features, dtype=torch.float64)
    for row in range(rows):
        seen = length - rows + row + 1
        for head in range(heads):
            j = head // (heads // kv_heads)
            first = max(0, seen - (window or seen))
            scores = k[j, first:seen] @ q[row, head] * (scale or features**-0.5)
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            y[row, head] = scores.softmax(0) @ v[j, first:seen]
    return y.flatten(1)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 20),
    past=st.integers(0, 30),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    features=st.sampled_from([2, 4, 8, 16]),
)
def test_attention_is_causal_softmax_over_the_cache(
    rows: int, past: int, kv_heads: int, group: int, features: int
) -> None:
    length = past + rows
    q = randn(rows, kv_heads * group, features)
    cache = 2 * randn(2, kv_heads, length + 3, features)  # room that must not be looked at
    k, v = cache[0, :, :length], cache[1, :, :length]
    y = torch.cat(ops.attention(q, k, v))
    torch.testing.assert_close(y.double(), plain_attention(q, k, v), atol=1e-5, rtol=0)


def test_attention_over_several_blocks_is_causal() -> None:
    rows, past = 2 * ops.ATTENTION_BLOCK + 9, 5
    q, k = randn(rows, 2, 4), randn(1, past + rows, 4)
    blocks = ops.attention(q, k, k)
    assert [len(block) for block in blocks] == [ops.ATTENTION_BLOCK, ops.ATTENTION_BLOCK, 9]
    torch.testing.assert_close(
        torch.cat(blocks).double(), plain_attention(q, k, k), atol=1e-5, rtol=0
    )


@settings(max_examples=60)
@given(
    rows=st.integers(1, 20),
    past=st.integers(0, 30),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    scale=st.sampled_from([None, 0.1, 1.0]),
    window=st.sampled_from([None, 1, 2, 7, 40, 1000]),
    softcap=st.sampled_from([None, 0.5, 20.0]),
)
def test_attention_has_the_scale_window_and_cap_that_it_is_given(
    rows: int,
    past: int,
    kv_heads: int,
    group: int,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> None:
    options = {"scale": scale, "window": window, "softcap": softcap}
    q = randn(rows, kv_heads * group, 8)
    k, v = 2 * randn(2, kv_heads, past + rows, 8)
    y = torch.cat(ops.attention(q, k, v, **options))
    expected = plain_attention(q, k, v, **options)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [3, 100, ops.ATTENTION_BLOCK + 1])
@pytest.mark.parametrize("softcap", [None, 1.0])
def test_a_window_moves_over_several_blocks(window: int, softcap: float | None) -> None:
    rows, past = 2 * ops.ATTENTION_BLOCK + 1, 5
    q, k = randn(rows, 2, 4), randn(1, past + rows, 4)
    y = torch.cat(ops.attention(q, k, k, window=window, softcap=softcap))
    expected = plain_attention(q, k, k, window=window, softcap=softcap)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=0)


def test_one_token_reads_no_more_keys_than_its_window() -> None:
    q, k, v = randn(1, 4, 8), randn(2, 40, 8), randn(2, 40, 8)
    k[:, :33], v[:, :33] = torch.nan, torch.nan
    [y] = ops.attention(q, k, v, window=7)
    assert y.isfinite().all()


def test_gelu_tanh_mul_gates_the_second_half_with_the_first() -> None:
    x = 3 * randn(5, 14)
    gate, up = x.double().chunk(2, -1)
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    expected = gate / 2 * (1 + inner.tanh()) * up
    torch.testing.assert_close(ops.gelu_tanh_mul(x).double(), expected, atol=1e-5, rtol=0)


def test_a_norm_with_a_float32_weight_is_rounded_once() -> None:
    x, weight = randn(7, 33).bfloat16(), 1 + randn(33) / 100
    found = ops.rms_norm(x, weight, 1e-6)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, ops.rms_norm(x.float(), weight, 1e-6).bfloat16())
