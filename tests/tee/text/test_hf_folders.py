"""Folders of every family give the ids and the text of transformers' fast tokenizers."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from text_helpers import TEXTS, Json, split, write_folder
from tsqp.checkpoint.model_files import ModelFiles, read_tokenizer_files
from tsqp.errors import TokenizerError
from tsqp.tee.text.hf_classes import find_class
from tsqp.tee.text.tokenizer import Tokenizer

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FAST = "PreTrainedTokenizerFast"
OBJECT = {
    "__type": "AddedToken",
    "content": "<s>",
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
}
ADDED = {"content": "<tool>", "lstrip": True, "rstrip": True, "normalized": False, "special": False}
Case = tuple[str, str, Json, dict[str, Json]]

# Backend, model_type, tokenizer_config.json, and other files.
CASES: dict[str, Case] = {
    "llama 3": ("llama3", "llama", {"tokenizer_class": FAST, "bos_token": "<|start|>"}, {}),
    "llama 3 that names the class of llama 2": (
        "llama3",
        "llama",
        {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<|start|>"},
        {},
    ),
    "llama 2": (
        "sentencepiece",
        "llama",
        {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True},
        {},
    ),
    "llama 2, not legacy": (
        "sentencepiece",
        "llama",
        {"tokenizer_class": "LlamaTokenizerFast", "legacy": False, "bos_token": OBJECT},
        {},
    ),
    "llama 2, legacy is null": (
        "sentencepiece",
        "llama",
        {"tokenizer_class": "LlamaTokenizer", "legacy": None},
        {},
    ),
    "llama 2 without a prefix space": (
        "sentencepiece",
        "llama",
        {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False},
        {},
    ),
    "llama 2 that asks for no beginning token": (
        "sentencepiece",
        "llama",
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": True},
        {},
    ),
    "llama 2 with older files": (
        "sentencepiece",
        "llama",
        {"tokenizer_class": "LlamaTokenizer"},
        {
            "special_tokens_map": {
                "bos_token": "<s>",
                "pad_token": {"content": "<pad>", "rstrip": True, "special": True},
                "additional_special_tokens": ["<tool>"],
            },
            "added_tokens": {"<tool>": 471, "<other>": 472},
        },
    ),
    "code llama": ("sentencepiece", "llama", {"tokenizer_class": "CodeLlamaTokenizer"}, {}),
    "smollm 2": ("byte-level", "llama", {"tokenizer_class": "GPT2Tokenizer"}, {}),
    "llama without a class": ("sentencepiece", "llama", {}, {}),
    "mistral": ("sentencepiece", "mistral", {"tokenizer_class": "LlamaTokenizer"}, {}),
    "mistral nemo": ("llama3", "mistral", {"tokenizer_class": "GPT2Tokenizer"}, {}),
    "qwen 2": ("byte-level", "qwen2", {"tokenizer_class": FAST, "pad_token": "<|end|>"}, {}),
    "qwen 3": (
        "byte-level",
        "qwen3",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "additional_special_tokens": ["<|start|>", "<tool>"],
            "add_bos_token": False,
        },
        {},
    ),
    "qwen 3, fast": ("llama3", "qwen3", {"tokenizer_class": FAST}, {}),
    "qwen 3 without a class": ("byte-level", "qwen3", {}, {}),
    "qwen 3 with added tokens": (
        "byte-level",
        "qwen3",
        {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": {"500": ADDED}},
        {},
    ),
    "gemma 2": (
        "sentencepiece without prefix",
        "gemma2",
        {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "pad_token": "<unk>"},
        {},
    ),
    "gemma 3": (
        "sentencepiece",
        "gemma3",
        {"tokenizer_class": "GemmaTokenizerFast", "image_token": "<tool>"},
        {},
    ),
    "phi 3": ("sentencepiece", "phi3", {"tokenizer_class": "LlamaTokenizer"}, {}),
    "smollm 3": ("llama3", "smollm3", {"tokenizer_class": FAST}, {}),
    "granite": ("byte-level", "granite", {"tokenizer_class": "GPT2Tokenizer"}, {}),
    "granite that splits special tokens": (
        "byte-level",
        "granite",
        {"tokenizer_class": "GPT2Tokenizer", "split_special_tokens": True},
        {},
    ),
    "unigram": ("unigram", "llama", {"tokenizer_class": FAST, "unk_token": "<unk>"}, {}),
}
MORE_TEXTS = [*TEXTS, "a <tool> b<tool>", "<other> <pad>  <pad>x"]


def backend_of(name: str, backends: dict[str, Backend]) -> Backend:
    if name != "llama3":
        return backends[name]
    found = copy.deepcopy(backends["byte-level"])
    found.model.ignore_merges = True
    found.pre_tokenizer = split(LLAMA3_SPLIT)
    found.post_processor = processors.TemplateProcessing(
        single="<|start|>:0 $A:0", special_tokens=[("<|start|>", 0)]
    )
    return found


@pytest.fixture(scope="module", params=CASES)
def both(
    request: pytest.FixtureRequest,
    backends: dict[str, Backend],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Tokenizer, PreTrainedTokenizerBase]:
    """A folder, as TSQP reads it and as transformers does."""
    backend, model_type, settings, files = CASES[request.param]
    folder = tmp_path_factory.mktemp("folder")
    write_folder(folder, backend_of(backend, backends), model_type, settings, **files)
    return Tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)


def test_ids_are_those_of_transformers(both: Any) -> None:
    ours, theirs = both
    assert [ours.encode(text) for text in MORE_TEXTS] == theirs(MORE_TEXTS)["input_ids"]


def test_without_special_tokens_too(both: Any) -> None:
    ours, theirs = both
    for text in MORE_TEXTS:
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == expected


def test_text_is_that_of_transformers(both: Any) -> None:
    ours, theirs = both
    for text in MORE_TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@settings(max_examples=25)
@given(text=st.text(max_size=20) | st.text("ab <s>/\n\t'1▁😀é", max_size=20))
def test_any_text_gives_the_ids_and_the_text_of_transformers(both: Any, text: str) -> None:
    ours, theirs = both
    ids = theirs(text)["input_ids"]
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_tokens_with_a_name_are_those_of_transformers(both: Any) -> None:
    ours, theirs = both
    names = {"bos_token", "eos_token", "unk_token", "pad_token", "image_token"}
    expected = {k: v for k, v in theirs.special_tokens_map.items() if k in names}
    assert {k: v for k, v in ours.special_tokens.items() if k in names} == expected


@pytest.mark.parametrize("name", ["byte-level", "llama3"])
def test_the_two_files_of_before_are_read(
    name: str, backends: dict[str, Backend], tmp_path: Path
) -> None:
    settings = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": "<|start|>"}
    backend = backend_of(name, backends)
    write_folder(tmp_path, backend, "qwen2", settings | {"add_bos_token": name == "llama3"})
    (tmp_path / "tokenizer.json").unlink()
    backend.model.save(str(tmp_path))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer(str(tmp_path))
    assert [ours.encode(text) for text in TEXTS] == theirs(TEXTS)["input_ids"]


def test_what_was_used_can_be_hashed(backends: dict[str, Backend], tmp_path: Path) -> None:
    write_folder(tmp_path, backends["byte-level"], "llama", {})
    tokenizer = Tokenizer(str(tmp_path))
    assert tokenizer.files is not None
    assert tokenizer.files.sha256() == {}
    assert tokenizer.encode("x")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert tokenizer.encode("x")
    assert set(tokenizer.files.sha256()) == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("missing", [(), ("tokenizer.json",), ("tokenizer_config.json",)])
def test_all_that_may_be_read_is_in_the_digest_of_the_model(
    missing: tuple[str, ...], backends: dict[str, Backend], tmp_path: Path
) -> None:
    write_folder(tmp_path, backends["byte-level"], "qwen2", {"tokenizer_class": "Qwen2Tokenizer"})
    backends["byte-level"].model.save(str(tmp_path))
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("x")
    for name in missing:
        (tmp_path / name).unlink()
    files = ModelFiles(tmp_path)
    files.read("config.json")
    read_tokenizer_files(files)
    before = set(files._read)
    assert "additional_chat_templates/rag.jinja" in before
    assert Tokenizer(str(tmp_path), files).exists
    assert set(files._read) == before


def test_a_decoder_that_cannot_be_streamed_is_named(
    backends: dict[str, Backend], tmp_path: Path
) -> None:
    write_folder(tmp_path, backends["byte-level"], "llama", {})
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    description["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    tokenizer = Tokenizer(str(tmp_path))
    assert not tokenizer.exists
    with pytest.raises(TokenizerError, match=r"decoder 'WordPiece'.*--prompt-ids"):
        tokenizer.decode([1])


FORCED = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
REFUSED: dict[str, tuple[str, Json]] = {
    "fix_mistral_regex": ("byte-level", {"fix_mistral_regex": True}),
    "fast_tokenizer_files": (
        "byte-level",
        {"fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.0.0.json"]},
    ),
    "clean_up_tokenization_spaces": ("unigram", {"clean_up_tokenization_spaces": True}),
    "sets clean_up_": ("byte-level", {"clean_up_tokenization_spaces": True, FORCED: True}),
    "class XLMRobertaTokenizer": ("unigram", {"tokenizer_class": "XLMRobertaTokenizer"}),
    "class GPTNeoXTokenizer": ("byte-level", {"tokenizer_class": "GPTNeoXTokenizerFast"}),
    "no BPE model": ("unigram", {"tokenizer_class": "LlamaTokenizer"}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_would_give_other_ids_or_text_is_refused_by_name(
    words: str, backends: dict[str, Backend], tmp_path: Path
) -> None:
    backend, settings = REFUSED[words]
    write_folder(tmp_path, backends[backend], "llama", settings)
    with pytest.raises(TokenizerError, match=rf"{words}.*--prompt-ids"):
        Tokenizer(str(tmp_path)).encode("x")


@pytest.mark.parametrize(
    "settings",
    [{"fast_tokenizer_files": ["tokenizer.json"]}, {"clean_up_tokenization_spaces": True}],
)
def test_settings_that_change_nothing_are_read(
    settings: Json, backends: dict[str, Backend], tmp_path: Path
) -> None:
    write_folder(tmp_path, backends["byte-level"], "llama", {"tokenizer_class": FAST, **settings})
    ours, theirs = Tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs(" the sea .")["input_ids"]
    assert ours.encode(" the sea .") == ids
    assert ours.decode(ids) == theirs.decode(ids)


def test_every_class_of_transformers_is_implemented_or_refused() -> None:
    names = {each for each in TOKENIZER_MAPPING_NAMES.values() if each}
    names |= {each for each in dir(transformers) if each.endswith(("Tokenizer", "TokenizerFast"))}
    assert len(names) > 100
    for name in names - {"AutoTokenizer", "PreTrainedTokenizer", FAST, "TokenizersBackend"}:
        try:
            assert find_class("llama", name, b"") is not None, name
        except TokenizerError:
            continue
    assert find_class("llama", "ATokenizerOfItsOwn", b"") is None
