"""Messages and bytes: what is encoded comes back, and nothing else is accepted."""

import struct

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from wire_helpers import Echo, hello

from tsqp.errors import HandshakeError, ProtocolError
from tsqp.wire import messages
from tsqp.wire.codec import (
    HEADER,
    MAX_MESSAGE,
    Decoder,
    encode,
    printable,
    tee_decoder,
    worker_decoder,
)
from tsqp.wire.mailbox import MAX_FRAME
from tsqp.wire.messages import (
    PROTOCOL_VERSION,
    Allocate,
    Attach,
    AttentionScores,
    Bye,
    Call,
    Embed,
    Failure,
    Free,
    Hello,
    Layer,
    Linear,
    Message,
    Offer,
    Probe,
    Product,
    Result,
    SealedRef,
    SeedProduct,
    SegmentRef,
    Span,
    TensorRef,
    Truncate,
    Weighted,
    WeightedValues,
    Welcome,
)
from tsqp.wire.session import Session

NAME_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789_:-"
dtypes = st.sampled_from(["float32", "float16", "bfloat16", "int64", "uint8"])
weights_dtypes = st.sampled_from(["float32", "float16", "bfloat16", "int8"])
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
nonces = st.binary(min_size=32, max_size=32)
names = st.text(NAME_CHARACTERS, min_size=1, max_size=64)
abilities = st.lists(names, max_size=16).map(tuple)
any_text = st.characters(exclude_categories=["Cs"])
sentences = st.text(any_text, max_size=200) | st.just("\U0001f512" * messages.MAX_SENTENCE)
tracebacks = st.text(any_text, max_size=200) | st.just("\U0001f512" * messages.MAX_TRACEBACK)
evidence = st.binary(max_size=100) | st.just(b"\xff" * 65_536)
tickets = st.integers(0, 2**64 - 1)
references = st.builds(
    TensorRef,
    dtypes,
    st.lists(st.integers(1, messages.MAX_DIMENSION), min_size=1, max_size=4).map(tuple),
    st.integers(-1, 2**48),
)
tensors = st.lists(references, max_size=messages.MAX_TENSORS).map(tuple)
segments = st.builds(
    SegmentRef,
    st.text("0123456789abcdef", min_size=32, max_size=32).map("tsqp-".__add__),
    st.integers(1, 2**40),
)
sealed = st.builds(
    SealedRef, st.integers(1, 2**31 - 1), st.integers(0, 2**31 - 1), st.integers(1, 2**40)
)
layers, fields = (
    st.integers(-1, messages.MAX_LAYERS - 1),
    st.sampled_from(["wide", "compact", "lattice"]),
)
rows = st.integers(1, messages.MAX_DIMENSION)
sequences, tokens = st.integers(0, 2**53 - 1), st.integers(0, messages.MAX_DIMENSION)
span = st.builds(Span, sequences, tokens, rows, tokens)
spans = st.lists(span, min_size=1, max_size=8).map(tuple) | span.map(
    lambda one: (one,) * messages.MAX_SPANS
)
one_weighted = st.builds(Weighted, sequences, rows, rows)
weighted = st.lists(one_weighted, min_size=1, max_size=8).map(tuple)
operations = st.one_of(
    st.builds(Linear, layers, names),
    st.just(Embed()),
    st.builds(Product, layers, names, fields),
    st.builds(SeedProduct, layers, names, fields, rows, nonces),
    st.builds(Allocate, sequences, rows),
    st.builds(Truncate, sequences, tokens),
    st.builds(Free, sequences),
    st.builds(AttentionScores, st.integers(0, messages.MAX_LAYERS - 1), spans),
    st.builds(Layer, st.integers(0, messages.MAX_LAYERS - 1), spans),
    st.builds(WeightedValues, st.integers(0, messages.MAX_LAYERS - 1), weighted),
)
from_tee = st.one_of(
    st.builds(Hello, nonces, digests, weights_dtypes, abilities, st.integers(0, 2**40), evidence),
    st.builds(Attach, st.booleans(), st.booleans(), st.booleans()),
    st.builds(Call, operations, tensors, tensors),
    st.just(Probe()),
    st.just(Bye()),
)
from_worker = st.one_of(
    st.builds(
        Welcome,
        nonces,
        digests,
        weights_dtypes,
        abilities,
        names,
        st.integers(1, 2**62),
        st.none() | segments | sealed,
        sentences,
        evidence,
    ),
    st.builds(Offer, st.none() | segments, sentences),
    st.builds(Result, st.integers(0, 2**62)),
    st.builds(
        Failure, st.sampled_from(["refused", "protocol", "memory", "error"]), sentences, tracebacks
    ),
    st.just(Probe()),
)
WORKER = worker_decoder()
TEE = tee_decoder("ipc:///run/tsqp.sock")


