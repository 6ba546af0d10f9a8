"""Divides one call into its stages, in order."""

from collections.abc import Iterator

from tsqp.report.phases import CALL_PARTS, call_parts_us
from tsqp.tee.call_lines import CallLine

AWAY = "away"  # the TEE did other work while the call was in flight


def stages(call: CallLine, begin_us: float) -> Iterator[tuple[str, float, float]]:
    """The parts of a call (CALL_PARTS and AWAY), with their begin and end in microseconds.

    It is not known when during the wait the worker computed. Its time is placed in the middle, so
    "link" appears twice. Empty parts are left out.

    Args:
        begin_us: the time that counts as 0, in microseconds of Unix time.
    """
    parts = dict(zip(CALL_PARTS, call_parts_us(call), strict=True))
    half = parts["link"] / 2
    in_order = (
        ("pads", parts["pads"]),
        ("mask", parts["mask"]),
        ("serialise", parts["serialise"]),
        ("send", parts["send"]),
        (AWAY, call.away_us),
        ("link", half),
        ("worker compute", parts["worker compute"]),
        ("link", half),
        ("receive", parts["receive"]),
        ("unmask", parts["unmask"]),
    )
    begin = call.time * 1e6 - begin_us
    for part, length in in_order:
        if length:
            yield part, begin, begin + length
        begin += length
