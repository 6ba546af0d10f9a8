"""The cache returns what was put in, and gives memory back."""

import pytest
import torch
from torch import Tensor

from tsqp.errors import OutOfMemory
from tsqp.nn import ops
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


def test_a_longer_sequence_keeps_what_it_holds(cache: KvCache) -> None:
    k_TJK, v_TJK = kv(3, 1)
    cache.alloc(1, 3)
    for layer in range(LAYERS):
        cache.append(1, layer, 0, k_TJK, v_TJK)
    cache.extend(1, 5)
    cache.extend(1, 2)  # never shorter
    assert cache.capacity(1) == 5
    assert cache.reserved_bytes == cache.bytes_for(5)
    new_k_TJK, new_v_TJK = kv(2, 2)
    for layer in range(LAYERS):
        k_JSK, v_JSK = cache.append(1, layer, 3, new_k_TJK, new_v_TJK)
        assert torch.equal(k_JSK.transpose(0, 1), torch.cat((k_TJK, new_k_TJK)))
        assert torch.equal(v_JSK.transpose(0, 1), torch.cat((v_TJK, new_v_TJK)))


def test_a_copy_goes_its_own_way(cache: KvCache) -> None:
    k_TJK, v_TJK = kv(4, 1)
    cache.alloc(1, 4)
    cache.alloc(2, 6)
    for layer in range(LAYERS):
        cache.append(1, layer, 0, k_TJK, v_TJK)
    cache.copy(1, 2, 3)
    assert cache.length(2, 0) == 3
    new_k_TJK, new_v_TJK = kv(1, 2)
    k_JSK, v_JSK = cache.append(2, 1, 3, new_k_TJK, new_v_TJK)
    assert torch.equal(k_JSK.transpose(0, 1), torch.cat((k_TJK[:3], new_k_TJK)))
    assert torch.equal(v_JSK.transpose(0, 1), torch.cat((v_TJK[:3], new_v_TJK)))
    assert torch.equal(cache.values(1, 1, 4).transpose(0, 1), v_TJK)


def test_memory_is_taken_in_blocks_up_to_the_limit() -> None:
    one_token = LAYERS * 2 * KV_HEADS * FEATURES * 4
    limited = KvCache(
        LAYERS, KV_HEADS, FEATURES, torch.float32, block=4, limit_bytes=15 * one_token
    )
    assert limited.most_tokens == 12
    limited.alloc(1, 5)
    assert limited.reserved_bytes == 8 * one_token
    with pytest.raises(OutOfMemory, match="--kv-memory"):
        limited.alloc(2, 5)
    with pytest.raises(OutOfMemory, match="--kv-memory"):
        limited.alloc(2, 4, spare=4)
    limited.alloc(2, 4)
    with pytest.raises(OutOfMemory, match="--kv-memory"):
        limited.extend(1, 9)
    assert limited.capacity(1) == 8
    limited.free(2)
    limited.extend(1, 9)
    assert limited.reserved_bytes == 12 * one_token


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("rows", [1, 7])
def test_attention_gives_the_same_bits_whatever_the_block(block: int, rows: int) -> None:
    k_TJK, v_TJK = kv(200, 1)
    q_THK = torch.randn(rows, 2 * KV_HEADS, FEATURES, generator=torch.Generator().manual_seed(2))
    found = []
    for each in (KvCache(1, KV_HEADS, FEATURES, torch.float32, block=b) for b in (1, block)):
        each.alloc(0, 10)
        for first in range(0, 200, 10):
            each.extend(0, first + 10)
            last = slice(first, first + 10)
            k_JSK, v_JSK = each.append(0, 0, first, k_TJK[last], v_TJK[last])
        found.append(torch.cat(ops.attention(q_THK, k_JSK, v_JSK)))
    assert torch.equal(*found)
