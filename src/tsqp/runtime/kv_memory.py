"""How much memory the keys and values of the trusted side may take."""

import torch

from tsqp.checkpoint.memory import available_bytes
from tsqp.checkpoint.weights import check_memory
from tsqp.errors import UsageError
from tsqp.model.config import ModelConfig
from tsqp.nn.attention import kv_in_blocks
from tsqp.nn.kv_cache import KV_BLOCK, KvCache


def check_kv_memory(config: ModelConfig, dtype: torch.dtype, memory: int) -> None:
    """Refuse a `--kv-memory` that cannot be used, before any weights are read.

    Raises:
        OutOfMemory: there are not so many bytes.
        UsageError: one block of tokens does not fit.
    """
    check_memory(memory, "The KV cache", "choose a smaller --kv-memory")
    cache = kv_in_blocks(config, dtype, memory)
    if not cache.most_tokens:
        raise UsageError(
            f"--kv-memory is {memory} bytes, but {KV_BLOCK} tokens of this model take "
            f"{cache.bytes_for(KV_BLOCK)} bytes, and there must be room for as many: raise it."
        )


def kv_cache(config: ModelConfig, dtype: torch.dtype, memory: int | None, to_read: int) -> KvCache:
    """The KV cache of the trusted side, with half of the free memory unless `memory` is given.

    Args:
        to_read: bytes of weights that will still be read.
    """
    if memory is None:
        memory = max(0, available_bytes() - to_read) // 2
    return kv_in_blocks(config, dtype, memory)
