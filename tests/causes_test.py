"""Planted causes: found, named, and averted by what is advised, in a fresh run with another seed.

Some of CAUSES, one of each kind; benchmarks/planted_causes.py has all of them.
"""

import causes
import pytest
import small

from jaxrnn import environment, report
from jaxrnn.diagnosis import Diagnosis, Symptom
from jaxrnn.record import layout
from jaxrnn.words import data, fresh_runs, remedies, run

SOME = ['corrupt batch', 'gates shut', 'bit of a moment', 'threads race']


@pytest.mark.parametrize('name', SOME)
def test_a_planted_cause(name, tmp_path):
    cause = causes.CAUSES[name]
    if cause.kind == 'nondeterminism' and environment.threads() == 1:
        pytest.skip('one processor: threads do not race')
    found = causes.diagnosed(cause, tmp_path, budget=1200)
    assert found.symptom is not None and found.cause.kind == cause.kind, found.cause
    flags = report.advised_flags(found)
    assert flags
    assert causes.fresh(cause, seed=1, flags=flags) is None


def test_what_is_advised_is_trained_with_anew(tmp_path):
    """Beside a run that is not changed; the same data, another seed."""
    cause = causes.CAUSES['gates shut']
    found = causes.diagnosed(cause, tmp_path, budget=1200, fresh_runs=1)
    unchanged, advised = found.checks[-2:]
    assert (unchanged['name'], unchanged['ok'], unchanged['value']) == (
        'no change, in a fresh run',
        False,
        1000,
    )
    assert unchanged['why'] == 'with seed 1: constant at step 1000'
    assert (advised['name'], advised['ok']) == ('sigmoid gates, in a fresh run', True)
    assert advised['why'] == 'with seed 1 it went 1,100 steps without a symptom'


def test_what_breaks_anew_is_advised_last(monkeypatch):
    """Of those that avert; and what was not tried anew comes between."""
    opened = run.LoadedRun(causes.CAUSES['gates shut'].config(), small.dataset(), None, None, [], None)
    names = ['half the learning rate', 'AMSGrad', 'ZClip', 'other batches']
    advised = [
        {
            'name': name,
            'flags': f'--{n}',
            'outcome': 'averted',
            'loss_at_horizon': 0.1,
            'point_of_no_return': None,
        }
        for n, name in enumerate(names)
    ]
    advised.append(advised[0] | {'name': 'larger epsilon', 'outcome': 'worse'})
    found = Diagnosis(symptom=Symptom('collapse', 300), first_bad_step=300, remedies=tuple(advised))
    breaks = {'no change': True, 'half the learning rate': True, 'AMSGrad': False}

    def fresh(opened, name, made, diagnosis, say):
        return {'name': name, 'ok': not breaks[name], 'value': 0.0, 'why': ''}

    monkeypatch.setattr(fresh_runs, '_fresh_run', fresh)
    named = {each.name: each for each in remedies.REMEDIES}
    after = fresh_runs.in_fresh_runs(found, opened, named, 2, print)
    order = ['AMSGrad', 'ZClip', 'other batches', 'half the learning rate', 'larger epsilon']
    assert [each['name'] for each in after.remedies] == order
    assert [check['name'] for check in after.checks] == list(breaks)
    assert report.advised_flags(after) == '--1'
    assert fresh_runs.in_fresh_runs(found, opened, named, 0, print) == found


def test_without_the_plant_the_runs_are_healthy(tmp_path):
    """Each setting of them."""
    settings = {(c.network, c.hidden, c.learning_rate): c for c in causes.CAUSES.values()}
    for place, cause in enumerate(settings.values()):
        directory = tmp_path / str(place)
        directory.mkdir()
        data.write_dataset(layout.Paths(directory).data, small.dataset())
        clean = cause._replace(options=None)
        assert causes.broken(run.train_run(clean.config(), directory).diagnosis) is None, cause.name
