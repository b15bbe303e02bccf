"""Any finite number, in float32 and bfloat16: subnormal, huge, of either zero, and all of them side by side.

No function makes a NaN of finite numbers for which its formula has a value. An infinity is allowed where the value
itself is out of the range of float32. What each promises, and of which numbers, is in the tables.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transforms_test import TRANSFORMS

from jaxrnn import tree
from jaxrnn.optim import signals, transforms
from jaxrnn.record import adam, motion
from jaxrnn.rnn import cells, probe, scan
from jaxrnn.rnn.signals import of_layers
from jaxrnn.words import optimisers, train
from jaxrnn.words.config import Optimiser

ANY = float(np.finfo(np.float32).max)
SQUARES = 2.0**61
"""Of eight such numbers the sum of squares is a float32."""
SAMPLED = 2.0**57
"""Of 1,024 such numbers, too: signals of a state alone sum up samples of it."""
PRODUCTS = 2.0**24
"""Four time steps of products of so many of these and weights are."""
BFLOAT16 = float(jnp.finfo(jnp.bfloat16).max)

settings.register_profile('numbers', max_examples=25, deadline=None, derandomize=True, database=None)
every = settings(settings.get_profile('numbers'))


def numbers(shape: tuple[int, ...], most: float = ANY) -> st.SearchStrategy[np.ndarray]:
    """float32 up to `most`: each any, or all of about one size, or two sizes far apart."""
    one = st.floats(-most, most, width=32)
    sizes = st.integers(-149, int(np.log2(most)) - 1)
    exact = st.sampled_from(
        [0.0, -0.0, 1e-45, -1e-45, float(np.finfo(np.float32).tiny), most, -most, 1.0, -1.0]
    )
    scaled = st.builds(
        lambda x, a, b, choice: np.float32(np.where(choice, np.ldexp(x, a), np.ldexp(x, b))),
        hnp.arrays(np.float64, shape, elements=st.floats(-1.9, 1.9)), sizes, sizes, hnp.arrays(bool, shape),
    )  # fmt: skip
    return st.one_of(hnp.arrays(np.float32, shape, elements=one | exact), scaled)


def no_nan(found: Any) -> None:
    for name, leaf in tree.named_leaves(found).items():
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            assert not np.isnan(np.asarray(leaf, np.float32)).any(), (name, leaf)


def finite(found: Any) -> None:
    for name, leaf in tree.named_leaves(found).items():
        assert np.isfinite(np.asarray(leaf, np.float32)).all(), (name, leaf)


class Promise(NamedTuple):
    """What a function makes of numbers."""

    function: Callable[..., Any]
    takes: Any  # tree of (shape, most)
    keeps: Callable[[Any], None]


def inputs(takes: Any) -> st.SearchStrategy:
    """Arrays for each (shape, most)."""
    leaves, structure = jax.tree.flatten(
        takes, is_leaf=lambda x: isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], tuple)
    )
    return st.tuples(*(numbers(*leaf) for leaf in leaves)).map(
        functools.partial(jax.tree.unflatten, structure)
    )


# Cells

B, H = 2, 3


def preset_cells() -> dict[str, cells.Cell]:
    found = {}
    for name, preset in cells.PRESETS.items():
        found[f'{name} lstm'] = cells.lstm(preset.gate)
        found[f'{name} gru'] = (cells.gru_reset_after if preset.reset_after else cells.gru_reset_before)(
            preset.gate
        )
    return found


CELLS = preset_cells()


def one_step(cell: cells.Cell) -> Callable:
    """Forward and back, with whatever the products give."""

    def call(values: dict) -> Any:
        tm1 = cell.carry(**values['tm1'])
        products = [lambda h, us=us: list(us) for us in values['us']]
        t, saved = cell.forward(products, list(values['x']), tm1)
        transposed = [lambda d: values['back']] * len(cell.blocks)
        return {'t': t, 'd': cell.backward(transposed, saved, tm1, cell.carry(**values['d']))}

    return call


def one_step_takes(cell: cells.Cell) -> dict:
    """Pre-activations are any; a cotangent times a carry must be a float32."""
    fields = cell.carry._fields
    return {
        'x': [((B, H), ANY)] * len(cell.d_inputs),
        'us': [[((B, H), SQUARES)] * count for count in cell.blocks],  # a GRU's reset gate multiplies one
        'tm1': dict.fromkeys(fields, ((B, H), SQUARES)),
        'd': dict.fromkeys(fields, ((B, H), SQUARES)),
        'back': ((B, H), SQUARES),
    }


def layer(cell: cells.Cell, **options: Any) -> Callable:
    """Four time steps, their gradients, and what a probe measures of them."""

    def call(values: dict) -> Any:
        def loss(weights, xs, carry, seen):
            outputs, last = scan.run(
                cell, scan.Weights(**weights), xs, cell.carry(**carry), probe=seen, **options
            )
            return jnp.sum(outputs.astype(jnp.float32) * values['out']), last

        seen = None if options.get('reference') else probe.new_probe(cell)
        arguments = (values['weights'], values['xs'], values['carry'], seen)
        argnums = (0, 1, 2) if seen is None else (0, 1, 2, 3)
        (total, last), slopes = jax.value_and_grad(loss, argnums, has_aux=True)(*arguments)
        return total, last, slopes, {} if seen is None else of_layers([slopes[3]])

    return call


def layer_takes(cell: cells.Cell) -> dict:
    gates = sum(cell.blocks)
    weights = {'kernel': ((2, gates * H), PRODUCTS), 'bias': ((gates * H,), PRODUCTS)}
    weights['recurrent_kernel'] = ((H, gates * H), PRODUCTS)
    return {
        'weights': weights,
        'xs': ((4, B, 2), PRODUCTS),
        'carry': dict.fromkeys(cell.carry._fields, ((B, H), PRODUCTS)),
        'out': ((4, B, H), 1.0),
    }


# Losses and scores

PAIR = {'predictions': ((4, 3), ANY), 'targets': ((4, 3), ANY)}


def loss_and_slope(values: dict) -> Any:
    return jax.value_and_grad(train.mean_squared_error)(values['predictions'], values['targets'])


def scores(values: dict) -> Any:
    return train.quality(values['predictions'], values['targets'])


# Transforms

PARAMS = {'bias': ((3,), SQUARES), 'kernel': ((2, 3), SQUARES)}
ANY_PARAMS = {'bias': ((3,), ANY), 'kernel': ((2, 3), ANY)}


def steps_of(transform: optax.GradientTransformation) -> Callable:
    """Three steps, the last of them of ordinary gradients."""
    transform = optax.with_extra_args_support(transform)

    def call(values: dict) -> Any:
        state, found = transform.init(values['params']), []
        for gradients in (*values['gradients'], jax.tree.map(jnp.ones_like, values['params'])):
            updates, state = transform.update(gradients, state, values['params'], value=jnp.float32(1))
            found.append(updates)
        return found, state

    return call


OPTIMISERS = {
    'tiny epsilon': Optimiser(epsilon=1e-45),
    'b1 of 0': Optimiser(b1=0.0),
    'b2 near 1': Optimiser(b2=1 - 1e-16),
    'b1 near 1': Optimiser(b1=1 - 1e-16),
    'plateau': Optimiser(schedule='plateau', plateau_window=1),
    'all clips': Optimiser(clip='adaptive', update_clip=1.0, spectral_cap=0.05, guard=True),
    'per leaf': Optimiser(clip='per_leaf'),
    'global norm': Optimiser(clip='global_norm'),
}  # fmt: skip


def optimiser_of(options: Optimiser) -> optax.GradientTransformation:
    made = optimisers.build(options, epsilon=1e-7, epsilon_hat=True)

    def update(grads, state, params=None, *, value, **extra):
        return made.update(grads, state, params, value=value, rate=jnp.float32(1e-3), loss_of=None)

    return optax.GradientTransformationExtraArgs(made.init, update)


# Signals


def of_adam(values: dict) -> Any:
    """Of an Adam step after another, as a train step has them."""
    made = optax.chain(transforms.scale_by_adam(0.9, 0.999, 1e-8, epsilon_hat=False), optax.scale(-1e-3))
    params = values['params']
    state = made.init(params)
    for gradients in values['gradients']:
        before = state
        updates, state = made.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    states = [signals.adam_state(each) for each in (state, before)]
    return signals.of_adam(
        params, gradients, updates, states[0], before=states[1], learning_rate=1e-3, eps=1e-8
    )


def of_anybody(values: dict) -> Any:
    """The same of two states, without a line in the step."""
    made = optax.adam(1e-3)
    params, state = values['params'], made.init(values['params'])
    for gradients in values['gradients']:
        before = {'params': params, 'opt': state}
        updates, state = made.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    after = {'params': params, 'opt': state}
    constants = adam.Constants(0.9, 0.999, 1e-8)
    return adam.of_step(constants, adam.sampled(before), after), motion.of_step(motion.sampled(before), after)


def moved(values: dict) -> Any:
    return motion.of_step(motion.sampled(values['before']), values['after'])


SAMPLED_PARAMS = {'bias': ((3,), SAMPLED), 'kernel': ((2, 3), SAMPLED)}
SAMPLED_TWO = {'params': SAMPLED_PARAMS, 'gradients': [SAMPLED_PARAMS, SAMPLED_PARAMS]}
TWO = {'params': PARAMS, 'gradients': [PARAMS, PARAMS]}

LAYERS = ('keras1 lstm', 'keras1 gru', 'keras3 gru')
"""Each gate and each cell once: they take seconds to be compiled."""

OF_STEPS = {'params': PARAMS, 'gradients': [ANY_PARAMS] * 2}
OF_ADAM = {'params': PARAMS, 'gradients': [PARAMS] * 2}
"""Adam's v is the mean of squares: one that isn't a float32 leaves a state that isn't finite. The guard skips it."""

