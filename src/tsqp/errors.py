"""All exceptions that TSQP raises on purpose.

    TSQPError
    ├── UsageError                 options are unknown or contradict each other, or an LLM cannot
    │                              be called now: it is closed, busy or forked
    ├── ModelError                 a checkpoint cannot be used
    │   ├── UnsupportedModel       an architecture, option or format is not implemented
    │   ├── CheckpointError        a file is missing, truncated, or contradicts the config
    │   ├── UnexpectedModel        the model is not the one that --expect-model asks for
    │   ├── HintsError             hints of lattice masks cannot be used or written
    │   └── TokenizerError         the model has no tokenizer or chat template that can be used
    ├── NumericalError             an activation is not a finite number
    ├── PromptError                a prompt is empty, or a parameter is out of range
    │   └── PromptTooLong          a prompt leaves no room in the model's context
    ├── QueueFull                  an AsyncLLM has too many waiting requests; try again later
    ├── OutOfMemory                something would not fit; gives the bytes needed and available
    ├── OutputError                standard output cannot be written
    ├── LatticeError               a lattice mask does not fit its own product; no worker's fault
    ├── RecordingError             a recording of what a worker received cannot be written or read
    ├── ReportError                a file is neither a call log nor a result of a benchmark
    ├── ServerError                a server of `tsqp chat --url` cannot be reached, or fails
    ├── ClusterError               a Ray cluster cannot be reached, or cannot run the workers
    ├── AttestationError           evidence cannot be made or read, or does not meet a policy
    └── WorkerError                something failed between this process and a worker
        ├── WorkerUnavailable      nobody serves the endpoint, or it cannot be served
        ├── HandshakeError         both sides run, but disagree on model, dtype, version or key
        ├── ProtocolError          the peer sent something that is not a valid message
        ├── WorkerLost             the worker vanished or stopped answering during a session
        ├── IntegrityError         the worker's product is wrong; no part of it was used
        └── RemoteError            the worker reported a failure; has its traceback

Each message is one sentence: what happened, to which thing, and what to do about it. No message
contains a prompt, an answer or a token id. A user may have typed a prompt in the wrong place, so a
message names the option and the values it takes, and repeats a value only if it is a path.
"""

import os


def printable_path(path: str | os.PathLike[str], instead: str = "that file") -> str:
    """A path that a user gave, as shown in a message.

    Args:
        instead: shown if the path does not exist and does not look like a path, because it has no
            slash or has spaces: it may be part of a prompt.
    """
    text = os.fspath(path)
    is_path = "/" in text and not any(character.isspace() for character in text)
    return text if is_path or os.path.exists(text) else instead  # noqa: PTH110, any text at all


class TSQPError(Exception):
    """Base of every error that TSQP raises on purpose."""


class UsageError(TSQPError):
    """Options that are unknown or contradict each other, or an LLM that cannot be called now.

    An LLM cannot be called once it is closed, from its own callback, or in a forked process.
    """


class ModelError(TSQPError):
    """A checkpoint cannot be used."""


class UnsupportedModel(ModelError):
    """An architecture, option or file format that TSQP does not implement."""


class CheckpointError(ModelError):
    """A checkpoint file is missing, truncated, or contradicts its config."""


class UnexpectedModel(ModelError):
    """The model does not have the expected digest; nothing was sent or computed."""


class HintsError(ModelError):
    """Hints of lattice masks are missing, cut short, or not those of the model's weights."""


class TokenizerError(ModelError):
    """The model has no tokenizer, or no chat template, that can be used."""


class NumericalError(TSQPError):
    """An activation is NaN or infinite; the message names the layer."""


class PromptError(TSQPError):
    """A prompt or a sampling parameter that cannot be served."""


class PromptTooLong(PromptError):
    """A prompt that does not fit into the model's context together with an answer.

    Attributes:
        tokens: number of tokens in the prompt.
        limit: maximum number of tokens in prompt and answer together.
    """

    def __init__(
        self, tokens: int, limit: int, what: str = "this model's maximum context length is"
    ) -> None:
        super().__init__(
            f"The prompt has {tokens} tokens, but {what} {limit} tokens, including the answer: "
            "shorten the prompt."
        )
        self.tokens = tokens
        self.limit = limit


class QueueFull(TSQPError):
    """Too many requests are waiting already; the caller should try again later."""


class OutOfMemory(TSQPError):
    """Something would not fit in memory; the message gives the bytes needed and available."""


class OutputError(TSQPError):
    """Standard output cannot be written, so the answer is lost."""


class LatticeError(TSQPError):
    """A lattice mask was wrong: the hints or TSQP are wrong, not the worker."""


class RecordingError(TSQPError):
    """A recording of what a worker received cannot be written or read."""


class ReportError(TSQPError):
    """A file is neither a call log nor a result of a benchmark, or is damaged."""


class ServerError(TSQPError):
    """A server cannot be reached, refuses to answer, or sends something that is not an answer."""


class ClusterError(TSQPError):
    """A Ray cluster cannot be reached, or cannot run the workers."""


class AttestationError(TSQPError):
    """Evidence of a server cannot be made or read, or does not meet the policy.

    Nothing was sent to a server whose evidence raised this.
    """


class WorkerError(TSQPError):
    """Something failed between this process and a worker."""


class WorkerUnavailable(WorkerError):
    """Nobody serves the endpoint, or the endpoint cannot be served."""


class HandshakeError(WorkerError):
    """Both sides are up but disagree on protocol version, dtype, weights or key."""


class ProtocolError(WorkerError):
    """The peer sent something that is not a valid message."""


class WorkerLost(WorkerError):
    """The worker vanished, or stopped answering, in the middle of a session."""


class IntegrityError(WorkerError):
    """A worker returned something that is not the product; no token was computed from it."""


class RemoteError(WorkerError):
    """The worker reported a failure.

    Attributes:
        remote_traceback: the worker's own traceback, as text. It comes from outside, so it is
            shown to people and never interpreted.
        out_of_memory: whether it failed because the worker has too little memory.
    """

    def __init__(
        self, message: str, remote_traceback: str = "", *, out_of_memory: bool = False
    ) -> None:
        super().__init__(message)
        self.remote_traceback = remote_traceback
        self.out_of_memory = out_of_memory
