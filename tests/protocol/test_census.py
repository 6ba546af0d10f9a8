"""What workers receive over many calls, counted: no pad, no share and no seed comes twice.

Every input is zero here, so what crosses is the pad itself, or the share.
"""

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from small_sessions import (
    DOWN,
    HEAD,
    QKV,
    SHAPES,
    ask,
    hello,
    pad_linear,
    shares_linear,
    small_worker,
)
from torch import Tensor

from tsqp.algebra.params import DIRECT_FIELDS, FIELDS, Field
from tsqp.errors import IntegrityError, NumericalError
from tsqp.gpu.worker import Worker
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto.freivalds import MAX_FAILURES, FailureLimit
from tsqp.tee.offload.masked import BLOCK_ROWS
from tsqp.tee.offload.offload import Linear
from tsqp.wire.channel import InprocChannel
from tsqp.wire.messages import Operation, SeedProduct

EVERY = pytest.mark.parametrize("field", FIELDS.values(), ids=list(FIELDS))
DIRECT = pytest.mark.parametrize("field", DIRECT_FIELDS, ids=lambda field: field.name)


class Received:
    """Notes the rows and seeds that in-process workers receive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: dict[int, list[np.ndarray]] = {
            width: [] for width in {group.width for group in SHAPES}
        }
        self.seeds: list[bytes] = []
        run = Worker.run

        def noting(
            worker: Worker, operation: Operation, inputs: Sequence[Tensor], outputs: Any
        ) -> None:
            if isinstance(operation, SeedProduct):
                self.seeds.append(operation.seed)
            else:
                [c_TD] = worker.received(operation, inputs)
                self.rows[c_TD.shape[1]].append(c_TD.numpy())
            run(worker, operation, inputs, outputs)  # type: ignore[arg-type]

        monkeypatch.setattr(Worker, "run", noting)

    def assert_nothing_comes_twice(self, field: Field) -> int:
        """How many rows there were."""
        rows = 0
        for received in self.rows.values():
            c_ND = np.concatenate(received)
            assert len({row.tobytes() for row in c_ND}) == len(c_ND)
            expected = c_ND.size**2 / 2 / field.p  # values that chance gives again
            assert c_ND.size - len(np.unique(c_ND)) < expected + 10 * expected**0.5 + 20
            rows += len(c_ND)
        assert len(set(self.seeds)) == len(self.seeds)
        # Nor is a part of a seed made of another, or of the same one.
        words = np.frombuffer(b"".join(self.seeds), "<u8")
        assert len(np.unique(words)) == words.size
        return rows


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> Received:
    return Received(monkeypatch)


def zeros(group: LinearGroup, rows: int) -> Tensor:
    return torch.zeros(rows, group.width)


@EVERY
def test_no_row_of_thousands_of_calls_comes_twice(field: Field, received: Received) -> None:
    calls = 0
    with closing(pad_linear(InprocChannel(small_worker(), hello()), field)) as linear:
        for _ in range(800):
            for key in (QKV, DOWN, HEAD):
                ask(linear, key, zeros(key, 1))
                calls += 1
        for rows in (2, 17, 128, 129, 400) * 4:
            ask(linear, DOWN, zeros(DOWN, rows))
    assert calls > 2000
    assert received.assert_nothing_comes_twice(field) == calls + 4 * 676


@EVERY
def test_calls_that_fail_or_are_given_up_use_their_pads_up(
    field: Field, received: Received
) -> None:
    bad_TD = zeros(QKV, 300)
    bad_TD[299, 3] = float("nan")  # when two blocks are out
    channel = InprocChannel(small_worker(), hello())
    with closing(pad_linear(channel, field, stock_rows=200)) as linear:
        for _ in range(20):
            with pytest.raises(NumericalError):
                ask(linear, QKV, bad_TD)
            linear.start(Linear(QKV, zeros(QKV, 300))).cancel()
            ask(linear, QKV, zeros(QKV, 3))
    received.rows = {QKV.width: received.rows[QKV.width]}
    assert received.assert_nothing_comes_twice(field) == 20 * (256 + 256 + 3)


@EVERY
def test_a_session_after_a_lie_shares_no_pad_with_the_one_before(
    field: Field, received: Received, monkeypatch: pytest.MonkeyPatch
) -> None:
    noting, failures = Worker.run, FailureLimit()

    def lie(worker: Worker, operation: Operation, inputs: Any, outputs: Sequence[Tensor]) -> None:
        noting(worker, operation, inputs, outputs)  # type: ignore[arg-type]
        outputs[0][-1, -1] ^= 1

    monkeypatch.setattr(Worker, "run", lie)
    for number in range(MAX_FAILURES + 1):
        says = "wrong product" if number < MAX_FAILURES else "nothing is offloaded any more"
        channel = InprocChannel(small_worker(), hello())
        with (
            closing(pad_linear(channel, field, failures=failures)) as linear,
            pytest.raises(IntegrityError, match=says),
        ):
            ask(linear, QKV, zeros(QKV, 300))
    received.rows = {QKV.width: received.rows[QKV.width]}
    assert received.assert_nothing_comes_twice(field) == MAX_FAILURES * 256


@DIRECT
def test_every_block_of_every_request_has_a_seed_of_its_own_for_every_worker(
    field: Field, received: Received
) -> None:
    channels = [InprocChannel(small_worker(), hello()) for _ in range(3)]
    blocks = rows = 0
    with closing(shares_linear(channels, field)) as linear:
        for number in range(80):
            for key in (QKV, DOWN, HEAD):
                asked = (1, 1, 1, 1, 2, 127, 128, 129, 300, 513)[number % 10]
                ask(linear, key, zeros(key, asked))
                blocks += -(-asked // BLOCK_ROWS)
                rows += asked
    assert len(received.seeds) == 2 * blocks > 500
    assert all(len(seed) == 32 for seed in received.seeds)
    assert received.assert_nothing_comes_twice(field) == rows
