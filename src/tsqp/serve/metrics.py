"""Prometheus metrics, with vLLM's names under `tsqp_`. None of them has content in it."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tsqp.runtime.async_llm import AsyncLLM
from tsqp.runtime.failover import WorkerState
from tsqp.runtime.request_stats import RequestStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Seconds: of the first token, between two tokens, and of whole stages.
FIRST = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
BETWEEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
REASONS = ("stop", "length", "abort", "error")


class Metrics:
    """What is counted while requests run, as a `RequestObserver`; and what is read when asked.

    Args:
        name: of the model.
        model: returns the loaded model, or None before there is one.
    """

    def __init__(self, name: str, model: Callable[[], AsyncLLM | None]) -> None:
        self._registry = registry = CollectorRegistry()

        def histogram(what: str, help_: str, buckets: tuple[float, ...]) -> Histogram:
            found = Histogram(
                f"tsqp_{what}", help_, ["model_name"], registry=registry, buckets=buckets
            )
            return found.labels(name)

        self._first = histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", FIRST
        )
        self._between = histogram(
            "inter_token_latency_seconds", "From one token of an answer to the next.", BETWEEN
        )
        self._e2e = histogram("e2e_request_latency_seconds", "From arrival to the end.", WHOLE)
        self._queue = histogram("request_queue_time_seconds", "Waiting to run.", WHOLE)
        self._prefill = histogram(
            "request_prefill_time_seconds", "From running to the first token.", WHOLE
        )
        self._decode = histogram(
            "request_decode_time_seconds", "From the first token to the last.", WHOLE
        )
        self._prompt_sizes = histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._answer_sizes = histogram(
            "request_generation_tokens", "Tokens of the answers to a request.", TOKENS
        )

        def counter(what: str, help_: str) -> Counter:
            return Counter(f"tsqp_{what}", help_, ["model_name"], registry=registry).labels(name)

        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._generation = counter("generation_tokens", "Tokens of answers.")
        self._queries = counter("prefix_cache_queries", "Tokens of prompts looked up for reuse.")
        self._hits = counter("prefix_cache_hits", "Tokens of prompts whose KV was reused.")
        success = Counter(
            "tsqp_request_success",
            "Answers that have ended.",
            ["model_name", "finished_reason"],
            registry=registry,
        )
        self._ended = {reason: success.labels(name, reason) for reason in REASONS}
        registry.register(_Present(name, model))

    def first_token(self, seconds: float) -> None:
        """See `RequestObserver`."""
        self._first.observe(seconds)
        self._generation.inc()

    def next_token(self, seconds: float) -> None:
        """See `RequestObserver`."""
        self._between.observe(seconds)
        self._generation.inc()

    def ended(self, stats: RequestStats) -> None:
        """See `RequestObserver`."""
        for reason in stats.finish_reasons:
            self._ended[reason].inc()
        self._e2e.observe(stats.e2e_s)
        for histogram, seconds in (
            (self._queue, stats.queue_s),
            (self._prefill, stats.prefill_s),
            (self._decode, stats.decode_s),
        ):
            if seconds is not None:
                histogram.observe(seconds)
        if stats.queue_s is not None:
            self._prompt.inc(stats.prompt_tokens)
            self._queries.inc(stats.prompt_tokens)
            self._hits.inc(stats.cached_tokens)
            self._prompt_sizes.observe(stats.prompt_tokens)
            self._answer_sizes.observe(stats.completion_tokens)

    def text(self) -> bytes:
        """All metrics, as Prometheus reads them."""
        return generate_latest(self._registry)


class _Present(Collector):
    """What the model itself counts."""

    def __init__(self, name: str, model: Callable[[], AsyncLLM | None]) -> None:
        self._name = name
        self._model = model

    def describe(self) -> Iterable[Metric]:
        return []  # not before there is a model

    def collect(self) -> Iterator[Metric]:
        llm = self._model()
        if llm is None:
            return
        yield self._gauge("num_requests_running", "Answers that run.", llm.num_running)
        yield self._gauge("num_requests_waiting", "Answers that wait.", llm.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "1 is all memory for KV.", llm.kv_usage)
        yield self._counter(
            "num_preemptions", "Times that an answer made way for another.", llm.stats.preemptions
        )
        yield self._gauge("healthy", "1 if the status is ready.", float(llm.is_healthy))
        yield from self._rpc(llm)
        yield self._gauge(
            "integrity_failed",
            "1 if nothing is offloaded any more, because no worker may be asked.",
            float(llm.status == "failed"),
        )
        yield self._counter(
            "integrity_failures", "Wrong answers of workers.", llm.integrity_failures
        )
        yield self._workers(llm)
        yield self._counter(  # the event loop calls this
            "http_cpu_seconds", "Processor time of the event loop.", time.thread_time()
        )
        yield self._counter(
            "worker_reconnects", "New sessions after the end of others.", llm.reconnects
        )
        pads = llm.pads
        if pads is not None:
            yield self._gauge("pads_stock_bytes", "Masks that lie ready.", pads.stock_bytes)
            yield self._counter("pads_made_rows", "Rows of masks made.", pads.made_rows)
            yield self._counter("pads_ahead_rows", "Rows taken from the stock.", pads.ahead_rows)
            yield self._counter("pads_inline_rows", "Rows made in line.", pads.inline_rows)
            yield self._counter(
                "pads_inline_seconds", "Time of the engine to make masks in line.", pads.inline_s
            )

    def _workers(self, llm: AsyncLLM) -> Metric:
        metric = GaugeMetricFamily(
            "tsqp_workers", "Workers by state.", labels=["model_name", "state"]
        )
        states = [each.state for each in llm.workers]
        for state in get_args(WorkerState):
            metric.add_metric([self._name, state], states.count(state))
        return metric

    def _rpc(self, llm: AsyncLLM) -> Iterator[Metric]:
        rpc = llm.rpc
        calls = CounterMetricFamily(
            "tsqp_rpc_calls", "Calls to workers.", labels=["model_name", "operation"]
        )
        compute = CounterMetricFamily(
            "tsqp_rpc_worker_seconds",
            "Time of the workers in calls, as they report it.",
            labels=["model_name", "operation"],
        )
        for operation, number in sorted(rpc.calls.items()):
            calls.add_metric([self._name, operation], number)
        for operation, seconds in sorted(rpc.compute_s.items()):
            compute.add_metric([self._name, operation], seconds)
        yield calls
        yield compute
        yield self._counter("rpc_sent_bytes", "Tensors sent to workers.", rpc.sent_bytes)
        yield self._counter("rpc_received_bytes", "Tensors from workers.", rpc.received_bytes)
        yield self._counter("rpc_wait_seconds", "Waiting for workers.", llm.stats.wait_s)

    def _gauge(self, what: str, help_: str, value: float) -> Metric:
        metric = GaugeMetricFamily(f"tsqp_{what}", help_, labels=["model_name"])
        metric.add_metric([self._name], value)
        return metric

    def _counter(self, what: str, help_: str, value: float) -> Metric:
        metric = CounterMetricFamily(f"tsqp_{what}", help_, labels=["model_name"])
        metric.add_metric([self._name], value)
        return metric
