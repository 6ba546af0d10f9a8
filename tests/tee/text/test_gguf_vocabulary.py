"""GGUF vocabularies give the ids of llama.cpp, and of transformers where it reads them alike."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from text_helpers import BYTES, TEXTS, kinds_of, split, write_gguf
from tsqp.checkpoint.files import BinaryFile
from tsqp.checkpoint.gguf_reader import read_header
from tsqp.errors import CheckpointError, TokenizerError
from tsqp.tee.text.gguf_pre_types import _BY_NAME, find_pre_type
from tsqp.tee.text.tokenizer import Tokenizer

# Types whose pattern transformers knows too.
SHARED_TYPES = [
    "llama3",
    "llama-bpe",
    "pixtral",
    "dbrx",
    "smaug-bpe",
    "tekken",
    "qwen2",
    "deepseek-r1-qwen",
    "megrez",
    "qwen35",
    "gpt-4o",
    "kanana2",
]
LOOK_UP_WORDS_FIRST = {"llama3", "llama-bpe", "pixtral", "tekken"}
SPECIAL = ("<|start|>", "<|end|>", "<|endoftext|>")


def byte_level_file(path: Path, backend: Backend, **values: Any) -> Path:
    """A byte-level vocabulary in a GGUF file."""
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    kinds = kinds_of(len(tokens), CONTROL=[tokens.index(text) for text in SPECIAL])
    tokens.append("<think>")
    kinds.append(int(TokenType.USER_DEFINED))
    values = {"model": "gpt2", "merges": [" ".join(m) for m in model["merges"]]} | values
    return write_gguf(path, tokens, kinds, bos_token_id=0, eos_token_id=1, **values)


def reference(path: Path) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("name", SHARED_TYPES)
def test_byte_level_ids_are_those_of_transformers(
    name: str, backends: dict[str, Backend], tmp_path: Path
) -> None:
    path = byte_level_file(tmp_path / "m.gguf", backends["byte-level"], pre=name)
    ours, theirs = Tokenizer(str(path)), reference(path)
    theirs.backend_tokenizer.model.ignore_merges = name in LOOK_UP_WORDS_FIRST
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_the_demo_model_is_read_as_by_transformers(demo_file: Path, tokenizer: Tokenizer) -> None:
    theirs = reference(demo_file)
    # transformers does not know this type; the model's tokenizer.json cuts digits off, too.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), theirs.backend_tokenizer.pre_tokenizer]
    )
    assert [tokenizer.encode(text) for text in TEXTS] == theirs(TEXTS)["input_ids"]


# What each type makes of a text: the pieces between which nothing merges.
PIECES = {
    "llama-bpe": ["I", "'LL", " pay", " ", "123", "45", "\n\n", " ", " $", "5", "."],
    "qwen2": ["I", "'LL", " pay", " ", *"12345", "\n\n", " ", " $", "5", "."],
    "smollm": ["I", "'", "LL", " pay", " ", *"12345", "\n\n ", " $", "5", "."],
    "gpt-2": ["I", "'", "LL", " pay", " 12345", "\n\n ", " $", "5", "."],
    "default": ["I", "'", "LL", " pay", " ", "123", "45", "\n\n  ", "$", "5", "."],
    "falcon": ["I", "'", "LL", " pay", " ", "123", "45", "\n\n  ", "$", "5", "."],
    "tekken": ["I", "'LL", " pay", " ", *"12345", "\n\n", " ", " $", "5", "."],
    "gpt-4o": ["I'LL", " pay", " ", "123", "45", "\n\n", " ", " $", "5", "."],
    "deepseek-v3": ["I", "'LL", " pay", " ", "123", "45", "\n\n", " ", " $", "5", "."],
    "deepseek-coder": ["I", "'", "LL", " pay", " ", *"12345", "\n", "\n", "  $", "5", "."],
    "bloom": ["I'LL", " pay", " 12345", "\n\n ", " $5", "."],
}


@pytest.mark.parametrize("name", PIECES)
def test_each_type_cuts_text_as_in_llama_cpp(name: str) -> None:
    cut = split(*find_pre_type(name).patterns).pre_tokenize_str("I'LL pay 12345\n\n  $5.")
    found = [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in cut]
    assert found == PIECES[name]


def test_every_type_has_patterns_that_cut_any_text() -> None:
    assert len(_BY_NAME) > 50
    for pre_type in set(_BY_NAME.values()):
        cut = split(*pre_type.patterns)
        for text in TEXTS:
            pieces = [text[start:end] for _, (start, end) in cut.pre_tokenize_str(text)]
            assert "".join(pieces) == text


@pytest.mark.parametrize("name", ["kimi-k2", "roberta-bpe", "afmoe", "gemma4", "of tomorrow"])
def test_other_types_are_refused_by_name(
    name: str, backends: dict[str, Backend], tmp_path: Path
) -> None:
    path = byte_level_file(tmp_path / "m.gguf", backends["byte-level"], pre=name)
    tokenizer = Tokenizer(str(path))
    assert not tokenizer.exists
    with pytest.raises(TokenizerError, match=rf"rules '{name}'.*--prompt-ids"):
        tokenizer.encode("x")


@pytest.mark.parametrize("name", ["bert", "t5", "rwkv", "plamo2", "gemma4", "none"])
def test_other_vocabularies_are_refused_by_name(name: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", ["a"], [1], model=name)
    with pytest.raises(TokenizerError, match=rf"type '{name}'.*--prompt-ids"):
        Tokenizer(str(path)).encode("x")


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("llama-bpe", {}, [0, "x"]),
        ("tekken", {}, [0, "x"]),
        ("qwen2", {}, ["x"]),
        ("smollm", {}, ["x"]),
        ("llama-bpe", {"add_bos_token": False}, ["x"]),
        ("qwen2", {"add_bos_token": True}, [0, "x"]),
        ("qwen2", {"add_eos_token": True}, ["x", 1]),
        ("llama-bpe", {"add_eos_token": True}, [0, "x", 1]),
    ],
)
def test_ends_are_added_as_the_type_and_the_flags_say(
    name: str,
    flags: dict[str, bool],
    expected: list[Any],
    backends: dict[str, Backend],
    tmp_path: Path,
) -> None:
    path = byte_level_file(tmp_path / "m.gguf", backends["byte-level"], pre=name, **flags)
    tokenizer = Tokenizer(str(path))
    [x] = tokenizer.encode("x", add_special_tokens=False)
    assert tokenizer.encode("x") == [x if each == "x" else each for each in expected]
    assert tokenizer.encode("") == [each for each in expected if each != "x"]


def test_a_word_that_only_the_vocabulary_has_is_found_first(tmp_path: Path) -> None:
    """A case from outside: Llama 3 has words that its merges do not make."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "ab", "abc", "ĠViet", "<|begin_of_text|>", "<|eot_id|>"]
    count = len(tokens)
    for pre, words in {"llama-bpe": ["ĠViet"], "dbrx": ["Ġ", "V", "i", "e", "t"]}.items():
        path = write_gguf(
            tmp_path / f"{pre}.gguf",
            tokens,
            kinds_of(count, CONTROL=[count - 2, count - 1]),
            model="gpt2",
            pre=pre,
            merges=["a b", "ab c"],
            bos_token_id=count - 2,
            eos_token_id=count - 1,
        )
        tokenizer = Tokenizer(str(path))
        bos = ["<|begin_of_text|>"] if pre == "llama-bpe" else []
        for text, expected in {"abc": ["abc"], " Viet": words}.items():
            assert [tokens[i] for i in tokenizer.encode(text)] == bos + expected


