"""transformers' models of checkpoints, for tests to agree with."""

import torch
from transformers import LlamaForCausalLM

from tsqp.bench.hf_model import hf_config
from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.model.config import tensor_shapes


def reference_model(checkpoint: Checkpoint, dtype: torch.dtype) -> LlamaForCausalLM:
    """transformers' model of any checkpoint of ours."""
    model = LlamaForCausalLM(hf_config(checkpoint.config, attn_implementation="sdpa"))
    shapes = tensor_shapes(checkpoint.config)
    model.load_state_dict({n: checkpoint.read(n, s) for n, s in shapes.items()}, strict=False)
    model.tie_weights()
    return model.to(dtype).eval()


def greedy_tokens(model: LlamaForCausalLM, prompt: list[int], count: int) -> tuple[int, ...]:
    """The likeliest tokens after a prompt."""
    tokens: list[int] = []
    ids, cache = list(prompt), None
    with torch.inference_mode():
        for _ in range(count):
            out = model(
                torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            ids, cache = [int(out.logits[0, -1].argmax())], out.past_key_values
            tokens += ids
    return tuple(tokens)
