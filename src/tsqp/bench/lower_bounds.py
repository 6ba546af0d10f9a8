"""Lower bounds of the time for each mode's work, computed from the best rates of this machine.

Each bound counts only the limiting resource: operations for a prompt, and operations or memory
reads for a new token. The private modes add the time to copy the residues.
"""

from dataclasses import dataclass

import torch

from tsqp.algebra.params import FIELDS, LATTICE
from tsqp.bench.hardware_limits import DeviceLimits, HardwareLimits
from tsqp.bench.modes import Setting
from tsqp.checkpoint.quantize import integer_bytes
from tsqp.checkpoint.weights import linear_bytes, parse_dtype
from tsqp.model.config import ModelConfig, linear_groups, output_projection

# How many products with each weight the private modes compute, on each side.
WORKER_PRODUCTS = {"pad": 1, "pad-inline": 1, "shares": 2}
TEE_PRODUCTS = {"pad-inline": 1}  # lattice masks need none
TEE_MODES = ("transformers", "tee")


@dataclass(frozen=True, slots=True)
class LowerBound:
    """Lower bounds in seconds: for all prompts of a batch, and for each new token."""

    prefill_s: float
    decode_s: float

    def __add__(self, other: "LowerBound") -> "LowerBound":
        return LowerBound(self.prefill_s + other.prefill_s, self.decode_s + other.decode_s)

    def __mul__(self, times: int) -> "LowerBound":
        return LowerBound(times * self.prefill_s, times * self.decode_s)


def lower_bound(
    mode: str,
    config: ModelConfig,
    setting: Setting,
    limits: HardwareLimits,
    device: DeviceLimits | None,
) -> LowerBound:
    """The lower bound of one mode's time.

    Args:
        device: best rates of the workers' GPU, if they have one.
    """
    where = limits if device is None or mode in TEE_MODES else device
    if mode not in WORKER_PRODUCTS:
        dtype: torch.dtype = parse_dtype(setting.dtype, config)
        read_s = linear_bytes(config, dtype) / where.read_bytes_per_s
        return _products(config, setting, read_s, where.matmul_flops)
    digits = FIELDS[setting.field].digits
    in_tee = 0 if setting.field == LATTICE.name else TEE_PRODUCTS.get(mode, 0)

    def residue_products(rates: HardwareLimits | DeviceLimits) -> LowerBound:
        read_s = integer_bytes(config) / rates.read_bytes_per_s
        return _products(config, setting, read_s, rates.int8_ops / digits)

    return (
        residue_products(where) * WORKER_PRODUCTS[mode]
        + residue_products(limits) * in_tee
        + _crossing(config, setting, where.copy_bytes_per_s)
    )


def _products(config: ModelConfig, setting: Setting, read_s: float, ops_per_s: float) -> LowerBound:
    """The time to compute all linear layers once.

    Args:
        read_s: seconds to read all weights.
    """
    weights = sum(group.features * group.width for group in linear_groups(config))
    lm_head = output_projection(config)
    head = lm_head.features * lm_head.width
    # In prefill, the output projection is applied only to the last position.
    products = 2 * setting.batch * (setting.prompt_tokens * (weights - head) + head)
    return LowerBound(products / ops_per_s, max(read_s / setting.batch, 2 * weights / ops_per_s))


def _crossing(config: ModelConfig, setting: Setting, copy_bytes_per_s: float) -> LowerBound:
    """The time to copy the residues of all linear layers, in both directions."""
    residues = sum(sum(group.shape) for group in linear_groups(config))
    head = sum(output_projection(config).shape)
    copy_s = FIELDS[setting.field].residue_bytes / copy_bytes_per_s
    of_prompts = setting.batch * (setting.prompt_tokens * (residues - head) + head)
    return LowerBound(copy_s * of_prompts, copy_s * residues)
