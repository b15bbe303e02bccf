"""What counts as a symptom of a run of ours, beside the named rules: to do worse than the mean of its targets, and a
norm that isn't finite, which is of all the numbers that training goes on with."""

from collections.abc import Sequence

import numpy as np

from jaxrnn.detect import Detector, rule_language
from jaxrnn.words.data import Dataset

WORSE = {400: 1.2, 1000: 1.05}
"""Step -> times the targets' variance above which a loss is no beginning any more from there on. The variance is the
loss of who gives their mean for every word; at stock rates a network learns that within some tens of steps, but with a
large epsilon it is still above it at step 500 (two LSTM of 512, 2.3e-5). At 50 times that rate two of 64 never get
below 1.06 of it."""


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
    limits = {step: f'{times * variance:.6g}' for step, times in WORSE.items()}
    least = limits[max(limits)]

    def extended(detector: Detector) -> Detector:
        if detector.kind == 'nonfinite' and 'loss' in detector.rule.fields:
            rule = ' or '.join([detector.rule.text, *(f'not finite({norm})' for norm in NORMS)])
            return detector._replace(rule=rule_language.parse(rule))
        if detector.kind != 'diverged' or not np.isfinite(variance) or variance <= 0:
            return detector
        worse = (
            f'step >= {step} and loss > {limit} and median(loss, 64) > {limit}'
            for step, limit in limits.items()
        )
        rule = ' or '.join([detector.rule.text, *worse])
        lasting = (
            f'loss > {least}' if detector.lasting is None else f'{detector.lasting.text} or loss > {least}'
        )
        means = f'{detector.means}, or worse than the mean of the targets'
        return Detector(detector.kind, rule_language.parse(rule), means, rule_language.parse(lasting))

    return [extended(detector) for detector in detectors]
