"""Steps that look alarming and are healthy: a trace raises no alarm, and blames them for no fault beside them."""

import faulty
import healthy
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrnn import trace
from jaxrnn.trace import births

SOME = list(healthy.STEPS)[::8]
BESIDE = healthy.faults_beside(healthy.STEPS)
"""Samples; benchmarks/trace_healthy.py runs them all."""


def test_there_are_more_than_a_hundred():
    assert len(set(healthy.STEPS.values())) == len(healthy.STEPS) >= 110
    assert len(healthy.INGREDIENTS) + len(healthy.OPTIMISERS) + len(healthy.AROUND) >= 100


@pytest.mark.parametrize('name', SOME)
def test_no_false_alarm(name):
    unhealthy, report = healthy.told(healthy.STEPS[name])
    assert unhealthy == []
    assert report.finding is None


@pytest.mark.parametrize(
    'name',
    [
        *list(BESIDE)[::40],
        'best_loss_from_infinity of linen',
        'average_from_nan of plain',
        'nan_in_targets of lstm',
    ],
)
def test_a_fault_beside_it_is_named(name):
    assert healthy.missed_beside(healthy.STEPS[name], BESIDE[name]) == {}


# The battery can fail: what protects a step is taken away.


def without_its_mask(around):
    """The step whose mask is of ones."""

    def made():
        subject = around()

        def batch(time_step, example):
            given = subject.batch(time_step, example)
            return given | {n: np.ones_like(given[n]) for n in ('mask', 'valid') if n in given}

        return subject._replace(batch=batch)

    return made


@pytest.mark.parametrize('name', ['nan_in_padding of plain', 'padded_scan'])
def test_an_alarm_where_the_mask_is_missing(name):
    unhealthy, report = healthy.told(healthy.Healthy(without_its_mask(healthy.STEPS[name].subject)))
    assert unhealthy != []
    assert (report.finding.kind, report.finding.source) == ('input', 'batch/letters')


@pytest.mark.parametrize('name', ['softmax_of_masked', 'drawn_by_gumbel'])
def test_an_alarm_where_all_is_masked(name, monkeypatch):
    """-inf - (-inf)."""
    monkeypatch.setattr(healthy, 'kept', lambda x: healthy.position(x) < 0)
    unhealthy, report = healthy.told(
        healthy.Healthy(faulty.SUBJECTS['plain'], (('dense', getattr(healthy, name)),))
    )
    assert unhealthy != []
    assert report.finding.kind == 'infinities'


def test_an_alarm_where_nans_are_not_replaced():
    unhealthy, report = healthy.told(healthy.Healthy(faulty.SUBJECTS['plain'], (('loss', _spoilt),)))
    assert unhealthy != []
    assert report.finding.kind == trace.WRITTEN


def _spoilt(x, hit):
    return jnp.where(hit > 0, jnp.nan, x)


def test_a_mask_would_be_reported_if_it_were_not_intended(monkeypatch):
    step = healthy.Healthy(faulty.SUBJECTS['plain'], (('dense', healthy.softmax_of_masked),))
    assert healthy.told(step)[1].harmless == ()
    monkeypatch.setattr(births, 'is_intended', lambda operand: False)
    harmless = healthy.told(step)[1].harmless
    assert {finding.op for finding in harmless} == {'convert_element_type'}


def test_outputs_that_are_not_finite_are_seen():
    assert healthy.not_finite({'a': jnp.array([1, jnp.nan]), 'b': jnp.int32(1), 'c': jax.random.key(0)}) == [
        'a'
    ]
