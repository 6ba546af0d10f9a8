"""How much memory a session shares with its worker."""

from tsqp.model.config import ModelConfig, linear_groups, output_projection
from tsqp.runtime.options import Options
from tsqp.tee.offload.open_attention import MAX_SCORES

MIN_SHM = 2**20
MAX_SHM = 2**30
HEAD_ROWS = 8  # sequences whose logits travel in one call; more are split


def segment_bytes(config: ModelConfig, options: Options, itemsize: int) -> int:
    """Shared memory for the calls of one step.

    Args:
        itemsize: bytes of a number that crosses.
    """
    rows = options.prefill_chunk
    widths = {group: sum(group.shape) for group in linear_groups(config)}
    head = widths.pop(output_projection(config))
    numbers = [rows * max(widths.values()), min(rows, HEAD_ROWS) * head]
    if options.gpu_attention:
        scores = config.num_heads * rows * config.max_positions
        numbers.append(min(MAX_SCORES, scores))
    widest = itemsize * max(numbers)
    # Room for an answer in use and for the next call, doubled for a second microbatch.
    return min(max(4 * widest, MIN_SHM), MAX_SHM)
