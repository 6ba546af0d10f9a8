"""The check of an answer by itself, bit by bit and at length, without a process."""

import itertools
import threading
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from lies import MODEL, flip
from protocol_helpers import DEADLINE_S
from torch import Tensor

from tsqp.algebra import residue_bytes
from tsqp.algebra.int8_product import residue_product
from tsqp.algebra.params import FIELDS, LATTICE, Field
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.integer_cache import load_integers
from tsqp.checkpoint.quantize import IntegerWeights
from tsqp.errors import IntegrityError
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto.pad_providers import DirectProvider, PadProvider
from tsqp.tee.crypto.pads import Pads
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.offload.lattice_load import LatticeLoad
from tsqp.tee.offload.masked import Group, MaskedGroup
from tsqp.wire.messages import place_of


class Checked:
    """One group with an honest answer, to be corrupted."""

    def __init__(self, linear: LinearGroup, weights: IntegerWeights, field: Field) -> None:
        self.field = field
        self.pool = RowPool(1)
        self.group: Group[Any]
        self._weight_FD = weights.weight_FD
        if field is LATTICE:
            load = LatticeLoad({linear: linear.shape}, {})
            load.add(linear, weights)
            self.group = load.groups[0][0][linear]
            self._provider: PadProvider = load.provider(0)
        else:
            self.group = MaskedGroup(linear, weights, None, field)
            self._provider = DirectProvider({linear: weights.weight_FD}, field)
        self._made, self._taken = Pads.empty(0, 1, 1, field), 0
        self.refresh()

    def _make(self) -> None:
        linear = self.group.linear
        rows = self._provider.rows_made(linear, 1)
        self._made = Pads.empty(rows, self.group.width, self.group.features, self.field)
        self._provider.make(linear, self._made, list(range(rows)))
        self._taken = 0

    def refresh(self, x_1D: Tensor | None = None, pads: Pads | None = None) -> None:
        """Another input, another pad, and the right answer."""
        group, each = self.group, self.field.residue_bytes
        x_1D = torch.randn(1, group.width) if x_1D is None else x_1D
        if pads is None:
            if self._taken == len(self._made):
                self._make()
            pads = self._made.copy([self._taken])
            self._taken += 1
        c_1B = torch.empty(1, each * group.width, dtype=torch.uint8)
        self.masked = group.mask(x_1D, pads.r_ND, c_1B, self.pool)
        self.u_1F = pads.u_NF
        c_1D = torch.from_numpy(np.empty((1, group.width), self.field.dtype))
        residue_bytes.unpack(c_1B.numpy(), self.field, c_1D.numpy())
        z_1F = torch.empty(1, group.features, dtype=c_1D.dtype)
        residue_product(c_1D, self._weight_FD, self.field, z_1F)
        self.z_1B = torch.empty(1, each * group.features, dtype=torch.uint8)
        residue_bytes.pack(z_1F.numpy(), self.field, self.z_1B.numpy())

    def product(self) -> Tensor:
        y_1F = torch.empty(1, self.group.features)
        self.group.check_and_unmask(self.z_1B, self.u_1F, self.masked, y_1F, "It", self.pool)
        return y_1F

    def is_refused(self) -> bool:
        try:
            self.product()
        except IntegrityError:
            return True
        return False

    @property
    def bits(self) -> int:
        return 8 * self.z_1B.numel()


@cache
def integer_weights() -> dict[LinearGroup, IntegerWeights]:
    checkpoint = open_checkpoint(MODEL)
    weights: dict[LinearGroup, IntegerWeights] = {}
    load_integers(checkpoint, weights.__setitem__)
    checkpoint.close()
    return weights


def a_group() -> tuple[LinearGroup, IntegerWeights]:
    return next(item for item in integer_weights().items() if place_of(item[0]) == (0, "o"))


def missed(checked: Checked, bits: Sequence[int]) -> int:
    """How many of these flips, one at a time, are not noticed."""
    count = 0
    for bit in bits:
        flip(checked.z_1B, bit)
        count += not checked.is_refused()
        flip(checked.z_1B, bit)
    assert not checked.is_refused()  # the answer is right again
    return count


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_every_single_bit_of_an_answer_matters(field: Field) -> None:
    checked = Checked(*a_group(), field)
    assert missed(checked, range(checked.bits)) == 0


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_p_in_the_place_of_zero_is_refused(field: Field) -> None:
    checked = Checked(*a_group(), field)
    width, features = checked.group.width, checked.group.features
    zero = Pads.empty(1, width, features, field)
    zero.r_ND[:] = zero.u_NF[:] = 0
    checked.refresh(torch.zeros(1, width), zero)  # so that the answer is zero, too
    assert not checked.is_refused()
    z_1F = np.zeros((1, features), field.dtype)
    z_1F[0, 1] = field.p
    residue_bytes.pack(z_1F, field, checked.z_1B.numpy())
    assert checked.is_refused()


def missed_at_random(field: Field, flips: int) -> int:
    """Random bits of answers of all groups, each with inputs and pads of its own."""
    random = np.random.default_rng(0)
    count, each = 0, 50
    groups = [Checked(*item, field) for item in integer_weights().items()]
    for checked in itertools.islice(itertools.cycle(groups), flips // each):
        checked.refresh()
        count += missed(checked, random.integers(checked.bits, size=each).tolist())
    return count


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_none_of_a_thousand_flipped_bits_is_missed(field: Field) -> None:
    assert missed_at_random(field, 1000) == 0


@pytest.mark.slow
@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_none_of_a_hundred_thousand_flipped_bits_is_missed(field: Field) -> None:
    assert missed_at_random(field, 100_000) == 0


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_what_is_checked_is_what_is_used_while_memory_changes(field: Field) -> None:
    # So many that reading them takes longer than changing one; lattice has slower loops, and hints.
    features = 25_000 if field is LATTICE else 400_000
    weight_FD = torch.randint(-127, 128, (features, 4), dtype=torch.int8)
    checked = Checked(
        LinearGroup(0, "o", features, 4), IntegerWeights(weight_FD, torch.ones(features)), field
    )
    right_1F = checked.product()
    stop = threading.Event()
    thread = threading.Thread(target=keep_changing, args=(checked.z_1B, stop))
    thread.start()
    refused = taken = 0
    end = time.monotonic() + DEADLINE_S
    try:
        while min(refused, taken) < 6 and time.monotonic() < end:
            try:
                y_1F = checked.product()
            except IntegrityError:
                refused += 1
            else:
                taken += 1
                assert torch.equal(y_1F, right_1F)
    finally:
        stop.set()
        thread.join()
    assert min(refused, taken) > 0


def keep_changing(z_1B: Tensor, stop: threading.Event) -> None:
    while not stop.is_set():
        flip(z_1B, 4 * z_1B.numel() + 29)  # in the middle, and not lost in rounding
        time.sleep(0)  # lets the other thread have the interpreter
