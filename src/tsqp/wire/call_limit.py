"""Limits the work of one call, so that no client blocks a worker for long.

A worker announces the maximum of multiply-accumulates per call in its Welcome and refuses larger
calls. The TEE splits its calls by rows, so honest clients never reach the limit.
"""

from tsqp.errors import HandshakeError, ProtocolError

CALL_MACS = {"cpu": 2**33, "cuda": 2**42}  # by device type; takes some tenths of a second
MAX_RESIDUES = 2**26  # per call, in and out; on any device, the CPU processes them


def call_macs(device: str, row_macs: int) -> int:
    """The limit that a worker announces.

    Args:
        device: type of a torch device.
        row_macs: multiply-accumulates of the most expensive row. A row cannot be split.
    """
    return max(CALL_MACS[device], row_macs)


def check_call(macs: int, most: int) -> None:
    """Raise ProtocolError if a call needs more multiply-accumulates than allowed."""
    if macs > most:
        raise ProtocolError(
            f"A call asks for {macs} multiply-accumulates, but this worker allows at most {most} "
            "in one call; split it by rows."
        )


def check_residues(residues: int) -> None:
    """Raise ProtocolError if a call has more residues, in and out, than allowed."""
    if residues > MAX_RESIDUES:
        raise ProtocolError(
            f"A call has {residues} residues, but at most {MAX_RESIDUES} are allowed; split it by "
            "rows."
        )


def check_row_fits(row_macs: int, most: int, endpoint: str) -> None:
    """Raise HandshakeError unless the most expensive row of a model fits into one call."""
    if row_macs > most:
        raise HandshakeError(
            f"Refused the worker at {endpoint}: it does {most} multiply-accumulates at most in one "
            f"call, and one row of this model needs {row_macs}; use another worker."
        )


def rows_within(most: int, row_macs: int) -> int:
    """The number of rows that fit into one call; at least 1."""
    return max(1, most // row_macs)


def residue_rows_within(most: int, features: int, width: int) -> int:
    """The same for rows of residues of a group with `features` outputs and `width` inputs."""
    return min(rows_within(most, features * width), max(1, MAX_RESIDUES // (features + width)))


def attention_macs(heads: int, head_dim: int, spans: list[tuple[int, int]]) -> int:
    """Multiply-accumulates of queries times keys, or of attention weights times values.

    Args:
        spans: for each span, the number of query rows and of tokens that each row attends to.
    """
    return heads * head_dim * sum(rows * tokens for rows, tokens in spans)
