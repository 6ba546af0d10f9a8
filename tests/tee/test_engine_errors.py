"""An error of one request is its own, and requests go on after a lost worker has come back."""

from collections.abc import Callable

import pytest
import torch
from tee_helpers import make_engine

from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.errors import (
    IntegrityError,
    LatticeError,
    NumericalError,
    ProtocolError,
    RemoteError,
    TSQPError,
    WorkerLost,
    WorkerUnavailable,
)
from tsqp.nn.kv_cache import KvCache
from tsqp.runtime.generate import generate
from tsqp.tee.decoder import Decoder
from tsqp.tee.engine.engine import Engine
from tsqp.tee.offload.local import LocalOffload, Ready
from tsqp.tee.offload.offload import Embedding, Linear, Request
from tsqp.tee.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
RATED = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1, prompt_logprobs=1)
PROMPTS = [[5], [9, 3, 77], list(range(40)), [50] * 17]
BAD_TOKEN = 99  # whoever has it in the prompt fails

Results = dict[int, tuple[int, ...] | TSQPError]


@pytest.fixture(scope="module")
def checkpoint(tiny: tuple[Checkpoint, object]) -> Checkpoint:
    return tiny[0]


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> list[tuple[int, ...]]:
    engine, _ = make_engine(checkpoint)
    return [generate(engine, [prompt], GREEDY)[0].token_ids for prompt in PROMPTS]


def run(engine: Engine) -> Results:
    """Step until nothing is left; what came of each sequence."""
    results: Results = {}
    while engine.has_unfinished:
        for output in engine.step():
            assert output.sequence not in results, "an output after the end"
            if output.error is not None:
                assert (output.token_id, output.text, output.completion) == (None, "", None)
                results[output.sequence] = output.error
            elif output.completion is not None:
                results[output.sequence] = output.completion.token_ids
    return results


class Poisoned(LocalOffload):
    """Fails at the given layer of every batch that holds BAD_TOKEN, as a row of NaN would."""

    def __init__(self, checkpoint: Checkpoint, layer: int | None, error: TSQPError) -> None:
        super().__init__(checkpoint, torch.float32)
        self._layer, self._error = layer, error
        self._is_bad = False

    def start(self, request: Request) -> Ready:
        if isinstance(request, Embedding):
            self._is_bad = BAD_TOKEN in request.token_ids_T.tolist()
        if isinstance(request, Linear) and request.group.layer == self._layer and self._is_bad:
            raise self._error
        return super().start(request)


@pytest.mark.parametrize("layer", [0, 2, None])
@pytest.mark.parametrize("error", [NumericalError("NaN"), RemoteError("refused")], ids=repr)
@pytest.mark.parametrize("chunk", [512, 16])
def test_an_error_of_one_request_leaves_the_others_running(
    checkpoint: Checkpoint,
    expected: list[tuple[int, ...]],
    layer: int | None,
    error: TSQPError,
    chunk: int,
) -> None:
    offload = Poisoned(checkpoint, layer, error)
    engine = Engine(
        Decoder(checkpoint, torch.float32), offload, checkpoint.config, prefill_chunk=chunk
    )
    ids = [engine.add(prompt, GREEDY) for prompt in PROMPTS[:2]]
    engine.step()  # these two decode when the third is read
    bad = engine.add([*PROMPTS[2][:20], BAD_TOKEN], GREEDY)
    ids += [engine.add(prompt, GREEDY) for prompt in PROMPTS[2:]]
    results = run(engine)
    assert results.pop(bad) is error
    assert results == dict(zip(ids, expected, strict=True))
    assert offload.kv.reserved_bytes == 0


class FragileKv(KvCache):
    """Cannot free anything once the worker is gone, as on a worker that holds the KV."""

    gone = False

    def free(self, sequence: int) -> None:
        super().free(sequence)
        if self.gone:
            raise WorkerLost("The worker is gone.")


class Fragile(LocalOffload):
    """Ends its session at the n-th linear request, and answers nothing from then on."""

    def __init__(self, checkpoint: Checkpoint, calls: int, error: TSQPError) -> None:
        self._fragile_kv = FragileKv(3, 2, 8, torch.float32)
        super().__init__(checkpoint, torch.float32, kv=self._fragile_kv)
        self._calls_left, self._error = calls, error

    def start(self, request: Request) -> Ready:
        if isinstance(request, Linear):
            self._calls_left -= 1
            if self._calls_left < 0:
                self._fragile_kv.gone = True
                raise self._error
        return super().start(request)


