"""Reads files that may be missing, truncated or hostile; each failure has a one-sentence error."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsqp.errors import CheckpointError, printable_path

MAX_JSON_BYTES = (
    2**23
)  # ten times the largest; as Python objects they may take thirty times as much


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in `text`; `path` is for the message only.

    Raises:
        CheckpointError: not JSON, not an object, or larger than MAX_JSON_BYTES.
    """
    if len(text) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is larger than the {MAX_JSON_BYTES} bytes TSQP accepts.")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as exc:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{path} does not hold valid JSON: fetch it again.") from exc
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} does not hold a JSON object: fetch it again.")
    return found


class BinaryFile:
    """A file that is read at given offsets into our own memory.

    Never mapped: a mapping would fault later, inside computation, if the file changed, and
    inside an enclave it would occupy the whole file's size at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        try:
            if not path.is_file():
                raise CheckpointError(f"There is no file {printable_path(path, 'of that name')}.")
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise CheckpointError(f"Cannot open {printable_path(path)}: {exc.strerror}.") from exc
        self.resolved_path = path.resolve()  # now, because the name may lead elsewhere later
        self.size = self.stat().st_size

    def stat(self) -> os.stat_result:
        """The status of the open file, whatever its name leads to now."""
        assert self._descriptor is not None, "closed"
        return os.fstat(self._descriptor)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (bytes, writable) from `offset` on; safe from several threads.

        Raises:
            CheckpointError: the file ends first, or cannot be read.
        """
        assert self._descriptor is not None, "closed"
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
            except OSError as exc:
                raise CheckpointError(f"Cannot read {self.path}: {exc.strerror}.") from exc
            if count == 0:
                raise CheckpointError(f"{self.path} is cut short: fetch it again.")
            done += count

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on; raises as `read_into` does."""
        buffer = bytearray(count)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def close(self) -> None:
        """Safe to call twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes, without a copy."""
    assert tensor.is_contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def check_shape(where: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises CheckpointError unless the shapes are equal."""
    if found != expected:
        raise CheckpointError(
            f"Tensor {name} of {where} has shape {list(found)}, but the config asks for"
            f" {list(expected)}."
        )
