"""`tsqp bench kernels`: the TEE's cost per element, on one core.

Shape suffixes: T tokens; D input and F output features of a group; B bytes of a row.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from tsqp.algebra import residue_bytes
from tsqp.algebra.hints import Polynomials
from tsqp.algebra.int8_product import residue_product
from tsqp.algebra.params import DEGREE, FIELDS, LATTICE, Field
from tsqp.algebra.residue_blocks import BLOCK
from tsqp.algebra.ring import ClassTransform, Ring, products_of_class, work_space
from tsqp.bench.figures import Figure
from tsqp.bench.hardware_limits import copy_bytes_per_s, int8_ops
from tsqp.bench.host import describe_machine
from tsqp.bench.numbers import parse_numbers
from tsqp.bench.output import new_table, show
from tsqp.bench.timing import seconds
from tsqp.checkpoint.quantize import IntegerWeights
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto.lattice import NO_NOISE
from tsqp.tee.crypto.pad_providers import DirectProvider, PadProvider
from tsqp.tee.crypto.pads import Pads, empty_rows, row_bytes_in_stock
from tsqp.tee.crypto.rng import uniform
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.offload.lattice_load import LatticeLoad
from tsqp.tee.offload.masked import BLOCK_ROWS, Group, MaskedGroup

# The goals for one input and one output element, both checks included.
TARGET_NS = {"wide": 1.5, "compact": 1.5, "lattice": 2.0}
LATTICE_TARGET_ELEMENT_NS = 2.8  # the goal for one element of a lattice mask, noise included
SHAPES = {  # (F, D) of SmolLM2-135M
    "qkv": (960, 576),
    "o": (576, 576),
    "gate_up": (3072, 576),
    "down": (576, 1536),
}
TOKENS = (1, 64, 512)
WIDE_TOKENS = (64,)
WIDEST = 8192
PLAIN_DTYPES = (torch.float32, torch.bfloat16)
ROUNDS = 5  # each measures every case once, so that other load affects all cases alike


@dataclass(frozen=True, slots=True)
class KernelFigures:
    """Times for one group, one field and one number of tokens.

    Attributes:
        mask_ns: masking, per input element: [P2], [P5] and the right side of [P7].
        unmask_ns: unmasking, per output element: [P5], [P7] with both vectors, and [P3].
        pair_ns: mask_ns + unmask_ns; the goals are TARGET_NS.
        random_ns: drawing one uniform residue.
        pad_row_us: making one pad [P4], or one row of lattice masks [P11].
        pad_element_ns: pad_row_us divided by the number of input and output elements.
        pad_product_ps: making one pad, without its random residues, divided by the number of int8
            multiply-adds. None for lattice masks, which need no such products.
        float32_us, bfloat16_us: the plain product of one token, as the TEE would compute it itself.
    """

    field: str
    group: str
    features: int
    width: int
    tokens: int
    mask_ns: Figure
    unmask_ns: Figure
    pair_ns: Figure
    random_ns: Figure
    pad_row_us: Figure
    pad_element_ns: Figure
    pad_product_ps: Figure | None
    float32_us: Figure
    bfloat16_us: Figure


@dataclass(frozen=True, slots=True)
class KernelResult:
    """The figures of all cases, and the best rates of one core.

    Attributes:
        target_ns: the goal of `pair_ns`, by field.
        lattice_target_element_ns: the goal of `pad_element_ns` in the lattice field.
        transform_ns: the floor of lattice masks, see `transform_floor`.
    """

    kernels: list[KernelFigures]
    target_ns: dict[str, float]
    lattice_target_element_ns: float
    transform_ns: dict[str, float]
    copy_ns_per_residue: float
    int8_product_ps: float
    machine: dict[str, str]

    def as_json(self) -> dict[str, object]:
        """Ready for JSON."""
        return asdict(self)


def parse_widths(text: str) -> dict[str, tuple[int, int]]:
    """The shapes (F, D) of widths such as "576,2048": F = D and F = 4D for each.

    Raises:
        UsageError: a width is not from 1 to 8192.
    """
    widths = parse_numbers(text, "--widths", WIDEST)
    return {f"{n}x{width}": (n * width, width) for width in widths for n in (1, 4)}


def measure_kernels(
    shapes: Mapping[str, tuple[int, int]] | None = None, tokens: Sequence[int] | None = None
) -> KernelResult:
    """Measure all fields, shapes and numbers of tokens, on one thread.

    Args:
        shapes: (F, D) by name; the default is those of SmolLM2-135M.
        tokens: numbers of tokens; the default is TOKENS.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        kernels: list[KernelFigures] = []
        for name, shape in (shapes or SHAPES).items():  # one at a time, to bound the memory
            linear, weights = LinearGroup(0, name, *shape), _Weights(*shape)
            cases = [
                _Case(field, linear, weights, count)
                for field in FIELDS.values()
                for count in tokens or TOKENS
            ]
            for _ in range(ROUNDS):
                for case in cases:
                    case.measure()
            kernels += [case.figures() for case in cases]
        return KernelResult(
            kernels=kernels,
            target_ns=dict(TARGET_NS),
            lattice_target_element_ns=LATTICE_TARGET_ELEMENT_NS,
            transform_ns=transform_floor(),
            copy_ns_per_residue=1e9 * 4 / copy_bytes_per_s(),
            int8_product_ps=1e12 * 2 / int8_ops(),
            machine=describe_machine(),
        )
    finally:
        torch.set_num_threads(threads)


