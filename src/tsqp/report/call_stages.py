"""One call as the stages that it went through, in order."""

from collections.abc import Iterator

from tsqp.report.phases import CALL_PARTS, call_parts_us
from tsqp.tee.call_lines import CallLine

AWAY = "away"  # the trusted side was at work elsewhere, and the call on its way


def stages(call: CallLine, begin_us: float) -> Iterator[tuple[str, float, float]]:
    """The parts of a call, CALL_PARTS and AWAY, with begin and end in microseconds.

    Where in the wait the worker computed is not known: it is put in the middle, so that "link"
    comes twice. Parts without length are left out.

    Args:
        begin_us: the moment that counts as 0, in microseconds of unix time.
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
