"""Chooses the product of residues for a CUDA device: one launch of Triton, where that is exact."""

import logging
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from tsqp.algebra import residue_bytes
from tsqp.algebra.params import FIELDS, Field

log = logging.getLogger("tsqp")

# out = Wq · c mod p, of packed residues on the device.
ResidueProduct = Callable[[Tensor, Tensor, Field, Tensor], None]


def fast_product(device: torch.device) -> ResidueProduct | None:
    """The product in one launch; None if Triton is missing, or wrong on this device.

    Compiles its kernels, which takes about half a minute when Triton has not cached them.
    """
    try:
        from tsqp.gpu.backends import triton_product
    except ImportError:
        log.info(
            "Triton is not installed, so products of residues take several launches: "
            "pip install 'tsqp[cuda]'"
        )
        return None
    try:
        is_exact = all(_is_exact(triton_product, field, device) for field in FIELDS.values())
    except Exception as exc:  # of Triton, its compiler, or the driver
        log.warning(
            "Triton fails on this device (%s), so products take several launches",
            type(exc).__name__,
        )
        return None
    if not is_exact:
        log.warning("Triton's products are wrong on this device, so library calls replace them")
        return None
    product: ResidueProduct = triton_product.residue_product
    return product


def _is_exact(kernels: ModuleType, field: Field, device: torch.device) -> bool:
    """Whether each kernel is right for large and random residues, against Python integers."""
    features, width = 40, 520
    generator = torch.Generator().manual_seed(0)
    weight_FD = torch.randint(-127, 128, (features, width), generator=generator, dtype=torch.int8)
    weight_FD[0], weight_FD[1] = 127, -127
    for rows in (1, kernels.FEW, kernels.FEW + 1):
        c_TD = torch.randint(0, field.p, (rows, width), generator=generator).numpy()
        c_TD[0], c_TD[-1, ::2] = field.largest_digits, field.p - 1
        exact_TF = (c_TD.astype(object) @ weight_FD.numpy().astype(object).T) % field.p
        c_TB = np.empty((rows, field.residue_bytes * width), np.uint8)
        residue_bytes.pack(c_TD.astype(field.dtype), field, c_TB)
        z_TB = torch.empty(rows, field.residue_bytes * features, dtype=torch.uint8, device=device)
        kernels.residue_product(
            torch.from_numpy(c_TB).to(device), weight_FD.to(device), field, z_TB
        )
        z_TF = np.empty((rows, features), field.dtype)
        residue_bytes.unpack(z_TB.cpu().numpy(), field, z_TF)
        if not np.array_equal(z_TF.astype(object), exact_TF):
            return False
    return True
