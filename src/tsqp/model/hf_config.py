"""A `ModelConfig` from a Hugging Face config.json, which is hostile until it is checked here."""

from tsqp.errors import CheckpointError, UnsupportedModel
from tsqp.model.config import ModelConfig
from tsqp.model.families import FAMILIES, Family
from tsqp.model.json_fields import Json, boolean, choice, integer, number, show, wrong_type

# What a checkpoint is stored in: what to compute with.
DTYPES = {d: d for d in ("float32", "float16", "bfloat16")} | {"float64": "float32"}
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

# Models of text and images: the family of their text part, and what they are called.
WRAPPERS = {"gemma3": ("gemma3_text", ("Gemma3ForConditionalGeneration", "Gemma3Model"))}


def from_hf(config: Json, generation_config: Json | None) -> ModelConfig:
    """Check a Hugging Face config.json, in its old or its transformers-5 spelling.

    For a model that also reads images, this gives the config of its language model.

    Args:
        generation_config: of generation_config.json, or None if there is none.

    Raises:
        UnsupportedModel: a family, activation, rotary scaling, dtype or quantization that is not
            implemented.
        CheckpointError: a key is missing, has the wrong type, or lies out of bounds.
    """
    config, family = _family(config)
    hidden = integer(config, "hidden_size", 1, 2**20)
    heads = integer(config, "num_attention_heads", 1, 2**14)
    vocab = integer(config, "vocab_size", 1, 2**24)
    if config.get("head_dim") is None and hidden % heads:
        raise CheckpointError(
            f"The model config has hidden_size {hidden}, which num_attention_heads {heads} must"
            " divide unless head_dim is given."
        )
    head_dim = integer(config, "head_dim", 1, 2**14, hidden // heads)
    max_positions = integer(config, "max_position_embeddings", 1, 2**31, 2048)
    common = {
        "model_type": config["model_type"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": integer(config, "intermediate_size", 1, 2**22),
        "num_heads": heads,
        "num_kv_heads": integer(config, "num_key_value_heads", 1, 2**14, heads),
        "head_dim": head_dim,
        "rms_norm_eps": number(config, "rms_norm_eps", 1e-30, 1.0, 1e-6),
        "tie_word_embeddings": boolean(
            config, "tie_word_embeddings", family.defaults.get("tie_word_embeddings", False)
        ),
        "attention_scale": head_dim**-0.5,
        "hidden_act": choice(config, "hidden_act", tuple(ACTIVATIONS), "silu"),
        "bos_token_id": _token_id(config.get("bos_token_id"), "bos_token_id", vocab),
        "eos_token_ids": _eos_token_ids(config, generation_config, vocab),
        "dtype": _dtype(config),
    }
    fields = common | family.fields(config)
    fields["hidden_act"] = ACTIVATIONS[fields["hidden_act"]]
    ropes = [layer.rope for layer in fields["layers"] if layer.rope is not None]
    longest = [rope.max_positions(max_positions) for rope in ropes]
    return ModelConfig(**fields, max_positions=min(longest, default=max_positions))


def _family(config: Json) -> tuple[Json, Family]:
    """The config of the language model, with its family's defaults, and that family."""
    if config.get("model_type") is None:
        raise CheckpointError("The model config has no model_type.")
    model_type = choice(config, "model_type", (*FAMILIES, *WRAPPERS))
    _check_quantization(config)
    architectures: tuple[str, ...] = ()
    if model_type in WRAPPERS:
        model_type, architectures = WRAPPERS[model_type]
        text = config.get("text_config")
        if not isinstance(text, dict):
            raise wrong_type("text_config", "an object", text)
        own = {k: v for k, v in text.items() if k != "tie_word_embeddings"}  # the wrapper's counts
        config = config | {k: v for k, v in own.items() if v is not None or k not in config}
        _check_quantization(config)
    family = FAMILIES[model_type]
    _check_architectures(config, (*family.architectures, *architectures))
    return family.defaults | config | {"model_type": model_type}, family


def _check_architectures(config: Json, supported: tuple[str, ...]) -> None:
    found = config.get("architectures") or []
    if not isinstance(found, list):
        raise wrong_type("architectures", "a list", found)
    if found and not any(name in supported for name in found):
        raise UnsupportedModel(
            f"The model has architectures {show(found)}, but TSQP supports only {supported[0]} of"
            " this family."
        )


def _check_quantization(config: Json) -> None:
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UnsupportedModel(
            f"The checkpoint is quantized with {show(method)}, which TSQP does not read: use an"
            " unquantized safetensors checkpoint or a GGUF file."
        )


def _dtype(config: Json) -> str:
    key = "torch_dtype" if config.get("dtype") is None else "dtype"
    return DTYPES[choice(config, key, tuple(DTYPES), "float32")]


def _eos_token_ids(config: Json, generation_config: Json | None, vocab: int) -> tuple[int, ...]:
    found = config.get("eos_token_id")
    if generation_config is not None:  # it decides, even if it is empty
        found = generation_config.get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    checked = (_token_id(each, "eos_token_id", vocab) for each in ids)
    return tuple(dict.fromkeys(each for each in checked if each is not None))


def _token_id(value: object, key: str, vocab: int) -> int | None:
    return None if value is None else integer({key: value}, key, 0, vocab - 1)
