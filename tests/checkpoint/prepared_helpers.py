"""Prepared files that are right, damaged, or made by nobody's quantisation."""

import struct
from collections.abc import Callable
from pathlib import Path

import torch

from model_helpers import group_of
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.prepared import write_prepared
from tsqp.checkpoint.quantize import IntegerWeights, quantize_all
from tsqp.checkpoint.weights_digest import WeightsDigest
from tsqp.model.linear_group import LinearGroup


def expected(model: Path) -> dict[LinearGroup, IntegerWeights]:
    return dict(quantize_all(open_checkpoint(str(model))))


def check(found: dict[LinearGroup, IntegerWeights], model: Path) -> None:
    right = expected(model)
    assert list(found) == list(right)
    for key, weights in right.items():
        assert torch.equal(found[key].weight_FD, weights.weight_FD), key
        assert torch.equal(found[key].scale_F, weights.scale_F), key


def header_end(path: Path) -> int:
    return 8 + int(struct.unpack("<Q", path.read_bytes()[:8])[0])


def change_byte(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def change_byte_in_place(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def without_a_largest(weights: IntegerWeights) -> None:
    weights.weight_FD[3].clamp_(-126, 126)


def write_changed(
    model: Path,
    path: Path,
    change: Callable[[IntegerWeights], None],
    place: tuple[int, str] = (1, "down"),
) -> None:
    """A prepared file with a right digest whose integers or scales no quantisation makes."""
    checkpoint = open_checkpoint(str(model))
    groups = expected(model)
    change(groups[group_of(checkpoint.config, *place)])
    write_prepared(checkpoint, path, iter(groups.items()), WeightsDigest())
