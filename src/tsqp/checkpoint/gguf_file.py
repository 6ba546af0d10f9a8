"""GGUF files: dequantised exactly to float32, with the converter's changes undone."""

from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from tsqp.checkpoint.encrypted_file import open_file
from tsqp.checkpoint.files import BinaryFile, check_shape
from tsqp.checkpoint.gguf_config import ARCHITECTURES, ROPE_FREQS, read_config
from tsqp.checkpoint.gguf_reader import GGUFHeader, StoredTensor, read_header
from tsqp.checkpoint.model_key import ModelKey
from tsqp.errors import CheckpointError, UnsupportedModel
from tsqp.model.config import ModelConfig, norm_shapes, tensor_shapes
from tsqp.model.json_fields import show


class GGUFCheckpoint:
    """One GGUF file. See `checkpoint.Checkpoint`.

    Attributes:
        header: the header, from which the config was read. The tokenizer can be read from it too.
        file: the open file.
    """

    def __init__(self, path: Path, key: ModelKey | None = None) -> None:
        """Args: key: of an encrypted file."""
        self.name = str(path)
        self.file = open_file(path, key)
        try:
            self.header = header = read_header(self.file)
            _check_whole(header, self.name)
            rope_freqs = header.tensors.get(ROPE_FREQS)
            self.config = read_config(
                header, None if rope_freqs is None else self._load(rope_freqs, slice(None))
            )
            self._where = _by_hf_name(header, self.config)
            self._norms = norm_shapes(self.config)
        except BaseException:
            self.close()
            raise

    @property
    def sources(self) -> dict[str, BinaryFile]:
        """See `checkpoint.Checkpoint`."""
        return dict.fromkeys(self._where, self.file)

    def file_digests(self) -> dict[str, str]:
        """See `checkpoint.Checkpoint`."""
        return {"GGUF header": self.header.sha256}

    def read(self, name: str, shape: tuple[int, ...], rows: slice | None = None) -> Tensor:
        stored = self._where.get(name)
        if stored is None:
            if name.endswith(".bias") and tensor_shapes(self.config).get(name) == shape:
                # No flag says which layers have a bias: one that is left out is zero.
                return torch.zeros(shape)[rows or slice(None)]
            raise CheckpointError(f"{self.name} lacks tensor {name}.")
        check_shape(self.name, name, stored.shape, shape)
        rows = slice(0, shape[0]) if rows is None else rows
        if self.config.model_type == "llama" and (".q_proj." in name or ".k_proj." in name):
            return self._load_heads(stored, rows)
        values = self._load(stored, rows)
        return values - self.config.norm_offset if name in self._norms else values

    def _load_heads(self, stored: StoredTensor, rows: slice) -> Tensor:
        """Rows in Hugging Face's order, which differs from the file's within each head."""
        size = self.config.head_dim
        first, last = rows.start // size, -(-rows.stop // size)
        values = _unpermute(self._load(stored, slice(first * size, last * size)), last - first)
        return values[rows.start - first * size : rows.stop - first * size]

    def _load(self, stored: StoredTensor, rows: slice) -> Tensor:
        if len(stored.shape) == 1:  # short, and perhaps of blocks of several elements
            return self._dequantize(stored, 0, 1).view(-1)[rows]
        return self._dequantize(stored, rows.start, rows.stop - rows.start)

    def _dequantize(self, stored: StoredTensor, first: int, count: int) -> Tensor:
        raw = np.empty((count, stored.row_bytes), dtype=np.uint8)
        self.file.read_into(stored.offset + first * stored.row_bytes, raw.data.cast("B"))
        with np.errstate(all="ignore"):  # values that are not finite are refused when they are used
            return torch.from_numpy(gguf.dequantize(raw, stored.encoding))

    def close(self) -> None:
        self.file.close()


def _check_whole(header: GGUFHeader, name: str) -> None:
    """Refuse a part of a model that llama.cpp's gguf-split has split."""
    parts = header.metadata.get("split.count")
    if parts in (None, 0, 1):
        return
    raise UnsupportedModel(
        f"{name} is one of the {show(parts)} parts of a split GGUF file: join them with"
        " `llama-gguf-split --merge FIRST_PART OUT.gguf`, and give OUT.gguf."
    )


def _by_hf_name(header: GGUFHeader, config: ModelConfig) -> dict[str, StoredTensor]:
    """The file's tensors under their Hugging Face names.

    A tensor without a place in the model is refused: leaving it out would compute another model.
    """
    model_types = {hf: architecture for architecture, hf in ARCHITECTURES.items()}
    architectures = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    architecture = architectures[model_types[config.model_type]]
    names = gguf.get_tensor_name_map(architecture, config.num_layers)
    to_hf = {
        names.get_name(name, try_suffixes=(".weight", ".bias")): name
        for name in tensor_shapes(config)
    }
    to_hf[ROPE_FREQS] = ROPE_FREQS
    for name in header.tensors:
        if name not in to_hf:
            raise UnsupportedModel(
                f"The GGUF file holds tensor {name[:200]!a}, which {config.model_type} models do"
                " not have, as far as TSQP knows."
            )
    return {to_hf[name]: tensor for name, tensor in header.tensors.items()}


def _unpermute(values: Tensor, heads: int) -> Tensor:
    """Rows in Hugging Face's order, for the queries and keys of one layer.

    llama.cpp rotates neighbouring features, Hugging Face features half a head apart, so its
    converter interleaves the halves of each head.
    """
    pairs = values.view(heads, -1, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)
