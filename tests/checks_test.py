"""Each of the seven checks passing, failing, and where it can't tell."""

import jax
import numpy as np
import pytest
import small

from jaxrnn.experiment.outcome import Change, ExperimentReport, Outcome
from jaxrnn.experiment.window import Window
from jaxrnn.words import checks, remedies

DATASET = small.dataset()
VARIANCE = float(np.mean(np.var(DATASET.vectors, axis=0)))


def evidence(**other) -> checks.Evidence:
    steps = np.arange(300.0)
    columns = {
        'step': steps,
        'loss': VARIANCE * np.exp(-steps / 50),
        'variance_ratio': np.full(300, 0.9),
        'finite_loss': np.ones(300),
    }
    made = {
        'dataset': DATASET,
        'columns': columns | other.pop('columns', {}),
        'initial': small.program().init().params,
        'batch': None,
        'where': None,
        'report': None,
    }
    return checks.Evidence(**made | other)


def test_a_healthy_run_passes_all():
    told = checks.seven(evidence())
    assert len(told) == 7 and [check['ok'] for check in told] == [True] * 7
    assert all(isinstance(check['value'], float) and check['why'] for check in told)


@pytest.mark.parametrize(
    'loss,steps,ok', [(0.1, 300, True), (0.9, 300, None), (0.9, 2500, False), (0.1, 20, None)]
)
def test_learning(loss, steps, ok):
    found = checks.can_be_learnt(evidence(columns={'loss': np.full(steps, loss * VARIANCE)}))
    assert found['ok'] is ok
    if steps >= 50:
        assert found['value'] == pytest.approx(1 - loss)


def test_a_nan_in_data_is_counted_where_it_is():
    vectors = DATASET.vectors.copy()
    vectors[DATASET.train[0], :2] = np.nan
    found = checks.data_is_finite(evidence(dataset=DATASET._replace(vectors=vectors)))
    assert (found['ok'], found['value'], found['why']) == (False, 2, '2 in training')
    batch = small.program().batch_at(0)
    targets = batch.targets.copy()
    targets[3, 1] = np.inf
    found = checks.data_is_finite(evidence(batch=batch._replace(targets=targets)))
    assert (found['ok'], found['value'], found['why']) == (False, 1, "1 in the bad step's batch")


def test_what_is_not_finite_first_is_named():
    flags = np.ones(300)
    flags[270:] = 0
    found = checks.steps_are_finite(
        evidence(columns={'finite_gradients': flags}, where={'op': 'mul', 'source': 'a.py:3'})
    )
    assert (found['ok'], found['value']) == (False, 0.9)
    assert found['why'] == 'step 270, first not: gradients (mul at a.py:3)'
    assert checks.steps_are_finite(evidence()._replace(columns={}))['ok'] is None


@pytest.mark.parametrize(
    'verdict,ok', [('averted', False), ('delayed', True), ('unchanged', True), ('worse', True)]
)
def test_a_decaying_rate_is_an_experiment(verdict, ok):
    outcome = Outcome(Change(remedies.DECAY, 'optimiser', lambda: None), verdict, None, 0.1, 200)
    told = ExperimentReport(Window(100, 150, 200), None, True, None, (outcome,))
    found = checks.rate_may_stay(evidence(report=told, step=200))
    assert found['ok'] is ok and found['value'] == float(not ok) and verdict in found['why']
    assert checks.rate_may_stay(evidence(report=told._replace(outcomes=()), step=200))['ok'] is None
    # A symptom whose steps can't be reproduced has no experiments.
    assert checks.rate_may_stay(evidence(step=200))['ok'] is None


def test_constant_outputs():
    assert checks.outputs_vary(evidence(columns={'variance_ratio': np.full(300, 0.001)}))['ok'] is False
    assert checks.outputs_vary(evidence(columns={'variance_ratio': np.full(300, np.nan)}))['ok'] is None


@pytest.mark.parametrize(('level', 'first', 'ok'), [(0.9, 220, False), (0.9, 150, True), (0.3, 220, True)])
def test_outputs_that_were_constant_for_a_while(level, first, ok):
    """After they had varied as the targets do; not before anything is learnt, when a network gives the mean."""
    ratios = np.concatenate([np.full(first, level), np.full(20, 0.002), np.full(280 - first, 0.9)])
    found = checks.outputs_vary(evidence(columns={'variance_ratio': ratios}))
    assert found['ok'] is ok and found['value'] == (0.9 if ok else 0.002), found
    assert found['why'].startswith("their variance is 0.9 of the targets' at the end")
    assert ('was 0.002 around step 2' in found['why']) is not ok


def test_targets_of_one_class_or_one_value():
    vectors = DATASET.vectors.copy()
    vectors[:, 2] = 10
    assert checks.targets_are_balanced(evidence(dataset=DATASET._replace(vectors=vectors)))['ok'] is False
    same = DATASET.vectors.copy()
    same[: len(same) // 2] = same[0]
    assert checks.targets_are_balanced(evidence(dataset=DATASET._replace(vectors=same)))['ok'] is False


@pytest.mark.parametrize('scale', [0.01, 100])
def test_targets_of_another_scale(scale):
    dataset = DATASET._replace(vectors=DATASET.vectors * scale)
    assert checks.all_is_scaled(evidence(dataset=dataset))['ok'] is False


@pytest.mark.parametrize('preset', ['keras1', 'keras3', 'flax'])
@pytest.mark.parametrize('network', small.NETWORKS)
def test_initial_weights_of_presets_are_scaled(network, preset):
    program = small.program(network, preset=preset, hidden=16)
    assert checks.all_is_scaled(evidence(initial=program.init().params))['ok'] is True


def test_weights_of_too_large_a_gain_are_named():
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: 2 * x if 'recurrent_kernel' in jax.tree_util.keystr(path) else x,
        small.program().init().params,
    )
    found = checks.all_is_scaled(evidence(initial=params))
    assert found['ok'] is False and 'recurrent_kernel' in found['why']


def test_what_the_signals_say_of_the_inside():
    """Of the 16 records before the symptom; what is out of bounds is to be thought about, no fault."""
    assert checks.inside(evidence()) == ()
    dead = np.where(np.arange(300) < 250, 0.0, 0.25)
    columns = {
        'dead_input_gate': np.zeros(300),
        'dead_output_gate': dead,
        'padding_gain': np.full(300, -np.log(1000.0)),
        'preconditioned_sharpness': np.full(300, 0.5),
    }
    found = {check['name']: check for check in checks.inside(evidence(columns=columns, step=290))}
    gates = found['gates pass gradients']
    assert gates['ok'] is None and gates['value'] == 0.25
    assert gates['why'] == '25% of the units have output gates that are 0 or 1 for every word and time step'
    padding = found['gradients pass the padding']
    assert padding['ok'] is None and padding['why'].endswith('they shrink by a factor of 1,000')
    assert found['curvature bears the steps']['ok'] is True
    before = {check['name']: check for check in checks.inside(evidence(columns=columns, step=250))}
    assert before['gates pass gradients']['ok'] is True and before['gates pass gradients']['value'] == 0
    columns['padding_gain'] = np.full(300, 1.0)
    columns['preconditioned_sharpness'] = np.full(300, np.nan)
    names = {check['name']: check['ok'] for check in checks.inside(evidence(columns=columns))}
    assert names == {'gates pass gradients': None, 'gradients pass the padding': True}
