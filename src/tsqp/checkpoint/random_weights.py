"""Random weights in the shape of known models, the same on every machine and never on disk.

A worker and a TEE that are given the same name and seed hold the same weights. Each tensor is
its own Philox stream, so both sides generate only what they need, in any order.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsqp.checkpoint.files import BinaryFile, check_shape
from tsqp.errors import CheckpointError, UnsupportedModel
from tsqp.model.config import Layer, ModelConfig, tensor_shapes
from tsqp.model.rope import Llama3Scaling, Rope

# Values are (u - 32767.5) · _STEP with u uniform in 0..65535: symmetric, standard deviation 0.02.
_STEP = np.float32(0.02 * math.sqrt(12 / (2**32 - 1)))
_STEP_VALUES = 16  # that one step of Philox's counter gives: 4 words of 4
_CHUNK_WORDS = 2**16  # 64-bit words at a time, so that the intermediate values stay in cache


def _geometry(
    *,
    vocab: int,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    max_positions: int,
    theta: float,
    tied: bool,
    dtype: str,
    scaling: Llama3Scaling | None = None,
    model_type: str = "llama",
    eps: float = 1e-5,
    local: Layer | None = None,
    **family: Any,
) -> ModelConfig:
    """`local` are five layers of six; `family` are further fields of `ModelConfig`."""
    everywhere = Layer(None, Rope(theta, scaling))
    return ModelConfig(
        model_type=model_type,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        layers=tuple(local if local and (n + 1) % 6 else everywhere for n in range(layers)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=max_positions,
        rms_norm_eps=eps,
        tie_word_embeddings=tied,
        attention_scale=head_dim**-0.5,
        bos_token_id=None,
        eos_token_ids=(),
        dtype=dtype,
        **family,
    )


GEOMETRIES = {
    "tiny": _geometry(
        vocab=512, hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, head_dim=16,
        max_positions=512, theta=10_000.0, tied=False, dtype="float32",
    ),
    "smollm2-135m": _geometry(
        vocab=49_152, hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, head_dim=64,
        max_positions=8192, theta=100_000.0, tied=True, dtype="float32",
    ),
    "tinyllama-1.1b": _geometry(
        vocab=32_000, hidden=2048, intermediate=5632, layers=22, heads=32, kv_heads=4,
        head_dim=64, max_positions=2048, theta=10_000.0, tied=False, dtype="bfloat16",
    ),
    "llama-3.2-1b": _geometry(
        vocab=128_256, hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8,
        head_dim=64, max_positions=131_072, theta=500_000.0, tied=True, dtype="bfloat16",
        scaling=Llama3Scaling(32.0, 1.0, 4.0, 8192),
    ),
    "llama-3.2-3b": _geometry(
        vocab=128_256, hidden=3072, intermediate=8192, layers=28, heads=24, kv_heads=8,
        head_dim=128, max_positions=131_072, theta=500_000.0, tied=True, dtype="bfloat16",
        scaling=Llama3Scaling(32.0, 1.0, 4.0, 8192),
    ),
    "llama-3.1-8b": _geometry(
        vocab=128_256, hidden=4096, intermediate=14_336, layers=32, heads=32, kv_heads=8,
        head_dim=128, max_positions=131_072, theta=500_000.0, tied=False, dtype="bfloat16",
        scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192),
    ),
    "llama-3.1-70b": _geometry(
        vocab=128_256, hidden=8192, intermediate=28_672, layers=80, heads=64, kv_heads=8,
        head_dim=128, max_positions=131_072, theta=500_000.0, tied=False, dtype="bfloat16",
        scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192),
    ),
    "qwen2.5-0.5b": _geometry(
        vocab=151_936, hidden=896, intermediate=4864, layers=24, heads=14, kv_heads=2,
        head_dim=64, max_positions=32_768, theta=1_000_000.0, tied=True, dtype="bfloat16",
        model_type="qwen2", eps=1e-6, biases=frozenset({"qkv"}),
    ),
    "qwen3-0.6b": _geometry(
        vocab=151_936, hidden=1024, intermediate=3072, layers=28, heads=16, kv_heads=8,
        head_dim=128, max_positions=40_960, theta=1_000_000.0, tied=True, dtype="bfloat16",
        model_type="qwen3", eps=1e-6, qk_norm=True,
    ),
    "gemma-3-270m": _geometry(
        vocab=262_144, hidden=640, intermediate=2048, layers=18, heads=4, kv_heads=1,
        head_dim=256, max_positions=32_768, theta=1_000_000.0, tied=True, dtype="bfloat16",
        model_type="gemma3_text", eps=1e-6, local=Layer(512, Rope(10_000.0)), qk_norm=True,
        post_norms=True, norm_offset=1.0, hidden_act="gelu_tanh", embedding_multiplier=640**0.5,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RandomCheckpoint:
    """A geometry and a seed. See `checkpoint.Checkpoint`."""

    geometry: str
    seed: int

    @classmethod
    def parse(cls, model: str) -> "RandomCheckpoint":
        """Read "random:NAME[:SEED]"; the seed is a decimal number and 0 if left out.

        Raises:
            UnsupportedModel: no geometry of that name.
            CheckpointError: the seed is not a number below 2^64.
        """
        _, geometry, *rest = model.split(":", 2)
        if geometry not in GEOMETRIES:
            raise UnsupportedModel(
                f"There is no such random model: choose one of {', '.join(GEOMETRIES)}."
            )
        seed = rest[0] if rest else "0"
        if not (seed.isascii() and seed.isdecimal() and len(seed) <= 20 and int(seed) < 2**64):
            raise CheckpointError(
                f"The seed of random:{geometry}:SEED must be a decimal number from 0 to 2^64 - 1."
            )
        return cls(geometry, int(seed))

    @property
    def config(self) -> ModelConfig:
        return GEOMETRIES[self.geometry]

    @property
    def name(self) -> str:
        return f"random:{self.geometry}:{self.seed}"

    @property
    def sources(self) -> dict[str, BinaryFile]:
        """See `checkpoint.Checkpoint`."""
        return {}

    def file_digests(self) -> dict[str, str]:
        """See `checkpoint.Checkpoint`."""
        return {"random weights": hashlib.sha256(self.name.encode()).hexdigest()}

    def read(self, name: str, shape: tuple[int, ...], rows: slice | None = None) -> Tensor:
        """float32: weights and biases near 0, what norms multiply by near 1."""
        expected = tensor_shapes(self.config).get(name)
        if expected is None:
            raise CheckpointError(f"{self.name} has no tensor {name}.")
        check_shape(self.name, name, expected, shape)
        first, last = (0, shape[0]) if rows is None else (rows.start, rows.stop)
        width = math.prod(shape[1:])
        key = f"{self.geometry}/{self.seed}/{name}"
        values = _uniform(key, first * width, (last - first) * width)
        if name.endswith("norm.weight"):
            values += np.float32(1 - self.config.norm_offset)
        return torch.from_numpy(values).view(last - first, *shape[1:])

    def close(self) -> None:
        pass


def _uniform(key: str, first: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """`count` float32 values around 0 from the stream of `key`, beginning with number `first`.

    Every step is an integer operation, exact, or one correctly rounded IEEE product, and Philox
    is specified to the bit; so all machines agree.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    philox = np.random.Philox(key=seed)
    philox.advance(first // _STEP_VALUES)
    skipped = first % _STEP_VALUES
    values = np.empty(skipped + count, dtype=np.float32)
    for start in range(0, len(values), 4 * _CHUNK_WORDS):
        chunk = values[start : start + 4 * _CHUNK_WORDS]
        words = philox.random_raw(-(-len(chunk) // 4)).astype("<u8", copy=False)
        np.subtract(words.view("<u2")[: len(chunk)], np.float32(32767.5), out=chunk)
        chunk *= _STEP
    return values[skipped:]
