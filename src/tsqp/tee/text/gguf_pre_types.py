"""How byte-level vocabularies of GGUF files split text before merging: "tokenizer.ggml.pre".

The types, and which of them add a beginning token or look words up before merging, are taken from
llama.cpp's table (`src/llama-vocab.cpp`). The patterns are those of the models' own tokenizer.json;
llama.cpp spells them differently, for its own regular expressions. Each pattern cuts the pieces of
the one before it; text that it does not match stays a piece.
"""

from dataclasses import dataclass

from tsqp.errors import TokenizerError
from tsqp.model.json_fields import show


@dataclass(frozen=True, slots=True)
class PreType:
    """One type.

    Attributes:
        patterns: regular expressions (Oniguruma), applied in this order.
        ignores_merges: a word that is a token is that token, whatever the merges say.
        adds_bos: texts get the beginning token unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    ignores_merges: bool = False
    adds_bos: bool = False


_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SIGNS_AND_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_LLAMA3 = rf"{_SUFFIXES}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_SUFFIXES}|{_WORD}|\p{{N}}|{_SIGNS}|{_SPACES}"
_QWEN35 = (
    rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LOWER_END = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_UPPER_START = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_TEKKEN = rf"{_LOWER_END}|{_UPPER_START}|\p{{N}}|{_SIGNS_AND_SLASH}|{_SPACES}"
_GPT4O = (
    rf"{_LOWER_END}{_SUFFIXES}?|{_UPPER_START}{_SUFFIXES}?|\p{{N}}{{1,3}}|{_SIGNS_AND_SLASH}"
    rf"|{_SPACES}"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
_DIGITS = (r"\p{N}", _GPT2)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SEED = rf"{_SUFFIXES}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_EXAONE_MOE = (
    rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)

_TYPES: dict[PreType, tuple[str, ...]] = {
    PreType(_DEFAULT): ("default",),
    PreType((_LLAMA3,), ignores_merges=True, adds_bos=True): (
        *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0"),
        "lfm2",
    ),
    PreType((_LLAMA3,)): ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"),
    PreType((_TEKKEN,), ignores_merges=True, adds_bos=True): ("tekken",),
    PreType((_GPT4O,)): ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
    PreType((_QWEN2,)): (
        *("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan", "solar-open"),
        "grok-2",
    ),
    PreType((_QWEN35,)): ("qwen35",),
    PreType((_QWEN2.removeprefix(f"{_SUFFIXES}|"),)): ("ufakzeka",),
    PreType(("[^\\n]+|[\\n]+", _QWEN2)): ("laguna",),
    PreType((_SEED,)): ("seed-coder",),
    PreType((_BAILING,)): ("bailingmoe", "bailingmoe2", "llada-moe"),
    PreType((_EXAONE_MOE,)): ("exaone-moe",),
    PreType((r"\p{N}{1,3}", _LLAMA3.replace("{1,3}", "+")), ignores_merges=True): ("minicpm5",),
    PreType((_GPT2,)): (
        *("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "mpt", "olmo", "jais"),
        *("trillion", "granite-docling"),
    ),
    PreType(_DIGITS): (
        *("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"),
        "mellum2",
    ),
    PreType((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")): ("falcon",),
    PreType(_DEEPSEEK3): ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"),
    PreType(_DEEPSEEK_CODER): ("deepseek-coder",),
    PreType((_BLOOM,)): ("poro-chat", "bloom", "gpt3-finnish"),
    PreType((_BLOOM, r"\p{N}")): ("viking",),
}
_BY_NAME = {name: pre_type for pre_type, names in _TYPES.items() for name in names}


def find_pre_type(name: object) -> PreType:
    """The type of that name; llama.cpp's default if the file names none.

    Raises:
        TokenizerError: one that TSQP does not support.
    """
    if name is None:
        return _BY_NAME["default"]
    found = _BY_NAME.get(name) if isinstance(name, str) else None
    if found is None:
        raise TokenizerError(
            f"The GGUF file splits text by the rules {show(name)} (tokenizer.ggml.pre), which TSQP"
            " does not support: pass token ids with --prompt-ids."
        )
    return found
