"""Multiply-accumulates that one row of a model takes."""

from tsqp.model.config import LAYER_GROUPS, ModelConfig, linear_groups, parts


def widest_group_macs(config: ModelConfig) -> int:
    """Of one row of the dearest group of linear layers."""
    return max(_group_macs(config, *key) for key in linear_groups(config))


def layer_macs(config: ModelConfig, layer: int) -> int:
    """Of one row of all linear layers of one layer."""
    return sum(_group_macs(config, layer, group) for group in LAYER_GROUPS)


def dearest_row_macs(config: ModelConfig) -> int:
    """Of one row of whatever `open` may ask for: a group, or a layer at the end of the context."""
    attention = 2 * config.num_heads * config.head_dim * config.max_positions
    layer = max(layer_macs(config, layer) for layer in range(config.num_layers))
    return max(widest_group_macs(config), layer + attention)


def _group_macs(config: ModelConfig, layer: int, group: str) -> int:
    return sum(part.out_features * part.in_features for part in parts(config, layer, group))
