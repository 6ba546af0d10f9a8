"""Pads are overwritten once they were used: a row of u of a lattice mask gives its secret away."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tsqp import LLM, SamplingParams
from tsqp.errors import IntegrityError
from tsqp.gpu.worker import Worker
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto.pad_pool import PadPool
from tsqp.tee.crypto.pads import Pads
from tsqp.tee.crypto.stock import Stock
from tsqp.tee.offload.lattice_group import LatticeGroup
from tsqp.tee.offload.masked import MaskedGroup
from tsqp.tee.offload.pad import PadLinear
from tsqp.wire.channel import InprocChannel

MODEL = "random:tiny"
FEW = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
FIELD = pytest.mark.parametrize("field", ["wide", "lattice"])


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Pads]:
    """All pads that were given out, kept alive."""
    take, taken = PadPool.take, []

    def noting(pool: PadPool, key: LinearGroup, rows: int) -> Pads:
        pads = take(pool, key, rows)
        assert not pads.any_used
        taken.append(pads)
        return pads

    monkeypatch.setattr(PadPool, "take", noting)
    return taken


def is_wiped(pads: Pads) -> bool:
    return all((~part == 0).all() for part in (pads.r_ND, pads.u_NF))


def generate(field: str) -> None:
    with LLM(MODEL, privacy="pad", worker="inproc", field=field, pad_memory=0) as llm:
        llm.generate([[1, 2, 3]], FEW)


@FIELD
def test_pads_are_overwritten_after_their_answer(field: str, taken: list[Pads]) -> None:
    generate(field)
    assert len(taken) == 4 * 9
    assert all(map(is_wiped, taken))


@FIELD
def test_pads_of_a_wrong_answer_are_overwritten(
    field: str, taken: list[Pads], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lie(worker: Worker, operation: Any, inputs: Any, outputs: Any) -> None:
        outputs[0].zero_()
        outputs[0].view(-1)[0] = 1

    monkeypatch.setattr(Worker, "run", lie)
    with pytest.raises(IntegrityError):
        generate(field)
    assert taken
    assert all(map(is_wiped, taken))


@FIELD
@pytest.mark.parametrize("where", ["mask", "submit", "receive"])
def test_pads_of_a_call_that_is_broken_off_are_overwritten(
    where: str, field: str, taken: list[Pads], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    places = {
        "mask": (LatticeGroup if field == "lattice" else MaskedGroup, "mask"),
        "submit": (InprocChannel, "submit"),
        "receive": (PadLinear, "receive"),
    }
    monkeypatch.setattr(*places[where], interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(field)
    assert taken
    assert all(map(is_wiped, taken))


@FIELD
def test_a_stock_is_overwritten_when_its_session_ends(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stocks: list[Stock] = []
    begin = Stock.__init__

    def noting(stock: Stock, *arguments: Any) -> None:
        begin(stock, *arguments)
        stocks.append(stock)

    monkeypatch.setattr(Stock, "__init__", noting)
    with LLM(MODEL, privacy="pad", worker="inproc", field=field, pad_memory=2**22) as llm:
        llm.fill_pads()
        llm.generate([[1, 2, 3]], FEW)
        assert all(stock.ready for stock in stocks)
    assert len(stocks) == 9
    for stock in stocks:
        for part in (stock._pads.r_ND, stock._pads.u_NF):
            assert ((part == 0) | (~part == 0)).all()  # never used, or overwritten


def test_rows_that_are_finished_after_the_end_are_overwritten() -> None:
    stock = Stock(range(8), 3, 5)

    def make(pads: Pads, place: list[int]) -> None:
        pads.put(place, Pads(np.ones((8, 5), np.int32), np.ones((8, 3), np.int32)))
        stock.end()

    assert stock.fill(8, make)
    assert stock.ready == 0
    assert is_wiped(stock._pads)


def test_pads_discarded_from_a_stock_are_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    take: Callable[[Stock, int], Pads | None] = Stock.take
    taken: list[Pads] = []

    def noting(stock: Stock, rows: int) -> Pads | None:
        pads = take(stock, rows)
        taken.extend([] if pads is None else [pads])
        return pads

    with LLM(MODEL, privacy="pad", worker="inproc", pad_memory=2**20) as llm:
        llm.fill_pads()
        monkeypatch.setattr(Stock, "take", noting)
        assert llm._pads is not None
        llm._pads.discard()
    assert taken
    assert all(map(is_wiped, taken))