def frame(body: bytes, **changes: int | bytes) -> bytes:
    """`body` behind a header whose fields can be wrong."""
    fields = {
        "magic": b"TSQP",
        "version": PROTOCOL_VERSION,
        "zero": 0,
        "ticket": 1,
        "length": len(body),
    } | changes
    return struct.pack("<4sHHQI", *fields.values()) + body


def reads_alike_or_not_at_all(data: bytes) -> None:
    """Either side refuses `data`, or reads a message that is the same when written and read."""
    for decoder in (WORKER, TEE):
        try:
            ticket, message = decoder.decode(data)
        except (ProtocolError, HandshakeError) as exc:
            assert str(exc).isprintable()
        else:
            assert decoder.decode(encode(message, ticket)) == (ticket, message)


@given(from_tee, tickets)
def test_every_message_of_the_tee_comes_back_as_it_was(message: Message, ticket: int) -> None:
    assert WORKER.decode(encode(message, ticket)) == (ticket, message)


@given(from_worker, tickets)
def test_every_message_of_the_worker_comes_back_as_it_was(message: Message, ticket: int) -> None:
    assert TEE.decode(memoryview(encode(message, ticket))) == (ticket, message)


def test_the_strategies_cover_every_message() -> None:
    covered = {Hello, Attach, Call, Bye, Welcome, Offer, Result, Failure, Probe}
    assert set((messages.FromTEE | messages.FromWorker).__args__) == covered
    stateless = {Linear, Embed, Product, SeedProduct}
    kept = {Allocate, Truncate, Free, AttentionScores, WeightedValues, Layer}
    assert set(messages.Operation.__args__) == stateless | kept


def test_the_largest_messages_fit() -> None:
    reference = TensorRef("bfloat16", (messages.MAX_DIMENSION,) * 4, 2**48)
    operation = SeedProduct(4095, "z" * 64, "compact", messages.MAX_DIMENSION, bytes(32))
    call = Call(operation, (reference,) * 8, (reference,) * 8)
    failure = Failure("protocol", "\U0001f512" * 2000, "\U0001f512" * 16_000)
    span = Span(2**53 - 1, *[messages.MAX_DIMENSION] * 3)
    scores = AttentionScores(4095, (span,) * messages.MAX_SPANS)
    for message in (call, Call(scores, (reference,) * 8, (reference,) * 8), failure):
        assert len(encode(message, 2**64 - 1)) <= MAX_MESSAGE


def test_a_call_with_a_seed_fits_into_a_mailbox() -> None:
    answer = TensorRef("uint8", (128, 2**20), 2**40)
    call = Call(SeedProduct(4095, "gate_up", "compact", 128, bytes(32)), (), (answer,))
    assert len(encode(call, 2**64 - 1)) <= MAX_FRAME


def test_a_frame_is_laid_out_as_the_module_says() -> None:
    body = b"\x94\xa6attach\xc3\xc2\xc2"  # ["attach", true, false, false] in msgpack
    head = b"TSQP" + b"\x03\x00" + b"\x00\x00" + b"\x05" + b"\x00" * 7 + b"\x0b\x00\x00\x00"
    assert encode(Attach(True, False), 5) == head + body


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    reads_alike_or_not_at_all(data)


@settings(max_examples=300)
@given(st.binary(max_size=200))
@example(b"\x91" * 100_000 + b"\x00")
@example(msgspec.msgpack.encode(["failure", "error", "x"])[:-1] + b"\xff")
def test_garbage_behind_a_good_header_is_refused(body: bytes) -> None:
    reads_alike_or_not_at_all(frame(body))


scalars = st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=3)
json_like = scalars | st.lists(scalars | st.lists(scalars, max_size=3), max_size=3)
tags = st.sampled_from(["hello", "attach", "call", "bye", "welcome", "result", "failure", "probe"])


@settings(max_examples=100)
@given(tags, st.lists(json_like, max_size=4))
def test_fields_of_the_wrong_type_are_refused(tag: str, fields: list[object]) -> None:
    reads_alike_or_not_at_all(frame(msgspec.msgpack.encode([tag, *fields])))


