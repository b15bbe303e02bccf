"""Causes planted into runs of a small network, each with what it breaks and what should be found and advised.

A plant is a maker of programs, as `run.train_run` takes one: it is still there when a diagnosis replays steps under
other flags, as somebody's own bug would be. A new one is an entry of CAUSES.
"""

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import small

from jaxrnn import config, data, loop, train
from jaxrnn.types import Batch, Tree

AT = 650
"""Step at which what happens once happens: between two checkpoints."""

Make = Callable[[config.Config, data.Dataset], train.Program]


@dataclasses.dataclass(frozen=True)
class Planted:
    """A maker of programs that breaks what it makes. Batches are broken where they come from, below --skip_batches."""

    alter: Callable[[train.Program], train.Program]

    def __call__(self, made: config.Config, dataset: data.Dataset) -> train.Program:
        program = self.alter(train.make_program(made.changed(skip_batches=''), dataset))
        if not made.training.skip_batches:
            return program
        left_out = train.skipped(made.training.skip_batches)
        return program._replace(batch_at=loop.without(program.batch_at, left_out))


class Cause(NamedTuple):
    """One planted cause."""

    name: str
    kind: str  # that a diagnosis should find
    alter: Callable[[train.Program], train.Program] = lambda program: program
    options: Mapping[str, Any] = types.MappingProxyType({})  # flags that are part of the plant
    network: str = 'lstm'
    hidden: int = 16
    learning_rate: float = 3e-3
    steps: int = 1100

    def config(self, seed: int = 0) -> config.Config:
        made = small.configuration(self.network, hidden=self.hidden, preset='keras1', seed=seed)
        return made.changed(
            learning_rate=self.learning_rate, max_steps=self.steps, on_divergence='stop', **self.options
        )

    def make(self) -> Make:
        return Planted(self.alter)


# Data.


def corrupt_batch(program: train.Program) -> train.Program:
    """One batch has targets thirty times too large, of which each is another word's."""

    def batch_at(step: int) -> Batch:
        batch = program.batch_at(step)
        return batch._replace(targets=30 * np.roll(batch.targets, 1, axis=0)) if step == AT else batch

    return program._replace(batch_at=batch_at)


def nan_targets(program: train.Program) -> train.Program:
    """One word of one batch has no vector."""

    def batch_at(step: int) -> Batch:
        batch = program.batch_at(step)
        if step != AT:
            return batch
        targets = np.array(batch.targets)
        targets[3] = np.nan
        return batch._replace(targets=targets)

    return program._replace(batch_at=batch_at)


# Optimiser.


def rate_jumps(program: train.Program) -> train.Program:
    """From one step on the learning rate is ten times what the schedule says."""

    def step(state: train.TrainState, batch: Batch):
        after, record = program.step(state, batch)
        times = jnp.where(state.step >= AT, 10, 1)
        params = jax.tree.map(lambda old, new: old + times * (new - old), state.params, after.params)
        return after._replace(params=params), record

    return program._replace(step=step)


def moments_reset(program: train.Program) -> train.Program:
    """As resumed without the optimiser's state, but for its count."""

    def step(state: train.TrainState, batch: Batch):
        zero = state.step == AT
        return program.step(state._replace(opt_state=_zeroed(state.opt_state, zero)), batch)

    return program._replace(step=step)


def _zeroed(opt_state: Tree, zero: jax.Array) -> Tree:
    """Adam's moments as zero, wherever in a chain they are."""
    moments = ('mu', 'nu', 'nu_max')

    def reset(path, leaf):
        named = any(getattr(key, 'name', '') in moments for key in path)
        return jnp.where(zero, jnp.zeros_like(leaf), leaf) if named else leaf

    return jax.tree_util.tree_map_with_path(reset, opt_state)


# Model.


def gates_shut(program: train.Program) -> train.Program:
    """Input and output gates start so far to the left that a hard sigmoid passes nothing, and no gradient."""

    def init() -> train.TrainState:
        state = program.init()
        bias = state.params['recurrent']['bias']
        hidden = bias.shape[0] // 4
        shut = bias.at[:hidden].add(-3).at[3 * hidden :].add(-3)
        recurrent = {**state.params['recurrent'], 'bias': shut}
        return state._replace(params={**state.params, 'recurrent': recurrent})

    return program._replace(init=init)


CAUSES = {
    cause.name: cause
    for cause in (
        Cause('corrupt batch', 'data', corrupt_batch),
        Cause('NaN targets', 'data', nan_targets),
        Cause('learning rate jumps', 'optimiser', rate_jumps, learning_rate=1e-2),
        Cause('moments reset', 'optimiser', moments_reset, learning_rate=1e-2),
        Cause(
            'no bias correction', 'optimiser', options={'bias_correction': False}, network='stacked', hidden=32,
            learning_rate=3e-2,
        ),
        Cause('gates shut', 'model', gates_shut),
    )
}  # fmt: skip
