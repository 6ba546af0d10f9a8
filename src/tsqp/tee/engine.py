"""Steps: schedule, run, postprocess."""

from collections import abc, deque
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter, process_time

import torch
from torch import Tensor

from tsqp.errors import OutOfMemory, PromptError, TSQPError
from tsqp.model.config import ModelConfig
from tsqp.tee.decoder import Decoder
from tsqp.tee.lanes import run_lanes
from tsqp.tee.offload.base import Offload
from tsqp.tee.sampler import Sampler
from tsqp.tee.sampling import Completion, FinishReason, SamplingParams
from tsqp.tee.scoring import Scores, score
from tsqp.tee.sequence import Chunk, Sequence, flat_batch
from tsqp.tee.stats import Stats
from tsqp.tee.text_stream import TextStream
from tsqp.tee.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Output:
    """What one step added to one sequence.

    Attributes:
        sequence: the id that `Engine.add` returned.
        token_id: the token it chose.
        text: the text that became certain, which may be empty.
        completion: the whole answer, if this token ended it.
    """

    sequence: int
    token_id: int
    text: str
    completion: Completion | None


@dataclass(slots=True)
class _Work:
    """What one lane does in one step."""

    chunks: list[Chunk] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


class Engine:
    """Runs requests together: a step computes the next token, or piece of the prompt, of each.

    Not thread-safe: one thread calls all methods.

    Args:
        tokenizer: without one, prompts and answers are token ids only.
        prefill_chunk: prompt tokens a step at most. A prompt is cut at its multiples whatever
            else runs, so a sequence's attention is computed alike in any company.
        max_sequences: sequences that run at the same time; the others wait.
        lanes: parts into which a step's tokens are split, so that this side works on one while
            the worker works on another.
        cpu_clock: seconds of processor time that count as work of the steps.
    """

    def __init__(
        self,
        decoder: Decoder,
        offload: Offload,
        config: ModelConfig,
        tokenizer: Tokenizer | None = None,
        stats: Stats | None = None,
        *,
        prefill_chunk: int = 512,
        max_sequences: int = 64,
        lanes: int = 1,
        cpu_clock: abc.Callable[[], float] = process_time,
    ) -> None:
        assert min(prefill_chunk, max_sequences, lanes) >= 1
        self.stats = Stats() if stats is None else stats
        self._decoder = decoder
        self._offload = offload
        self._config = config
        self._tokenizer = tokenizer
        self._prefill_chunk = prefill_chunk
        self._max_sequences = max_sequences
        self._lanes = lanes
        self._cpu_clock = cpu_clock
        self._ids = count()
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, prompt_ids: abc.Sequence[int], params: SamplingParams) -> int:
        """Queue a prompt and return the id of its sequence.

        Raises:
            PromptError: the prompt is empty, leaves no room for an answer, or holds an id that
                the model does not have; or there are stop strings and no tokenizer.
        """
        self._check(prompt_ids)
        prompt_tokens = len(prompt_ids)
        sequence = Sequence(
            id=next(self._ids),
            params=params,
            token_ids=list(prompt_ids),
            prompt_tokens=prompt_tokens,
            capacity=min(prompt_tokens + params.max_tokens, self._config.max_positions),
            sampler=Sampler(params),
            stream=self._stream(params, prompt_ids),
        )
        self._waiting.append(sequence)
        return sequence.id

    def step(self) -> list[Output]:
        """Compute one batch, and return one output for each sequence that got a token.

        Raises:
            WorkerError: the worker failed; all sequences have been given up and freed.
            OutOfMemory: not even one sequence fits; likewise.
        """
        began, cpu_began = perf_counter(), self._cpu_clock()
        try:
            self._admit()
            chunks = self._schedule()
            prompt_tokens = sum(c.length for c in chunks if c.sequence.in_prompt)
            with torch.inference_mode():
                outputs = self._run(chunks)
        except BaseException:
            self._abandon()
            raise
        seconds, cpu_seconds = perf_counter() - began, self._cpu_clock() - cpu_began
        self.stats.prefill_tokens += prompt_tokens
        if prompt_tokens:
            self.stats.prefill_s += seconds
            self.stats.prefill_cpu_s += cpu_seconds
        else:
            self.stats.decode_tokens += len(chunks)
            self.stats.decode_s += seconds
            self.stats.decode_cpu_s += cpu_seconds
        return outputs

    def generate(
        self,
        prompts: abc.Sequence[abc.Sequence[int]],
        params: SamplingParams,
        on_text: abc.Callable[[int, str], None] | None = None,
    ) -> list[Completion]:
        """Complete several prompts and return their answers in order; nothing else may be queued.

        Args:
            on_text: called with the number of the prompt and each new piece of its answer.

        Raises:
            PromptError: see `add`; then no prompt is run.
            WorkerError: see `step`.
        """
        assert not self.has_unfinished
        completions: dict[int, Completion] = {}
        try:
            numbers = {self.add(prompt, params): n for n, prompt in enumerate(prompts)}
            while self.has_unfinished:
                for output in self.step():
                    number = numbers[output.sequence]
                    if on_text is not None and output.text:
                        on_text(number, output.text)
                    if output.completion is not None:
                        completions[number] = output.completion
        finally:
            self._abandon()  # does nothing unless something was raised
        return [completions[number] for number in range(len(prompts))]

    def score(self, prompt_ids: abc.Sequence[int]) -> Scores:
        """How likely each token of a prompt is after those before it; nothing else may be queued.

        Raises:
            PromptError: the prompt has fewer than two tokens, is longer than the context, or holds
                an id that the model does not have.
            WorkerError: see `step`.
        """
        assert not self.has_unfinished
        if len(prompt_ids) < 2:
            raise PromptError("There is nothing to score: give at least two tokens.")
        self._check(prompt_ids, answer=0)
        sequence = next(self._ids)
        self._offload.alloc(sequence, len(prompt_ids))
        try:
            chunk, stats = self._prefill_chunk, self.stats
            return score(self._decoder, self._offload, sequence, prompt_ids, chunk, stats)
        finally:
            with suppress(TSQPError):  # a worker that is gone cannot free anything
                self._offload.free(sequence)

    def abort(self, sequence: int) -> None:
        """Give up a sequence; one that has ended already is no error."""
        for waiting in self._waiting:
            if waiting.id == sequence:
                self._waiting.remove(waiting)
                return
        for running in self._running:
            if running.id == sequence:
                self._release(running)
                return

    def _check(self, prompt_ids: abc.Sequence[int], answer: int = 1) -> None:
        config = self._config
        if not prompt_ids:
            raise PromptError("The prompt is empty: give at least one token.")
        if len(prompt_ids) + answer > config.max_positions:
            raise PromptError(
                f"The prompt has {len(prompt_ids)} tokens, and this model's maximum context length"
                f" is {config.max_positions} tokens, the answer included: shorten the prompt."
            )
        if min(prompt_ids) < 0 or max(prompt_ids) >= config.vocab_size:
            raise PromptError(
                f"The prompt has a token id outside the model's vocabulary of"
                f" {config.vocab_size}: encode it with this model's tokenizer."
            )

    def _stream(self, params: SamplingParams, prompt_ids: abc.Sequence[int]) -> TextStream | None:
        if self._tokenizer is not None and self._tokenizer.exists:
            return TextStream(self._tokenizer, params.stop_strings, prompt_ids)
        if params.stop_strings:
            raise PromptError("Stop strings need a tokenizer, and this model has none.")
        return None

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_sequences:
            sequence = self._waiting[0]
            try:
                self._offload.alloc(sequence.id, sequence.capacity)
            except OutOfMemory:
                if self._running:
                    return  # it gets its turn when another ends
                raise
            self._running.append(self._waiting.popleft())

    def _schedule(self) -> list[Chunk]:
        """One token of each sequence that decodes, and whole prompt chunks in order of arrival."""
        chunks = []
        budget = self._prefill_chunk
        for sequence in self._running:
            length = min(sequence.remaining, self._prefill_chunk)
            chunk = Chunk(sequence, sequence.computed, length)
            if not sequence.in_prompt:
                chunks.append(chunk)
            elif length <= budget:
                budget -= length
                chunks.append(chunk)
            else:
                budget = 0  # who comes later does not overtake
        return chunks

    def _run(self, chunks: list[Chunk]) -> list[Output]:
        works = self._share_out(chunks)
        lanes = [self._decoder.forward(flat_batch(work.chunks), self.stats) for work in works]
        outputs = []
        for work, logits_RV in zip(works, run_lanes(self._offload, lanes, self.stats), strict=True):
            rows = iter(logits_RV)
            for chunk in work.chunks:
                ended = chunk.ends_known_tokens
                chunk.sequence.computed += chunk.length
                if ended:
                    outputs.append(self._advance(chunk.sequence, next(rows)))
        return outputs

    def _share_out(self, chunks: list[Chunk]) -> list[_Work]:
        """A step's work for each lane; the later part of a long prompt goes to a later lane."""
        works = [_Work() for _ in range(self._lanes)]
        for chunk in chunks:
            parts = chunk.split(self._lanes)
            if len(parts) == 1:
                min(works, key=lambda work: work.tokens).chunks.append(chunk)
            else:
                for work, part in zip(works, parts, strict=False):
                    work.chunks.append(part)
        return [work for work in works if work.chunks]

    def _advance(self, sequence: Sequence, logits_V: Tensor) -> Output:
        """Choose the next token, and end the sequence if it is the last."""
        with self.stats.time("sampling"):
            token_id = sequence.sampler.sample(logits_V)
        sequence.token_ids.append(token_id)
        stream, params = sequence.stream, sequence.params
        is_eos = token_id in self._config.eos_token_ids and not params.ignore_eos
        text = stream.push(token_id) if stream and not is_eos else ""

        reason: FinishReason | None = None
        if is_eos or (stream and stream.stopped):
            reason = "stop"
        elif len(sequence.token_ids) >= sequence.capacity:
            reason = "length"
        if reason is None:
            return Output(sequence.id, token_id, text, None)
        self._release(sequence)
        if stream:
            text += stream.finish()
        completion = Completion(
            text=stream.text if stream else "",
            token_ids=tuple(sequence.token_ids[sequence.prompt_tokens :]),
            prompt_tokens=sequence.prompt_tokens,
            finish_reason=reason,
        )
        return Output(sequence.id, token_id, text, completion)

    def _release(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._offload.free(sequence.id)

    def _abandon(self) -> None:
        """Free everything after a failure; a worker that is gone cannot free anything."""
        self._waiting.clear()
        for sequence in list(self._running):
            with suppress(TSQPError):
                self._release(sequence)
