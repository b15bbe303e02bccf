"""What makes a run break, and a change may take away: mechanisms of precision and of the optimiser.

Those of a network are its owner's (`words.remedies`): a change carries its own.
"""

from typing import NamedTuple


class Mechanism(NamedTuple):
    """What makes a run break."""

    name: str
    means: str = ''  # for a person
    # How much of a run it concerns. Of several the narrowest is named: what takes it away hardly touches the others.
    breadth: int = 1000
    # Of the network: not named where shorter steps avert the symptom, too, since they change less.
    wide: bool = False


KNOWN = (
    Mechanism('low precision', 'rounding takes digits that training needs', 0),
    Mechanism('missing bias correction', 'means that start at zero make the first steps too long', 1),
    Mechanism('vanishing steps', 'steps are too short to learn anything more', 3),
    Mechanism('second-moment decay', "Adam's v decays in quiet steps until the next ones are too long", 4),
    Mechanism('outrun second moment', 'gradients grow faster than v, their squared mean, follows', 5),
    Mechanism('outlying gradients', 'single gradients far above the others throw the weights off', 6),
    Mechanism('edge of stability', 'the loss curves more along a step than steps of this length can bear', 7),
)
"""The narrowest first. A change that makes all steps shorter takes away none in particular."""

LOW_PRECISION = KNOWN[0]
