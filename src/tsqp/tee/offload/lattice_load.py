"""Makes what lattice masks need from a model's integer weights, which are not kept.

Shape suffixes: F output and D input features of a group.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from tsqp.algebra import digits, rejection, ring
from tsqp.algebra.hints import Polynomials, make_hints, public_polynomials
from tsqp.algebra.params import DEGREE, LATTICE
from tsqp.algebra.ring import ClassTransform, Ring
from tsqp.checkpoint.quantize import IntegerWeights
from tsqp.model.linear_group import LinearGroup
from tsqp.model.shard import all_shards
from tsqp.tee.crypto import hint_checks, lattice_kernels
from tsqp.tee.crypto.hint_checks import check_hints, fresh_seed
from tsqp.tee.crypto.lattice import LatticeProvider, rows_of_a_class
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.offload.lattice_group import LatticeGroup

Find = Callable[[LinearGroup, Polynomials], Polynomials]


class LatticeLoad:
    """Check vectors and hints of each group [P10], [P13].

    Args:
        shapes: (F, D) of each group.
        biases_F: of the groups that have one.
        seed: public, of hints that were made before; by default a fresh one.
        find: finds the hints of a group, which are then checked; by default they are made here.
        row_pool: its threads check the hints.
        workers: for how many workers of each shard check vectors are drawn, each with its own.
        shards: how many shards there are.

    Attributes:
        groups: those that were added: for each shard, one mapping for each worker.
        hints: of these groups.
        seed: public.
    """

    def __init__(
        self,
        shapes: Mapping[LinearGroup, tuple[int, int]],
        biases_F: Mapping[LinearGroup, Tensor],
        *,
        seed: bytes | None = None,
        find: Find | None = None,
        workers: int = 1,
        shards: int = 1,
        row_pool: RowPool | None = None,
    ) -> None:
        self._shapes = dict(shapes)
        self._biases_F = biases_F
        self._ring = Ring.of(LATTICE.p, DEGREE)
        widest = max(width for _, width in shapes.values())
        self._find = find
        self._row_pool = RowPool(1) if row_pool is None else row_pool
        self.seed = fresh_seed() if seed is None else seed
        self._public = public_polynomials(self._ring, self.seed, widest)
        self.hints: dict[LinearGroup, Polynomials] = {}
        self.groups: list[list[dict[LinearGroup, LatticeGroup]]] = [
            [{} for _ in range(workers)] for _ in range(shards)
        ]

    def add(self, linear: LinearGroup, weights: IntegerWeights, find: Find | None = None) -> None:
        """Take what is needed of one group; what counts is the last call for it.

        Args:
            find: instead of the one that was given at first.

        Raises:
            UnsupportedModel: the field is too small for these weights.
            HintsError: the hints that were found do not belong to these weights.
        """
        first = LatticeGroup(linear, weights, self._biases_F.get(linear))
        weight_FD = weights.weight_FD
        for shard, sets in zip(all_shards(len(self.groups)), self.groups, strict=True):
            for number, groups in enumerate(sets):
                if not shard.is_whole:
                    groups[linear] = first.of_rows(shard.rows_of(linear), weight_FD)
                else:
                    groups[linear] = first.with_own_checks(weight_FD) if number else first
        find = find or self._find
        if find is None:
            self.hints[linear] = make_hints(self._public, weights.weight_FD)
        else:
            hints = find(linear, self._public)
            check_hints(hints, self._public, weights.weight_FD, str(linear), self._row_pool)
            self.hints[linear] = hints

    def provider(self, memory_bytes: int) -> LatticeProvider:
        """Masks for all groups, in batches that suit a stock of this many bytes [P14]."""
        rows = rows_of_a_class(self._shapes, memory_bytes)
        transform = ClassTransform.of(self._ring, DEGREE // rows)
        return LatticeProvider(self._public, self.hints, transform)


def compile_lattice_loops() -> None:
    """Compile the loops of lattice masks, which would otherwise be done while somebody waits."""
    lattice_kernels.compile_loops()
    hint_checks.compile_loops()
    ring.compile_loops()
    digits.compile_loops(LATTICE)
    rejection.compile_loops(LATTICE)
