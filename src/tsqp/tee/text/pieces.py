"""A tokenizer from SentencePiece's pieces, scores and types, as .model and GGUF files hold them."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from tsqp.errors import TokenizerError
from tsqp.tee.text.vocabulary import MAX_TOKENS

SPACE = "▁"  # represents a space in a piece


class Kind(IntEnum):
    """The purpose of a piece; both formats use the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Pieces:
    """A vocabulary in the order of its ids.

    Attributes:
        texts: of each piece; no two are equal.
        scores: pieces with higher ones are merged first.
        kinds: numbers of `Kind`; others count as NORMAL.
    """

    texts: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]

    def __post_init__(self) -> None:
        count = len(self.texts)
        if not 0 < count <= MAX_TOKENS or {len(self.scores), len(self.kinds)} != {count}:
            raise TokenizerError(
                "The model's vocabulary is empty, too large, or does not have one score and one"
                " type per token: fetch the model again."
            )
        if len(set(self.texts)) < count:
            raise TokenizerError("Two tokens of the model's vocabulary have the same text.")
        if not all(map(math.isfinite, self.scores)):
            raise TokenizerError("A score of the model's vocabulary is not a finite number.")

    def of(self, *kinds: Kind) -> list[str]:
        """The texts of pieces of some kinds."""
        return [text for text, kind in zip(self.texts, self.kinds, strict=True) if kind in kinds]


def bpe_backend(pieces: Pieces) -> tokenizers.Tokenizer:
    """Encodes as SentencePiece's BPE does, with bytes for unknown characters if it has such pieces.

    Raises:
        TokenizerError: the scores do not say which pieces to merge first.
    """
    vocabulary = {text: token_id for token_id, text in enumerate(pieces.texts)}
    unknown = pieces.of(Kind.UNKNOWN)
    return tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(pieces),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=bool(pieces.of(Kind.BYTE)),
        )
    )


def unigram_backend(pieces: Pieces) -> tokenizers.Tokenizer:
    """Encodes as SentencePiece's Unigram does."""
    unknown = pieces.of(Kind.UNKNOWN)
    return tokenizers.Tokenizer(
        models.Unigram(
            list(zip(pieces.texts, map(float, pieces.scores), strict=True)),
            unk_id=pieces.texts.index(unknown[0]) if unknown else None,
            byte_fallback=bool(pieces.of(Kind.BYTE)),
        )
    )


def finish(
    backend: tokenizers.Tokenizer,
    pieces: Pieces,
    *,
    drops_space: bool,
    first_normalizers: Sequence[normalizers.Normalizer] = (),
    strips_right: Collection[str] = (),
) -> None:
    """Add the tokens that are matched whole, the spaces' escapes, and the decoder.

    Args:
        drops_space: whether decoded text loses a space in front, because texts get one.
        first_normalizers: applied before spaces are escaped, to each text between whole tokens.
        strips_right: special tokens that take the whitespace after them.
    """
    backend.normalizer = normalizers.Sequence([*first_normalizers, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(content=" ", left=1)] if drops_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    add_whole_tokens(backend, pieces, strips_right)


def add_whole_tokens(
    backend: tokenizers.Tokenizer, pieces: Pieces, strips_right: Collection[str] = ()
) -> None:
    """Match tokens that are not ordinary text as a whole; control tokens give no text."""
    special = (Kind.CONTROL, Kind.UNKNOWN)
    backend.add_tokens(
        [
            AddedToken(text, normalized=False, special=kind in special, rstrip=text in strips_right)
            for text, kind in zip(pieces.texts, pieces.kinds, strict=True)
            if kind in (*special, Kind.USER_DEFINED)
        ]
    )


def _merges(pieces: Pieces) -> list[tuple[str, str]]:
    """Every pair of pieces that makes another one, those with the highest scores first.

    SentencePiece merges the pair whose piece has the highest score, and of equal ones the leftmost;
    here pieces of equal scores come in the order of their ids, which no real vocabulary needs.
    """
    whole = {Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED, Kind.BYTE}
    scores = {
        text: score
        for text, score, kind in zip(pieces.texts, pieces.scores, pieces.kinds, strict=True)
        if kind not in whole
    }
    merges, made = [], set()
    for text in sorted(scores, key=lambda text: -scores[text]):
        for cut in range(len(text) - 1, 0, -1):
            if text[:cut] in scores and text[cut:] in scores:
                merges.append((text[:cut], text[cut:]))
                made.add(text)
    if len({scores[text] for text in made}) < len(made) / 2:
        raise TokenizerError(
            "The scores of the model's vocabulary are mostly equal, so they do not say which tokens"
            " to merge first: convert the model again, or pass token ids with --prompt-ids."
        )
    return merges
