"""Small models written by transformers, and a forward pass driven by hand."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.nn.attention import Segment
from tsqp.tee.decoder import Batch, Decoder
from tsqp.tee.engine.engine import Engine
from tsqp.tee.engine.interleave import run_interleaved
from tsqp.tee.offload.local import LocalOffload
from tsqp.tee.offload.offload import Offload
from tsqp.tee.stats import Stats
from tsqp.tee.text.tokenizer import Tokenizer

TINY: dict[str, object] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 640,
    "tie_word_embeddings": True,
    "eos_token_id": 7,
    "bos_token_id": 1,
}


def write_llama(folder: Path, **changes: object) -> LlamaForCausalLM:
    """Save a small random Llama in `folder`, and return transformers' own float32 model of it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(TINY | changes), attn_implementation="sdpa")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers starts norms at one and biases at zero, which would hide mistakes.
            centre = 1.0 if "norm" in name else 0.0
            parameter.copy_(centre + 0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def all_logits(decoder: Decoder, offload: Offload, token_ids: Sequence[int], chunk: int) -> Tensor:
    """Logits of every position, [T, V], computed `chunk` tokens at a time as sequence 0."""
    offload.kv.alloc(0, len(token_ids))
    pieces = []
    for start in range(0, len(token_ids), chunk):
        ids = list(token_ids[start : start + chunk])
        positions = torch.arange(start, start + len(ids))
        rows = torch.arange(len(ids))
        batch = Batch(torch.tensor(ids), positions, [Segment(0, start, len(ids))], rows)
        stats = Stats()
        pieces += run_interleaved(offload, [decoder.forward(batch, stats)], stats)
    offload.kv.free(0)
    return torch.cat(pieces)


def make_engine(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype = torch.float32,
    **options: int,
) -> tuple[Engine, LocalOffload]:
    offload = LocalOffload(checkpoint, dtype)
    decoder = Decoder(checkpoint, dtype)
    return Engine(decoder, offload, checkpoint.config, tokenizer, **options), offload
