"""Words that two sides of a mailbox read and write at the same time."""

import re
import threading
import time

import numpy as np
import pytest

from tsqp.algebra.compiler import numba
from tsqp.wire import shared_words
from tsqp.wire.mailbox import CAN_POLL, MAILBOX_BYTES, MAX_SKIPPED, Mailbox
from tsqp.wire.patience import Patience
from tsqp.wire.shared_words import CAN_ORDER, await_word, spins_in

pytestmark = pytest.mark.skipif(not CAN_POLL or not CAN_ORDER, reason="no mailboxes here")


def compiled_for(triple: str, *, is_x86: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    """The assembly of a store, a fence, a pause and a load, in this order."""
    binding = pytest.importorskip("llvmlite.binding")
    monkeypatch.setattr(shared_words, "_IS_X86", is_x86)
    ir = numba().core.cgutils.ir
    word = ir.IntType(64)
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(word, [word, word]), "all_of_it")
    builder = ir.IRBuilder(function.append_basic_block())
    shared_words._build_store(builder, function.args)
    shared_words._build_fence(builder, ())
    shared_words._build_pause(builder, ())
    builder.ret(shared_words._build_load(builder, [function.args[1]]))
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    machine = binding.Target.from_triple(triple).create_target_machine()
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    return str(machine.emit_assembly(parsed))


def test_arm64_stores_with_release_fences_and_loads_with_acquire(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = compiled_for("aarch64-unknown-linux-gnu", is_x86=False, monkeypatch=monkeypatch)
    assert re.search(r"stlr\s.*dmb\s+ish\b.*isb.*(ldar|ldapr)\s", made, re.DOTALL)


def test_x86_fences_between_a_store_and_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiled_for("x86_64-unknown-linux-gnu", is_x86=True, monkeypatch=monkeypatch)
    assert re.search(r"movq\s.*(mfence|lock).*pause.*movq\s", made, re.DOTALL)


def test_a_wait_ends_when_another_thread_stores_the_word() -> None:
    word = np.zeros(1, np.int64)
    threading.Timer(0.02, word.fill, [3]).start()
    began = time.monotonic()
    while not await_word(word.ctypes.data, 3, 100, 10) and time.monotonic() - began < 30:
        pass
    assert word[0] == 3


@pytest.mark.parametrize("looks", [(0, 0), (50, 0), (0, 5)])
def test_a_wait_for_a_word_that_never_comes_ends(looks: tuple[int, int]) -> None:
    word = np.full(1, 4, np.int64)
    assert not await_word(word.ctypes.data, 5, *looks)


def test_a_longer_time_has_more_spins() -> None:
    assert 0 < spins_in(1e-6) < spins_in(1e-3)


def test_a_side_spins_rarely_while_its_peer_is_slow() -> None:
    memory = memoryview(bytearray(MAILBOX_BYTES))
    mailbox, peer = Mailbox(memory, "tee"), Mailbox(memory, "worker")
    spins: list[int] = []
    take = mailbox._in.take

    def note(count: int = 0) -> bytes | None:
        spins.append(count)
        return take(count)

    mailbox._in.take = note  # type: ignore[method-assign]
    for _ in range(1000):
        assert mailbox.take_soon() is None
    assert 1000 // MAX_SKIPPED <= sum(map(bool, spins)) < 1000 // MAX_SKIPPED + 8
    peer.post(b"now")  # this says nothing about the use of spinning
    assert mailbox.take_soon() == b"now"
    assert spins[-1] == 0


def test_polling_is_skipped_for_longer_after_each_failure_until_it_is_of_use() -> None:
    patience = Patience(7)

    def skipped() -> int:
        count = 0
        while not patience.may_poll():
            count += 1
        return count

    found = []
    for _ in range(6):
        found.append(skipped())
        patience.note(polled=True, useful=False)
    assert found == [0, 1, 3, 7, 7, 7]
    assert skipped() == 7
    patience.note(polled=False, useful=True)
    assert skipped() == 0
