"""Rotary embeddings as a Hugging Face config spells them, which is hostile until checked here."""

import math

from tsqp.errors import UnsupportedModel
from tsqp.model.json_fields import (
    Json,
    boolean,
    choice,
    integer,
    number,
    optional_number,
    show,
    wrong_type,
)
from tsqp.model.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    Rope,
    Scaling,
    YarnScaling,
)

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


def parse_rope(config: Json, theta: float = 10_000.0) -> Rope:
    """The one rope of a model's layers, from a config in either spelling of Hugging Face.

    Args:
        theta: used if the config has none.

    Raises:
        UnsupportedModel: a variant that is not implemented.
        CheckpointError: a parameter is missing, has the wrong type, or lies out of bounds.
    """
    parameters = rope_parameters(config, "rope_scaling") or rope_parameters(
        config, "rope_parameters"
    )
    found = config.get("rope_theta")
    return build_rope(parameters, config, theta if found is None else found)


def rope_parameters(config: Json, key: str) -> Json:
    """The object under `key`; empty if there is none."""
    found = config.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise wrong_type(key, "an object", found)
    return found


def build_rope(parameters: Json, config: Json, theta: float) -> Rope:
    """A rope from its own parameters, and from what a config may say outside them.

    Args:
        theta: used if the parameters have none.
    """
    for key, value in parameters.items():
        if isinstance(value, dict):
            raise UnsupportedModel(
                f"The model has separate rotary parameters for {show(key)}, which TSQP does not"
                " support in this family."
            )
    parameters = _outside(config) | {k: v for k, v in parameters.items() if v is not None}
    partial = parameters.get("partial_rotary_factor")
    if partial is not None and partial != 1:
        raise UnsupportedModel(
            f"The model rotates only a part of each head (partial_rotary_factor"
            f" {show(partial)}), which TSQP does not support."
        )
    parameters.setdefault("rope_theta", theta)
    # 1 would make all frequencies equal, and yarn divides by its logarithm.
    return Rope(number(parameters, "rope_theta", 1 + 1e-6, 1e18), _scaling(parameters, config))


def _outside(config: Json) -> Json:
    """Values that older configs have next to the rotary parameters instead of inside them."""
    keys = ("partial_rotary_factor", "original_max_position_embeddings")
    return {key: config[key] for key in keys if config.get(key) is not None}


def _scaling(rope: Json, config: Json) -> Scaling | None:
    key = "rope_type" if "rope_type" in rope else "type"
    kind = choice(rope, key, ROPE_TYPES, "default")
    if kind == "default":
        return None
    configured = integer(config, "max_position_embeddings", 1, 2**31, 2048)
    if kind == "yarn":
        return _yarn_scaling(rope, configured)
    factor = number(rope, "factor", 1.0, 1e6)
    if kind == "linear":
        return LinearScaling(factor)
    if kind == "dynamic":
        return DynamicScaling(factor, configured)
    return Llama3Scaling(
        factor=factor,
        low_freq_factor=number(rope, "low_freq_factor", 1e-6, 1e6),
        high_freq_factor=number(rope, "high_freq_factor", 1e-6, 1e6),
        original_max_positions=integer(rope, "original_max_position_embeddings", 1, 2**31),
    )


def _yarn_scaling(rope: Json, configured: int) -> YarnScaling:
    original = integer(rope, "original_max_position_embeddings", 1, 2**31, configured)
    factor = number(rope, "factor", 1.0, 1e6, max(1.0, configured / original))
    attention_factor = optional_number(rope, "attention_factor", 0.0, 1e6)
    if attention_factor is None:
        mscale = optional_number(rope, "mscale", 0.0, 1e6)
        over_all = optional_number(rope, "mscale_all_dim", 0.0, 1e6)
        if mscale and over_all:
            attention_factor = _mscale(factor, mscale) / _mscale(factor, over_all)
        else:
            attention_factor = _mscale(factor, 1)
    return YarnScaling(
        factor=factor,
        original_max_positions=original,
        attention_factor=attention_factor,
        beta_fast=optional_number(rope, "beta_fast", 1e-6, 1e6) or 32,
        beta_slow=optional_number(rope, "beta_slow", 1e-6, 1e6) or 1,
        truncate=boolean(rope, "truncate", True),
    )


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