SQUARED = {'predictions': ((4, 3), SQUARES), 'targets': ((4, 3), SQUARES)}
WITHOUT_ADAM = ('clip_by_leaf_norm', 'zclip', 'adagc', 'spectral_cap', 'guard', 'all of it')

PROMISES = {
    **{f'{name}: one step': Promise(one_step(cell), one_step_takes(cell), no_nan) for name, cell in CELLS.items()},
    **{f'{name}: layer': Promise(layer(CELLS[name]), layer_takes(CELLS[name]), no_nan) for name in LAYERS},
    'in bfloat16: layer': Promise(
        layer(CELLS['keras3 gru'], dtype=jnp.bfloat16), layer_takes(CELLS['keras3 gru']), no_nan
    ),
    'loss and its gradient': Promise(loss_and_slope, PAIR, no_nan),
    'scores': Promise(scores, SQUARED, no_nan),
    **{
        f'transform {name}': Promise(
            steps_of(transform), OF_STEPS if name in WITHOUT_ADAM else OF_ADAM, no_nan
        )
        for name, transform in TRANSFORMS.items()
    },
    **{
        f'optimiser {name}': Promise(
            steps_of(optimiser_of(made)), OF_STEPS if made.guard else OF_ADAM, no_nan
        )
        for name, made in OPTIMISERS.items()
    },
    'signals of Adam': Promise(of_adam, TWO, finite),
    "signals of anybody's Adam": Promise(of_anybody, SAMPLED_TWO, finite),
    'motion': Promise(moved, {'before': ANY_PARAMS, 'after': ANY_PARAMS}, no_nan),
}  # fmt: skip


