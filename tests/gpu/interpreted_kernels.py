"""Runs the Triton kernels in Triton's interpreter, on a CPU; prints the cases that are wrong.

Run with TRITON_INTERPRET=1, which Triton reads when it is imported. With --all, every shape is
computed in every field; else large ones are computed in one field, in turn.
"""

import json
import sys
from typing import Any

import numpy as np
import torch
import triton.language as tl

from tsqp.algebra import residue_bytes
from tsqp.algebra.params import FIELDS, Field
from tsqp.gpu.backends import product_choice, triton_product

# Tokens, input and output features.
SMALL = ((1, 64, 48), (1, 1, 1), (3, 61, 7), (17, 61, 7), (17, 1, 1))
LARGE = ((2, 31, 33), (5, 300, 33), (70, 130, 140), (16, 576, 80), (64, 128, 64))

FLOAT_SHAPES = ((1, 2100, 33), (3, 61, 7), (17, 300, 33))


def is_right(field: Field, floats: tl.dtype | None, rows: int, width: int, features: int) -> bool:
    generator = torch.Generator().manual_seed(rows * width)
    weight_FD = torch.randint(-127, 128, (features, width), generator=generator, dtype=torch.int8)
    weight_FD[0] = 127
    weight_FD[-1] = -127
    c_TD = torch.randint(0, field.p, (rows, width), generator=generator).numpy()
    edges = [0, 1, field.p - 1, field.half, field.half + 1, field.largest_digits]
    edges += [field.largest_digits + 1, 127, 128, 255, 256]
    c_TD.reshape(-1)[: len(edges)] = edges[: c_TD.size]
    c_TD[-1] = field.largest_digits
    exact_TF = (c_TD.astype(object) @ weight_FD.numpy().astype(object).T) % field.p
    c_TB = np.empty((rows, field.residue_bytes * width), np.uint8)
    residue_bytes.pack(c_TD.astype(field.dtype), field, c_TB)
    z_TB = torch.full((rows, field.residue_bytes * features), 255, dtype=torch.uint8)
    triton_product.residue_product(torch.from_numpy(c_TB), weight_FD, field, z_TB, floats=floats)
    z_TF = np.empty((rows, features), field.dtype)
    residue_bytes.unpack(z_TB.numpy(), field, z_TF)
    return np.array_equal(z_TF.astype(object), exact_TF)


def hostile(field: Field) -> bool:
    """Whether bytes that are not residues give an answer of the right size and change no input."""
    c_TB = torch.full((3, field.residue_bytes * 32), 255, dtype=torch.uint8)
    z_TB = torch.empty(3, field.residue_bytes * 8, dtype=torch.uint8)
    weight_FD = torch.full((8, 32), -127, dtype=torch.int8)
    triton_product.residue_product(c_TB, weight_FD, field, z_TB)
    return bool((c_TB == 255).all())


if __name__ == "__main__":
    fields = list(FIELDS.values())
    cases: list[tuple[Any, ...]] = [(field, None, *shape) for field in fields for shape in SMALL]
    cases += [(field, tl.float16, *shape) for field in fields for shape in FLOAT_SHAPES]
    cases += [
        (field, None, *shape)
        for number, shape in enumerate(LARGE)
        for place, field in enumerate(fields)
        if number % len(fields) == place or "--all" in sys.argv
    ]
    wrong = [f"{case}" for case in cases if not is_right(*case)]
    wrong += [f"{field.name} hostile" for field in FIELDS.values() if not hostile(field)]
    if product_choice.choose_product(torch.device("cpu")) is not triton_product.residue_product:
        wrong.append("the check of a device")
    print(json.dumps({"cases": len(cases), "wrong": wrong}))
    sys.exit(bool(wrong))
