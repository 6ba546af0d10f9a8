"""A digest of what a worker may hold, the same for every file format of the same numbers.

It covers every tensor of the model, norms as they are stored: a worker that runs whole layers
holds them all.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from tsqp.model.checkpoint import Checkpoint
from tsqp.model.config import tensor_shapes
from tsqp.model.files import bytes_of


class WeightsDigest:
    """SHA-256 over the tensors' own SHA-256s in the order of their names.

    A tensor's own hash covers its Hugging Face name, shape, dtype and little-endian bytes, so
    the order of the updates and the fusing of layers do not matter.
    """

    def __init__(self) -> None:
        self._hashes: dict[str, bytes] = {}

    def update(self, name: str, tensor: Tensor) -> None:
        """Add one tensor, contiguous and on the CPU; a name that was seen counts once."""
        if name in self:  # a tied output projection is the embedding
            return
        dtype = str(tensor.dtype).removeprefix("torch.")
        head = json.dumps([name, list(tensor.shape), dtype])
        found = hashlib.sha256(head.encode() + b"\n")
        found.update(bytes_of(tensor))
        self._hashes[name] = found.digest()

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
) -> str:
    """The digest of all tensors of a model, converted to `dtype`.

    Holds one tensor a thread at a time.

    Args:
        digest: holds tensors that were read already, which are not read again.

    Raises:
        CheckpointError: a tensor is missing, cut short or of another shape.
    """
    digest = WeightsDigest() if digest is None else digest

    def add(item: tuple[str, tuple[int, ...]]) -> None:
        name, shape = item
        if name not in digest:
            digest.update(name, checkpoint.read(name, shape).to(dtype).contiguous())

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(add, tensor_shapes(checkpoint.config).items()):
            pass
    return digest.hexdigest()
