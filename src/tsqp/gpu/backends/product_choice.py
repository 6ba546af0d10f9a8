"""Chooses the product of residues for a CUDA device: the fastest one that is exact on it."""

import logging
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tsqp.algebra import residue_bytes
from tsqp.algebra.params import FIELDS, Field
from tsqp.gpu.backends import cuda_product

log = logging.getLogger("tsqp")

# out = Wq · c mod p, of packed residues on the device.
ResidueProduct = Callable[[Tensor, Tensor, Field, Tensor], None]

# Tokens, input and output features: one shape for each kernel of Triton, aligned as most models
# are. The first is wider than sums in float32 are exact.
SHAPES = ((1, 1040, 48), (16, 528, 48), (17, 528, 48))


def choose_product(device: torch.device) -> ResidueProduct:
    """The first product that works on the device and is exact: Triton's, or library calls.

    Compiles kernels, which takes about half a minute when Triton has not cached them.
    """
    for name, product in _candidates(device):
        try:
            if is_exact(product, device):
                log.debug("products of residues: %s", name)
                return product
        except Exception as exc:  # of Triton, its compiler, a library, or the driver
            log.warning("%s fails on %s (%s), so another product is used", name, device, _kind(exc))
        else:
            log.warning("%s is wrong on %s, so another product is used", name, device)
    return _library(in_bfloat16=False)  # which the worker's self-test refuses


def _candidates(device: torch.device) -> Iterator[tuple[str, ResidueProduct]]:
    in_bfloat16 = cuda_product.prefers_bfloat16(device)
    try:
        from tsqp.gpu.backends import triton_product
    except ImportError:
        log.info(
            "Triton is not installed, so products of residues take several launches: "
            "pip install 'tsqp[cuda]'"
        )
    else:
        kernel = triton_product.residue_product
        if in_bfloat16:
            yield "Triton's product in bfloat16", partial(kernel, floats=triton_product.BFLOAT16)
        yield "Triton's product in int8", kernel
    if in_bfloat16:
        yield "the library's product in bfloat16", _library(in_bfloat16=True)
    yield "the library's product in int8", _library(in_bfloat16=False)
    if not in_bfloat16:
        yield "the library's product in bfloat16", _library(in_bfloat16=True)


def _library(*, in_bfloat16: bool) -> ResidueProduct:
    return partial(cuda_product.packed_product, in_bfloat16=in_bfloat16)


def _kind(exc: Exception) -> str:
    return type(exc).__name__


def is_exact(product: ResidueProduct, device: torch.device) -> bool:
    """Whether a product is right for large and random residues of all fields.

    It is compared with Python integers.
    """
    cases = [(field, shape) for field in FIELDS.values() for shape in SHAPES]
    return all(_is_exact(product, device, field, *shape) for field, shape in cases)


def _is_exact(
    product: ResidueProduct,
    device: torch.device,
    field: Field,
    rows: int,
    width: int,
    features: int,
) -> bool:
    generator = torch.Generator().manual_seed(0)
    weight_FD = torch.randint(-127, 128, (features, width), generator=generator, dtype=torch.int8)
    weight_FD[0], weight_FD[1] = 127, -127
    c_TD = torch.randint(0, field.p, (rows, width), generator=generator).numpy()
    c_TD[0], c_TD[-1, ::2] = field.largest_digits, field.p - 1
    exact_TF = (c_TD.astype(object) @ weight_FD.numpy().astype(object).T) % field.p
    c_TB = np.empty((rows, field.residue_bytes * width), np.uint8)
    residue_bytes.pack(c_TD.astype(field.dtype), field, c_TB)
    z_TB = torch.empty(rows, field.residue_bytes * features, dtype=torch.uint8, device=device)
    product(torch.from_numpy(c_TB).to(device), weight_FD.to(device), field, z_TB)
    z_TF = np.empty((rows, features), field.dtype)
    residue_bytes.unpack(z_TB.cpu().numpy(), field, z_TF)
    return np.array_equal(z_TF.astype(object), exact_TF)
