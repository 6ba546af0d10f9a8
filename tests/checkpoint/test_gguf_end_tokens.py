"""An answer of a GGUF model ends where it ends in llama.cpp."""

from typing import Any

import pytest

from model_helpers import WriteGGUF
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.errors import UnsupportedModel


def ends(model: Any, write_gguf: WriteGGUF, texts: str = "", **keys: Any) -> list[str]:
    """The texts of the end tokens of a file with <s>, </s> and `texts`; its keys name </s>."""
    tokens = ["a", "<s>", "</s>", *texts.split()]
    keys = {"model": "gpt2", "eot_token_id": 2, **keys}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    path = write_gguf(model, tokens=tokens, metadata=metadata)
    checkpoint = open_checkpoint(str(path))
    found = [tokens[token_id] for token_id in checkpoint.config.eos_token_ids]
    checkpoint.close()
    return found


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ("<|end_of_text|> <|eot_id|> <|eom_id|> c", "</s> <|end_of_text|> <|eot_id|> <|eom_id|>"),
        ("<end_of_turn> <eos> <start_of_turn>", "</s> <end_of_turn> <eos>"),
        ("<|im_start|> <|im_end|> <|endoftext|>", "</s> <|im_end|> <|endoftext|>"),
        ("<|fim_pad|> <|repo_name|> <|file_sep|>", "</s> <|fim_pad|> <|repo_name|> <|file_sep|>"),
        ("<|end|> <|user|>", "</s> <|end|>"),
        ("<|end|> <|call|>", "</s> <|end|> <|call|>"),
        ("<|end|> <|return|> <|call|>", "</s> <|return|> <|call|>"),
        ("<|end|> <|flush|> <|calls|>", "</s> <|flush|> <|calls|>"),
        ("<turn|> <|tool_response>", "<turn|> <|tool_response>"),
        ("[e~[ <|eot_id <|eot_id|>x", "</s> [e~["),
    ],
)
def test_tokens_with_certain_texts_end_an_answer(
    texts: str, expected: str, model: Any, write_gguf: WriteGGUF
) -> None:
    assert ends(model, write_gguf, texts) == expected.split()


@pytest.mark.parametrize("key", ["eot_token_id", "eom_token_id", "fim_pad_token_id"])
def test_tokens_that_a_key_names_end_an_answer(key: str, model: Any, write_gguf: WriteGGUF) -> None:
    found = ends(model, write_gguf, "x <PAD>", **{key: 3})
    assert found == ["</s>", "x"] + ["<PAD>"] * (key != "fim_pad_token_id")


def test_forbidden_tokens_are_refused_by_name(model: Any, write_gguf: WriteGGUF) -> None:
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.ggml\.suppress_tokens"):
        ends(model, write_gguf, suppress_tokens=[0, 1])
