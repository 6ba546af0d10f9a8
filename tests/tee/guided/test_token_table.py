"""The bytes that grammars see are those of the answer's text."""

import json
import random
from pathlib import Path

import llguidance
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

from text_helpers import BYTES, TEXTS, byte_level, kinds_of, sentencepiece_like, unigram, write_gguf
from tsqp.checkpoint import demo_model
from tsqp.errors import CheckpointError
from tsqp.tee.guided.token_table import TokenTable
from tsqp.tee.text.tokenizer import Tokenizer

BACKENDS = {
    "byte-level": byte_level,
    "sentencepiece": sentencepiece_like,
    "sentencepiece without prefix": lambda: sentencepiece_like(prefix=False),
    "unigram": unigram,
}


def demo() -> str:
    try:
        return str(demo_model.locate())
    except CheckpointError as error:
        pytest.skip(str(error))


def saved(folder: Path, backend: Backend) -> str:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    backend.save(str(folder / "tokenizer.json"))
    return str(folder)


def gguf_file(path: Path) -> str:
    """SentencePiece's pieces in a GGUF file."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, "▁", "a", "b", "▁a", "ab", "▁ab", "{", '"', "漢"]
    kinds = kinds_of(len(tokens), UNKNOWN=[0], CONTROL=[1, 2], BYTE=list(range(3, 3 + len(BYTES))))
    scores = [0.0] * 259 + [float(-place) for place in range(len(tokens) - 259)]
    return str(write_gguf(path / "t.gguf", tokens, kinds, model="llama", scores=scores))


@pytest.mark.parametrize("kind", [*BACKENDS, "gguf", "demo"])
def test_the_bytes_of_each_token_are_those_of_the_tokenizers_own_decoding(
    kind: str, tmp_path: Path
) -> None:
    if kind in BACKENDS:
        model = saved(tmp_path, BACKENDS[kind]())
    else:
        model = demo() if kind == "demo" else gguf_file(tmp_path)
    tokenizer = Tokenizer(model)
    backend = tokenizer._vocabulary.backend
    size = backend.get_vocab_size()
    table = TokenTable(tokenizer, size + 3)
    assert len(table.tokens) == size + 4
    assert table.tokens[size : size + 3] == [b"", b"", b""]
    special = set(table.special_token_ids)
    [anchor] = [i for i in range(size) if backend.id_to_token(i) in ("a", "▁a")][:1]
    before = backend.decode([anchor], skip_special_tokens=False)
    complete = 0
    for token_id in range(size):
        after = backend.decode([anchor, token_id])[len(before) :]
        if token_id in special:
            assert after == ""
            assert table.tokens[token_id].decode() == backend.id_to_token(token_id)
        elif "\ufffd" not in after:
            complete += 1
            assert table.tokens[token_id] == after.encode(), token_id
        else:  # a part of a character
            assert table.tokens[token_id].decode(errors="replace") == after
    assert complete > (size - len(special)) / 3


@pytest.mark.parametrize("kind", [*BACKENDS, "demo"])
def test_forced_text_gets_tokens_with_exactly_its_bytes(kind: str, tmp_path: Path) -> None:
    model = demo() if kind == "demo" else saved(tmp_path, BACKENDS[kind]())
    tokenizer = Tokenizer(model)
    table = TokenTable(tokenizer, tokenizer._vocabulary.backend.get_vocab_size())
    texts = [*TEXTS, 'name": "', "a<s>b<|start|>c<|im_end|>", "{\n  ", '"} , \x02'] * 2
    texts += [each[1:] for each in texts if each[:1].isascii()]
    whole = 0
    for text in texts:
        ids = table(text)
        assert not set(ids) & set(table.special_token_ids)
        found = b"".join(table.tokens[token_id] for token_id in ids)
        # The vocabulary of the unigram model lacks characters.
        assert found == text.encode() or (kind == "unigram" and ids == [])
        whole += found == text.encode()
    assert whole > 10


def test_what_the_tokenizer_would_choose_is_forced_where_it_has_the_right_bytes(
    tmp_path: Path,
) -> None:
    tokenizer = Tokenizer(saved(tmp_path, sentencepiece_like()))
    table = TokenTable(tokenizer, 600)
    words = ["The", "capital", "of", "France"]
    assert [table.tokens[i] for i in table(" ".join(words))] != [b" The"]
    inside = tokenizer.encode("x capital of", add_special_tokens=False)
    assert table(" capital of") == inside[-len(table(" capital of")) :]


@pytest.mark.parametrize("kind", BACKENDS)
def test_any_text_can_be_chosen_token_by_token(kind: str, tmp_path: Path) -> None:
    """What the library allows next is exactly what continues the text."""
    tokenizer = Tokenizer(saved(tmp_path, BACKENDS[kind]()))
    table = TokenTable(tokenizer, tokenizer._vocabulary.backend.get_vocab_size() + 2)
    ll_tokenizer = llguidance.LLTokenizer(table)
    wanted = b"a the end" if kind == "unigram" else 'a "漢字" the\nend'.encode()
    draw = random.Random(0)
    for _ in range(20):
        grammar = llguidance.LLMatcher.grammar_from_lark(
            '%llguidance {"no_forcing": true}\nstart: '
            + json.dumps(wanted.decode(), ensure_ascii=False)
        )
        matcher = llguidance.LLMatcher(ll_tokenizer, grammar, log_level=0)
        rest = wanted
        while rest:
            bits = np.unpackbits(
                np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little"
            )
            allowed = set(bits.nonzero()[0].tolist()) - {table.end_id}
            fits = {
                i
                for i, text in enumerate(table.tokens)
                if text and rest.startswith(text) and i not in table.special_token_ids
            }
            assert allowed == fits
            chosen = draw.choice(sorted(allowed))
            assert matcher.consume_token(chosen)
            rest = rest[len(table.tokens[chosen]) :]
        assert matcher.is_accepting()
