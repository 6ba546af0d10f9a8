"""The noise of lattice masks [P11]: its distribution, its independence, and the size of Wq · e."""

import hashlib
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from crypto_helpers import chi_square_p, make
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from mask_blocks import from_blocks
from tsqp.algebra.fixed_point import Bounds
from tsqp.algebra.hints import Polynomials, make_hints, public_polynomials
from tsqp.algebra.params import DEGREE, LATTICE
from tsqp.algebra.ring import ClassTransform, Ring
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto import lattice
from tsqp.tee.crypto.lattice import LatticeProvider

Q = LATTICE.p
RING = Ring.of(Q, DEGREE)
WIDTH = 96
QKV, HEAD = LinearGroup(0, "qkv", WIDTH, WIDTH), LinearGroup(None, "lm_head", WIDTH, WIDTH)
VARIANCE = 8  # 16 differences of two bits


def signed(words_GNW: NDArray[np.uint32], width: int) -> NDArray[np.int64]:
    """Residues as the numbers of least size."""
    values_ND = from_blocks(words_GNW, width)
    return np.where(values_ND > Q // 2, values_ND - Q, values_ND)


@pytest.fixture(scope="module")
def noise() -> dict[LinearGroup, NDArray[np.int64]]:
    """Of two groups: masks of public polynomials that are zero are nothing else."""
    zeros = {key: Polynomials.empty(DEGREE, WIDTH) for key in (QKV, HEAD)}
    transform = ClassTransform.of(RING, 4)
    provider = LatticeProvider(zeros[QKV], zeros, transform)
    return {
        key: np.concatenate(
            [signed(make(provider, key, (WIDTH, WIDTH)).r_ND, WIDTH) for _ in range(8)]
        )
        for key in zeros
    }


def test_noise_is_binomial(noise: dict[LinearGroup, NDArray[np.int64]]) -> None:
    chances = np.array([math.comb(32, ones) for ones in range(33)]) / 2**32
    for e_ND in noise.values():
        assert np.abs(e_ND).max() <= 16
        counts = np.bincount(e_ND.reshape(-1) + 16, minlength=33)
        expected = chances * e_ND.size
        often = expected > 20
        statistic = ((counts - expected) ** 2 / expected)[often].sum()
        assert statistic < often.sum() + 10 * (2 * often.sum()) ** 0.5
        assert counts[~often].sum() < 200


def test_noise_of_features_rows_classes_and_groups_is_independent(
    noise: dict[LinearGroup, NDArray[np.int64]],
) -> None:
    first, second = noise.values()
    pairs = {
        "features": (first[:, :-1], first[:, 1:]),
        "blocks of features": (first[:, :-32], first[:, 32:]),
        "rows": (first[:-1], first[1:]),
        "classes": (first[:-512], first[512:]),
        "batches": (first[:-2048], first[2048:]),
        "groups": (first, second),
    }
    for name, (a, b) in pairs.items():
        correlation = float((a * b).mean()) / VARIANCE
        assert abs(correlation) < 6 / a.size**0.5, name
        alike = math.comb(64, 32) / 2**64  # that two of them are
        assert abs((a == b).mean() - alike) < 6 * (alike / a.size) ** 0.5, name


def masks_and_products(batches: int) -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
    """Wq · e of many rows, and the weights."""
    generator = np.random.default_rng(1)
    weight = generator.integers(-127, 128, (1024, WIDTH))
    weight[:, 0] = 127
    weight_FD = torch.from_numpy(weight).to(torch.int8)
    public = public_polynomials(RING, bytes(32), WIDTH)
    hints = {QKV: make_hints(public, weight_FD)}
    provider = LatticeProvider(public, hints, ClassTransform.of(RING))
    for _ in range(batches):
        pads = make(provider, QKV, weight.shape)
        r_ND, u_NF = signed(pads.r_ND, WIDTH), signed(pads.u_NF, len(weight))
        error_NF = r_ND @ weight.T - u_NF
        yield (error_NF + Q // 2) % Q - Q // 2, weight_FD


@pytest.mark.parametrize("batches", [2, pytest.param(48, marks=pytest.mark.slow)])
def test_products_with_noise_are_as_large_as_predicted_and_far_below_half_of_delta(
    batches: int,
) -> None:
    squares_F, rows, largest, furthest = np.zeros(1024), 0, 0, 0.0
    for error_NF, weight_FD in masks_and_products(batches):
        l2_F = weight_FD.double().norm(dim=1).numpy()
        sizes_NF = np.abs(error_NF)
        largest = max(largest, int(sizes_NF.max()))
        furthest = max(furthest, float((sizes_NF / (math.sqrt(VARIANCE) * l2_F)).max()))
        squares_F += (error_NF.astype(np.float64) ** 2).sum(axis=0)
        rows += len(error_NF)
    # Each feature's variance, by the length of its own row of weights. A mean of n squares of
    # normal numbers is off by √(2/n): six of that for the worst feature, and 1 % of the deviation
    # for all of them.
    ratio_F = squares_F / rows / (VARIANCE * l2_F**2)
    assert np.abs(ratio_F - 1).max() < 6 * math.sqrt(2 / rows)
    assert ratio_F.mean() == pytest.approx(1, rel=0.02)
    # The largest of so many normal numbers lies about here, and Δ/2 at ten deviations or beyond.
    assert furthest < math.sqrt(2 * math.log(rows * 1024)) + 1
    bounds = Bounds.of(weight_FD)
    assert largest < bounds.delta(LATTICE) / 2
    assert bounds.delta(LATTICE) / 2 >= 10 * math.sqrt(VARIANCE) * l2_F.max()


def test_a_mask_is_what_its_key_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in Python's integers, by direct evaluation."""
    key = bytes(range(100, 132))
    monkeypatch.setattr(lattice.secrets, "token_bytes", lambda _: key)
    weight_FD = torch.tensor([[3, -127], [127, 5]], dtype=torch.int8)
    public = public_polynomials(RING, bytes(32), 2)
    hints = {QKV: make_hints(public, weight_FD)}
    provider = LatticeProvider(public, hints, ClassTransform.of(RING, 64))
    pads = make(provider, QKV, (2, 2))
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(20_000))
    words = [int.from_bytes(stream[i : i + 8], "little") % 2**46 for i in range(0, 20_000, 8)]
    s_N = [word for word in words if word < Q][:2048]
    first = (2**64).to_bytes(16, "big")  # where the noise of the first class begins
    bits = Cipher(algorithms.AES256(key), modes.CTR(first)).encryptor().update(bytes(32 * 32 * 4))
    roots = RING.roots()
    r_MD, u_MF = signed(pads.r_ND, 2), signed(pads.u_NF, 2)
    a_ND, h_NF = public.at(slice(0, 2048)).tolist(), hints[QKV].at(slice(0, 2048)).tolist()

    def coefficient(values_N: list[list[int]], feature: int, t: int) -> int:
        total = sum(
            row[feature] * s * pow(x, -t, Q) for row, s, x in zip(values_N, s_N, roots, strict=True)
        )
        return total * pow(2048, -1, Q) % Q

    for m in (0, 5):  # rows 0 and 5 · 64 of the batch
        for d in (0, 1):
            word = int.from_bytes(bits[4 * (32 * m + d) :][:4], "little")
            e = (word & 0xFFFF).bit_count() - (word >> 16).bit_count()
            assert r_MD[m, d] % Q == (coefficient(a_ND, d, 64 * m) + e) % Q
            assert u_MF[m, d] % Q == coefficient(h_NF, d, 64 * m)


KNOWN_MASKS = "116e8713a7b6314ce2fe4398e9208c961407d065b3f8dab35e1d0ea9c0c3fa0a"
KNOWN_PRODUCTS = "be460d2e41eb39dbf9163fe04a3e9d09591c8fb6fbdaae6c39dd1a172b69a554"
KNOWN_HINT = "7bb31b50ed289ba8b2a23e3c7989f9ca153cd3915110881b1d08888272c231ca"


def test_known_answers_of_a_class_of_masks_and_of_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lattice.secrets, "token_bytes", lambda _: bytes(range(100, 132)))
    weight_FD = torch.tensor([[3, -127], [127, 5]], dtype=torch.int8)
    public = public_polynomials(RING, bytes(32), 2)
    hints = make_hints(public, weight_FD)
    provider = LatticeProvider(public, {QKV: hints}, ClassTransform.of(RING, 64))
    make(provider, QKV, (2, 2))
    second = make(provider, QKV, (2, 2))  # rows 1, 65, 129 … of the batch
    assert digest(from_blocks(second.r_ND, 2)) == KNOWN_MASKS
    assert digest(from_blocks(second.u_NF, 2)) == KNOWN_PRODUCTS
    assert digest(hints.at(slice(0, DEGREE))[:, 1]) == KNOWN_HINT


