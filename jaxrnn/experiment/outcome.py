"""What is done otherwise in an experiment, and what became of the symptom: plain data."""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax

from jaxrnn.bisect.inspection import Inspection
from jaxrnn.diagnosis import Symptom
from jaxrnn.experiment.mechanisms import Mechanism
from jaxrnn.experiment.window import Window
from jaxrnn.types import BatchAt, Step, Tree, UserError

VERDICTS = ('averted', 'delayed', 'unchanged', 'worse', 'not possible')
"""The best first; the last of a change that can't be made, traced or run."""

AVERTED, DELAYED, UNCHANGED, WORSE, NOT_POSSIBLE = VERDICTS


OTHER_BATCHES = 'other batches'
"""Name of the change that is evidence alone: nobody can train on other batches than there are."""

MARGINS = (1, 2, 4)
"""Factors by which steps are made longer under a change that averts a symptom, to see how far it is from the edge. Of
the demo's single remedies, on from the start, those that tolerate 1 collapsed before step 2,000, those that tolerate 2
between 2,600 and 3,800 or never, the one that tolerates 4 at 5,603 or never (benchmarks/README.md)."""


class Changed(NamedTuple):
    """What a change makes of a run: another step, other batches, another state to start from.

    >>> halved = Changed(lambda x, batch: (x / 2, {'loss': x}), lambda k: 0.0)
    >>> halved.step(8.0, halved.batch_at(3))
    (4.0, {'loss': 8.0})
    """

    step: Step
    batch_at: BatchAt
    convert: Callable[[Tree], Tree] = lambda state: state  # the run's state -> the changed run's
    wide: bool = False  # whether it is computed where there are 64-bit types
    # A state as the changed run's, or the function that makes one: for a state that holds more than numbers, as flax's
    # TrainState holds its optimiser. The run's numbers are put into its structure.
    like: Tree = None

    def state(self, state: Tree) -> Tree:
        """What the changed run starts from instead of a state of the run's. Raises UserError where `like` has other
        numbers than the run's state has."""
        state = self.convert(state)
        if self.like is None:
            return state
        wanted, structure = jax.tree.flatten(self.like() if callable(self.like) else self.like)
        leaves = jax.tree.leaves(state)
        if len(wanted) != len(leaves):
            raise UserError(
                f'like: {len(wanted)} numbers and tensors found, {len(leaves)} as in the run expected; give '
                'convert= for a state with others'
            )
        return jax.tree.unflatten(structure, leaves)


class Change(NamedTuple):
    """One thing done otherwise, to be tried by `jaxrnn.diagnose`.

    >>> def clipped(x, batch):
    ...     return x - min(batch, 1.0), {'loss': x}
    >>> change = Change('clip at 1', 'optimiser', lambda: Changed(clipped, lambda k: 9.0), '--clip=1')
    >>> made = change.make()
    >>> made.step(5.0, made.batch_at(0))
    (4.0, {'loss': 5.0})
    """

    name: str
    points_to: str  # what it changes: data, model, optimiser, precision; '' of a baseline
    make: Callable[[], Changed]
    flags: str = ''  # by which training has it
    means: str = ''  # why it may help, for a person
    removes: Mechanism | None = None  # the mechanism that it takes away; None where it would help against any
    key: Hashable = None  # what it makes of the run, if known: changes of equal keys are replayed once
    # Whether it acts on what a run starts from, so that it's replayed from the run's first step.
    initial: bool = False
    # The same as text that holds from one process to the next; '' where there is none: it is replayed anew each time.
    identity: str = ''
    # Whether it keeps away from the batch that breaks the run, and so says nothing of the next one like it: evidence of
    # the cause, and the last thing to advise.
    avoids: bool = False
    # How many times as short its steps are, if that is all it does, which helps against almost anything for a while;
    # 0 if it does something else.
    shortens: float = 0
    # Steps whose records say nothing of whether it averts: of one that takes back what a step did.
    unjudged: tuple[int, ...] = ()
    # Whether that it averts outweighs that shorter steps do, too.
    decides: bool = False
    # What it comes to at the steps that are replayed, where that isn't what it is from a run's start: a rate that has
    # decayed by then is a small one all at once.
    here: str = ''
    # Whether its steps go on getting shorter after the steps that are replayed.
    decays: bool = False
    # Itself with steps so many times as long; None where that is the run as it was, which broke.
    stressed: 'Callable[[int], Change | None] | None' = None


class Outcome(NamedTuple):
    """What became of the symptom."""

    change: Change
    verdict: str  # of VERDICTS
    symptom: Symptom | None  # what showed, if anything did
    loss: float  # median of the last steps up to the horizon that all share; NaN where there is none, or not finite
    reached: int  # the step after the last
    point_of_no_return: int | None = None  # the last step from which on the change still averts
    margin: int | None = (
        None  # of MARGINS, by how much longer steps may be until it no longer averts; None: not asked
    )
    acted: bool = (
        True  # whether it moved any loss farther than a nudge did: a clipping that never clips doesn't
    )
    why: str = ''  # of one that is not possible
    losses: tuple[float, ...] = ()  # of the steps under it, up to the one before `reached`


class Level(NamedTuple):
    """A loss that stood still."""

    loss: float  # the median of the last steps before a window
    steps: int  # for which it had, at least


class Beginning(NamedTuple):
    """What a change makes of a run's first steps, where it is on from the first of them."""

    step: int  # the one after the last
    loss: float  # median of the last steps
    own: float  # the same of the run
    symptom: Symptom | None  # what showed, if anything did

    @property
    def held_up(self) -> bool:
        """Whether training comes less far: to SLOWER times the run's own loss there, or to no finite one. Unknown of a
        loss that need not be positive."""
        return self.own > 0 and not self.loss <= SLOWER * self.own


SLOWER = 2
"""Of advice in the study at real size, on from the start, what learnt nothing in 954 steps had 4.5 times the run's loss
there; half the rate, decaying, with updates clipped, which does learn, 1.5 and 1.6 times (benchmarks/study)."""


class ExperimentReport(NamedTuple):
    """What all experiments gave."""

    window: Window | None  # None where there is no checkpoint before the symptom
    control: (
        Outcome | None
    )  # the steps as they were: 'unchanged' if they showed the symptom where the run had it
    identical: bool  # whether the control gave the run's records, bit for bit
    nudge: Outcome | None
    outcomes: tuple[Outcome, ...] = ()  # the best first
    chosen_at_random: Outcome | None = None  # one of them
    untried: tuple[Change, ...] = ()  # for want of budget
    steps_replayed: int = 0
    inspected: Inspection | None = None  # the first bad step
    stood: Level | None = None  # the loss before the window, if it had stood still
    beginning: Beginning | None = None  # of the best, where it is known
