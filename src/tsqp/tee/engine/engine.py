"""Requests that run together: add, step, abort."""

import logging
from collections import abc
from contextlib import suppress
from itertools import count
from time import monotonic

import torch
from torch import Tensor

from tsqp.errors import (
    IntegrityError,
    LatticeError,
    OutOfMemory,
    PromptError,
    ProtocolError,
    TSQPError,
    WorkerLost,
)
from tsqp.model.config import ModelConfig
from tsqp.tee.conversation import Conversation
from tsqp.tee.decoder import Decoder
from tsqp.tee.engine.batch import flat_batch, split_into_microbatches
from tsqp.tee.engine.conversation_kv import ConversationKv
from tsqp.tee.engine.interleave import run_interleaved
from tsqp.tee.engine.observer import Observer
from tsqp.tee.engine.scheduler import Scheduler
from tsqp.tee.engine.scoring import Scores, score
from tsqp.tee.engine.sequence import Chunk, Output, Sequence
from tsqp.tee.guided.guide import Guide, Guides
from tsqp.tee.offload.offload import Offload
from tsqp.tee.request_checks import check_params, check_prompt
from tsqp.tee.sampler import Sampler
from tsqp.tee.sampling import SamplingParams
from tsqp.tee.stats import Stats
from tsqp.tee.text.text_stream import TextStream
from tsqp.tee.text.tokenizer import Tokenizer

log = logging.getLogger("tsqp")

# After these errors the session with a worker is over, and its offload cannot be used any more.
SESSION_OVER = (WorkerLost, ProtocolError, IntegrityError, LatticeError)
MAX_RESTARTS = 1  # of one sequence, because its prompt may be what ends the sessions


