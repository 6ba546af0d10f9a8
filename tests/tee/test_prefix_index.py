"""Which kept prefix is found, and which one makes way, without any model."""

from hypothesis import given
from hypothesis import strategies as st

from tsqp.tee.engine.prefix_index import PREFIX_BLOCK, Holder, PrefixIndex

TEXT = list(range(100))


def holder(
    kv_id: int, token_ids: list[int], scope: str = "a", tenant: str = "a", *, idle: bool = True
) -> Holder:
    return Holder(kv_id, scope, tenant, token_ids, idle)


def test_the_longest_common_prefix_is_found() -> None:
    index = PrefixIndex()
    kept = [holder(1, [*TEXT[:40], 7]), holder(2, [*TEXT[:50], 7]), holder(3, TEXT[:20])]
    for each in kept:
        index.keep(each)
    assert index.find("a", TEXT) == (kept[1], 50)
    assert index.find("a", TEXT[:45]) == (kept[1], 45)
    assert index.find("a", TEXT[: PREFIX_BLOCK - 1]) == (None, 0)
    assert index.find("a", [7, *TEXT]) == (None, 0)


def test_other_scopes_see_nothing() -> None:
    index = PrefixIndex()
    index.keep(holder(1, TEXT))
    assert index.find("b", TEXT) == (None, 0)
    assert index.idle("b") == []


def test_what_is_forgotten_leaves_nothing_behind() -> None:
    index = PrefixIndex()
    index.keep(holder(1, TEXT))
    index.keep(holder(1, TEXT[:30]))  # replaces it
    assert index.find("a", TEXT)[1] == 30
    index.forget(1)
    index.forget(1)
    assert index.find("a", TEXT) == (None, 0)
    assert not index._scopes
    assert not index._all


def test_a_tenant_that_needs_memory_gives_up_its_own_first() -> None:
    index = PrefixIndex()
    index.keep(holder(1, TEXT[:60], "a", "a"))
    index.keep(holder(2, TEXT[:30], "a", "a"))
    index.keep(holder(3, TEXT, "b", "b"))
    index.keep(holder(4, TEXT, "a", "a", idle=False))
    first = index.next_to_evict("a", None)
    assert first is not None
    assert first.kv_id == 1
    index.use(first)
    second = index.next_to_evict("a", None)
    assert second is not None
    assert second.kv_id == 2
    spared = index.next_to_evict("a", second)
    assert spared is first


def test_a_tenant_without_any_takes_from_the_one_that_keeps_most() -> None:
    index = PrefixIndex()
    index.keep(holder(1, TEXT[:40], "a", "a"))
    index.keep(holder(2, TEXT[:40], "b1", "b"))
    index.keep(holder(3, TEXT[:40], "b2", "b"))
    found = index.next_to_evict("c", None)
    assert found is not None
    assert found.kv_id == 2
    assert PrefixIndex().next_to_evict("c", None) is None


@given(
    kept=st.lists(st.lists(st.integers(0, 1), min_size=10, max_size=60), max_size=6),
    prompt=st.lists(st.integers(0, 1), min_size=1, max_size=60),
)
def test_it_finds_what_comparing_everything_finds(kept: list[list[int]], prompt: list[int]) -> None:
    index = PrefixIndex()
    for number, token_ids in enumerate(kept):
        index.keep(holder(number, token_ids))

    def common(token_ids: list[int]) -> int:
        pairs = list(zip(token_ids, prompt, strict=False))
        return next((n for n, (one, other) in enumerate(pairs) if one != other), len(pairs))

    longest = max(map(common, kept), default=0)
    found, length = index.find("a", prompt)
    assert length == (longest if longest >= PREFIX_BLOCK else 0)
    assert (found is None) == (length == 0)
    if found is not None:
        assert list(found.token_ids)[:length] == prompt[:length]
