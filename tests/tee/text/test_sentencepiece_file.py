"""A folder with tokenizer.model only: SentencePiece's pieces, without its library."""

import math
import struct
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from text_helpers import BYTES
from tsqp.errors import TokenizerError
from tsqp.tee.text.protobuf import fields
from tsqp.tee.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
START = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), *((b, BYTE) for b in BYTES)]
# In the order in which they are merged.
PIECES = ["▁t", "he", "▁the", "▁s", "ea", "▁sea", "▁▁", "▁", *"thesaxé漢"]
UNIGRAM, BPE, WORD = 1, 2, 3


def varint(value: int) -> bytes:
    found = b""
    while value > 0x7F:
        found, value = found + bytes([value & 0x7F | 0x80]), value >> 7
    return found + bytes([value])


def encode(number: int, value: Any) -> bytes:
    """One field of a message."""
    if isinstance(value, bool | int):
        return varint(number << 3) + varint(int(value) & 2**64 - 1)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    raw = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(raw)) + raw


def model_file(
    *,
    pieces: list[tuple[str, int]] | None = None,
    scores: dict[str, float] | None = None,
    trainer: dict[int, Any] | None = None,
    normalizer: dict[int, Any] | None = None,
) -> bytes:
    """A tokenizer.model; trainer and normalizer by the numbers of their fields."""
    pieces = START + [(p, NORMAL) for p in PIECES] if pieces is None else pieces
    scores = {p: float(-n) for n, p in enumerate(PIECES)} if scores is None else scores
    message = b""
    for text, kind in pieces:
        piece = encode(1, text) + encode(2, scores.get(text, 0.0)) + encode(3, kind)
        message += encode(1, piece)
    for number, given_fields in ((2, {3: BPE} | (trainer or {})), (3, normalizer or {4: False})):
        message += encode(number, b"".join(encode(n, v) for n, v in given_fields.items()))
    return message


def tokens(raw: bytes, text: str, folder: Path, config: str = "{}") -> str:
    (folder / "tokenizer.model").write_bytes(raw)
    (folder / "tokenizer_config.json").write_text(config)
    tokenizer = Tokenizer(str(folder))
    backend = tokenizer._vocabulary.backend
    return " ".join(backend.id_to_token(i) for i in tokenizer.encode(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "<s>"),
        ("the sea", "<s> ▁the ▁sea"),
        (" the", "<s> ▁ ▁the"),
        ("the  sea", "<s> ▁the ▁ ▁sea"),
        ("ü", "<s> ▁ <0xC3> <0xBC>"),
        ("a</s>the", "<s> ▁ a </s> t he"),
        ("<s>the", "<s> <s> t he"),
        ("<0x41>", "<s> ▁ <0x3C> <0x30> x <0x34> <0x31> <0x3E>"),
    ],
)
def test_text_becomes_the_pieces_of_sentencepiece(text: str, expected: str, tmp_path: Path) -> None:
    assert tokens(model_file(), text, tmp_path) == expected


def test_no_space_in_front_where_the_file_says_so(tmp_path: Path) -> None:
    raw = model_file(normalizer={3: False, 4: False})
    assert tokens(raw, "the sea", tmp_path) == "<s> t he ▁sea"
    tokenizer = Tokenizer(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode(" the sea")) == " the sea"


def test_spaces_are_made_single_where_the_file_says_so(tmp_path: Path) -> None:
    raw = model_file(normalizer={3: True, 4: True})
    assert tokens(raw, "  the   sea  ", tmp_path) == "<s> ▁the ▁sea"
    assert tokens(raw, "   ", tmp_path) == "<s>"


def test_a_legacy_tokenizer_has_spaces_after_special_tokens_too(tmp_path: Path) -> None:
    assert tokens(model_file(), "a</s>the", tmp_path, '{"legacy": true}') == "<s> ▁ a </s> ▁the"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ('{"add_bos_token": false}', "▁the"),
        ('{"add_bos_token": true, "add_eos_token": true}', "<s> ▁the </s>"),
        ('{"bos_token": {"content": "</s>"}}', "</s> ▁the"),
    ],
)
def test_the_config_says_which_ends_are_added(config: str, expected: str, tmp_path: Path) -> None:
    assert tokens(model_file(), "the", tmp_path, config) == expected


def test_tokens_that_other_files_add_follow_the_pieces(tmp_path: Path) -> None:
    (tmp_path / "added_tokens.json").write_text('{"<|tool|>": 276}')
    assert tokens(model_file(), "the<|tool|>", tmp_path) == "<s> ▁the <|tool|>"


def test_user_defined_pieces_are_whole(tmp_path: Path) -> None:
    pieces = [*START, *((p, NORMAL) for p in PIECES), ("<user>", USER_DEFINED)]
    raw = model_file(pieces=pieces, normalizer={4: True})
    assert tokens(raw, "the <user> sea<user>", tmp_path) == "<s> ▁the ▁ <user> ▁sea <user>"


@settings(max_examples=60)
@given(text=st.text("the sax", max_size=14))
def test_unigram_takes_the_likeliest_pieces(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    scores = {p: -1.0 - 0.37 * n for n, p in enumerate(PIECES)}
    folder = tmp_path_factory.mktemp("unigram")
    found = tokens(model_file(scores=scores, trainer={3: UNIGRAM}), text, folder).split()[1:]
    spaced = "▁" + text.replace(" ", "▁") if text else ""

    @cache
    def best(start: int) -> float:
        """The score of the best pieces from there on, by trying all."""
        if start == len(spaced):
            return 0.0
        ends = range(start + 1, len(spaced) + 1)
        rest = [scores[spaced[start:e]] + best(e) for e in ends if spaced[start:e] in scores]
        return max(rest, default=-math.inf)

    assert "".join(found) == spaced
    assert sum(scores[piece] for piece in found) == pytest.approx(best(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer": {3: WORD}}, "the type word"),
        ({"trainer": {24: True}}, "treat_whitespace_as_suffix"),
        ({"normalizer": {5: False}}, "escape_whitespaces"),
        ({"normalizer": {2: b"nonsense"}}, "that can be read"),
        ({"pieces": [("a", NORMAL), ("a", NORMAL)]}, "same text"),
        ({"pieces": []}, "empty"),
        ({"scores": {"he": math.inf}}, "not a finite number"),
    ],
)
def test_what_is_not_supported_is_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TokenizerError, match=message):
        tokens(model_file(**changes), "the", tmp_path)


def test_a_file_cut_anywhere_is_refused_or_read(tmp_path: Path) -> None:
    raw = model_file()
    refused = 0
    for keep in range(0, len(raw), 61):
        try:
            tokens(raw[:keep], "the", tmp_path)
        except TokenizerError:
            refused += 1
    assert refused > 30


@settings(max_examples=200)
@given(raw=st.binary(max_size=60))
def test_any_bytes_are_a_message_or_refused(raw: bytes) -> None:
    try:
        found = list(fields(raw))
    except ValueError:
        return
    assert len(found) <= len(raw)


def test_numbers_of_64_bits_are_read() -> None:
    message = encode(7, 2**64 - 1) + encode(8, b"xy") + encode(9, 1.5)
    assert list(fields(message)) == [(7, 2**64 - 1), (8, b"xy"), (9, struct.pack("<f", 1.5))]


@pytest.mark.parametrize(
    "raw",
    [b"\x80", b"\x80" * 11, b"\x0a\x05a", b"\x0b", b"\x0d\x00", b"\x0a" + b"\xff" * 9 + b"\x01"],
)
def test_a_damaged_message_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"short|integer|wire"):
        list(fields(raw))
