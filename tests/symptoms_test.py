"""What counts as a symptom of a run on words: to do worse than who gives the mean of all targets."""

import numpy as np
import pytest
import small

from jaxrnn import detect
from jaxrnn.words.symptoms import NORMS, detectors_for

STEPS = 1200


def symptom_of(losses):
    """Of losses as shares of the targets' variance."""
    dataset = small.dataset()
    variance = np.mean(np.var(dataset.vectors[dataset.train], axis=0))
    columns = {'step': np.arange(len(losses)), 'loss': variance * losses}
    columns |= dict.fromkeys(NORMS, np.ones(len(losses)))
    detectors = detect.bound(detect.DETECTORS, columns, 'loss')
    return detect.judged(columns, detectors_for(detectors, dataset), 'loss').symptom


@pytest.mark.parametrize(
    ('share', 'steps', 'kind'),
    [(1.3, 420, 'diverged'), (1.1, 700, None), (1.1, STEPS, 'diverged'), (1.02, STEPS, None)],
)
def test_worse_than_the_mean_of_the_targets(share, steps, kind):
    """By much it is told soon, by little only of a run that has had time to learn the mean."""
    scattered = share * np.exp(np.random.default_rng(0).normal(0, 0.01, steps))
    scattered[:8] = 20.0
    found = symptom_of(scattered)
    assert (found and found.kind) == kind


def test_a_slow_start_is_none():
    """As of two LSTM(512) with an epsilon of 2.3e-5 from the first step on: 1.06 of the variance at step 400."""
    steps = np.arange(STEPS)
    losses = 1.09 - 6e-5 * steps + 20 * np.exp(-steps / 5)
    assert losses[400] > 1.06
    assert all(symptom_of(losses[:reached]) is None for reached in (402, 500, STEPS))
