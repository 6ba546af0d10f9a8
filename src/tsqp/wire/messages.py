"""All messages between the TEE and a worker, each as a frozen struct.

All fields are typed and bounded; msgspec refuses anything else while decoding. Messages do not
contain tensors: a `TensorRef` says where a tensor is, in the shared segment or in the frames that
follow. The TEE chooses the places and shapes of all tensors, also those of answers, so it does not
have to trust anything in an answer.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from tsqp.algebra.params import FieldName
from tsqp.model.linear_group import LinearGroup
from tsqp.model.shard import MAX_SHARDS

PROTOCOL_VERSION = 3

MAX_LAYERS = 4096
MAX_DIMENSION = 2**31 - 1
MAX_TENSORS = 8
MAX_SPANS = 1024
MAX_SENTENCE = 2000
MAX_TRACEBACK = 16_000

Dtype = Literal["float32", "float16", "bfloat16", "int64", "uint8"]
WeightsDtype = Literal["float32", "float16", "bfloat16", "int8"]  # of a session's weights
Dimension = Annotated[int, Meta(ge=1, le=MAX_DIMENSION)]
LayerNumber = Annotated[int, Meta(ge=0, lt=MAX_LAYERS)]
SequenceNumber = Annotated[int, Meta(ge=0, lt=2**53)]
Offset = Annotated[int, Meta(ge=-1, le=2**48)]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
ShardNumber = Annotated[int, Meta(ge=1, le=MAX_SHARDS)]
Name = Annotated[str, Meta(pattern=r"^[0-9a-z_:-]{1,64}\Z")]
Sentence = Annotated[str, Meta(max_length=MAX_SENTENCE)]
Traceback = Annotated[str, Meta(max_length=MAX_TRACEBACK)]
Evidence = Annotated[bytes, Meta(max_length=65_536)]
Nonce = Annotated[bytes, Meta(min_length=32, max_length=32)]
Macs = Annotated[int, Meta(ge=1, le=2**62)]
Nanoseconds = Annotated[int, Meta(ge=0, le=2**62)]
Seed = Annotated[bytes, Meta(min_length=32, max_length=32)]

OUTPUT_LAYER = -1  # the layer of the output projection, here and in call logs and recordings
INLINE = -1  # the offset of a tensor that is sent as a separate frame


def place_of(group: LinearGroup) -> tuple[int, str]:
    """The layer and group by which messages, call logs and recordings name a group."""
    return OUTPUT_LAYER if group.layer is None else group.layer, group.name


class Message(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Base of all messages."""


class TensorRef(Message, frozen=True):
    """A tensor's type, shape and place: a byte offset in the segment, or INLINE."""

    dtype: Dtype
    shape: Annotated[tuple[Dimension, ...], Meta(min_length=1, max_length=4)]
    offset: Offset


class SegmentRef(Message, frozen=True, tag="named"):
    """A shared-memory segment that the worker made: its name in /dev/shm and its size."""

    name: Annotated[str, Meta(pattern=r"^tsqp-[0-9a-f]{32}\Z")]
    size: Annotated[int, Meta(ge=1, le=2**40)]


class SealedRef(Message, frozen=True, tag="sealed"):
    """A sealed segment without a name: the owner's pid and descriptor, and the size."""

    pid: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    descriptor: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    size: Annotated[int, Meta(ge=1, le=2**40)]


class FixedRef(Message, frozen=True, tag="fixed"):
    """The size of a segment at the place that both sides were told, see `--shm-name`."""

    size: Annotated[int, Meta(ge=1, le=2**40)]


class Hello(Message, frozen=True, tag="hello"):
    """TEE → worker, the first message: the client's version and what it needs.

    `shm_bytes` is the wanted size of the segment, 0 for none. With `fixed_shm`, the client maps
    memory only at the place of its `--shm-name`. `evidence` is for attestation later. A client that
    wants shards names the digest of each in `shard_digests`, in their order.
    """

    nonce: Nonce
    weights_digest: Digest
    dtype: WeightsDtype
    abilities: Annotated[tuple[Name, ...], Meta(max_length=16)]
    shm_bytes: Annotated[int, Meta(ge=0, le=2**40)]
    evidence: Evidence = b""
    fixed_shm: bool = False
    shard_digests: Annotated[tuple[Digest, ...], Meta(max_length=MAX_SHARDS)] = ()


class Welcome(Message, frozen=True, tag="welcome"):
    """Worker → TEE: what the worker serves.

    `max_call_macs` is the maximum of multiply-accumulates in one call, see `tsqp.wire.call_limit`.
    `reason` says why no segment is offered, or why it is not sealed. The worker holds shard `shard`
    of `shards`, and `weights_digest` is the digest of that shard.
    """

    nonce: Nonce
    weights_digest: Digest
    dtype: WeightsDtype
    abilities: Annotated[tuple[Name, ...], Meta(max_length=16)]
    device: Name
    max_call_macs: Macs
    segment: SealedRef | SegmentRef | FixedRef | None
    reason: Sentence = ""
    evidence: Evidence = b""
    shard: ShardNumber = 1
    shards: ShardNumber = 1


