"""How often a lying worker may try."""

from contextlib import ExitStack

import pytest
from liars import LyingWorker
from lies import MODEL, Order
from lying_sessions import TOKENS, complete, fails, private

from tsqp import LLM
from tsqp.errors import IntegrityError
from tsqp.tee.crypto.freivalds import MAX_FAILURES, FailureLimit

pytestmark = [pytest.mark.usefixtures("nothing_is_left", "limit")]


def test_a_worker_may_try_eight_times_and_then_nothing_is_offloaded(
    liar: LyingWorker, limit: FailureLimit, sampled: list[int]
) -> None:
    for _ in range(MAX_FAILURES):
        assert not limit.reached
        fails(liar, Order("zeros"), IntegrityError, sampled)
    assert limit.reached
    with pytest.raises(IntegrityError, match="nothing is offloaded any more"):
        private(liar)  # an honest one by now, but who would know
    with LLM(MODEL, privacy="tee") as llm:
        assert len(complete(llm)) == TOKENS


def test_sessions_that_were_begun_before_give_no_further_tries(
    liar: LyingWorker, limit: FailureLimit
) -> None:
    order = Order("zeros")
    with ExitStack() as stack:
        sessions = [stack.enter_context(private(liar, order)) for _ in range(MAX_FAILURES + 2)]
        messages = []
        for llm in sessions:
            with pytest.raises(IntegrityError) as caught:
                complete(llm)
            messages.append(str(caught.value))
    tried = [message for message in messages if "wrong product" in message]
    assert len(tried) == MAX_FAILURES
    assert all("nothing is offloaded any more" in message for message in messages[MAX_FAILURES:])
