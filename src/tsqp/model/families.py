"""Reads the Hugging Face config of each family of models, with one short function per family.

A function returns the fields of `ModelConfig` in which its family differs from the defaults.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tsqp.errors import UnsupportedModel
from tsqp.model.config import Layer
from tsqp.model.json_fields import (
    Json,
    boolean,
    choice,
    integer,
    number,
    optional_number,
    wrong_type,
)
from tsqp.model.rope import Rope
from tsqp.model.rope_config import build_rope, parse_rope, rope_parameters

SLIDING, FULL = "sliding_attention", "full_attention"
MAX_LAYERS = 2**12

Fields = dict[str, Any]  # of ModelConfig


@dataclass(frozen=True, slots=True)
class Family:
    """How to read the configs of one family.

    Attributes:
        fields: the function described above. Its config includes the defaults, and is unchecked.
        architectures: the names of the family's language models. The last one is the model without
            output projection, which AutoModel saves.
        defaults: transformers' values for missing keys. A key that is null stays null.
    """

    fields: Callable[[Json], Fields]
    architectures: tuple[str, ...]
    defaults: Json


def _llama(config: Json) -> Fields:
    rope = parse_rope(config)
    return {"layers": (Layer(None, rope),) * _count(config), "biases": _biases(config)}


def _mistral(config: Json) -> Fields:
    kind = FULL if config.get("sliding_window") is None else SLIDING
    return {"layers": _layers(config, [kind] * _count(config), parse_rope(config))}


def _qwen2(config: Json) -> Fields:
    return {"layers": _qwen_layers(config), "biases": frozenset({"qkv"})}


def _qwen3(config: Json) -> Fields:
    biases = _biases(config) - {"gate_up", "down"}
    return {"layers": _qwen_layers(config), "biases": biases, "qk_norm": True}


def _qwen_layers(config: Json) -> tuple[Layer, ...]:
    """If windows are used, the first max_window_layers layers have none."""
    first = integer(config, "max_window_layers", 0, MAX_LAYERS)
    if not boolean(config, "use_sliding_window"):
        config = config | {"sliding_window": None}
    slides = config.get("sliding_window") is not None
    kinds = [SLIDING if slides and n >= first else FULL for n in range(_count(config))]
    return _layers(config, kinds, parse_rope(config))


def _phi3(config: Json) -> Fields:
    rope = parse_rope(config)
    if rope.scaling is not None:
        raise UnsupportedModel(
            "The model has scaled rotary embeddings, but TSQP supports only Phi-3 without (4k)."
        )
    return _mistral(config) | {"fused": True}


def _smollm3(config: Json) -> Fields:
    count = _count(config)
    interval = integer(config, "no_rope_layer_interval", 1, MAX_LAYERS, 4)
    rotated = config.get("no_rope_layers")  # in spite of its name, 1 says that a layer rotates
    if rotated is None:
        rotated = [int((n + 1) % interval != 0) for n in range(count)]
    if not isinstance(rotated, list) or len(rotated) < count:
        raise wrong_type("no_rope_layers", f"a list of {count} numbers", rotated)
    if not boolean(config, "use_sliding_window"):
        config = config | {"sliding_window": None}
    slides = config.get("sliding_window") is not None
    kinds = [SLIDING if slides and not rotates else FULL for rotates in rotated[:count]]
    layers = zip(_layers(config, kinds, parse_rope(config, 2_000_000.0)), rotated, strict=False)
    return {
        "layers": tuple(each if rotates else Layer(each.window, None) for each, rotates in layers),
        "biases": _biases(config),
    }


def _granite(config: Json) -> Fields:
    return _llama(config) | {
        "attention_scale": number(config, "attention_multiplier", 1e-6, 1e6, 1.0),
        "embedding_multiplier": number(config, "embedding_multiplier", 1e-6, 1e6, 1.0),
        "residual_multiplier": number(config, "residual_multiplier", 1e-6, 1e6, 1.0),
        "logits_scaling": number(config, "logits_scaling", 1e-6, 1e6, 1.0),
    }


def _gemma2(config: Json) -> Fields:
    return _gemma(config) | {
        "layers": _layers(config, _every(config, 2), parse_rope(config)),
        "attention_softcap": optional_number(config, "attn_logit_softcapping", 1e-6, 1e6),
    }


def _gemma3(config: Json) -> Fields:
    if config.get("attn_logit_softcapping") is not None:
        raise UnsupportedModel(
            "The model has attn_logit_softcapping, which transformers ignores in Gemma 3: set"
            " it to null in the config."
        )
    pattern = integer(config, "sliding_window_pattern", 1, MAX_LAYERS, 6)
    layers = _layers(config, _every(config, pattern), *_gemma3_ropes(config))
    return _gemma(config) | {"layers": layers, "qk_norm": True}


def _gemma3_ropes(config: Json) -> tuple[Rope, Rope]:
    """The ropes of global layers, which the older rope_scaling applies to, and of local layers."""
    nested = rope_parameters(config, "rope_parameters")
    if not nested.keys() <= {FULL, SLIDING}:
        raise wrong_type("rope_parameters", f"an object with {FULL} and {SLIDING}", nested)
    full = rope_parameters(nested, FULL) | rope_parameters(config, "rope_scaling")
    local = rope_parameters(nested, SLIDING)
    full_theta = number(config, "rope_theta", 1e-3, 1e18, 1_000_000.0)
    local_theta = number(config, "rope_local_base_freq", 1e-3, 1e18, 10_000.0)
    return build_rope(full, config, full_theta), build_rope(local, config, local_theta)


def _gemma(config: Json) -> Fields:
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModel(
            "The model has use_bidirectional_attention, but TSQP supports only causal attention."
        )
    act = choice(config, "hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    return {
        "attention_scale": number(config, "query_pre_attn_scalar", 1e-6, 1e6, 256) ** -0.5,
        "biases": _biases(config) - {"gate_up", "down"},
        "post_norms": True,
        "norm_offset": 1.0,
        "hidden_act": act,
        "embedding_multiplier": integer(config, "hidden_size", 1, 2**20) ** 0.5,
        "logits_softcap": optional_number(config, "final_logit_softcapping", 1e-6, 1e6),
    }


def _count(config: Json) -> int:
    return integer(config, "num_hidden_layers", 1, MAX_LAYERS)


def _biases(config: Json) -> frozenset[str]:
    attention = {"qkv", "o"} if boolean(config, "attention_bias") else set()
    return frozenset(attention | ({"gate_up", "down"} if boolean(config, "mlp_bias") else set()))


def _every(config: Json, pattern: int) -> list[str]:
    """One layer in every `pattern` layers attends to all tokens."""
    return [SLIDING if (n + 1) % pattern else FULL for n in range(_count(config))]


def _layers(
    config: Json, kinds: Sequence[str], rope: Rope, local_rope: Rope | None = None
) -> tuple[Layer, ...]:
    """Layers of the kinds that the config lists; if it lists none, of `kinds`."""
    named = config.get("layer_types")
    if named is not None:
        if not isinstance(named, list) or len(named) != len(kinds):
            raise wrong_type("layer_types", f"a list of {len(kinds)} names", named)
        kinds = [choice({"layer_types": each}, "layer_types", (FULL, SLIDING)) for each in named]
    if SLIDING not in kinds:
        return (Layer(None, rope),) * len(kinds)
    local = Layer(integer(config, "sliding_window", 1, 2**31), local_rope or rope)
    return tuple(local if kind == SLIDING else Layer(None, rope) for kind in kinds)


_QWEN: Json = {"num_key_value_heads": 32, "max_position_embeddings": 32_768}
_QWEN |= {"sliding_window": 4096, "max_window_layers": 28}
_GEMMA: Json = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
_GEMMA |= {"sliding_window": 4096, "tie_word_embeddings": True}
_GEMMA2: Json = {"max_position_embeddings": 8192}
_GEMMA2 |= {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
_GEMMA3: Json = {"max_position_embeddings": 131_072, "vocab_size": 262_208}
_MISTRAL: Json = {"num_key_value_heads": 8, "max_position_embeddings": 131_072}
_MISTRAL |= {"sliding_window": 4096}
_PHI3: Json = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_SMOLLM3: Json = {"num_key_value_heads": 4, "max_position_embeddings": 32_768}
_SMOLLM3 |= {"tie_word_embeddings": True}

FAMILIES = {
    "llama": Family(_llama, ("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"), {}),
    "mistral": Family(_mistral, ("MistralForCausalLM", "MistralModel"), _MISTRAL),
    "qwen2": Family(_qwen2, ("Qwen2ForCausalLM", "Qwen2Model"), _QWEN),
    "qwen3": Family(_qwen3, ("Qwen3ForCausalLM", "Qwen3Model"), _QWEN | {"head_dim": 128}),
    "gemma2": Family(_gemma2, ("Gemma2ForCausalLM", "Gemma2Model"), _GEMMA | _GEMMA2),
    "gemma3_text": Family(_gemma3, ("Gemma3ForCausalLM", "Gemma3TextModel"), _GEMMA | _GEMMA3),
    "phi3": Family(_phi3, ("Phi3ForCausalLM", "Phi3Model"), _PHI3),
    "smollm3": Family(_smollm3, ("SmolLM3ForCausalLM", "SmolLM3Model"), _SMOLLM3),
    "granite": Family(_granite, ("GraniteForCausalLM", "GraniteModel"), {}),
}
