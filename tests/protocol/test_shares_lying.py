"""A worker that lies among honest ones: caught before a token is chosen, and all are let go."""

import re
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from liars import LyingWorker
from lies import MODEL, WRONG_PRODUCTS, Order
from protocol_helpers import DEADLINE_S, eventually

from pairwise import turns
from tsqp import LLM, SamplingParams
from tsqp.errors import IntegrityError, ProtocolError, RemoteError, TSQPError, WorkerError
from tsqp.tee.crypto.freivalds import MAX_FAILURES, FailureLimit

pytestmark = [pytest.mark.usefixtures("limit")]

PROMPT = [3, 141, 59, 265, 358]
TOKENS = 4
# A liar's share may be a seed (the first workers) or what is left of the input (the last one).
PLACES = pytest.mark.parametrize("place", [0, 1, 2])
OTHER_ENDS: list[tuple[str, type[WorkerError], str]] = [
    ("hides other weights", IntegrityError, "wrong product"),
    ("writes nothing", IntegrityError, "wrong product"),
    ("fails", RemoteError, "failed: RuntimeError: this worker has better things to do"),
    ("answers twice", ProtocolError, "answered a call that is not open"),
    ("babbles", ProtocolError, "does not speak the TSQP protocol"),
]


def endpoints(liar: LyingWorker, honest: str, place: int) -> list[str]:
    return [liar.endpoint if number == place else honest for number in range(3)]


def private(liar: LyingWorker, order: Order, worker: Sequence[str], **options: Any) -> LLM:
    liar.order(order)
    return LLM(MODEL, privacy="shares", worker=worker, insecure_same_host=True, **options)


def complete(llm: LLM) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    return list(llm.generate([PROMPT], params)[0].token_ids)


@cache
def right_tokens(field: str = "wide") -> list[int]:
    """Computed without any worker."""
    with LLM(MODEL, privacy="tee", fixed_point=True, field=field) as llm:
        return complete(llm)


def fails(
    liar: LyingWorker,
    order: Order,
    error: type[WorkerError],
    worker: Sequence[str],
    sampled: list[int],
    field: str = "wide",
) -> str:
    """The message of a generation that fails, in time, after right tokens at most."""
    right = right_tokens(field)
    sampled.clear()
    with private(liar, order, worker, field=field, timeout=DEADLINE_S) as llm:
        began = time.monotonic()
        with pytest.raises(WorkerError) as caught:
            complete(llm)
        assert time.monotonic() - began < DEADLINE_S
        assert caught.type is error
        assert len(sampled) < len(right)
        assert sampled == right[: len(sampled)]
        if error is IntegrityError:
            for channel in llm._channels:
                assert channel._segment is None  # type: ignore[attr-defined]
                with pytest.raises(TSQPError, match=f"worker at {channel.endpoint} has ended"):
                    channel.wait(0, 0)
            with pytest.raises(IntegrityError, match=r"wrong product|nothing is offloaded"):
                complete(llm)
    assert eventually(lambda: liar.segments == 0)
    return str(caught.value)


@PLACES
def test_a_worker_that_does_not_lie_is_believed(
    place: int, liar: LyingWorker, tiny_worker: str, limit: FailureLimit
) -> None:
    with private(liar, Order(), endpoints(liar, tiny_worker, place)) as llm:
        assert complete(llm) == complete(llm) == right_tokens()
    assert limit._left == MAX_FAILURES


@pytest.mark.parametrize(
    ("lie", "where"),
    # What is checked is the sum of all answers, wherever the lie is.
    turns(
        sorted(set(WRONG_PRODUCTS) - {"the answer of another session"}),
        [("wide", 0), ("compact", 1), ("wide", 2)],
    ),
)
def test_a_wrong_product_is_blamed_on_all_workers(
    lie: str,
    where: tuple[str, int],
    liar: LyingWorker,
    tiny_worker: str,
    sampled: list[int],
    limit: FailureLimit,
) -> None:
    field, place = where
    three = endpoints(liar, tiny_worker, place)
    message = fails(liar, Order(lie), IntegrityError, three, sampled, field)
    assert message.startswith(
        f"One of the workers at {three[0]}, {three[1]} and {three[2]} returned a wrong product for "
        "group qkv of layer 0; the answer was discarded."
    )
    assert limit._left == MAX_FAILURES - 1


@pytest.mark.parametrize(("end", "place"), turns(OTHER_ENDS, [0, 1, 2]))
def test_other_lies_end_the_generation_too(
    end: tuple[str, type[WorkerError], str],
    place: int,
    liar: LyingWorker,
    tiny_worker: str,
    sampled: list[int],
) -> None:
    lie, error, words = end
    three = endpoints(liar, tiny_worker, place)
    message = fails(liar, Order(lie), error, three, sampled)
    assert re.search(words, message)
    assert liar.endpoint in message


@pytest.mark.parametrize(
    ("at", "place"),
    turns([(1, "o"), (0, "gate_up"), (1, "down"), (-1, "lm_head")], [0, 1, 2]),
)
def test_every_group_is_checked_and_named(
    at: tuple[int, str], place: int, liar: LyingWorker, tiny_worker: str, sampled: list[int]
) -> None:
    layer, group = at
    order = Order("one element off by one", layer, group)
    three = endpoints(liar, tiny_worker, place)
    message = fails(liar, order, IntegrityError, three, sampled)
    assert f"wrong product for group {group}{' of layer ' + str(layer) if layer >= 0 else ''};" in (
        message
    )


def test_after_eight_failures_nothing_is_offloaded_any_more(
    liar: LyingWorker, tiny_worker: str, limit: FailureLimit, sampled: list[int]
) -> None:
    three = endpoints(liar, tiny_worker, 1)
    for _ in range(MAX_FAILURES):
        assert not limit.reached
        fails(liar, Order("zeros"), IntegrityError, three, sampled)
    assert limit.reached
    with pytest.raises(IntegrityError, match="nothing is offloaded any more"):
        private(liar, Order(), three)
