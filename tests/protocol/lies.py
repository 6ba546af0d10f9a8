"""All lies of the lying worker by name. Each makes a lie from the right answer.

Shape suffixes: T tokens; D input and F output features of a group; B bytes of a row.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from tsqp.algebra.params import Field
from tsqp.wire.codec import HEADER
from tsqp.wire.messages import Welcome

MODEL = "random:tiny"  # what the worker serves, lies aside
LATE_S = 1.0

Place = tuple[int, str]  # of a group, as messages name it
Frames = list[bytes | memoryview]


@dataclass(frozen=True)
class Order:
    """What a session does wrong.

    Attributes:
        lie: a name in one of the tables below.
        layer, group: the only group that is lied about; "attention_scores" and "weighted_values"
            count as groups.
        after: calls of the session that are answered honestly first.
        bit: which one of the answer "one bit flipped" means, modulo their number.
    """

    lie: str = "none"
    layer: int = 0
    group: str = "qkv"
    after: int = 0
    bit: int = 0

    def write(self, path: Path) -> None:
        path.write_bytes(msgspec.json.encode(self))


@dataclass(frozen=True)
class Answer:
    """The right answer to a call, and what a liar may make another one of.

    Attributes:
        z_TF, c_TD: residues, int64.
        before_TF: what the session was answered before, for the same group.
        group_TF: the same, for another group of the same shape.
        session_TF: what another session was answered, for the same group.
    """

    field: Field
    c_TD: Tensor
    z_TF: Tensor
    before_TF: Tensor | None
    group_TF: Tensor | None
    session_TF: Tensor | None


def add(z_TF: Tensor, what: int, place: object = slice(None)) -> Tensor:
    changed_TF = z_TF.clone()
    changed_TF[place] += what
    return changed_TF


def several(z_TF: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Change an answer of several rows; None for a single row."""
    return change(z_TF) if len(z_TF) > 1 else None


# What is written instead of the product; None for a call at which this lie is impossible. A number
# that is larger than a word loses its upper bits.
WRONG_PRODUCTS: dict[str, Callable[[Answer], Tensor | None]] = {
    "one element off by one": lambda a: add(a.z_TF, 1, (-1, -1)) % a.field.p,
    "a row off by one": lambda a: add(a.z_TF, 1, 0) % a.field.p,
    "a row off by minus one": lambda a: add(a.z_TF, -1, 0) % a.field.p,
    "a row off by p": lambda a: add(a.z_TF, a.field.p, 0),
    "a row off by its highest bit": lambda a: add(a.z_TF, 1 << 8 * a.field.residue_bytes - 1, 0),
    "p itself": lambda a: torch.full_like(a.z_TF, a.field.p),
    "the largest word": lambda a: torch.full_like(a.z_TF, -1),
    "zeros": lambda a: torch.zeros_like(a.z_TF),
    "twice the product": lambda a: 2 * a.z_TF % a.field.p,
    "minus the product": lambda a: -a.z_TF % a.field.p,
    "one weight off by one": lambda a: torch.cat(
        [(a.z_TF[:, :1] + a.c_TD[:, :1]) % a.field.p, a.z_TF[:, 1:]], 1
    ),
    "features shifted by one": lambda a: a.z_TF.roll(1, 1),
    "two rows swapped": lambda a: several(a.z_TF, lambda z_TF: z_TF.flip(0)),
    "all rows but the last": lambda a: several(a.z_TF, lambda z_TF: add(z_TF, 1, (-1, 0))),
    "rows and features exchanged": lambda a: several(
        a.z_TF, lambda z_TF: z_TF.t().reshape(z_TF.shape)
    ),
    "floating-point numbers": lambda a: a.z_TF.float().view(torch.int32).long(),
    "the previous answer": lambda a: a.before_TF,
    "the answer of another group": lambda a: a.group_TF,
    "the answer of another session": lambda a: a.session_TF,
}


# The messages that are sent instead of an answer. The frames of each are the result and, without
# shared memory, its tensor.
WRONG_MESSAGES: dict[str, Callable[[Frames], Sequence[Frames]]] = {
    "never answers": lambda frames: [],
    "answers late": lambda frames: later(frames),
    "answers twice": lambda frames: [frames, frames],
    "answers a call to come": lambda frames: [[to_another(frames[0], 1), *frames[1:]]],
    "answers no call": lambda frames: [[to_another(frames[0], 2**40), *frames[1:]]],
    "babbles": lambda frames: [[bytes(64), *frames[1:]]],
    "sends a byte too few": lambda frames: [[frames[0], frames[1][:-1]]],
    "sends a byte too many": lambda frames: [[frames[0], bytes(frames[1]) + b"\0"]],
    "sends half of the rows": lambda frames: [[frames[0], frames[1][: len(frames[1]) // 2]]],
    "sends every row twice": lambda frames: [[frames[0], bytes(frames[1]) * 2]],
    "sends words twice as wide": lambda frames: [
        [frames[0], torch.frombuffer(frames[1], dtype=torch.int32).long().numpy().tobytes()]
    ],
    "sends no tensor": lambda frames: [frames[:1]],
    "sends a tensor too many": lambda frames: [[*frames, frames[1]]],
}


def later(frames: Frames) -> Sequence[Frames]:
    time.sleep(LATE_S)
    return [frames]


def to_another(frame: bytes | memoryview, further: int) -> bytes:
    """The same answer, addressed to a later call."""
    magic, version, zero, ticket, length = HEADER.unpack_from(frame)
    return HEADER.pack(magic, version, zero, ticket + further, length) + frame[HEADER.size :]


WRONG_WELCOMES: dict[str, Callable[[Welcome], Welcome]] = {
    "names another digest": lambda w: msgspec.structs.replace(w, weights_digest="0" * 64),
    "names another dtype": lambda w: msgspec.structs.replace(w, dtype="float32"),
    "can do nothing": lambda w: msgspec.structs.replace(w, abilities=()),
    "repeats an old nonce": lambda w: msgspec.structs.replace(w, nonce=bytes(32)),
}


def flip(bytes_TB: Tensor, bit: int) -> None:
    """Flip one bit in place."""
    byte, place = divmod(bit % (8 * bytes_TB.numel()), 8)
    bytes_TB.view(-1)[byte] ^= 1 << place
