"""Transports are measured with real processes, which end with the measurement."""

import pytest

from tsqp.bench.transports import Ways, _mailbox_only
from tsqp.wire.mailbox import CAN_POLL


def test_a_transport_with_and_without_shared_memory_is_measured() -> None:
    with Ways() as ways:
        shared, inline = (ways.measure("ipc", shared, 20) for shared in (True, False))
    assert shared.transport == ("poll" if CAN_POLL else "shm")
    assert inline.transport == "inline"
    for found in (shared, inline):
        assert 0 < found.median_us <= found.p99_us
        assert found.bytes_per_s > 0


@pytest.mark.skipif(not CAN_POLL, reason="no mailboxes here")
def test_the_mailbox_is_measured_without_a_worker() -> None:
    found = _mailbox_only(50)
    assert 0 < found.median_us <= found.p99_us
