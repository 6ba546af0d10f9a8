"""The cache returns what was put in, and gives memory back."""

import pytest
import torch
from torch import Tensor

from tsqp.errors import OutOfMemory
from tsqp.nn.kv_cache import KvCache

LAYERS, KV_HEADS, FEATURES = 2, 3, 4


@pytest.fixture
def cache() -> KvCache:
    return KvCache(LAYERS, KV_HEADS, FEATURES, torch.float32)


def kv(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, tokens, KV_HEADS, FEATURES, generator=generator)
    return k, v


def test_appended_tokens_come_back_in_order(cache: KvCache) -> None:
    cache.alloc(9, 5)
    (k1, v1), (k2, v2) = kv(2, 1), kv(3, 2)
    cache.append(9, 1, 0, k1, v1)
    k_JSK, v_JSK = cache.append(9, 1, 2, k2, v2)
    assert torch.equal(k_JSK.transpose(0, 1), torch.cat((k1, k2)))
    assert torch.equal(v_JSK.transpose(0, 1), torch.cat((v1, v2)))


def test_layers_and_sequences_do_not_touch_each_other(cache: KvCache) -> None:
    cache.alloc(1, 4)
    cache.alloc(2, 4)
    k, v = kv(2, 1)
    held, _ = cache.append(1, 0, 0, k, v)
    cache.append(1, 1, 0, *kv(2, 2))
    cache.append(2, 0, 0, *kv(2, 3))
    assert torch.equal(held.transpose(0, 1), k)


def test_truncated_tokens_are_replaced(cache: KvCache) -> None:
    cache.alloc(1, 4)
    (k1, v1), (k2, v2) = kv(4, 1), kv(1, 2)
    for layer in range(LAYERS):
        cache.append(1, layer, 0, k1, v1)
    cache.truncate(1, 2)
    k_JSK, _ = cache.append(1, 0, 2, k2, v2)
    assert torch.equal(k_JSK.transpose(0, 1), torch.cat((k1[:2], k2)))


def test_bytes_are_counted_until_they_are_freed(cache: KvCache) -> None:
    one_token = LAYERS * 2 * KV_HEADS * FEATURES * 4
    cache.alloc(1, 10)
    cache.alloc(2, 5)
    assert cache.reserved_bytes == 15 * one_token
    cache.free(1)
    assert cache.reserved_bytes == 5 * one_token
    cache.free(2)
    assert cache.reserved_bytes == 0


def test_a_cache_that_cannot_fit_is_refused_with_its_size(cache: KvCache) -> None:
    needed = 2**50 * LAYERS * 2 * KV_HEADS * FEATURES * 4
    with pytest.raises(OutOfMemory, match=str(needed)):
        cache.alloc(1, 2**50)
    assert cache.reserved_bytes == 0


def test_more_tokens_than_allocated_is_our_own_mistake(cache: KvCache) -> None:
    cache.alloc(1, 2)
    with pytest.raises(AssertionError):
        cache.append(1, 0, 0, *kv(3, 1))


def test_a_gap_between_tokens_is_our_own_mistake(cache: KvCache) -> None:
    cache.alloc(1, 4)
    with pytest.raises(AssertionError):
        cache.append(1, 0, 1, *kv(1, 1))
