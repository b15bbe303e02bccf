"""Early-warning signals of recurrent layers, from what their probes measured (`probe`).

A new one is a field of `Probe`, and an entry of OF_LAYERS.
"""

from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp

from jaxrnn.rnn import cells
from jaxrnn.rnn.probe import Probe
from jaxrnn.types import Array, Record, Signal

GATES = (cells.INPUT, cells.FORGET, cells.OUTPUT, cells.UPDATE, cells.RESET)

GREW = 'smooth({0}, 16) > median({0}, 200) + .05'
"""Five points more than in the 200 steps before. Levels tell nothing here: four in ten of the demo's gates are dead at
first, and come alive as it learns. Of 72 healthy small runs none has it for dead gates or large cells
(benchmarks/false_alarms.py); nor for `padding_gain`, a factor of 10 being its measure; 3 have it for `memory`, a factor
of 5, and 3 for `through_time`, a factor of 10."""

INSIDE = 'reductions over what the backward pass keeps of some 64 units'

OF_LAYERS = (
    *(
        Signal(
            f'saturated_{gate.replace(" ", "_")}',
            'share of its values outside of [.1, .9]',
            'highest',
            '',
            'a gate that is open or shut, and passes little gradient',
            'Karpathy, Johnson & Fei-Fei 2015, 1506.02078',
            INSIDE,
            '10s-100s',
        )
        for gate in GATES
    ),
    *(
        Signal(
            f'dead_{gate.replace(" ", "_")}',
            'share of the units whose gate is 0 or 1 for all examples and time steps',
            'highest',
            GREW.format(f'dead_{gate.replace(" ", "_")}'),
            'units that nothing can move any more: a hard sigmoid has a gradient of 0 there',
            'derived: clip(.2x + .5, 0, 1) is flat from |x| = 2.5 on',
            INSIDE,
            '10s-100s',
        )
        for gate in GATES
    ),
    Signal(
        'large_cells',
        'share of |c| > 4',
        'highest',
        GREW.format('large_cells'),
        'cell states so large that tanh passes no gradient',
        "derived: tanh'(4) = 1.3e-3",
        INSIDE,
        '10s',
    ),
    Signal(
        'memory',
        'Σ Var(h after the last time step) / Σ Var(h after the last letter), over words and units',
        'last',
        'abs(smooth(log(memory), 16) - median(log(memory), 200)) > 1.6',
        'near 0 the padding makes all words alike, far above 1 it drives them apart at random',
        'derived: the padding iterates one map, whose bifurcations jump (Eisenmann et al. 2023, 2310.17561)',
        INSIDE,
        '10s-100s',
    ),
    Signal(
        'through_time',
        'RMS(∂L/∂a) at the first time step over that at the last, a: pre-activations',
        'farthest',
        'smooth(log(through_time), 16) < median(log(through_time), 200) - 2.3',
        'far below 1 the gradient vanishes on its way back, far above it explodes',
        'Pascanu, Mikolov & Bengio 2013, 1211.5063',
        INSIDE,
        '',
    ),
    Signal(
        'padding_gain',
        'mean over words of log(‖∂L/∂a‖ at the last letter / ‖∂L/∂a‖ at the last time step)',
        'last',
        'abs(smooth(padding_gain, 16) - median(padding_gain, 200)) > 2.3',
        'Lyapunov exponent of the padding map, times its steps: far above 0 it is chaotic, far below it forgets',
        'Vogt et al. 2020, 2006.14123; of the adjoint, along the gradient',
        INSIDE,
        '10s-100s',
    ),
)
"""Those of `of_layers`."""


def of_layers(probes: Sequence[Probe]) -> Record:
    """The signals of recurrent layers: those of OF_LAYERS that they have, the worst over the layers.

    Args:
        probes: of each layer, from the input on: the gradient of its probe (see `Probe`, `layers.probes`).
    """
    each: dict[str, list[Array]] = {}
    for layer in probes:
        of_gates = {'saturated': layer.saturated, 'dead': layer.dead}
        for what, shares in of_gates.items():
            for gate, value in shares.items():
                each.setdefault(f'{what}_{gate.replace(" ", "_")}', []).append(value)
        for name in ('large_cells', 'memory', 'through_time', 'padding_gain'):
            each.setdefault(name, []).append(getattr(layer, name))
    return {
        signal.name: _OVER_LAYERS[signal.worst](jnp.stack(each[signal.name]))
        for signal in OF_LAYERS
        if signal.name in each
    }


_OVER_LAYERS: Mapping[str, Callable[[Array], Array]] = {
    'highest': jnp.max,
    'last': lambda x: x[-1],
    'farthest': lambda x: x[jnp.argmax(jnp.abs(jnp.log(x)))],
}
