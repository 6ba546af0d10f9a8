"""The speed of a mode when its pads are made meanwhile."""

from dataclasses import dataclass
from time import process_time

from tsqp import SamplingParams
from tsqp.bench.modes import LlmRunner, stock_bytes


@dataclass(frozen=True, slots=True)
class Sustained:
    """Average cost of a token over many tokens.

    Attributes:
        seconds_per_token: wall time.
        cpu_s_per_token: CPU time of the TEE, including pads.
        pads_cpu_s_per_token: part of cpu_s_per_token: making pads, ahead and when needed.
        ahead: share of the pads that were made ahead.
        stock_rows_before, stock_rows_after: number of tokens for which pads were in stock, averaged
            over the groups. The stock grows if pads are made faster than they are used.
    """

    tokens: int
    seconds_per_token: float
    cpu_s_per_token: float
    pads_cpu_s_per_token: float
    ahead: float
    stock_rows_before: float
    stock_rows_after: float


def sustain(runner: LlmRunner, tokens: int) -> Sustained:
    """Empty the stock, then generate `tokens` tokens, in as many answers as the context needs."""
    llm = runner.llm
    context = llm.config.max_positions
    assert llm._pads is not None
    llm._pads.discard()
    llm.stats.reset()
    before, cpu_began = llm.pads, process_time()
    row_bytes = stock_bytes(llm.config, 1, runner.field)
    assert before is not None
    done = 0
    while done < tokens:
        count = min(tokens - done, context - 1)
        llm.generate([[1]], SamplingParams(0, max_tokens=count, ignore_eos=True))
        done += count
    cpu_s, after = process_time() - cpu_began, llm.pads
    assert after is not None
    ahead = after.ahead_rows - before.ahead_rows
    inline = after.inline_rows - before.inline_rows
    pads_cpu_s = after.inline_cpu_s + after.background_cpu_s
    pads_cpu_s -= before.inline_cpu_s + before.background_cpu_s
    return Sustained(
        tokens=tokens,
        seconds_per_token=(llm.stats.prefill_s + llm.stats.decode_s) / tokens,
        cpu_s_per_token=cpu_s / tokens,
        pads_cpu_s_per_token=pads_cpu_s / tokens,
        ahead=ahead / (ahead + inline),
        stock_rows_before=before.stock_bytes / row_bytes,
        stock_rows_after=after.stock_bytes / row_bytes,
    )