@pytest.mark.parametrize('name', PROMISES)
def test_any_number(name):
    promise = PROMISES[name]
    compiled = jax.jit(promise.function)

    @every
    @given(inputs(promise.takes))
    def check(values):
        promise.keeps(jax.device_get(compiled(values)))

    check()


# What was found


def test_a_gradient_that_vanishes_has_no_infinite_cosine():
    """Its square is 0 in float32, its product with the step isn't."""
    params, state = (
        {'w': jnp.ones(3)},
        optax.ScaleByAdamState(jnp.int32(9), {'w': jnp.ones(3)}, {'w': jnp.ones(3)}),
    )
    gradients, updates = {'w': jnp.full(3, 1e-23)}, {'w': jnp.full(3, 1e-3)}
    finite(signals.of_adam(params, gradients, updates, state, learning_rate=1e-3))


@pytest.mark.parametrize('epsilon_hat', [False, True])
@pytest.mark.parametrize('epsilon', [1e-50, 1e-39, 1e-37])
def test_an_epsilon_that_float32_lacks_makes_no_nan_of_zeros(epsilon, epsilon_hat):
    made = transforms.scale_by_adam(0.9, 0.999, epsilon, epsilon_hat=epsilon_hat)
    updates, _ = made.update(jnp.zeros(3), made.init(jnp.zeros(3)))
    assert not np.any(updates)


def test_a_ratio_of_a_probe_is_finite_and_has_a_logarithm():
    a, b = jnp.float32([1e19, 0, 1e19, 0]), jnp.float32([0, 1e19, 1e19, 0])
    finite(jnp.log(probe._ratio(a, b)))
