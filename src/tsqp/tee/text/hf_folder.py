"""The vocabulary of a Hugging Face folder, with the ids that transformers' fast tokenizers give.

Nothing that the folder names is imported or run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import tokenizers
from tokenizers import AddedToken, models

from tsqp.checkpoint.model_files import ModelFiles
from tsqp.errors import TokenizerError
from tsqp.tee.text.hf_classes import find_class
from tsqp.tee.text.hf_templates import read_templates
from tsqp.tee.text.hf_tokens import add_tokens, read_object
from tsqp.tee.text.sentencepiece_file import read_sentencepiece
from tsqp.tee.text.vocabulary import MAX_TOKENS, Vocabulary, add_ends, rust_errors

# Without it, transformers ignores clean_up_tokenization_spaces for BPE models.
_FORCED = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


@dataclass(frozen=True, slots=True)
class _Read:
    """A tokenizer before the folder's other files are applied.

    Attributes:
        named: its tokens with a name.
        adds_bos, adds_eos: ends to add; what tokenizer.json adds of its own is not among them.
        listed: the added tokens of tokenizer.json, by id.
        prepare: see `Vocabulary`.
    """

    backend: tokenizers.Tokenizer
    named: Mapping[str, str]
    adds_bos: bool = False
    adds_eos: bool = False
    listed: Mapping[int, AddedToken] = field(default_factory=dict)
    prepare: Callable[[str], str] = str


def from_folder(files: ModelFiles) -> Vocabulary:
    """Read a folder's tokenizer.json, or, without one, its tokenizer.model or its vocab.json.

    Raises:
        TokenizerError: there is none, or none that can be read.
        CheckpointError: a file cannot be read, or is not JSON where it should be.
    """
    settings = read_object(files, "tokenizer_config.json")
    _check_settings(files, settings)
    with rust_errors(_unreadable(files)):
        read = _read(files, settings)
        backend = read.backend
        if backend.get_vocab_size() > MAX_TOKENS:
            raise TokenizerError(f"{files.folder} has a vocabulary of more than {MAX_TOKENS}.")
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = settings.get("split_special_tokens") is True
        named = add_tokens(backend, files, settings, read.named, read.listed)
        if read.adds_bos or read.adds_eos:
            bos, eos = named.get("bos_token"), named.get("eos_token")
            add_ends(
                backend,
                backend.token_to_id(bos) if read.adds_bos and bos is not None else None,
                backend.token_to_id(eos) if read.adds_eos and eos is not None else None,
            )
    template = read_templates(files, settings.get("chat_template"))
    return Vocabulary(backend, named, template, read.prepare)


def _check_settings(files: ModelFiles, settings: Mapping[str, Any]) -> None:
    """Refuse settings that change the ids or the text, and that are not implemented."""
    if settings.get("fix_mistral_regex"):
        raise _refused(files, "fix_mistral_regex")
    # transformers takes the file for its own version instead of tokenizer.json.
    if settings.get("fast_tokenizer_files", ["tokenizer.json"]) != ["tokenizer.json"]:
        raise _refused(files, "fast_tokenizer_files with other files than tokenizer.json")


def _refused(files: ModelFiles, what: str) -> TokenizerError:
    return TokenizerError(
        f"{files.folder / 'tokenizer_config.json'} sets {what}, which TSQP does not support: remove"
        " it, or pass token ids with --prompt-ids."
    )


def _read(files: ModelFiles, settings: Mapping[str, Any]) -> _Read:
    config = read_object(files, "config.json")
    named_class = settings.get("tokenizer_class") or config.get("tokenizer_class")
    raw = files.read("tokenizer.json")
    kind = find_class(config.get("model_type"), named_class, raw or b"")
    if raw is not None:
        written = tokenizers.Tokenizer.from_buffer(raw)
        listed = written.get_added_tokens_decoder()
        is_bpe = isinstance(written.model, models.BPE)
        if settings.get("clean_up_tokenization_spaces") and (not is_bpe or settings.get(_FORCED)):
            raise _refused(files, "clean_up_tokenization_spaces")
        if kind is None:
            return _Read(written, {}, listed=listed)
        if not is_bpe:
            raise TokenizerError(
                f"{files.folder / 'tokenizer.json'} holds no BPE model, which its tokenizer class"
                " needs: correct tokenizer_class in tokenizer_config.json, or pass token ids with"
                " --prompt-ids."
            )
        backend = tokenizers.Tokenizer(written.model)  # its added tokens are chosen anew
        backend.post_processor = written.post_processor
        kind.rebuild(backend, settings)
        return _Read(backend, kind.named, kind.adds_bos, listed=listed)
    adds_eos = settings.get("add_eos_token") is True
    model = files.read("tokenizer.model")
    if model is not None:
        file = read_sentencepiece(model, legacy=settings.get("legacy") is True)
        adds_bos = settings.get("add_bos_token") is not False
        return _Read(file.backend, file.named, adds_bos, adds_eos, prepare=file.prepare)
    vocabulary, merges = files.read("vocab.json"), files.read("merges.txt")
    if vocabulary is None or merges is None or kind is None or not kind.is_byte_level:
        raise TokenizerError(_unreadable(files))
    backend = _byte_level(vocabulary, merges)
    kind.rebuild(backend, settings)
    return _Read(backend, kind.named, settings.get("add_bos_token") is True, adds_eos)


def _byte_level(vocabulary: bytes, merges: bytes) -> tokenizers.Tokenizer:
    """From the two files that there were before tokenizer.json."""
    lines = [line for line in merges.decode().split("\n") if line and line[:8] != "#version"]
    pairs = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    vocab = msgspec.json.decode(vocabulary, type=dict[str, int])
    return tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs))


def _unreadable(files: ModelFiles) -> str:
    return (
        f"{files.folder} has no tokenizer that can be read: add its tokenizer files, or pass token"
        " ids with --prompt-ids."
    )
