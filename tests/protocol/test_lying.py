"""Workers in this process that lie, in both private modes: what follows, without any model."""

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import pytest
import torch
from small_sessions import QKV, ask, hello, pad_linear, shares_linear, small_worker
from torch import Tensor

from tsqp.algebra.params import FIELDS
from tsqp.errors import IntegrityError, WorkerError
from tsqp.gpu.worker import Worker
from tsqp.tee.crypto.freivalds import MAX_FAILURES, FailureLimit
from tsqp.tee.offload.masked import BLOCK_ROWS
from tsqp.tee.offload.offload import Linear
from tsqp.tee.offload.pad import PadLinear
from tsqp.tee.offload.shares import SharesLinear
from tsqp.wire.channel import InprocChannel

BLOCKS = 4
ROWS = BLOCKS * BLOCK_ROWS - 5
Begin = Callable[[FailureLimit], PadLinear[Any] | SharesLinear]


def _pad(failures: FailureLimit) -> PadLinear[Any]:
    channel = InprocChannel(small_worker(), hello())
    return pad_linear(channel, FIELDS["wide"], failures=failures)


def _lattice(failures: FailureLimit) -> PadLinear[Any]:
    channel = InprocChannel(small_worker(), hello())
    return pad_linear(channel, FIELDS["lattice"], failures=failures)


def _shares(failures: FailureLimit) -> SharesLinear:
    channels = [InprocChannel(small_worker(), hello()) for _ in range(2)]
    return shares_linear(channels, FIELDS["compact"], failures=failures)


MODES = pytest.mark.parametrize(
    "begin", [_pad, _lattice, _shares], ids=["pad", "lattice", "shares"]
)


class Liar:
    """Changes one bit of the call whose turn it is; the last worker's only, where there are two."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.turn = -1  # never
        self.calls = 0
        run = Worker.run

        def lie(
            worker: Worker, operation: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
        ) -> None:
            run(worker, operation, inputs, outputs)
            if inputs:  # else it is a worker that got a seed
                if self.calls == self.turn:
                    outputs[0][-1, -1] ^= 1
                self.calls += 1

        monkeypatch.setattr(Worker, "run", lie)


@pytest.fixture
def liar(monkeypatch: pytest.MonkeyPatch) -> Liar:
    return Liar(monkeypatch)


def inputs(rows: int = ROWS) -> Tensor:
    return torch.ones(rows, QKV.width)


@MODES
@pytest.mark.parametrize("block", range(BLOCKS))
def test_a_lie_in_any_block_is_noticed(block: int, begin: Begin, liar: Liar) -> None:
    liar.turn, failures = block, FailureLimit()
    with closing(begin(failures)) as linear:
        with pytest.raises(IntegrityError, match="wrong product for group qkv of layer 0"):
            ask(linear, QKV, inputs())
        assert failures._left == MAX_FAILURES - 1  # one lie, counted once


@MODES
def test_a_lie_ends_the_session_and_forgets_pads_and_vectors(begin: Begin, liar: Liar) -> None:
    with closing(begin(FailureLimit())) as linear:
        ask(linear, QKV, inputs(1))
        liar.turn = liar.calls
        with pytest.raises(IntegrityError, match="wrong product"):
            ask(linear, QKV, inputs(1))
        calls = liar.calls
        with pytest.raises(IntegrityError, match="wrong product"):  # it would be honest again
            ask(linear, QKV, inputs(1))
        assert liar.calls == calls
        assert not linear._groups._groups
        assert not isinstance(linear, PadLinear) or linear._pool.nbytes == 0


@MODES
def test_a_lie_is_remembered_even_if_the_end_of_the_session_is_interrupted(
    begin: Begin, liar: Liar, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    liar.turn, failures = 0, FailureLimit()
    with closing(begin(failures)) as linear:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(type(linear), "close", interrupted)
            ask(linear, QKV, inputs(1))
        with pytest.raises(IntegrityError, match="wrong product for group qkv of layer 0"):
            ask(linear, QKV, inputs(1))
        assert (liar.calls, failures._left) == (1, MAX_FAILURES - 1)


@MODES
def test_an_answer_is_not_used_once_the_limit_is_reached(begin: Begin, liar: Liar) -> None:
    failures = FailureLimit()
    with closing(begin(failures)) as linear:
        pending = linear.start(Linear(QKV, inputs(1)))
        for _ in range(MAX_FAILURES):  # in other sessions, meanwhile
            failures.count()
        with pytest.raises(IntegrityError, match="nothing is offloaded any more"), pending:
            raise AssertionError("somebody was given the answer")
        with pytest.raises(WorkerError, match=r"nothing is offloaded any more|has ended"):
            linear.start(Linear(QKV, inputs(1)))
