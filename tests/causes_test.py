"""Planted causes: found, named, and averted by what is advised, in a fresh run with another seed.

Some of CAUSES, one of each kind; benchmarks/planted_causes.py has all of them.
"""

import causes
import pytest
import small

from jaxrnn import data, environment, loop, report, run

SOME = ['corrupt batch', 'moments reset', 'gates shut', 'bit of a moment', 'threads race']


@pytest.mark.parametrize('name', SOME)
def test_a_planted_cause(name, tmp_path):
    cause = causes.CAUSES[name]
    if cause.kind == 'nondeterminism' and environment.threads() == 1:
        pytest.skip('one processor: threads do not race')
    found = causes.diagnosed(cause, tmp_path, budget=800)
    assert found.symptom is not None and found.cause.kind == cause.kind, found.cause
    flags = report.advised(found)
    assert flags
    assert causes.fresh(cause, seed=1, flags=flags) is None


def test_without_the_plant_the_runs_are_healthy(tmp_path):
    """Each setting of them."""
    settings = {(c.network, c.hidden, c.learning_rate): c for c in causes.CAUSES.values()}
    for place, cause in enumerate(settings.values()):
        directory = tmp_path / str(place)
        directory.mkdir()
        data.write_dataset(loop.Paths(directory).data, small.dataset())
        clean = cause._replace(options=None)
        assert run.train_run(clean.config(), directory).diagnosis.symptom is None, cause.name
