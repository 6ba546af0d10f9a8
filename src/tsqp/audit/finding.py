"""The result of one attack."""

from dataclasses import dataclass

ABOVE_CHANCE = 1e-6  # significance level of a whole audit


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one attack on one recording, or on two.

    Attributes:
        attack: name of the attack.
        subject: the worker or workers whose recordings were attacked.
        found: how much the attack found, in units of `unit`.
        of: the maximum of `found`, if there is one.
        chance: the expected value of `found` in noise.
        p: probability that noise gives at least `found`; None if it does not apply, as `note`
            explains.
        counted: whether it counts for the verdict; a demonstration does not.
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
