"""Which tokens may come next in an answer that follows a grammar.

llguidance is imported when the first grammar is compiled: it is an optional package, and most runs
need no grammar.
"""

import json
from copy import copy
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from tsqp.errors import PromptError, UsageError
from tsqp.model.config import ModelConfig
from tsqp.tee.guided.token_table import TokenTable
from tsqp.tee.structured_outputs import WHITESPACE, StructuredOutputsParams
from tsqp.tee.text.tokenizer import Tokenizer
from tsqp.tee.text.vocabulary import rust_errors

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Native code cannot be interrupted, so its work is limited: about two seconds to compile, and a few
# hundredths of a second for each token. The library's own limits allow ten times as much, and its
# messages would quote the schema and the answer.
_LIMITS = {
    "initial_lexer_fuel": 100_000,
    "max_grammar_size": 20_000,
    "step_lexer_fuel": 100_000,
    "precompute_large_lexemes": False,  # on threads of its own
    "verbose_errors": False,
}

_KEYWORDS = (  # of JSON schemas; those that a message may name
    *("not", "if", "then", "else", "oneOf", "contains", "minContains", "maxContains"),
    *("uniqueItems", "propertyNames", "dependentRequired", "dependentSchemas", "dependencies"),
    *("unevaluatedItems", "unevaluatedProperties", "patternProperties", "format", "$ref"),
    *("minProperties", "maxProperties", "$dynamicRef", "contentEncoding"),
)


class Guide:
    """Follows one answer through its grammar.

    Attributes:
        mask_V: which tokens may come next, a bool for each token of the model; None once the
            grammar is complete, so that nothing can follow.
        may_end: whether the answer so far is complete.
    """

    def __init__(self, matcher: "LLMatcher", vocab_size: int) -> None:
        """Begin an answer.

        Raises:
            PromptError: see `advance`.
        """
        self._matcher = matcher
        self._vocab_size = vocab_size
        self.mask_V: Tensor | None = None
        self.may_end = False
        self._look()

    def advance(self, token_id: int) -> None:
        """Take the token that was chosen.

        Raises:
            PromptError: the grammar has become too complex to follow, or does not allow any token
                here.
        """
        with rust_errors(_LOST, PromptError):
            taken = self._matcher.consume_token(token_id)
        if not taken:
            raise PromptError(_LOST)
        self._look()

    def _look(self) -> None:
        """Find which tokens may come next."""
        matcher = self._matcher
        with rust_errors(_LOST, PromptError):
            self.may_end = matcher.is_accepting()
            if matcher.is_stopped() and not matcher.is_error():
                self.mask_V = None
                return
            bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if matcher.is_error():
            raise PromptError(_LOST)
        allowed_V = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
        if allowed_V.any():
            self.mask_V = torch.from_numpy(allowed_V.view(np.bool_))
        elif self.may_end:
            self.mask_V = None
        else:
            raise PromptError(_LOST)

    def copy(self) -> "Guide":
        """Another one at the same place."""
        other = copy(self)
        other._matcher = self._matcher.deep_copy()
        return other


class Guides:
    """Compiles the grammars of one model's requests. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer | None, config: ModelConfig) -> None:
        """Read nothing yet.

        Args:
            tokenizer: None if there is none; then every request for a grammar is refused.
        """
        self._tokenizer = tokenizer
        self._config = config
        self._lock = Lock()
        self._ll_tokenizer: LLTokenizer | None = None
        # By identity: whether another request has the same schema must not show in the time.
        self._compiled: WeakKeyDictionary[StructuredOutputsParams, Guide] = WeakKeyDictionary()

    def guide(self, params: StructuredOutputsParams) -> Guide:
        """A guide at the beginning of an answer. A second one for the same object is cheap.

        Raises:
            PromptError: the schema or grammar is not valid, cannot be satisfied, or is too complex;
                or the model has no tokenizer.
            UsageError: llguidance is not installed.
        """
        with self._lock:
            found = self._compiled.get(params)
        if found is None:
            found = self._compile(params)  # without the lock: others need not wait for it
        with self._lock:
            return self._compiled.setdefault(params, found).copy()

    def _compile(self, params: StructuredOutputsParams) -> Guide:
        llguidance = _import_llguidance()
        with self._lock:
            if self._ll_tokenizer is None:
                self._ll_tokenizer = self._build(llguidance)
        with rust_errors(_refusal(params, ""), PromptError):
            matcher = llguidance.LLMatcher(
                self._ll_tokenizer,
                _grammar(llguidance, params),
                log_level=0,
                limits=llguidance.LLParserLimits(**_LIMITS),
            )
            message = matcher.get_error() if matcher.is_error() else ""
        if message:
            raise PromptError(_refusal(params, message))
        try:
            guide = Guide(matcher, self._config.vocab_size)
        except PromptError:
            raise PromptError(_refusal(params, matcher.get_error())) from None
        if guide.mask_V is None:
            raise PromptError(f"{_name(params)} allows only an empty answer.")
        return guide

    def _build(self, llguidance: Any) -> "LLTokenizer":
        if self._tokenizer is None or not self._tokenizer.exists:
            raise PromptError("Structured outputs need a tokenizer, and this model has none.")
        table = TokenTable(self._tokenizer, self._config.vocab_size, self._config.eos_token_ids)
        with rust_errors("The model's tokenizer cannot be used for structured outputs."):
            built: LLTokenizer = llguidance.LLTokenizer(table)
        return built


def _import_llguidance() -> Any:
    try:
        import llguidance
    except ImportError as exc:
        raise UsageError(
            "Structured outputs need llguidance: run pip install 'tsqp[serve]'."
        ) from exc
    return llguidance


def _grammar(llguidance: Any, params: StructuredOutputsParams) -> str:
    """The grammar in the form that the library reads."""
    made: str
    if params.json is not None or params.json_object:
        schema = params.json or '{"type": "object"}'
        made = llguidance.LLMatcher.grammar_from_json_schema(
            schema, overrides={"whitespace_pattern": WHITESPACE}
        )
    elif params.regex is not None:
        made = llguidance.LLMatcher.grammar_from_regex(params.regex)
    elif params.choice is not None:
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in params.choice)
        made = llguidance.LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}")
    else:
        made = llguidance.LLMatcher.grammar_from_lark(params.grammar)
    return made


_LOST = (
    "The answer cannot go on under structured_outputs: the grammar is too complex here, or allows"
    " no token."
)


def _name(params: StructuredOutputsParams) -> str:
    """What a message calls the form."""
    if params.label:
        return params.label
    if params.json is not None or params.json_object:
        thing = "JSON schema"
    elif params.regex is not None:
        thing = "regular expression"
    else:
        thing = "grammar" if params.choice is None else "list of choices"
    return f"The {thing} of structured outputs"


def _refusal(params: StructuredOutputsParams, message: str) -> str:
    """Why a grammar is refused, without quoting it or the library's message."""
    start = _name(params)
    if "nsatisfiable" in message:
        return f"{start} cannot be satisfied by any answer."
    found = [each for each in _KEYWORDS if f'"{each}"' in message.partition("keys:")[2]]
    found += ["oneOf"] if "oneOf constraints" in message else []
    if found:
        return f"{start} has keywords that are not supported: {', '.join(found)}."
    if any(word in message for word in ("too big", "too large", "fuel", "max is", "limit")):
        return f"{start} is too complex: make it smaller."
    return f"{start} is not valid, or uses something that is not supported."
