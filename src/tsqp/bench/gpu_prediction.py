"""What a simulated GPU takes for a prompt and for a token, by its formula alone.

With the measured floor of the trusted side this predicts a run. If nothing overlaps, the two times
add up; if everything does, the longer one remains.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tsqp.algebra.params import Field
from tsqp.bench.simulated_gpu import Gpu
from tsqp.model.config import ModelConfig, linear_groups, output_projection
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.offload.masked import BLOCK_ROWS


@dataclass(frozen=True, slots=True)
class DeviceTimes:
    """Seconds of the GPU, with its link: for a prompt, and for each new token."""

    prefill_s: float
    decode_s: float


def device_times(
    gpu: Gpu,
    config: ModelConfig,
    field: Field | None,
    prompt_tokens: int,
    prefill_chunk: int,
    itemsize: int,
) -> DeviceTimes:
    """The sum of all calls.

    Args:
        field: of the residues; None for `open`.
        prefill_chunk: most tokens of a step.
        itemsize: bytes of a number that crosses in `open`; residues have the field's.
    """
    each = itemsize if field is None else field.residue_bytes
    block = prefill_chunk if field is None else BLOCK_ROWS
    head = output_projection(config)

    def call_s(group: LinearGroup, rows: int) -> float:
        return gpu.product_s(rows, *group.shape, each * rows * sum(group.shape), field)

    def embed_s(rows: int) -> float:  # a row of the table is read, and nothing multiplied
        sent = rows * (8 + each * config.hidden_size)
        return gpu.product_s(rows, 0, config.hidden_size, sent, None) if field is None else 0.0

    groups = linear_groups(config)
    chunks = list(_pieces(prompt_tokens, prefill_chunk))
    blocks = [rows for chunk in chunks for rows in _pieces(chunk, block)]
    prefill_s = sum(map(embed_s, chunks)) + call_s(head, 1)
    prefill_s += sum(call_s(group, rows) for group in groups if group != head for rows in blocks)
    return DeviceTimes(prefill_s, embed_s(1) + sum(call_s(group, 1) for group in groups))


def alone(gpu: Gpu, config: ModelConfig, prompt_tokens: int) -> DeviceTimes:
    """The same for the products of a GPU that runs the model by itself, in bfloat16."""
    no_link = replace(gpu, link_bytes_per_s=float("inf"), call_s=0.0)
    return device_times(no_link, config, None, prompt_tokens, prompt_tokens, 2)


def _pieces(rows: int, most: int) -> Iterator[int]:
    for first in range(0, rows, most):
        yield min(most, rows - first)
