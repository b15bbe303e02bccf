"""Experiments on one symptom: what becomes of it under a change, within a budget of steps.

What to try next is a matter of `strategies`, what records say of `verdict`, how a change is replayed of `replays`.
Knows nothing of networks: a change is another step, other batches, or another state to start from.
"""

from collections.abc import Hashable, Sequence
from pathlib import Path

from jaxrnn import detect, progress
from jaxrnn.bisect.replay import Subject
from jaxrnn.detect import Detector
from jaxrnn.diagnosis import Symptom
from jaxrnn.experiment import cache
from jaxrnn.experiment.changes import nudged, step_of
from jaxrnn.experiment.outcome import AVERTED, NOT_POSSIBLE, UNCHANGED, Change, Changed, Outcome
from jaxrnn.experiment.replays import Budget, ChangeReplayer
from jaxrnn.experiment.verdict import final_loss, has_effect, judge_of
from jaxrnn.experiment.window import Window
from jaxrnn.record.records import Row, same, series
from jaxrnn.types import UserError

BUDGET = 2000
"""Steps that changes are replayed, where nobody says how many."""

MOST_BUDGET = 8000
"""Likewise, of a long run."""


def budget_for(symptom: int) -> int:
    """Steps that changes of a run are replayed, where nobody says how many: twice those that it took to its symptom, so
    that a diagnosis takes no more than twice as long as the training did; BUDGET at least, MOST_BUDGET at most."""
    return min(max(2 * symptom, BUDGET), MOST_BUDGET)


def most_for(symptom: int) -> int:
    """What such a budget grows to at most where each change takes more steps: a diagnosis of a long run still takes no
    more than twice as long as its training."""
    return max(2 * symptom, MOST_BUDGET)


