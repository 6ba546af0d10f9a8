"""The option --quiet."""

import logging

_notes = logging.getLogger("tsqp.notes")


def set_quiet(quiet: bool) -> None:
    """Turn messages below warnings, and everything that asks `is_quiet`, off or on."""
    for logger in (logging.getLogger("tsqp"), _notes):
        logger.setLevel(logging.WARNING if quiet else logging.INFO)


def is_quiet() -> bool:
    """Whether progress, notes and statistics are left out."""
    return _notes.level > logging.INFO
