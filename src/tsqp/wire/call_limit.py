"""How much one call may ask of a worker, so that no client holds it for long.

A worker announces the most multiply-accumulates of one call in its Welcome. It refuses larger
calls, and the TEE splits its own by rows, so that honest clients never meet the limit.
"""

from tsqp.errors import HandshakeError, ProtocolError

CALL_MACS = {"cpu": 2**33, "cuda": 2**42}  # by device: some tenths of a second
MAX_RESIDUES = 2**26  # read, drawn and written by one call: the CPU's work, whatever the device


def call_macs(device: str, row_macs: int) -> int:
    """The limit that a worker announces.

    Args:
        device: type of a torch device.
        row_macs: of the dearest single row, which cannot be split and must fit.
    """
    return max(CALL_MACS[device], row_macs)


def check_call(macs: int, most: int) -> None:
    """Raise ProtocolError where a call asks for more multiply-accumulates than it may."""
    if macs > most:
        raise ProtocolError(
            f"A call asks for {macs} multiply-accumulates, where this worker does {most} at most "
            "in one call; split it by rows."
        )


def check_residues(residues: int) -> None:
    """Raise ProtocolError where a call has more residues, both ways, than it may."""
    if residues > MAX_RESIDUES:
        raise ProtocolError(
            f"A call has {residues} residues, where {MAX_RESIDUES} are allowed; split it by rows."
        )


def check_row_fits(row_macs: int, most: int, endpoint: str) -> None:
    """Raise HandshakeError unless the dearest row of a model fits into a call to a worker."""
    if row_macs > most:
        raise HandshakeError(
            f"Refused the worker at {endpoint}: it does {most} multiply-accumulates at most in one "
            f"call, and one row of this model needs {row_macs}; use another worker."
        )


def rows_within(most: int, row_macs: int) -> int:
    """How many rows fit into one call; at least 1."""
    return max(1, most // row_macs)


def residue_rows_within(most: int, features: int, width: int) -> int:
    """The same for rows of residues of a group with F `features` and D `width`."""
    return min(rows_within(most, features * width), max(1, MAX_RESIDUES // (features + width)))


def attention_macs(heads: int, head_dim: int, spans: list[tuple[int, int]]) -> int:
    """Of the products of queries and keys, or of weights and values.

    Args:
        spans: rows of queries, and tokens that each of them meets.
    """
    return heads * head_dim * sum(rows * tokens for rows, tokens in spans)