@settings(max_examples=200)
@given(from_tee | from_worker, st.data())
def test_a_flipped_bit_is_refused_or_makes_another_valid_message(
    message: Message, data: st.DataObject
) -> None:
    flipped = bytearray(encode(message, 1))
    bit = data.draw(st.integers(0, len(flipped) * 8 - 1))
    flipped[bit // 8] ^= 1 << bit % 8
    reads_alike_or_not_at_all(bytes(flipped))


@settings(max_examples=200)
@given(from_tee | from_worker, st.data())
def test_a_truncated_message_is_refused(message: Message, data: st.DataObject) -> None:
    whole = encode(message)
    cut = data.draw(st.integers(0, len(whole) - 1))
    body = whole[HEADER.size : cut]
    for decoder in (WORKER, TEE):
        for part in (whole[:cut], frame(body)):
            with pytest.raises(ProtocolError):
                decoder.decode(part)


@given(from_tee, st.binary(min_size=1, max_size=50))
def test_bytes_behind_the_message_are_refused(message: Message, rest: bytes) -> None:
    body = encode(message)[HEADER.size :]
    for data in (encode(message) + rest, frame(body + rest)):
        with pytest.raises(ProtocolError):
            WORKER.decode(data)


@given(from_tee, st.integers(0, 2**16 - 1).filter(lambda version: version != PROTOCOL_VERSION))
def test_another_version_is_named_with_what_to_do(message: Message, version: int) -> None:
    body = encode(message)[HEADER.size :]
    with pytest.raises(HandshakeError, match=f"version {version} .* same tsqp version"):
        WORKER.decode(frame(body, version=version))


@settings(max_examples=100)
@given(st.integers(MAX_MESSAGE + 1, 2**22), st.sampled_from([WORKER, TEE]))
def test_an_oversized_message_is_refused_whatever_its_header_says(
    length: int, decoder: Decoder[Message]
) -> None:
    data = bytearray(length)
    data[: HEADER.size] = HEADER.pack(b"TSQP", 2, 0, 1, length - HEADER.size)
    with pytest.raises(ProtocolError, match=f"a message of {length} bytes"):
        decoder.decode(memoryview(data))


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 9) | tickets, st.booleans()), max_size=30))
def test_only_a_ticket_above_all_before_it_on_its_way_is_taken(
    calls: list[tuple[int, bool]],
) -> None:
    session = Session(1, Echo(), "uid 0", hello())
    highest = {True: 0, False: 0}
    for ticket, posted in calls:
        if ticket > highest[posted]:
            session.note(ticket, posted)
            highest[posted] = ticket
        else:
            with pytest.raises(ProtocolError, match="same call twice"):
                session.note(ticket, posted)


def test_an_oversized_message_is_refused_with_both_figures() -> None:
    with pytest.raises(ProtocolError, match=f"{MAX_MESSAGE + 1} bytes.*{MAX_MESSAGE}"):
        WORKER.decode(bytes(MAX_MESSAGE + 1))


@pytest.mark.parametrize("changes", [{"magic": b"HTTP"}, {"zero": 1}, {"length": 4}, {"length": 6}])
def test_a_wrong_header_is_refused(changes: dict[str, int | bytes]) -> None:
    body = encode(Bye())[HEADER.size :]
    assert WORKER.decode(frame(body)) == (1, Bye())
    with pytest.raises(ProtocolError):
        WORKER.decode(frame(body, **changes))


@given(from_worker.filter(lambda message: not isinstance(message, Probe)))
def test_a_worker_accepts_no_message_of_a_worker(message: Message) -> None:
    with pytest.raises(ProtocolError):
        WORKER.decode(encode(message))


@given(from_tee.filter(lambda message: not isinstance(message, Probe)))
def test_a_tee_accepts_no_message_of_a_tee(message: Message) -> None:
    with pytest.raises(ProtocolError, match=r"ipc:///run/tsqp\.sock"):
        TEE.decode(encode(message))


