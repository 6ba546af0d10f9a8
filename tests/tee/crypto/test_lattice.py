"""Lattice masks and the loops around them, against Python's integers."""

import hashlib

import pytest
import torch
from crypto_helpers import integer_weights, make, product

from mask_blocks import from_blocks
from tsqp.algebra import residue_bytes
from tsqp.algebra.hints import LABEL, Polynomials, make_hints, public_polynomials
from tsqp.algebra.int8_product import residue_product
from tsqp.algebra.params import LATTICE
from tsqp.algebra.residue_blocks import BLOCK, halves
from tsqp.algebra.ring import ClassTransform, Ring
from tsqp.checkpoint.quantize import IntegerWeights
from tsqp.errors import HintsError, IntegrityError, LatticeError
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto import lattice
from tsqp.tee.crypto.hint_checks import check_hints
from tsqp.tee.crypto.lattice import LatticeProvider, rows_of_a_class
from tsqp.tee.crypto.pads import Pads, row_bytes_in_stock
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.offload.lattice_group import LatticeGroup, MaskedRows, Switch

GROUP = LinearGroup(3, "qkv", 40, 37)
Q = LATTICE.p
RING = Ring.of(Q, lattice.DEGREE)
KNOWN = [
    [3143723627025, 9628171531911],
    [64585192953539, 56933237876022],
]  # the first values of a_0 and a_1


class Layer:
    """A group with its hints, and an honest worker."""

    def __init__(self, weights: IntegerWeights, classes: int = 8) -> None:
        self.weights = weights
        width = weights.weight_FD.shape[1]
        self.group = LatticeGroup(GROUP, weights, None, Switch())
        self.public = public_polynomials(RING, bytes(range(32)), width)
        self.hints = make_hints(self.public, weights.weight_FD)
        transform = ClassTransform.of(RING, classes)
        self.provider = LatticeProvider(self.public, {GROUP: self.hints}, transform)
        self.rows = RowPool(2)

    def take(self, rows: int) -> Pads:
        return self.make().copy(slice(rows))

    def make(self) -> Pads:
        """A class of rows."""
        return make(self.provider, GROUP, (self.group.features, self.group.width))

    def masks(self, pads: Pads) -> list[list[int]]:
        return from_blocks(pads.r_ND, self.group.width).tolist()

    def products(self, pads: Pads) -> list[list[int]]:
        return from_blocks(pads.u_NF, self.group.features).tolist()

    def mask(self, x_TD: torch.Tensor, masks: Pads) -> tuple[MaskedRows, torch.Tensor]:
        """What the TEE keeps, and the residues that go out, int64."""
        c_TB = torch.empty(len(x_TD), LATTICE.residue_bytes * self.group.width, dtype=torch.uint8)
        masked = self.group.mask(x_TD, masks.r_ND, c_TB, self.rows)
        c_TD = torch.empty(tuple(x_TD.shape), dtype=torch.int64)
        residue_bytes.unpack(c_TB.numpy(), LATTICE, c_TD.numpy())
        return masked, c_TD

    def answer(self, c_TD: torch.Tensor) -> torch.Tensor:
        z_TF = torch.empty(len(c_TD), self.group.features, dtype=torch.int64)
        residue_product(c_TD, self.weights.weight_FD, LATTICE, z_TF)
        return z_TF

    def unmask(self, z_TF: torch.Tensor, masks: Pads, masked: MaskedRows) -> torch.Tensor:
        z_TB = torch.empty(
            len(z_TF), LATTICE.residue_bytes * self.group.features, dtype=torch.uint8
        )
        residue_bytes.pack(z_TF.numpy(), LATTICE, z_TB.numpy())
        y_TF = torch.full((len(z_TF), self.group.features), torch.nan)
        self.group.check_and_unmask(z_TB, masks.u_NF, masked, y_TF, "The worker", self.rows)
        return y_TF


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer(integer_weights(40, 37))


def rows_of(count: int, width: int, seed: int = 0) -> torch.Tensor:
    x_TD = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    x_TD[:, 3] *= 300
    return x_TD


