"""A clock that cannot be set, and does not stop."""

import time

# On Linux, CLOCK_MONOTONIC stops while the machine sleeps. Elsewhere it does not, or there is
# nothing better.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def seconds() -> float:
    """Seconds since a fixed moment, which also pass while the machine sleeps."""
    return time.clock_gettime(_CLOCK)
