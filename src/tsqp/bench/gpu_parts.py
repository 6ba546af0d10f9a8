"""The parts of the CUDA worker, each measured by itself for `scripts/gpu-check`.

python -m tsqp.bench.gpu_parts PART --device cuda|cpu

Prints one JSON object. `works` is true, false, or null if the part needs a GPU; `error` says why.
Times are in µs. Shape suffixes: T tokens; D input and F output features; B bytes of a row.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from tsqp.algebra.params import LATTICE, WIDE, Field
from tsqp.bench.launches import all_launches
from tsqp.gpu.backends.backend import Stream
from tsqp.gpu.backends.cuda import CudaBackend
from tsqp.gpu.backends.cuda_product import packed_product
from tsqp.gpu.backends.product_choice import ResidueProduct, is_exact
from tsqp.gpu.backends.registered_memory import RegisteredMemory
from tsqp.wire.shm import SealedSegment

SIDE, SIDE_ON_CPU = 4096, 512  # features of the weight, [SIDE, SIDE]
ROWS, ROWS_ON_CPU = (1, 16, 512), (1, 16)
SEGMENT = 64 * 2**20
COPIED = 16 * 2**20
TIMES = 30  # measurements of which the median counts
OVERLAPPED = 16  # calls of each of two sessions

Figures = dict[str, float]


class NeedsGpu(Exception):
    """The part cannot be tried here."""


class Failed(Exception):
    """The part does not work; the message says why."""


def library(device: torch.device, *, in_bfloat16: bool) -> Figures:
    """The product through library calls."""
    return _product_figures(partial(packed_product, in_bfloat16=in_bfloat16), device)


def triton(device: torch.device, *, in_bfloat16: bool) -> Figures:
    """The product in one launch of Triton."""
    _need_gpu(device)
    try:
        from tsqp.gpu.backends import triton_product
    except ImportError:
        raise Failed("Triton is not installed") from None
    floats = triton_product.BFLOAT16 if in_bfloat16 else None
    product = partial(triton_product.residue_product, floats=floats)
    return _product_figures(product, device)


def _product_figures(product: ResidueProduct, device: torch.device) -> Figures:
    if not is_exact(product, device):
        raise Failed("its products are wrong")
    on_gpu = device.type == "cuda"
    weight_FD = _weight(SIDE if on_gpu else SIDE_ON_CPU, device)
    found = {}
    for field in (WIDE, LATTICE):
        for rows in ROWS if on_gpu else ROWS_ON_CPU:
            c_TB, z_TB = (_rows(rows, weight_FD, field, device) for _ in range(2))
            call = partial(product, c_TB, weight_FD, field, z_TB)
            found[f"{field.name}_{rows}_us"] = _us(call, device, times=TIMES if on_gpu else 3)
    return found


def graphs(device: torch.device) -> Figures:
    """One row from shared memory to shared memory: launched or a graph, registered or not."""
    backend = _backend(device)
    if not backend.has_graphs:
        raise Failed("products cannot be captured as graphs, or are wrong; the log says why")
    weight_FD = _weight(SIDE, device)
    found = {}
    with _shared_memory() as memory:
        c_TB, z_TB = (part.view(1, -1) for part in memory[: 2 * 4 * SIDE].view(2, -1))
        for name, has_graphs in (("launched", False), ("graph", True)):
            stream = backend.open_stream(with_graphs=has_graphs)
            call = partial(_call, backend, stream, c_TB, weight_FD, z_TB)
            found[f"{name}_us"] = _us(call, device)
            stream.use_memory(memory)
            found[f"{name}_registered_us"] = _us(call, device)
            stream.forget_memory()
    return found


def registration(device: torch.device) -> Figures:
    """Copies of shared memory, registered or not, in GB a second."""
    _need_gpu(device)
    there = torch.empty(COPIED, dtype=torch.uint8, device=device)
    found = {}
    with _shared_memory() as memory:
        here = memory[:COPIED]
        for name in ("plain", "registered"):
            registered = RegisteredMemory(memory, device) if name == "registered" else None
            if registered is not None and registered.registered_bytes < SEGMENT:
                done = registered.registered_bytes
                registered.unregister()
                raise Failed(f"the driver registers {done} of {SEGMENT} bytes")
            for way, copy in (
                ("to", lambda: there.copy_(here, non_blocking=True)),
                ("from", lambda: here.copy_(there, non_blocking=True)),
            ):
                found[f"{name}_{way}_gb_s"] = COPIED / 1e3 / _us(copy, device)
            if registered is not None:
                registered.unregister()
    return found


def overlap(device: torch.device) -> Figures:
    """Calls of 64 rows of two sessions: one after the other, and begun in turn."""
    backend = _backend(device)
    weight_FD = _weight(SIDE, device)
    with _shared_memory() as memory:
        size = 64 * 4 * SIDE
        streams = [backend.open_stream() for _ in range(2)]
        calls = []
        for number, stream in enumerate(streams):
            part = memory[2 * number * size : 2 * (number + 1) * size].view(2, 64, -1)
            stream.use_memory(part.view(-1))
            calls.append(partial(_begin, backend, stream, part[0], weight_FD, part[1]))
        in_turn = _us(lambda: [call().wait() for _ in range(OVERLAPPED) for call in calls], device)
        begun = _us(
            lambda: [each.wait() for each in [c() for _ in range(OVERLAPPED) for c in calls]],
            device,
        )
        for stream in streams:
            stream.forget_memory()
    return {"in_turn_us": in_turn, "overlapped_us": begun}


def launches(device: torch.device) -> Figures:
    """Operators that compute, counted on a CPU."""
    return {name: float(number) for name, number in all_launches().items()}


PARTS: dict[str, Callable[[torch.device], Figures]] = {
    "library-int8": partial(library, in_bfloat16=False),
    "library-bfloat16": partial(library, in_bfloat16=True),
    "triton-int8": partial(triton, in_bfloat16=False),
    "triton-bfloat16": partial(triton, in_bfloat16=True),
    "graphs": graphs,
    "registration": registration,
    "overlap": overlap,
    "launches": launches,
}


def measure(part: str, device: torch.device) -> dict[str, Any]:
    """The result of one part, whatever happens in it."""
    try:
        with torch.inference_mode(part != "launches"):
            return {"part": part, "works": True, "error": None, "figures": PARTS[part](device)}
    except NeedsGpu:
        return {"part": part, "works": None, "error": "needs a CUDA device", "figures": {}}
    except Exception as exc:
        text = str(exc) if isinstance(exc, Failed) else f"{type(exc).__name__}: {exc}"
        return {"part": part, "works": False, "error": text[:1000], "figures": {}}


def _need_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise NeedsGpu


def _backend(device: torch.device) -> CudaBackend:
    _need_gpu(device)
    backend = CudaBackend(device)
    backend.prepare()
    return backend


def _begin(
    backend: CudaBackend, stream: Stream, c_TB: Tensor, weight_FD: Tensor, z_TB: Tensor
) -> Any:
    with backend.on(stream):
        backend.residue_product(c_TB, weight_FD, WIDE, z_TB)
        return stream.completion()


def _call(
    backend: CudaBackend, stream: Stream, c_TB: Tensor, weight_FD: Tensor, z_TB: Tensor
) -> None:
    _begin(backend, stream, c_TB, weight_FD, z_TB).wait()


def _weight(side: int, device: torch.device) -> Tensor:
    return torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device)


def _rows(rows: int, weight_FD: Tensor, field: Field, device: torch.device) -> Tensor:
    size = field.residue_bytes * len(weight_FD)
    return torch.randint(0, 120, (rows, size), dtype=torch.uint8, device=device)


@contextmanager
def _shared_memory() -> Iterator[Tensor]:
    """Zeros in a segment such as a worker makes, which must not be registered at the end."""
    segment = SealedSegment.create(SEGMENT)
    try:
        yield segment.tensor(0, (segment.size,), torch.uint8)
    finally:
        segment.close()


def _us(call: Callable[[], object], device: torch.device, times: int = TIMES) -> float:
    """The median time of a call and of waiting for the device."""
    found = []
    for _ in range(times + 3):
        began = perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(1e6 * (perf_counter() - began))
    return median(found[3:])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one part; exits with status 1 if it does not work."""
    parser = argparse.ArgumentParser(prog="tsqp.bench.gpu_parts", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args(arguments)
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    result = measure(options.part, device)
    print(json.dumps(result))
    sys.exit(result["works"] is False)


if __name__ == "__main__":
    main()
