"""The tokens that a Hugging Face folder's other files add to its vocabulary.

The source of each rule is transformers 5: `PreTrainedTokenizerBase._from_pretrained` and
`TokenizersBackend.__init__`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken

from tsqp.checkpoint.files import parse_json
from tsqp.checkpoint.model_files import ModelFiles
from tsqp.errors import TokenizerError
from tsqp.tee.text.vocabulary import NAMED_TOKENS

MAX_ADDED = 2**16  # several times those of any model; each text is searched for all of them
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_Named = dict[str, str | AddedToken]


def add_tokens(
    backend: tokenizers.Tokenizer,
    files: ModelFiles,
    settings: Mapping[str, Any],
    defaults: Mapping[str, str],
    listed: Mapping[int, AddedToken],
) -> dict[str, str]:
    """Add the tokens that the folder's other files name.

    Args:
        settings: tokenizer_config.json.
        defaults: the tokens with a name, if those files do not name them.
        listed: the added tokens of tokenizer.json, by id.

    Returns:
        the texts of the tokens with a name.

    Raises:
        TokenizerError: there are more than MAX_ADDED.
    """
    named: _Named = {**defaults, **_named_in(settings)}
    extra = _extra(settings)
    if isinstance(settings.get("added_tokens_decoder"), dict):
        numbered = {
            int(token_id): _added(token)
            for token_id, token in settings["added_tokens_decoder"].items()
        }
    else:  # the files from before that field
        special = read_object(files, "special_tokens_map.json")
        named |= _named_in(special)
        extra = special.get("extra_special_tokens") or extra
        specials = {str(token) for token in named.values()} | {_text(token) for token in extra}
        numbered = dict(listed) | {
            int(token_id): AddedToken(
                text, normalized=text not in specials, special=text in specials
            )
            for text, token_id in read_object(files, "added_tokens.json").items()
            if token_id not in listed
        }
        extra = extra or special.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        named |= {str(name): _special(token) for name, token in extra.items()}
        extra = []
    if len(listed) + len(numbered) + len(named) + len(extra) > MAX_ADDED:
        raise TokenizerError(
            f"{files.folder} adds more than {MAX_ADDED} tokens to its vocabulary: correct its"
            " tokenizer files."
        )
    by_text = {token.content: token for token in numbered.values()}
    named = {name: by_text.get(str(token), token) for name, token in named.items()}
    known = dict(backend.get_added_tokens_decoder())
    backend.add_tokens(_new(known, numbered, list(named.values()), list(map(_special, extra))))
    return {name: str(token) for name, token in named.items()}


def _new(
    known: Mapping[int, AddedToken],
    numbered: Mapping[int, AddedToken],
    named: Sequence[str | AddedToken],
    extra: Sequence[AddedToken],
) -> list[AddedToken]:
    """The tokens to add to those that the vocabulary knows, in the order of their ids."""
    present = {repr(token) for token in known.values()}
    new = [token for _, token in sorted(numbered.items()) if repr(token) not in present]
    texts = {token.content for token in [*known.values(), *new]}
    for token in new:
        token.special = token.special or token.content in map(str, named)
    for each in [*named, *extra]:
        if str(each) not in texts:
            texts.add(str(each))
            new.append(_special(each))
    return new


def _extra(settings: Mapping[str, Any]) -> Any:
    """Special tokens without a name: a list, or an object that names them after all."""
    return settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []


def _named_in(settings: Mapping[str, Any]) -> _Named:
    """The tokens that have a name: those of every model, and a model's own "..._token"."""
    found: _Named = {}
    for name, value in settings.items():
        if isinstance(value, dict) and name in NAMED_TOKENS:
            found[name] = _special(value)
        elif isinstance(value, str) and name.endswith("_token"):
            found[name] = value
    return found


def _text(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _special(token: str | AddedToken | Mapping[str, Any]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    if isinstance(token, Mapping):
        return _added({**token, "special": True})
    token.special = True
    return token


def _added(token: Mapping[str, Any]) -> AddedToken:
    flags = {name: bool(token[name]) for name in _FLAGS if name in token}
    return AddedToken(str(token["content"]), **flags)


def read_object(files: ModelFiles, name: str) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file."""
    raw = files.read(name)
    return {} if raw is None else parse_json(raw, files.folder / name)