@pytest.mark.parametrize(
    "body",
    [
        ["unknown"],
        ["bye", 1],
        ["attach", True, True, True, True],
        ["attach", True, True, 1],
        ["attach", 1, True],
        ["attach", True, 1],
        ["attach", True],
        ["attach"],
        {"type": "bye"},
        ["call", ["linear", -2, "qkv"], [], []],
        ["call", ["linear", 4096, "qkv"], [], []],
        ["call", ["linear", 0, "qkv\n"], [], []],
        ["call", ["linear", 0, ""], [], []],
        ["call", ["linear", 0, "q" * 65], [], []],
        ["call", ["unknown"], [], []],
        ["call", ["product", 0, "qkv", "wider"], [], []],
        ["call", ["seed_product", 0, "qkv", "wide", 0, b"s" * 32], [], []],
        ["call", ["seed_product", 0, "qkv", "wide", 2**31, b"s" * 32], [], []],
        ["call", ["seed_product", 0, "qkv", "wide", 1, b"s" * 31], [], []],
        ["call", ["seed_product", 0, "qkv", "wide", 1, b"s" * 33], [], []],
        ["call", ["seed_product", 0, "qkv", "wide", 1, "s" * 32], [], []],
        ["call", ["seed_product", 0, "qkv", "wide", 1], [], []],
        ["call", ["embed"], [["float32", [0], 0]], []],
        ["call", ["embed"], [["float32", [2**31], 0]], []],
        ["call", ["embed"], [["float32", [], 0]], []],
        ["call", ["embed"], [["float32", [1] * 5, 0]], []],
        ["call", ["embed"], [["float64", [1], 0]], []],
        ["call", ["embed"], [["float32", [1], -2]], []],
        ["call", ["embed"], [["float32", [1], 2**48 + 1]], []],
        ["call", ["embed"], [["float32", [1], 0]] * 9, []],
        ["call", ["embed"], [["float32", [1], 0, 0]], []],
        ["hello", b"n" * 31, "a" * 64, "float32", [], 0],
        ["hello", b"n" * 32, "a" * 63, "float32", [], 0],
        ["hello", b"n" * 32, "A" * 64, "float32", [], 0],
        ["hello", b"n" * 32, "a" * 64 + "\n", "float32", [], 0],
        ["hello", b"n" * 32, "a" * 64, "float32", ["linear"] * 17, 0],
        ["hello", b"n" * 32, "a" * 64, "float32", [], -1],
        ["hello", b"n" * 32, "a" * 64, "float32", [], 2**40 + 1],
        ["hello", b"n" * 32, "a" * 64, "float32", [], 0, b"e" * 65_537],
    ],
    ids=lambda body: str(body)[:50],
)
def test_a_worker_refuses(body: object) -> None:
    with pytest.raises(ProtocolError):
        WORKER.decode(frame(msgspec.msgpack.encode(body)))


@pytest.mark.parametrize(
    "name", ["../tsqp-" + "0" * 32, "tsqp-" + "0" * 32 + "\n", "tsqp-" + "g" * 32, "/etc/passwd"]
)
def test_a_tee_refuses_a_segment_called(name: str) -> None:
    def body(name: str) -> bytes:
        fields = ["welcome", b"n" * 32, "a" * 64, "float32", [], "cpu", 1, ["named", name, 1]]
        return frame(msgspec.msgpack.encode(fields))

    assert TEE.decode(body("tsqp-" + "0" * 32))
    with pytest.raises(ProtocolError):
        TEE.decode(body(name))


@pytest.mark.parametrize(
    "place",
    [("1/root", 3), (1, "../3"), (0, 3), (-1, 3), (1, -1), (2**31, 3), (1, 2**31), (1.5, 3)],
)
def test_a_tee_refuses_sealed_memory_at(place: tuple[object, object]) -> None:
    def body(*place: object) -> bytes:
        fields = ["welcome", b"n" * 32, "a" * 64, "float32", [], "cpu", 1, ["sealed", *place, 1]]
        return frame(msgspec.msgpack.encode(fields))

    assert TEE.decode(body(1, 3))
    with pytest.raises(ProtocolError):
        TEE.decode(body(*place))


@given(st.text())
def test_printable_text_can_be_encoded_and_moves_no_cursor(text: str) -> None:
    shown = printable(text + "\x1b[2J\udc80\u202e\n")
    assert len(shown) == len(text) + 7
    assert shown.encode().decode() == shown
    assert not set(shown) & {"\x1b", "\r", "\n", "\x07", "\u202e"}


@given(st.text(st.characters(categories=["L", "N", "P"])))
def test_printable_text_stays_as_it_is(text: str) -> None:
    assert printable(text + " …") == text + " …"
    assert printable("a\tb\nc", keep="\n") == "a b\nc"
