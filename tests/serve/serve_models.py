"""A tiny model that speaks: random weights, a token for each byte, and a chat template."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if shout %}YES {% endif %}{% endif %}"
)
CONTEXT = 4096
HIDDEN, HEADS, LAYERS = 32, 2, 2


def write_model(folder: Path) -> Path:
    """A folder as transformers writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab = tokenizer.get_vocab_size()
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "chat_template": TEMPLATE,
                "eos_token": SPECIAL[0],
            }
        )
    )
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "vocab_size": vocab,
                "hidden_size": HIDDEN,
                "intermediate_size": 64,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": HEADS,
                "num_key_value_heads": HEADS,
                "max_position_embeddings": CONTEXT,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10_000.0,
                "tie_word_embeddings": True,
                "hidden_act": "silu",
                "eos_token_id": vocab - len(SPECIAL),
                "torch_dtype": "float32",
            }
        )
    )
    draw = torch.Generator().manual_seed(7)
    shapes = {"model.embed_tokens.weight": (vocab, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        for part in ("q", "k", "v", "o"):
            shapes[f"{name}.self_attn.{part}_proj.weight"] = (HIDDEN, HIDDEN)
        for part in ("gate", "up"):
            shapes[f"{name}.mlp.{part}_proj.weight"] = (64, HIDDEN)
        shapes[f"{name}.mlp.down_proj.weight"] = (HIDDEN, 64)
        for part in ("input", "post_attention"):
            shapes[f"{name}.{part}_layernorm.weight"] = (HIDDEN,)
    save_file(
        {
            name: torch.ones(shape)
            if len(shape) == 1
            else torch.randn(shape, generator=draw) / shape[1] ** 0.5
            for name, shape in shapes.items()
        },
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder
