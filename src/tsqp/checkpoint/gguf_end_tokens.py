"""The tokens that end an answer of a GGUF model, as llama.cpp finds them.

The source is `special_eog_ids` of llama.cpp's `src/llama-vocab.cpp`: converters write one or two
end tokens, and chat models end at others too, so llama.cpp also goes by the texts of tokens.
"""

from tsqp.checkpoint.gguf_reader import GGUFHeader, StringArray
from tsqp.errors import UnsupportedModel

_START = "tokenizer.ggml."
_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_SENTENCEPIECE_EOS = 2  # of the type "llama", if the file has no eos_token_id

# Tokens with these texts end an answer, and are control tokens whatever type the file gives them.
END_TEXTS = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>"),
        *("<|calls|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>"),
        *("[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>"),
        *("<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
    }
)
# Tokens of code infilling that end an answer too: by a key, or by their text if there is no key.
FILL_TEXTS = {
    "fim_pad_token_id": frozenset({"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"}),
    "fim_rep_token_id": frozenset(
        {"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"}
    ),
    "fim_sep_token_id": frozenset({"<|file_sep|>"}),
}


def end_token_ids(header: GGUFHeader) -> list[object]:
    """The ids, as the file gives them: the caller checks that they are tokens.

    Raises:
        UnsupportedModel: the file forbids tokens.
    """
    metadata = header.metadata
    if metadata.get(f"{_START}suppress_tokens"):
        raise UnsupportedModel(
            f"The GGUF file has {_START}suppress_tokens, tokens that answers must not contain,"
            " which TSQP does not support: use another file of the model."
        )
    keys = [*_KEYS, *FILL_TEXTS]
    named = {key: value for key in keys if (value := metadata.get(_START + key)) is not None}
    if metadata.get(f"{_START}model") == "llama":
        named.setdefault("eos_token_id", _SENTENCEPIECE_EOS)
    wanted = END_TEXTS.union(*(FILL_TEXTS[key] for key in FILL_TEXTS.keys() - named.keys()))
    tokens = metadata.get(f"{_START}tokens")
    by_id = tokens.find(wanted) if isinstance(tokens, StringArray) else {}
    not_ends = _not_ends(set(by_id.values()))
    ids = [*named.values(), *by_id]
    return [each for each in ids if type(each) is not int or by_id.get(each) not in not_ends]


def _not_ends(texts: set[str]) -> set[str]:
    """The texts that do not end an answer of a model that has the others."""
    found = set()
    has_call = bool(texts & {"<|call|>", "<|calls|>"})
    if has_call and texts & {"<|return|>", "<|flush|>"}:
        found.add("<|end|>")  # ends one of the messages of which an answer consists
    if "<|tool_response>" in texts:
        found.add("</s>")
    return found
