"""Stop strings, wherever the tokens happen to be cut."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from tsqp.tee.text.decoding import Decoding
from tsqp.tee.text.detokenizer import Detokenizer
from tsqp.tee.text.text_stream import TextStream
from tsqp.tee.text.tokenizer import Tokenizer

PIECES = ["a", "b", "ab", "c", " ", "ba"]


class Pieces(Tokenizer):
    """Token i is PIECES[i]."""

    def __init__(self) -> None:
        super().__init__("random:pieces")

    def detokenizer(self, prompt_ids: Sequence[int] | None = (), **_: object) -> Detokenizer:
        return Detokenizer(PieceDecoding())


class PieceDecoding(Decoding):
    """Needs no vocabulary."""

    def __init__(self) -> None:
        self.byte_by_byte = False
        self.stripped = ("", 0)

    def bytes_of(self, token_id: int, *, first: bool) -> bytes:
        return PIECES[token_id].encode()


def streamed(tokens: list[int], stops: list[str]) -> tuple[list[str], bool]:
    """What each token releases, up to the stop, and then what the end does."""
    stream = TextStream(Pieces(), stops)
    released = []
    for token in tokens:
        released.append(stream.push(token))
        if stream.stopped:
            break
    released.append(stream.finish())
    assert stream.text == "".join(released)
    return released, stream.stopped


stop_lists = st.lists(st.text("abc ", min_size=1, max_size=4), max_size=3)


@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=20), stop_lists)
def test_text_ends_before_the_first_stop_string(tokens: list[int], stops: list[str]) -> None:
    released, stopped = streamed(tokens, stops)
    # The answer as far as it was generated: what follows the stop was never asked for.
    for count in range(len(tokens) + 1):
        text = "".join(PIECES[t] for t in tokens[:count])
        found = [text.index(stop) for stop in stops if stop in text]
        if found:
            assert stopped
            assert "".join(released) == text[: min(found)]
            return
    assert not stopped
    assert "".join(released) == text


@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=20), stop_lists)
def test_what_cannot_become_a_stop_string_is_not_held_back(
    tokens: list[int], stops: list[str]
) -> None:
    stream = TextStream(Pieces(), stops)
    text = ""
    for token in tokens:
        stream.push(token)
        text += PIECES[token]
        if stream.stopped:
            return
        held = text[len(stream.text) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_a_stop_string_across_tokens_never_shows() -> None:
    assert streamed([3, 0, 1, 3], ["abc"]) == (["c", "", "", "", ""], True)


def test_a_stop_string_that_does_not_come_is_released() -> None:
    assert streamed([3, 0, 1, 4], ["abc"]) == (["c", "", "", "ab ", ""], False)


def test_a_beginning_still_held_at_the_end_is_released() -> None:
    assert streamed([3, 0, 1], ["abc"]) == (["c", "", "", "ab"], False)


def test_a_stop_string_that_may_not_stop_yet_is_text() -> None:
    stream = TextStream(Pieces(), ["ab"])
    assert [stream.push(token, may_stop=False) for token in (0, 1)] == ["a", "b"]
    assert (stream.push(0), stream.push(1)) == ("", "")
    assert (stream.text, stream.stopped) == ("ab", True)
