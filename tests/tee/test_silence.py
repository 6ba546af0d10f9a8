"""What is refused is not repeated: no message of an error holds a text, an answer or a token id."""

from collections.abc import Callable, Iterator

import pytest

from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.errors import TSQPError
from tsqp.tee.request_checks import check_params, check_prompt, one_params, several_prompts
from tsqp.tee.sampling import SamplingParams

ID, WORD = 7_654_321, "unspeakable"
CONFIG = open_checkpoint("random:tiny").config

REFUSED: dict[str, Callable[[], object]] = {
    "an id outside the vocabulary": lambda: check_prompt([1, ID, 2], CONFIG),
    "a negative id": lambda: check_prompt([1, -ID], CONFIG),
    "a word among the ids": lambda: check_prompt([1, WORD], CONFIG),  # type: ignore[list-item]
    "a number that is no integer": lambda: check_prompt([1, ID + 0.5], CONFIG),  # type: ignore[list-item]
    "a prompt that is too long": lambda: check_prompt([ID] * 100_000, CONFIG),
    "a mapping as prompts": lambda: several_prompts({WORD: ID}),
    "bytes as prompts": lambda: several_prompts(WORD.encode()),
    "numbers as prompts": lambda: several_prompts([ID, WORD]),
    "parameters of another kind": lambda: one_params({"stop": WORD}),
    "a bias for an id outside": lambda: check_params(SamplingParams(logit_bias={ID: 1}), CONFIG),
    "a stop token outside": lambda: check_params(SamplingParams(stop_token_ids=[ID]), CONFIG),
    "a bias for a word": lambda: SamplingParams(logit_bias={WORD: 1}),  # type: ignore[dict-item]
    "a bias that is too large": lambda: SamplingParams(logit_bias={1: ID}),
    "a stop string that is empty": lambda: SamplingParams(stop=[WORD, ""]),
    "a stop string that is a number": lambda: SamplingParams(stop=[WORD, ID]),  # type: ignore[list-item]
    "a stop token that is a word": lambda: SamplingParams(stop_token_ids=[ID, WORD]),  # type: ignore[list-item]
}


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that a traceback would show with it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_not_repeated(refused: Callable[[], object]) -> None:
    with pytest.raises(TSQPError) as caught:
        refused()
    for error in chain(caught.value):
        assert str(ID) not in str(error)
        assert WORD not in str(error)
        assert WORD not in repr(error) and str(ID) not in repr(error)
