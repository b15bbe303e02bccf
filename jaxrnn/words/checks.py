"""The seven checks of the answer to stats.stackexchange 228920, each measured: name, verdict, number, reason. And what
the signals of a run say of its inside, where it has them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrnn import tree
from jaxrnn.bisect.health import Check as Check
from jaxrnn.bisect.health import check
from jaxrnn.detect import rule_language
from jaxrnn.experiment.outcome import AVERTED, ExperimentReport
from jaxrnn.types import Series, Tree
from jaxrnn.words import data, remedies
from jaxrnn.words.data import Batch

EXPLAINED = 0.5
"""Share of the targets' variance that a training set that can be learnt has explained at some time."""

TRAINED = 2000
"""Steps after which it should have been."""

CONSTANT, VARIED = 0.01, 0.5
"""Variance of the outputs over that of the targets: below which they are the same for every word, and above which they
surely are not."""

SPAN, LEARNING = 16, 200
"""Steps of whose batches a median is taken; and first steps, in which outputs vary as the initial weights have them."""

LARGEST_CLASS = 0.25
"""Share of the words whose targets' largest coordinate may be the same."""

NORMS = (0.1, 10.0)
"""Of target vectors."""

SINGULAR = (0.1, 1.5)
"""Largest singular value of a gate's block of the initial recurrent kernel: 1 for an orthogonal one, about 2 √H for
one drawn from N(0, 1)."""


class Evidence(NamedTuple):
    """What the checks look at."""

    dataset: data.Dataset
    columns: Series  # of the run's records
    initial: Tree  # parameters before the first step
    batch: Batch | None  # of the first bad step
    where: dict[str, Any] | None
    report: ExperimentReport | None
    step: int | None = None  # of the symptom, if there is one


def seven(evidence: Evidence) -> tuple[Check, ...]:
    """All of them, in their order."""
    return tuple(check(evidence) for check in CHECKS)


def can_be_learnt(evidence: Evidence) -> Check:
    """1. The training set can be overfitted: the share of its variance that the best 50 steps explained."""
    name, losses = 'training set can be learnt', evidence.columns.get('loss', np.array([]))
    finite = losses[np.isfinite(losses)]
    if finite.size < 50:
        return check(name, None, 0, f'{finite.size} steps have a loss, too few to tell')
    targets = evidence.dataset.vectors[evidence.dataset.train]
    variance = float(np.mean(np.var(targets, axis=0)))
    best = float(np.min(np.convolve(finite, np.full(50, 1 / 50), 'valid')))
    explained = 1 - best / variance if variance else 0.0
    ok = True if explained >= EXPLAINED else False if losses.size >= TRAINED else None
    return check(name, ok, explained, f"the best 50 steps explain {explained:.0%} of the targets' variance")


def data_is_finite(evidence: Evidence) -> Check:
    """2. The data is finite, that of each split and the batch of the first bad step: how many numbers are not."""
    name, dataset = 'data is finite', evidence.dataset
    splits = {'training': dataset.train, 'validation': dataset.validation, 'test': dataset.test}
    arrays = {split: dataset.vectors[index] for split, index in splits.items()}
    if evidence.batch is not None:
        arrays["the bad step's batch"] = np.asarray(evidence.batch.targets)
    bad = {where: int(np.sum(~np.isfinite(array))) for where, array in arrays.items()}
    found = ', '.join(f'{count} in {where}' for where, count in bad.items() if count)
    count = sum(array.size for array in arrays.values())
    return check(name, not found, sum(bad.values()), found or f'all of {count:,} numbers are')


def steps_are_finite(evidence: Evidence) -> Check:
    """3. Gradients and weights are finite: the share of steps in which they were, and which first was not."""
    name, columns = 'gradients and weights are finite', evidence.columns
    if rule_language.STEP not in columns:
        return check(name, None, 0, 'no records')
    good = rule_language.all_finite(columns)
    if good.all():
        return check(name, True, 1, f'in all of {good.size:,} steps')
    first = int(np.argmin(good))
    flags = [n for n, values in columns.items() if n.startswith('finite_') and values[first] != 1]
    numbers = [n for n, values in columns.items() if not np.isfinite(values[first])]
    named = ', '.join(flag.removeprefix('finite_') for flag in flags) or ', '.join(numbers)
    at = f' ({evidence.where["op"]} at {evidence.where["source"]})' if evidence.where else ''
    return check(
        name, False, good.mean(), f'step {int(columns[rule_language.STEP][first])}, first not: {named}{at}'
    )


def rate_may_stay(evidence: Evidence) -> Check:
    """4. Would a decaying learning rate have averted it? An experiment: 1 if it would."""
    name, report = 'a decaying learning rate is not missing', evidence.report
    if evidence.step is None:
        return check(name, True, 0, 'there is nothing to avert')
    outcomes = () if report is None else report.outcomes
    tried = [outcome for outcome in outcomes if outcome.change.name == remedies.DECAY]
    if not tried:
        return check(name, None, 0, 'not tried')
    averted = tried[0].verdict == AVERTED
    since = report.window.start if report is not None and report.window is not None else 0
    here = tried[0].change.here
    said = f'replayed from step {since} with one{here and f" ({here})"}, the symptom is {tried[0].verdict}'
    return check(name, not averted, averted, said)


