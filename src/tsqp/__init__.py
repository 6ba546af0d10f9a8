"""Private LLM inference on a GPU that nobody has to trust.

from tsqp import LLM, SamplingParams

with LLM("path/to/model", worker="ipc:///run/tsqp.sock", privacy="open") as llm:
    print(llm.generate(["The capital of France is"], SamplingParams(temperature=0))[0].text)
"""

import os
from typing import TYPE_CHECKING

from tsqp.errors import TSQPError

# Read once, when torch loads OpenMP. A TEE and a worker that share cores take turns: a thread that
# spins between two parallel regions would take the core that the other side needs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if TYPE_CHECKING:
    from tsqp.runtime.hardening import harden_process
    from tsqp.runtime.llm import LLM
    from tsqp.tee.conversation import Conversation
    from tsqp.tee.sampling import Completion, SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "Completion",
    "Conversation",
    "SamplingParams",
    "TSQPError",
    "__version__",
    "harden_process",
]


def __getattr__(name: str) -> object:
    # torch takes a second to import; `tsqp --help` should not.
    if name == "LLM":
        from tsqp.runtime.llm import LLM

        return LLM
    if name == "harden_process":
        from tsqp.runtime.hardening import harden_process

        return harden_process
    if name == "Conversation":
        from tsqp.tee.conversation import Conversation

        return Conversation
    if name in ("Completion", "SamplingParams"):
        from tsqp.tee import sampling

        return {"Completion": sampling.Completion, "SamplingParams": sampling.SamplingParams}[name]
    raise AttributeError(f"module 'tsqp' has no attribute {name!r}")
