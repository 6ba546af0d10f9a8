"""Where a result was measured."""

from tsqp import __version__, _machine


def describe_machine() -> dict[str, str]:
    """Processor, versions, commit and date."""
    return _machine.describe_machine(__version__)
