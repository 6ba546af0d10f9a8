"""The vocabulary of a SentencePiece file, tokenizer.model, if a folder has no tokenizer.json.

The format: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import tokenizers
from tokenizers import Regex, normalizers

from tsqp.errors import TokenizerError
from tsqp.tee.text.pieces import Kind, Pieces, bpe_backend, finish, unigram_backend
from tsqp.tee.text.protobuf import fields

_UNREADABLE = (
    "tokenizer.model is not a SentencePiece file that can be read: fetch it again, or pass token"
    " ids with --prompt-ids."
)
# Field numbers of the messages.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_MODEL_TYPE, _SUFFIX, _UNK_ID, _BOS_ID, _EOS_ID = 3, 24, 40, 41, 42
_TABLE, _PREFIX, _SINGLE_SPACES, _ESCAPE = 2, 3, 4, 5

_UNIGRAM, _BPE = 1, 2
_OTHER_TYPES = {3: "word", 4: "char"}
_WHITESPACE = (
    "".join(map(chr, range(0x20 + 1))) + "\x7f\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
)
_WHITESPACE += "".join(map(chr, range(0x2000, 0x2010)))


@dataclass(frozen=True, slots=True)
class SentencePieceFile:
    """The contents of a tokenizer.model.

    Attributes:
        backend: encodes; adds no beginning token yet.
        named: the texts of its tokens with a name.
        prepare: applied to each text before `backend` encodes it.
    """

    backend: tokenizers.Tokenizer
    named: Mapping[str, str]
    prepare: Callable[[str], str]


def read_sentencepiece(raw: bytes, *, legacy: bool) -> SentencePieceFile:
    """Read a tokenizer.model.

    Args:
        legacy: whether texts after special tokens get a space in front, too.

    Raises:
        TokenizerError: it is damaged, or has an option that TSQP does not support.
    """
    try:
        trainer, normalizer, pieces = _parse(raw)
    except (ValueError, TypeError, struct.error) as exc:  # what _parse raises
        raise TokenizerError(_UNREADABLE) from exc
    model_type = trainer.get(_MODEL_TYPE, _UNIGRAM)
    if model_type not in (_UNIGRAM, _BPE):
        raise _unsupported(f"the type {_OTHER_TYPES.get(model_type, 'of another program')}")
    if trainer.get(_SUFFIX):
        raise _unsupported("spaces after words (treat_whitespace_as_suffix)")
    if not normalizer.get(_ESCAPE, 1):
        raise _unsupported("spaces that are not escaped (escape_whitespaces)")
    backend = unigram_backend(pieces) if model_type == _UNIGRAM else bpe_backend(pieces)
    prefix, single = bool(normalizer.get(_PREFIX, 1)), bool(normalizer.get(_SINGLE_SPACES, 1))
    table = [normalizers.Precompiled(normalizer[_TABLE])] if normalizer.get(_TABLE) else []
    collapse = [normalizers.Replace(Regex(" {2,}"), " ")] if single else []
    each = [normalizers.Prepend(" ")] if prefix and legacy else []
    finish(backend, pieces, drops_space=prefix, first_normalizers=[*table, *collapse, *each])
    spaces = _spaces(table)
    prepare = partial(
        _prepare,
        # If the table turns both into spaces, the library still treats the pair as one character.
        newline="\n\n" if {"\r", "\n"} <= set(spaces) else "\r\n",
        strip=spaces if single else "",
        prefix=" " if prefix and not legacy else "",
        without_prefix=tuple(pieces.of(Kind.CONTROL, Kind.UNKNOWN)),
    )
    ids = {
        "unk_token": trainer.get(_UNK_ID, 0),
        "bos_token": trainer.get(_BOS_ID, 1),
        "eos_token": trainer.get(_EOS_ID, 2),
    }
    texts = pieces.texts
    named = {name: texts[where] for name, where in ids.items() if where < len(texts)}
    return SentencePieceFile(backend, named, prepare)


def _prepare(
    text: str, newline: str, strip: str, prefix: str, without_prefix: tuple[str, ...]
) -> str:
    """The changes to a text as a whole; special tokens get no space in front."""
    text = text.replace("\r\n", newline).strip(strip)
    return prefix + text if text and not text.startswith(without_prefix) else text


def _spaces(table: Sequence[normalizers.Normalizer]) -> str:
    """The characters that are spaces, or become spaces by the table of characters."""
    normalizer = normalizers.Sequence(list(table))
    return "".join(c for c in _WHITESPACE if normalizer.normalize_str(c) == " ")


def _parse(raw: bytes) -> tuple[dict[int, Any], dict[int, Any], Pieces]:
    """The trainer's fields, the normalizer's, and the pieces.

    Raises:
        ValueError, TypeError, struct.error: not such a file.
    """
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    texts, scores, kinds = [], [], []
    for number, value in fields(raw):
        if number == _PIECES:
            piece = dict(fields(_message(value)))
            texts.append(_message(piece.get(_TEXT)).decode())
            scores.append(struct.unpack("<f", _message(piece.get(_SCORE, bytes(4))))[0])
            kinds.append(_number(piece.get(_KIND, Kind.NORMAL)))
        elif number == _TRAINER:
            trainer = dict(fields(_message(value)))
        elif number == _NORMALIZER:
            normalizer = dict(fields(_message(value)))
    return trainer, normalizer, Pieces(texts, scores, kinds)


def _message(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError("message")
    return value


def _number(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError("number")
    return int(value)


def _unsupported(what: str) -> TokenizerError:
    return TokenizerError(
        f"tokenizer.model has {what}, which TSQP does not support: pass token ids with"
        " --prompt-ids."
    )
