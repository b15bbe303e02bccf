"""Runs that version 0.1.0 recorded (commit b7f50d7) still open, resume, and are diagnosed as they were.

`data/run-0.1.0.tar.gz` has two, made by its scripts/train.py with --num_words=48 --pad_to=12 --validation_share=0
--test_share=0 --batch_size=16 --signals --seed=5:

run       --network=gru --hidden=8 --preset=keras1 --learning_rate=1e-2 --max_steps=90 --checkpoint_every=30, without
          its checkpoints 30 and 90; and its diagnosis.json, by --when='loss < .0076 and step > 40' --budget_steps=900
options   --network=stacked --hidden=8 --max_steps=20 --clip=zclip --spectral_cap=0.05 --guard --curvature_every=5
          --curvature_cap=.8 --schedule=plateau --second_moment=amsgrad: every state that an optimiser of ours has
"""

import dataclasses
import json
import tarfile
from pathlib import Path

import jax
import pytest

from jaxrnn import detect, environment
from jaxrnn.record import loop
from jaxrnn.record.record_file import RecordFile
from jaxrnn.words import run
from jaxrnn.words.investigation import diagnose_run

KEPT = Path(__file__).parent / 'data' / 'run-0.1.0.tar.gz'


@pytest.fixture
def runs(tmp_path) -> Path:
    with tarfile.open(KEPT) as archive:
        archive.extractall(tmp_path, filter='data')
    return tmp_path


GENERATION = 'AMD EPYC (family 26'
"""Of the machine that recorded them: 0.1.0 wrote its name alone, which older generations have, too."""


def same_bits(opened: run.LoadedRun) -> bool:
    """Whether this is a machine, and versions, that give the same bits."""
    recorded = opened.checkpoints.meta(opened.checkpoints.steps()[-1])['environment_details']
    now = environment.describe()
    known = {name: now[name] for name in ('processor', 'instructions')}
    return now['processor'].startswith(GENERATION) and not environment.differences(recorded | known, now)


@pytest.mark.parametrize(('name', 'steps'), [('run', [0, 60]), ('options', [20])])
def test_an_older_run_opens(runs, name, steps):
    """Its configuration has the digest it had, and every array its place and its bits."""
    opened = run.open_run(runs / name)
    assert opened.checkpoints.steps() == steps
    for step in steps:
        meta, state = opened.checkpoints.meta(step), opened.checkpoints.restore(step)
        assert meta['config'] == opened.config.digest() and meta['data'] == opened.dataset.digest
        assert meta['state'] == loop.state_digest(state)
        assert jax.tree.structure(state) == jax.tree.structure(opened.program.init())


def test_an_older_run_records_what_it_did(runs):
    """From its last checkpoint on: every field that it had, and where bits are the same the same numbers; what is
    recorded beside them is newer."""
    opened = run.open_run(runs / 'run')
    recorded, same = {row['step']: row for row in opened.records}, same_bits(opened)
    trained = run.train_run(opened.config, runs / 'run')
    again = RecordFile(runs / 'run' / 'records.jsonl').read()
    assert [row['step'] for row in again] == list(range(90))
    assert all(row.keys() >= recorded[row['step']].keys() for row in again)
    if same:
        assert trained.result.first_mismatch is None
        assert [{name: row[name] for name in recorded[row['step']]} for row in again] == opened.records


def test_an_older_run_is_diagnosed_as_it_was(runs):
    expected = json.loads((runs / 'expected-diagnosis.json').read_text())
    same = same_bits(run.open_run(runs / 'run'))
    rule = detect.custom('loss < .0076 and step > 40')
    found = json.loads(
        json.dumps(dataclasses.asdict(diagnose_run(runs / 'run', [rule], budget=900).diagnosis))
    )
    assert found['symptom'] == expected['symptom'] and found.keys() == expected.keys()
    if same:
        # Since then a loss at the horizon is a median, by which equals are put in order; when it began is said of any
        # symptom; and what a batch brought has no layer.
        for field in ('first_bad_step', 'checks'):
            assert found[field] == expected[field]
        assert found['cause']['kind'] == expected['cause']['kind'] and found['replay']['bit_identical']
        told, before = (
            {
                each['name']: (each['outcome'], each['flags'], each['point_of_no_return'])
                for each in result['remedies']
            }
            for result in (found, expected)
        )
        assert told == before and found['remedies'][0]['name'] == expected['remedies'][0]['name']
        assert {**found['where'], 'layer': '', 'time_step': None} == {
            **expected['where'],
            'layer': '',
            'time_step': None,
        }
