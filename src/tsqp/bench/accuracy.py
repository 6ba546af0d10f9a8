"""`tsqp bench accuracy`: the accuracy lost by fixed point, and a check that pads lose no more."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.table import Table

from tsqp import LLM
from tsqp.algebra.params import FIELDS, LATTICE
from tsqp.bench.host import describe_machine
from tsqp.bench.modes import TIMEOUT_S
from tsqp.bench.output import new_table
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.errors import PromptError, TokenizerError, printable_path
from tsqp.tee.engine.scoring import Scores
from tsqp.tee.text.tokenizer import Tokenizer

MIN_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The accuracy of one mode.

    Attributes:
        perplexity: perplexity of the text.
        relative: perplexity divided by that of float32.
        relative_error: standard error of `relative`, estimated from the differences at each token.
        agreement: share of positions where the likeliest token is the same as in float32.
        equal: for `pad`, whether all log-probabilities and likeliest tokens are bit-identical to
            those of fixed point; None for other modes.
        seconds: time to score the whole text.
    """

    privacy: str
    fixed_point: bool
    field: str | None
    perplexity: float
    relative: float
    relative_error: float
    agreement: float
    equal: bool | None
    seconds: float

    @property
    def name(self) -> str:
        names = [self.privacy, "fixed point" if self.fixed_point else "", self.field or "float32"]
        return " ".join(filter(None, names))


@dataclass(frozen=True, slots=True)
class AccuracyResult:
    """The accuracy of every mode, measured on the same windows of the same text.

    Attributes:
        text: name of the text file.
        tokens: tokens of the text; the first token of each window is not scored.
        window: maximum tokens of a window: the model's context length, or the text if shorter.
    """

    model: str
    text: str
    tokens: int
    window: int
    scored: int
    threads: int
    modes: list[Accuracy]
    machine: dict[str, str]

    def as_json(self) -> dict[str, object]:
        """Ready for JSON."""
        return asdict(self)


def measure_accuracy(
    model: str, text: Path, *, max_tokens: int | None, chunk: int, threads: int
) -> AccuracyResult:
    """Score a text in float32, and in fixed point and `pad` for each field.

    Args:
        max_tokens: number of tokens to use from the beginning of the text; None for all.
        chunk: number of tokens whose logits are held in memory at once.

    Raises:
        PromptError: the text cannot be read or is too short.
        TokenizerError: the model has no tokenizer.
    """
    token_ids = _read(model, text)[:max_tokens]
    if len(token_ids) < MIN_TOKENS:
        raise PromptError(f"{text} has fewer than two tokens; give a longer text.")
    common: dict[str, Any] = {"dtype": "float32", "threads": threads, "prefill_chunk": chunk}
    with LLM(model, privacy="tee", **common) as llm:
        window = min(llm.config.max_positions, len(token_ids))
        windows = _cut(token_ids, window)
        began = perf_counter()
        exact = _score(llm, windows)
        seconds = perf_counter() - began
    modes = [_accuracy(exact, exact, "tee", None, None, seconds)]
    for field in FIELDS:
        modes += _masked(model, windows, exact, field, common)
    return AccuracyResult(
        model=Path(model).name,
        text=text.name,
        tokens=len(token_ids),
        window=window,
        scored=len(exact.best_T),
        threads=threads,
        modes=modes,
        machine=describe_machine(),
    )


def tables(result: AccuracyResult) -> Iterator[Table]:
    """One row for each mode."""
    table = new_table(
        f"{result.model}, {result.tokens:,} tokens of {result.text}",
        "", "perplexity", "÷ float32 (standard error)", "same likeliest token",
        "equal to fixed point", "s",
    )  # fmt: skip
    for mode in result.modes:
        equal = "" if mode.equal is None else "yes" if mode.equal else "NO"
        table.add_row(
            mode.name,
            f"{mode.perplexity:.4f}",
            f"{mode.relative:.4f} ({mode.relative_error:.4f})",
            f"{mode.agreement:.2%}",
            equal,
            f"{mode.seconds:.1f}",
        )
    yield table


def notes(result: AccuracyResult) -> Iterator[str]:
    """How many tokens were scored, and with how much context."""
    yield (
        f"{result.scored:,} tokens are scored, each given those before it in its window of "
        f"{result.window:,}."
    )


def _read(model: str, text: Path) -> list[int]:
    try:
        words = text.read_text(encoding="utf-8")
    except OSError as exc:
        raise PromptError(
            f"Cannot read {printable_path(text)}: {exc.strerror}; name a text file."
        ) from exc
    except UnicodeDecodeError as exc:
        raise PromptError(f"{text} is not valid UTF-8; convert it first.") from exc
    open_checkpoint(model).close()  # report a missing model, not its missing tokenizer
    tokenizer = Tokenizer(model)
    if not tokenizer.exists:
        raise TokenizerError(f"{model} has no tokenizer to read {text} with; choose another model.")
    return tokenizer.encode(words)


def _cut(token_ids: list[int], window: int) -> list[list[int]]:
    """Split into windows. A last window of one token is dropped: it has nothing to score."""
    windows = [token_ids[first : first + window] for first in range(0, len(token_ids), window)]
    return [each for each in windows if len(each) >= MIN_TOKENS]


def _score(llm: LLM, windows: Sequence[Sequence[int]]) -> Scores:
    scores = [llm.score(window) for window in windows]
    return Scores(
        torch.cat([each.logprobs_T for each in scores]), torch.cat([each.best_T for each in scores])
    )


def _masked(
    model: str, windows: list[list[int]], exact: Scores, field: str, common: dict[str, Any]
) -> list[Accuracy]:
    """Measure fixed point and `pad` in one field."""
    memory = None if field == LATTICE.name else 0  # lattice masks are made in batches
    ways: list[dict[str, Any]] = [
        {"privacy": "tee", "fixed_point": True},
        {"privacy": "pad", "worker": "local", "pad_memory": memory, "timeout": TIMEOUT_S},
    ]
    found: list[Accuracy] = []
    reference = None
    for options in ways:
        with LLM(model, field=field, **options, **common) as llm:
            began = perf_counter()
            scores = _score(llm, windows)
            seconds = perf_counter() - began
        found.append(_accuracy(scores, exact, options["privacy"], field, reference, seconds))
        reference = scores
    return found


def _accuracy(
    scores: Scores,
    exact: Scores,
    privacy: str,
    field: str | None,
    reference: Scores | None,
    seconds: float,
) -> Accuracy:
    lost_T = exact.logprobs_T - scores.logprobs_T
    relative = math.exp(lost_T.mean().item())
    equal = None
    if reference is not None:
        equal = torch.equal(scores.logprobs_T, reference.logprobs_T)
        equal = equal and torch.equal(scores.best_T, reference.best_T)
    return Accuracy(
        privacy=privacy,
        fixed_point=privacy == "tee" and field is not None,
        field=field,
        perplexity=math.exp(-scores.logprobs_T.mean().item()),
        relative=relative,
        relative_error=relative * lost_T.std(correction=0).item() / math.sqrt(len(lost_T)),
        agreement=(scores.best_T == exact.best_T).double().mean().item(),
        equal=equal,
        seconds=seconds,
    )