def test_a_layer_equals_its_integers_in_exact_arithmetic(layer: Layer) -> None:
    x_TD = rows_of(33, layer.group.width)
    masks = layer.take(33)
    masked, c_TD = layer.mask(x_TD, masks)
    y_TF = layer.unmask(layer.answer(c_TD), masks, masked)
    r_TD = layer.masks(masks)
    for t in (0, 16, 32):
        unit = masked.unit_T[t]
        xq_D = [round(v / unit) for v in x_TD[t].double().tolist()]
        assert c_TD[t].tolist() == [
            (layer.group.delta * x + r) % Q for x, r in zip(xq_D, r_TD[t], strict=True)
        ]
        expected = product(layer.weights.weight_FD, xq_D)
        scales = layer.weights.scale_F.double()
        assert torch.equal(y_TF[t], (torch.tensor(expected).double() * scales * unit).float())


def test_a_mask_and_its_product_differ_by_small_noise_only(layer: Layer) -> None:
    masks = layer.make()
    r_MD, u_MF = layer.masks(masks), layer.products(masks)
    l2 = layer.weights.weight_FD.double().square().sum(1).sqrt()
    errors = []
    for t in range(len(masks)):
        z_F = product(layer.weights.weight_FD, r_MD[t])
        errors.append([(z - u + Q // 2) % Q - Q // 2 for z, u in zip(z_F, u_MF[t], strict=True)])
    found = torch.tensor(errors).double() / l2
    assert float(found.std()) == pytest.approx(8**0.5, rel=0.05)
    assert float(found.abs().max() * l2.max()) < layer.group.delta / 4


@pytest.mark.parametrize("error", [1, -1, 2**31 - 1, 5 * (2**31 - 1), Q // 2, Q - 2])
@pytest.mark.parametrize("row", [0, 7, 15])
def test_a_wrong_row_is_refused_before_anything_is_unmasked(
    layer: Layer, error: int, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> int:
        raise AssertionError("unmasked")

    masks = layer.take(16)
    masked, c_TD = layer.mask(rows_of(16, layer.group.width), masks)
    z_TF = layer.answer(c_TD)
    z_TF[row, 11] = (z_TF[row, 11] + error) % Q
    monkeypatch.setattr("tsqp.tee.crypto.lattice_kernels.unmask", never)
    with pytest.raises(IntegrityError, match="wrong product for group qkv of layer 3"):
        layer.unmask(z_TF, masks, masked)


def orthogonal_to(k_F: list[int], f: int, g: int) -> tuple[int, int]:
    """Errors at two features that one check vector cannot see."""
    return k_F[g], -k_F[f] % Q


@pytest.mark.parametrize("vector", [0, 1])
@pytest.mark.parametrize("row", [0, 16, 32])
def test_an_error_that_one_check_vector_cannot_see_is_refused_by_the_other(
    layer: Layer, vector: int, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> int:
        raise AssertionError("unmasked")

    low_F, high_F = layer.group._k_22F[vector].astype(int)
    k_F = (low_F | high_F << 23).tolist()
    masks = layer.take(33)
    masked, c_TD = layer.mask(rows_of(33, layer.group.width), masks)
    z_TF = layer.answer(c_TD)
    error_f, error_g = orthogonal_to(k_F, 4, 39)
    assert error_f and error_g and (k_F[4] * error_f + k_F[39] * error_g) % Q == 0
    z_TF[row, 4] = (int(z_TF[row, 4]) + error_f) % Q
    z_TF[row, 39] = (int(z_TF[row, 39]) + error_g) % Q
    monkeypatch.setattr("tsqp.tee.crypto.lattice_kernels.unmask", never)
    with pytest.raises(IntegrityError, match="wrong product"):
        layer.unmask(z_TF, masks, masked)


@pytest.mark.parametrize("value", [Q, Q + 1, 2**48 - 1])
def test_values_that_are_no_residues_are_refused(layer: Layer, value: int) -> None:
    masks = layer.take(1)
    masked, c_TD = layer.mask(rows_of(1, layer.group.width), masks)
    z_TF = layer.answer(c_TD)
    z_TF[0, 0] = value
    with pytest.raises(IntegrityError):
        layer.unmask(z_TF, masks, masked)


def test_q_in_the_place_of_zero_is_refused_too(layer: Layer) -> None:
    # The check vectors cannot tell it from the right answer.
    masks = layer.take(1)
    masks.r_ND[:] = masks.u_NF[:] = 0
    masked, c_TD = layer.mask(torch.zeros(1, layer.group.width), masks)
    z_TF = layer.answer(c_TD)
    assert not layer.unmask(z_TF, masks, masked).any()
    z_TF[0, 0] = Q
    with pytest.raises(IntegrityError):
        layer.unmask(z_TF, masks, masked)


def test_a_wrong_product_of_a_mask_is_another_error_and_ends_all_lattice_offload(
    layer: Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer.group, "_switch", Switch())
    masks = layer.take(4)
    masked, c_TD = layer.mask(rows_of(4, layer.group.width), masks)
    halves(masks.u_NF)[0, 2, 2 * BLOCK + 5] ^= (
        1  # more than the noise, which rounding would take away
    )
    with pytest.raises(LatticeError, match="The worker did not cause this"):
        layer.unmask(layer.answer(c_TD), masks, masked)
    with pytest.raises(LatticeError, match="uses no more lattice masks"):
        layer.mask(rows_of(4, layer.group.width), layer.take(4))


def test_a_wrong_answer_has_no_other_verdict_if_the_mask_is_wrong_too(
    layer: Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = Switch()
    monkeypatch.setattr(layer.group, "_switch", switch)
    masks = layer.take(4)
    masked, c_TD = layer.mask(rows_of(4, layer.group.width), masks)
    halves(masks.u_NF)[0, 2, 2 * BLOCK + 5] ^= 1
    z_TF = layer.answer(c_TD)
    lie_TF = z_TF.clone()
    lie_TF[2, 7] = (lie_TF[2, 7] + 1) % Q
    with pytest.raises(IntegrityError, match="wrong product"):
        layer.unmask(lie_TF, masks, masked)
    switch.check()  # a worker cannot end lattice offload
    with pytest.raises(LatticeError, match="The worker did not cause this"):
        layer.unmask(z_TF, masks, masked)


def test_features_and_rows_of_zeros_have_as_much_noise_as_all_others() -> None:
    diagonal = Layer(IntegerWeights(127 * torch.eye(40, dtype=torch.int8), torch.ones(40)))
    masks = diagonal.make()
    x_TD = rows_of(len(masks), 40)
    x_TD[:, [7, 39]] = x_TD[-16:] = 0
    masked, c_TD = diagonal.mask(x_TD, masks)
    one, noise = pow(127, -1, Q), []  # u is 127 · a · s
    for x_D, unit, c_D, u_F in zip(
        x_TD.double().tolist(), masked.unit_T, c_TD.tolist(), diagonal.products(masks), strict=True
    ):
        xq_D = [round(x / unit) if x else 0 for x in x_D]
        sent = zip(c_D, xq_D, u_F, strict=True)
        rests = [(c - diagonal.group.delta * xq - one * u) % Q for c, xq, u in sent]
        noise.append([(rest + Q // 2) % Q - Q // 2 for rest in rests])
    noise_TD = torch.tensor(noise).double()
    assert noise_TD.abs().max() <= 16
    squares_TD = noise_TD.square()  # whose mean is 8; six deviations of it for 256 and 640 numbers
    assert (squares_TD.mean(0) - 8).abs().max() < 48 * (2 / len(masks)) ** 0.5
    assert abs(float(squares_TD[-16:].mean()) - 8) < 48 * (2 / 640) ** 0.5


@pytest.mark.parametrize("sign", [1, -1])
def test_noise_just_below_half_of_delta_rounds_right(layer: Layer, sign: int) -> None:
    masks = layer.take(2)
    x_TD = rows_of(2, layer.group.width)
    masked, c_TD = layer.mask(x_TD, masks)
    z_TF = layer.answer(c_TD)
    expected = layer.unmask(z_TF, masks, masked)
    r_TD = layer.masks(masks)
    for t in range(2):
        for f, value in enumerate(product(layer.weights.weight_FD, r_TD[t])):
            u = (value - sign * (layer.group.delta // 2 - 1)) % Q
            masks.u_NF[f // BLOCK, t, f % BLOCK] = u & 0xFFFFFFFF
            halves(masks.u_NF)[f // BLOCK, t, 2 * BLOCK + f % BLOCK] = u >> 32
    assert torch.equal(layer.unmask(z_TF, masks, masked), expected)


def test_hints_are_the_products_of_the_public_polynomials(layer: Layer) -> None:
    a_ND = layer.public.at(slice(0, 2048)).tolist()
    h_NF = layer.hints.at(slice(0, 2048)).tolist()
    for n in (0, 1000, 2047):
        assert h_NF[n] == [v % Q for v in product(layer.weights.weight_FD, a_ND[n])]
    check_hints(layer.hints, layer.public, layer.weights.weight_FD, "group qkv", layer.rows)


def changed(hints: Polynomials, g: int, n: int, b: int, low: int, high: int) -> Polynomials:
    copy = Polynomials(hints.low_GNB.copy(), hints.high_GNB.copy(), hints.count)
    copy.low_GNB[g, n, b] ^= low
    copy.high_GNB[g, n, b] ^= high
    return copy


@pytest.mark.parametrize(
    "place",
    [
        (0, 0, 0), (0, 2047, 31), (1, 1023, 7),
        (1, 0, 8), (1, 2047, 31),  # where the block of the last feature has none
    ],
)  # fmt: skip
@pytest.mark.parametrize("bits", [(1, 0), (2**31, 0), (0, 1), (0, 2**13)])
def test_a_hint_with_one_wrong_bit_is_refused(
    layer: Layer, place: tuple[int, int, int], bits: tuple[int, int]
) -> None:
    wrong = changed(layer.hints, *place, *bits)
    with pytest.raises(HintsError, match="group qkv"):
        check_hints(wrong, layer.public, layer.weights.weight_FD, "group qkv", layer.rows)


def test_a_hint_outside_the_field_is_refused(layer: Layer) -> None:
    wrong = changed(layer.hints, 0, 5, 5, 0, 0)
    value = int(wrong.low_GNB[0, 5, 5]) + (int(wrong.high_GNB[0, 5, 5]) << 32) + Q
    wrong.low_GNB[0, 5, 5], wrong.high_GNB[0, 5, 5] = value & 0xFFFFFFFF, value >> 32
    with pytest.raises(HintsError, match=r"outside \[0, q\)"):
        check_hints(wrong, layer.public, layer.weights.weight_FD, "group qkv", layer.rows)


def test_hints_of_other_weights_or_another_seed_are_refused(layer: Layer) -> None:
    width = layer.group.width
    others = make_hints(layer.public, integer_weights(40, width, seed=1).weight_FD)
    with pytest.raises(HintsError):
        check_hints(others, layer.public, layer.weights.weight_FD, "group qkv", layer.rows)
    elsewhere = public_polynomials(RING, bytes(32), width)
    with pytest.raises(HintsError):
        check_hints(layer.hints, elsewhere, layer.weights.weight_FD, "group qkv", layer.rows)


def test_public_polynomials_are_words_of_shake128_without_those_that_are_no_residues() -> None:
    seed = bytes(range(32))
    found_ND = public_polynomials(RING, seed, 3).at(slice(0, 2048))
    for d in range(3):
        message = len(LABEL).to_bytes(8, "little") + LABEL
        message += b"".join(n.to_bytes(8, "little") for n in (2048, Q)) + seed
        stream = hashlib.shake_128(message + d.to_bytes(8, "little")).digest(6 * 3000)
        words = [int.from_bytes(stream[i : i + 6], "little") % 2**46 for i in range(0, 18_000, 6)]
        assert found_ND[:, d].tolist() == [word for word in words if word < Q][:2048]
    assert found_ND[:2, :2].tolist() == KNOWN


def test_public_polynomials_differ_by_seed_label_degree_and_place() -> None:
    def values(ring: Ring = RING, seed: bytes = bytes(32), label: bytes = b"a") -> list[list[int]]:
        return public_polynomials(ring, seed, 2, label=label).at(slice(0, 8)).T.tolist()

    first, second = values()
    seen = [first, second, *values(Ring.of(Q, 1024))]
    seen += [
        *values(seed=bytes(31) + b"\1"),
        *values(label=b"b"),
        *values(Ring.of(2**40 - 36863, 2048)),
    ]
    assert len({tuple(each) for each in seen}) == len(seen)
    assert all(0 <= value < Q for each in seen for value in each)


def batches(monkeypatch: pytest.MonkeyPatch) -> list[lattice._Batch]:
    """All batches that are begun from now on, kept alive."""
    made: list[lattice._Batch] = []
    begin = lattice._Batch.__init__

    def noting(batch: lattice._Batch, classes: int) -> None:
        begin(batch, classes)
        made.append(batch)

    monkeypatch.setattr(lattice._Batch, "__init__", noting)
    return made


@pytest.mark.parametrize("classes", [1, 4])
def test_each_class_is_made_once_and_the_secret_is_erased_after_the_last(
    classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer(integer_weights(8, 5), classes)
    made = batches(monkeypatch)
    rows = []
    for _ in range(2 * classes):
        masks = layer.make()
        rows += layer.masks(masks)
    assert len(made) == 2
    assert all(not batch._s_N.any() and not any(batch._key) for batch in made)
    assert len({tuple(row) for row in rows}) == 2 * 2048


@pytest.mark.parametrize("classes", [2, 4, 8, 16, 32, 64])
def test_classes_of_one_batch_are_the_rows_of_the_whole_transform(
    classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lattice.secrets, "token_bytes", lambda size: bytes(range(size)))
    whole, parts = Layer(integer_weights(8, 5), 1), Layer(integer_weights(8, 5), classes)
    every = whole.make()
    products, masks = whole.products(every), torch.tensor(whole.masks(every))
    for row_class in range(classes):
        made = parts.make()
        assert parts.products(made) == products[row_class::classes]
        differences = (torch.tensor(parts.masks(made)) - masks[row_class::classes]) % Q
        assert torch.minimum(differences, Q - differences).max() <= 32  # two noises


def test_a_class_that_was_begun_before_is_refused() -> None:
    transform = ClassTransform.of(RING, 4)
    batch = lattice._Batch(4)
    batch.secret(transform, 2)
    with pytest.raises(LatticeError, match="about to be made twice"):
        batch.secret(transform, 2)
    for row_class in (0, 1, 3):
        batch.secret(transform, row_class)
    with pytest.raises(LatticeError, match="about to be made twice"):
        batch.secret(transform, 4)  # there is none


@pytest.mark.parametrize(
    ("memory_rows", "rows"),
    [(10**6, 2048), (4096, 2048), (4095, 1024), (2048, 1024), (64, 32), (63, 32), (0, 32)],
)
def test_two_classes_of_rows_fit_into_the_memory_or_they_are_the_smallest(
    memory_rows: int, rows: int
) -> None:
    shapes = {GROUP: (40, 37), LinearGroup(3, "o", 37, 20): (37, 20)}
    each = sum(row_bytes_in_stock(LATTICE, *shape) for shape in shapes.values())
    assert rows_of_a_class(shapes, memory_rows * each) == rows


def test_secrets_that_are_forgotten_are_erased(monkeypatch: pytest.MonkeyPatch) -> None:
    made = batches(monkeypatch)
    layer = Layer(integer_weights(8, 5), 4)
    layer.make()
    [batch] = made
    assert batch._s_N.any()
    layer.provider.forget()
    assert not batch._s_N.any()
    assert not any(batch._key)
