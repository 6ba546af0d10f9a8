"""An exception at any moment (Ctrl-C) leaves a pad in stock or gone: never both, never twice."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
from crypto_helpers import DIRECT, KINDS, Kind, NumberingProvider

from every_opcode import at_every_opcode
from tsqp.errors import TSQPError
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto import pad_pool as pool_module
from tsqp.tee.crypto import pads as pads_module
from tsqp.tee.crypto import stock as stock_module
from tsqp.tee.crypto.pad_pool import PadPool
from tsqp.tee.crypto.pads import Pads
from tsqp.tee.crypto.stock import Stock

ROWS = 8
GROUP = LinearGroup(0, "qkv", 3, 2)
SHAPE = GROUP.shape
FIRST = 1000  # not what fresh memory is likely to hold


class Numbered(NumberingProvider):
    """Of one group; fresh memory is not likely to hold its numbers."""

    def __init__(self, kind: Kind = DIRECT) -> None:
        super().__init__(kind, {GROUP: SHAPE}, first=FIRST)


def numbers_of(pads: Pads | None, kind: Kind = DIRECT) -> list[int]:
    """The numbers of rows that were given out, each of which must be whole."""
    if pads is None:
        return []
    r_ND, u_NF = kind.numbers(pads.r_ND, SHAPE[1]), kind.numbers(pads.u_NF, SHAPE[0])
    numbers = [r_D[0] for r_D in r_ND]
    for number, r_D, u_F in zip(numbers, r_ND, u_NF, strict=True):
        assert set(r_D) == set(u_F) == {number}
    return numbers


def fill(stock: Stock, provider: Numbered, rows: int) -> bool:
    return stock.fill(rows, partial(provider.make, GROUP))


def assert_each_once(given: list[int], provider: Numbered) -> None:
    assert len(set(given)) == len(given)
    assert all(FIRST <= number < provider.next for number in given)


def test_a_stock_gives_its_rows_in_order_and_takes_new_ones_in_their_place() -> None:
    stock, provider = Stock(range(ROWS), *SHAPE), Numbered()
    given = []
    for put, take in ((6, 2), (4, 3), (3, 5), (8, 8)):
        assert fill(stock, provider, min(put, stock.room))
        given += numbers_of(stock.take(take))
    assert given == list(range(FIRST, FIRST + len(given)))
    assert (stock.ready, stock.room) == (0, ROWS)


def test_a_stock_without_room_for_all_rows_takes_none_and_overwrites_none() -> None:
    stock, provider = Stock(range(ROWS), *SHAPE), Numbered()
    assert [fill(stock, provider, 5) for _ in range(3)] == [True, False, False]
    assert stock.room == 3
    assert numbers_of(stock.take(100)) == list(range(FIRST, FIRST + 5))
    assert stock.take(100) is None


def test_rows_that_could_not_be_made_are_wiped_and_their_room_is_free_again() -> None:
    def failing(pads: Pads, place: list[int]) -> None:
        pads.r_ND[place] = 7
        raise MemoryError

    stock = Stock(range(ROWS), *SHAPE)
    with pytest.raises(MemoryError):
        stock.fill(3, failing)
    assert (stock.ready, stock.room) == (0, ROWS)
    assert (stock._pads.r_ND[:3] == -1).all()


def test_an_exception_at_any_opcode_repeats_no_row_and_gives_none_that_was_not_filled() -> None:
    interrupted = 0
    for take_first in (1, 3):  # what follows lies in one piece, and around the end
        stock, provider, given = Stock(range(ROWS), *SHAPE), Numbered(), list[int]()

        def run(take_first: int = take_first) -> None:
            nonlocal stock, provider, given
            stock, provider, given = Stock(range(ROWS), *SHAPE), Numbered(), []
            fill(stock, provider, 6)
            given += numbers_of(stock.take(take_first))
            fill(stock, provider, min(4, stock.room))
            given += numbers_of(stock.take(3))
            given += numbers_of(stock.take(ROWS))

        for _ in at_every_opcode(run, stock_module, pads_module):
            interrupted += 1
            given += numbers_of(stock.take(ROWS))
            for _ in range(3):  # every place is used again
                fill(stock, provider, stock.room)
                given += numbers_of(stock.take(ROWS))
            assert_each_once(given, provider)
            assert stock.ready == 0
            assert 0 <= stock.room <= ROWS
        assert given == list(range(FIRST, FIRST + 6 + min(4, 2 + take_first)))
    assert interrupted > 500


@KINDS
def test_a_row_that_was_given_out_is_wiped_and_would_be_noticed_if_it_came_again(
    kind: Kind,
) -> None:
    stock = Stock(range(ROWS), *SHAPE, kind.field)
    fill(stock, Numbered(kind), 4)
    taken = stock.take(3)
    assert taken is not None
    for array in (stock._pads.r_ND, stock._pads.u_NF):
        assert (np.ascontiguousarray(array[..., :3, :]).view(np.uint8) == 0xFF).all()
    assert numbers_of(taken, kind) == [FIRST, FIRST + 1, FIRST + 2]
    stock._ready.appendleft(1)  # a fault of ours
    with pytest.raises(AssertionError, match="given out twice"):
        stock.take(1)


def pool_of(provider: Numbered, kind: Kind) -> PadPool:
    return PadPool(provider, {GROUP: SHAPE}, ROWS * kind.bytes_of(*SHAPE))


@pytest.fixture
def provider(kind: Kind) -> Numbered:
    return Numbered(kind)


@pytest.fixture
def pool(provider: Numbered, kind: Kind) -> Iterator[PadPool]:
    pool = pool_of(provider, kind)
    yield pool
    pool.close()


@KINDS
@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_an_exception_at_any_opcode_of_a_pool_repeats_no_pad_and_leaves_it_usable(
    step: int, kind: Kind, pool: PadPool, provider: Numbered
) -> None:
    given: list[int] = []

    def run() -> None:
        pool.fill()
        for rows in (1, 2, ROWS):  # the last of them partly made in line
            given.extend(numbers_of(pool.take(GROUP, rows), kind))

    opcodes = list(at_every_opcode(run, pool_module, pads_module, stock_module, step=step))
    assert len(opcodes) > 300 // step
    assert_each_once(given, provider)
    pool.close()  # nothing that it waits for is held by a call that was broken off
    assert not pool._thread.is_alive()
    with pytest.raises(TSQPError, match="are gone"):
        pool.take(GROUP, 1)


@KINDS
def test_a_close_that_was_broken_off_anywhere_can_be_done_again(kind: Kind) -> None:
    pools: list[PadPool] = []

    def run() -> None:
        pools.append(pool_of(Numbered(kind), kind))
        pools[-1].fill()
        pools[-1].take(GROUP, ROWS)
        pools[-1].close()

    assert len(list(at_every_opcode(run, pool_module, step=7))) > 20
    for pool in pools:
        pool.close()
        assert not pool._thread.is_alive()
        assert pool.nbytes == 0
