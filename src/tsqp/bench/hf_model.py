"""Converts our model config to a transformers config, to run the same model there."""

from typing import Any

from tsqp.model.config import ModelConfig
from tsqp.model.families import FULL, SLIDING
from tsqp.model.rope import DynamicScaling, LinearScaling, Rope, YarnScaling


def hf_config(config: ModelConfig, **changes: object) -> Any:
    """The transformers config for the same computation, with `changes` applied."""
    from transformers import AutoConfig

    kinds = [FULL if layer.window is None else SLIDING for layer in config.layers]
    windows = [layer.window for layer in config.layers if layer.window is not None]
    ropes = {
        kind: layer.rope
        for kind, layer in zip(kinds, config.layers, strict=True)
        if layer.rope is not None
    }
    spelled_ropes = {kind: _rope(rope) for kind, rope in ropes.items()}
    dynamic = [r.scaling for r in ropes.values() if isinstance(r.scaling, DynamicScaling)]
    positions = dynamic[0].original_max_positions if dynamic else config.max_positions
    nested = config.model_type == "gemma3_text"
    act = {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.hidden_act, config.hidden_act)
    spelled: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": spelled_ropes if nested else next(iter(spelled_ropes.values())),
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": "o" in config.biases,
        "mlp_bias": "down" in config.biases,
        "layer_types": kinds,
        "sliding_window": windows[0] if windows else None,
        "use_sliding_window": bool(windows),
        "no_rope_layers": [int(layer.rope is not None) for layer in config.layers],
        "hidden_act": act,
        "hidden_activation": act,
        "query_pre_attn_scalar": round(config.attention_scale**-2),
        "attention_multiplier": config.attention_scale,
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "logits_scaling": config.logits_scaling,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logits_softcap,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return AutoConfig.for_model(config.model_type, **(spelled | changes))


def _rope(rope: Rope) -> dict[str, object]:
    plain: dict[str, object] = {"rope_type": "default", "rope_theta": rope.theta}
    match rope.scaling:
        case None:
            return plain
        case LinearScaling(factor):
            return plain | {"rope_type": "linear", "factor": factor}
        case DynamicScaling(factor, _):
            return plain | {"rope_type": "dynamic", "factor": factor}
        case YarnScaling() as scaling:
            return plain | {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_max_positions,
                "attention_factor": scaling.attention_factor,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
            }
        case scaling:
            return plain | {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_positions,
            }