# Sentencepiece


TINY = ["<unk>", "<s>", "</s>", *BYTES, "▁", "h", "i", "hi", "▁hi"]


def sentencepiece_file(path: Path, tokens: list[str], scores: list[float], **values: Any) -> Path:
    kinds = kinds_of(len(tokens), UNKNOWN=[0], CONTROL=[1, 2], BYTE=list(range(3, 259)))
    for place, token in enumerate(tokens):
        if token.startswith("<user"):
            kinds[place] = int(TokenType.USER_DEFINED)
    values = {"model": "llama", "pre": "default", "scores": scores} | values
    return write_gguf(path, tokens, kinds, bos_token_id=1, eos_token_id=2, **values)


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        (
            True,
            {
                "hi": "<s> ▁hi",
                " hi": "<s> ▁ ▁hi",
                "</s>hi": "<s> </s> ▁hi",
                "hi</s>hi": "<s> ▁hi </s> ▁hi",
                "": "<s>",
                "é": "<s> ▁ <0xC3> <0xA9>",
            },
        ),
        (
            False,
            {"hi": "<s> hi", " hi": "<s> ▁hi", "</s>hi": "<s> </s> hi", "hi hi": "<s> hi ▁hi"},
        ),
    ],
)
def test_the_space_in_front_is_added_where_the_file_says(
    flag: bool, expected: dict[str, str], tmp_path: Path
) -> None:
    """A case from outside: the flag was passed over."""
    scores = [0.0] * 259 + [-1e9, -1e9, -1e9, -1.0, -2.0]
    path = sentencepiece_file(tmp_path / "m.gguf", TINY, scores, add_space_prefix=flag)
    tokenizer = Tokenizer(str(path))
    for text, tokens in expected.items():
        ids = tokenizer.encode(text)
        assert " ".join(TINY[i] for i in ids) == tokens
        if "</s>" not in text:
            assert tokenizer.decode(ids) == text


