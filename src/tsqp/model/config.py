"""The config of a decoder-only model, checked once, and the tensors that follow from it."""

from dataclasses import dataclass

from tsqp.errors import CheckpointError
from tsqp.model.linear_group import LayerGroups, LinearGroup, Part
from tsqp.model.rope import DynamicScaling, Rope

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"  # the output projection, of a model that does not tie it


@dataclass(frozen=True, slots=True)
class Layer:
    """The attention of one layer.

    Attributes:
        window: number of tokens that a token attends to, including itself; None for all before it.
        rope: how queries and keys are rotated; None for a layer without positions (NoPE).
    """

    window: int | None
    rope: Rope | None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model of any family; every difference between families is a value here.

    Attributes:
        model_type: the family, as Hugging Face names it.
        layers: what differs between layers, in their order.
        head_dim: features of one head, even; num_heads · head_dim need not equal hidden_size.
        max_positions: the longest sequence the model was made for, in tokens.
        tie_word_embeddings: whether the output projection is the embedding. If a checkpoint holds
            both, they are not tied, whatever its config says.
        attention_scale: the factor for q·k before the softmax.
        attention_softcap, logits_softcap: cap · tanh(x / cap) bounds attention scores, or logits.
        biases: the groups of linear layers that have a bias.
        fused: the file holds q, k, v as one tensor, and gate and up as one.
        qk_norm: queries and keys are normed, each head by itself, before they are rotated.
        post_norms: the outputs of attention and MLP are normed too, before they are added.
        norm_offset: added to every norm's weight as it is stored.
        hidden_act: activation of the gate, "silu" or "gelu_tanh".
        embedding_multiplier: factor for embeddings, itself rounded to the dtype of the run.
        residual_multiplier: factor for the outputs of attention and MLP.
        logits_scaling: divisor of the logits.
        eos_token_ids: tokens that end an answer; may be empty.
        dtype: "float32", "float16" or "bfloat16", the checkpoint's own.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[Layer, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_scale: float
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str
    biases: frozenset[str] = frozenset()
    fused: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    hidden_act: str = "silu"
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    attention_softcap: float | None = None
    logits_softcap: float | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"The model config has num_key_value_heads {self.num_kv_heads}, which must divide"
                f" num_attention_heads {self.num_heads}."
            )
        if self.head_dim % 2:
            raise CheckpointError(
                f"The model config has head_dim {self.head_dim}, which must be even."
            )
        scalings = [layer.rope.scaling for layer in self.layers if layer.rope is not None]
        if self.head_dim == 2 and any(isinstance(each, DynamicScaling) for each in scalings):
            raise CheckpointError(
                "The model config has head_dim 2, which must be more for dynamic rotary scaling."
            )

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def steady_positions(self) -> int:
        """Number of tokens up to which keys do not depend on the final length of the sequence."""
        scalings = [layer.rope.scaling for layer in self.layers if layer.rope is not None]
        dynamic = [each for each in scalings if isinstance(each, DynamicScaling)]
        return min((each.original_max_positions for each in dynamic), default=self.max_positions)


def layer_groups(config: ModelConfig, layer: int) -> LayerGroups:
    """The groups of linear layers of one layer."""
    assert 0 <= layer < config.num_layers, layer
    hidden, inner = config.hidden_size, config.intermediate_size
    q = config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim

    def group(name: str, block: str, width: int, outputs: dict[str, int]) -> LinearGroup:
        if config.fused and len(outputs) > 1:
            outputs = {f"{name}_proj": sum(outputs.values())}
        prefix, bias = f"model.layers.{layer}.{block}", name in config.biases
        parts = (Part(f"{prefix}.{each}", size, width, bias) for each, size in outputs.items())
        return LinearGroup.of(layer, name, tuple(parts))

    return LayerGroups(
        qkv=group("qkv", "self_attn", hidden, {"q_proj": q, "k_proj": kv, "v_proj": kv}),
        o=group("o", "self_attn", q, {"o_proj": hidden}),
        gate_up=group("gate_up", "mlp", hidden, {"gate_proj": inner, "up_proj": inner}),
        down=group("down", "mlp", inner, {"down_proj": hidden}),
    )


def output_projection(config: ModelConfig) -> LinearGroup:
    """The last group. A tied one is named for the embedding, whose tensor it shares."""
    name = EMBEDDING if config.tie_word_embeddings else HEAD
    part = Part(name.removesuffix(".weight"), config.vocab_size, config.hidden_size, False)
    return LinearGroup.of(None, "lm_head", (part,))


def linear_groups(config: ModelConfig) -> list[LinearGroup]:
    """All groups of a model in canonical order: layer by layer, the output projection last."""
    layers = [layer_groups(config, layer) for layer in range(config.num_layers)]
    return [*(group for groups in layers for group in groups), output_projection(config)]


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all linear weights, biases and the embedding by name; a tied one once."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for part in (part for group in linear_groups(config) for part in group.parts):
        shapes[f"{part.name}.weight"] = (part.out_features, part.in_features)
        if part.bias:
            shapes[f"{part.name}.bias"] = (part.out_features,)
    return shapes


def layer_norms(config: ModelConfig, layer: int) -> dict[str, str]:
    """The names of a layer's norms by what they norm.

    "attention" and "mlp" norm the inputs. With `post_norms`, "attention_out" and "mlp_out" norm the
    outputs. With `qk_norm`, "q" and "k" norm each head.
    """
    names = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
    if config.post_norms:
        names |= {
            "attention_out": "post_attention_layernorm",
            "mlp": "pre_feedforward_layernorm",
            "mlp_out": "post_feedforward_layernorm",
        }
    if config.qk_norm:
        names |= {"q": "self_attn.q_norm", "k": "self_attn.k_norm"}
    return {use: f"model.layers.{layer}.{name}.weight" for use, name in names.items()}


def norm_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all norms by name."""
    uses = [layer_norms(config, layer) for layer in range(config.num_layers)]
    shapes: dict[str, tuple[int, ...]] = {
        name: (config.head_dim if use in ("q", "k") else config.hidden_size,)
        for norms in uses
        for use, name in norms.items()
    }
    return shapes | {FINAL_NORM: (config.hidden_size,)}


def trusted_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that only the TEE has in the private modes."""
    shapes = tensor_shapes(config)
    return {name: shape for name, shape in shapes.items() if name == EMBEDDING or len(shape) == 1}


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the model."""
    return linear_shapes(config) | norm_shapes(config)
