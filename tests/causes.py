"""Causes planted into runs of a small network, each with what it breaks and what should be found and advised.

A plant is a maker of programs, as `run.train_run` takes one: it is still there when a diagnosis replays steps under
other flags, as somebody's own bug would be. A new one is an entry of CAUSES.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import small

from jaxrnn import diagnosis, environment
from jaxrnn.record import layout, loop
from jaxrnn.types import Tree
from jaxrnn.words import config, data, investigation, run, train
from jaxrnn.words.data import Batch

AT = 650
"""Step at which what happens once happens: between two checkpoints."""

Make = Callable[[config.Config, data.Dataset], train.Program]


@dataclasses.dataclass(frozen=True)
class Planted:
    """A maker of programs that breaks what it makes. Batches are broken where they come from, below --skip_batches."""

    alter: Callable[..., train.Program]
    strikes: bool | None  # of what strikes once: whether it does

    def __call__(self, made: config.Config, dataset: data.Dataset) -> train.Program:
        program = train.make_program(made.changed(skip_batches=''), dataset)
        program = self.alter(program) if self.strikes is None else self.alter(program, Once(self.strikes))
        if not made.training.skip_batches:
            return program
        left_out = train.skipped(made.training.skip_batches)
        return program._replace(batch_at=loop.without(program.batch_at, left_out))


class Cause(NamedTuple):
    """One planted cause."""

    name: str
    kind: str  # that a diagnosis should find
    alter: Callable[..., train.Program] = lambda program: program
    options: Mapping[str, Any] | None = None  # flags that are part of the plant
    network: str = 'lstm'
    hidden: int = 16
    learning_rate: float = 3e-3
    steps: int = 1100
    once: bool = False  # whether it strikes once, as a fault of the machine
    pad_to: int = 0  # time steps of a word; 0: as the longest needs

    def config(self, seed: int = 0) -> config.Config:
        made = small.configuration(self.network, hidden=self.hidden, preset='keras1', seed=seed)
        return made.changed(
            pad_to=self.pad_to,
            learning_rate=self.learning_rate,
            max_steps=self.steps,
            on_divergence='stop',
            **(self.options or {}),
        )

    def make(self, *, later: bool = False) -> Make:
        """`later`: when the run is looked into. What strikes once does so when it is trained."""
        return Planted(self.alter, not later if self.once else None)


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


# The machine: what strikes once, when the run is trained, and never again. Batches tell the step whether it does.


class Struck(NamedTuple):
    """A batch, and what the machine makes of its step."""

    batch: Batch
    flips: np.bool
    noise: np.float32


def _struck(
    program: train.Program, change: Callable[[train.TrainState], train.TrainState], flips, noise
) -> train.Program:
    def step(state: train.TrainState, struck: Struck):
        changed = change(state)
        state = jax.tree.map(lambda new, old: jnp.where(struck.flips, new, old), changed, state)
        after, record = program.step(state, struck.batch)
        return after._replace(params=jax.tree.map(lambda x: x + struck.noise, after.params)), record

    def batch_at(step: int) -> Struck:
        return Struck(program.batch_at(step), np.bool(flips(step)), np.float32(noise(step)))

    return program._replace(step=step, batch_at=batch_at)


class Once:
    """Says yes the first time that it is asked about the step, and never again."""

    def __init__(self, ever: bool):
        self.ready = ever

    def __call__(self, step: int) -> bool:
        yes = step == AT and self.ready
        self.ready = self.ready and not yes
        return yes


def _flip(x: jax.Array, bit: int) -> jax.Array:
    words = jax.lax.bitcast_convert_type(x, jnp.uint32) ^ np.uint32(1 << bit)
    return jax.lax.bitcast_convert_type(words, jnp.float32)


def bit_of_a_weight(program: train.Program, once: Once) -> train.Program:
    """The highest bit of the exponent of one recurrent weight."""

    def change(state: train.TrainState) -> train.TrainState:
        kernel = state.params['recurrent']['recurrent_kernel']
        recurrent = {
            **state.params['recurrent'],
            'recurrent_kernel': kernel.at[3, 5].set(_flip(kernel[3, 5], 30)),
        }
        return state._replace(params={**state.params, 'recurrent': recurrent})

    return _struck(program, change, once, lambda step: 0)


def bit_of_a_moment(program: train.Program, once: Once) -> train.Program:
    """The same of one number of m: at once some 1e30, and so is the step."""

    def change(state: train.TrainState) -> train.TrainState:
        clip, adam, *rest = state.opt_state
        bias = _flip(adam.mu['output']['bias'][0], 30)
        output = {**adam.mu['output'], 'bias': adam.mu['output']['bias'].at[0].set(bias)}
        return state._replace(opt_state=(clip, adam._replace(mu={**adam.mu, 'output': output}), *rest))

    return _struck(program, change, once, lambda step: 0)


def threads_race(program: train.Program) -> train.Program:
    """Where several threads add, sums come out differently each time."""

    def noise(step: int) -> float:
        racing = step >= AT and environment.threads() > 1
        return 1e-6 * int.from_bytes(os.urandom(2)) if racing else 0

    return _struck(program, lambda state: state, lambda step: False, noise)


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
        Cause(
            'rate decays away', 'optimiser', learning_rate=1e-2, steps=1700,
            options={'schedule': 'exponential', 'decay_steps': 12},
        ),
        Cause('gates shut', 'model', gates_shut),
        Cause(
            'recurrent gain of 4', 'model', network='gru', hidden=32, learning_rate=6e-3, pad_to=20,
            options={'recurrent_gain': 4.0},
        ),
        Cause('bit of a weight', 'hardware', bit_of_a_weight, once=True),
        Cause('bit of a moment', 'hardware', bit_of_a_moment, once=True),
        Cause('threads race', 'nondeterminism', threads_race),
    )
}  # fmt: skip


# What a person would do with one of them.


def trained(cause: Cause, directory: Path, seed: int = 0, flags: str = '') -> run.TrainingResult:
    """Trains it, with flags added."""
    data.write_dataset(layout.Paths(directory).data, small.dataset(cause.pad_to))
    made = cause.config(seed)
    types_of = {name: type(value) for group in made.to_json().values() for name, value in group.items()}
    pairs = (flag.removeprefix('--').split('=', 1) for flag in flags.split())
    options = {
        name: value == 'true' if types_of[name] is bool else types_of[name](value)
        for name, value in pairs
        if name != 'threads'
    }
    return run.train_run(made.changed(**options), directory, make_program=cause.make())


def diagnosed(cause: Cause, directory: Path, **options: Any) -> diagnosis.Diagnosis:
    """Trains it until it breaks, and says why; options as of `investigation.diagnose_run`."""
    trained(cause, directory)
    return investigation.diagnose_run(directory, make_program=cause.make(later=True), **options).diagnosis


def broken(found: diagnosis.Diagnosis) -> diagnosis.Symptom | None:
    """The symptom of what broke; a spike that was recovered from is none, and no cause here shows itself by one."""
    return None if found.symptom is None or found.symptom.kind == 'spike' else found.symptom


def fresh(cause: Cause, *, seed: int, flags: str) -> diagnosis.Symptom | None:
    """What becomes of a run with another seed under flags: its symptom, if it isn't averted. Of --threads=1, which a
    process decides at its start, in one of its own."""
    with tempfile.TemporaryDirectory() as directory:
        if '--threads=1' not in flags:
            return broken(trained(cause, Path(directory), seed, flags).diagnosis)
        with concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context('spawn'), environment.use_threads, (1,)
        ) as pool:
            return broken(pool.submit(trained, cause, Path(directory), seed, flags).result().diagnosis)
