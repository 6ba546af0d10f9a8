"""A refusal says what the worker holds, and can be read again."""

import pytest

from tsqp.errors import HandshakeError
from tsqp.wire.handshake import check_agreement, read_refusal
from tsqp.wire.messages import Hello, WeightsDtype, Welcome

NONCE, OURS, THEIRS = bytes(32), 64 * "0", 32 * "4f"


def refusal(asked: WeightsDtype, held: WeightsDtype, abilities: tuple[str, ...] = ()) -> str:
    hello = Hello(NONCE, OURS, asked, abilities, 0)
    digest = OURS if abilities else THEIRS
    with pytest.raises(HandshakeError) as caught:
        check_agreement(hello, Welcome(NONCE, digest, held, (), "cpu", 1, None))
    return str(caught.value)


@pytest.mark.parametrize("held", ["float16", "bfloat16"])
def test_the_dtype_can_be_read(held: WeightsDtype) -> None:
    assert read_refusal(refusal("float32", held)) == (held, None)


def test_the_digest_can_be_read() -> None:
    assert read_refusal(refusal("int8", "int8")) == (None, THEIRS[:12])


def test_other_refusals_say_neither() -> None:
    assert read_refusal(refusal("int8", "int8", ("fly",))) == (None, None)
    assert read_refusal("the worker computes in secret and holds other weights") == (None, None)
