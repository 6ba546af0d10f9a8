"""Streams, graphs and registered memory of the CUDA backend, with a fake of torch.cuda."""

import pytest
import torch
from fake_cuda import FakeCuda
from torch import Tensor

from tsqp.algebra.params import FIELDS, Field
from tsqp.gpu.backends import cuda_product, product_graphs, registered_memory
from tsqp.gpu.backends.backend import Stream
from tsqp.gpu.backends.cuda import CudaBackend
from tsqp.gpu.backends.product_graphs import MOST_ROWS, bucket_of
from tsqp.gpu.backends.registered_memory import RegisteredMemory

CPU = torch.device("cpu")
WIDE = FIELDS["wide"]


class FakeBackend(CudaBackend):
    """The CUDA backend on a fake device, ready to compute with graphs."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__(CPU)
        self._product = cuda.product
        self.has_graphs = True


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


@pytest.fixture
def backend(cuda: FakeCuda) -> FakeBackend:
    return FakeBackend(cuda)


def weights(seed: int, features: int = 16, width: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, (features, width), generator=generator, dtype=torch.int8)


def rows_of(rows: int, weight_FD: Tensor, field: Field) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    shape = rows, field.residue_bytes * weight_FD.shape[1]
    return torch.randint(0, 120, shape, generator=generator, dtype=torch.uint8)


def is_right(
    backend: FakeBackend, stream: Stream, rows: int, weight_FD: Tensor, field: Field
) -> bool:
    """Whether a call is right."""
    c_TB = rows_of(rows, weight_FD, field)
    expected_TB, z_TB = (
        torch.zeros(rows, field.residue_bytes * len(weight_FD), dtype=torch.uint8) for _ in range(2)
    )
    cuda_product.packed_product(c_TB, weight_FD, field, expected_TB)
    with backend.on(stream):
        backend.residue_product(c_TB, weight_FD, field, z_TB)
    return torch.equal(z_TB, expected_TB)


@pytest.mark.parametrize("field", FIELDS.values(), ids=list(FIELDS))
def test_a_replayed_product_is_the_product(
    field: Field, cuda: FakeCuda, backend: FakeBackend
) -> None:
    stream = backend.open_stream()
    groups = weights(1), weights(2), weights(3, features=8)
    for rows in (1, 3, 4, 2, 1, MOST_ROWS, MOST_ROWS + 1, 4):
        assert all(is_right(backend, stream, rows, weight_FD, field) for weight_FD in groups)
    # Three weights, and buckets of 1, 2, 4 and 64 rows.
    assert cuda.captures == 12
    assert cuda.replays == 3 * 7
    assert cuda.launches == 2 * cuda.captures + 3  # once before each capture, and the large calls


def test_rows_are_rounded_up_to_a_power_of_two() -> None:
    assert [bucket_of(rows) for rows in (1, 2, 3, 4, 5, 8, 33, 64)] == [1, 2, 4, 4, 8, 8, 64, 64]


def test_a_group_that_cannot_be_captured_is_launched_and_said_once(
    cuda: FakeCuda, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.refuses_capture = True
    one, other = weights(1), weights(2)
    first, second = backend.open_stream(), backend.open_stream()
    assert all(is_right(backend, first, 1, weight_FD, WIDE) for weight_FD in (one, one, other))
    cuda.refuses_capture = False
    assert is_right(backend, second, 1, one, WIDE)  # not tried again, in any session
    assert (cuda.captures, cuda.replays) == (0, 0)
    assert is_right(backend, second, 1, weights(3), WIDE)
    assert cuda.captures == 1
    assert caplog.text.count("cannot be captured as a CUDA graph") == 1


def test_a_group_without_memory_for_its_graph_is_tried_again(
    cuda: FakeCuda, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    stream, weight_FD = backend.open_stream(), weights(1)
    cuda.is_full = True
    assert is_right(backend, stream, 1, weight_FD, WIDE)
    cuda.is_full = False
    assert is_right(backend, stream, 1, weight_FD, WIDE)
    assert (cuda.captures, cuda.replays, caplog.text) == (1, 1, "")


@pytest.mark.parametrize("limit", ["MOST_GRAPHS", "MOST_BYTES"])
def test_graphs_and_their_memory_are_bounded(
    limit: str, cuda: FakeCuda, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product_graphs, limit, {"MOST_GRAPHS": 2, "MOST_BYTES": 2 * 160}[limit])
    stream, groups = backend.open_stream(), (weights(1), weights(2))
    for _ in range(2):
        for rows, weight_FD in ((1, groups[0]), (2, groups[0]), (4, groups[1])):
            assert is_right(backend, stream, rows, weight_FD, WIDE)
    assert cuda.captures == {"MOST_GRAPHS": 2, "MOST_BYTES": 1}[limit]


def test_sessions_have_streams_and_static_memory_of_their_own(
    cuda: FakeCuda, backend: FakeBackend
) -> None:
    weight_FD = weights(1)
    sessions = [backend.open_stream() for _ in range(2)]
    for stream in sessions:
        assert is_right(backend, stream, 2, weight_FD, WIDE)
    places = set()
    for stream in sessions:
        static = stream._graphs.static(2, weight_FD, WIDE)  # type: ignore[attr-defined]
        places |= {static.c_TB.data_ptr(), static.z_TB.data_ptr()}
    assert len(places) == 4
    assert sessions[0]._stream is not sessions[1]._stream  # type: ignore[attr-defined]


def test_a_call_ends_with_an_event_and_waits_for_nothing(
    cuda: FakeCuda, backend: FakeBackend
) -> None:
    stream = backend.open_stream()
    assert is_right(backend, stream, 1, weights(1), WIDE)
    completion = stream.completion()
    assert completion is not None
    assert completion.is_done()
    assert completion.compute_ns() == 250_000
    assert stream._stream.waits == 0  # type: ignore[attr-defined]


def test_a_call_that_fails_leaves_nothing_under_way(cuda: FakeCuda, backend: FakeBackend) -> None:
    stream = backend.open_stream()
    with pytest.raises(ValueError, match="bad"), backend.on(stream):
        raise ValueError("bad")
    assert stream._stream.waits == 1  # type: ignore[attr-defined]
    assert is_right(backend, stream, 1, weights(1), WIDE)


def test_memory_is_registered_in_chunks_and_copies_keep_to_them(
    cuda: FakeCuda, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registered_memory, "CHUNK", 100)
    memory = torch.zeros(250, dtype=torch.uint8)
    start = memory.data_ptr()
    registered = RegisteredMemory(memory, CPU)
    assert cuda.registered == {start: 100, start + 100: 100, start + 200: 50}
    assert registered.registered_bytes == 250
    pieces = list(registered.pieces(memory[30:230]))
    assert pieces == [slice(0, 70), slice(70, 170), slice(170, 200)]
    assert list(registered.pieces(memory[100:200])) == [slice(0, 100)]
    assert list(registered.pieces(torch.zeros(500, dtype=torch.uint8))) == [slice(0, 500)]
    registered.unregister()
    registered.unregister()
    assert cuda.registered == {}


def test_copies_across_chunks_are_whole(
    cuda: FakeCuda, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registered_memory, "CHUNK", 100)
    memory = torch.arange(250, dtype=torch.uint8)
    stream = backend.open_stream()
    stream.use_memory(memory)
    with backend.on(stream):
        there = backend.to_device(memory[2:242].view(torch.int16).view(10, 12))
        back = torch.zeros(10, 12, dtype=torch.int16)
        backend.to_host(there, back)
        backend.to_host(there + 1, memory[2:242].view(torch.int16).view(10, 12))
    assert torch.equal(back.view(-1).view(torch.uint8), torch.arange(2, 242, dtype=torch.uint8))
    assert torch.equal(memory[2:242].view(torch.int16), back.view(-1) + 1)


def test_refused_registrations_are_no_error(
    cuda: FakeCuda, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registered_memory, "CHUNK", 100)
    cuda.registrations = 1
    memory = torch.zeros(250, dtype=torch.uint8)
    registered = RegisteredMemory(memory, CPU)
    assert registered.registered_bytes == 100
    assert list(registered.pieces(memory)) == [slice(0, 100), slice(100, 200), slice(200, 250)]
    registered.unregister()
    assert cuda.registered == {}


def test_memory_is_unregistered_after_the_calls_of_its_session(
    cuda: FakeCuda, backend: FakeBackend
) -> None:
    stream = backend.open_stream()
    stream.use_memory(torch.zeros(100, dtype=torch.uint8))
    stream.use_memory(torch.zeros(200, dtype=torch.uint8))
    assert list(cuda.registered.values()) == [200]
    waits = stream._stream.waits  # type: ignore[attr-defined]
    stream.forget_memory()
    assert cuda.registered == {}
    assert stream._stream.waits == waits + 1  # type: ignore[attr-defined]
