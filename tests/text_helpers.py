"""Small tokenizers of every kind, in the files in which models come."""

import json
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "The capital of France is Paris, and the sea is blue; it's what they'd said.",
    "  def main(argument):\n\t\treturn argument + 1234567 # 12 34\n\n\n\nthe  end   of    it",
    "Größe naïve façade 漢字 日本語 한국어 Ελληνικά привет мир नमस्ते",
    "I'll WE'VE you're HELLO Hello helloWorld snake_case kebab-case $100.50 a@b.c",
] * 5
TEXTS = [
    "",
    " ",
    "   ",
    "The capital of France is",
    " the sea",
    "  two  spaces\n\nand lines\t\tand tabs \r\n end  ",
    "naïve 漢字 👩‍👩‍👧! 😀😀 ÿ\u0301 e\u0301",
    "1234567 12 3.5 ١٢٣ ²",
    "it's I'LL we'Ve 'ſ",
    "a<s>b</s> c <s> d",
    "<|start|>user\n hi<|end|>\n<|start|>",
    "<think> x</think>  y<think>",
    "▁ ▁▁a <0x41> <unk>",
    "\x00\x07\u200b\ufeff\u2028x\xa0y",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
Json = dict[str, Any]


def byte_level(pattern: str | None = None, **options: Any) -> Tokenizer:
    """A byte-level BPE as Llama 3 or Qwen has it, with a beginning token of its own."""
    tokenizer = Tokenizer(models.BPE(**options))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer.pre_tokenizer = level if pattern is None else split(pattern)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|start|>", "<|end|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer


def split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Cut by each pattern in turn, as byte-level tokenizers do."""
    from tokenizers import Regex

    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*cuts, level])


def sentencepiece_pieces() -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces and merges in order, with "<unk>", "<s>", "</s>" and the bytes first."""
    learnt = Tokenizer(models.BPE())
    learnt.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    learnt.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    learnt.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False, limit_alphabet=70)
    )
    model = json.loads(learnt.to_str())["model"]
    order = sorted(model["vocab"], key=model["vocab"].get)
    return ["<unk>", "<s>", "</s>", *BYTES, *order], [tuple(pair) for pair in model["merges"]]


def sentencepiece_like(*, prefix: bool = True) -> Tokenizer:
    """A BPE with byte fallback as Llama 2, Mistral, Phi-3 and Gemma have it."""
    pieces, merges = sentencepiece_pieces()
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: place for place, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prepend = [normalizers.Prepend("▁")] if prefix else []
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens(
        [
            AddedToken("<|start|>", special=True, rstrip=True, normalized=False),
            AddedToken("<think>", normalized=False),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s>:0 $A:0", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def unigram() -> Tokenizer:
    """A Unigram model with Metaspace."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=["<unk>", "<s>"], unk_token="<unk>", show_progress=False
        ),
    )
    return tokenizer


def write_folder(
    folder: Path, tokenizer: Tokenizer, model_type: str, settings: Json, **files: Json
) -> Path:
    """A model's folder without weights; `files` are more JSON files, by name."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    contents = {"tokenizer_config": settings, "config": {"model_type": model_type}, **files}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def write_gguf(path: Path, tokens: list[str], kinds: list[int], **values: Any) -> Path:
    """A GGUF file of a tokenizer only; values are of "tokenizer.ggml." keys.

    A key may also be written whole, with "__" for its dots.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for name, value in values.items():
        key = name.replace("__", ".") if "__" in name else f"tokenizer.ggml.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def kinds_of(count: int, **some: list[int]) -> list[int]:
    """NORMAL for all tokens but some, by the name of their type."""
    kinds = [int(TokenType.NORMAL)] * count
    for name, places in some.items():
        for place in places:
            kinds[place] = int(TokenType[name])
    return kinds
