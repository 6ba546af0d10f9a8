"""Hints of lattice masks that a worker makes [P10]: products of public rows, to be checked.

Shape suffixes: N roots, which are the rows of a call; D input and F output features.
"""

import time
from collections import deque

import numpy as np
import torch

from tsqp.algebra import residue_bytes
from tsqp.algebra.hints import Polynomials
from tsqp.algebra.params import DEGREE, LATTICE
from tsqp.model.linear_group import LinearGroup
from tsqp.wire.call_limit import residue_rows_within
from tsqp.wire.channel import Channel
from tsqp.wire.messages import Product, place_of
from tsqp.wire.tensors import Spec

ROWS = 256  # of one call
CALLS_IN_FLIGHT = 2  # the worker multiplies while the TEE copies


def ask_for_hints(
    channel: Channel, group: LinearGroup, public: Polynomials, timeout: float
) -> Polynomials:
    """Ask a worker for the hints of a group; they are not checked yet.

    Args:
        public: a_d for at least D features.
        timeout: seconds that the worker may take for one call.

    Raises:
        WorkerError: the worker failed, vanished, or sent no valid answer.
    """
    features, width = group.shape
    row_bytes = LATTICE.residue_bytes * (features + width)
    by_work = residue_rows_within(channel.welcome.max_call_macs, features, width)
    step = max(1, min(ROWS, by_work, channel.max_call_bytes // row_bytes))
    hints = Polynomials.empty(DEGREE, features)
    out: deque[tuple[int, int, int]] = deque()  # first root, roots and ticket of a call
    try:
        for first in range(0, DEGREE, step):
            if len(out) == CALLS_IN_FLIGHT:
                _receive(channel, out, hints, timeout)
            roots = min(step, DEGREE - first)
            out.append((first, roots, _send(channel, group, public, first, roots)))
        while out:
            _receive(channel, out, hints, timeout)
    except BaseException:
        for _, _, ticket in out:
            channel.cancel(ticket)
        raise
    return hints


def _send(channel: Channel, group: LinearGroup, public: Polynomials, first: int, roots: int) -> int:
    features, width = group.shape
    slot = channel.reserve(
        Product(*place_of(group), LATTICE.name),
        [Spec((roots, LATTICE.residue_bytes * width), torch.uint8)],
        [Spec((roots, LATTICE.residue_bytes * features), torch.uint8)],
    )
    try:
        a_ND = public.at(slice(first, first + roots))[:, :width]
        residue_bytes.pack(a_ND, LATTICE, slot.inputs[0].numpy())
    except BaseException:
        channel.discard(slot)
        raise
    return channel.submit(slot)


def _receive(
    channel: Channel, out: deque[tuple[int, int, int]], hints: Polynomials, timeout: float
) -> None:
    first, roots, ticket = out[0]
    h_NF = np.empty((roots, hints.count), np.int64)
    with channel.wait(ticket, time.monotonic() + timeout) as reply:
        out.popleft()
        residue_bytes.unpack(reply.outputs[0].numpy(), LATTICE, h_NF)
    hints.put(first, h_NF)
