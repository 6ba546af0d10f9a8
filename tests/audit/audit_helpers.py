"""Recordings made of numbers of our choice, on the path that a worker's take."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tsqp.algebra.params import FIELDS, Field
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.gpu.record import Recorder
from tsqp.model.config import layer_groups, linear_groups
from tsqp.model.linear_group import LinearGroup
from tsqp.wire.messages import Linear, Product, place_of

MODEL = "random:tiny"
CONFIG = open_checkpoint(MODEL).config
WIDTHS = {group: group.width for group in linear_groups(CONFIG)}
WIDE, COMPACT, LATTICE = FIELDS["wide"], FIELDS["compact"], FIELDS["lattice"]
FIRST = layer_groups(CONFIG, 0).qkv

# 40 of 512 tokens, some of them again.
PROMPT = [(37 * n + 11) % 512 for n in range(34)] + [11, 48, 85, 11, 11, 500]

Rows = Mapping[LinearGroup, Tensor]


def write(folder: Path, rows: Rows, field: Field | None, session: int = 1) -> Path:
    """Record these rows as one session."""
    recorder = Recorder(folder)
    for group, rows_ND in rows.items():
        place = place_of(group)
        operation = Linear(*place) if field is None else Product(*place, field.name)
        recorder.note(session, operation, [rows_ND])
    return folder


def noise(seed: int, field: Field = WIDE, rows: int = len(PROMPT)) -> dict[LinearGroup, Tensor]:
    """Uniform residues for every group, as many rows each."""
    generator = torch.Generator().manual_seed(seed)
    return {key: uniform(generator, (rows, width), field) for key, width in WIDTHS.items()}


def uniform(generator: torch.Generator, shape: Sequence[int], field: Field = WIDE) -> Tensor:
    return torch.randint(field.p, tuple(shape), generator=generator).int()


def activations(seed: int = 0) -> dict[LinearGroup, Tensor]:
    """Normal numbers for every group; the true rows for the first."""
    generator = torch.Generator().manual_seed(seed)
    found = {
        key: torch.randn(len(PROMPT), width, generator=generator) for key, width in WIDTHS.items()
    }
    return found | {FIRST: true_rows(PROMPT)}


def true_rows(ids: Sequence[int]) -> Tensor:
    """What the first linear layer receives of a prompt, float32; computed in float64."""
    checkpoint = open_checkpoint(MODEL)
    table = checkpoint.read("model.embed_tokens.weight", (CONFIG.vocab_size, CONFIG.hidden_size))
    weight = checkpoint.read("model.layers.0.input_layernorm.weight", (CONFIG.hidden_size,))
    rows = [table[each].tolist() for each in ids]
    scales = [
        1 / math.sqrt(sum(x * x for x in row) / len(row) + CONFIG.rms_norm_eps) for row in rows
    ]
    return (torch.tensor(rows).double() * torch.tensor(scales)[:, None] * weight.double()).float()


def as_residues(rows_TD: Tensor, field: Field = WIDE) -> Tensor:
    """Fixed-point numbers of about a tenth of p, each row with a scale of its own, mod p."""
    scale_T = 0.1 * field.p / rows_TD.double().abs().amax(1, keepdim=True)
    return (rows_TD.double() * scale_T).round().long().remainder(field.p).int()


def plus(a: Tensor, b: Tensor, field: Field = WIDE) -> Tensor:
    """The sum mod p."""
    return ((a.long() + b.long()) % field.p).int()


def farthest_from_uniform(p_values: Sequence[float]) -> float:
    """Kolmogorov's statistic times √n: above 1.95 once in a thousand times where p is uniform."""
    count = len(p_values)
    ordered = sorted(p_values)
    gaps = [max((i + 1) / count - p, p - i / count) for i, p in enumerate(ordered)]
    return max(gaps) * math.sqrt(count)
