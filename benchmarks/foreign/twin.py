"""What a run does without the debugger: its losses, by a plain loop. Truth is found here, from a run and its twin."""

import jax
import numpy as np

from benchmarks.foreign.common import Program, Run

LEAP = 5.0
"""A loss has left its twin's where it is this many times the largest of the twin's around it."""

NEAR = 25
"""Steps to either side that count as around it."""


def losses(program: Program, run: Run, steps: int) -> tuple[np.ndarray, int | None]:
    """The loss of each step, [N], and the first step after which the state isn't finite."""
    advance, state = jax.jit(run.step), run.init()
    finite_of = jax.jit(lambda tree: all_finite(tree))
    found, finite = [], []
    for k in range(steps):
        state, record = advance(state, run.batch_at(k))
        found.append(of_record(program, record))
        finite.append(finite_of(state))
    broken = [k for k, ok in enumerate(finite) if not bool(ok)]
    return np.array([float(loss) for loss in found]), broken[0] if broken else None


def all_finite(tree) -> jax.Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jax.dtypes.issubdtype(leaf.dtype, np.inexact)]
    return jax.numpy.all(jax.numpy.array([jax.numpy.isfinite(leaf).all() for leaf in leaves]))


def of_record(program: Program, record) -> jax.Array:
    for name in program.loss:
        record = record[name]
    return record


def away(run: np.ndarray, twin: np.ndarray) -> np.ndarray:
    """Where a run's loss is far above its twin's, or no number at all."""
    size = np.abs(np.nan_to_num(twin))
    around = np.array([size[max(0, k - NEAR) : k + NEAR + 1].max() for k in range(len(size))])
    return ~(run <= LEAP * np.maximum(around, 1e-12))


def smooth(series: np.ndarray, window: int = 25) -> np.ndarray:
    return np.convolve(series, np.ones(window) / window, 'valid')
