"""What counts as a symptom of a run of ours, beside the named rules: to do worse than the mean of its targets, and a
norm that isn't finite, which is of all the numbers that training goes on with."""

from collections.abc import Sequence

import numpy as np

from jaxrnn.detect import Detector, rule_language
from jaxrnn.words.data import Dataset

PATIENCE = 400
"""Steps within which a network has learnt the mean of its targets; at stock rates it does within some tens."""

WORSE = 1.05
"""Times the targets' variance, which is the loss of who gives their mean for every word: R² is 0 there."""


NORMS = ('gradient_norm', 'update_norm', 'parameter_norm')
"""Fields of every record of ours."""


def detectors_for(detectors: Sequence[Detector], dataset: Dataset) -> list[Detector]:
    """Detectors for runs on a data set: one has diverged, too, that does worse than the mean of its targets.

    Args:
        detectors: named ones, or the user's own.
        dataset: with the vectors of its training words.
    """
    with np.errstate(all='ignore'):
        variance = float(np.mean(np.var(dataset.vectors[dataset.train], axis=0)))
    limit = f'{WORSE * variance:.6g}'

    def extended(detector: Detector) -> Detector:
        if detector.kind == 'nonfinite' and 'loss' in detector.rule.fields:
            rule = ' or '.join([detector.rule.text, *(f'not finite({norm})' for norm in NORMS)])
            return detector._replace(rule=rule_language.parse(rule))
        if detector.kind != 'diverged' or not np.isfinite(variance) or variance <= 0:
            return detector
        rule = f'{detector.rule.text} or step >= {PATIENCE} and loss > {limit} and median(loss, 64) > {limit}'
        lasting = (
            f'loss > {limit}' if detector.lasting is None else f'{detector.lasting.text} or loss > {limit}'
        )
        means = f'{detector.means}, or worse than the mean of the targets'
        return Detector(detector.kind, rule_language.parse(rule), means, rule_language.parse(lasting))

    return [extended(detector) for detector in detectors]
