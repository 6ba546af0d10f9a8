"""Private LLM inference on a GPU that nobody has to trust.

from tsqp import LLM, SamplingParams

with LLM("path/to/model", worker="ipc:///run/tsqp.sock") as llm:
    print(llm.generate(["The capital of France is"], SamplingParams(temperature=0))[0].text)
"""

import importlib
import os
from typing import TYPE_CHECKING

from tsqp.errors import TSQPError

# Read once, when torch loads OpenMP. A TEE and a worker that share cores take turns: a thread that
# spins between two parallel regions would take the core that the other side needs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if TYPE_CHECKING:
    from tsqp.runtime.admission import Place
    from tsqp.runtime.answer_stream import AnswerStream, StreamOutput, Usage
    from tsqp.runtime.async_llm import AsyncLLM
    from tsqp.runtime.failover import WorkerStatus
    from tsqp.runtime.hardening import harden_process
    from tsqp.runtime.llm import LLM
    from tsqp.runtime.options import Options
    from tsqp.runtime.request_stats import RequestObserver, RequestStats
    from tsqp.tee.conversation import Conversation
    from tsqp.tee.crypto.pad_pool import PadStats
    from tsqp.tee.engine.scoring import Scores
    from tsqp.tee.placement import Placement
    from tsqp.tee.sampling import Completion, SamplingParams, TokenLogprobs
    from tsqp.tee.stats import Stats
    from tsqp.tee.structured_outputs import StructuredOutputsParams
    from tsqp.wire.channel import Counters

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AnswerStream",
    "AsyncLLM",
    "Completion",
    "Conversation",
    "Counters",
    "Options",
    "PadStats",
    "Place",
    "Placement",
    "RequestObserver",
    "RequestStats",
    "SamplingParams",
    "Scores",
    "Stats",
    "StreamOutput",
    "StructuredOutputsParams",
    "TSQPError",
    "TokenLogprobs",
    "Usage",
    "WorkerStatus",
    "__version__",
    "harden_process",
]

_MODULES = {
    "LLM": "tsqp.runtime.llm",
    "AnswerStream": "tsqp.runtime.answer_stream",
    "AsyncLLM": "tsqp.runtime.async_llm",
    "Completion": "tsqp.tee.sampling",
    "Conversation": "tsqp.tee.conversation",
    "Counters": "tsqp.wire.channel",
    "Options": "tsqp.runtime.options",
    "PadStats": "tsqp.tee.crypto.pad_pool",
    "Place": "tsqp.runtime.admission",
    "Placement": "tsqp.tee.placement",
    "RequestObserver": "tsqp.runtime.request_stats",
    "RequestStats": "tsqp.runtime.request_stats",
    "SamplingParams": "tsqp.tee.sampling",
    "Scores": "tsqp.tee.engine.scoring",
    "Stats": "tsqp.tee.stats",
    "StreamOutput": "tsqp.runtime.answer_stream",
    "StructuredOutputsParams": "tsqp.tee.structured_outputs",
    "TokenLogprobs": "tsqp.tee.sampling",
    "Usage": "tsqp.runtime.answer_stream",
    "WorkerStatus": "tsqp.runtime.failover",
    "harden_process": "tsqp.runtime.hardening",
}


def __getattr__(name: str) -> object:
    # torch takes a second to import; `tsqp --help` should not.
    if name in _MODULES:
        return vars(importlib.import_module(_MODULES[name]))[name]
    raise AttributeError(f"module 'tsqp' has no attribute {name!r}")
