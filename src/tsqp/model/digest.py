"""A digest of what a worker may hold, the same for every file format of the same numbers.

It covers every tensor of the model, norms as they are stored: a worker that runs whole layers
holds them all.
"""

import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from tsqp.model.blocks import read_blocks
from tsqp.model.checkpoint import Checkpoint
from tsqp.model.config import tensor_shapes
from tsqp.model.files import bytes_of
from tsqp.model.progress import Counter, Progress, silent


class TensorHash:
    """SHA-256 of one tensor, whose rows may come block by block.

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


class WeightsDigest:
    """SHA-256 over the tensors' own SHA-256s in the order of their names.

    So the order of the updates and the fusing of layers do not matter.
    """

    def __init__(self) -> None:
        self._hashes: dict[str, bytes] = {}

    def update(self, name: str, tensor: Tensor) -> None:
        """Add one tensor, contiguous and on the CPU; a name that was seen counts once."""
        if name in self:  # a tied output projection is the embedding
            return
        found = TensorHash(name, tuple(tensor.shape), tensor.dtype)
        found.update(tensor)
        self.add(found)

    def add(self, found: TensorHash) -> None:
        """Add one tensor that has been hashed as a whole; a name that was seen counts once."""
        self._hashes.setdefault(found.name, found.digest())

    def __contains__(self, name: str) -> bool:
        return name in self._hashes

    def hexdigest(self) -> str:
        """The digest of what was added so far: 64 hexadecimal digits."""
        return hashlib.sha256(b"".join(h for _, h in sorted(self._hashes.items()))).hexdigest()


def weights_digest(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    threads: int = 2,
    *,
    digest: WeightsDigest | None = None,
    progress: Progress = silent,
) -> str:
    """The digest of all tensors of a model, converted to `dtype`.

    Holds one block of rows a thread at a time.

    Args:
        digest: holds tensors that were read already, which are not read again.
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

    shapes = tensor_shapes(checkpoint.config)
    done = Counter(sum(map(math.prod, shapes.values())) * dtype.itemsize, progress)
    with ThreadPoolExecutor(threads) as pool:
        for nbytes in pool.map(add, shapes.items()):
            done.add(nbytes)
    return digest.hexdigest()
