"""A refusal says what the worker holds, and can be read again."""

import pytest
from msgspec import structs

from tsqp.errors import HandshakeError
from tsqp.model.shard import WHOLE, Shard
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
    assert read_refusal(refusal("float32", held)) == (held, None, WHOLE)


def test_the_digest_can_be_read() -> None:
    assert read_refusal(refusal("int8", "int8")) == (None, THEIRS[:12], WHOLE)


def test_other_refusals_say_neither() -> None:
    assert read_refusal(refusal("int8", "int8", ("fly",))) == (None, None, WHOLE)
    secretive = "the worker computes in secret and holds other weights"
    assert read_refusal(secretive) == (None, None, WHOLE)


def test_a_shard_has_the_digest_of_its_place() -> None:
    hello = Hello(NONCE, OURS, "int8", (), 0, shard_digests=(OURS, THEIRS))
    ours = Welcome(NONCE, OURS, "int8", (), "cpu", 1, None, shard=1, shards=2)
    check_agreement(hello, ours)
    check_agreement(hello, structs.replace(ours, shard=2, weights_digest=THEIRS))
    texts = []
    for change in ({"shard": 2}, {"shard": 3}, {"shards": 3}, {"shards": 1}):
        with pytest.raises(HandshakeError) as caught:
            check_agreement(hello, structs.replace(ours, **change))
        texts.append(str(caught.value).split(";")[0])
    digest = f"(digest {OURS[:12]}…"
    assert texts == [
        f"the worker holds other weights {digest}, here {THEIRS[:12]}…)",
        "the worker names shard 3 of 2",
        f"the worker holds shard 1 of 3 {digest}), and this side needs one of 2 shards",
        f"the worker holds the whole model {digest}), and this side needs one of 2 shards",
    ]
    assert read_refusal(texts[2]) == (None, OURS[:12], Shard(1, 3))
    assert read_refusal(texts[2].replace("1 of 3", "4 of 3")).shard == WHOLE


def test_a_side_that_wants_the_whole_model_refuses_a_shard() -> None:
    shard = Welcome(NONCE, OURS, "int8", (), "cpu", 1, None, shard=2, shards=4)
    with pytest.raises(HandshakeError, match=r"holds shard 2 of 4 .* needs the whole model"):
        check_agreement(Hello(NONCE, OURS, "int8", (), 0), shard)
