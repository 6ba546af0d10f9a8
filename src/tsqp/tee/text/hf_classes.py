"""The changes that transformers' tokenizer classes make to a model's tokenizer.json.

Some classes take the vocabulary, the merges and the post-processor from the file, and put their own
normalizer, pre-tokenizer and decoder in the place of the file's. The class is one of a fixed list
here, and nothing of that name is imported. Other classes of transformers are refused. A class that
transformers does not know either, such as one of a model's own code, reads the file as it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from tsqp.errors import TokenizerError
from tsqp.tee.text.hf_other_classes import OTHER_CLASSES

# The class that transformers takes for each family: None if the model's own choice counts, and
# AS_WRITTEN if the file counts.
AS_WRITTEN = "TokenizersBackend"
_FAMILY_CLASSES = {
    "mistral": AS_WRITTEN,
    "phi3": AS_WRITTEN,
    "granite": AS_WRITTEN,
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
}
_NEVER_OWN_CHOICE = ("qwen2",)  # many of its models name a wrong class

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACE = "▁"


@dataclass(frozen=True, slots=True)
class TokenizerClass:
    """One class of transformers.

    Attributes:
        named: the tokens with a name, if the model's files do not name them.
        rebuild: changes a tokenizer as the class does, by the fields of tokenizer_config.json.
        adds_bos: the class adds the beginning token, whatever tokenizer.json says.
        is_byte_level: for vocabularies whose tokens are spelled in the byte alphabet of GPT-2.
    """

    named: Mapping[str, str]
    rebuild: Callable[[tokenizers.Tokenizer, Mapping[str, Any]], None]
    adds_bos: bool = False
    is_byte_level: bool = False


def find_class(model_type: object, named: object, raw: bytes) -> TokenizerClass | None:
    """The class that transformers takes for a model; None if tokenizer.json counts as it is.

    Args:
        model_type: of config.json.
        named: the class that tokenizer_config.json names, or config.json; None if neither does.
        raw: tokenizer.json.

    Raises:
        TokenizerError: TSQP does not implement the class.
    """
    own = named.removesuffix("Fast") if isinstance(named, str) else None
    family = _FAMILY_CLASSES.get(model_type) if isinstance(model_type, str) else None
    if family == AS_WRITTEN:
        return None
    if own == "LlamaTokenizer" and model_type not in _NEVER_OWN_CHOICE and b'"ByteLevel"' in raw:
        return None  # a file of Llama 3 under the class of Llama 2
    if own is None or (family is not None and model_type in _NEVER_OWN_CHOICE):
        own = family
    if own in OTHER_CLASSES:
        raise TokenizerError(
            f"The tokenizer has the class {own}, which TSQP does not support: pass token ids with"
            " --prompt-ids."
        )
    return _CLASSES.get(own or "")


def _configure(
    backend: tokenizers.Tokenizer, *, byte_fallback: bool, fuse_unk: bool, unk: str | None
) -> None:
    """Set what a class gives to its BPE model; what it does not give has the library's default."""
    model = backend.model
    if isinstance(model, models.BPE):
        model.dropout = None
        model.ignore_merges = False
        model.byte_fallback = byte_fallback
        model.fuse_unk = fuse_unk
        model.unk_token = unk


def _llama(backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    _configure(backend, byte_fallback=True, fuse_unk=True, unk=None)
    prefix = settings.get("add_prefix_space")
    _sentencepiece(
        backend,
        prefix=prefix is None or bool(prefix),
        # An absent `legacy` is false in transformers 5, and null is not.
        everywhere=bool(settings.get("legacy", False)),
    )


def _code_llama(backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    _configure(backend, byte_fallback=True, fuse_unk=True, unk=_unknown(settings))
    prefix = settings.get("add_prefix_space")
    _sentencepiece(backend, prefix=prefix is None or bool(prefix), everywhere=False)
    backend.decoder = decoders.Sequence([*_pieces(), decoders.Strip(content=" ", left=1)])


def _sentencepiece(backend: tokenizers.Tokenizer, *, prefix: bool, everywhere: bool) -> None:
    scheme = ("always" if everywhere else "first") if prefix else "never"
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=_SPACE, prepend_scheme=scheme, split=False
    )
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence([*_pieces(), *strip])


def _pieces() -> list[Any]:
    return [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]


def _gemma(backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    _configure(backend, byte_fallback=True, fuse_unk=True, unk=_unknown(settings))
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(_pieces())


def _qwen2(backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    _configure(backend, byte_fallback=False, fuse_unk=False, unk=None)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(
                add_prefix_space=bool(settings.get("add_prefix_space")), use_regex=False
            ),
        ]
    )
    backend.decoder = decoders.ByteLevel()


def _gpt2(backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    _configure(backend, byte_fallback=False, fuse_unk=False, unk=None)
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(settings.get("add_prefix_space"))
    )
    backend.decoder = decoders.ByteLevel()


def _unknown(settings: Mapping[str, Any]) -> str:
    """The token for what the vocabulary lacks, which may be an object with its text."""
    value = settings.get("unk_token")
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else "<unk>"


_UNK_BOS_EOS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_END_OF_TEXT = "<|endoftext|>"
_CLASSES = {
    "LlamaTokenizer": TokenizerClass(_UNK_BOS_EOS, _llama),
    "CodeLlamaTokenizer": TokenizerClass(_UNK_BOS_EOS, _code_llama, adds_bos=True),
    "GemmaTokenizer": TokenizerClass(
        {
            "unk_token": "<unk>",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "mask_token": "<mask>",
        },
        _gemma,
    ),
    "Qwen2Tokenizer": TokenizerClass(
        {"unk_token": _END_OF_TEXT, "eos_token": _END_OF_TEXT, "pad_token": _END_OF_TEXT},
        _qwen2,
        is_byte_level=True,
    ),
    "GPT2Tokenizer": TokenizerClass(
        {"unk_token": _END_OF_TEXT, "bos_token": _END_OF_TEXT, "eos_token": _END_OF_TEXT},
        _gpt2,
        is_byte_level=True,
    ),
}
