"""A small random model of each family, written by transformers, and passes driven by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tsqp.nn.attention import Segment
from tsqp.tee.decoder import Batch, Decoder
from tsqp.tee.engine.interleave import run_interleaved
from tsqp.tee.offload.offload import Offload
from tsqp.tee.stats import Stats

VOCABULARY = 101
WINDOW = 16
FULL, SLIDING = "full_attention", "sliding_attention"

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 7,
    "pad_token_id": None,
}
_LATER_WINDOWS = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": WINDOW}
_LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}

# Each with what sets its family apart, and with windows shorter than the prompts of the tests.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": WINDOW, "head_dim": 12},
    "mistral without a window": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", **_LATER_WINDOWS},
    "qwen2 without windows": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2 by layer_types": {
        "model_type": "qwen2",
        **_LATER_WINDOWS,
        "layer_types": [SLIDING, FULL, FULL, SLIDING],
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True, **_LATER_WINDOWS},
    "gemma2": {
        "model_type": "gemma2",
        **_GEMMA,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        **_GEMMA,
        "num_hidden_layers": 5,
        "sliding_window_pattern": 3,
        "attention_bias": True,
        "final_logit_softcapping": 5.0,
        "rope_parameters": {FULL: _LINEAR, SLIDING: {"rope_type": "default", "rope_theta": 100.0}},
    },
    "phi3": {"model_type": "phi3", "sliding_window": WINDOW},
    "smollm3": {
        "model_type": "smollm3",
        "no_rope_layers": [1, 0, 1, 0],
        "attention_bias": True,
        "mlp_bias": True,
    },
    "smollm3 with windows": {
        "model_type": "smollm3",
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
    },
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 0.5,
        "attention_bias": True,
        "mlp_bias": True,
    },
}
FAMILIES = ["mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3", "granite"]


def make_model(name: str, **changes: object) -> Any:
    """transformers' float32 model of that name, with no weight that is plain by chance."""
    settings = _COMMON | MODELS[name] | changes
    torch.manual_seed(0)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    offset = 0.0 if "gemma" in name else 1.0
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            centre = offset if "norm" in parameter_name else 0.0
            parameter.copy_(centre + 0.3 * torch.randn_like(parameter))
    return model


def write_model(folder: Path, name: str, **changes: object) -> Any:
    """Save a model in `folder`, and return it."""
    model = make_model(name, **changes)
    model.save_pretrained(folder)
    return model


def random_ids(count: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()


def reference_logits(model: Any, token_ids: Sequence[int]) -> Tensor:
    """Logits of every position, [T, V], in one pass of transformers."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([list(token_ids)])).logits[0]
    return logits


def logits_in_chunks(
    decoder: Decoder, offload: Offload, token_ids: Sequence[int], chunks: Sequence[int]
) -> Tensor:
    """Logits of every position, [T, V], in passes of so many tokens through the KV cache."""
    assert sum(chunks) == len(token_ids)
    offload.kv.alloc(0, len(token_ids))
    pieces = []
    start = 0
    for length in chunks:
        ids = torch.tensor(token_ids[start : start + length])
        positions = torch.arange(start, start + length)
        segments = [Segment(0, start, length)]
        batch = Batch(ids, positions, segments, torch.arange(length))
        stats = Stats()
        with torch.inference_mode():
            pieces += run_interleaved(offload, [decoder.forward(batch, stats)], stats)
        start += length
    offload.kv.free(0)
    return torch.cat(pieces)
