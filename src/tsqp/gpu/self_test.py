"""A worker multiplies once before it serves, so that a device that computes wrongly never does."""

import numpy as np
import torch

from tsqp.algebra.params import WIDE
from tsqp.algebra.residue_bytes import pack, unpack
from tsqp.errors import IntegrityError
from tsqp.gpu.worker_weights import IntegerModel

INPUTS, CHECKED_FEATURES = 3, 64


def check_device(integers: IntegerModel) -> None:
    """Compare the device's product of one group of weights with NumPy's, for a few features.

    Raises:
        IntegrityError: they differ.
    """
    group, weight_FD = next(iter(integers.linear_FD.items()))
    features, width = weight_FD.shape
    c_TD = np.arange(INPUTS * width, dtype=np.int64).reshape(INPUTS, width)
    c_TD = c_TD * 2_654_435_761 % WIDE.p  # below 2^63 for any model: spread over all residues
    c_TB = np.empty((INPUTS, width * WIDE.residue_bytes), np.uint8)
    pack(c_TD, WIDE, c_TB)
    out_TB = torch.zeros(INPUTS, features * WIDE.residue_bytes, dtype=torch.uint8)
    integers.backend.residue_product(torch.from_numpy(c_TB), weight_FD, WIDE, out_TB)
    y_TF = np.empty((INPUTS, features), np.int32)
    unpack(out_TB.numpy(), WIDE, y_TF)

    chosen = np.unique(np.linspace(0, features - 1, CHECKED_FEATURES).astype(np.int64))
    weight_CD = weight_FD[torch.from_numpy(chosen).to(weight_FD.device)].cpu().numpy()
    # At most 2^7 · 2^31 · D: below 2^63 for D up to 2^25.
    expected_TC = c_TD @ weight_CD.astype(np.int64).T % WIDE.p
    if not np.array_equal(y_TF[:, chosen], expected_TC):
        raise IntegrityError(
            f"The device {integers.backend.device} multiplies {group} wrongly; use another device."
        )
