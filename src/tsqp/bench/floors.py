"""The least time that any program could take for a mode's work, at this machine's best rates.

Each floor counts the one resource that binds that kind of work: operations for a prompt, weights
read for a token; and for the private modes the copying of residues.
"""

from dataclasses import dataclass

import torch

from tsqp.algebra.params import FIELDS
from tsqp.bench.ceilings import Ceilings
from tsqp.bench.modes import Setting
from tsqp.model.config import ModelConfig, linear_groups
from tsqp.model.quantize import group_shape, integer_bytes
from tsqp.model.weights import linear_bytes, parse_dtype

PRODUCTS = {"pad": 1, "pad-inline": 2, "shares": 2}  # with each weight, whoever computes them


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds at least: for the whole prompt, and for each new token."""

    prefill_s: float
    decode_s: float


def floor(mode: str, config: ModelConfig, setting: Setting, ceilings: Ceilings) -> Floor:
    """What a mode could take at best."""
    weights, head = _weights(config)
    # The output projection is applied to the last position of a prompt alone.
    products = 2 * (setting.prompt_tokens * (weights - head) + head)
    if mode not in PRODUCTS:
        dtype: torch.dtype = parse_dtype(setting.dtype, config)
        weights_s = linear_bytes(config, dtype) / ceilings.read_bytes_per_s
        return Floor(products / ceilings.matmul_flops, weights_s)
    field, times = FIELDS[setting.field], PRODUCTS[mode]
    residues, head_residues = _residues(config)
    copy_s = field.residue_bytes / ceilings.copy_bytes_per_s
    prompt_residues = setting.prompt_tokens * (residues - head_residues) + head_residues
    return Floor(
        times * field.digits * products / ceilings.int8_ops + copy_s * prompt_residues,
        times * integer_bytes(config) / ceilings.read_bytes_per_s + copy_s * residues,
    )


def _weights(config: ModelConfig) -> tuple[int, int]:
    """Linear weights, of all groups and of the output projection."""
    shapes = {key: group_shape(config, *key) for key in linear_groups(config)}
    sizes = {key: features * width for key, (features, width) in shapes.items()}
    return sum(sizes.values()), sizes[-1, "lm_head"]


def _residues(config: ModelConfig) -> tuple[int, int]:
    """Residues that cross for one token, both ways: of all groups and of the output projection."""
    sizes = {key: sum(group_shape(config, *key)) for key in linear_groups(config)}
    return sum(sizes.values()), sizes[-1, "lm_head"]
