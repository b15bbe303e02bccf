"""Outcomes that are kept: a second diagnosis goes on from them, and says the same."""

import json
import math

import pytest
from engine_test import LARGE, change, first, growing, no_batch, on, subject_of

from jaxrnn import detect, files
from jaxrnn.bisect import replay
from jaxrnn.detect import Detector
from jaxrnn.diagnosis import Symptom
from jaxrnn.experiment import cache
from jaxrnn.experiment.explain import run
from jaxrnn.experiment.outcome import Change, Changed
from jaxrnn.experiment.window import window_of
from jaxrnn.types import UserError


def named(name, step, made=None, **more) -> Change:
    """A change with an identity; `made` notes who was made."""

    def make():
        if made is not None:
            made.append(name)
        return Changed(step, no_batch)

    return Change(name, 'model', make, identity=name, **more)


def changes(made=None) -> list[Change]:
    return [
        named('slower', growing(1.08), made),
        named('still', growing(1.0), made),
        named('not finite', lambda x, batch: (x * math.nan, {'loss': x}), made),
        change('nameless', growing(1.05)),
    ]


@pytest.fixture(scope='module')
def subject(tmp_path_factory):
    return subject_of(growing(1.1), no_batch, first, tmp_path_factory.mktemp('run'))


def told(subject, path, changes, *, detectors: tuple[Detector, ...] = (LARGE,)):
    found, _ = replay.bisect(subject, detectors)
    return run(on(subject, found.symptom, detectors, budget=2000, keep=path), changes)


def summary(told):
    outcomes = [
        (o.change.name, o.verdict, o.symptom, repr(o.loss), o.reached, o.point_of_no_return, o.acted)
        for o in told.outcomes
    ]
    return outcomes, told.steps_replayed, told.nudge.verdict, [each.name for each in told.untried]


def test_what_is_known_is_not_replayed(subject, tmp_path):
    """And all that is said is the same, the count of steps among it, which decides what the budget reaches to."""
    path, made = tmp_path / 'experiments.jsonl', []
    once = told(subject, path, changes(made))
    assert made == ['slower', 'still', 'not finite']
    for line in path.read_text().splitlines():
        assert 'nameless' not in line
        json.loads(line, parse_constant=pytest.fail)
    again = told(subject, path, changes(made))
    assert made == ['slower', 'still', 'not finite']
    assert summary(again) == summary(once) == summary(told(subject, None, changes()))


def test_an_interrupted_diagnosis_goes_on(subject, tmp_path):
    """Killed while it wrote a line."""
    path, made = tmp_path / 'experiments.jsonl', []
    whole = told(subject, path, changes())
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(''.join(lines[:2]) + lines[2][:20])
    assert summary(told(subject, path, changes(made))) == summary(whole)
    assert made == ['still', 'not finite']
    made.clear()
    told(subject, path, changes(made))
    assert made == []


@pytest.mark.parametrize('content', ['', 'not JSON\n', '{"scope": "another"}\n', '[]\n{}\n'])
def test_a_file_of_something_else_is_begun_anew(subject, tmp_path, content):
    path, made = tmp_path / 'experiments.jsonl', []
    path.write_text(content)
    told(subject, path, changes(made))
    assert len(made) == 3
    told(subject, path, changes(made))
    assert len(made) == 3


def test_outcomes_of_another_scope_are_not_taken(subject, tmp_path):
    """Though changes and steps be the same: the package may have been edited since."""
    path, made = tmp_path / 'experiments.jsonl', []
    told(subject, path, changes())
    _, *lines = path.read_text().splitlines()
    path.write_text('\n'.join([json.dumps({'scope': 'another'}), *lines]))
    told(subject, path, changes(made))
    assert len(made) == 3 and 'another' not in path.read_text()


def test_another_question_has_other_outcomes(subject, tmp_path):
    path, made = tmp_path / 'experiments.jsonl', []
    told(subject, path, changes(made))
    told(subject, path, changes(made), detectors=(detect.custom('loss > .9'),))
    assert len(made) == 6


def test_the_scope_is_of_all_that_decides(subject, monkeypatch):
    symptom, window = Symptom('when', 200), window_of(subject, 200)
    rows = list(subject.records)
    base = cache.scope(rows, symptom, window, [LARGE])
    changed = [{**rows[0], 'loss': 2.0}, *rows[1:]]
    others = [
        cache.scope(changed, symptom, window, [LARGE]),
        cache.scope(rows, Symptom('when', 201), window, [LARGE]),
        cache.scope(rows, symptom, window._replace(horizon=900), [LARGE]),
        cache.scope(rows, symptom, window, [detect.by_name('spike')]),
    ]
    monkeypatch.setattr(cache.environment, 'sources', lambda: 'edited')
    others.append(cache.scope(rows, symptom, window, [LARGE]))
    assert len({base, *others}) == 6


OTHERS = {
    'not UTF-8': b'{"scope": "\xff"}\n',
    'deep': b'[' * 100_000,
    'a list': b'[]',
    'lists in lists': b'{"scope": ' + b'[' * 100_000 + b']' * 100_000 + b'}\n',
}


@pytest.mark.parametrize('kind', OTHERS)
def test_a_damaged_file_is_begun_anew(subject, tmp_path, kind):
    path, made = tmp_path / 'experiments.jsonl', []
    path.write_bytes(OTHERS[kind])
    told(subject, path, changes(made))
    assert len(made) == 3 and path.read_text().startswith('{"scope"')


WRONG = (
    {'verdict': 'splendid'}, {'verdict': ['averted']}, {'symptom': [1, 2]}, {'symptom': ['spike', '1']}, {'symptom': 7},
    {'loss': 'low'}, {'loss': [1]}, {'reached': 1.5}, {'acted': 1}, {'steps': '4'}, {'change': ['slower']},
    {'start': None}, {'symptom': ['spike', [[]]]},
)  # fmt: skip


@pytest.mark.parametrize('field', WRONG, ids=str)
def test_an_outcome_of_another_shape_is_not_taken(subject, tmp_path, field):
    path = tmp_path / 'experiments.jsonl'
    whole = told(subject, path, changes())
    head, *lines = path.read_text().splitlines()
    rows = [files.sealed({**files.unsealed(json.loads(line)), **field}) for line in lines]
    path.write_text('\n'.join([head, *map(json.dumps, rows)]))
    made = []
    assert summary(told(subject, path, changes(made))) == summary(whole)
    assert made == ['slower', 'still', 'not finite']


@pytest.mark.parametrize('change', [{'loss': 0.25}, {'reached': 7}, {'crc32': '00000000'}], ids=str)
def test_an_outcome_that_has_changed_since_is_not_taken(subject, tmp_path, change):
    path = tmp_path / 'experiments.jsonl'
    whole = told(subject, path, changes())
    head, *lines = path.read_text().splitlines()
    path.write_text('\n'.join([head, *(json.dumps({**json.loads(line), **change}) for line in lines)]))
    made = []
    assert summary(told(subject, path, changes(made))) == summary(whole)
    assert made == ['slower', 'still', 'not finite']


def test_outcomes_are_not_written_through_a_link(subject, tmp_path):
    path, outside = tmp_path / 'experiments.jsonl', tmp_path / 'outside'
    outside.write_text('kept')
    path.symlink_to(outside)
    with pytest.raises(UserError, match='a link found'):
        told(subject, path, changes())
    assert outside.read_text() == 'kept'
