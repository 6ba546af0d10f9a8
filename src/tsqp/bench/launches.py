"""How many launches a piece of work takes on a GPU, counted as operators that compute.

Operators that only make a view, or take memory, are not counted. An operator is one launch at
least; one that torch composes of others on a CPU is counted as these.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tsqp.algebra.params import FIELDS, Field
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.gpu.backends import cuda_product
from tsqp.gpu.backends.cpu import CpuBackend
from tsqp.gpu.layer import FusedLayers
from tsqp.gpu.worker_weights import load_weights
from tsqp.nn.attention import Segment
from tsqp.nn.kv_cache import KvCache

NO_LAUNCH = ("empty", "view", "reshape", "alias", "detach", "resize")  # in names


class LaunchCounter(TorchDispatchMode):
    """Counts by name while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and not any(word in name for word in NO_LAUNCH):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def count_launches(work: Callable[[], object]) -> list[str]:
    """The names of the operators that `work` launches."""
    with torch.no_grad(), LaunchCounter() as counter:
        work()
    names: list[str] = counter.names
    return names


def product_launches(field: Field, *, in_bfloat16: bool = False) -> list[str]:
    """Those of a product of one row through library calls."""
    width = cuda_product.EXACT_WIDTH
    weight_FD = torch.ones(8, width, dtype=torch.int8)
    c_TB = torch.zeros(1, field.residue_bytes * width, dtype=torch.uint8)
    z_TB = torch.empty(1, field.residue_bytes * len(weight_FD), dtype=torch.uint8)
    return count_launches(
        lambda: cuda_product.packed_product(c_TB, weight_FD, field, z_TB, in_bfloat16=in_bfloat16)
    )


def layer_launches(sequences: int) -> list[str]:
    """Those of a whole layer (`open --fuse layer`) for one token of each sequence.

    With one copy to the device, and one from it.
    """
    checkpoint, backend = open_checkpoint("random:tiny"), CpuBackend()
    try:
        weights = load_weights(checkpoint, torch.float32, backend)
    finally:
        checkpoint.close()
    config = weights.config
    cache = KvCache(config.num_layers, config.num_kv_heads, config.head_dim, torch.float32)
    layers = FusedLayers(weights, cache)
    segments = [Segment(number, 0, 1) for number in range(sequences)]
    for segment in segments:
        cache.alloc(segment.sequence, 1)
    tables = layers.tables(segments)
    x_TD = torch.ones(sequences, config.hidden_size)

    def run() -> None:
        backend.to_host(layers.run(0, x_TD, segments, tables), x_TD)

    return count_launches(run)


def all_launches() -> dict[str, int]:
    """The number of launches of each piece of work."""
    found = {"triton_product": 1, "graph": 1}
    for field in FIELDS.values():
        found[f"library_{field.name}"] = len(product_launches(field))
        found[f"library_bfloat16_{field.name}"] = len(product_launches(field, in_bfloat16=True))
    return found | {f"layer_{n}_sequences": len(layer_launches(n)) for n in (1, 16)}
