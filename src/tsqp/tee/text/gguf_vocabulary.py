"""The vocabulary of a GGUF file, from its own metadata, as llama.cpp reads it.

The source of each rule is llama.cpp's `src/llama-vocab.cpp`.
"""

from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from tsqp.checkpoint.gguf_end_tokens import END_TEXTS, FILL_TEXTS
from tsqp.checkpoint.gguf_reader import GGUFHeader, StringArray
from tsqp.errors import TokenizerError
from tsqp.model.json_fields import show
from tsqp.tee.text.gguf_pre_types import PreType, find_pre_type
from tsqp.tee.text.pieces import Kind, Pieces, add_whole_tokens, bpe_backend, finish
from tsqp.tee.text.vocabulary import Vocabulary, add_ends, rust_errors

_START = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_NAMED_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # spelled so in the format
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}
# Keys of files of the type "llama", besides those that end in "_token_id".
_SENTENCEPIECE_KEYS = {
    *("model", "pre", "tokens", "scores", "token_type", "token_type_count", "merges"),
    *("add_bos_token", "add_eos_token", "add_space_prefix", "suppress_tokens"),
}
_SENTENCEPIECE_IDS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}  # if the file has none

# Texts that are control tokens whatever type the file gives them.
_CONTROL_TEXTS = END_TEXTS.union(
    *FILL_TEXTS.values(),
    ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>"),
    ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>"),
    ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
)
# Special tokens of Phi-3 take the whitespace after them, except these; no metadata says so.
_PHI3_NAMES = ("phi-3", "phi3")
_PHI3_EXCEPTIONS = {"<unk>", "<s>", "<|endoftext|>"}


def from_gguf(header: GGUFHeader) -> Vocabulary:
    """The tokenizer that the file's metadata describes.

    Raises:
        TokenizerError: there is none, a part of it is damaged, or TSQP does not support it.
    """
    metadata = header.metadata
    kind = metadata.get(f"{_START}model")
    if kind is None:
        raise TokenizerError(
            "The GGUF file has no tokenizer that can be read: use a file with one, or pass token"
            " ids with --prompt-ids."
        )
    if kind not in ("gpt2", "llama"):
        raise TokenizerError(
            f"The GGUF file has a tokenizer of the type {show(kind)}, but TSQP supports gpt2 and"
            " llama: pass token ids with --prompt-ids."
        )
    pieces = _pieces(metadata)
    with rust_errors(
        "The tokenizer of the GGUF file is damaged: fetch it again, or pass token ids with"
        " --prompt-ids."
    ):
        if kind == "llama":
            backend, adds_bos = _sentencepiece(metadata, pieces), True
        else:
            pre_type = find_pre_type(metadata.get(f"{_START}pre"))
            backend, adds_bos = _byte_level(metadata, pieces, pre_type), pre_type.adds_bos
        ids = _named_ids(metadata, kind, len(pieces.texts))
        add_ends(
            backend,
            _end(metadata, ids, "bos_token", adds_bos),
            _end(metadata, ids, "eos_token", False),
        )
    names = {name: pieces.texts[token_id] for name, token_id in ids.items()}
    return Vocabulary(backend, names, _templates(metadata))


def _sentencepiece(metadata: dict[str, Any], pieces: Pieces) -> tokenizers.Tokenizer:
    _check_keys(metadata)
    backend = bpe_backend(pieces)
    space_prefix = _flag(metadata, "add_space_prefix", True)
    finish(
        backend,
        pieces,
        drops_space=space_prefix,
        first_normalizers=[normalizers.Prepend(" ")] if space_prefix else [],
        strips_right=_strips_right(metadata, pieces),
    )
    return backend


def _check_keys(metadata: dict[str, Any]) -> None:
    """Refuse options of a file of the type "llama" that are not known; false turns one off."""
    for key, value in metadata.items():
        name = key.removeprefix(_START)
        is_known = name in _SENTENCEPIECE_KEYS or name.endswith(("_token_id", "_token_ids"))
        if key.startswith(_START) and not is_known and value is not False:
            raise TokenizerError(
                f"The GGUF file has {show(key)}, which TSQP does not support in files of the type"
                " llama: pass token ids with --prompt-ids."
            )


