"""Each operation against its formula in float64, or against transformers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tsqp.model import ops
from tsqp.model.config import Llama3Scaling

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
    assert torch.equal(ops.rope_frequencies(head_dim, theta, scaling), expected)


@pytest.mark.parametrize(("head_dim", "theta", "scaling"), ROPES)
def test_rope_rotates_like_transformers(
    head_dim: int, theta: float, scaling: Llama3Scaling | None
) -> None:
    positions = torch.tensor([0, 1, 5, 4000])
    x_TNK = randn(4, 3, head_dim)
    cos, sin = rotary(head_dim, theta, scaling)(x_TNK, positions[None])
    expected, _ = apply_rotary_pos_emb(x_TNK[None], x_TNK[None], cos, sin, unsqueeze_dim=2)
    tables = ops.rope_tables(
        positions, ops.rope_frequencies(head_dim, theta, scaling), torch.float32
    )
    torch.testing.assert_close(ops.rope(x_TNK, *tables), expected[0], atol=1e-6, rtol=1e-6)


def test_rope_leaves_its_input_alone() -> None:
    x_TNK = randn(2, 3, 8)
    before = x_TNK.clone()
    frequency = ops.rope_frequencies(8, 1e4, None)
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


def plain_attention(q_THK: Tensor, k_JSK: Tensor, v_JSK: Tensor) -> Tensor:
    """Row by row, in float64."""
    q, k, v = q_THK.double(), k_JSK.double(), v_JSK.double()
    (rows, heads, features), (kv_heads, length, _) = q.shape, k.shape
    y = torch.empty(rows, heads, features, dtype=torch.float64)
    for row in range(rows):
        seen = length - rows + row + 1
        for head in range(heads):
            j = head // (heads // kv_heads)
            weights = (k[j, :seen] @ q[row, head] / features**0.5).softmax(0)
            y[row, head] = weights @ v[j, :seen]
    return y.flatten(1)


@settings(max_examples=40, deadline=None)
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
