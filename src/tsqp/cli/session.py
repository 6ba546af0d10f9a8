"""What `generate` and `chat` make of the options that they share."""

import math
from contextlib import suppress
from dataclasses import fields
from typing import TYPE_CHECKING

import typer

from tsqp.cli.flags import is_from_command_line
from tsqp.errors import UsageError

if TYPE_CHECKING:  # torch takes a second to import; `tsqp --help` should not
    from tsqp import LLM, SamplingParams
    from tsqp.tee.text.tokenizer import Tokenizer

_PASSED_ON = (
    "model",
    "privacy",
    "worker",
    "worker_key",
    "attention",
    "fuse",
    "field",
    "fixed_point",
    "dtype",
    "threads",
    "device",
    "prefill_chunk",
    "timeout",
    "insecure",
    "insecure_same_host",
    "expect_model",
    "rpc_log",
)


def open_llm(context: typer.Context, tokenizer: "Tokenizer | None" = None) -> "LLM":
    """The model and its workers, as the command's options describe them; shows its loading."""
    from tsqp import LLM
    from tsqp.cli.printing import loading_progress

    given = context.params
    arguments = {name: given[name] for name in _PASSED_ON}
    for name in ("worker", "worker_key"):
        # tee passes over settings for the other modes.
        if given["privacy"] == "tee" and not is_from_command_line(context, name):
            arguments[name] = None
    if not is_from_command_line(context, "device") and "local" not in (given["worker"] or ()):
        arguments["device"] = "auto"  # a setting for workers, and none is started here
    pad_memory = given["pad_memory"]
    with loading_progress() as loading:
        llm = LLM(
            **arguments,
            pad_memory=None if pad_memory is None else _bytes(pad_memory),
            shm=not given["no_shm"],
            tokenizer=tokenizer,
            on_load=loading,
        )
    loading.say_rate(llm.config.num_layers)
    return llm


def read_sampling(context: typer.Context) -> "SamplingParams":
    """How to choose tokens; what the command has no option for stays as it is."""
    from tsqp import SamplingParams

    given = {each.name: context.params.get(each.name) for each in fields(SamplingParams)}
    bias = given.pop("logit_bias")
    if bias:
        given["logit_bias"] = dict(_bias(each) for each in bias)
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def _bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    with suppress(ValueError):  # whose message has the user's words
        return int(token_id), float(bias)
    raise UsageError("--logit-bias takes TOKEN_ID=BIAS, a token id and a number from -100 to 100.")


def _bytes(gibibytes: float) -> int:
    size = gibibytes * 2**30
    if not math.isfinite(size):
        raise UsageError(f"--pad-memory is {gibibytes}; it must be a number of GiB, 0 or more.")
    return int(size)
