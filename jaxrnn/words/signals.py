"""The signals that a run of ours records: those of its Adam step, of its layers, and of the curvature."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxrnn import detect
from jaxrnn.optim import signals as optim
from jaxrnn.rnn import cells
from jaxrnn.rnn import signals as rnn
from jaxrnn.rnn.probe import Probe
from jaxrnn.types import Array, Record, Tree
from jaxrnn.words import optimisers
from jaxrnn.words.config import Optimiser

SIGNALS = (*optim.OF_ADAM, *rnn.OF_LAYERS, *optim.OTHERS)
"""All of them."""

ALARMS = detect.alarms_of(SIGNALS)
"""By which the first sign of a symptom is dated."""


class TrainState(NamedTuple):
    """What the next step needs."""

    step: Array  # int32, steps done
    params: Tree  # nested dictionaries of arrays
    opt_state: Tree


PARTS = 64
"""Blocks of a large matrix' rows, of which signals look at one in each step. On the demo's run alarms go on within two
steps of where they would if all were read, and what is smoothed over 16 steps is off by 3 % at most in the median
(docs/decisions/0009-signals.md)."""

OfStep = Callable[[TrainState, TrainState, Tree, Tree, Sequence[Probe]], Record]
"""State before a step, state after it, gradients, updates, what the probes measured of the layers -> what is
recorded beside the rest."""


def of_step(options: Optimiser, preset: cells.Preset, rate: Callable[[TrainState], Array]) -> OfStep:
    """What is recorded of a step: without what a setting makes meaningless."""
    left_out = set()
    if options.clip not in ('none', 'spam'):
        left_out.add('gradient_norm')  # what was clipped has another norm than the loss's gradient
    if options.second_moment == 'yogi' or not options.bias_correction:
        left_out.add('bound')  # of a v that forgets by a power, and of corrected means
    if options.second_moment == 'yogi' or options.clip == 'spam' or options.guard:
        left_out.add('second_moment_broken')  # v was given another gradient, or none
    if options.moment_dtype != 'float32':
        left_out |= {'bound', 'second_moment_broken', 'momentum_cosine'}  # of moments that are kept whole

    def signals_of(
        before: TrainState, after: TrainState, gradients: Tree, updates: Tree, probes: Sequence[Probe]
    ) -> Record:
        clipped = optimisers.clipped(options, gradients, before.opt_state, before.params)
        found = optim.of_adam(
            after.params,
            clipped,
            updates,
            optim.adam_state(after.opt_state),
            learning_rate=rate(before),
            b1=options.b1,
            b2=options.b2,
            eps=options.epsilon or preset.epsilon,
            epsilon_hat=preset.epsilon_hat,
            parts=PARTS,
        )
        kept = {name: value for name, value in found.items() if name not in left_out}
        return {**kept, **rnn.of_layers(probes)}

    return signals_of
