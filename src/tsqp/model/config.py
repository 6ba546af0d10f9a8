"""What a Llama-architecture model is: its shape, read from a hostile config and checked once."""

from dataclasses import dataclass

from tsqp.errors import CheckpointError, UnsupportedModel
from tsqp.model.json_fields import Json, boolean, choice, integer, number, show, wrong_type

SUPPORTED_MODEL_TYPES = ("llama",)
SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM")
SUPPORTED_ACTIVATIONS = ("silu",)
SUPPORTED_ROPE_TYPES = ("default", "llama3")
SUPPORTED_DTYPES = ("float32", "float16", "bfloat16")

LAYER_GROUPS = ("qkv", "o", "gate_up", "down")

Key = tuple[int, str]  # of a group of linear layers: (layer, group); (-1, "lm_head") is the last


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Parameters of the "llama3" rotary scaling (Llama 3.1 and later)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise CheckpointError(
                f"The model config has high_freq_factor {self.high_freq_factor}, which must be"
                f" greater than low_freq_factor {self.low_freq_factor}."
            )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of one model.

    Attributes:
        head_dim: features of one head, even; num_heads · head_dim need not equal hidden_size.
        max_positions: the longest sequence the model was made for, in tokens.
        eos_token_ids: tokens that end an answer; may be empty.
        dtype: "float32", "float16" or "bfloat16", the checkpoint's own.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    hidden_act: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"The model config has num_key_value_heads {self.num_kv_heads}, which must divide"
                f" num_attention_heads {self.num_heads}."
            )
        if self.head_dim % 2:
            raise CheckpointError(
                f"The model config has head_dim {self.head_dim}, which must be even."
            )


@dataclass(frozen=True, slots=True)
class Part:
    """One linear layer of the checkpoint.

    Attributes:
        name: prefix of its tensors, for example "model.layers.0.self_attn.q_proj"; the weight is
            `name + ".weight"`, [out_features, in_features], and the bias `name + ".bias"`.
    """

    name: str
    out_features: int
    in_features: int
    bias: bool


def parts(config: ModelConfig, layer: int, group: str) -> tuple[Part, ...]:
    """The linear layers that `group` of `layer` fuses, in the order of their outputs.

    `group` is one of LAYER_GROUPS, or "lm_head" with layer -1. A tied output projection is
    named for the embedding whose tensor it shares.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    if group == "lm_head":
        assert layer == -1, layer
        name = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        return (Part(name, config.vocab_size, hidden, False),)
    assert 0 <= layer < config.num_layers, layer
    q = config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
    return {
        "qkv": (
            Part(f"{attention}.q_proj", q, hidden, config.attention_bias),
            Part(f"{attention}.k_proj", kv, hidden, config.attention_bias),
            Part(f"{attention}.v_proj", kv, hidden, config.attention_bias),
        ),
        "o": (Part(f"{attention}.o_proj", hidden, q, config.attention_bias),),
        "gate_up": (
            Part(f"{mlp}.gate_proj", inner, hidden, config.mlp_bias),
            Part(f"{mlp}.up_proj", inner, hidden, config.mlp_bias),
        ),
        "down": (Part(f"{mlp}.down_proj", hidden, inner, config.mlp_bias),),
    }[group]


def linear_groups(config: ModelConfig) -> list[Key]:
    """All groups of a model as (layer, group), the output projection last."""
    layers = range(config.num_layers)
    return [*((layer, group) for layer in layers for group in LAYER_GROUPS), (-1, "lm_head")]


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all linear weights, biases and the embedding by name; a tied one once."""
    linears = [part for key in linear_groups(config) for part in parts(config, *key)]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size)
    }
    for part in linears:
        shapes[f"{part.name}.weight"] = (part.out_features, part.in_features)
        if part.bias:
            shapes[f"{part.name}.bias"] = (part.out_features,)
    return shapes


