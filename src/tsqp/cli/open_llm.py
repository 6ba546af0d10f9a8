"""The model and the sampling parameters of `generate` and `chat`, from their options."""

from contextlib import suppress
from dataclasses import fields
from typing import TYPE_CHECKING

import typer

from tsqp.errors import UsageError

if TYPE_CHECKING:  # torch takes a second to import; `tsqp --help` should not
    from tsqp import LLM, Options, SamplingParams
    from tsqp.tee.text.tokenizer import Tokenizer


def open_llm(model: str, options: "Options", tokenizer: "Tokenizer | None" = None) -> "LLM":
    """Load the model, connect to its workers, and show the progress."""
    from tsqp import LLM
    from tsqp.cli.printing import loading_progress

    with loading_progress() as loading:
        llm = LLM(model, options, tokenizer=tokenizer, on_load=loading)
    loading.say_rate(llm.config.num_layers)
    return llm


def read_sampling(context: typer.Context) -> "SamplingParams":
    """The sampling parameters; those without an option in this command keep their defaults."""
    from tsqp import SamplingParams

    given = {each.name: context.params.get(each.name) for each in fields(SamplingParams)}
    bias = given.pop("logit_bias")
    if bias:
        given["logit_bias"] = dict(_bias(each) for each in bias)
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def _bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    with suppress(ValueError):  # its message would quote the user's input
        return int(token_id), float(bias)
    raise UsageError("--logit-bias takes TOKEN_ID=BIAS, a token id and a number from -100 to 100.")
