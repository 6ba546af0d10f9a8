"""A worker that lies, as a real process that speaks the real protocol.

Each crime ends in its verdict, an exact exception, within a deadline, and never in a wrong token.
"""

import gc
import itertools
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from liars import LyingWorker
from lying_worker import MODEL, WRONG_MESSAGES, WRONG_PRODUCTS, WRONG_WELCOMES, Order, flip
from protocol_helpers import (
    DEADLINE_S,
    SHARED,
    Commands,
    eventually,
    mapped_segments,
    segments,
    write_ids,
)
from torch import Tensor

from tsqp import LLM, SamplingParams
from tsqp.algebra import residue_bytes
from tsqp.algebra.int8_product import residue_product
from tsqp.algebra.params import FIELDS, LATTICE, Field
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.integer_cache import load_integers
from tsqp.checkpoint.quantize import IntegerWeights
from tsqp.errors import (
    HandshakeError,
    IntegrityError,
    ProtocolError,
    RemoteError,
    TSQPError,
    WorkerError,
    WorkerLost,
)
from tsqp.model.linear_group import LinearGroup
from tsqp.runtime import build
from tsqp.tee.crypto.freivalds import MAX_FAILURES, FailureLimit
from tsqp.tee.crypto.pad_providers import DirectProvider, PadProvider
from tsqp.tee.crypto.pads import Pads
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.offload.lattice_load import LatticeLoad
from tsqp.tee.offload.masked import Group, MaskedGroup
from tsqp.wire.messages import place_of

pytestmark = [pytest.mark.usefixtures("nothing_is_left", "limit")]

GROUPS = [(layer, name) for layer in (0, 1) for name in ("qkv", "o", "gate_up", "down")]
GROUPS.append((-1, "lm_head"))
PROMPT = [3, 141, 59, 265, 358]
TOKENS = 4
IMPATIENCE_S = 0.4  # shorter than an answer that is late

# What the worker does; what that comes to; what the message says of it.
CRIMES: list[tuple[str, type[WorkerError], str]] = [
    ("one bit flipped", IntegrityError, "wrong product"),
    ("one element off by one", IntegrityError, "wrong product"),
    ("a row off by one", IntegrityError, "wrong product"),
    ("a row off by minus one", IntegrityError, "wrong product"),
    ("a row off by p", IntegrityError, "wrong product"),
    ("a row off by its highest bit", IntegrityError, "wrong product"),
    ("p itself", IntegrityError, "wrong product"),
    ("the largest word", IntegrityError, "wrong product"),
    ("zeros", IntegrityError, "wrong product"),
    ("twice the product", IntegrityError, "wrong product"),
    ("minus the product", IntegrityError, "wrong product"),
    ("one weight off by one", IntegrityError, "wrong product"),
    ("features shifted by one", IntegrityError, "wrong product"),
    ("two rows swapped", IntegrityError, "wrong product"),
    ("all rows but the last", IntegrityError, "wrong product"),
    ("rows and features exchanged", IntegrityError, "wrong product"),
    ("floating-point numbers", IntegrityError, "wrong product"),
    ("the previous answer", IntegrityError, "wrong product"),
    ("the answer of another group", IntegrityError, "wrong product"),
    ("writes nothing", IntegrityError, "wrong product"),
    ("hides other weights", IntegrityError, "wrong product"),
    ("fails", RemoteError, "failed: RuntimeError: this worker has better things to do"),
    ("never answers", WorkerLost, "stopped answering|sent probes instead"),
    ("answers late", WorkerLost, "stopped answering|sent probes instead"),
    ("answers twice", ProtocolError, "answered a call that is not open"),
    ("answers a call to come", ProtocolError, "answered a call that is not open"),
    ("answers no call", ProtocolError, "answered a call that is not open"),
    ("babbles", ProtocolError, "does not speak the TSQP protocol"),
]
INLINE_CRIMES: list[tuple[str, type[WorkerError], str]] = [
    ("sends a byte too few", ProtocolError, "a tensor of 2559 bytes where 2560 are due"),
    ("sends a byte too many", ProtocolError, "a tensor of 2561 bytes where 2560 are due"),
    ("sends half of the rows", ProtocolError, "a tensor of 1280 bytes where 2560 are due"),
    ("sends every row twice", ProtocolError, "a tensor of 5120 bytes where 2560 are due"),
    ("sends words twice as wide", ProtocolError, "a tensor of 5120 bytes where 2560 are due"),
    ("sends no tensor", ProtocolError, "0 tensors where 1 are due"),
    ("sends a tensor too many", ProtocolError, "more than the 1 tensors"),
]
HANDSHAKE_CRIMES: list[tuple[str, type[WorkerError], str]] = [
    ("names another digest", HandshakeError, "the worker holds other weights"),
    ("names another dtype", HandshakeError, "the worker computes in float32"),
    ("can do nothing", HandshakeError, "the worker cannot do product"),
    ("repeats an old nonce", ProtocolError, "answered the handshake wrongly"),
]


