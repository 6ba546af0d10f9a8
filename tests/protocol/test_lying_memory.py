"""A lying worker changes, or cuts short, the memory that it shares."""

import signal

import pytest
from liars import LyingWorker
from lies import MODEL, Order
from lying_sessions import PROMPT, TOKENS, complete, private, right_tokens
from protocol_helpers import SHARED, Commands, write_ids

from tsqp.errors import IntegrityError
from tsqp.runtime import build
from tsqp.tee.crypto.freivalds import FailureLimit

pytestmark = [pytest.mark.usefixtures("nothing_is_left", "limit")]


def test_memory_that_changes_after_the_answer_gives_right_tokens_or_none(
    liar: LyingWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    noticed = 0
    for bit in range(20):
        monkeypatch.setattr(build, "process_limit", FailureLimit())
        with private(liar, Order("changes its answer afterwards", 0, "down", bit=bit)) as llm:
            assert llm.transport == SHARED
            try:
                tokens = complete(llm)
            except IntegrityError:
                noticed += 1
            else:
                assert tokens == right_tokens()
    assert noticed  # or the memory never changed in time to matter


def test_sealed_memory_cannot_be_cut_short(liar: LyingWorker, commands: Commands) -> None:
    liar.order(Order("truncates the segment"))
    result = commands.run(
        "generate", MODEL, "--privacy", "pad", "--worker", liar.endpoint, "--pad-memory", 0,
        "--prompt-ids", write_ids(commands.folder / "ids.json", PROMPT), "--max-tokens", TOKENS,
        "--ignore-eos", "--json",
    )  # fmt: skip
    assert result.status == 0, result.stderr
    assert "of sealed memory" in result.json["transport_reason"]
    assert result.token_ids == [right_tokens()]
    liar.running.says("cannot truncate: Operation not permitted")


def test_a_segment_with_a_name_that_is_cut_short_ends_this_process_and_nothing_else(
    liar: LyingWorker, commands: Commands
) -> None:
    liar.order(Order("truncates a segment with a name"))
    result = commands.run(
        "generate", MODEL, "--privacy", "pad", "--worker", liar.endpoint, "--pad-memory", 0,
        "--prompt-ids", write_ids(commands.folder / "ids.json", PROMPT), "--json",
    )  # fmt: skip
    assert (result.status, result.stdout) == (-signal.SIGBUS, "")