class Attach(Message, frozen=True, tag="attach"):
    """TEE → worker: whether the segment is mapped, and whether its mailbox is polled.

    The worker withdraws its offer in either case. `wants_name` asks for an `Offer` of a segment
    with a name instead of a sealed one; a client may ask once.
    """

    mapped: bool
    poll: bool
    wants_name: bool = False


class Offer(Message, frozen=True, tag="offer"):
    """Worker → TEE: a segment with a name, or the reason why there is none."""

    segment: SegmentRef | None
    reason: Sentence = ""


class Linear(Message, frozen=True, tag="linear"):
    """y = x · Wᵀ for one group of one layer (layer OUTPUT_LAYER is the output projection)."""

    layer: Annotated[int, Meta(ge=-1, lt=MAX_LAYERS)]
    group: Name


class Embed(Message, frozen=True, tag="embed"):
    """Rows of the embedding table; used only in `open`, which lets the worker see token ids."""


class Product(Message, frozen=True, tag="product"):
    """z = Wq · c mod p for one group of one layer [P9]; c and z are rows of bytes."""

    layer: Annotated[int, Meta(ge=-1, lt=MAX_LAYERS)]
    group: Name
    field: FieldName


class SeedProduct(Message, frozen=True, tag="seed_product"):
    """The same product for `rows` rows c that the worker expands from a seed [P8]."""

    layer: Annotated[int, Meta(ge=-1, lt=MAX_LAYERS)]
    group: Name
    field: FieldName
    rows: Dimension
    seed: Seed


class Allocate(Message, frozen=True, tag="allocate"):
    """Make room for the keys and values of a new sequence of up to `capacity` tokens.

    A sequence belongs to the session that allocates it. Each session numbers its own sequences.
    """

    sequence: SequenceNumber
    capacity: Dimension


class Truncate(Message, frozen=True, tag="truncate"):
    """Forget all but the first `length` tokens of a sequence."""

    sequence: SequenceNumber
    length: Annotated[int, Meta(ge=0, le=MAX_DIMENSION)]


class Free(Message, frozen=True, tag="free"):
    """Forget a sequence."""

    sequence: SequenceNumber


class Span(Message, frozen=True):
    """Tokens [start, start + length) of a sequence, of which the worker holds the first `start`.

    If the worker applies the rotary embedding, dynamic scaling assumes a length of `known` tokens,
    or up to the end of the span if 0.
    """

    sequence: SequenceNumber
    start: Annotated[int, Meta(ge=0, le=MAX_DIMENSION)]
    length: Dimension
    known: Annotated[int, Meta(ge=0, le=MAX_DIMENSION)] = 0


Spans = Annotated[tuple[Span, ...], Meta(min_length=1, max_length=MAX_SPANS)]


class AttentionScores(Message, frozen=True, tag="attention_scores"):
    """Store k and v of the spans' tokens, then multiply q with all keys of their sequences.

    The inputs are q [T, heads, features] and k and v [T, kv heads, features], with rotary embedding
    applied, for the tokens of all spans in order. The answer is flat: for each span [heads, length,
    start + length], neither scaled nor masked.
    """

    layer: LayerNumber
    spans: Spans


class Weighted(Message, frozen=True):
    """Rows of attention weights over the first `length` tokens of a sequence."""

    sequence: SequenceNumber
    rows: Dimension
    length: Dimension


class WeightedValues(Message, frozen=True, tag="weighted_values"):
    """Multiply attention weights with the stored values of a layer, then with the layer's "o".

    The input is flat: [heads, rows, length] for each of `weighted`. The answer has one row for each
    of their rows.
    """

    layer: LayerNumber
    weighted: Annotated[tuple[Weighted, ...], Meta(min_length=1, max_length=MAX_SPANS)]


class Layer(Message, frozen=True, tag="layer"):
    """Run a whole layer on x [T, features], for the tokens of all spans in order.

    The answer has the same shape. The worker stores the keys and values.
    """

    layer: LayerNumber
    spans: Spans


Stateless = Linear | Embed | Product | SeedProduct
Operation = Stateless | Allocate | Truncate | Free | AttentionScores | WeightedValues | Layer


class Call(Message, frozen=True, tag="call"):
    """TEE → worker: do `operation` on `inputs` and put the answer at `outputs`."""

    operation: Operation
    inputs: Annotated[tuple[TensorRef, ...], Meta(max_length=MAX_TENSORS)]
    outputs: Annotated[tuple[TensorRef, ...], Meta(max_length=MAX_TENSORS)]


class Result(Message, frozen=True, tag="result"):
    """Worker → TEE: the outputs are written where the call asked for them.

    `compute_ns` is the time of the operation as the worker reports it. It must not be trusted.
    """

    compute_ns: Nanoseconds


class Failure(Message, frozen=True, tag="failure"):
    """Worker → TEE: the call or the handshake failed."""

    kind: Literal["refused", "protocol", "memory", "error"]
    message: Sentence
    traceback: Traceback = ""


class Probe(Message, frozen=True, tag="probe"):
    """Both directions: wake up and look for mail. Needs no answer. Sending fails on a dead link."""


class Bye(Message, frozen=True, tag="bye"):
    """TEE → worker: free what this session holds."""


FromTEE = Hello | Attach | Call | Probe | Bye
FromWorker = Welcome | Offer | Result | Failure | Probe
