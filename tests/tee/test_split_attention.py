"""How attention is cut into requests, and the softmax between two of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_helpers import Side, make_worker
from transformers import LlamaForCausalLM

from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.nn.attention import Segment
from tsqp.nn.ops import ATTENTION_BLOCK, attention_weights
from tsqp.tee.split_attention import MAX_SEGMENTS, blocks

lengths = st.lists(st.tuples(st.integers(0, 700), st.integers(1, 600)), min_size=1, max_size=6)


def scores(segment: Segment, heads: int) -> int:
    return heads * segment.length * (segment.start + segment.length)


@given(lengths, st.integers(1, 8), st.integers(1, 10**6))
def test_pieces_are_the_segments_in_order_and_fit(
    places: list[tuple[int, int]], heads: int, most: int
) -> None:
    segments = [Segment(n, start, length) for n, (start, length) in enumerate(places)]
    found = list(blocks(segments, heads, most))
    pieces = [piece for block in found for piece in block]
    tokens = [(s.sequence, s.start + i) for s in segments for i in range(s.length)]
    assert [(p.sequence, p.start + i) for p in pieces for i in range(p.length)] == tokens
    assert all(1 <= piece.length <= ATTENTION_BLOCK for piece in pieces)
    for block in found:
        is_one_row = len(block) == 1 and block[0].length == 1
        assert is_one_row or sum(scores(piece, heads) for piece in block) <= most
    # How one is cut does not depend on the others.
    alone = [piece for s in segments for block in blocks([s], heads, most) for piece in block]
    assert pieces == alone


def test_a_request_names_so_many_sequences_at_most() -> None:
    segments = [Segment(n, 3, 1) for n in range(MAX_SEGMENTS + 5)]
    assert [len(block) for block in blocks(segments, 4, 10**9)] == [MAX_SEGMENTS, 5]


@pytest.mark.parametrize("window", [None, 3, 40])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_weights_are_the_softmax_of_what_each_query_sees(
    window: int | None, softcap: float | None
) -> None:
    scores_HTS = 5 * torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(0))
    before = scores_HTS.clone()
    positions = [16, 17, 18, 19]
    found = attention_weights(
        scores_HTS, torch.tensor(positions), scale=0.3, window=window, softcap=softcap
    )
    for row, position in enumerate(positions):
        seen = slice(0 if window is None else max(0, position + 1 - window), position + 1)
        exact = scores_HTS[:, row, seen].double() * 0.3
        if softcap is not None:
            exact = softcap * (exact / softcap).tanh()
        torch.testing.assert_close(found[:, row, seen], exact.softmax(-1).float())
        assert found[:, row].count_nonzero() == found[:, row, seen].count_nonzero()
    assert torch.equal(scores_HTS, before)  # it may be the worker's memory


def test_a_step_of_many_sequences_is_as_many_calls_as_one(
    tiny: tuple[Checkpoint, LlamaForCausalLM],
) -> None:
    side = Side(make_worker(tiny[0]), tiny[0], "attention")
    for sequence in range(20):
        side.offload.kv.alloc(sequence, 9)
    side.logits([(sequence, 0, [sequence + 1, 5]) for sequence in range(20)])
    counts = dict(side.channel.counters.calls)
    side.logits([(sequence, 2, [7]) for sequence in range(20)])
    layers = 3
    assert counts == {
        "allocate": 20,
        "embed": 1,
        "linear": 3 * layers + 1,
        "attention_scores": layers,
        "weighted_values": layers,
    }
    made = {kind: count - counts[kind] for kind, count in side.channel.counters.calls.items()}
    assert made == counts | {"allocate": 0}
