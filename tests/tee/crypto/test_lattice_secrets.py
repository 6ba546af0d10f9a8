"""The secret of a batch makes each class of rows once, and is erased, whatever happens."""

import gc
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from crypto_helpers import integer_weights, make

from every_opcode import at_every_opcode
from mask_blocks import from_blocks
from tsqp.algebra import ring
from tsqp.algebra.hints import make_hints, public_polynomials
from tsqp.algebra.params import DEGREE, LATTICE
from tsqp.algebra.ring import ClassTransform, Ring
from tsqp.errors import LatticeError, TSQPError
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto import lattice
from tsqp.tee.crypto.lattice import LatticeProvider
from tsqp.tee.crypto.pads import Pads
from tsqp.wire import seeds

QKV, HEAD = LinearGroup(0, "qkv", 3, 5), LinearGroup(None, "lm_head", 4, 5)
ROWS = 32
CLASSES = DEGREE // ROWS
SHAPES = {QKV: (3, 5), HEAD: (4, 5)}
RING = Ring.of(LATTICE.p, DEGREE)
WEIGHTS = {QKV: integer_weights(3, 5).weight_FD, HEAD: integer_weights(4, 5, seed=1).weight_FD}
PUBLIC = public_polynomials(RING, bytes(32), 5)
HINTS = {key: make_hints(PUBLIC, weight_FD) for key, weight_FD in WEIGHTS.items()}


class Batches:
    """All batches that are begun, kept alive, and the classes that secrets were made for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.all: list[lattice._Batch] = []
        self.classes: list[tuple[int, int]] = []
        begin, secret = lattice._Batch.__init__, lattice._Batch.secret

        def noting(batch: lattice._Batch, classes: int) -> None:
            begin(batch, classes)
            self.all.append(batch)

        def noting_class(
            batch: lattice._Batch, transform: ClassTransform, row_class: int
        ) -> np.ndarray:
            self.classes.append((self.all.index(batch), row_class))
            return secret(batch, transform, row_class)

        monkeypatch.setattr(lattice._Batch, "__init__", noting)
        monkeypatch.setattr(lattice._Batch, "secret", noting_class)

    @property
    def alive(self) -> int:
        """Batches whose secret is there."""
        return sum(bool(batch._s_N.any()) or any(batch._key) for batch in self.all)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    return Batches(monkeypatch)


@pytest.fixture
def provider() -> LatticeProvider:
    return LatticeProvider(PUBLIC, HINTS, ClassTransform.of(RING, CLASSES))


def rows_of(made: list[Pads]) -> list[bytes]:
    return [row.tobytes() for pads in made for row in from_blocks(pads.r_ND, 5)]


def test_each_group_and_batch_has_a_secret_of_its_own(
    provider: LatticeProvider, batches: Batches
) -> None:
    for key in (QKV, HEAD, QKV, HEAD):
        make(provider, key, SHAPES[key])
    assert len(batches.all) == 2
    for _ in range(CLASSES - 1):
        make(provider, QKV, SHAPES[QKV])
    assert len(batches.all) == 3
    assert len({bytes(batch._key) for batch in batches.all if any(batch._key)}) == 2
    assert batches.alive == 2  # the first one of QKV has no rows left


def test_no_class_is_made_twice_by_threads_of_which_some_fail(
    provider: LatticeProvider, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    products, calls = lattice.products_of_class, iter(range(10**6))

    def failing(*arguments: object) -> None:
        if next(calls) % 17 == 16:
            raise MemoryError
        products(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(lattice, "products_of_class", failing)

    def try_one(number: int) -> Pads | None:
        key = (QKV, HEAD)[number % 2]
        try:
            return make(provider, key, SHAPES[key])
        except MemoryError:
            return None

    with ThreadPoolExecutor(8) as threads:
        made = [pads for pads in threads.map(try_one, range(600)) if pads is not None]
    assert 400 < len(made) < 600
    assert len(set(batches.classes)) == len(batches.classes) == 600
    rows = rows_of(made)
    assert len(set(rows)) == len(rows)
    provider.forget()
    assert batches.alive == 0


class Buffers:
    """What held secrets or noise while masks were made, by the function that it was given to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: dict[str, list[np.ndarray]] = {}
        self.error: tuple[str, type[BaseException]] | None = None  # where to raise it, and which
        monkeypatch.setattr(seeds, "accept", self._noting("draw", seeds.accept, 0))
        monkeypatch.setattr(ring, "_scale", self._noting("scale", ring._scale, 0, 3))
        products = self._noting("multiply", lattice.products_of_class, 2, 4, 5)
        monkeypatch.setattr(lattice, "products_of_class", products)

    def _noting(self, name: str, function: Callable[..., Any], *places: int) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            found = function(*arguments)
            for place in places:
                array = arguments[place]
                self.seen.setdefault(f"{name} {place}", []).append(array)
                if array.size:
                    assert array.any()  # nothing is erased too early
            if self.error is not None and self.error[0] == name:
                raise self.error[1]
            return found

        return noted