def transform_floor() -> dict[str, float]:
    """Nanoseconds of the transform for one element of one block, all of it in the cache.

    Returns:
        without_noise: as for products of masks.
        with_noise: as for masks, without the time to draw the bits of the noise.
    """
    transform = ClassTransform.of(Ring.of(LATTICE.p, DEGREE))
    rows, block = transform.rows, Polynomials.empty(DEGREE, BLOCK)
    work_MB, out_GRW = work_space(rows), empty_rows(rows, BLOCK, LATTICE)
    secret_N, places_M = transform.secret(np.ones(DEGREE, np.int64), 0), np.arange(rows)
    noises = {
        "without_noise": NO_NOISE,
        "with_noise": np.ones((1, rows, BLOCK), np.uint32),
    }
    return {
        name: 1e9
        * seconds(
            lambda noise_GMB=noise_GMB: products_of_class(  # type: ignore[misc]
                block.low_GNB, block.high_GNB, secret_N, transform, noise_GMB, work_MB, out_GRW,
                places_M, 0, 1,
            )
        )
        / (rows * BLOCK)
        for name, noise_GMB in noises.items()
    }  # fmt: skip


def tables(result: KernelResult) -> Iterator[Table]:
    """One row for each case."""
    table = new_table(
        "Trusted loops on one core",
        "field", "group", "D → F", "tokens", "mask, ns", "unmask, ns", "both, ns", "random, ns",
        "a pad, µs", "an element, ns", "product, ps", "float32, µs", "bfloat16, µs",
    )  # fmt: skip
    for k in result.kernels:
        table.add_row(
            k.field, k.group, f"{k.width} → {k.features}", str(k.tokens),
            f"{k.mask_ns.median:.2f}", f"{k.unmask_ns.median:.2f}", show(k.pair_ns, 2),
            f"{k.random_ns.median:.2f}", f"{k.pad_row_us.median:.1f}",
            f"{k.pad_element_ns.median:.2f}",
            "" if k.pad_product_ps is None else f"{k.pad_product_ps.median:.2f}",
            f"{k.float32_us.median:.1f}", f"{k.bfloat16_us.median:.1f}",
        )  # fmt: skip
    yield table


def notes(result: KernelResult) -> Iterator[str]:
    """The limits of the hardware."""
    yield (
        "Both: one input and one output element, including checks; the target is at most "
        f"{result.target_ns['wide']} ns, and {result.target_ns['lattice']} ns in the lattice "
        "field. An element of a lattice mask is to take at most "
        f"{result.lattice_target_element_ns} ns; one block of the transform in the cache takes "
        f"{result.transform_ns['with_noise']:.2f} ns, and "
        f"{result.transform_ns['without_noise']:.2f} ns without noise. One core copies a residue "
        f"of 4 bytes in {result.copy_ns_per_residue:.2f} ns and multiplies and adds two int8 in "
        f"{result.int8_product_ps:.2f} ps at best. float32, bfloat16: the product of the "
        "layer for one token, without masks, as the TEE would compute it itself."
    )


class _Weights:
    """Random weights of one shape, for all fields."""

    def __init__(self, features: int, width: int) -> None:
        generator = torch.Generator().manual_seed(features * width)
        shape = features, width
        self.weight_FD = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        self.float_FD = {dtype: self.weight_FD.to(dtype) for dtype in PLAIN_DTYPES}