def merge_by_scores(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE: the pair whose piece has the highest score, and the leftmost of them."""
    pieces = list(text)
    while True:
        pairs = [
            (-scores[left + right], place)
            for place, (left, right) in enumerate(pairwise(pieces))
            if left + right in scores
        ]
        if not pairs:
            return pieces
        _, place = min(pairs)
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]


SYLLABLES = ["▁", "a", "b", "c", "ab", "bc", "▁a", "abc", "aa", "▁ab", "▁▁", "▁abc", "aab", "ca"]


@given(text=st.text("abc ", max_size=24), order=st.permutations(SYLLABLES[4:]))
def test_pieces_are_merged_by_their_scores(
    text: str, order: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *SYLLABLES[:4], *order]
    scores = [0.0] * 259 + [float(-place) for place in range(len(SYLLABLES))]
    path = tmp_path_factory.getbasetemp() / "merged.gguf"
    sentencepiece_file(path, tokens, scores)
    found = Tokenizer(str(path)).encode(text, add_special_tokens=False)
    known = dict(zip(tokens[259:], scores[259:], strict=True))
    spaced = "▁" + text.replace(" ", "▁") if text else ""
    assert [tokens[i] for i in found] == merge_by_scores(spaced, known)


def test_scores_that_say_nothing_are_refused(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *SYLLABLES]
    path = sentencepiece_file(tmp_path / "m.gguf", tokens, [-1000.0] * len(tokens))
    with pytest.raises(TokenizerError, match="mostly equal"):
        Tokenizer(str(path)).encode("x")


def test_phi_3_takes_the_whitespace_after_its_tokens(tmp_path: Path) -> None:
    tokens = [*TINY, "<|user|>", "<user>", "<|endoftext|>"]
    scores = [0.0] * 259 + [-1e9, -1e9, -1e9, -1.0, -2.0, 0.0, 0.0, 0.0]
    kinds = kinds_of(
        len(tokens), UNKNOWN=[0], CONTROL=[1, 2, 264, 266], USER_DEFINED=[265], BYTE=range(3, 259)
    )
    for name, stripped in {"Phi-3 Mini": True, "Another": False}.items():
        path = write_gguf(
            tmp_path / f"{stripped}.gguf",
            tokens,
            kinds,
            model="llama",
            scores=scores,
            general__name=name,
        )
        tokenizer = Tokenizer(str(path))
        newline = [] if stripped else ["▁", "<0x0A>", "hi"]
        for token in ("<|user|>", "<user>"):
            found = [tokens[i] for i in tokenizer.encode(f"{token}\nhi")]
            assert found == ["<s>", token, *(newline or ["▁hi"])]
        kept = tokenizer.encode("<|endoftext|>\nhi")
        assert [tokens[i] for i in kept] == ["<s>", "<|endoftext|>", "▁", "<0x0A>", "hi"]


def test_user_defined_tokens_are_whole_and_have_text(tmp_path: Path) -> None:
    scores = [0.0] * 259 + [-1e9, -1e9, -1e9, -1.0, -2.0, 0.0]
    path = sentencepiece_file(tmp_path / "m.gguf", [*TINY, "<user>"], scores)
    tokenizer = Tokenizer(str(path))
    ids = tokenizer.encode("hi<user></s>")
    assert ids == [1, 263, 264, 2]
    assert tokenizer.decode(ids) == "hi<user>"


def test_tokens_that_look_like_control_tokens_give_no_text(
    backends: dict[str, Backend], tmp_path: Path
) -> None:
    tokens = [*TINY, "<|im_end|>"]
    scores = [0.0] * 259 + [-1e9, -1e9, -1e9, -1.0, -2.0, 0.0]
    tokenizer = Tokenizer(str(sentencepiece_file(tmp_path / "m.gguf", tokens, scores)))
    assert tokenizer.encode("hi<|im_end|>")[-1] == 264
    assert tokenizer.decode([263, 264]) == "hi"


# Metadata


def test_templates_and_names_come_from_the_file(
    backends: dict[str, Backend], tmp_path: Path
) -> None:
    path = byte_level_file(
        tmp_path / "m.gguf",
        backends["byte-level"],
        pre="qwen2",
        tokenizer__chat_template="{{ messages[0].content }}",
    )
    tokenizer = Tokenizer(str(path))
    assert tokenizer.chat_template_source == "{{ messages[0].content }}"
    assert tokenizer.special_tokens == {"bos_token": "<|start|>", "eos_token": "<|end|>"}
    assert tokenizer.encode_chat([{"role": "user", "content": "x"}]) == tokenizer.encode("x")
    path = byte_level_file(
        tmp_path / "n.gguf",
        backends["byte-level"],
        pre="qwen2",
        tokenizer__chat_template="a",
        tokenizer__chat_template__tool_use="b",
    )
    assert Tokenizer(str(path)).chat_template_source == {"default": "a", "tool_use": "b"}


def test_files_beside_a_gguf_file_change_nothing(
    backends: dict[str, Backend], tmp_path: Path
) -> None:
    path = byte_level_file(tmp_path / "m.gguf", backends["byte-level"], pre="qwen2")
    before = Tokenizer(str(path)).encode("The sea <s>")
    backends["sentencepiece"].save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x", "bos_token": "<s>"}')
    (tmp_path / "chat_template.jinja").write_text("x")
    tokenizer = Tokenizer(str(path))
    assert tokenizer.encode("The sea <s>") == before
    assert tokenizer.chat_template_source is None


def test_the_checkpoints_header_is_the_one_that_is_used(
    backends: dict[str, Backend], tmp_path: Path
) -> None:
    path = byte_level_file(tmp_path / "m.gguf", backends["byte-level"], pre="qwen2")
    header = read_header(BinaryFile(path))
    expected = Tokenizer(str(path)).encode("The sea")
    early = Tokenizer(str(path))
    assert early.encode("The sea") == expected
    byte_level_file(path, backends["byte-level"], pre="gpt-2", add_bos_token=True)
    assert Tokenizer(str(path)).encode("The sea") != expected
    assert Tokenizer(str(path), header=header).encode("The sea") == expected
    early.use_header(header)
    with pytest.raises(CheckpointError, match="has changed"):
        early.use_header(read_header(BinaryFile(path)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bos_token_id": 999}, r"bos_token_id 999, but its vocabulary has 264 tokens"),
        ({"scores": [1.0]}, "not one number for each token"),
        ({"add_space_prefix": 1}, "add_space_prefix 1, which is not a flag"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
        ({"normalizer_lowercase": 1}, r"tokenizer\.ggml\.normalizer_lowercase.*--prompt-ids"),
        ({"scores": [float("nan")] * 264}, "not a finite number"),
    ],
)
def test_damaged_metadata_is_named(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    defaults = {"model": "llama", "scores": [0.0] * 264}
    path = write_gguf(tmp_path / "m.gguf", TINY, kinds_of(264), **(defaults | values))
    with pytest.raises(TokenizerError, match=message):
        Tokenizer(str(path)).encode("x")


def test_keys_without_effect_are_read(tmp_path: Path) -> None:
    values = {"scores": [0.0] * 264, "eot_token_id": 2, "add_padding_token": False}
    path = write_gguf(tmp_path / "m.gguf", TINY, kinds_of(264), model="llama", **values)
    assert Tokenizer(str(path)).encode("x")


def test_two_tokens_of_one_text_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", ["a", "a"], [1, 1], model="gpt2", merges=["a a"])
    with pytest.raises(TokenizerError, match="same text"):
        Tokenizer(str(path)).encode("x")


def test_merges_of_no_tokens_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", ["a", "b"], [1, 1], model="gpt2", merges=["a b"])
    with pytest.raises(TokenizerError, match="damaged"):
        Tokenizer(str(path)).encode("x")


def test_a_file_without_a_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", ["a"], [1])
    with pytest.raises(TokenizerError, match=r"no tokenizer that can be read.*--prompt-ids"):
        Tokenizer(str(path)).encode("x")
