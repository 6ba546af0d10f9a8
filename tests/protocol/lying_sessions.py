"""Sessions with a lying worker, and how each must end: in time, with its error, no wrong token."""

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from liars import LyingWorker
from lies import MODEL, Order
from protocol_helpers import DEADLINE_S, mapped_segments

from tsqp import LLM, SamplingParams
from tsqp.errors import IntegrityError, RemoteError, TSQPError, WorkerError, WorkerLost

GROUPS = [(layer, name) for layer in (0, 1) for name in ("qkv", "o", "gate_up", "down")]
GROUPS.append((-1, "lm_head"))
PROMPT = [3, 141, 59, 265, 358]
TOKENS = 4
IMPATIENCE_S = 0.4  # shorter than an answer that is late


def private(liar: LyingWorker, order: Order | None = None, **options: Any) -> LLM:
    liar.order(order or Order())
    return LLM(MODEL, **({"worker": liar.endpoint, "pad_memory": 0} | options))


def complete(llm: LLM, prompt: Sequence[int] = PROMPT, max_tokens: int = TOKENS) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return list(llm.generate([prompt], params)[0].token_ids)


@cache
def right_tokens(
    field: str = "wide", prompt: tuple[int, ...] = tuple(PROMPT), max_tokens: int = TOKENS
) -> list[int]:
    """Computed without any worker."""
    with LLM(MODEL, privacy="tee", fixed_point=True, field=field) as llm:
        return complete(llm, prompt, max_tokens)


def fails(
    liar: LyingWorker,
    order: Order,
    error: type[WorkerError],
    sampled: list[int],
    prompt: Sequence[int] = PROMPT,
    max_tokens: int = TOKENS,
    **options: Any,
) -> str:
    """The message of a generation that fails, in time, after right tokens at most."""
    right = right_tokens(options.get("field", "wide"), tuple(prompt), max_tokens)
    sampled.clear()
    with private(liar, order, **options) as llm:
        began = time.monotonic()
        with pytest.raises(WorkerError) as caught:
            complete(llm, prompt, max_tokens)
        assert time.monotonic() - began < DEADLINE_S
        assert caught.type is error
        assert len(sampled) < len(right)
        assert sampled == right[: len(sampled)]
        # A lost worker is tried again, and is no better; one that lied is not.
        again = {
            RemoteError: "failed",
            WorkerLost: "stopped answering|sent probes instead",
            IntegrityError: "wrong product|nothing is offloaded any more",
        }
        over = again.get(error, "has ended")
        with pytest.raises(TSQPError, match=over):
            complete(llm)
        assert sampled == right[: len(sampled)]
    assert liar.endpoint in str(caught.value)
    return str(caught.value)


def name(layer: int, group: str) -> str:
    return f"group {group}" if layer < 0 else f"group {group} of layer {layer}"


def held() -> tuple[int, int, int, int]:
    """Python's threads, libzmq's threads, open files, and mapped segments of this process."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it ended meanwhile
            names.append((task / "comm").read_text())
    return (
        threading.active_count(),
        sum(name.startswith("ZMQ") for name in names),
        len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        mapped_segments(os.getpid()),
    )
