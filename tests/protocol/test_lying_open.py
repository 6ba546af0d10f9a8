"""A lying worker in `open`, where only broken answers can be noticed."""

from typing import Any

import pytest
from liars import LyingWorker
from lies import Order
from lying_sessions import IMPATIENCE_S, complete, private

from tsqp.errors import ProtocolError, RemoteError, WorkerError, WorkerLost

pytestmark = [pytest.mark.usefixtures("nothing_is_left", "limit")]


@pytest.mark.parametrize(("layer", "group"), [(1, "down"), (-1, "lm_head")])
def test_in_open_mode_what_is_no_number_gives_no_token(
    layer: int, group: str, liar: LyingWorker, sampled: list[int]
) -> None:
    order = Order("not a number", layer, group)
    with (
        private(liar, order, privacy="open", pad_memory=None) as llm,
        pytest.raises(WorkerError, match="lm_head output of this step is not finite") as caught,
    ):
        complete(llm)
    assert caught.type is WorkerError
    assert sampled == []


@pytest.mark.parametrize(
    ("options", "group"),
    [
        ({"attention": "gpu"}, "attention_scores"),
        ({"attention": "gpu"}, "weighted_values"),
        ({"fuse": "layer"}, "layer"),
    ],
    ids=["scores", "values", "layer"],
)
@pytest.mark.parametrize(
    ("lie", "error", "words"),
    [
        ("not a number", WorkerError, "lm_head output of this step is not finite"),
        ("fails", RemoteError, "this worker has better things to do"),
        ("sends no tensor", ProtocolError, "0 tensors where 1 are due"),
        ("sends half of the rows", ProtocolError, "bytes where"),
        ("never answers", WorkerLost, "stopped answering|sent probes instead"),
    ],
)
def test_with_more_on_the_worker_a_broken_answer_gives_no_token(
    lie: str,
    error: type[WorkerError],
    words: str,
    options: dict[str, Any],
    group: str,
    liar: LyingWorker,
    sampled: list[int],
) -> None:
    options = {"privacy": "open", "pad_memory": None, "shm": False, **options}
    if lie == "never answers":
        options["timeout"] = IMPATIENCE_S
    with (
        private(liar, Order(lie, 1, group), **options) as llm,
        pytest.raises(WorkerError, match=words) as caught,
    ):
        complete(llm)
    assert caught.type is error
    assert sampled == []