class Experiments:
    """Experiments on one symptom of a run.

    Args:
        subject: the run, with its step.
        symptom: what it suffers from, as a bisect proved it.
        window: the steps to be replayed, of `window_of`.
        detectors: what counts as a symptom, gravest first; that of the symptom's kind among them.
        budget: steps that may be replayed in all.
        keep: a file for outcomes, which another process' experiments on the same symptom go on from.
        began: when the symptom began, its own step if not given.
    """

    def __init__(
        self,
        subject: Subject,
        symptom: Symptom,
        window: Window,
        detectors: Sequence[Detector] = detect.DETECTORS,
        *,
        budget: int,
        keep: Path | None = None,
        began: int | None = None,
    ):
        self.subject, self.window = subject, window
        self.began = symptom.step if began is None else began
        self._asked = symptom, detectors, window, began
        self.judge = judge_of(subject.columns(), subject.loss, *self._asked)
        self.budget = Budget(budget)
        self._cache = cache.OutcomeCache(None, '')
        if keep is not None and subject.records:
            scope = cache.scope(subject.records, symptom, window, self.judge.detectors)
            self._cache = cache.OutcomeCache(keep, scope)
        self.replayer = ChangeReplayer(subject, window.start, self.budget)
        self._history = self.replayer.rows_before(window.start, self.judge.lookback)
        self._control: list[Row] = []
        self._controlled: tuple[Outcome, bool] | None = None
        self._judge_by([])
        self._nudged: list[Row] = []
        self._by_key: dict[Hashable, Outcome] = {}

    def control(self, ahead: Sequence[Change] = ()) -> tuple[Outcome, bool]:
        """The steps as they were, and whether they gave the run's records bit for bit.

        Args:
            ahead: changes to be compiled meanwhile.
        """
        if self._controlled is not None:
            self._compile_ahead(ahead)
            return self._controlled
        start = self.window.start
        self.replayer.load()
        self._compile_ahead(ahead)
        self._control = self.replayer.control(self.window.symptom + 1)
        self._judge_by(self._control)
        recorded = self.subject.recorded
        shared = [(recorded.at(row['step']), row) for row in self._control]
        identical = all(same(before, row) for before, row in shared if before is not None)
        unchanged = Change('none', '', lambda: Changed(step_of(self.subject), self.subject.batch_at))
        outcome = self._outcome(unchanged, self._control, start)
        if self.judge.shows([*self._history_before(start), *self._control]):
            symptom = self.judge.symptom
            if self.window.lasting:
                symptom = Symptom(symptom.kind, self._control[-1]['step'])
            outcome = outcome._replace(symptom=symptom, verdict=UNCHANGED)
        else:
            outcome = outcome._replace(verdict=AVERTED, symptom=None)
        self._controlled = outcome, identical
        return self._controlled

    def _judge_by(self, rows: Sequence[Row]) -> None:
        """A run without records is judged by what was replayed of it."""
        rows = [*self._history, *rows]
        if not self.subject.records and rows:
            self.judge = judge_of(series(rows), self.subject.loss, *self._asked)

    def nudge(self) -> Outcome | None:
        """The steps from a state moved by a millionth; None where the budget doesn't reach so far."""
        start, horizon = self.window.start, self.window.horizon
        if not self.budget.allows(self.window.length):
            return None
        change = nudged(self.subject)
        try:
            self._nudged = self._replay(change, start, horizon)
        except Exception as error:  # whatever JAX or the user's step raises
            return _not_possible(change, start, error)
        return self._outcome(change, self._nudged, start)

    def longer(self, horizon: int) -> None:
        """From now on outcomes are judged up to a later horizon."""
        self.window = self.window._replace(horizon=horizon)
        self.judge = self.judge._replace(window=self.window)
        self._by_key.clear()

    def outcome_of(self, change: Change, *, ahead: Sequence[Change] = ()) -> Outcome | None:
        """As `attempt` over the whole window; of changes that come to the same one is replayed."""
        known = None if change.key is None else self._by_key.get(change.key)
        if known is not None:
            return known._replace(change=change)
        outcome = self.attempt(change, ahead=ahead)
        if outcome is not None and change.key is not None:
            self._by_key[change.key] = outcome
        return outcome

    def attempt(
        self,
        change: Change,
        *,
        start: int | None = None,
        horizon: int | None = None,
        ahead: Sequence[Change] = (),
    ) -> Outcome | None:
        """What becomes of the symptom under a change.

        Args:
            change: what is done otherwise.
            start: the step at which it is switched on; the window's, or the run's first for a change of what a run
                starts from.
            horizon: the step after the last; the window's if not given.
            ahead: changes to be compiled meanwhile, if the budget will reach to one more.

        Returns:
            None where the budget doesn't reach the horizon, or there is no checkpoint to start from.
        """
        start = self._start_of(change) if start is None else start
        horizon = self.window.horizon if horizon is None else horizon
        steps = horizon - start
        if start < self.subject.checkpoints.steps()[0] or not self.budget.allows(steps):
            return None
        cached = self._cache.get(change.identity, start, horizon)
        if cached is not None:
            # As if it were replayed now, or else what the budget allows would be another choice of changes.
            self.budget.spent += cached.steps
            return Outcome(
                change, cached.verdict, cached.symptom, cached.loss, cached.reached, acted=cached.acted,
                losses=cached.losses,
            )  # fmt: skip
        before = self.budget.spent
        try:
            rows = self._replay(change, start, horizon, ahead)
        except Exception as error:  # a change that can't be made is an outcome, not the end
            return _not_possible(change, start, error)
        outcome = self._outcome(change, rows, start)
        known = cache.CachedOutcome(
            outcome.verdict, outcome.symptom, outcome.loss, outcome.reached, outcome.acted,
            steps=self.budget.spent - before, losses=outcome.losses,
        )  # fmt: skip
        self._cache.put(change.identity, start, horizon, known)
        return outcome

    def _replay(self, change: Change, start: int, horizon: int, ahead: Sequence[Change] = ()) -> list[Row]:
        """Records up to the horizon, or until something shows."""
        self.replayer.doing = f'replaying under a change: {change.name}'
        progress.told(self.replayer.doing, self.budget.spent, self.budget.steps)
        compiled = self.replayer.compiled(change).result()
        if self.budget.allows(2 * (horizon - start)):
            self._compile_ahead(ahead)
        history = self._history_before(start)
        return self.replayer.under(
            compiled,
            start,
            horizon,
            lambda rows, since: self.judge.ended([*history, *_judged(change, rows)], start),
        )

    def _outcome(self, change: Change, rows: Sequence[Row], start: int) -> Outcome:
        found = self.judge.found([*self._history_before(start), *_judged(change, rows)], start)
        reached = rows[-1]['step'] + 1 if rows else self.window.start
        loss = self.subject.loss
        acted = has_effect(rows, self._control, self._nudged, loss)
        return Outcome(
            change, found.verdict, found.symptom, final_loss(rows, loss), reached, acted=acted,
            losses=_losses(rows, loss),
        )  # fmt: skip

    def _history_before(self, step: int) -> list[Row]:
        """The unchanged run's records before a step, as far as the rules read."""
        return [row for row in (*self._history, *self._control) if row['step'] < step]

    def _start_of(self, change: Change) -> int:
        return 0 if change.initial else self.window.start

    def on_batch(self, step: int) -> Row | None:
        """The record of the last ordinary state on the batch of another step; None where there is no such batch.

        It is the state that the step starts from with which the symptom began; of one that lasts the window's first.
        """
        last = self.window.start if self.window.lasting else min(self.began, self.judge.symptom.step)
        try:
            return self.replayer.on_batch(step, max(last, self.window.start))
        except Exception:  # of the user's batch_at, asked for a step that the run did not reach
            return None

    def _compile_ahead(self, changes: Sequence[Change]) -> None:
        """Those whose outcome isn't cached."""
        for change in changes:
            if self._cache.get(change.identity, self._start_of(change), self.window.horizon) is None:
                self.replayer.compiled(change)


def _losses(rows: Sequence[Row], loss: str | None) -> tuple[float, ...]:
    """Of four digits: they are looked at, not computed with."""
    return (
        tuple(float(f'{row[loss]:.4g}') for row in rows)
        if loss is not None and rows and loss in rows[0]
        else ()
    )


def _judged(change: Change, rows: Sequence[Row]) -> Sequence[Row]:
    return [row for row in rows if row['step'] not in change.unjudged]


def _not_possible(change: Change, start: int, error: Exception) -> Outcome:
    lines = str(error).strip().splitlines()
    said = lines[0] if lines else ''
    why = said if isinstance(error, UserError) else f'{type(error).__name__}: {said}'.rstrip(': ')
    return Outcome(change, NOT_POSSIBLE, None, float('nan'), start, why=why[:MOST_SAID])


MOST_SAID = 200
"""Characters of what was raised."""