def fragile_engine(
    checkpoint: Checkpoint, calls: list[int], error: TSQPError, **options: int
) -> tuple[Engine, list[Fragile]]:
    """An engine whose offloads end after so many linear requests each.

    Only a lost worker is replaced.
    """
    offloads: list[Fragile] = []

    def rebuild(ended: TSQPError) -> Fragile:
        if not isinstance(ended, WorkerLost):
            raise ended
        if len(offloads) == len(calls):
            raise WorkerUnavailable("Nobody listens there.")
        offloads.append(Fragile(checkpoint, calls[len(offloads)], error))
        return offloads[-1]

    decoder = Decoder(checkpoint, torch.float32)
    config = checkpoint.config
    first = rebuild(WorkerLost(""))
    return Engine(decoder, first, config, rebuild=rebuild, **options), offloads


NEVER = 10**9


@pytest.mark.parametrize("calls", [0, 5, 13, 14, 30, 70])
@pytest.mark.parametrize("options", [{}, {"microbatches": 2}, {"prefill_chunk": 16}], ids=str)
def test_requests_go_on_after_a_lost_worker_has_come_back(
    checkpoint: Checkpoint, expected: list[tuple[int, ...]], calls: int, options: dict[str, int]
) -> None:
    engine, offloads = fragile_engine(
        checkpoint, [calls, NEVER], WorkerLost("The worker is gone."), **options
    )
    ids = [engine.add(prompt, GREEDY) for prompt in PROMPTS]
    assert run(engine) == dict(zip(ids, expected, strict=True))
    assert [offload.kv.reserved_bytes for offload in offloads] == [0, 0]


def test_what_was_rated_before_is_not_rated_twice(checkpoint: Checkpoint) -> None:
    whole, _ = make_engine(checkpoint, prefill_chunk=16)
    [wanted] = generate(whole, [PROMPTS[2]], RATED)
    engine, _ = fragile_engine(
        checkpoint, [45, NEVER], WorkerLost("The worker is gone."), prefill_chunk=16
    )
    [answer] = generate(engine, [PROMPTS[2]], RATED)
    assert answer.token_ids == wanted.token_ids
    assert answer.prompt_logprobs is not None
    assert wanted.prompt_logprobs is not None
    assert len(answer.prompt_logprobs) == len(PROMPTS[2]) == len(wanted.prompt_logprobs)


def test_a_request_begins_again_once_and_no_more(checkpoint: Checkpoint) -> None:
    engine, offloads = fragile_engine(
        checkpoint, [13, 13, NEVER], WorkerLost("The worker is gone.")
    )
    first = engine.add(PROMPTS[2], GREEDY)
    results = run(engine)
    assert isinstance(results[first], WorkerLost)
    assert len(offloads) == 3, "the next request finds a session"
    second = engine.add(PROMPTS[2], GREEDY)
    assert isinstance(run(engine)[second], tuple)


def test_a_request_goes_on_after_several_liars_as_long_as_there_is_another_worker(
    checkpoint: Checkpoint, expected: list[tuple[int, ...]]
) -> None:
    ends = [IntegrityError("A product."), WorkerLost("It is gone."), IntegrityError("Another.")]
    found: list[TSQPError] = []

    def rebuild(ended: TSQPError) -> Fragile:
        found.append(ended)
        calls = 13 if len(found) < len(ends) else NEVER
        return Fragile(checkpoint, calls, ends[len(found) % len(ends)])

    first = Fragile(checkpoint, 13, ends[0])
    decoder = Decoder(checkpoint, torch.float32)
    engine = Engine(decoder, first, checkpoint.config, rebuild=rebuild)
    number = engine.add(PROMPTS[2], GREEDY)
    assert run(engine) == {number: expected[2]}
    assert found == ends


def test_requests_end_with_the_reason_why_no_other_worker_takes_over(
    checkpoint: Checkpoint,
) -> None:
    reason = WorkerUnavailable("Nobody listens there.")

    def rebuild(_: TSQPError) -> Fragile:
        raise reason

    first = Fragile(checkpoint, 5, IntegrityError("A product."))
    decoder = Decoder(checkpoint, torch.float32)
    engine = Engine(decoder, first, checkpoint.config, rebuild=rebuild)
    number = engine.add(PROMPTS[2], GREEDY)
    assert run(engine) == {number: reason}


