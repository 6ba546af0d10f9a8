"""A pad is given out once, whatever happens around it."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from crypto_helpers import (
    DIRECT,
    IN_CLASSES,
    KINDS,
    Kind,
    NumberingProvider,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqp.algebra.params import LATTICE, Field
from tsqp.errors import TSQPError
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto.pad_pool import PadPool
from tsqp.tee.crypto.pads import Pads
from tsqp.tee.crypto.stock import Stock

QKV, HEAD = LinearGroup(0, "qkv", 3, 2), LinearGroup(None, "lm_head", 5, 2)
SHAPES = {QKV: QKV.shape, HEAD: HEAD.shape}
RESIDUES = 5 + 7  # of a row of both


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether `condition` became true within ten seconds."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


@pytest.fixture(params=[DIRECT, IN_CLASSES], ids=["direct", "lattice"])
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


def row_bytes(kind: Kind) -> int:
    """Of a row of each group."""
    return sum(kind.bytes_of(*shape) for shape in SHAPES.values())


def pool_of(kind: Kind, rows: int, **options: int) -> PadPool:
    provider = NumberingProvider(kind, SHAPES, **options)
    return PadPool(provider, SHAPES, rows * row_bytes(kind))


@pytest.fixture
def pool(kind: Kind) -> Iterator[PadPool]:
    made = pool_of(kind, 100)
    yield made
    made.close()


@KINDS
@settings(max_examples=15)
@given(
    takes=st.lists(st.tuples(st.sampled_from(list(SHAPES)), st.integers(1, 90)), max_size=80),
    memory_rows=st.integers(0, 150),
)
def test_no_pad_is_given_out_twice_to_any_of_many_threads(
    kind: Kind, takes: list[tuple[LinearGroup, int]], memory_rows: int
) -> None:
    pool = pool_of(kind, memory_rows)
    try:
        with ThreadPoolExecutor(8) as threads:
            taken = list(threads.map(lambda take: pool.take(*take), takes))
    finally:
        pool.close()
    numbers = [row[0] for pads in taken for row in kind.numbers(pads.r_ND, 1)]
    assert len(numbers) == len(set(numbers)) == sum(rows for _, rows in takes)
    for (key, rows), pads in zip(takes, taken, strict=True):
        features, width = SHAPES[key]
        r_ND, u_NF = kind.numbers(pads.r_ND, width), kind.numbers(pads.u_NF, features)
        assert len(r_ND) == rows
        # r and u of one row stay together
        assert [set(row) for row in r_ND] == [set(row) for row in u_NF] == [{r[0]} for r in r_ND]


def test_a_provider_that_fails_loses_pads_and_repeats_none(kind: Kind) -> None:
    pool = pool_of(kind, 0, fails_every=3)
    numbers: list[int] = []
    failures = 0
    for _ in range(60):
        try:
            numbers += [row[0] for row in kind.numbers(pool.take(QKV, 4).r_ND, 1)]
        except MemoryError:
            failures += 1
    pool.close()
    assert failures == 20
    assert len(numbers) == len(set(numbers)) == 160


def test_a_stock_that_could_not_be_refilled_is_refilled_later(
    kind: Kind, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tsqp.tee.crypto.pad_pool.RETRY_S", 0.001)
    pool = pool_of(kind, 100, fails_every=2)
    full = 100 * row_bytes(kind)
    assert eventually(lambda: pool.nbytes == full)  # whole batches of each
    pool.close()
    assert "cannot make pads ahead (MemoryError)" in caplog.text


def test_pads_never_take_more_than_their_memory_over_many_tokens(kind: Kind) -> None:
    pool, most = pool_of(kind, 100), 0
    arrays = sum(stock._pads.nbytes for stock in pool._stocks.values())
    for token in range(10_000):
        pool.fill()
        most = max(most, pool.nbytes)
        pool.take(QKV if token % 3 else HEAD, 1)
    assert 90 * row_bytes(kind) < most <= arrays == 100 * row_bytes(kind)
    assert arrays == sum(stock._pads.nbytes for stock in pool._stocks.values())
    assert pool.stats.ahead_rows == 10_000
    pool.close()


def test_the_stock_fills_its_memory_to_the_last_row(kind: Kind, pool: PadPool) -> None:
    pool.fill()
    assert pool.nbytes == 100 * row_bytes(kind)
    pool.take(QKV, 100)
    pool.take(HEAD, 100)
    assert (pool.stats.ahead_rows, pool.stats.inline_rows) == (200, 0)


def test_a_stock_that_was_used_is_refilled_while_nobody_asks_and_in_whole_batches(
    kind: Kind, pool: PadPool
) -> None:
    full, few = 100 * row_bytes(kind), 24 if kind is DIRECT else kind.unit - 1
    pool.fill()
    for _ in range(few):
        pool.take(HEAD, 1)
    time.sleep(0.05)
    assert pool.nbytes == full - few * kind.bytes_of(
        *SHAPES[HEAD]
    )  # a batch of one row costs like several
    for _ in range(100 - few):
        pool.take(HEAD, 1)
    assert eventually(lambda: pool.nbytes == full)


def test_a_full_stock_is_taken_from_before_anything_is_made_in_line(pool: PadPool) -> None:
    pool.fill()
    pool.take(QKV, 60)
    assert (pool.stats.ahead_rows, pool.stats.inline_rows) == (60, 0)


def test_no_memory_means_every_pad_is_made_in_line(kind: Kind) -> None:
    pool = PadPool(NumberingProvider(kind, SHAPES), SHAPES, row_bytes(kind) - 1)
    pool.fill()
    pool.take(QKV, 7)
    assert (pool.stats.ahead_rows, pool.stats.inline_rows) == (0, 7)
    time.sleep(0.02)
    pool.fill()
    rest = -7 % kind.unit  # came with them
    assert pool.nbytes == rest * kind.bytes_of(*SHAPES[QKV])
    pool.take(QKV, 1)
    assert (pool.stats.ahead_rows, pool.stats.inline_rows) == (min(rest, 1), 8 - min(rest, 1))
    pool.close()


class SlowProvider(NumberingProvider):
    """A fake for tests: takes a moment."""

    TAKES_S = 0.02

    def make(self, key: tuple[int, str], pads: Pads, place: list[int]) -> None:
        time.sleep(self.TAKES_S)
        super().make(key, pads, place)


def test_the_time_of_pads_made_in_line_is_told_and_that_of_others_is_not(kind: Kind) -> None:
    pool = PadPool(SlowProvider(kind, SHAPES), SHAPES, 100 * row_bytes(kind))
    pool.fill()
    pool.take(QKV, 100)
    assert (pool.stats.ahead_rows, pool.stats.inline_rows, pool.stats.inline_s) == (100, 0, 0.0)
    pool.close()
    pool = PadPool(SlowProvider(kind, SHAPES), SHAPES, 0)
    for _ in range(3):
        pool.take(QKV, 4)
    assert (pool.stats.ahead_rows, pool.stats.inline_rows) == (0, 12)
    assert pool.stats.inline_s >= 3 * SlowProvider.TAKES_S
    pool.close()


def test_what_is_made_in_line_beyond_the_rows_asked_for_goes_into_the_stock() -> None:
    provider = NumberingProvider(Kind(LATTICE, 32), SHAPES)
    pool = PadPool(provider, SHAPES, 32 * row_bytes(IN_CLASSES))
    pool.close()
    first = provider.next
    pool._closed, pool._stocks = False, {QKV: Stock(range(32), *SHAPES[QKV], LATTICE)}
    taken = [pool.take(QKV, rows) for rows in (5, 20, 10)]  # no thread makes any meanwhile
    numbers = [row[0] for pads in taken for row in IN_CLASSES.numbers(pads.r_ND, 1)]
    assert numbers == list(range(first, first + 35))
    assert provider.next == first + 64
    assert (pool.stats.ahead_rows, pool.stats.inline_rows) == (20 + 7, 5 + 3)


def test_a_closed_pool_gives_nothing(pool: PadPool) -> None:
    pool.fill()
    pool.close()
    assert isinstance(pool._provider, NumberingProvider)
    assert pool._provider.forgotten == 1  # what others would have been made from
    assert pool.nbytes == 0
    with pytest.raises(TSQPError, match="are gone"):
        pool.take(QKV, 1)


@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
def test_a_forked_process_has_none_of_its_parents_pads(pool: PadPool) -> None:
    pool.fill()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            left = len(pool._stocks)
            pool.take(QKV, 1)
            os.write(writer, b"it got one")
        except TSQPError as exc:
            os.write(writer, f"{left} left. {exc}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    assert os.read(reader, 200).startswith(b"0 left. A forked process cannot use")
    assert len(pool.take(QKV, 1)) == 1


def test_what_is_copied_for_a_caller_is_wiped_where_it_was(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Pads] = []
    empty = Pads.empty

    def noting(rows: int, width: int, features: int, field: Field) -> Pads:
        made.append(empty(rows, width, features, field))
        return made[-1]

    pool = PadPool(NumberingProvider(kind, SHAPES), SHAPES, 0)
    monkeypatch.setattr(Pads, "empty", noting)
    monkeypatch.setattr(Stock, "fill", lambda *_: False)  # no room: each call has its own memory
    taken = pool.take(QKV, 2 * kind.unit - 1)
    pool.close()
    rows = [row[0] for row in kind.numbers(taken.r_ND, 1)]
    assert len(set(rows)) == 2 * kind.unit - 1
    for pads in made:
        left = pads is not taken  # all of it was copied, or nothing
        assert bool((pads.r_ND == pads._used).all()) == left


def test_a_pool_that_is_held_makes_pads_only_when_it_is_asked_to(kind: Kind, pool: PadPool) -> None:
    pool.hold()
    pool.fill()
    made = pool.stats.made_rows
    pool.take(QKV, 90).wipe()
    assert eventually(pool._wake.empty)  # the thread has seen it
    time.sleep(0.02)
    assert pool.stats.made_rows == made
    pool.fill()
    assert pool.stats.made_rows > made