@pytest.fixture(scope="module")
def worker(shared_commands: Commands) -> Iterator[LyingWorker]:
    worker = LyingWorker(shared_commands)
    try:
        worker.running.says("serving ")
        with private(worker, shm=False) as llm:
            complete(llm)  # pyzmq starts its collector of buffers, once for all
        gc.freeze()  # what torch made at its import need not be looked at after each test
        yield worker
        worker.close()
    finally:
        gc.unfreeze()
        worker.running.stop()


@pytest.fixture
def nothing_is_left(worker: LyingWorker) -> Iterator[None]:
    """No thread, file or memory stays on this side, no memory on the other, no name on disk."""
    gc.collect()
    before, names = held(), segments()
    yield
    gc.collect()
    assert eventually(lambda: held() == before), (before, held())
    assert eventually(lambda: worker.segments == 0)
    assert eventually(lambda: segments() <= names)
    assert worker.running.is_alive, worker.running.stderr


def held() -> tuple[int, int, int, int]:
    """Python's threads, libzmq's threads, open files, and mapped segments of this process."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it ended meanwhile
            names.append((task / "comm").read_text())
    return (
        threading.active_count(),
        sum(name.startswith("ZMQ") for name in names),
        len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        mapped_segments(os.getpid()),
    )


def private(worker: LyingWorker, order: Order | None = None, **options: Any) -> LLM:
    worker.order(order or Order())
    return LLM(MODEL, **({"worker": worker.endpoint, "pad_memory": 0} | options))


def complete(llm: LLM, prompt: Sequence[int] = PROMPT, max_tokens: int = TOKENS) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return list(llm.generate([prompt], params)[0].token_ids)


@cache
def right_tokens(
    field: str = "wide", prompt: tuple[int, ...] = tuple(PROMPT), max_tokens: int = TOKENS
) -> list[int]:
    """Computed without any worker."""
    with LLM(MODEL, privacy="tee", fixed_point=True, field=field) as llm:
        return complete(llm, prompt, max_tokens)


def fails(
    worker: LyingWorker,
    order: Order,
    verdict: type[WorkerError],
    sampled: list[int],
    prompt: Sequence[int] = PROMPT,
    max_tokens: int = TOKENS,
    **options: Any,
) -> str:
    """The message of a generation that fails, in time, after right tokens at most."""
    right = right_tokens(options.get("field", "wide"), tuple(prompt), max_tokens)
    sampled.clear()
    with private(worker, order, **options) as llm:
        began = time.monotonic()
        with pytest.raises(WorkerError) as caught:
            complete(llm, prompt, max_tokens)
        assert time.monotonic() - began < DEADLINE_S
        assert caught.type is verdict
        assert len(sampled) < len(right)
        assert sampled == right[: len(sampled)]
        # A lost worker is tried again, and is no better; one that lied is not.
        again = {RemoteError: "failed", WorkerLost: "stopped answering|sent probes instead"}
        over = again.get(verdict, "has ended")
        with pytest.raises(TSQPError, match=over):
            complete(llm)
        assert sampled == right[: len(sampled)]
    assert worker.endpoint in str(caught.value)
    return str(caught.value)


def name(layer: int, group: str) -> str:
    return f"group {group}" if layer < 0 else f"group {group} of layer {layer}"


@pytest.mark.parametrize("shm", [True, False], ids=[SHARED, "inline"])
@pytest.mark.parametrize("field", FIELDS)
def test_a_worker_that_does_not_lie_is_believed(
    field: str, shm: bool, worker: LyingWorker, limit: FailureLimit
) -> None:
    with private(worker, field=field, shm=shm) as llm:
        assert complete(llm) == complete(llm) == right_tokens(field)
        assert llm.transport == (SHARED if shm else "inline")
    assert not limit.reached


@pytest.mark.parametrize(
    ("field", "shm"),
    [("wide", True), ("compact", False), ("lattice", True)],
    ids=[f"wide-{SHARED}", "compact-inline", f"lattice-{SHARED}"],
)
@pytest.mark.parametrize(("crime", "verdict", "words"), CRIMES, ids=[c[0] for c in CRIMES])
def test_a_lie_ends_the_session(
    crime: str,
    verdict: type[WorkerError],
    words: str,
    field: str,
    shm: bool,
    worker: LyingWorker,
    sampled: list[int],
) -> None:
    timeout = IMPATIENCE_S if verdict is WorkerLost else DEADLINE_S
    message = fails(worker, Order(crime), verdict, sampled, field=field, shm=shm, timeout=timeout)
    assert re.search(words, message)
    if verdict is IntegrityError:
        assert name(0, "qkv") in message


@pytest.mark.parametrize(
    ("crime", "verdict", "words"), INLINE_CRIMES, ids=[c[0] for c in INLINE_CRIMES]
)
def test_an_answer_of_another_size_ends_the_session(
    crime: str, verdict: type[WorkerError], words: str, worker: LyingWorker, sampled: list[int]
) -> None:
    assert words in fails(worker, Order(crime), verdict, sampled, shm=False)


@pytest.mark.parametrize(
    ("crime", "verdict", "words"), HANDSHAKE_CRIMES, ids=[c[0] for c in HANDSHAKE_CRIMES]
)
def test_a_wrong_handshake_is_refused(
    crime: str, verdict: type[WorkerError], words: str, worker: LyingWorker
) -> None:
    with pytest.raises(WorkerError, match=words) as caught:
        private(worker, Order(crime))
    assert caught.type is verdict
    assert worker.endpoint in str(caught.value)


def test_every_crime_that_the_worker_can_commit_is_tried() -> None:
    tried = {crime for crime, _, _ in CRIMES + INLINE_CRIMES + HANDSHAKE_CRIMES}
    known = {*WRONG_PRODUCTS, *WRONG_MESSAGES, *WRONG_WELCOMES}
    assert known - tried == {"the answer of another session"}  # which takes two of them


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(("layer", "group"), GROUPS)
def test_every_group_is_checked_and_named(
    layer: int, group: str, field: str, worker: LyingWorker, sampled: list[int]
) -> None:
    order = Order("one element off by one", layer, group)
    message = fails(worker, order, IntegrityError, sampled, field=field)
    assert f"wrong product for {name(layer, group)};" in message


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    target=st.sampled_from(GROUPS),
    bit=st.integers(0, 2**20),
    after=st.integers(0, 30),
    field=st.sampled_from(sorted(FIELDS)),
    shm=st.booleans(),
)
def test_one_bit_flipped_anywhere_is_noticed(
    target: tuple[int, str],
    bit: int,
    after: int,
    field: str,
    shm: bool,
    worker: LyingWorker,
    sampled: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "process_limit", FailureLimit())  # one for each example
    order = Order("one bit flipped", *target, after=after, bit=bit)
    message = fails(worker, order, IntegrityError, sampled, max_tokens=6, field=field, shm=shm)
    assert name(*target) in message


@pytest.mark.parametrize("field", FIELDS)
def test_an_answer_that_another_session_got_is_refused(
    field: str, worker: LyingWorker, sampled: list[int]
) -> None:
    with private(worker, field=field) as llm:
        assert complete(llm, max_tokens=1) == right_tokens(field)[:1]
    order = Order("the answer of another session")
    assert name(0, "qkv") in fails(worker, order, IntegrityError, sampled, field=field)


@pytest.mark.parametrize("shm", [True, False], ids=[SHARED, "inline"])
def test_answers_to_two_calls_exchanged_are_refused(
    shm: bool, worker: LyingWorker, sampled: list[int]
) -> None:
    two_blocks = list(range(1, 257))
    order = Order("exchanges two answers")
    message = fails(worker, order, IntegrityError, sampled, two_blocks, shm=shm)
    assert name(0, "qkv") in message


def test_a_worker_that_is_right_a_thousand_times_is_still_checked(
    worker: LyingWorker, sampled: list[int]
) -> None:
    calls = 1000
    order = Order("one element off by one", 1, "down", after=calls)
    fails(worker, order, IntegrityError, sampled, max_tokens=120)
    assert len(sampled) == calls // len(GROUPS)


def test_two_lanes_fail_together(worker: LyingWorker, sampled: list[int]) -> None:
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    right = [token for token in right_tokens() for _ in (PROMPT, PROMPT)]
    sampled.clear()
    order = Order("a row off by one", 1, "o", after=2 * 2 * len(GROUPS))
    with private(worker, order, microbatches=2) as llm:
        with pytest.raises(IntegrityError, match=name(1, "o")):
            llm.generate([PROMPT, PROMPT], params)
        assert sampled == right[:4]
        with pytest.raises(TSQPError, match="has ended"):
            complete(llm)


def test_memory_that_changes_after_the_answer_gives_right_tokens_or_none(
    worker: LyingWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    noticed = 0
    for bit in range(40):
        monkeypatch.setattr(build, "process_limit", FailureLimit())
        with private(worker, Order("changes its answer afterwards", 0, "down", bit=bit)) as llm:
            assert llm.transport == SHARED
            try:
                tokens = complete(llm)
            except IntegrityError:
                noticed += 1
            else:
                assert tokens == right_tokens()
    assert noticed  # or the memory never changed in time to matter


def test_sealed_memory_cannot_be_cut_short(worker: LyingWorker, commands: Commands) -> None:
    worker.order(Order("truncates the segment"))
    result = commands.run(
        "generate", MODEL, "--privacy", "pad", "--worker", worker.endpoint, "--pad-memory", 0,
        "--prompt-ids", write_ids(commands.folder / "ids.json", PROMPT), "--max-tokens", TOKENS,
        "--ignore-eos", "--json",
    )  # fmt: skip
    assert result.status == 0, result.stderr
    assert "of sealed memory" in result.json["transport_reason"]
    assert result.token_ids == [right_tokens()]
    worker.running.says("cannot truncate: Operation not permitted")


def test_a_segment_with_a_name_that_is_cut_short_ends_this_process_and_nothing_else(
    worker: LyingWorker, commands: Commands
) -> None:
    worker.order(Order("truncates a segment with a name"))
    result = commands.run(
        "generate", MODEL, "--privacy", "pad", "--worker", worker.endpoint, "--pad-memory", 0,
        "--prompt-ids", write_ids(commands.folder / "ids.json", PROMPT), "--json",
    )  # fmt: skip
    assert (result.status, result.stdout) == (-signal.SIGBUS, "")


@pytest.mark.parametrize(("layer", "group"), [(1, "down"), (-1, "lm_head")])
def test_in_open_mode_what_is_no_number_gives_no_token(
    layer: int, group: str, worker: LyingWorker, sampled: list[int]
) -> None:
    order = Order("not a number", layer, group)
    with (
        private(worker, order, privacy="open", pad_memory=None) as llm,
        pytest.raises(WorkerError, match="lm_head output of this step is not finite") as caught,
    ):
        complete(llm)
    assert caught.type is WorkerError
    assert sampled == []


@pytest.mark.parametrize(
    ("options", "group"),
    [
        ({"attention": "gpu"}, "attention_scores"),
        ({"attention": "gpu"}, "weighted_values"),
        ({"fuse": "layer"}, "layer"),
    ],
    ids=["scores", "values", "layer"],
)
@pytest.mark.parametrize(
    ("crime", "verdict", "words"),
    [
        ("not a number", WorkerError, "lm_head output of this step is not finite"),
        ("fails", RemoteError, "this worker has better things to do"),
        ("sends no tensor", ProtocolError, "0 tensors where 1 are due"),
        ("sends half of the rows", ProtocolError, "bytes where"),
        ("never answers", WorkerLost, "stopped answering|sent probes instead"),
    ],
)
def test_with_more_on_the_worker_a_broken_answer_gives_no_token(
    crime: str,
    verdict: type[WorkerError],
    words: str,
    options: dict[str, Any],
    group: str,
    worker: LyingWorker,
    sampled: list[int],
) -> None:
    options = {"privacy": "open", "pad_memory": None, "shm": False, **options}
    if crime == "never answers":
        options["timeout"] = IMPATIENCE_S
    with (
        private(worker, Order(crime, 1, group), **options) as llm,
        pytest.raises(WorkerError, match=words) as caught,
    ):
        complete(llm)
    assert caught.type is verdict
    assert sampled == []


@pytest.mark.parametrize("field", ["wide", "compact"])
@pytest.mark.parametrize("key", [(0, "qkv"), (1, "down"), (-1, "lm_head")])
def test_a_wrong_product_of_a_pad_is_noticed(
    key: tuple[int, str],
    field: str,
    worker: LyingWorker,
    sampled: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = DirectProvider.make

    def make_wrong(
        provider: DirectProvider, asked: LinearGroup, pads: Pads, place: list[int]
    ) -> None:
        make(provider, asked, pads, place)
        if place_of(asked) == key:
            last = place[-1], -1
            pads.u_NF[last] = (pads.u_NF[last] + 1) % FIELDS[field].p

    monkeypatch.setattr(DirectProvider, "make", make_wrong)
    assert name(*key) in fails(worker, Order(), IntegrityError, sampled, field=field)


def test_a_worker_may_try_eight_times_and_then_nothing_is_offloaded(
    worker: LyingWorker, limit: FailureLimit, sampled: list[int]
) -> None:
    for _ in range(MAX_FAILURES):
        assert not limit.reached
        fails(worker, Order("zeros"), IntegrityError, sampled)
    assert limit.reached
    with pytest.raises(IntegrityError, match="nothing is offloaded any more"):
        private(worker)  # an honest one by now, but who would know
    with LLM(MODEL, privacy="tee") as llm:
        assert len(complete(llm)) == TOKENS


def test_sessions_that_were_begun_before_give_no_further_tries(
    worker: LyingWorker, limit: FailureLimit
) -> None:
    order = Order("zeros")
    with ExitStack() as stack:
        sessions = [stack.enter_context(private(worker, order)) for _ in range(MAX_FAILURES + 2)]
        messages = []
        for llm in sessions:
            with pytest.raises(IntegrityError) as caught:
                complete(llm)
            messages.append(str(caught.value))
    tried = [message for message in messages if "wrong product" in message]
    assert len(tried) == MAX_FAILURES
    assert all("nothing is offloaded any more" in message for message in messages[MAX_FAILURES:])


# From here on without a process: the check itself, bit by bit and at length.


class Checked:
    """One group with an honest answer, to be corrupted."""

    def __init__(self, linear: LinearGroup, weights: IntegerWeights, field: Field) -> None:
        self.field = field
        self.pool = RowPool(1)
        self.group: Group[Any]
        self._weight_FD = weights.weight_FD
        if field is LATTICE:
            load = LatticeLoad({linear: linear.shape}, {})
            load.add(linear, weights)
            self.group = load.groups[linear]
            self._provider: PadProvider = load.provider(0)
        else:
            self.group = MaskedGroup(linear, weights, None, field)
            self._provider = DirectProvider({linear: weights.weight_FD}, field)
        self._made, self._taken = Pads.empty(0, 1, 1, field), 0
        self.refresh()

    def _make(self) -> None:
        linear = self.group.linear
        rows = self._provider.rows_made(linear, 1)
        self._made = Pads.empty(rows, self.group.width, self.group.features, self.field)
        self._provider.make(linear, self._made, list(range(rows)))
        self._taken = 0

    def refresh(self, x_1D: Tensor | None = None, pads: Pads | None = None) -> None:
        """Another input, another pad, and the right answer."""
        group, each = self.group, self.field.residue_bytes
        x_1D = torch.randn(1, group.width) if x_1D is None else x_1D
        if pads is None:
            if self._taken == len(self._made):
                self._make()
            pads = self._made[self._taken : self._taken + 1]
            self._taken += 1
        c_1B = torch.empty(1, each * group.width, dtype=torch.uint8)
        self.masked = group.mask(x_1D, pads.r_ND, c_1B, self.pool)
        self.u_1F = pads.u_NF
        c_1D = torch.from_numpy(np.empty((1, group.width), self.field.dtype))
        residue_bytes.unpack(c_1B.numpy(), self.field, c_1D.numpy())
        z_1F = torch.empty(1, group.features, dtype=c_1D.dtype)
        residue_product(c_1D, self._weight_FD, self.field, z_1F)
        self.z_1B = torch.empty(1, each * group.features, dtype=torch.uint8)
        residue_bytes.pack(z_1F.numpy(), self.field, self.z_1B.numpy())

    def product(self) -> Tensor:
        y_1F = torch.empty(1, self.group.features)
        self.group.unmask(self.z_1B, self.u_1F, self.masked, y_1F, "It", self.pool)
        return y_1F

    def is_refused(self) -> bool:
        try:
            self.product()
        except IntegrityError:
            return True
        return False

    @property
    def bits(self) -> int:
        return 8 * self.z_1B.numel()


@cache
def integer_weights() -> dict[LinearGroup, IntegerWeights]:
    checkpoint = open_checkpoint(MODEL)
    weights: dict[LinearGroup, IntegerWeights] = {}
    load_integers(checkpoint, weights.__setitem__)
    checkpoint.close()
    return weights


def a_group() -> tuple[LinearGroup, IntegerWeights]:
    return next(item for item in integer_weights().items() if place_of(item[0]) == (0, "o"))


def missed(checked: Checked, bits: Sequence[int]) -> int:
    """How many of these flips, one at a time, are not noticed."""
    count = 0
    for bit in bits:
        flip(checked.z_1B, bit)
        count += not checked.is_refused()
        flip(checked.z_1B, bit)
    assert not checked.is_refused()  # the answer is right again
    return count


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_every_single_bit_of_an_answer_matters(field: Field) -> None:
    checked = Checked(*a_group(), field)
    assert missed(checked, range(checked.bits)) == 0


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_p_in_the_place_of_zero_is_refused(field: Field) -> None:
    checked = Checked(*a_group(), field)
    width, features = checked.group.width, checked.group.features
    zero = Pads.empty(1, width, features, field)
    zero.r_ND[:] = zero.u_NF[:] = 0
    checked.refresh(torch.zeros(1, width), zero)  # so that the answer is zero, too
    assert not checked.is_refused()
    z_1F = np.zeros((1, features), field.dtype)
    z_1F[0, 1] = field.p
    residue_bytes.pack(z_1F, field, checked.z_1B.numpy())
    assert checked.is_refused()


def missed_at_random(field: Field, flips: int) -> int:
    """Random bits of answers of all groups, each with inputs and pads of its own."""
    random = np.random.default_rng(0)
    count, each = 0, 50
    groups = [Checked(*item, field) for item in integer_weights().items()]
    for checked in itertools.islice(itertools.cycle(groups), flips // each):
        checked.refresh()
        count += missed(checked, random.integers(checked.bits, size=each).tolist())
    return count


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_none_of_a_thousand_flipped_bits_is_missed(field: Field) -> None:
    assert missed_at_random(field, 1000) == 0


@pytest.mark.slow
@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_none_of_a_hundred_thousand_flipped_bits_is_missed(field: Field) -> None:
    assert missed_at_random(field, 100_000) == 0


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_what_is_checked_is_what_is_used_while_memory_changes(field: Field) -> None:
    # So many that reading them takes longer than changing one; the loops of lattice are slower.
    features = 100_000 if field is LATTICE else 400_000
    weight_FD = torch.randint(-127, 128, (features, 4), dtype=torch.int8)
    checked = Checked(
        LinearGroup(0, "o", features, 4), IntegerWeights(weight_FD, torch.ones(features)), field
    )
    right_1F = checked.product()
    stop = threading.Event()
    thread = threading.Thread(target=keep_changing, args=(checked.z_1B, stop))
    thread.start()
    refused = taken = 0
    end = time.monotonic() + DEADLINE_S
    try:
        while min(refused, taken) < 100 and time.monotonic() < end:
            try:
                y_1F = checked.product()
            except IntegrityError:
                refused += 1
            else:
                taken += 1
                assert torch.equal(y_1F, right_1F)
    finally:
        stop.set()
        thread.join()
    assert min(refused, taken) > 0


def keep_changing(z_1B: Tensor, stop: threading.Event) -> None:
    while not stop.is_set():
        flip(z_1B, 4 * z_1B.numel() + 29)  # in the middle, and not lost in rounding
        time.sleep(0)  # lets the other thread have the interpreter