class _Layer:
    """One group with random inputs and the right answer to them."""

    def __init__(self, field: Field, linear: LinearGroup, weight_FD: Tensor, x_TD: Tensor) -> None:
        tokens, (features, width) = len(x_TD), linear.shape
        shape = features, width
        integers = IntegerWeights(weight_FD, torch.ones(features))
        self.group: Group[Any]
        if field is LATTICE:
            load = LatticeLoad({linear: shape}, {})
            load.add(linear, integers)
            self.group = load.groups[0][0][linear]
            memory = 2 * DEGREE * row_bytes_in_stock(field, *shape)  # whole batches
            self.provider: PadProvider = load.provider(memory)
        else:
            self.group = MaskedGroup(linear, integers, None, field)
            self.provider = DirectProvider({linear: weight_FD}, field)
        self.pads_made = self.provider.rows_made(linear, tokens)
        self.made = Pads.empty(self.pads_made, width, features, field)
        self.place = list(range(self.pads_made))
        self.provider.make(linear, self.made, self.place)
        self._x_TD = x_TD
        self._c_TB = torch.empty(tokens, width * field.residue_bytes, dtype=torch.uint8)
        # As in a real call: blocks of rows, of which the last may be shorter.
        starts = range(0, tokens, BLOCK_ROWS)
        self._blocks = [slice(first, min(first + BLOCK_ROWS, tokens)) for first in starts]
        self._pads = [self.made.copy(block) for block in self._blocks]
        self._one_thread = RowPool(1)
        self._masked = self.mask()
        self._z_TB = _answer(self._c_TB, weight_FD, field)

    def mask(self) -> list[Any]:
        blocks = zip(self._blocks, self._pads, strict=True)
        return [
            self.group.mask(self._x_TD[b], pads.r_ND, self._c_TB[b], self._one_thread)
            for b, pads in blocks
        ]

    def unmask(self) -> None:
        z_TB, rows = self._z_TB, self._one_thread
        y_TF = torch.empty(len(z_TB), self.group.features)
        for b, pads, masked in zip(self._blocks, self._pads, self._masked, strict=True):
            self.group.check_and_unmask(z_TB[b], pads.u_NF, masked, y_TF[b], "The worker", rows)


def _answer(c_TB: Tensor, weight_FD: Tensor, field: Field) -> Tensor:
    """Wq · c mod p, as bytes."""
    (tokens, _), (features, width) = c_TB.shape, weight_FD.shape
    c_TD = torch.from_numpy(np.empty((tokens, width), field.dtype))
    z_TF = torch.empty(tokens, features, dtype=c_TD.dtype)
    z_TB = torch.empty(tokens, features * field.residue_bytes, dtype=torch.uint8)
    residue_bytes.unpack(c_TB.numpy(), field, c_TD.numpy())
    residue_product(c_TD, weight_FD, field, z_TF)
    residue_bytes.pack(z_TF.numpy(), field, z_TB.numpy())
    return z_TB


class _Case:
    """One field, group and number of tokens, with the samples measured so far."""

    def __init__(self, field: Field, linear: LinearGroup, weights: _Weights, tokens: int) -> None:
        generator = torch.Generator().manual_seed(tokens)
        x_TD = torch.randn(tokens, linear.shape[1], generator=generator)
        self._field, self._linear, self._tokens = field, linear, tokens
        self._layer = _Layer(field, linear, weights.weight_FD, x_TD)
        self._plain = {
            dtype: partial(torch.nn.functional.linear, x_TD.to(dtype), float_FD)
            for dtype, float_FD in weights.float_FD.items()
        }
        self._measured: dict[str, list[float]] = defaultdict(list)

    def measure(self) -> None:
        """Take one more sample of each time."""
        layer, tokens, (features, width) = self._layer, self._tokens, self._linear.shape
        mask_ns = 1e9 * seconds(layer.mask) / (tokens * width)
        unmask_ns = 1e9 * seconds(layer.unmask) / (tokens * features)
        random_s = seconds(partial(uniform, (tokens, width), self._field))
        pads_s = seconds(partial(layer.provider.make, self._linear, layer.made, layer.place))
        made = layer.pads_made
        products = tokens * features * width * self._field.digits
        measured = {
            "mask_ns": mask_ns,
            "unmask_ns": unmask_ns,
            "pair_ns": mask_ns + unmask_ns,
            "random_ns": 1e9 * random_s / (tokens * width),
            "pad_row_us": 1e6 * pads_s / made,
            "pad_element_ns": 1e9 * pads_s / (made * (features + width)),
        }
        for dtype, product in self._plain.items():
            measured[f"{str(dtype).removeprefix('torch.')}_us"] = 1e6 * seconds(product) / tokens
        if self._field is not LATTICE:
            measured["pad_product_ps"] = 1e12 * (pads_s - random_s) / products
        for name, value in measured.items():
            self._measured[name].append(value)

    def figures(self) -> KernelFigures:
        figures = {name: Figure.of(values) for name, values in self._measured.items()}
        product_ps = figures.pop("pad_product_ps", None)
        return KernelFigures(
            field=self._field.name,
            group=self._linear.name,
            features=self._linear.features,
            width=self._linear.width,
            tokens=self._tokens,
            pad_product_ps=product_ps,
            **figures,
        )