class Engine:
    """Runs requests together: a step computes the next token, or piece of the prompt, of each.

    An error of one request becomes the output of that request, and the others continue. Not
    thread-safe: one thread calls all methods but `compile`.

    Args:
        tokenizer: without one, prompts and answers are token ids only.
        observer: measures the steps.
        prefill_chunk, max_num_seqs: see `Scheduler`.
        microbatches: number of parts into which the tokens of a step are divided, so that the TEE
            works on one part while the worker works on another.
        rebuild: makes a new offload after the worker was lost, or raises TSQPError. The requests
            then begin again, each of them once. It is not called after another error of a session,
            because the worker, or a lattice mask, is then not to be trusted.
    """

    def __init__(
        self,
        decoder: Decoder,
        offload: Offload,
        config: ModelConfig,
        tokenizer: Tokenizer | None = None,
        observer: Observer | None = None,
        *,
        prefill_chunk: int = 512,
        max_num_seqs: int = 64,
        microbatches: int = 1,
        rebuild: abc.Callable[[], Offload] | None = None,
    ) -> None:
        assert microbatches >= 1
        self._decoder = decoder
        self._offload = offload
        self._config = config
        self._tokenizer = tokenizer
        self._observer = Observer() if observer is None else observer
        self._prefill_chunk = prefill_chunk
        self._microbatches = microbatches
        self._rebuild = rebuild
        self._scheduler = Scheduler(max_num_seqs=max_num_seqs, prefill_chunk=prefill_chunk)
        self._kept = ConversationKv(offload, config)
        self._guides = Guides(tokenizer, config)
        self._ids = count()

    @property
    def stats(self) -> Stats:
        return self._observer.stats

    @property
    def has_unfinished(self) -> bool:
        return self._scheduler.has_unfinished

    @property
    def kv_usage(self) -> float:
        """The part of the memory for keys and values that is in use; 0 if it has no limit."""
        return 0.0

    @property
    def num_running(self) -> int:
        """Number of running sequences; any thread may ask."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Number of waiting sequences; any thread may ask."""
        return self._scheduler.num_waiting

    def add(
        self,
        prompt_ids: abc.Sequence[int],
        params: SamplingParams,
        *,
        conversation: Conversation | None = None,
        tenant: str = "",
        cache_salt: str = "",
    ) -> int:
        """Queue a prompt and return the id of its sequence.

        Args:
            params: the parameters of one answer; `tsqp.runtime.generate` handles `n`.
            conversation: reuse the KV of the last sequence of this conversation as far as the
                prompts begin alike, and keep the KV for its next sequence. None frees kept KV.
            tenant, cache_salt: whose prompt it is. Nothing is shared between sequences yet.

        Raises:
            PromptError: the prompt is empty, leaves no room for an answer, or it or `params` hold
                an id that the model does not have; or there are stop strings and no tokenizer; or
                the structured outputs cannot be followed.
            UsageError: structured outputs need a package that is not installed.
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
            sampler=Sampler(params, prompt_ids, ending_ids, self._guide(params)),
            stream=self._stream(params, prompt_ids),
            kv_id=number,
            conversation=conversation,
        )
        if conversation is None:
            self._drop_kept()
        self._scheduler.add(sequence)
        return number

    def compile(self, params: SamplingParams) -> None:
        """Compile the grammar of structured outputs, which may take a second or two, for `add`.

        `add` does it itself if need be. This method may be called from any thread, and saves the
        thread of the engine the time if `add` gets the same `structured_outputs` object.

        Raises:
            PromptError, UsageError: see `add`.
        """
        self._guide(params)

    def step(self) -> list[Output]:
        """Compute one batch, and return an output for each sequence that got a token or an error.

        An exception means a bug in this program or an interrupt, and ends all sequences.
        """
        try:
            with self._observer.step() as step, torch.inference_mode():
                outputs = self._admit()
                chunks = self._scheduler.schedule()
                step.begin(chunks)
                try:
                    return outputs + self._run(chunks)
                except TSQPError as error:
                    step.failed = True
                    return outputs + self._recover(chunks, error)
        except BaseException:
            self.abort_all()
            raise

    def abort(self, number: int) -> None:
        """Give up a sequence. Does nothing if it has ended already."""
        sequence = self._scheduler.find(number)
        if sequence is not None:
            sequence.conversation = None
            self._release(sequence)

    def abort_all(self) -> None:
        """Give up all sequences."""
        for sequence in self._scheduler.unfinished:
            self.abort(sequence.id)

    def stop(self) -> list[Output]:
        """End every sequence with the answer so far."""
        stopped = self._scheduler.unfinished
        for sequence in stopped:
            self._release(sequence)
        return [Output(each.id, None, *each.complete("abort")) for each in stopped]

    def score(self, prompt_ids: abc.Sequence[int]) -> Scores:
        """The log-probability of each token of a prompt. No other request may be queued.

        Raises:
            PromptError: the prompt has fewer than two tokens, is longer than the context, or holds
                an id that the model does not have.
            WorkerError: the worker failed.
        """
        self.abort_all()  # an interrupt may have left sequences
        if len(prompt_ids) < 2:
            raise PromptError("There is nothing to score: give at least two tokens.")
        check_prompt(prompt_ids, self._config, answer=0)
        self._drop_kept()
        try:
            return self._score(prompt_ids)
        except SESSION_OVER as error:
            if not self._replace_offload(error):
                raise
        try:
            return self._score(prompt_ids)
        except SESSION_OVER as error:
            self._replace_offload(error)  # for the next request, if there may be another one
            raise

    def forget(self, conversation: Conversation) -> None:
        """Free the kept KV of a conversation."""
        self._drop_kept(conversation)

    def reconnect(self) -> bool:
        """Begin a new session with a worker that is lost, while no request is queued.

        Returns:
            whether there is one.
        """
        assert not self.has_unfinished
        return self._replace_offload(WorkerLost("The worker is lost."))

    def close(self) -> None:
        """Close the offload, and make no other; safe to call twice."""
        self._rebuild = None
        self._offload.close()

    def _stream(self, params: SamplingParams, prompt_ids: abc.Sequence[int]) -> TextStream | None:
        if self._tokenizer is not None and self._tokenizer.exists:
            # A grammar is about the answer's own bytes.
            before = prompt_ids if params.structured_outputs is None else None
            skip = params.skip_special_tokens
            stops = params.stop_strings
            return TextStream(self._tokenizer, stops, before, skip_special_tokens=skip)
        if params.stop_strings:
            raise PromptError("Stop strings need a tokenizer, and this model has none.")
        return None

    def _guide(self, params: SamplingParams) -> Guide | None:
        wanted = params.structured_outputs
        return None if wanted is None else self._guides.guide(wanted)

    def _score(self, prompt_ids: abc.Sequence[int]) -> Scores:
        sequence = next(self._ids)
        self._offload.alloc(sequence, len(prompt_ids))
        try:
            chunk, stats = self._prefill_chunk, self.stats
            return score(self._decoder, self._offload, sequence, prompt_ids, chunk, stats)
        finally:
            with suppress(TSQPError):  # a worker that is gone cannot free anything
                self._offload.free(sequence)

    def _admit(self) -> list[Output]:
        """Start sequences as far as there is memory; returns errors of those that cannot run."""
        outputs: list[Output] = []
        while (sequence := self._scheduler.next_to_admit()) is not None:
            try:
                if sequence.conversation is not None:
                    self._kept.admit(sequence)
                else:
                    self._offload.alloc(sequence.kv_id, sequence.capacity)
            except TSQPError as error:
                if isinstance(error, SESSION_OVER):
                    return outputs + self._begin_again([sequence], error)
                if isinstance(error, OutOfMemory) and self._scheduler.running:
                    break  # it gets its turn when another ends
                outputs.append(self._fail(sequence, error))
                continue
            self.stats.reused_tokens += sequence.computed
            self._scheduler.admit()
            if sequence.admitted_at is None:
                sequence.admitted_at = monotonic()
        return outputs

    def _run(self, chunks: abc.Sequence[Chunk]) -> list[Output]:
        """Compute some chunks; raises TSQPError before any of them has a new token."""
        # A worker that keeps the KV must get a prompt in order, which two passes do not promise.
        may_cut = self._offload.placement.kv_in_tee
        parts = split_into_microbatches(chunks, self._microbatches, may_cut=may_cut)
        passes = [self._decoder.forward(flat_batch(part), self.stats) for part in parts]
        outputs = []
        logits = run_interleaved(self._offload, passes, self.stats)
        for part, logits_RV in zip(parts, logits, strict=True):
            rows = logits_RV.split_with_sizes([len(chunk.wanted) for chunk in part])
            for chunk, chunk_RV in zip(part, rows, strict=True):
                output = self._advance(chunk, chunk_RV)
                if output is not None:
                    outputs.append(output)
        return outputs

    def _advance(self, chunk: Chunk, logits_RV: Tensor) -> Output | None:
        """Take the result of a chunk: rate the prompt, choose the next token, end the sequence."""
        sequence, ended = chunk.sequence, chunk.ends_known_tokens
        try:
            with self.stats.time("sampling"):
                if sequence.rates_prompt:
                    sequence.rate_prompt(logits_RV)
                sequence.computed += chunk.length
                if not ended:
                    return None
                sequence.choose(logits_RV[-1])
            text, reason = sequence.read()
            if reason is None:
                return sequence.output(text)
            self._release(sequence)
            rest, completion = sequence.complete(reason)
            return sequence.output(text + rest, completion)
        except TSQPError as error:
            return self._fail(sequence, error)

    def _recover(self, chunks: abc.Sequence[Chunk], error: TSQPError) -> list[Output]:
        """Continue after a step whose chunks could not be computed; returns the errors."""
        sequences = [chunk.sequence for chunk in chunks]
        if isinstance(error, SESSION_OVER):
            return self._begin_again(sequences, error)
        if len(chunks) == 1:
            return [self._fail(sequences[0], error)]
        # Perhaps only one sequence is at fault, so each chunk is computed separately.
        outputs: list[Output] = []
        try:
            for sequence in sequences:
                self._offload.truncate(sequence.kv_id, sequence.computed)
        except TSQPError as over:
            return self._begin_again(sequences, over)
        for place, chunk in enumerate(chunks):
            try:
                outputs += self._run([chunk])
            except SESSION_OVER as over:
                return outputs + self._begin_again(sequences[place:], over)
            except TSQPError as own:
                outputs.append(self._fail(chunk.sequence, own))
        return outputs

    def _begin_again(self, affected: abc.Sequence[Sequence], error: TSQPError) -> list[Output]:
        """Replace the offload after the end of its session, and restart the sequences.

        The affected ones end with the error if they have been restarted before. If there is no new
        offload, all of them do.
        """
        self._drop_kept()
        failed = [each for each in affected if each.restarts >= MAX_RESTARTS]
        outputs = [self._fail(sequence, error) for sequence in failed]
        for sequence in affected:
            sequence.restarts += 1
        for sequence in self._scheduler.running:
            with suppress(TSQPError):  # a worker that is gone cannot free anything
                self._offload.free(sequence.kv_id)
            sequence.restart()
        self._scheduler.requeue()
        if not self._replace_offload(error):
            outputs += [self._fail(each, error) for each in self._scheduler.unfinished]
        return outputs

    def _replace_offload(self, error: TSQPError) -> bool:
        """Rebuild the offload after the end of its session; False if there is no new one.

        Only a lost worker is tried again, and not one that broke the protocol or sent a wrong
        product. A wrong lattice mask is not tried again either.
        """
        if not isinstance(error, WorkerLost):
            self._rebuild = None  # and with it the check vectors that it may hold
        if self._rebuild is None:
            return False
        with suppress(TSQPError):  # with its masks, before there are more
            self._offload.close()
        try:
            self._offload = self._rebuild()
        except TSQPError as cause:
            if isinstance(cause, SESSION_OVER) and not isinstance(cause, WorkerLost):
                self._rebuild = None
            log.warning("no new session with the worker: %s", cause)
            return False
        self._kept = ConversationKv(self._offload, self._config)
        self._decoder.most_scores = self._offload.most_scores
        log.warning("a new session with the worker has begun, because the last one was lost")
        return True

    def _fail(self, sequence: Sequence, error: TSQPError) -> Output:
        """End a sequence with an error."""
        sequence.conversation = None
        self._release(sequence)
        return Output(sequence.id, error=error)

    def _release(self, sequence: Sequence) -> None:
        """Remove a sequence, and free its KV or keep it for the conversation."""
        if not self._scheduler.remove(sequence):
            return
        with suppress(TSQPError):  # a worker that is gone cannot free anything
            if sequence.conversation is not None:
                self._kept.hold(sequence)
            else:
                self._offload.free(sequence.kv_id)

    def _drop_kept(self, conversation: Conversation | None = None) -> None:
        with suppress(TSQPError):  # a worker that is gone cannot free anything
            self._kept.drop(conversation)
