"""How much memory pads and lattice masks take without `--pad-memory`, and what is said about it."""

import logging
from collections.abc import Iterator

import pytest

from tsqp import LLM
from tsqp.algebra.params import DEGREE, LATTICE, WIDE, Field
from tsqp.checkpoint.random_weights import GEOMETRIES
from tsqp.errors import OutOfMemory
from tsqp.model.config import linear_groups
from tsqp.runtime import build, field_auto
from tsqp.runtime import pad_memory as pad_memory_module
from tsqp.runtime.pad_memory import pad_memory
from tsqp.tee.crypto.pad_pool import PadPool
from tsqp.tee.offload.field_choice import MaskCosts

SHAPES = {group: group.shape for group in linear_groups(GEOMETRIES["tiny"])}
# Of random:tiny: 6 bytes for each input and output, none of which needs rounding up to 32.
LATTICE_ROW = 6 * (2 * (64 + 128 + 64 + 64 + 64 + 256 + 128 + 64) + 64 + 512)
WHOLE = 2 * DEGREE * LATTICE_ROW


def set_free(monkeypatch: pytest.MonkeyPatch, *free: int) -> None:
    """Say that this many bytes are free: the next at each question, and the last for ever."""
    left: Iterator[int] = iter(free)
    monkeypatch.setattr(pad_memory_module, "available_bytes", lambda: next(left, free[-1]))


def test_lattice_masks_take_the_whole_stock_or_a_quarter_of_the_free_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for free, expected in ((5 * WHOLE, WHOLE), (4 * WHOLE - 4, WHOLE - 1), (400, 100), (0, 0)):
        set_free(monkeypatch, free)
        assert pad_memory(None, LATTICE, SHAPES) == expected
    set_free(monkeypatch, 2 * WHOLE)
    assert pad_memory(None, LATTICE, SHAPES, to_read=WHOLE) == WHOLE // 4
    assert pad_memory(None, LATTICE, SHAPES, to_read=3 * WHOLE) == 0


def test_pads_take_two_gibibytes_or_a_quarter_of_the_free_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for free, expected in ((2**40, 2**31), (2**30, 2**28)):
        set_free(monkeypatch, free)
        assert pad_memory(None, WIDE, SHAPES) == expected


@pytest.mark.parametrize("field", [LATTICE, WIDE], ids=lambda field: field.name)
def test_a_wanted_number_of_bytes_is_taken_or_refused(field: Field) -> None:
    assert pad_memory(12345, field, SHAPES) == 12345
    with pytest.raises(OutOfMemory, match="choose a smaller --pad-memory"):
        pad_memory(2**60, field, SHAPES)


def stocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of the stocks that are begun from now on."""
    found, begin = [], PadPool.__init__

    def noted(pool: PadPool, provider: object, shapes: object, memory_bytes: int) -> None:
        found.append(memory_bytes)
        begin(pool, provider, shapes, 0)  # type: ignore[arg-type]  # no masks are made here

    monkeypatch.setattr(PadPool, "__init__", noted)
    return found


def test_a_stock_that_memory_limits_is_told_with_its_rows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = stocks(monkeypatch)
    for free, wanted in ((WHOLE, None), (5 * WHOLE, None), (WHOLE, 2**20)):
        set_free(monkeypatch, free)
        with caplog.at_level(logging.INFO, "tsqp"):
            LLM("random:tiny", worker="inproc", field="lattice", pad_memory=wanted).close()
        limited = free == WHOLE and wanted is None
        told = f"{WHOLE // 4} bytes, so 512 rows are made at once"
        assert (told in caplog.text) is limited
        assert ("the stock of lattice masks" in caplog.text) is limited
        caplog.clear()
    assert found == [WHOLE // 4, WHOLE, 2**20]


def test_auto_plans_with_the_stock_that_it_then_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[int] = []
    found = stocks(monkeypatch)

    def costs(_: object, pad_memory: int) -> MaskCosts:
        planned.append(pad_memory)
        return MaskCosts(2, 0, 1, 0)

    monkeypatch.setattr(field_auto, "measure_costs", costs)
    needed = build.trusted_bytes(GEOMETRIES["tiny"], build.torch.float32, "pad", lattice=True)
    set_free(monkeypatch, needed + WHOLE, WHOLE // 2)  # more is taken than was expected
    LLM("random:tiny", worker="inproc", field="auto").close()
    assert planned == found == [WHOLE // 4]
