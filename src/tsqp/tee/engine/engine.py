"""Requests that run together: add, step, abort."""

from collections import abc
from itertools import count

import torch
from torch import Tensor

from tsqp.errors import IntegrityError, OutOfMemory, TSQPError, WorkerLost
from tsqp.model.config import ModelConfig
from tsqp.tee.conversation import Conversation
from tsqp.tee.decoder import Decoder
from tsqp.tee.engine.intake import Intake
from tsqp.tee.engine.observer import Observer
from tsqp.tee.engine.runner import Runner
from tsqp.tee.engine.scheduler import Scheduler
from tsqp.tee.engine.scoring import Scores
from tsqp.tee.engine.sequence import Chunk, Output, Sequence
from tsqp.tee.engine.session import SESSION_OVER, Session
from tsqp.tee.engine.shared_prompt import share_prompt
from tsqp.tee.offload.offload import Offload
from tsqp.tee.sampling import SamplingParams
from tsqp.tee.stats import Stats
from tsqp.tee.text.tokenizer import Tokenizer


class Engine:
    """Runs requests together: a step computes the next token, or piece of the prompt, of each.

    An error of one request becomes the output of that request, and the others continue. Not
    thread-safe: one thread calls all methods but `compile` and `cancel`.

    Args:
        tokenizer: without one, prompts and answers are token ids only.
        observer: measures the steps.
        prefill_chunk, max_num_seqs: see `Scheduler`.
        microbatches: number of parts into which the tokens of a step are divided, so that the TEE
            works on one part while the worker works on another.
        rebuild: makes a new offload after a session ended with the given error, or raises
            TSQPError; see `Session`. The requests then continue. It is not called after a
            LatticeError, because no lattice mask is then to be trusted.
        max_restarts: how often one request continues after its worker was lost or broke the
            protocol.
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
        rebuild: abc.Callable[[TSQPError], Offload] | None = None,
        max_restarts: int = 1,
    ) -> None:
        self._session = Session(offload, config, decoder, rebuild)
        self._config = config
        self._intake = Intake(config, tokenizer)
        self._observer = Observer() if observer is None else observer
        self._runner = Runner(decoder, self._observer.stats, microbatches, prefill_chunk)
        self._max_restarts = max_restarts  # the prompt may be what ends the sessions
        self._scheduler = Scheduler(max_num_seqs=max_num_seqs, prefill_chunk=prefill_chunk)
        self._ids = count()
        self._usage = 0.0

    @property
    def stats(self) -> Stats:
        return self._observer.stats

    @property
    def has_unfinished(self) -> bool:
        return self._scheduler.has_unfinished

    @property
    def num_running(self) -> int:
        """Number of running sequences; any thread may ask."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Number of waiting sequences, preempted ones included; any thread may ask."""
        return self._scheduler.num_waiting

    def num_waiting_of(self, tenant: str) -> int:
        """Number of waiting sequences of one tenant; any thread may ask."""
        return self._scheduler.num_waiting_of(tenant)

    @property
    def kv_usage(self) -> float:
        """The part of the memory for keys and values that running sequences use; 0 if it has no
        limit. Any thread may ask.
        """
        return self._usage

    @property
    def max_model_len(self) -> int:
        """Maximum number of tokens of a prompt and its answer together."""
        context, most = self._config.max_positions, self._session.kv.most_tokens
        return context if most is None else min(context, most)

    def add(
        self,
        prompt_ids: abc.Sequence[int],
        params: SamplingParams,
        *,
        conversation: Conversation | None = None,
        tenant: str = "",
        cache_salt: str = "",
        sibling: int | None = None,
    ) -> int:
        """Queue a prompt and return the id of its sequence.

        Args:
            params: the parameters of one answer; `tsqp.runtime.generate` handles `n`.
            conversation: reuse the KV of the last sequence of this conversation as far as the
                prompts begin alike, and keep the KV for its next sequence. None frees kept KV of a
                conversation.
            tenant: on whose account it runs. Tenants get the same share of the machine. Prompts of
                one tenant with the same `cache_salt` reuse each other's KV as far as they begin
                alike; without a tenant, nothing is reused.
            cache_salt: divides the prompts of a tenant into groups that share nothing.
            sibling: id of an earlier sequence with the same prompt, tenant and salt, of which this
                is another answer. The prompt is then computed once. Ignored if that one has ended.

        Raises:
            PromptError: the prompt is empty, leaves no room for an answer, or it or `params` hold
                an id that the model does not have; or there are stop strings and no tokenizer; or
                the structured outputs cannot be followed.
            UsageError: structured outputs need a package that is not installed.
        """
        kv = self._session.kv
        sequence = self._intake.take(next(self._ids), prompt_ids, params, kv.most_tokens)
        sequence.tenant = tenant
        sequence.scope = conversation or ((tenant, cache_salt) if tenant else None)
        if conversation is None:
            kv.drop_conversation()
        other = None if sibling is None else self._scheduler.find(sibling)
        if other is not None and kv.can_copy:
            share_prompt(other, sequence)
        self._scheduler.add(sequence)
        return sequence.id

    def compile(self, params: SamplingParams) -> None:
        """Compile the grammar of structured outputs, which may take a second or two, for `add`.

        `add` does it itself if need be. This method may be called from any thread, and saves the
        thread of the engine the time if `add` gets the same `structured_outputs` object.

        Raises:
            PromptError, UsageError: see `add`.
        """
        self._intake.compile(params)

    def step(self) -> list[Output]:
        """Compute one batch, and return an output for each sequence that got a token or an error.

        An exception means a bug in this program or an interrupt, and ends all sequences.
        """
        try:
            with self._observer.step() as step, torch.inference_mode():
                outputs = self._grow() + self._admit()
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
        finally:
            self._usage = self._session.kv.usage(self._scheduler.running)

    def abort(self, number: int) -> None:
        """Give up a sequence. Does nothing if it has ended already."""
        sequence = self._scheduler.find(number)
        if sequence is not None:
            self._release(sequence, keep=False)
        self._usage = self._session.kv.usage(self._scheduler.running)

    def abort_all(self) -> None:
        """Give up all sequences."""
        for sequence in self._scheduler.unfinished:
            self._release(sequence, keep=False)

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
        self._intake.check_text(prompt_ids)
        self._session.kv.drop()
        try:
            return self._runner.score(self._session.offload, next(self._ids), prompt_ids)
        except SESSION_OVER as error:
            if self._session.replace(error) is not None:
                raise
        try:
            return self._runner.score(self._session.offload, next(self._ids), prompt_ids)
        except SESSION_OVER as error:
            self._session.replace(error)  # for the next request, if there may be another one
            raise

    def forget(self, conversation: Conversation) -> None:
        """Free the kept KV of a conversation."""
        self._session.kv.drop(conversation)

    def reset_prefix_cache(self) -> None:
        """Free all KV that is kept for reuse."""
        self._session.kv.drop()

    def reconnect(self) -> bool:
        """Begin a new session with a worker that is lost, while no request is queued.

        Returns:
            whether there is one.
        """
        assert not self.has_unfinished
        return self._session.replace(WorkerLost("The worker is lost.")) is None

    def cancel(self, error: TSQPError) -> None:
        """Let the present step, and every later one, end before its next operation.

        The sequences whose tokens are being computed then end with the error. Any thread may call
        this; nothing can be computed afterwards.
        """
        self._runner.cancelled = error

    def close(self) -> None:
        """Close the offload, and make no other; safe to call twice."""
        self._session.close()

    def _grow(self) -> list[Output]:
        """Make room for the next tokens; preempt sequences if there is none for all."""
        outputs: list[Output] = []
        for sequence in self._scheduler.running:
            while sequence.decodes and self._scheduler.is_running(sequence):
                try:
                    self._session.kv.extend(sequence)
                    break
                except OutOfMemory as error:
                    if self._scheduler.num_running == 1:
                        outputs.append(self._fail(sequence, error))
                    else:
                        self._preempt(self._scheduler.next_to_preempt())
        return outputs

    def _preempt(self, sequence: Sequence) -> None:
        """Let a running sequence wait. It will compute its KV again, and keeps its tokens."""
        self._session.kv.free(sequence)
        self._scheduler.preempt(sequence)
        sequence.restart()
        self.stats.preemptions += 1

    def _admit(self) -> list[Output]:
        """Start sequences as far as there is memory; returns errors, and tokens of siblings."""
        outputs: list[Output] = []
        while (sequence := self._scheduler.next_to_admit()) is not None:
            try:
                self._session.kv.admit(sequence, self._scheduler.num_running)
            except TSQPError as error:
                if isinstance(error, SESSION_OVER):
                    return outputs + self._begin_again([sequence], error)
                if isinstance(error, OutOfMemory) and self._scheduler.num_running:
                    break  # it gets its turn when another ends
                outputs.append(self._fail(sequence, error))
                continue
            self._scheduler.admit(sequence)
            outputs += self._begin(sequence)
        return outputs

    def _begin(self, sequence: Sequence) -> list[Output]:
        """Begin to run a sequence; returns its first token if a sibling computed the prompt."""
        if sequence.admitted_at is None:
            sequence.admitted_at = self._observer.now()
            sequence.cached_tokens = sequence.computed
            self.stats.reused_tokens += sequence.computed
        shared = sequence.shared
        if shared is None:
            return []
        logits_V, prompt_logprobs = shared.logits_V, shared.prompt_logprobs
        if logits_V is not None:
            sequence.cached_tokens = shared.cached_tokens
        shared.begin(sequence)
        self._session.kv.drop_shared(sequence)
        if sequence.remaining:
            return []
        assert logits_V is not None, "only siblings have nothing to compute"
        sequence.prompt_logprobs = list(prompt_logprobs)
        return [self._choose(sequence, logits_V)]

    def _run(self, chunks: abc.Sequence[Chunk]) -> list[Output]:
        """Compute some chunks; raises TSQPError before any of them has a new token."""
        outputs = []
        for chunk, logits_RV in self._runner.run(self._session.offload, chunks):
            output = self._advance(chunk, logits_RV)
            if output is not None:
                outputs.append(output)
        return outputs

    def _advance(self, chunk: Chunk, logits_RV: Tensor) -> Output | None:
        """Take the result of a chunk: rate the prompt, choose the next token, end the sequence."""
        sequence, ended, was_prompt = chunk.sequence, chunk.ends_known_tokens, not chunk.decodes
        try:
            if sequence.rates_prompt:
                with self.stats.time("sampling"):
                    sequence.rate_prompt(logits_RV)
        except TSQPError as error:
            return self._fail(sequence, error)
        sequence.computed += chunk.length
        if not ended:
            return None
        if was_prompt:
            if sequence.shared is not None and not sequence.generated:
                sequence.shared.finish(sequence, logits_RV[-1])
            self._session.kv.share(sequence)
        return self._choose(sequence, logits_RV[-1])

    def _choose(self, sequence: Sequence, logits_V: Tensor) -> Output:
        """Choose the next token of a sequence, and end it if that was the last one."""
        try:
            with self.stats.time("sampling"):
                sequence.choose(logits_V)
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
            self._session.kv.truncate(sequences)
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
        """Replace the offload after the end of its session, and let the sequences continue.

        They compute everything again, unless their KV is on this side. The affected ones end with
        the error if they have continued often enough. If there is no new offload, all of them do.
        """
        outputs: list[Output] = []
        if not isinstance(error, IntegrityError):  # which no request can cause
            failed = [each for each in affected if each.restarts >= self._max_restarts]
            outputs = [self._fail(sequence, error) for sequence in failed]
            for sequence in affected:
                sequence.restarts += 1
        before = self._session.kv
        failure = self._session.replace(error)
        if failure is not None:
            return outputs + [self._fail(each, failure) for each in self._scheduler.unfinished]
        running = self._scheduler.running
        if self._session.kv is before:
            self._session.kv.truncate(running)
            return outputs
        for sequence in running:
            before.free(sequence)
            sequence.restart()
        self._scheduler.requeue()
        return outputs

    def _fail(self, sequence: Sequence, error: TSQPError) -> Output:
        """End a sequence with an error."""
        self._release(sequence, keep=False)
        return Output(sequence.id, error=error)

    def _release(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Remove a sequence, and free its KV or keep it for reuse."""
        if sequence.shared is not None:
            sequence.shared.leave(sequence)
        if self._scheduler.remove(sequence):
            self._session.kv.release(sequence, keep=keep)
        self._session.kv.drop_shared(sequence)
