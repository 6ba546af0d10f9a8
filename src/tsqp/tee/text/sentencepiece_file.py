"""The vocabulary of a SentencePiece file, tokenizer.model, where a folder has no tokenizer.json.

The format: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import struct
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

from tsqp.errors import TokenizerError
from tsqp.tee.text.pieces import SPACE, Kind, Pieces, bpe_backend, finish, unigram_backend
from tsqp.tee.text.protobuf import fields

_UNREADABLE = (
    "tokenizer.model is not a SentencePiece file that can be read: fetch it again, or pass token"
    " ids with --prompt-ids."
)
# Field numbers of the messages.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_MODEL_TYPE, _SUFFIX, _UNK_ID, _BOS_ID, _EOS_ID = 3, 24, 40, 41, 42
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_EXTRA, _ESCAPE = 2, 3, 4, 5

_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


def from_sentencepiece(raw: bytes, *, legacy: bool) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer that the file describes, and its tokens with a name.

    No beginning token is added yet.

    Args:
        legacy: whether the prefix space also goes in front of texts after special tokens, as in
            SentencePiece, or to the beginning only.

    Raises:
        TokenizerError: the file is damaged, or has an option that TSQP does not support.
    """
    try:
        trainer, normalizer, pieces = _parse(raw)
    except (ValueError, TypeError, struct.error) as exc:  # what _parse raises
        raise TokenizerError(_UNREADABLE) from exc
    model_type = trainer.get(_MODEL_TYPE, 1)
    if model_type not in (1, 2):
        raise _unsupported(f"the type {_MODEL_TYPES.get(model_type, model_type)}")
    if trainer.get(_SUFFIX):
        raise _unsupported("treat_whitespace_as_suffix")
    if not normalizer.get(_ESCAPE, 1):
        raise _unsupported("spaces that are not escaped")
    backend = unigram_backend(pieces) if model_type == 1 else bpe_backend(pieces)
    prefix = bool(normalizer.get(_DUMMY_PREFIX, 1))
    finish(backend, pieces, space_prefix=prefix, first_normalizers=_normalizers(normalizer))
    if prefix and not legacy:
        backend.normalizer = normalizers.Sequence(_normalizers(normalizer))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    ids = {
        "unk_token": trainer.get(_UNK_ID, 0),
        "bos_token": trainer.get(_BOS_ID, 1),
        "eos_token": trainer.get(_EOS_ID, 2),
    }
    texts = pieces.texts
    return backend, {name: texts[where] for name, where in ids.items() if where < len(texts)}


def _normalizers(normalizer: Mapping[int, Any]) -> list[normalizers.Normalizer]:
    """What happens to a text before its spaces are escaped."""
    found: list[normalizers.Normalizer] = []
    if normalizer.get(_CHARSMAP):
        found.append(normalizers.Precompiled(normalizer[_CHARSMAP]))
    if normalizer.get(_REMOVE_EXTRA, 1):
        found.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        found.append(normalizers.Replace(Regex(" {2,}"), " "))
    return found


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
