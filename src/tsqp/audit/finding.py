"""What one attack found."""

from dataclasses import dataclass

ABOVE_CHANCE = 1e-6  # of all attacks of an audit together


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one attack on one recording, or on two.

    Attributes:
        attack, subject: its name, and whose recordings it was given.
        found: how much it found; what is counted, `unit` says.
        of: out of how many, where there is such a number.
        chance: what it would find in noise, on average.
        p: how likely it finds as much in noise; None if it does not apply, which `note` explains.
        counted: whether it decides about the audit; a demonstration does not.
    """

    attack: str
    subject: str
    unit: str
    found: float = 0.0
    of: int | None = None
    chance: float | None = None
    p: float | None = None
    note: str = ""
    counted: bool = True
