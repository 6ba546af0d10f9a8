"""`open --attention gpu` and `open --fuse layer`: the forward pass is that of transformers."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from open_helpers import OFFLOADS, Side, make_worker
from tee_helpers import all_logits, write_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from references import reference_model
from tsqp.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tsqp.errors import OutOfMemory, ProtocolError, WorkerError
from tsqp.gpu.worker import Worker
from tsqp.model.macs import dearest_row_macs
from tsqp.runtime.generate import generate
from tsqp.tee.conversation import Conversation
from tsqp.tee.decoder import Decoder
from tsqp.tee.engine.engine import Engine
from tsqp.tee.offload.local import LocalOffload
from tsqp.tee.sampling import SamplingParams
from tsqp.wire.channel import InprocSlot, kind_of
from tsqp.wire.messages import Layer, Operation, Span
from tsqp.wire.tensors import Spec

TINY_CALL = 20_000  # bytes: some rows of one head at a time
OPTIONS: dict[str, dict[str, object]] = {  # tests/families has the others
    "grouped queries, tied": {},
    "untied, biases everywhere": {
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "one kv head, wide": {"num_key_value_heads": 1, "head_dim": 20},
    "as many kv heads": {"num_key_value_heads": 6},
}
SPLITS = pytest.mark.parametrize("split", OFFLOADS)


@pytest.fixture(scope="module")
def worker(tiny: tuple[Checkpoint, LlamaForCausalLM]) -> Worker:
    return make_worker(tiny[0])


@pytest.fixture
def reference(tiny: tuple[Checkpoint, LlamaForCausalLM]) -> LlamaForCausalLM:
    return tiny[1]


@pytest.fixture
def checkpoint(tiny: tuple[Checkpoint, LlamaForCausalLM]) -> Checkpoint:
    return tiny[0]


def logits_of(model: LlamaForCausalLM, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


def some_ids(count: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 101, (count,), generator=generator).tolist()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@SPLITS
@pytest.mark.parametrize("option", OPTIONS)
def test_logits_are_those_of_transformers(option: str, split: str, tmp_path: Path) -> None:
    model = write_llama(tmp_path, **OPTIONS[option])
    checkpoint = open_checkpoint(str(tmp_path))
    worker = make_worker(checkpoint)
    ids = some_ids(300)
    expected = logits_of(model, ids)
    for most_bytes, chunk in ((2**40, 300), (2**40, 128), (TINY_CALL, 111), (2**40, 1)):
        side = Side(worker, checkpoint, split, most_bytes)
        count = 20 if chunk == 1 else 300
        close(all_logits(side.decoder, side.offload, ids[:count], chunk), expected[:count])
    checkpoint.close()


@SPLITS
@pytest.mark.parametrize("most_bytes", [2**40, TINY_CALL])
def test_sequences_of_different_lengths_share_a_batch(
    split: str, most_bytes: int, worker: Worker, checkpoint: Checkpoint, reference: LlamaForCausalLM
) -> None:
    side = Side(worker, checkpoint, split, most_bytes)
    texts = {7: some_ids(90, 2), 3: some_ids(5, 3), 9: some_ids(33, 4)}
    for sequence, ids in texts.items():
        side.offload.kv.alloc(sequence, len(ids) + 2)
    first = side.logits([(sequence, 0, ids[:-2]) for sequence, ids in texts.items()])
    close(first, torch.cat([logits_of(reference, ids)[:-2] for ids in texts.values()]))
    for back in (-2, -1):
        step = [(sequence, len(ids) + back, [ids[back]]) for sequence, ids in texts.items()]
        close(
            side.logits(step), torch.stack([logits_of(reference, i)[back] for i in texts.values()])
        )


@SPLITS
@pytest.mark.parametrize("wanted", [[4, 19], [39], [0, 20, 21], []])
def test_only_the_wanted_rows_are_returned(
    split: str,
    wanted: list[int],
    worker: Worker,
    checkpoint: Checkpoint,
    reference: LlamaForCausalLM,
) -> None:
    side = Side(worker, checkpoint, split)
    one, other = some_ids(20), some_ids(20, 2)
    side.offload.kv.alloc(0, 21)
    side.offload.kv.alloc(1, 20)
    both = torch.cat([logits_of(reference, one), logits_of(reference, other)])
    close(side.logits([(0, 0, one), (1, 0, other)], wanted), both[wanted])
    # Keys and values are kept of all rows.
    close(side.logits([(0, 20, [5])]), logits_of(reference, [*one, 5])[20:])


@SPLITS
def test_a_cut_sequence_goes_on_from_where_it_was_cut(
    split: str, worker: Worker, checkpoint: Checkpoint, reference: LlamaForCausalLM
) -> None:
    side = Side(worker, checkpoint, split)
    ids, others = some_ids(50), some_ids(20, 2)
    side.offload.kv.alloc(0, 50)
    side.logits([(0, 0, ids)])
    side.offload.kv.truncate(0, 30)
    close(side.logits([(0, 30, others)]), logits_of(reference, ids[:30] + others)[30:])
    side.offload.kv.free(0)
    side.offload.kv.alloc(0, 20)
    close(side.logits([(0, 0, others)]), logits_of(reference, others))


@SPLITS
def test_two_lanes_compute_what_each_does_alone(
    split: str, worker: Worker, checkpoint: Checkpoint, reference: LlamaForCausalLM
) -> None:
    side = Side(worker, checkpoint, split, TINY_CALL)
    texts = [some_ids(70, 2), some_ids(41, 3)]
    for sequence, ids in enumerate(texts):
        side.offload.kv.alloc(sequence, len(ids))
    found = side.lanes([[(sequence, 0, ids)] for sequence, ids in enumerate(texts)])
    for logits_TV, ids in zip(found, texts, strict=True):
        close(logits_TV, logits_of(reference, ids))


@SPLITS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_width_errors_are_at_most_one_and_a_half_of_transformers(
    split: str, dtype: torch.dtype, checkpoint: Checkpoint
) -> None:
    ids = some_ids(200)
    exact = logits_of(reference_model(checkpoint, torch.float32), ids)
    theirs_model = reference_model(checkpoint, dtype)
    theirs_model.set_attn_implementation("eager")  # which rounds scores and weights, as we do
    theirs = logits_of(theirs_model, ids)
    side = Side(make_worker(checkpoint, dtype), checkpoint, split)
    ours = all_logits(side.decoder, side.offload, ids, 64)
    assert rms(theirs - exact) > 1e-4
    assert rms(ours - exact) <= 1.5 * rms(theirs - exact)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@SPLITS
def test_an_engine_gives_the_tokens_of_tee(
    split: str, worker: Worker, checkpoint: Checkpoint
) -> None:
    prompts = [some_ids(60), [7], some_ids(300, 2)]
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    local = LocalOffload(checkpoint, torch.float32)
    config = checkpoint.config
    tee = Engine(Decoder(checkpoint, torch.float32), local, config, prefill_chunk=280)
    expected = [answer.token_ids for answer in generate(tee, prompts, greedy)]
    assert len({token for answer in expected for token in answer}) > 10
    for lanes in (1, 2):
        side = Side(worker, checkpoint, split)
        engine = Engine(side.decoder, side.offload, config, prefill_chunk=280, microbatches=lanes)
        assert [answer.token_ids for answer in generate(engine, prompts, greedy)] == expected
        assert kept_bytes(worker) == 0


@SPLITS
def test_a_conversation_goes_on_with_what_the_worker_kept(
    split: str, worker: Worker, checkpoint: Checkpoint
) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    side = Side(worker, checkpoint, split)
    engine = Engine(side.decoder, side.offload, checkpoint.config)
    local = LocalOffload(checkpoint, torch.float32)
    tee = Engine(Decoder(checkpoint, torch.float32), local, checkpoint.config)
    ids = some_ids(50)
    conversation = Conversation(engine.forget)
    for turn in range(3):
        [answer] = generate(engine, [ids], greedy, conversation=conversation)
        assert answer.token_ids == generate(tee, [ids], greedy)[0].token_ids
        ids = [*ids, *answer.token_ids[:5], *some_ids(10, turn)]
    assert side.channel.counters.calls["allocate"] < 3
    assert side.channel.counters.calls["truncate"] > 0
    assert engine.stats.prefill_tokens == 50 + 2 * 10  # of each turn, what is new


def kept_bytes(worker: Worker) -> int:
    assert worker._store is not None
    return worker._store.cache.reserved_bytes


@pytest.mark.parametrize("held", [0, 50])
def test_only_the_keys_and_values_of_new_tokens_cross(
    held: int, worker: Worker, checkpoint: Checkpoint
) -> None:
    side = Side(worker, checkpoint, "attention")
    side.offload.kv.alloc(0, held + 10)
    if held:
        side.logits([(0, 0, some_ids(held))], [])
    before = side.channel.counters.sent_bytes, side.channel.counters.received_bytes
    calls = dict(side.channel.counters.calls)
    new, wanted, layers, heads, kv_heads, head = 10, 1, 3, 6, 2, 8
    hidden, inner, vocabulary = 48, 80, 101
    side.logits([(0, held, some_ids(new, 2))], [new - 1])
    counters = side.channel.counters
    scores = heads * new * (held + new)
    sent = layers * (new * hidden + new * (heads + 2 * kv_heads) * head)  # for qkv; q, k, v
    sent += (layers - 1) * (scores + new * (hidden + inner))  # weights; for gate_up and down
    sent += wanted * (heads * (held + new) + hidden + inner) + wanted * hidden  # and lm_head
    received = new * hidden + layers * (new * (heads + 2 * kv_heads) * head + scores)
    received += (layers - 1) * new * (2 * hidden + 2 * inner)  # o and down, gate_up
    received += wanted * (2 * hidden + 2 * inner + vocabulary)
    assert counters.sent_bytes - before[0] == 4 * sent + 8 * new
    assert counters.received_bytes - before[1] == 4 * received
    made = {kind: count - calls.get(kind, 0) for kind, count in counters.calls.items()}
    assert made == {
        "allocate": 0,
        "embed": 1,
        "linear": 3 * layers + 1,
        "attention_scores": layers,
        "weighted_values": layers,
    }


def test_a_fused_layer_is_one_call_of_a_row_a_token(worker: Worker, checkpoint: Checkpoint) -> None:
    side = Side(worker, checkpoint, "layer")
    side.offload.kv.alloc(0, 60)
    side.logits([(0, 0, some_ids(50))], [])
    counters = side.channel.counters
    before = counters.sent_bytes, counters.received_bytes
    side.logits([(0, 50, some_ids(10))], [9])
    layers, hidden, vocabulary = 3, 48, 101
    assert counters.sent_bytes - before[0] == 8 * 10 + 4 * hidden * (10 * layers + 1)
    received = 4 * (10 * hidden * (1 + layers) + vocabulary)
    assert counters.received_bytes - before[1] == received
    assert counters.calls == {"allocate": 1, "embed": 2, "layer": 2 * layers, "linear": 1}


def test_a_layer_that_is_cut_rotates_as_a_whole_one_does(
    worker: Worker, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = Worker(worker._weights, max_call_macs=dearest_row_macs(checkpoint.config))
    side = Side(limited, checkpoint, "layer")
    spans: list[Span] = []
    submit = side.channel.reserve

    def reserve(operation: Operation, *specs: Sequence[Spec]) -> InprocSlot:
        if isinstance(operation, Layer) and operation.layer == 0:
            spans.extend(operation.spans)
        return submit(operation, *specs)

    monkeypatch.setattr(side.channel, "reserve", reserve)
    for number in (0, 1):
        side.offload.kv.alloc(number, 40)
    side.logits([(0, 0, some_ids(20)), (1, 0, some_ids(1))])
    first, last = spans[:-1], spans[-1]
    assert len(first) > 1
    assert [span.start for span in first] == [
        sum(span.length for span in first[:place]) for place in range(len(first))
    ]
    assert sum(span.length for span in first) == 20
    assert {span.known for span in first} == {20}  # the length that dynamic scaling is for
    assert last == Span(1, 0, 1)


def test_two_sides_of_one_worker_use_the_same_numbers_for_their_own_sequences(
    worker: Worker, checkpoint: Checkpoint, reference: LlamaForCausalLM
) -> None:
    one, other = (Side(worker, checkpoint, "attention") for _ in range(2))
    texts = some_ids(30), some_ids(25, 2)
    for side, ids in zip((one, other), texts, strict=True):
        side.offload.kv.alloc(0, 31)
        side.logits([(0, 0, ids)], [])
    for side, ids in zip((one, other), texts, strict=True):
        close(side.logits([(0, len(ids), [9])]), logits_of(reference, [*ids, 9])[-1:])
    one.offload.kv.free(0)
    close(other.logits([(0, 26, [8])]), logits_of(reference, [*texts[1], 9, 8])[-1:])
    with pytest.raises(ProtocolError, match="has not allocated"):
        one.logits([(0, 31, [8])])


def test_a_session_that_ends_frees_what_it_kept(worker: Worker, checkpoint: Checkpoint) -> None:
    one, other = (Side(worker, checkpoint, "attention") for _ in range(2))
    one.offload.kv.alloc(0, 30)
    one.offload.kv.alloc(1, 30)
    whole = kept_bytes(worker)
    other.offload.kv.alloc(0, 30)
    one.channel.close()
    one.channel.close()
    assert kept_bytes(worker) == whole // 2
    other.channel.close()
    assert kept_bytes(worker) == 0


def test_a_full_worker_makes_a_sequence_wait_for_another(
    worker: Worker, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = Side(worker, checkpoint, "attention")

    def check(required: int, what: str) -> None:
        if kept_bytes(worker):
            raise OutOfMemory(f"{what} would take {required} bytes.")

    assert worker._store is not None
    monkeypatch.setattr(worker._store.cache, "_check", check)
    engine = Engine(side.decoder, side.offload, checkpoint.config)
    greedy = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    answers = generate(engine, [[1, 2], [3]], greedy)
    assert [len(answer.token_ids) for answer in answers] == [3, 3]
    assert side.channel.counters.calls["embed"] == 6  # one after the other


class Spoiled:
    """FAKE: what a worker answers to one kind of call, with one number changed."""

    def __init__(self, side: Side, kind: str, value: float) -> None:
        self._session, self._kind, self._value = side.channel._session, kind, value

    def check(self, *arguments: object) -> None:
        self._session.check(*arguments)  # type: ignore[arg-type]

    def run(self, operation: Operation, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        self._session.run(operation, inputs, outputs)
        if kind_of(operation) == self._kind:
            outputs[0].view(-1)[0] = self._value

    def close(self) -> None:
        self._session.close()


@pytest.mark.parametrize(
    ("split", "kind"),
    [("attention", "attention_scores"), ("attention", "weighted_values"), ("layer", "layer")],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_answers_that_are_not_finite_end_in_an_error_and_in_no_token(
    split: str, kind: str, value: float, worker: Worker, checkpoint: Checkpoint
) -> None:
    side = Side(worker, checkpoint, split)
    side.channel._session = Spoiled(side, kind, value)  # type: ignore[assignment]
    side.offload.kv.alloc(0, 9)
    with pytest.raises(WorkerError, match="lm_head output of this step is not finite"):
        side.logits([(0, 0, some_ids(9))], [8])


def test_kept_keys_and_values_count_against_free_memory(
    worker: Worker, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = Side(worker, checkpoint, "attention")
    tokens = 3 * 2 * 2 * 8 * 4  # bytes: layers, k and v, heads, features, float32
    monkeypatch.setattr("tsqp.checkpoint.weights.available_bytes", lambda: 150 * tokens)
    side.offload.kv.alloc(0, 100)
    with pytest.raises(OutOfMemory, match=f"would take {200 * tokens} bytes"):
        side.offload.kv.alloc(1, 100)
    side.offload.kv.free(0)
    side.offload.kv.alloc(1, 100)


@pytest.fixture(autouse=True)
def every_session_is_freed(worker: Worker) -> Iterator[None]:
    """Sides that a test leaves open are forgotten, so that each test begins with an empty store."""
    yield
    assert worker._store is not None
    worker._store.cache._entries.clear()
