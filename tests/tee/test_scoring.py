"""How likely a text is, against transformers over the whole text at once."""

import pytest
import torch
from tee_helpers import make_engine
from transformers import LlamaForCausalLM

from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.errors import PromptError

Tiny = tuple[Checkpoint, LlamaForCausalLM]
TEXT = [1, *((37 * i + i * i) % 101 for i in range(80))]


def expected(model: LlamaForCausalLM, text: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        logits_TV = model(torch.tensor([text])).logits[0, :-1].double()
    logprobs_TV = logits_TV.log_softmax(1)
    return logprobs_TV[range(len(text) - 1), text[1:]], logits_TV.argmax(1)


@pytest.mark.parametrize("chunk", [512, 80, 79, 16, 1])
def test_scores_are_those_of_transformers_whatever_the_chunk(tiny: Tiny, chunk: int) -> None:
    engine, offload = make_engine(tiny[0], prefill_chunk=chunk)
    logprobs_T, best_T = expected(tiny[1], TEXT)
    scores = engine.score(TEXT)
    torch.testing.assert_close(scores.logprobs_T, logprobs_T, rtol=0, atol=1e-4)
    assert scores.best_T.tolist() == best_T.tolist()
    assert offload.kv.reserved_bytes == 0


def test_a_text_may_fill_the_whole_context(tiny: Tiny) -> None:
    engine, _ = make_engine(tiny[0])
    text = (TEXT * 8)[:640]
    assert len(engine.score(text).logprobs_T) == 639
    with pytest.raises(PromptError, match="has 641 tokens"):
        engine.score([*text, 5])


@pytest.mark.parametrize("text", [[], [5]])
def test_less_than_two_tokens_are_nothing_to_score(tiny: Tiny, text: list[int]) -> None:
    engine, offload = make_engine(tiny[0])
    with pytest.raises(PromptError, match="at least two tokens"):
        engine.score(text)
    assert offload.kv.reserved_bytes == 0
