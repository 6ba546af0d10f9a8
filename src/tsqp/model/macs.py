"""Multiply-accumulates that one row of a model takes."""

from tsqp.model.config import ModelConfig, layer_groups, linear_groups
from tsqp.model.shard import WHOLE, Shard


def widest_group_macs(config: ModelConfig, shard: Shard = WHOLE) -> int:
    """Multiplications of one row in a shard of the largest group of linear layers."""
    return max(shard.size_of(group) * group.width for group in linear_groups(config))


def layer_macs(config: ModelConfig, layer: int) -> int:
    """Multiplications of one row in all linear layers of one layer."""
    return sum(group.features * group.width for group in layer_groups(config, layer))


def dearest_row_macs(config: ModelConfig) -> int:
    """Multiplications of one row in the largest call of `open`.

    That is a group of linear layers, or a whole layer at the end of the context.
    """
    attention = 2 * config.num_heads * config.head_dim * config.max_positions
    layer = max(layer_macs(config, layer) for layer in range(config.num_layers))
    return max(widest_group_macs(config), layer + attention)