WHERE = ["draw", "scale", "multiply"]


@pytest.mark.parametrize(
    "error",
    [None, *((where, error) for where in WHERE for error in (MemoryError, KeyboardInterrupt))],
)
def test_all_buffers_are_zero_afterwards(
    error: tuple[str, type[BaseException]] | None,
    provider: LatticeProvider,
    batches: Batches,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    buffers = Buffers(monkeypatch)
    buffers.error = error
    if error is None:
        make(provider, QKV, SHAPES[QKV])
    else:
        with pytest.raises(error[1]):
            make(provider, QKV, SHAPES[QKV])
    reached = WHERE if error is None else WHERE[: WHERE.index(error[0]) + 1]
    assert {name.split()[0] for name in buffers.seen} == set(reached)
    for name, arrays in buffers.seen.items():
        assert not any(array.any() for array in arrays), name
    assert batches.alive == (error is None)


def test_secrets_of_other_batches_are_erased_if_the_end_comes_while_one_is_given_up(
    provider: LatticeProvider, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(CLASSES - 1):
        make(provider, QKV, SHAPES[QKV])
    [last] = provider._classes[QKV]
    other = lattice._Batch(CLASSES)
    provider._classes[QKV].appendleft((other, 0))
    end = lattice._Batch.end_class

    def ending(batch: lattice._Batch) -> None:
        if batch is last[0]:
            provider.forget()  # as another thread would, while `other` is in no list
        end(batch)

    monkeypatch.setattr(lattice._Batch, "end_class", ending)
    other._to_end.clear()  # its other classes have been made
    provider._give_up(QKV, last[0])
    assert not provider._classes[QKV]
    assert batches.alive == 0


def test_after_a_failure_the_rest_of_the_batch_is_given_up_and_erased(
    provider: LatticeProvider, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = lattice.products_of_class

    def failing(*arguments: Any) -> None:
        raise MemoryError

    make(provider, QKV, SHAPES[QKV])
    assert batches.alive == 1
    monkeypatch.setattr(lattice, "products_of_class", failing)
    with pytest.raises(MemoryError):
        make(provider, QKV, SHAPES[QKV])
    assert batches.alive == 0
    monkeypatch.setattr(lattice, "products_of_class", products)
    make(provider, QKV, SHAPES[QKV])
    assert len(batches.all) == 2


def test_a_secret_that_was_erased_makes_nothing(
    provider: LatticeProvider, batches: Batches
) -> None:
    make(provider, QKV, SHAPES[QKV])
    batches.all[0].erase()
    with pytest.raises(LatticeError, match="after its end"):
        make(provider, QKV, SHAPES[QKV])


@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
def test_a_forked_process_has_none_of_its_parents_secrets(
    provider: LatticeProvider, batches: Batches
) -> None:
    make(provider, QKV, SHAPES[QKV])
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, f"{batches.alive} left".encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    assert os.read(reader, 100) == b"0 left"
    os.close(reader)
    assert batches.alive == 1


def test_an_exception_at_any_opcode_makes_no_class_twice_and_leaves_no_secret(
    provider: LatticeProvider, batches: Batches
) -> None:
    made: list[Pads] = []

    def run() -> None:
        for _ in range(2):
            made.append(make(provider, QKV, SHAPES[QKV]))

    assert len(list(at_every_opcode(run, lattice, step=3))) > 50
    assert len(set(batches.classes)) == len(batches.classes)
    rows = rows_of(made)
    assert len(set(rows)) == len(rows) > 0
    provider.forget()
    secrets = [batch._s_N for batch in batches.all]
    batches.all.clear()  # what an exception took away unseen ends with the batch
    gc.collect()
    assert not any(secret_N.any() for secret_N in secrets)


def test_no_secret_is_drawn_after_the_end_of_a_session(
    provider: LatticeProvider, batches: Batches
) -> None:
    make(provider, QKV, SHAPES[QKV])
    provider.forget()
    for key in (QKV, HEAD):
        with pytest.raises(TSQPError, match="are gone"):
            make(provider, key, SHAPES[key])
    assert batches.alive == 0