def outputs_vary(evidence: Evidence) -> Check:
    """5. Predictions are not constant or repeating: the variance of the outputs over that of the targets, at the end,
    or where it was least after it had been large; medians of 16 steps."""
    name, ratios = 'predictions vary', evidence.columns.get('variance_ratio', np.array([]))
    finite = np.isfinite(ratios)
    if not finite.any():
        return check(name, None, 0, 'no record of their variance')
    known = ratios[finite]
    levels = np.median(np.lib.stride_tricks.sliding_window_view(known, min(SPAN, known.size)), axis=1)
    said = f"their variance is {levels[-1]:.3g} of the targets' at the end"
    varied = np.flatnonzero((levels > VARIED) & (np.arange(levels.size) >= LEARNING))
    lowest = int(varied[0] + np.argmin(levels[varied[0] :])) if varied.size else levels.size - 1
    if levels[lowest] < CONSTANT <= levels[-1]:
        step = int(evidence.columns[rule_language.STEP][finite][lowest])
        said += f', and was {levels[lowest]:.2g} around step {step}: nearly the same output for every word'
    ratio = float(min(levels[lowest], levels[-1]))
    return check(name, ratio >= CONSTANT, ratio, said)


def targets_are_balanced(evidence: Evidence) -> Check:
    """6. The targets in the batches are balanced: the largest share of words with the same largest coordinate."""
    name, targets = 'targets are balanced', evidence.dataset.vectors[evidence.dataset.train]
    classes = np.bincount(np.argmax(np.nan_to_num(targets), axis=1))
    share, same = classes.max() / len(targets), 1 - len(np.unique(targets, axis=0)) / len(targets)
    why = f'coordinate {classes.argmax()} is the largest of {share:.1%} of the words; {same:.1%} of the targets repeat'
    return check(name, bool(share < LARGEST_CLASS and same < LARGEST_CLASS), share, why)


def all_is_scaled(evidence: Evidence) -> Check:
    """7. Inputs, targets and initial weights are scaled: the mean norm of a target. Inputs are one-hot rows."""
    targets = evidence.dataset.vectors[evidence.dataset.train]
    norm = float(np.mean(np.linalg.norm(targets, axis=1)))
    largest = _singular_values(evidence.initial)
    wrong = {path: value for path, value in largest.items() if not SINGULAR[0] <= value <= SINGULAR[1]}
    said = [f'target norm {norm:.3g}', 'inputs one-hot']
    said += [f'{path} {value:.3g}' for path, value in (wrong or largest).items()]
    ok = NORMS[0] <= norm <= NORMS[1] and not wrong
    return check('inputs, targets and initial weights are scaled', ok, norm, ', '.join(said))


def _singular_values(params: Tree) -> dict[str, float]:
    """Of each recurrent kernel [H, G]: the largest of its gates' blocks, [H, H] each."""
    found = {}
    for path, leaf in tree.named_leaves(params).items():
        if not path.endswith('recurrent_kernel'):
            continue
        kernel = np.asarray(leaf, np.float64)
        blocks = np.split(kernel, kernel.shape[1] // kernel.shape[0], axis=1)
        found[path] = float(max(np.linalg.norm(block, 2) for block in blocks))
    return found


DEAD = 0.01
"""Share of a gate's units that may be stuck (reference: S11)."""

PASSED = 2.3
"""|log| of what the padding makes of a gradient: a factor of 10."""


def inside(evidence: Evidence) -> tuple[Check, ...]:
    """What the last 16 records before the symptom, or of the run, say beside the seven. None of it is a fault:
    it is in order, or to be thought about."""
    end = None if evidence.step is None else int(np.sum(evidence.columns[rule_language.STEP] < evidence.step))
    last = {name: values[:end][-16:] for name, values in evidence.columns.items()}
    means = {
        name: float(np.mean(values[np.isfinite(values)])) for name, values in last.items() if _any(values)
    }
    found = (_gates_pass(means), _padding_passes(means), _curvature_bears(means))
    return tuple(check for check in found if check is not None)


def _any(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).any())


def _gates_pass(means: Mapping[str, float]) -> Check | None:
    dead = {name: value for name, value in means.items() if name.startswith('dead_')}
    if not dead:
        return None
    worst = max(dead, key=lambda name: dead[name])
    gate = worst.removeprefix('dead_').replace('_', ' ')
    why = f'{dead[worst]:.0%} of the units have {gate}s that are 0 or 1 for every word and time step'
    return check('gates pass gradients', dead[worst] <= DEAD or None, dead[worst], why)


def _padding_passes(means: Mapping[str, float]) -> Check | None:
    if 'padding_gain' not in means:
        return None
    gain = means['padding_gain']
    factor = np.exp(min(abs(gain), 700.0))
    what, number = 'shrink' if gain < 0 else 'grow', f'{factor:,.0f}' if factor >= 100 else f'{factor:.3g}'
    why = f'on their way back through the padding they {what} by a factor of {number}'
    return check('gradients pass the padding', abs(gain) <= PASSED or None, gain, why)


def _curvature_bears(means: Mapping[str, float]) -> Check | None:
    if 'preconditioned_sharpness' not in means:
        return None
    share = means['preconditioned_sharpness']
    why = f'the sharpest direction has {share:.2f} of the curvature at which Adam overshoots'
    return check('curvature bears the steps', share <= 1 or None, share, why)


MEASURED_BETTER = ('something was learnt', 'loss and state are finite')
"""Checks of anybody's run that the first and the third of the seven answer with more knowledge."""

CHECKS: Sequence[Any] = (
    can_be_learnt,
    data_is_finite,
    steps_are_finite,
    rate_may_stay,
    outputs_vary,
    targets_are_balanced,
    all_is_scaled,
)
