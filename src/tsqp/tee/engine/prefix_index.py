"""Finds kept keys and values that begin as a prompt does, by hashes of its blocks of tokens.

This module does not depend on a model or a worker.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

PREFIX_BLOCK = 16  # tokens of one hash, and the fewest that are reused


@dataclass(slots=True, eq=False)
class Holder:
    """Keys and values that may be reused.

    Attributes:
        kv_id: the id under which they are kept.
        scope: who may reuse them.
        tenant: on whose account they are kept.
        token_ids: the tokens that they belong to.
        idle: whether no sequence uses them any more, so that they may be freed.
    """

    kv_id: int
    scope: Hashable
    tenant: str
    token_ids: Sequence[int]
    idle: bool = False


@dataclass(slots=True)
class _Scope:
    holders: dict[int, Holder] = field(default_factory=dict)  # by kv_id, last used last
    by_hash: dict[int, dict[int, None]] = field(default_factory=dict)  # kv_ids, in order


class PrefixIndex:
    """Holders by scope. A lookup sees its own scope only: neither its result nor its time depends
    on what is kept in another one.

    A hash only proposes a holder; the tokens themselves are compared.
    """

    def __init__(self) -> None:
        self._scopes: dict[Hashable, _Scope] = {}
        self._all: dict[int, Holder] = {}  # by kv_id, last used last

    def keep(self, holder: Holder) -> None:
        """Add a holder, or replace the one with its kv_id."""
        self.forget(holder.kv_id)
        scope = self._scopes.setdefault(holder.scope, _Scope())
        scope.holders[holder.kv_id] = self._all[holder.kv_id] = holder
        for each in _hashes(holder.token_ids):
            scope.by_hash.setdefault(each, {})[holder.kv_id] = None

    def find(self, scope: Hashable, token_ids: Sequence[int]) -> tuple[Holder | None, int]:
        """The holder with the longest common prefix, and the number of tokens in common."""
        own = self._scopes.get(scope)
        if own is None:
            return None, 0
        found: dict[int, None] = {}
        for each in _hashes(token_ids):
            holders = own.by_hash.get(each)
            if not holders:
                break
            found = holders
        if not found:
            return None, 0
        best = max((own.holders[kv_id] for kv_id in found), key=lambda h: common(h, token_ids))
        return best, common(best, token_ids)

    def use(self, holder: Holder) -> None:
        """Make a holder the last used one."""
        self._all[holder.kv_id] = self._all.pop(holder.kv_id)

    def forget(self, kv_id: int) -> None:
        """Remove a holder, if there is one."""
        holder = self._all.pop(kv_id, None)
        if holder is None:
            return
        scope = self._scopes[holder.scope]
        del scope.holders[kv_id]
        for each in _hashes(holder.token_ids):
            kv_ids = scope.by_hash.get(each, {})
            kv_ids.pop(kv_id, None)
            if not kv_ids:
                scope.by_hash.pop(each, None)
        if not scope.holders:
            del self._scopes[holder.scope]

    def idle(self, scope: Hashable | None = None) -> list[Holder]:
        """The holders that no sequence uses, of one scope or of all; the last used one is last."""
        return [h for h in self._all.values() if h.idle and (scope is None or h.scope == scope)]

    def next_to_evict(self, tenant: str, spared: Holder | None) -> Holder | None:
        """The idle holder to free when a tenant needs memory: its own that was used least recently.

        If it has none, it is that of the tenant with the most idle tokens.
        """
        sizes: dict[str, int] = {}
        oldest: dict[str, Holder] = {}
        for holder in self._all.values():
            if holder.idle and holder is not spared:
                oldest.setdefault(holder.tenant, holder)
                sizes[holder.tenant] = sizes.get(holder.tenant, 0) + len(holder.token_ids)
        if tenant in oldest:
            return oldest[tenant]
        return oldest[max(sizes, key=sizes.__getitem__)] if sizes else None


def common(holder: Holder, token_ids: Sequence[int]) -> int:
    """The number of leading tokens that a holder has in common with a prompt."""
    pairs = zip(holder.token_ids, token_ids, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _hashes(token_ids: Sequence[int]) -> Iterator[int]:
    """A hash of each prefix that is a whole number of blocks."""
    previous = 0
    for end in range(PREFIX_BLOCK, len(token_ids) + 1, PREFIX_BLOCK):
        previous = hash((previous, *token_ids[end - PREFIX_BLOCK : end]))
        yield previous
