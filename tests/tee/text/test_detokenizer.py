"""Streamed text is the text of the whole sequence, wherever it is cut."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from text_helpers import BYTES, TEXTS, write_folder
from tsqp.errors import TokenizerError
from tsqp.tee.text.decoding import Decoding
from tsqp.tee.text.detokenizer import Detokenizer, decode
from tsqp.tee.text.tokenizer import Tokenizer

KINDS = ["byte-level", "sentencepiece", "sentencepiece without prefix", "unigram"]


@pytest.fixture(scope="module", params=KINDS)
def backend(request: pytest.FixtureRequest, backends: dict[str, Backend]) -> Backend:
    return backends[request.param]


def stream(decoding: Decoding, prompt: list[int], answer: list[int]) -> list[str]:
    detokenizer = Detokenizer(decoding, prompt)
    return [*(detokenizer.push(token_id) for token_id in answer), detokenizer.flush()]


def prompt_text(decoding: Decoding, prompt: list[int]) -> str:
    """A prompt's text, without a character of which it holds the beginning only."""
    detokenizer = Detokenizer(decoding)
    return "".join(detokenizer.push(token_id) for token_id in prompt)


def check_every_split(backend: Backend, ids: list[int], whole: str) -> None:
    decoding = Decoding(backend)
    for cut in range(len(ids) + 1):
        prompt, answer = ids[:cut], ids[cut:]
        assert prompt_text(decoding, prompt) + "".join(stream(decoding, prompt, answer)) == whole


@settings(max_examples=60)
@given(text=st.text(max_size=12) | st.text(" aé漢😀<s>▁\ufffd", max_size=12))
def test_every_split_of_a_text_streams_to_the_librarys_text(backend: Backend, text: str) -> None:
    ids = backend.encode(text).ids
    check_every_split(backend, ids, backend.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("text", TEXTS)
def test_every_split_of_these_texts_streams_to_the_librarys_text(
    backend: Backend, text: str
) -> None:
    ids = backend.encode(text).ids
    check_every_split(backend, ids, backend.decode(ids, skip_special_tokens=True))


@settings(max_examples=60)
@given(data=st.data())
def test_every_split_of_any_tokens_streams_to_their_text(
    backend: Backend, data: st.DataObject
) -> None:
    count = backend.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, count + 1), max_size=16))
    check_every_split(backend, ids, decode(Decoding(backend), ids))


@settings(max_examples=60)
@given(data=st.data())
def test_any_tokens_of_a_byte_level_vocabulary_have_the_librarys_text(
    backends: dict[str, Backend], data: st.DataObject
) -> None:
    backend = backends["byte-level"]
    ids = data.draw(st.lists(st.integers(0, backend.get_vocab_size() + 1), max_size=16))
    assert decode(Decoding(backend), ids) == backend.decode(ids, skip_special_tokens=True)


@settings(max_examples=60)
@given(parts=st.lists(st.binary(min_size=1, max_size=5), max_size=5))
def test_byte_tokens_stream_to_their_characters(
    backends: dict[str, Backend], parts: list[bytes]
) -> None:
    """As in SentencePiece: each byte that belongs to no character is one U+FFFD."""
    backend = backends["sentencepiece without prefix"]
    [a] = backend.encode("a", add_special_tokens=False).ids
    ids, expected = [], ""
    for part in parts:
        ids += [*(byte + 3 for byte in part), a]
        text = part.decode(errors="surrogateescape")
        expected += "".join("\ufffd" if "\udc80" <= c <= "\udcff" else c for c in text) + "a"
    check_every_split(backend, ids, expected)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_character_comes_whole_with_its_last_token(
    kind: str, backends: dict[str, Backend]
) -> None:
    backend = backends[kind]
    decoding = Decoding(backend)
    ids = backend.encode("a😀", add_special_tokens=False).ids
    pieces = stream(decoding, [], ids)
    assert pieces[-2:] == ["😀", ""]
    assert "".join(pieces) == "a😀"
    # A prompt that ends inside the character: it belongs to the answer.
    assert stream(decoding, ids[:-2], ids[-2:]) == ["", "😀", ""]


def test_a_character_that_is_never_finished_is_released_at_the_end(
    backends: dict[str, Backend],
) -> None:
    for kind, expected in {"byte-level": "\ufffd", "sentencepiece": "\ufffd" * 3}.items():
        ids = backends[kind].encode("a😀", add_special_tokens=False).ids
        pieces = stream(Decoding(backends[kind]), [], ids[:-1])
        assert pieces[-1] == expected
        assert "".join(pieces) == f"a{expected}"


def test_whole_characters_before_a_cut_one_stay(backends: dict[str, Backend]) -> None:
    backend = backends["sentencepiece"]
    ids = backend.encode("😀😀", add_special_tokens=False).ids[:-1]
    assert decode(Decoding(backend), ids) == "😀" + "\ufffd" * 3


def test_a_leading_space_is_left_out_at_the_beginning_only(backends: dict[str, Backend]) -> None:
    backend = backends["sentencepiece"]
    decoding = Decoding(backend)
    bos, *ids = backend.encode("the sea").ids
    assert "".join(stream(decoding, [], ids)) == "the sea"
    assert "".join(stream(decoding, [bos], ids)) == "the sea"
    assert "".join(stream(decoding, [bos, *ids], ids)) == " the sea"
    assert "".join(stream(decoding, [ids[-1]], ids)) == " the sea"


def test_a_prompt_that_ends_inside_a_character_repeats(tmp_path: Path) -> None:
    """A case from outside: a prompt of byte tokens garbled the answer."""
    vocabulary = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *BYTES, "▁", "a"])}
    backend = Backend(
        models.BPE(
            vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    write_folder(tmp_path, backend, "llama", {})
    tokenizer = Tokenizer(str(tmp_path))
    emoji = tokenizer.encode("😀")
    assert len(emoji) == 4
    for prompt in ("a😀", "a😀😀"):
        detokenizer = tokenizer.detokenizer(tokenizer.encode(prompt))
        assert [detokenizer.push(i) for i in emoji] == ["", "", "", "😀"]
        assert detokenizer.flush() == ""


def test_many_tokens_without_text_hold_nothing_back(backends: dict[str, Backend]) -> None:
    start = 3 + 0xF0  # the first byte of an emoji
    pieces = stream(Decoding(backends["sentencepiece"]), [], [start] * 100)
    assert pieces[1:] == ["\ufffd"] * 100
    assert "".join(pieces) == "\ufffd" * 100


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_ids_that_are_no_ids_are_refused(token_id: int, backends: dict[str, Backend]) -> None:
    with pytest.raises(TokenizerError, match="token id"):
        decode(Decoding(backends["byte-level"]), [token_id])


def test_ids_without_a_token_have_no_text(backends: dict[str, Backend]) -> None:
    for backend in backends.values():
        assert decode(Decoding(backend), [2**32 - 1]) == ""
