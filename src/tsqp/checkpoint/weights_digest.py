"""A digest of the tensors that a worker may hold. It does not depend on the file format.

It covers every tensor of the model, including norms as they are stored, because a worker that runs
whole layers holds all of them.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from tsqp.checkpoint.blocks import read_blocks
from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.checkpoint.files import bytes_of
from tsqp.checkpoint.progress import Counter, Progress, silent
from tsqp.model.config import tensor_shapes

SMALL_BYTES = 2**16  # hashed sooner than another thread has taken it


class TensorHash:
    """SHA-256 of one tensor, whose rows may be added block by block.

    It covers the Hugging Face name, shape, dtype and little-endian bytes.
    """

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.name = name
        head = json.dumps([name, list(shape), str(dtype).removeprefix("torch.")])
        self._hash = hashlib.sha256(head.encode() + b"\n")

    def update(self, rows: Tensor) -> None:
        """Add the next rows, contiguous and on the CPU."""
        self._hash.update(bytes_of(rows))

    def digest(self) -> bytes:
        return self._hash.digest()


@contextmanager
def hashing(found: TensorHash | None) -> Iterator[Callable[[Tensor], None]]:
    """Hash blocks of rows on another thread while the caller continues with the next block.

    Yields:
        a function that takes the next rows, which must not change afterwards. Without `found`,
        nothing is hashed. At the end of the `with` block all rows have been hashed.
    """
    if found is None:
        yield lambda rows: None
        return
    last: Future[None] | None = None

    def update(rows: Tensor) -> None:
        nonlocal last
        if last is not None:
            last.result()  # one block waits at most
        elif rows.nbytes < SMALL_BYTES:
            found.update(rows)
            return
        last = pool.submit(found.update, rows)

    with ThreadPoolExecutor(1) as pool:
        yield update
        if last is not None:
            last.result()


class WeightsDigest:
    """SHA-256 over the tensors' own SHA-256s in the order of their names.

    The result therefore does not depend on the order of updates or on the fusing of layers.
    """

    def __init__(self) -> None:
        self._hashes: dict[str, bytes] = {}

    def update(self, name: str, tensor: Tensor) -> None:
        """Add one tensor, contiguous and on the CPU. A repeated name counts once."""
        if name in self:  # a tied output projection is the embedding
            return
        found = TensorHash(name, tuple(tensor.shape), tensor.dtype)
        found.update(tensor)
        self.add(found)

    def add(self, found: TensorHash) -> None:
        """Add one tensor that has been hashed completely. A repeated name counts once."""
        self._hashes.setdefault(found.name, found.digest())

    def __contains__(self, name: str) -> bool:
        return name in self._hashes

    def hexdigest(self) -> str:
        """The digest of all tensors added so far: 64 hexadecimal digits."""
        return hashlib.sha256(b"".join(h for _, h in sorted(self._hashes.items()))).hexdigest()


def weights_digest(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    threads: int = 2,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    digest: WeightsDigest | None = None,
    progress: Progress = silent,
) -> str:
    """The digest of a model's tensors, converted to `dtype`.

    Each thread holds one block of rows at a time.

    Args:
        shapes: shapes of the tensors by name; None for all tensors of the model.
        digest: a digest of tensors that were read already; they are not read again.
        progress: called with the bytes done and their total.

    Raises:
        CheckpointError: a tensor is missing, cut short, of another shape, or not finite.
    """
    digest = WeightsDigest() if digest is None else digest

    def add(item: tuple[str, tuple[int, ...]]) -> int:
        name, shape = item
        if name not in digest:
            found = TensorHash(name, shape, dtype)
            for _, rows in read_blocks(checkpoint, name, shape, dtype):
                found.update(rows)
            digest.add(found)
        return math.prod(shape) * dtype.itemsize

    shapes = tensor_shapes(checkpoint.config) if shapes is None else shapes
    done = Counter(sum(map(math.prod, shapes.values())) * dtype.itemsize, progress)
    with ThreadPoolExecutor(threads) as pool:
        for nbytes in pool.map(add, shapes.items()):
            done.add(nbytes)
    return digest.hexdigest()