@pytest.mark.parametrize(
    "error",
    [IntegrityError("A product."), LatticeError("A mask."), ProtocolError("A message.")],
    ids=repr,
)
def test_after_a_wrong_product_mask_or_message_no_other_session_begins(
    checkpoint: Checkpoint, error: TSQPError
) -> None:
    engine, offloads = fragile_engine(checkpoint, [5, NEVER], error, max_num_seqs=2)
    for _ in range(2):  # the second time, the worker seems to be lost
        ids = [engine.add(prompt, GREEDY) for prompt in PROMPTS]
        assert run(engine) == dict.fromkeys(ids, error)
        offloads[0]._error = error = WorkerLost("The session has ended.")
    with pytest.raises(WorkerLost):
        engine.score(PROMPTS[2])
    assert len(offloads) == 1


def test_scoring_goes_on_after_a_lost_worker_has_come_back(checkpoint: Checkpoint) -> None:
    whole, _ = make_engine(checkpoint)
    error = WorkerLost("The worker is gone.")
    engine, offloads = fragile_engine(checkpoint, [5, NEVER], error)
    wanted = whole.score(PROMPTS[2]).logprobs_T
    assert torch.equal(engine.score(PROMPTS[2]).logprobs_T, wanted)
    assert [offload.kv.reserved_bytes for offload in offloads] == [0, 0]


def test_a_worker_that_is_lost_and_then_lies_is_not_asked_a_third_time(
    checkpoint: Checkpoint,
) -> None:
    engine, offloads = fragile_engine(checkpoint, [5, 5, NEVER], WorkerLost("The worker is gone."))
    rebuild = engine._session._rebuild
    assert rebuild is not None

    def rebuild_as_liar(ended: TSQPError) -> Fragile:
        offload = rebuild(ended)
        assert isinstance(offload, Fragile)
        offload._error = IntegrityError("A product.")
        return offload

    engine._session._rebuild = rebuild_as_liar
    with pytest.raises(IntegrityError):
        engine.score(PROMPTS[2])
    offloads[-1]._error = WorkerLost("The session has ended.")
    with pytest.raises(WorkerLost):
        engine.score(PROMPTS[2])
    number = engine.add(PROMPTS[2], GREEDY)
    assert isinstance(run(engine)[number], WorkerLost)
    assert len(offloads) == 2


def test_a_closed_engine_begins_no_session(checkpoint: Checkpoint) -> None:
    engine, offloads = fragile_engine(checkpoint, [0, NEVER], WorkerLost("The worker is gone."))
    engine.close()
    number = engine.add(PROMPTS[2], GREEDY)
    assert isinstance(run(engine)[number], WorkerLost)
    assert len(offloads) == 1


def test_all_requests_end_with_the_error_where_there_is_no_worker_any_more(
    checkpoint: Checkpoint,
) -> None:
    error = WorkerLost("The worker is gone.")
    engine, offloads = fragile_engine(checkpoint, [20], error, max_num_seqs=2)
    ids = [engine.add(prompt, GREEDY) for prompt in PROMPTS]
    assert run(engine) == dict.fromkeys(ids, error)
    assert offloads[0].kv.reserved_bytes == 0


def test_a_session_that_ends_when_room_is_asked_for_does_not_go_on_for_ever(
    checkpoint: Checkpoint,
) -> None:
    class NoRoom(KvCache):
        def alloc(self, sequence: int, capacity: int, spare: int = 0) -> None:
            raise WorkerLost("The worker is gone.")

    made: list[LocalOffload] = []

    def rebuild(_: TSQPError) -> LocalOffload:
        made.append(LocalOffload(checkpoint, torch.float32, kv=NoRoom(3, 2, 8, torch.float32)))
        return made[-1]

    decoder = Decoder(checkpoint, torch.float32)
    first = rebuild(WorkerLost(""))
    engine = Engine(decoder, first, checkpoint.config, rebuild=rebuild)
    ids = [engine.add(prompt, GREEDY) for prompt in PROMPTS]
    assert {type(each) for each in run(engine).values()} == {WorkerLost}
    assert len(made) == 1 + 2 * len(ids)


@pytest.mark.parametrize("fault", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupt_or_a_fault_of_the_program_ends_all(
    checkpoint: Checkpoint, fault: type[BaseException]
) -> None:
    class Interrupted(LocalOffload):
        raises: Callable[[], None] | None = None

        def start(self, request: Request) -> Ready:
            if isinstance(request, Linear) and request.group.layer == 1:
                raise fault
            return super().start(request)

    offload = Interrupted(checkpoint, torch.float32)
    engine = Engine(Decoder(checkpoint, torch.float32), offload, checkpoint.config)
    for prompt in PROMPTS:
        engine.add(prompt, GREEDY)
    with pytest.raises(fault):
        engine.step()
    assert not engine.has_unfinished
    assert offload.kv.reserved_bytes == 0
