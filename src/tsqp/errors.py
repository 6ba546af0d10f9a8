"""Everything TSQP raises on purpose.

    TSQPError
    ├── UsageError                 options that are unknown or contradict each other, or an LLM
    │                              that is called where it cannot be: closed, busy, forked
    ├── ModelError                 a checkpoint cannot be used
    │   ├── UnsupportedModel       an architecture, option or format we do not implement
    │   ├── CheckpointError        a file is missing, cut, or contradicts the config
    │   ├── UnexpectedModel        another model than --expect-model asks for
    │   ├── HintsError             hints of lattice masks that cannot be used or written
    │   └── TokenizerError         no tokenizer or no chat template where one is needed
    ├── NumericalError             an activation that is not a finite number
    ├── PromptError                an empty prompt, or an impossible parameter
    │   └── PromptTooLong          a prompt that leaves no room in the model's context
    ├── OutOfMemory                would not fit; names the bytes needed and the bytes there are
    ├── OutputError                standard output cannot be written
    ├── LatticeError               a lattice mask whose own product is wrong: no worker's doing
    ├── RecordingError             what a worker received cannot be written down, or not be read
    ├── ReportError                a file is no call log and no result of a benchmark
    └── WorkerError                something between here and the worker
        ├── WorkerUnavailable      nobody serves that endpoint, or it cannot be served
        ├── HandshakeError         both sides are up, but disagree on model, dtype, version or key
        ├── ProtocolError          the peer sent something that is not a valid message
        ├── WorkerLost             the worker vanished or stopped answering during a session
        ├── IntegrityError         the worker's product is wrong: nothing of it was used
        └── RemoteError            the worker reported a failure; carries its traceback

Each message is one sentence: what happened, to which thing, and what to do about it.
No message holds a prompt, an answer or a token id. What a user typed may be a prompt in the wrong
place, so a message names the option and what it takes, and repeats a value only if it is a path.
"""

import os


def shown(path: str | os.PathLike[str], instead: str = "that file") -> str:
    """How a message names a path that a user gave.

    Args:
        instead: what to say where the path does not exist and does not look like one, because it
            has no slash or has spaces: it may be part of a prompt.
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
    """A checkpoint file is missing, cut short, or contradicts its config."""


class UnexpectedModel(ModelError):
    """The model does not have the digest that was asked for; nothing was sent or computed."""


class HintsError(ModelError):
    """Hints of lattice masks are missing, cut short, or not those of the model's weights."""


class TokenizerError(ModelError):
    """The model has no tokenizer, or no chat template, where one is needed."""


class NumericalError(TSQPError):
    """An activation is NaN or infinite; the message names the layer."""


class PromptError(TSQPError):
    """A prompt or a sampling parameter that cannot be served."""


class PromptTooLong(PromptError):
    """A prompt that does not fit the model's context with an answer.

    Attributes:
        tokens: how many the prompt has.
        limit: how many prompt and answer may have together.
    """

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(
            f"The prompt has {tokens} tokens, and this model's maximum context length is {limit} "
            "tokens, the answer included: shorten the prompt."
        )
        self.tokens = tokens
        self.limit = limit


class OutOfMemory(TSQPError):
    """Something would not fit in memory; the message names both figures in bytes."""


class OutputError(TSQPError):
    """Standard output cannot be written, and with it the answer."""


class LatticeError(TSQPError):
    """A lattice mask does not fit its product: a wrong hint or program, and no worker's doing."""


class RecordingError(TSQPError):
    """A recording of what a worker received cannot be written, or is none."""


class ReportError(TSQPError):
    """A file that is no call log and no result of a benchmark, or a damaged one."""


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
        out_of_memory: what failed would not have fitted in the worker's memory.
    """

    def __init__(
        self, message: str, remote_traceback: str = "", *, out_of_memory: bool = False
    ) -> None:
        super().__init__(message)
        self.remote_traceback = remote_traceback
        self.out_of_memory = out_of_memory
