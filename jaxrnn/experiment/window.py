"""Which steps an experiment replays."""

from typing import NamedTuple

from jaxrnn.bisect.replay import Subject

LEAD = 60
"""Steps before a symptom from which on a change acts, at least: most remedies must act for a while."""

AFTER = 50
"""Steps after a symptom through which a change must hold."""

FAR = 160
"""Steps before a symptom, or when it began, from which on a change acts, at most: where checkpoints are far apart what
leads to the first of them is replayed once, unchanged."""

ALIVE = 200
"""Steps after which a network that did not start to learn must have started under a change."""


class Window(NamedTuple):
    """The steps of an experiment."""

    start: int  # at or after a checkpoint
    symptom: int  # its step; of a state that lasts, the one at which it is looked for
    horizon: int  # the step after the last
    lasting: bool = False  # whether the symptom is a state that set in long before its rule reported it

    @property
    def length(self) -> int:
        """Steps from the start to the horizon."""
        return self.horizon - self.start


def window_of(
    subject: Subject, step: int, began: int | None = None, *, lasting: bool = True
) -> Window | None:
    """From the newest checkpoint that gives changes time to act, else from the newest before the symptom; but from FAR
    steps before it at the earliest.

    Args:
        subject: the run.
        step: of the symptom.
        began: when the symptom began, its own step if not given. Changes must act from before that on.
        lasting: whether it is a state that a rule waited for. If that set in long before, the symptom is averted if the
            state is gone after ALIVE steps.

    Returns:
        None where there is no checkpoint before the symptom.
    """
    before = [at for at in subject.checkpoints.steps() if at <= step]
    if not before:
        return None
    began = step if began is None else began
    early = [at for at in before if at <= (step if lasting else began) - LEAD]
    start = max(early[-1] if early else before[0], (step if lasting else began) - FAR)
    if not lasting or began == step or began > start:
        return Window(start, step, step + 1 + AFTER)
    start = max(max((at for at in before if at <= began), default=before[0]), began - ALIVE // 2)
    return Window(start, start + ALIVE - 1, start + ALIVE, lasting=True)
