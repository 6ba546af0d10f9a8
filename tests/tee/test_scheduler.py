"""Which tokens a step computes: order, budget and places, without any model."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tsqp.tee.engine.batch import split_into_microbatches
from tsqp.tee.engine.scheduler import Scheduler
from tsqp.tee.engine.sequence import Sequence
from tsqp.tee.sampler import Sampler
from tsqp.tee.sampling import SamplingParams


def a_sequence(number: int, prompt_tokens: int, max_tokens: int = 4, tenant: str = "") -> Sequence:
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
        tenant=tenant,
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


@settings(max_examples=200)
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


@settings(max_examples=200)
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


def test_a_long_prompt_neither_stops_answers_nor_holds_back_a_short_one() -> None:
    scheduler = Scheduler(max_num_seqs=4, prefill_chunk=16)
    scheduler.add(a_sequence(0, 3, max_tokens=9))
    step(scheduler)
    scheduler.add(a_sequence(1, 64))
    assert step(scheduler) == [(0, 3, 1), (1, 0, 16)]
    scheduler.add(a_sequence(2, 5))
    assert step(scheduler) == [(0, 4, 1), (2, 0, 5)]  # the rest of the long one needs a whole chunk
    assert step(scheduler) == [(0, 5, 1), (2, 5, 1), (1, 16, 16)]


def test_a_long_prompt_is_not_held_back_for_ever_by_short_ones() -> None:
    scheduler = Scheduler(max_num_seqs=9, prefill_chunk=16)
    scheduler.add(a_sequence(0, 64))
    step(scheduler)
    for number in range(1, 10):
        scheduler.add(a_sequence(number, 5, max_tokens=1))
        step(scheduler)
    sequence = scheduler.find(0)
    assert sequence is None or not sequence.in_prompt


def test_the_tenant_that_runs_least_is_next() -> None:
    scheduler = Scheduler(max_num_seqs=4, prefill_chunk=16)
    for number in range(6):
        scheduler.add(a_sequence(number, 3, tenant="many"))
    scheduler.add(a_sequence(6, 3, tenant="few"))
    scheduler.add(a_sequence(7, 3, tenant="few"))
    admit_all(scheduler)
    assert [each.id for each in scheduler.running] == [0, 6, 1, 7]
    assert (scheduler.num_running, scheduler.num_waiting) == (4, 4)


def test_tenants_take_turns_with_their_prompts() -> None:
    scheduler = Scheduler(max_num_seqs=9, prefill_chunk=16)
    for number in range(4):
        scheduler.add(a_sequence(number, 16, max_tokens=1, tenant="many"))
    scheduler.add(a_sequence(4, 32, max_tokens=1, tenant="few"))
    assert [step(scheduler)[0][0] for _ in range(6)] == [0, 4, 1, 4, 2, 3]


@settings(max_examples=200)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 50), st.sampled_from("abc")), min_size=1, max_size=9),
    chunk=st.integers(1, 20),
    places=st.integers(1, 4),
)
def test_every_tenant_comes_to_its_end_and_its_sequences_begin_in_order(
    lengths: list[tuple[int, str]], chunk: int, places: int
) -> None:
    scheduler = Scheduler(max_num_seqs=places, prefill_chunk=chunk)
    for number, (length, tenant) in enumerate(lengths):
        scheduler.add(a_sequence(number, length, tenant=tenant))
    begun: dict[str, list[int]] = {}
    while scheduler.has_unfinished:
        before = {each.id for each in scheduler.running}
        admit_all(scheduler)
        for each in scheduler.running:
            if each.id not in before:
                begun.setdefault(each.tenant, []).append(each.id)
        assert step(scheduler), "a step without work would go on for ever"
    assert begun == {
        tenant: [n for n, (_, whose) in enumerate(lengths) if whose == tenant]
        for tenant in {tenant for _, tenant in lengths}
    }


def test_the_youngest_of_the_largest_tenant_makes_way_and_comes_back_first() -> None:
    scheduler = Scheduler(max_num_seqs=9, prefill_chunk=100)
    for number, (length, tenant) in enumerate([(20, "a"), (25, "b"), (15, "a"), (5, "a")]):
        scheduler.add(a_sequence(number, length, tenant=tenant))
    step(scheduler)
    chosen = scheduler.next_to_preempt()
    assert chosen.id == 3
    scheduler.add(a_sequence(9, 5, tenant="a"))
    scheduler.preempt(chosen)
    assert not scheduler.is_running(chosen)
    assert scheduler.next_to_preempt().id == 2
    assert scheduler.num_waiting == 2
    scheduler.add(a_sequence(10, 5, tenant="b"))
    first = scheduler.next_to_admit()
    assert first is not None
    assert first.id == 10  # the other tenant runs fewer
    scheduler.admit(first)
    assert scheduler.next_to_admit() is chosen
