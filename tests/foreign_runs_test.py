"""The battery of foreign runs: each fault does what it says, its truth is the run's own, and a few are asked."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.foreign import faults, healthy, operations, planting, random_programs, scoring, twin
from benchmarks.foreign.programs import ALL
from jaxrnn import diagnosis


@pytest.fixture(autouse=True)
def _as_others_write():
    with jax.numpy_rank_promotion('allow'):
        yield


QUICK = ('regression', 'logistic', 'guarded')


def of(program: str, fault: str, seed: int = 0) -> planting.Planted:
    found = faults.drawn(ALL[program], fault, np.random.default_rng([seed, *fault.encode()]))
    assert found is not None
    return found


def test_every_fault_that_a_program_names_is_known():
    assert {kind for program in ALL.values() for kind in program.kinds} <= set(faults.FAULTS)
    assert sum(program.held_out for program in ALL.values()) >= 5
    assert sum(not program.held_out for program in ALL.values()) >= 12


def test_a_battery_is_drawn_again_from_its_seed():
    first, second = (
        [(f.fault, f.at, f.size) for f in faults.battery(ALL['regression'], 0, 3)] for _ in range(2)
    )
    assert first == second and len(first) == 3


@pytest.mark.parametrize('fault', ['bad_row', 'nan_row', 'rate_jump', 'corrupt_weight'])
def test_a_fault_is_seen_where_it_was_planted(fault):
    planted = of('regression', fault)
    losses, broken = twin.losses(planted.program, planted.run, planted.steps)
    low, high = planted.truth.steps
    assert low == planted.at
    assert np.isfinite(losses[:low]).all()
    seen = [k for k in range(low, high + 1) if not losses[k] < 5 * losses[:low].max()]
    assert (
        seen
        or broken in range(low, high + 1)
        or losses[low : high + 1].max() > 5 * losses[low - 3 : low].max()
    )


def test_what_a_guard_leaves_out_is_healthy():
    planted = of('guarded', 'nan_row')
    losses, broken = twin.losses(planted.program, planted.run, planted.steps)
    assert not planted.truth.sick and broken is None
    assert not np.isfinite(losses).all() and np.isfinite(losses[-1])


@pytest.mark.parametrize('name', QUICK)
def test_healthy_runs_learn(name):
    for planted in healthy.runs(ALL[name], 3, 2):
        losses, broken = twin.losses(planted.program, planted.run, planted.steps)
        assert broken is None and losses[-50:].mean() < 0.6 * losses[:5].mean()


def test_a_relapse_is_not_healthy():
    falling = np.geomspace(1, 1e-3, 200)
    assert healthy.is_healthy(falling, None, 0.6)
    relapsed = np.concatenate([falling, falling])
    assert not healthy.is_healthy(relapsed, None, 0.6)


def test_scores():
    truth = planting.Truth(
        steps=(7, 9), passes=frozenset({'data'}), examples=(2,), causes=frozenset({'data'})
    )
    score = scoring.Score('p', 'f', 7, '', 20)
    found = diagnosis.Diagnosis(
        symptom=diagnosis.Symptom('spike', 12),
        onset_step=8,
        where={'pass': 'data', 'examples': [2]},
        cause=diagnosis.Cause('none'),
        replay=diagnosis.Replay(bit_identical=True),
    )
    scoring.judge(score, truth, found)
    assert (score.detected, score.step, score.place, score.cause) == ('right', 'exact', 'right', 'undecided')
    assert scoring.place_of(truth, {'pass': 'data', 'examples': [3]}) == 'wrong'
    assert scoring.place_of(truth, {'pass': 'forward'}) == 'wrong'
    assert scoring.place_of(truth, {}) == 'unknown'


def test_a_foreign_run_is_asked_from_end_to_end():
    score = scoring.ask(of('regression', 'nan_row'))
    assert (score.error, score.detected, score.step, score.place, score.cause) == (
        '',
        'right',
        'exact',
        'right',
        'right',
    )
    assert not score.missed


@pytest.mark.parametrize('name', ['matmul', 'scan_float32', 'while_loop', 'top_k', 'cholesky', 'bits'])
def test_operations_keep_their_form(name):
    for dtype in ('float32', 'bfloat16'):
        w = jax.numpy.eye(operations.D, dtype=dtype)
        x = jax.numpy.ones((6, operations.D), dtype)
        out = operations.ALL[name](x, w)
        assert (out.shape, out.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize('seed', [0, 1])
def test_random_steps_are_pure(seed):
    run = random_programs.draw(seed).run
    advance = jax.jit(run.step)
    first, second = (advance(run.init(), run.batch_at(0)) for _ in range(2))
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        if not jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(one, other)
