"""The common form of a vocabulary from any source, and translation of the Rust library's errors."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import tokenizers
from tokenizers import processors

from tsqp.errors import TokenizerError, TSQPError

MAX_TOKENS = 2**22  # more than ten times the largest vocabulary

# The names that templates and configs give to tokens with a task of their own.
NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A model's tokenizer as its files describe it.

    Attributes:
        backend: encodes; adds the beginning and end tokens that the model asks for.
        special_tokens: texts of the tokens with a name, such as "bos_token".
        chat_template: Jinja source, or several by name; None if there is none.
        prepare: applied to each text as a whole, before `backend` encodes it.
    """

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]
    chat_template: str | dict[str, str] | None
    prepare: Callable[[str], str] = str


@contextmanager
def rust_errors(message: str, kind: type[TSQPError] = TokenizerError) -> Iterator[None]:
    """Turn everything that a library in Rust raises, such as `tokenizers`, into one error.

    A Rust panic arrives as an exception that is not an `Exception`. The cause is not kept: it may
    quote the text that was being encoded.
    """
    try:
        yield
    except TSQPError:
        raise
    except Exception:
        raise kind(message) from None
    except BaseException as exc:
        if type(exc).__name__ != "PanicException":
            raise  # an interrupt
        raise kind(message) from None


def add_ends(backend: tokenizers.Tokenizer, bos_id: int | None, eos_id: int | None) -> None:
    """Let `backend` add a beginning and an end token to each text; None adds none."""
    ends = {"BOS": bos_id, "EOS": eos_id}
    used = {name: token_id for name, token_id in ends.items() if token_id is not None}
    if used:
        order = [name for name in ("BOS", "$A", "EOS") if name == "$A" or name in used]
        backend.post_processor = processors.TemplateProcessing(
            single=order,
            special_tokens=[
                {"id": name, "ids": [token_id], "tokens": [name]} for name, token_id in used.items()
            ],
        )
