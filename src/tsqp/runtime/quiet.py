"""Whether a command was asked to say less: --quiet."""

import logging

_notes = logging.getLogger("tsqp.notes")


def set_quiet(quiet: bool) -> None:
    """Say, or do not say, what a run logs below warnings, and what `is_quiet` is asked about."""
    for logger in (logging.getLogger("tsqp"), _notes):
        logger.setLevel(logging.WARNING if quiet else logging.INFO)


def is_quiet() -> bool:
    """Whether progress, notes and statistics are left out."""
    return _notes.level > logging.INFO
