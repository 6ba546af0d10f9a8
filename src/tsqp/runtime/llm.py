"""`LLM`: joins model, offload and engine into something that answers."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from tsqp.errors import PromptError, UsageError
from tsqp.runtime.dropped import call_when_dropped
from tsqp.runtime.generate import generate
from tsqp.runtime.loaded_model import LoadedModel
from tsqp.runtime.options import Options, show_options
from tsqp.runtime.turns import Turns
from tsqp.tee.conversation import Conversation
from tsqp.tee.crypto.pad_pool import PadPool, PadStats
from tsqp.tee.engine.scoring import Scores
from tsqp.tee.offload.offload import Offload
from tsqp.tee.placement import Placement
from tsqp.tee.request_checks import one_params, one_prompt, several_prompts
from tsqp.tee.sampling import Completion, SamplingParams
from tsqp.tee.stats import Stats
from tsqp.tee.text.tokenizer import Tokenizer
from tsqp.wire.channel import Channel, Counters

log = logging.getLogger("tsqp")


class LLM:
    """A model that answers from this process, which belongs in the TEE.

    Usable as a context manager. `close` ends the session with the worker; dropping the last
    reference, and the end of the program, do the same. Several threads may call one LLM: their
    calls run one after the other. A callback may not start another call, and a forked process
    cannot use the LLM of its parent; both raise UsageError. A program with secret prompts should
    call `tsqp.harden_process` first.
    """

    def __init__(
        self,
        model: str,
        options: Options | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        on_load: Callable[[int, int], None] | None = None,
        **given: Any,
    ) -> None:
        """Load what the TEE needs and open a session with a worker, or with each of shares.

        Args:
            model: a Hugging Face directory, a .gguf file, "random:NAME[:SEED]", or "demo".
            options: the options of the run. Or give its fields as keywords; see `tsqp.Options`.
            tokenizer: the model's tokenizer, if it has been read already.
            on_load: called while the TEE reads weights, with the bytes read and their total.

        Raises:
            UsageError: options are unknown or contradict each other, or the call log exists.
            ModelError: the checkpoint cannot be used, or is not the expected one.
            WorkerError: there is no worker, or it serves something else.
        """
        if options is not None and given:
            raise UsageError("Give options as one object, or as keywords, but not both.")
        self._turns = Turns()
        call_when_dropped(self, self._turns.end)
        try:
            self._model = LoadedModel(
                model,
                Options(**given) if options is None else options,
                tokenizer=tokenizer,
                on_load=on_load,
                at_end=self._turns.at_end,
            )
        except BaseException:
            self.close()
            raise
        self._engine, self._tokenizer = self._model.engine, self._model.tokenizer
        self._workers = self._model.workers
        self.config, self.dtype = self._model.config, self._model.dtype
        self.privacy = self._model.options.privacy

    def generate(
        self,
        prompts: str | Iterable[str] | Iterable[int] | Iterable[Iterable[int]],
        sampling_params: SamplingParams | None = None,
        *,
        on_text: Callable[[int, str], None] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Completion]:
        """Complete one or several prompts, all of them at once.

        Args:
            prompts: a text, token ids, or several of these. Token ids may be a list, a tuple, a
                range, or a one-dimensional array or tensor; a two-dimensional one has a prompt in
                each row.
            sampling_params: the sampling parameters, the same for all prompts.
            on_text: called with the position of an answer in the returned list, and each new piece
                of its text. The position is the number of the prompt unless `n` is above 1.
            on_progress: called after each step that includes prompt tokens, with the number
                computed so far and their total.
            should_stop: called before each step. Once it returns true, every answer ends as it is,
                with the finish_reason "abort".

        Returns:
            one completion for each prompt, in order. If `n` is above 1, there are `n` for each
            prompt, next to each other, numbered by their `index`.

        Raises:
            PromptError: a prompt is empty, longer than the model's context, or neither text nor
                token ids; or a parameter refers to tokens that the model does not have.
            WorkerError: the worker failed; nothing is left running.
            UsageError: the LLM was closed, before or during this call; or it was called from its
                own callback or in a forked process.
        """
        params = one_params(sampling_params)
        given = several_prompts(prompts)
        ids = [self.tokenize(each) if isinstance(each, str) else each for each in given]
        return self._turns.run(
            lambda: generate(
                self._engine,
                ids,
                params,
                on_text,
                on_progress=on_progress,
                should_stop=self._turns.heed(should_stop),
            )
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        *,
        on_text: Callable[[int, str], None] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        conversation: Conversation | None = None,
        split_special: bool = False,
    ) -> Completion:
        """Answer a conversation, `[{"role": "user", "content": "..."}, ...]`, once.

        The content of a message is a text, a list of text parts, or None if it has `tool_calls`.
        Other keys are passed to the model's chat template.

        Args:
            conversation: a handle from `LLM.conversation`. Keys and values are kept until the next
                call with it, and reused as far as both prompts begin alike. Floating-point results
                may then differ in the last bits.
            split_special: treat control tokens in messages as plain text. The other arguments are
                those of `generate`.

        Raises:
            TokenizerError: the model has no chat template, or the template fails.
            PromptError: see `generate`; or `n` is above 1 (use `tokenize` and `generate` instead);
                or the template refuses the conversation.
            UsageError: see `generate`.
        """
        params = one_params(sampling_params)
        if params.n > 1:
            raise PromptError("A chat has one answer: leave n at 1, or use tokenize and generate.")
        self._turns.check()
        ids = self._tokenizer.encode_chat(messages, split_special=split_special)
        [completion] = self._turns.run(
            lambda: generate(
                self._engine,
                [ids],
                params,
                on_text,
                on_progress=on_progress,
                should_stop=self._turns.heed(should_stop),
                conversation=conversation,
            )
        )
        return completion

    def conversation(self) -> Conversation:
        """A handle for `chat`, under which keys and values are kept from answer to answer."""
        turns, engine = self._turns, self._engine  # not self, which a handle must not keep alive

        def forget(conversation: Conversation) -> None:
            with suppress(UsageError):  # closed, which frees everything, or busy
                turns.run(lambda: engine.forget(conversation))

        return Conversation(forget)

    def tokenize(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        *,
        chat: bool = False,
        split_special: bool = False,
    ) -> list[int]:
        """The token ids of a text; with `chat`, of a conversation with this text as first message.

        A conversation may also be given as a list of messages.

        Args:
            split_special: in a conversation, treat control tokens in messages as plain text.

        Raises:
            TokenizerError: the model has no tokenizer, or no chat template.
            PromptError: the text is not valid Unicode, or the template refuses the conversation.
            UsageError: the LLM is closed, or this process is forked from its own.
        """
        self._turns.check()
        if isinstance(prompt, str):
            if not chat:
                return self._tokenizer.encode(prompt)
            prompt = [{"role": "user", "content": prompt}]
        return self._tokenizer.encode_chat(prompt, split_special=split_special)

    def score(self, prompt: str | Iterable[int]) -> Scores:
        """The log-probability of each token of a text or of token ids, given those before it.

        Raises:
            PromptError: fewer than two tokens, or more than the model's context.
            WorkerError: the worker failed.
            UsageError: see `generate`.
        """
        given = one_prompt(prompt)
        ids = self.tokenize(given) if isinstance(given, str) else given
        return self._turns.run(lambda: self._engine.score(ids))

    @property
    def model_digest(self) -> str:
        """The digest of every byte of the model that the TEE uses: "sha256:" and 64 digits.

        It is the same for all modes that compute in the same numeric form (docs/models.md).
        """
        return self._model.model_digest

    @property
    def stats(self) -> Stats:
        """Where the time of this process went since the model was loaded."""
        return self._engine.stats

    @property
    def placement(self) -> Placement:
        """Which side runs which operation."""
        return self._offload.placement

    @property
    def transport(self) -> str:
        """How calls and tensors reach the workers (docs/troubleshooting.md); "none" without any.

        If the workers have different transports, all are listed, in the order of the workers.
        """
        return self._model.sessions.transport

    @property
    def transport_reason(self) -> str:
        """Why this transport."""
        return self._model.sessions.transport_reason

    @property
    def rpc(self) -> Counters:
        """Counts of calls and bytes between the TEE and all workers since the session began."""
        return self._model.rpc

    @property
    def pads(self) -> PadStats | None:
        """How many pads were made ahead, and how many while waiting; None without pads."""
        return None if self._pads is None else self._pads.stats

    def fill_pads(self) -> None:
        """Wait until the stock of pads is full. It also fills while the LLM is idle.

        Raises:
            UsageError: the LLM is closed, or this process is forked from its own.
        """
        self._turns.check()
        if self._pads is not None:
            self._pads.fill()

    def close(self) -> None:
        """End all sessions, and stop local workers; safe to call twice, and from any thread.

        An answer that another thread waits for ends at its next token, and that call raises
        UsageError. If this is called from a callback, it returns at once, and the answer ends in
        the same way. In a forked process this closes nothing, because everything belongs to the
        parent.

        Raises:
            UsageError: a call in another thread does not end within a minute.
        """
        self._turns.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _options(self) -> Options:
        return self._model.options

    @property
    def _offload(self) -> Offload:
        return self._model.offload

    @property
    def _pads(self) -> PadPool | None:
        return self._model.pads

    @property
    def _channels(self) -> list[Channel]:
        return self._model.channels


show_options(LLM)
