"""Steps: schedule, run, postprocess."""

from collections import abc, deque
from contextlib import suppress
from dataclasses import replace
from itertools import count
from time import perf_counter, process_time

import torch
from torch import Tensor

from tsqp.errors import OutOfMemory, PromptError, TSQPError
from tsqp.model.config import ModelConfig
from tsqp.tee.call_log import CallLog
from tsqp.tee.checks import check_params, check_prompt
from tsqp.tee.conversation import Conversation
from tsqp.tee.conversation_kv import ConversationKv
from tsqp.tee.decoder import Decoder
from tsqp.tee.lanes import run_lanes
from tsqp.tee.offload.base import Offload
from tsqp.tee.sampler import Sampler
from tsqp.tee.sampling import Completion, SamplingParams
from tsqp.tee.scoring import Scores, score
from tsqp.tee.sequence import Chunk, Output, Sequence, flat_batch, share_out
from tsqp.tee.stats import Stats
from tsqp.tee.text.text_stream import TextStream
from tsqp.tee.text.tokenizer import Tokenizer


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
        call_log: told of each step.
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
        call_log: CallLog | None = None,
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
        self._kept = ConversationKv(offload, config)
        self._call_log = call_log
        self._ids = count()
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    def add(
        self,
        prompt_ids: abc.Sequence[int],
        params: SamplingParams,
        *,
        conversation: Conversation | None = None,
    ) -> int:
        """Queue a prompt and return the id of its sequence.

        Args:
            params: of one answer; `n` is for `generate`.
            conversation: begin with the KV that the last sequence of this conversation left, as far
                as the prompts begin alike, and leave it for the next.

        Raises:
            PromptError: the prompt is empty, leaves no room for an answer, or it or `params` hold
                an id that the model does not have; or there are stop strings and no tokenizer.
        """
        check_prompt(prompt_ids, self._config)
        check_params(params, self._config)
        ending_ids = {
            *(params.stop_token_ids or ()),
            *(() if params.ignore_eos else self._config.eos_token_ids),
        }
        prompt_tokens, number = len(prompt_ids), next(self._ids)
        sequence = Sequence(
            id=number,
            params=params,
            token_ids=list(prompt_ids),
            prompt_tokens=prompt_tokens,
            capacity=min(prompt_tokens + params.max_tokens, self._config.max_positions),
            ending_ids=ending_ids,
            sampler=Sampler(params, prompt_ids, ending_ids),
            stream=self._stream(params, prompt_ids),
            kv_id=number,
            conversation=conversation,
        )
        self._waiting.append(sequence)
        return number

    def step(self) -> list[Output]:
        """Compute one batch, and return one output for each sequence that got a token.

        Raises:
            WorkerError: the worker failed; all sequences have been given up and freed.
            OutOfMemory: not even one sequence fits; likewise.
        """
        if self._call_log is not None:
            self._call_log.flush()
        began, cpu_began = perf_counter(), self._cpu_clock()
        try:
            self._admit()
            chunks = self._schedule()
            prompt_tokens = sum(c.length for c in chunks if c.sequence.in_prompt)
            if self._call_log is not None:
                self._call_log.begin_step("prefill" if prompt_tokens else "decode", self.stats)
            with torch.inference_mode():
                outputs = self._run(chunks)
        except BaseException:
            if self._call_log is not None:
                seconds, cpu_seconds = perf_counter() - began, self._cpu_clock() - cpu_began
                self._call_log.end_step(self.stats, seconds, cpu_seconds, 0)
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
        if self._call_log is not None:
            tokens = prompt_tokens or len(chunks)
            self._call_log.end_step(self.stats, seconds, cpu_seconds, tokens)
        return outputs

    def generate(
        self,
        prompts: abc.Sequence[abc.Sequence[int]],
        params: SamplingParams,
        on_text: abc.Callable[[int, str], None] | None = None,
        *,
        on_progress: abc.Callable[[int, int], None] | None = None,
        should_stop: abc.Callable[[], bool] | None = None,
        conversation: Conversation | None = None,
    ) -> list[Completion]:
        """Complete several prompts and return their answers in order; nothing else may be queued.

        Args:
            on_text: called with the place of an answer among all and each new piece of it.
            on_progress: called after each step with prompt tokens: how many have been computed,
                and how many are to be.
            should_stop: asked before each step; once true, every answer ends with what it has.
            conversation: see `add`; for one answer. Without it, no KV is kept any longer.

        Raises:
            PromptError: see `add`; then no prompt is run.
            WorkerError: see `step`.
        """
        self._abandon()  # what an interrupt may have left of the last call
        assert conversation is None or len(prompts) == params.n == 1
        if conversation is None:
            self._kept.drop()
        completions: dict[int, Completion] = {}
        places: dict[int, int] = {}
        read_before = self.stats.prefill_tokens
        to_read = params.n * sum(map(len, prompts)) + self.stats.reused_tokens
        done = 0
        try:
            for prompt in prompts:
                for index in range(params.n):
                    number = self.add(prompt, params.of_answer(index), conversation=conversation)
                    places[number] = len(places)
            while self.has_unfinished:
                is_over = should_stop is not None and should_stop()
                outputs = self._stop() if is_over else self.step()
                if on_progress is not None and self.stats.prefill_tokens > read_before + done:
                    done = self.stats.prefill_tokens - read_before
                    on_progress(done, to_read - self.stats.reused_tokens)
                for output in outputs:
                    place = places[output.sequence]
                    if on_text is not None and output.text:
                        on_text(place, output.text)
                    if output.completion is not None:
                        index = place % params.n
                        completions[place] = replace(output.completion, index=index)
        finally:
            self._abandon()  # does nothing unless something was raised
        return [completions[place] for place in range(len(places))]

    def score(self, prompt_ids: abc.Sequence[int]) -> Scores:
        """How likely each token of a prompt is after those before it; nothing else may be queued.

        Raises:
            PromptError: the prompt has fewer than two tokens, is longer than the context, or holds
                an id that the model does not have.
            WorkerError: see `step`.
        """
        self._abandon()
        if len(prompt_ids) < 2:
            raise PromptError("There is nothing to score: give at least two tokens.")
        check_prompt(prompt_ids, self._config, answer=0)
        self._kept.drop()
        sequence = next(self._ids)
        self._offload.alloc(sequence, len(prompt_ids))
        try:
            chunk, stats = self._prefill_chunk, self.stats
            return score(self._decoder, self._offload, sequence, prompt_ids, chunk, stats)
        finally:
            with suppress(TSQPError):  # a worker that is gone cannot free anything
                self._offload.free(sequence)

    def forget(self, conversation: Conversation) -> None:
        """Free what is kept of a conversation; nothing may be queued."""
        with suppress(TSQPError):  # a worker that is gone cannot free anything
            self._kept.drop(conversation)

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
                if sequence.conversation is not None:
                    self._kept.admit(sequence)
                else:
                    self._offload.alloc(sequence.kv_id, sequence.capacity)
            except OutOfMemory:
                if self._running:
                    return  # it gets its turn when another ends
                raise
            self.stats.reused_tokens += sequence.computed
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
        # A worker that keeps the KV must get a prompt in order, which two lanes do not promise.
        may_cut = self._offload.placement.kv_in_tee
        parts = share_out(chunks, self._lanes, may_cut=may_cut)
        lanes = [self._decoder.forward(flat_batch(part), self.stats) for part in parts]
        outputs = []
        for part, logits_RV in zip(parts, run_lanes(self._offload, lanes, self.stats), strict=True):
            rows = logits_RV.split_with_sizes([len(chunk.wanted) for chunk in part])
            for chunk, chunk_RV in zip(part, rows, strict=True):
                sequence, ended = chunk.sequence, chunk.ends_known_tokens
                if sequence.rates_prompt:
                    with self.stats.time("sampling"):
                        sequence.rate_prompt(chunk_RV)
                sequence.computed += chunk.length
                if ended:
                    outputs.append(self._advance(sequence, chunk_RV[-1]))
        return outputs

    def _advance(self, sequence: Sequence, logits_V: Tensor) -> Output:
        """Choose the next token, and end the sequence if it is the last."""
        with self.stats.time("sampling"):
            token_id = sequence.choose(logits_V)
        text, reason = sequence.read()
        if reason is None:
            return Output(sequence.id, token_id, text, None)
        self._release(sequence)
        rest, completion = sequence.complete(reason)
        return Output(sequence.id, token_id, text + rest, completion)

    def _stop(self) -> list[Output]:
        """End every sequence with what it has."""
        stopped = [*self._running, *self._waiting]
        self._waiting.clear()
        for sequence in list(self._running):
            self._release(sequence)
        return [Output(each.id, None, *each.complete("abort")) for each in stopped]

    def _release(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        if sequence.conversation is not None:
            self._kept.hold(sequence)
        else:
            self._offload.free(sequence.kv_id)

    def _abandon(self) -> None:
        """Free everything after a failure; a worker that is gone cannot free anything."""
        self._waiting.clear()
        for sequence in list(self._running):
            sequence.conversation = None
            with suppress(TSQPError):
                self._release(sequence)
