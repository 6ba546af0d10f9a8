"""Which tokens a step computes: order, budget and places, without any model."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tsqp.tee.engine.batch import split_into_microbatches
from tsqp.tee.engine.scheduler import Scheduler
from tsqp.tee.engine.sequence import Sequence
from tsqp.tee.sampler import Sampler
from tsqp.tee.sampling import SamplingParams


def a_sequence(number: int, prompt_tokens: int, max_tokens: int = 4) -> Sequence:
    params, prompt = SamplingParams(max_tokens=max_tokens), [1] * prompt_tokens
    return Sequence(
        id=number,
        params=params,
        token_ids=prompt,
        prompt_tokens=prompt_tokens,
        capacity=prompt_tokens + max_tokens,
        ending_ids=frozenset(),
        sampler=Sampler(params, prompt, frozenset()),
        stream=None,
        kv_id=number,
    )


def admit_all(scheduler: Scheduler) -> None:
    while (sequence := scheduler.next_to_admit()) is not None:
        scheduler.admit(sequence)


def step(scheduler: Scheduler) -> list[tuple[int, int, int]]:
    """One step in which every chunk is computed: (id, start, length) of each."""
    admit_all(scheduler)
    chunks = scheduler.schedule()
    for chunk in chunks:
        sequence = chunk.sequence
        ends = chunk.ends_known_tokens
        sequence.computed += chunk.length
        if ends:
            sequence.token_ids.append(7)
            if len(sequence.token_ids) >= sequence.capacity:
                scheduler.remove(sequence)
    return [(chunk.sequence.id, chunk.start, chunk.length) for chunk in chunks]


def test_a_prompt_is_cut_at_multiples_of_the_chunk_and_then_decodes() -> None:
    scheduler = Scheduler(max_num_seqs=4, prefill_chunk=16)
    scheduler.add(a_sequence(0, 40))
    assert [step(scheduler) for _ in range(5)] == [
        [(0, 0, 16)],
        [(0, 16, 16)],
        [(0, 32, 8)],
        [(0, 40, 1)],
        [(0, 41, 1)],
    ]


def test_prompts_share_the_budget_in_order_and_nobody_overtakes() -> None:
    scheduler = Scheduler(max_num_seqs=4, prefill_chunk=16)
    for number, length in enumerate([10, 8, 2]):
        scheduler.add(a_sequence(number, length))
    # Number 2 would fit into what number 0 leaves; it waits for number 1.
    assert step(scheduler) == [(0, 0, 10)]
    assert step(scheduler) == [(0, 10, 1), (1, 0, 8), (2, 0, 2)]


def test_no_more_sequences_run_than_there_are_places() -> None:
    scheduler = Scheduler(max_num_seqs=2, prefill_chunk=16)
    for number in range(3):
        scheduler.add(a_sequence(number, 3))
    admit_all(scheduler)
    assert [each.id for each in scheduler.running] == [0, 1]
    first = scheduler.find(0)
    assert first is not None
    assert scheduler.remove(first)
    admit_all(scheduler)
    assert [each.id for each in scheduler.running] == [1, 2]


def test_sequences_that_are_queued_again_come_first_and_in_order() -> None:
    scheduler = Scheduler(max_num_seqs=2, prefill_chunk=16)
    for number in range(4):
        scheduler.add(a_sequence(number, 3))
    admit_all(scheduler)
    scheduler.requeue()
    assert scheduler.running == []
    assert [each.id for each in scheduler.unfinished] == [0, 1, 2, 3]


def test_a_sequence_may_be_removed_twice_and_wherever_it_is() -> None:
    scheduler = Scheduler(max_num_seqs=1, prefill_chunk=16)
    sequences = [a_sequence(number, 3) for number in range(2)]
    for sequence in sequences:
        scheduler.add(sequence)
    admit_all(scheduler)
    assert [scheduler.remove(sequence) for sequence in sequences] == [True, False]
    assert [scheduler.remove(sequence) for sequence in sequences] == [False, False]
    assert not scheduler.has_unfinished
    assert scheduler.find(0) is None


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    chunk=st.integers(1, 20),
    places=st.integers(1, 4),
)
def test_every_token_is_computed_once_in_order_and_within_the_budget(
    lengths: list[int], chunk: int, places: int
) -> None:
    scheduler = Scheduler(max_num_seqs=places, prefill_chunk=chunk)
    for number, length in enumerate(lengths):
        scheduler.add(a_sequence(number, length))
    ends = dict.fromkeys(range(len(lengths)), 0)
    steps = 0
    while scheduler.has_unfinished:
        work = step(scheduler)
        steps += 1
        assert work, "a step without work would go on for ever"
        assert len(work) <= places
        prompts = [(n, start, length) for n, start, length in work if start < lengths[n]]
        assert sum(length for _, _, length in prompts) <= chunk
        for number, start, length in work:
            assert start == ends[number]
            assert start % chunk == 0 or start >= lengths[number]
            ends[number] += length
    assert ends == {number: length + 3 for number, length in enumerate(lengths)}
    assert steps <= sum(length + 4 for length in lengths)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=6),
    microbatches=st.integers(1, 4),
    may_cut=st.booleans(),
)
def test_microbatches_hold_all_tokens_once_and_later_ones_later(
    lengths: list[int], microbatches: int, may_cut: bool
) -> None:
    scheduler = Scheduler(max_num_seqs=9, prefill_chunk=10_000)
    for number, length in enumerate(lengths):
        scheduler.add(a_sequence(number, length))
    admit_all(scheduler)
    parts = split_into_microbatches(scheduler.schedule(), microbatches, may_cut=may_cut)
    assert 1 <= len(parts) <= microbatches
    assert all(parts)
    for number, length in enumerate(lengths):
        mine = [c for part in parts for c in part if c.sequence.id == number]
        assert [c.start for c in mine] == [
            sum(c.length for c in mine[:i]) for i in range(len(mine))
        ]
        assert sum(c.length for c in mine) == length
        assert may_cut or len(mine) == 1


def test_sequences_that_begin_again_share_the_budget_too() -> None:
    """Their answers so far are known tokens, as a prompt's are."""
    scheduler = Scheduler(max_num_seqs=4, prefill_chunk=16)
    for number in range(3):
        sequence = a_sequence(number, 4, max_tokens=40)
        sequence.token_ids += [7] * 20
        sequence.computed = 4
        scheduler.add(sequence)
    # They are cut at multiples of the chunk, wherever they begin.
    assert step(scheduler) == [(0, 4, 12)]
    assert step(scheduler) == [(1, 4, 12)]
    assert step(scheduler) == [(2, 4, 12)]
    assert step(scheduler) == [(0, 16, 8), (1, 16, 8)]
