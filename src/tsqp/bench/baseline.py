"""The same model in plain transformers: the external reference for speed."""

from collections.abc import Sequence
from typing import Any

import torch

from tsqp.bench.hf_model import hf_config
from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.errors import UsageError
from tsqp.model.config import tensor_shapes

CPU = torch.device("cpu")


class Transformers:
    """The model in transformers, with SDPA attention."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device = CPU
    ) -> None:
        try:
            from transformers import AutoModelForCausalLM
        except ImportError as exc:
            raise UsageError(
                "The comparison with transformers needs the package transformers: install"
                " tsqp[bench], or choose other modes with --modes."
            ) from exc

        config = hf_config(checkpoint.config)
        with torch.device("meta"):
            self._model: Any = AutoModelForCausalLM.from_config(config).to(dtype)
        self._model.to_empty(device="cpu").eval()
        # Checkpoints do not contain buffers, and a model made on "meta" has no values in them.
        self._model.model.rotary_emb = type(self._model.model.rotary_emb)(config)
        for module in self._model.modules():
            if hasattr(module, "scalar_embed_scale"):
                module.embed_scale.fill_(module.scalar_embed_scale)
        shapes = tensor_shapes(checkpoint.config)
        state = {name: checkpoint.read(name, shape).to(dtype) for name, shape in shapes.items()}
        loaded = self._model.load_state_dict(state, strict=False, assign=True)
        assert not loaded.unexpected_keys and set(loaded.missing_keys) <= {"lm_head.weight"}
        self._model.tie_weights()
        self._model.to(device)
        self._device = device
        self._out: Any = None

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Process a batch of prompts of equal length."""
        ids = torch.tensor(prompts, device=self._device)
        self._out = self._model(ids, use_cache=True, logits_to_keep=1)
        self._finish()

    @torch.inference_mode()
    def decode(self, tokens: int) -> None:
        """Generate `tokens` more tokens greedily."""
        for _ in range(tokens):
            token, past = self._out.logits[:, -1:].argmax(-1), self._out.past_key_values
            self._out = self._model(token, past_key_values=past, use_cache=True)
        self._finish()

    def _finish(self) -> None:
        """Wait until a CUDA device has finished; it computes asynchronously."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
