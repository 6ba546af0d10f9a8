"""GGUF files, dequantised exactly to float32, and what their converter did undone."""

from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from tsqp.errors import CheckpointError, UnsupportedModel
from tsqp.model.config import ModelConfig, norm_shapes, tensor_shapes
from tsqp.model.files import BinaryFile, check_shape
from tsqp.model.gguf_config import ARCHITECTURES, ROPE_FREQS, read_config
from tsqp.model.gguf_reader import GGUFHeader, StoredTensor, read_header


class GGUFCheckpoint:
    """One GGUF file. See `checkpoint.Checkpoint`."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._file = BinaryFile(path)
        try:
            header = read_header(self._file)
            rope_freqs = header.tensors.get(ROPE_FREQS)
            self.config = read_config(
                header, None if rope_freqs is None else self._load(rope_freqs)
            )
            self._where = _by_hf_name(header, self.config)
            self._norms = norm_shapes(self.config)
        except BaseException:
            self.close()
            raise

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        stored = self._where.get(name)
        if stored is None:
            if name.endswith(".bias") and tensor_shapes(self.config).get(name) == shape:
                # No flag says which layers have a bias: one that is left out is zero.
                return torch.zeros(shape)
            raise CheckpointError(f"{self.name} lacks tensor {name}.")
        check_shape(self.name, name, stored.shape, shape)
        values = self._load(stored)
        if name in self._norms:
            return values - self.config.norm_offset
        if self.config.model_type != "llama":
            return values
        if ".q_proj." in name:
            return _unpermute(values, self.config.num_heads)
        if ".k_proj." in name:
            return _unpermute(values, self.config.num_kv_heads)
        return values

    def _load(self, stored: StoredTensor) -> Tensor:
        raw = np.empty(stored.size, dtype=np.uint8)
        self._file.read_into(stored.offset, raw.data)
        rows = gguf.quant_shape_to_byte_shape(stored.shape, stored.encoding)
        return torch.from_numpy(gguf.dequantize(raw.reshape(rows), stored.encoding))

    def close(self) -> None:
        self._file.close()


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
