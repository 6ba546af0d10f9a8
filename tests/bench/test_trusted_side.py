"""A replay worker answers a model of zeros, which passes all checks, and no other model."""

import math
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

from tsqp import LLM, SamplingParams
from tsqp.bench.replay_backend import NAME, ReplayBackend
from tsqp.bench.replay_session import ReplayModel, ReplayProcess
from tsqp.bench.trusted_side import MODES, measure_trusted_side, parse_modes, stocked_rows
from tsqp.bench.trusted_side_figures import Floor, at_depth
from tsqp.bench.trusted_side_table import _cell
from tsqp.bench.zero_model import ZeroCheckpoint
from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.checkpoint.integer_cache import load_integers
from tsqp.errors import HandshakeError, IntegrityError, UsageError
from tsqp.gpu.backends import parse_device
from tsqp.gpu.worker import Worker
from tsqp.gpu.worker_weights import IntegerModel
from tsqp.model.shard import all_shards
from tsqp.runtime import build
from tsqp.runtime.options import Options
from tsqp.runtime.worker_link import WorkerProcess
from tsqp.tee.crypto.freivalds import FailureLimit
from tsqp.tee.crypto.lattice import class_rows

PRIVATE = [mode for mode in MODES if mode != "open"]
MANY = {
    "dtype": "float32",
    "layers": None,
    "gpu": None,
    "prompt_tokens": 5,
    "new_tokens": 3,
    "rounds": 1,
    "threads": 1,
}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Where a replay worker with zeros in the shape of random:tiny listens."""
    worker = ReplayProcess(ZeroCheckpoint.parse("random:tiny"), "float32")
    try:
        worker.await_ready()
        yield worker.endpoint
    finally:
        worker.close()


def test_answers_of_a_replay_worker_pass_the_checks_of_every_mode() -> None:
    given = MANY | {"gpu": "h100-pcie"}
    result = measure_trusted_side("random:tiny", list(MODES), **given)  # type: ignore[arg-type]
    assert result.layers == [2]
    assert not result.is_extrapolated
    for mode, floor in result.floors.items():
        assert floor.calls == (10 if mode == "open" else 9)  # the embedding is the worker's
        assert 0 < floor.prefill_wait_s < floor.prefill_s
        assert 0 < floor.decode_wait_s < floor.decode_s
        assert (floor.masks_cpu_s > 0) == (mode != "open")
    assert result.prediction is not None
    for mode, simulated in result.prediction.simulated.items():  # no call ends before its time
        device = result.prediction.device[mode]
        assert simulated.prefill_s > device.prefill_s > 9 * 18e-6
        assert simulated.decode_s > device.decode_s > 9 * 18e-6


def test_replay_workers_with_shards_answer_together() -> None:
    checkpoint = ZeroCheckpoint.parse("random:tiny")
    with ExitStack() as stack:
        workers = [ReplayProcess(checkpoint, "float32", None, shard) for shard in all_shards(2)]
        for worker in workers:
            stack.callback(worker.close)
            worker.await_ready()
        ends = tuple(worker.endpoint for worker in workers)
        options = Options(privacy="pad", worker=ends, dtype="float32", threads=1, pad_memory=0)
        session = stack.enter_context(ReplayModel(checkpoint, options, shards=2).session(0))
        session.run([1, 2, 3], 2, lambda: None)
        assert session.calls() == 2 * 2 * 9


@pytest.mark.parametrize("field", PRIVATE)
def test_answers_of_a_replay_worker_are_refused_for_other_weights(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replayed(self: WorkerProcess, checkpoint: Checkpoint) -> Worker:
        weights_FD: dict[object, torch.Tensor] = {}
        digest = load_integers(
            checkpoint, lambda group, weights: weights_FD.update({group: weights.weight_FD})
        )
        return Worker(None, IntegerModel(ReplayBackend(), weights_FD, digest), 2**42)  # type: ignore[arg-type]

    monkeypatch.setattr(WorkerProcess, "_inproc_worker", replayed)
    monkeypatch.setattr(build, "process_limit", FailureLimit())
    with (
        LLM("random:tiny", worker="inproc", field=field, threads=1) as llm,
        pytest.raises(IntegrityError, match="wrong product for group qkv of layer 0"),
    ):
        llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=1))


@pytest.mark.parametrize("privacy", ["open", "pad"])
def test_a_session_of_a_real_model_refuses_a_replay_worker(privacy: str, endpoint: str) -> None:
    with pytest.raises(HandshakeError, match="other weights"):
        LLM("random:tiny", worker=endpoint, privacy=privacy, dtype="float32")


def test_no_device_of_a_worker_is_called_replay() -> None:
    with pytest.raises(UsageError, match="no such device"):
        parse_device(NAME)


def test_figures_of_all_layers_lie_on_a_line_through_two_depths() -> None:
    two, four = Floor(*range(1, 10)), Floor(*range(2, 20, 2))
    found = at_depth({2: two, 4: four}, 32)
    assert found == two.extrapolated(2, four, 4, 32) == Floor(*(16.0 * n for n in range(1, 10)))
    assert at_depth({2: two, 4: four}, 4) is four


@pytest.mark.parametrize(
    ("model", "changes", "sentence"),
    [
        ("demo", {}, "give the model as random:NAME"),
        ("random:tiny", {"layers": [1]}, "all 2 layers"),
        ("random:tiny", {"layers": [1, 3]}, "ask for 1 to 2"),
        ("random:tiny", {"prompt_tokens": 600}, "context of 512"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    model: str, changes: dict[str, object], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        measure_trusted_side(model, ["open"], **(MANY | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "tee", "wide,narrow"])
def test_modes_without_a_worker_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--modes takes some of open, wide"):
        parse_modes(text)


def test_a_figure_that_does_not_grow_with_the_layers_is_left_out() -> None:
    two, four = Floor(*range(1, 10)), Floor(0.5, *range(4, 20, 2))
    found = at_depth({2: two, 4: four}, 32)
    assert math.isnan(found.prefill_s)
    assert found.prefill_wait_s == 32.0
    assert _cell(found.prefill_s, 1) == "–"


def test_a_stock_has_masks_for_a_whole_run_in_whole_classes() -> None:
    for rows in range(1, 5000):
        stocked = stocked_rows("lattice", rows)
        for memory_rows in range(stocked, stocked + 3):
            of_a_class = class_rows(memory_rows)
            assert rows <= memory_rows - memory_rows % of_a_class
    assert stocked_rows("wide", 543) == 543