def norm_names(config: ModelConfig) -> list[str]:
    """The names of all norms; each has shape [hidden_size]."""
    kinds = ("input_layernorm", "post_attention_layernorm")
    layers = range(config.num_layers)
    return [f"model.layers.{i}.{kind}.weight" for i in layers for kind in kinds] + [
        "model.norm.weight"
    ]


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the model."""
    norm = (config.hidden_size,)
    return linear_shapes(config) | dict.fromkeys(norm_names(config), norm)


def from_hf(config: Json, generation_config: Json | None) -> ModelConfig:
    """Check a Hugging Face config.json, in its old or its transformers-5 spelling.

    Raises:
        UnsupportedModel: an architecture, activation, rotary scaling, dtype or quantization
            that is not implemented.
        CheckpointError: a key is missing, has the wrong type, or lies out of bounds.
    """
    _check_supported(config)
    hidden = integer(config, "hidden_size", 1, 2**20)
    heads = integer(config, "num_attention_heads", 1, 2**14)
    vocab = integer(config, "vocab_size", 1, 2**24)
    if config.get("head_dim") is None and hidden % heads:
        raise CheckpointError(
            f"The model config has hidden_size {hidden}, which num_attention_heads {heads} must"
            " divide unless head_dim is given."
        )
    rope = _rope_parameters(config)
    return ModelConfig(
        model_type="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=integer(config, "intermediate_size", 1, 2**22),
        num_layers=integer(config, "num_hidden_layers", 1, 2**12),
        num_heads=heads,
        num_kv_heads=integer(config, "num_key_value_heads", 1, 2**14, heads),
        head_dim=integer(config, "head_dim", 1, 2**14, hidden // heads),
        max_positions=integer(config, "max_position_embeddings", 1, 2**31, 2048),
        rms_norm_eps=number(config, "rms_norm_eps", 1e-30, 1.0, 1e-6),
        rope_theta=number(rope, "rope_theta", 1e-3, 1e18, 10_000.0),
        rope_scaling=_rope_scaling(rope),
        tie_word_embeddings=boolean(config, "tie_word_embeddings"),
        attention_bias=boolean(config, "attention_bias"),
        mlp_bias=boolean(config, "mlp_bias"),
        hidden_act=choice(config, "hidden_act", SUPPORTED_ACTIVATIONS, "silu"),
        bos_token_id=_token_id(config.get("bos_token_id"), "bos_token_id", vocab),
        eos_token_ids=_eos_token_ids(config, generation_config or {}, vocab),
        dtype=_dtype(config),
    )


def _check_supported(config: Json) -> None:
    model_type = config.get("model_type")
    if model_type is None:
        raise CheckpointError("The model config has no model_type.")
    choice(config, "model_type", SUPPORTED_MODEL_TYPES)
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        raise wrong_type("architectures", "a list", architectures)
    if architectures and not any(name in SUPPORTED_ARCHITECTURES for name in architectures):
        raise UnsupportedModel(
            f"The model has architectures {show(architectures)}, and TSQP supports"
            f" {SUPPORTED_ARCHITECTURES[0]}."
        )
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UnsupportedModel(
            f"The checkpoint is quantized with {show(method)}, which TSQP does not read: use an"
            " unquantized safetensors checkpoint or a GGUF file."
        )


def _rope_parameters(config: Json) -> Json:
    """The rotary parameters as one flat object, whichever way the config spells them."""
    rope = {"rope_theta": config.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        found = config.get(key)
        if found is None:
            continue
        if not isinstance(found, dict):
            raise wrong_type(key, "an object", found)
        rope |= found
    if rope.get("rope_type") is None:
        rope["rope_type"] = rope.get("type")
    if rope.get("original_max_position_embeddings") is None:
        rope["original_max_position_embeddings"] = config.get("original_max_position_embeddings")
    partial = rope.get("partial_rotary_factor")
    if partial is not None and partial != 1:
        raise UnsupportedModel(
            f"The model rotates only a part of each head (partial_rotary_factor"
            f" {show(partial)}), which TSQP does not support."
        )
    return rope


def _rope_scaling(rope: Json) -> Llama3Scaling | None:
    if choice(rope, "rope_type", SUPPORTED_ROPE_TYPES, "default") == "default":
        return None
    return Llama3Scaling(
        factor=number(rope, "factor", 1.0, 1e6),
        low_freq_factor=number(rope, "low_freq_factor", 1e-6, 1e6),
        high_freq_factor=number(rope, "high_freq_factor", 1e-6, 1e6),
        original_max_positions=integer(rope, "original_max_position_embeddings", 1, 2**31),
    )


def _dtype(config: Json) -> str:
    key = "torch_dtype" if config.get("dtype") is None else "dtype"
    return choice(config, key, SUPPORTED_DTYPES, "float32")


def _eos_token_ids(config: Json, generation_config: Json, vocab: int) -> tuple[int, ...]:
    found = generation_config.get("eos_token_id")
    if found is None:
        found = config.get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    checked = (_token_id(each, "eos_token_id", vocab) for each in ids)
    return tuple(dict.fromkeys(each for each in checked if each is not None))


def _token_id(value: object, key: str, vocab: int) -> int | None:
    return None if value is None else integer({key: value}, key, 0, vocab - 1)