def digest(residues: NDArray[np.int64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(residues, "<i8").tobytes()).hexdigest()


def test_one_weight_multiplies_the_noise_and_zeros_give_products_that_are_zero() -> None:
    public = public_polynomials(RING, bytes(32), 5)
    weight_FD = torch.tensor([[127], [-127], [0], [1]], dtype=torch.int8)
    zeros_FD = torch.zeros(3, 5, dtype=torch.int8)
    hints = {QKV: make_hints(public, weight_FD), HEAD: make_hints(public, zeros_FD)}
    provider = LatticeProvider(public, hints, ClassTransform.of(RING, 4))
    for _ in range(4):
        pads = make(provider, QKV, (4, 1))
        r_N, u_NF = from_blocks(pads.r_ND, 1)[:, 0].tolist(), from_blocks(pads.u_NF, 4).tolist()
        noise = [(r - u[3] + Q // 2) % Q - Q // 2 for r, u in zip(r_N, u_NF, strict=True)]
        assert 0 < max(map(abs, noise)) <= 16
        for r, u, e in zip(r_N, u_NF, noise, strict=True):
            errors = [(w * r - each) % Q for w, each in zip((127, -127, 0, 1), u, strict=True)]
            assert errors == [w * e % Q for w in (127, -127, 0, 1)]
            assert u[2] == 0
        nothing = make(provider, HEAD, (3, 5))
        assert not from_blocks(nothing.u_NF, 3).any()
        assert from_blocks(nothing.r_ND, 5).all()


def test_masks_are_uniform_in_every_part_of_their_bytes() -> None:
    public = public_polynomials(RING, bytes(32), WIDTH)
    hints = {QKV: make_hints(public, torch.ones(1, WIDTH, dtype=torch.int8))}
    provider = LatticeProvider(public, hints, ClassTransform.of(RING))
    values = signed(make(provider, QKV, (1, WIDTH)).r_ND, WIDTH).reshape(-1) % Q
    assert chi_square_p(np.bincount(values * 256 // Q, minlength=256)) > 1e-6
    for byte in range(5):
        assert chi_square_p(np.bincount(values >> 8 * byte & 255, minlength=256)) > 1e-6
    assert len(np.unique(values)) > values.size - 20
