"""Plain transformers over the same weights: the outside reference for speed."""

from collections.abc import Sequence
from typing import Any

import torch

from tsqp.model.checkpoint import Checkpoint
from tsqp.model.config import ModelConfig, tensor_shapes


class Transformers:
    """The model in transformers, with SDPA attention, on this machine's CPU."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        from transformers import LlamaForCausalLM

        config = _hf_config(checkpoint.config)
        with torch.device("meta"):
            self._model: Any = LlamaForCausalLM(config).to(dtype)
        self._model.to_empty(device="cpu").eval()
        # Buffers are not in a checkpoint, and a model made on "meta" has none of its numbers.
        self._model.model.rotary_emb = type(self._model.model.rotary_emb)(config)
        shapes = tensor_shapes(checkpoint.config)
        state = {name: checkpoint.read(name, shape).to(dtype) for name, shape in shapes.items()}
        loaded = self._model.load_state_dict(state, strict=False, assign=True)
        assert not loaded.unexpected_keys and set(loaded.missing_keys) <= {"lm_head.weight"}
        self._model.tie_weights()
        self._out: Any = None

    @torch.inference_mode()
    def prefill(self, prompt_ids: Sequence[int]) -> None:
        """Compute a prompt."""
        self._out = self._model(torch.tensor([prompt_ids]), use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def decode(self, tokens: int) -> None:
        """Go on greedily."""
        for _ in range(tokens):
            token, past = self._out.logits[:, -1:].argmax(-1), self._out.past_key_values
            self._out = self._model(token, past_key_values=past, use_cache=True)


def _hf_config(config: ModelConfig) -> Any:
    from transformers import LlamaConfig

    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=config.tie_word_embeddings,
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        attn_implementation="sdpa",
    )