def _byte_level(
    metadata: dict[str, Any], pieces: Pieces, pre_type: PreType
) -> tokenizers.Tokenizer:
    merges = _strings(metadata, "merges")
    pairs = []
    for merge in merges:
        left, _, right = merge[1:].partition(" ")  # a part may begin with a space
        pairs.append((merge[:1] + left, right))
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={text: token_id for token_id, text in enumerate(pieces.texts)},
            merges=pairs,
            ignore_merges=pre_type.ignores_merges,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre_type.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    add_whole_tokens(backend, pieces, _strips_right(metadata, pieces))
    return backend


def _pieces(metadata: dict[str, Any]) -> Pieces:
    texts = [text or f"[EMPTY_{place}]" for place, text in enumerate(_strings(metadata, "tokens"))]
    count = len(texts)
    scores = _numbers(metadata, "scores", count, float)
    kinds = [
        Kind.CONTROL if text in _CONTROL_TEXTS else kind
        for text, kind in zip(texts, _numbers(metadata, "token_type", count, int), strict=True)
    ]
    return Pieces(texts, scores, kinds)


def _strings(metadata: dict[str, Any], key: str) -> list[str]:
    found = metadata.get(_START + key)
    if not isinstance(found, StringArray):
        raise TokenizerError(f"The GGUF file has no list of strings {_START}{key}.")
    try:
        return found.decode()
    except UnicodeDecodeError as exc:
        raise TokenizerError(f"A string of {_START}{key} in the GGUF file is not UTF-8.") from exc


def _numbers(metadata: dict[str, Any], key: str, count: int, kind: type) -> list[Any]:
    """One number for each token; zeros if the file has none."""
    found = metadata.get(_START + key, [kind(0)] * count)
    if (
        not isinstance(found, list)
        or len(found) < count
        or not all(type(each) in (int, kind) for each in found)
    ):
        raise TokenizerError(f"{_START}{key} of the GGUF file is not one number for each token.")
    return found[:count]


def _flag(metadata: dict[str, Any], key: str, default: bool) -> bool:
    found = metadata.get(_START + key, default)
    if not isinstance(found, bool):
        raise TokenizerError(f"The GGUF file has {_START}{key} {show(found)}, which is not a flag.")
    return found


def _named_ids(metadata: dict[str, Any], kind: str, count: int) -> dict[str, int]:
    """The ids of the tokens that have a name."""
    defaults = _SENTENCEPIECE_IDS if kind == "llama" else {}
    found = {name: metadata.get(_START + key) for name, key in _NAMED_IDS.items()}
    ids = {
        name: value if value is not None else defaults.get(name) for name, value in found.items()
    }
    for name, value in ids.items():
        if value is not None and (type(value) is not int or not 0 <= value < count):
            raise TokenizerError(
                f"The GGUF file has {_START}{_NAMED_IDS[name]} {show(value)}, but its vocabulary"
                f" has {count} tokens."
            )
    return {name: value for name, value in ids.items() if value is not None}


def _end(metadata: dict[str, Any], ids: dict[str, int], name: str, default: bool) -> int | None:
    """The token to add at one end of each text; None for none."""
    if not _flag(metadata, f"add_{name}", default):
        return None
    if name not in ids:
        raise TokenizerError(
            f"The model adds {name} to each text, but the GGUF file has no {_START}{name}_id."
        )
    return ids[name]


def _strips_right(metadata: dict[str, Any], pieces: Pieces) -> set[str]:
    name = metadata.get("general.name")
    if not isinstance(name, str) or not any(each in name.lower() for each in _PHI3_NAMES):
        return set()
    whole = pieces.of(Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)
    return set(whole) - _PHI3_EXCEPTIONS


def _templates(metadata: dict[str, Any]) -> str | dict[str, str] | None:
    found = {
        key.removeprefix(f"{_TEMPLATE}.") if key != _TEMPLATE else "default": value
        for key, value in metadata.items()
        if (key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")) and isinstance(value, str)
    }
    return found["default"] if found.keys() == {"default"} else found or None
