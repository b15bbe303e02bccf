"""Operations that break, and what a trace must say of each."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

STRUCK = ('data', 'cell', 'cell backward', 'dense', 'loss', 'update')
"""Places in which one array is struck: of one example (and one time step), except for a gradient's."""

PLACES = (*STRUCK, 'update of a layer', 'update of all', 'input')
"""Further: one layer's gradients; the tree of all gradients; what the step is given."""


class Kind(NamedTuple):
    """A way to break, and what a trace must say of it."""

    function: Callable
    ops: tuple[str, ...]
    kinds: tuple[str, ...]
    backward: bool = False
    marked: Callable | None = None  # where the mark is, if not in the function itself
    places: tuple[str, ...] = STRUCK  # where it is planted

    @property
    def source(self) -> str:
        """The marked line."""
        marked = inspect.unwrap(self.marked or self.function)
        lines, start = inspect.getsourcelines(marked)
        line = start + next(n for n, line in enumerate(lines) if '# here' in line)
        return f'{inspect.getsourcefile(marked)}:{line}'


# What breaks. Each line with a mark breaks where `hit` is 1, and changes nothing where it is 0.


def log_of_a_negative(x, hit):
    hit = hit + 0 * x
    return x + jnp.log(1 - 2 * hit)  # here


def root_of_a_negative(x, hit):
    hit = hit + 0 * x
    return x + jnp.sqrt(1 - 2 * hit) - 1  # here


def power_of_a_negative(x, hit):
    hit = hit + 0 * x
    return x + (1 - 2 * hit) ** (hit + 0.5) - 1  # here


def overflowing_exponential(x, hit):
    hit = hit + 0 * x
    weight = jnp.exp(200 * hit)  # here
    return x + (weight - weight)


def overflowing_product(x, hit):
    hit = hit + 0 * x
    large = 1e30 * hit
    square = large * large  # here
    return x + 0 * square


def divided_by_zero(x, hit):
    hit = hit + 0 * x
    return x / (1 - hit)  # here


def zero_by_zero(x, hit):
    hit = hit + 0 * x
    rest = 1 - hit
    return x + (rest / rest - 1)  # here


def logarithm_of_zero(x, hit):
    hit = hit + 0 * x
    return x + 0 * jnp.log(1 - hit)  # here


def root_whose_gradient_is_infinite(x, hit):
    return x + 1e-3 * jnp.sqrt(0 * x + (1 - hit))  # here


def gradient_through_a_where(x, hit):
    distance = jnp.sqrt(0 * x + (1 - hit))  # here
    return x + jnp.where(hit > 0, 0.0, 1e-3 * distance)


@jax.custom_vjp
def _backwards(x, hit):
    return x


def _backwards_bwd(hit, d):
    return d / (1 - hit), None  # here


_backwards.defvjp(lambda x, hit: (x, hit), _backwards_bwd)


def backward_pass_by_hand(x, hit):
    return _backwards(x, hit)


# The same beyond elementwise operations. Each element gets a row of four numbers.


def _row(x):
    """[..., 4]"""
    return jnp.broadcast_to(x[..., None], (*x.shape, 4))


def _ramp(x):
    """0, 1, 2, 3 for each element, [..., 4]."""
    return jnp.broadcast_to(jnp.arange(4, dtype=x.dtype), (*x.shape, 4))


def overflowing_sum(x, hit):
    large = _row(1e38 * (hit + 0 * x))
    total = jnp.sum(large, axis=-1)  # here
    return x + 0 * total


def overflowing_sum_over_examples(x, hit):
    large = _row(1e38 * (hit + 0 * x))
    total = jnp.sum(large)  # here
    return x + 0 * total


def overflowing_matrix_product(x, hit):
    large = _row(1e38 * (hit + 0 * x))
    product = jnp.matmul(large, jnp.ones((4, 3)))  # here
    return x + 0 * product[..., 0]


def overflowing_cumulative_sum(x, hit):
    large = _row(1e38 * (hit + 0 * x))
    sums = jnp.cumsum(large, axis=-1)  # here
    return x + 0 * sums[..., -1]


def overflowing_cumulative_product(x, hit):
    factors = 1 + _row(1e10 * (hit + 0 * x))
    products = jnp.cumprod(factors, axis=-1)  # here
    return x + 0 * products[..., -1]


def softmax_by_hand(x, hit):
    scores = _ramp(x) * _row(50 * (hit + 0 * x))
    weights = jnp.exp(scores)  # here
    return x + (jnp.sum(weights / jnp.sum(weights, axis=-1, keepdims=True), axis=-1) - 1)


def logsumexp_by_hand(x, hit):
    scores = _row(-200 * (hit + 0 * x))
    return x + 0 * jnp.log(jnp.sum(jnp.exp(scores), axis=-1))  # here


def softmax_of_a_masked_row(x, hit):
    scores = jnp.where(_row(hit + 0 * x) > 0, -jnp.inf, _ramp(x) + _row(0 * x))
    return x + 0 * jax.nn.softmax(scores, axis=-1)[..., 0]  # here


def log_of_a_softmax(x, hit):
    probabilities = jax.nn.softmax(_ramp(x) * _row(100 * (hit + 0 * x)), axis=-1)
    return x + 0 * jnp.log(probabilities[..., 0])  # here


def entropy_of_a_certainty(x, hit):
    p = 1 - (hit + 0 * x)
    return x - 0 * p * jnp.log(p)  # here


def cross_entropy_of_a_saturated_sigmoid(x, hit):
    p = jax.nn.sigmoid(50 * (hit + 0 * x))
    return x - 0 * jnp.log(1 - p)  # here


def direction_of_a_zero_vector(x, hit):
    vector = _row(1 - (hit + 0 * x))
    direction = vector / jnp.linalg.norm(vector, axis=-1, keepdims=True)  # here
    return x + 0 * direction[..., 0]


def gradient_of_a_norm(x, hit):
    vector = _row(0 * x + (1 - hit))
    return x + 1e-3 * jnp.linalg.norm(vector, axis=-1)  # here


def gradient_of_a_direction(x, hit):
    vector = _row(0 * x + (1 - hit))
    length = jnp.linalg.norm(vector, axis=-1, keepdims=True)  # here
    return x + 1e-3 * (vector / jnp.maximum(length, 1e-6))[..., 0]


def gradient_of_a_deviation(x, hit):
    values = _ramp(x) * _row(0 * x + (1 - hit))
    return x + 1e-3 * jnp.std(values, axis=-1)  # here


def gradient_of_an_arcsine(x, hit):
    return x + 1e-3 * jnp.arcsin(0 * x + hit)  # here


def gradient_of_an_angle(x, hit):
    return x + 1e-3 * jnp.arctan2(0 * x, 0 * x + (1 - hit))  # here


def cosine_of_a_zero_vector(x, hit):
    a, b = _row(1 - (hit + 0 * x)), _ramp(x)
    lengths = jnp.sqrt(jnp.sum(a * a, axis=-1)) * jnp.sqrt(jnp.sum(b * b, axis=-1))
    return x + 0 * (jnp.sum(a * b, axis=-1) / lengths)  # here


def mean_of_nothing(x, hit):
    mask = _row(1 - (hit + 0 * x))
    mean = jnp.sum(_row(x) * mask, axis=-1) / jnp.sum(mask, axis=-1)  # here
    return x + 0 * mean


def arccosine_beyond_one(x, hit):
    return x + 0 * jnp.arccos(1.5 * (hit + 0 * x))  # here


def log1p_of_minus_one(x, hit):
    return x + 0 * jnp.log1p(-(hit + 0 * x))  # here


def atanh_of_one(x, hit):
    return x + 0 * jnp.atanh(hit + 0 * x)  # here


def cast_to_float16(x, hit):
    large = 1e5 * (hit + 0 * x)
    half = large.astype(jnp.float16)  # here
    return x + 0 * half.astype(x.dtype)


def cast_to_bfloat16(x, hit):
    large = 3.4e38 * (hit + 0 * x)
    half = large.astype(jnp.bfloat16)  # here
    return x + 0 * half.astype(x.dtype)


def product_in_float16(x, hit):
    half = (300 * (hit + 0 * x)).astype(jnp.float16)
    square = half * half  # here
    return x + 0 * square.astype(x.dtype)


def index_out_of_bounds(x, hit):
    index = (9 * (hit + 0 * x)).astype(jnp.int32)
    return x + 0 * jnp.take(jnp.ones(4), index)  # here


def inverse_of_a_singular_matrix(x, hit):
    inverse = jnp.linalg.inv(_diagonal(1 - (hit + 0 * x)))  # here
    return x + 0 * inverse[..., 1, 1]


def solution_of_a_singular_system(x, hit):
    matrix = _diagonal(1 - (hit + 0 * x))
    solution = jnp.linalg.solve(matrix, _row(1 + 0 * x)[..., :2, None])  # here
    return x + 0 * solution[..., 1, 0]


def root_of_an_indefinite_matrix(x, hit):
    root = jnp.linalg.cholesky(_diagonal(1 - 2 * (hit + 0 * x)))  # here
    return x + 0 * root[..., 1, 1]


def _diagonal(corner):
    """The matrices 1 0, 0 corner, [..., 2, 2]."""
    zero = jnp.zeros_like(corner)
    rows = jnp.stack([zero + 1, zero], axis=-1), jnp.stack([zero, corner], axis=-1)
    return jnp.stack(rows, axis=-2)


# The same within a call, a loop or a branch.


@jax.jit
def _ratio(x, y):
    return x / y  # here


def in_a_jitted_helper(x, hit):
    return _ratio(x, 1 - (hit + 0 * x))


def in_a_checkpoint(x, hit):
    @jax.checkpoint
    def ratio(x, hit):
        return jnp.sin(x) + (x / (1 - hit) - jnp.sin(x))  # here

    return ratio(x, hit + 0 * x)


def gradient_in_a_checkpoint(x, hit):
    @jax.checkpoint
    def root(x):
        return 1e-3 * jnp.sqrt(0 * x + (1 - hit))  # here

    return x + root(x)


def in_a_loop(x, hit):
    hit = hit + 0 * x

    def body(n, x):
        return x / (1 - hit * (n == 2))  # here

    return lax.fori_loop(0, 4, body, x)


def in_a_while_loop(x, hit):
    hit = hit + 0 * x

    def body(carry):
        n, x = carry
        return n + 1, x / (1 - hit * (n == 2))  # here

    return lax.while_loop(lambda carry: carry[0] < 4, body, (0, x))[1]


def in_a_nested_scan(x, hit):
    def body(x, hit):
        return x / (1 - hit), None  # here

    return lax.scan(body, x, jnp.moveaxis(_ramp(x) * _row(hit + 0 * x) / 3, -1, 0))[0]


def in_a_branch(x, hit):
    hit = hit + 0 * x

    def ratio(x):
        return x / (1 - hit)  # here

    return lax.cond(jnp.any(hit > 0), ratio, lambda x: x, x)


def mapped(x, hit):
    def ratio(x, hit):
        return x / (1 - hit)  # here

    return jax.vmap(ratio)(x, hit + 0 * x)


@jax.custom_jvp
def _same(x, hit):
    return x


@_same.defjvp
def _same_jvp(primals, tangents):
    x, hit = primals
    return x, tangents[0] / (1 - hit)  # here


def wrong_derivative(x, hit):
    return _same(x, hit + 0 * x)


# The same in an optimiser. `hit` is one number.


def rms_without_epsilon(g, hit):
    masked = g * (1 - hit)
    mean_square = 0.1 * masked**2
    return masked / jnp.sqrt(mean_square)  # here


def centred_rms(g, hit):
    mean_square, mean = 0.5 * g**2, hit * g
    return g / (jnp.sqrt(mean_square - mean**2) + 1e-8)  # here


def bias_correction_at_step_zero(g, hit):
    step = 1 - hit
    return g / (1 - 0.9**step)  # here


def schedule_with_a_pole(gradients, hit):
    rate = 1 / (1 - hit)  # here
    return jax.tree.map(lambda g: g * rate, gradients)


def clipped_by_a_norm_of_zero(gradients, hit):
    gradients = jax.tree.map(lambda g: g * (1 - hit), gradients)
    scale = 1 / optax.tree.norm(gradients)  # here
    return jax.tree.map(lambda g: g * scale, gradients)


def optax_without_epsilon(gradients, hit):
    gradients = jax.tree.map(lambda g: g * (1 - hit), gradients)
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_rms(eps=0.0))
    return chain.update(gradients, chain.init(gradients))[0]  # here


# What the step is given. Each returns state and batch, and the path that a trace must name.


def nan_in_targets(state, batch, places):
    targets = batch_leaf(batch, 'targets').copy()
    targets[list(places.examples), 1] = np.nan
    return state, _changed(batch, 'targets', targets), 'batch/targets'


def infinity_in_targets(state, batch, places):
    targets = batch_leaf(batch, 'targets').copy()
    targets[list(places.examples), 1] = np.inf
    return state, _changed(batch, 'targets', targets), 'batch/targets'


def target_that_float32_cannot_hold(state, batch, places):
    targets = np.asarray(batch_leaf(batch, 'targets'), np.float64)
    targets[list(places.examples), 1] = 1e39
    return state, _changed(batch, 'targets', targets), 'batch/targets'


def nan_in_inputs(state, batch, places):
    letters = batch['letters'].copy()
    examples = list(places.examples)
    letters[(places.time_step, examples) if places.time_major else (examples, places.time_step)] = np.nan
    return state, _changed(batch, 'letters', letters), 'batch/letters'


def nan_in_the_row_of_a_letter(state, batch, places):
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    paths = [jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in leaves]

    def is_kernel(path, shape):
        """haiku keeps both kernels in one, the letters' rows first."""
        of_layer = any(layer in path for layer in places.layers) and not {'mu', 'nu'} & set(path.split('/'))
        return of_layer and max(shape, default=0) >= places.letters

    kernel = next(n for n, path in enumerate(paths) if is_kernel(path, np.shape(leaves[n][1])))
    arrays = [np.array(leaf) for _, leaf in leaves]
    axis = int(np.argmax(arrays[kernel].shape))
    np.moveaxis(arrays[kernel], axis, 0)[3] = np.nan
    return jax.tree.unflatten(structure, arrays), batch, f'state/{paths[kernel]}'


class Places(NamedTuple):
    """Where what is given is spoilt."""

    time_step: int
    examples: tuple[int, ...]
    time_major: bool
    layers: tuple[str, ...]
    letters: int  # how many there are


def batch_leaf(batch: Any, name: str) -> Any:
    return batch[name] if isinstance(batch, dict) else getattr(batch, name)


def _changed(batch: Any, name: str, array: np.ndarray) -> Any:
    return {**batch, name: array} if isinstance(batch, dict) else batch._replace(**{name: array})


DIVISION = ('division by zero', 'division of zero by zero', 'invalid argument')
"""x / 0, where x may be 0 too."""

SLOPE = ('div', 'mul', 'rsqrt'), ('division by zero', 'infinities')
"""The derivative of a root at 0, and its product with a 0."""

DIVIDED = ('div',), DIVISION
INPUT = ('input',), ('input',)


def _at(*places: str, **fields: Any) -> dict[str, Any]:
    return {'places': places, **fields}


_MORE = {
    # reductions and products
    'overflowing sum': Kind(overflowing_sum, ('reduce_sum',), ('overflow',), **_at('data', 'cell')),
    'overflowing sum over examples': Kind(
        overflowing_sum_over_examples, ('reduce_sum',), ('overflow',), **_at('data', 'dense')
    ),
    'overflowing matrix product': Kind(
        overflowing_matrix_product, ('dot_general',), ('overflow',), **_at('cell', 'cell backward', 'loss')
    ),
    'overflowing cumulative sum': Kind(
        overflowing_cumulative_sum, ('cumsum',), ('overflow',), **_at('data', 'dense')
    ),
    'overflowing cumulative product': Kind(
        overflowing_cumulative_product, ('cumprod', 'mul'), ('overflow',), **_at('cell', 'loss')
    ),
    # what everybody writes by hand once
    'softmax by hand': Kind(softmax_by_hand, ('exp',), ('overflow',), **_at('cell', 'dense')),
    'logsumexp by hand': Kind(
        logsumexp_by_hand, ('log',), ('division by zero',), **_at('cell backward', 'loss')
    ),
    'softmax of a masked row': Kind(
        softmax_of_a_masked_row, ('sub',), ('infinities',), **_at('cell', 'dense')
    ),
    'log of a softmax': Kind(log_of_a_softmax, ('log',), ('division by zero',), **_at('dense', 'loss')),
    'entropy of a certainty': Kind(
        entropy_of_a_certainty, ('log',), ('division by zero',), **_at('cell', 'dense')
    ),
    'cross entropy of a saturated sigmoid': Kind(
        cross_entropy_of_a_saturated_sigmoid, ('log',), ('division by zero',), **_at('loss', 'data')
    ),
    'direction of a zero vector': Kind(
        direction_of_a_zero_vector, ('div',), ('division of zero by zero',), **_at('cell', 'update')
    ),
    'cosine of a zero vector': Kind(
        cosine_of_a_zero_vector, ('div',), ('division of zero by zero',), **_at('cell', 'loss')
    ),
    'mean of nothing': Kind(mean_of_nothing, ('div',), ('division of zero by zero',), **_at('data', 'loss')),
    'gradient of a norm': Kind(gradient_of_a_norm, *SLOPE, True, **_at('cell', 'dense')),
    'gradient of a direction': Kind(
        gradient_of_a_direction,
        ('div', 'mul'),
        ('division by zero', 'gradient through where'),
        True,
        **_at('dense', 'loss'),
    ),
    'gradient of a deviation': Kind(gradient_of_a_deviation, *SLOPE, True, **_at('cell', 'loss')),
    'gradient of an arcsine': Kind(gradient_of_an_arcsine, *SLOPE, True, **_at('cell', 'dense')),
    'gradient of an angle': Kind(gradient_of_an_angle, *DIVIDED, True, **_at('cell', 'loss')),
    # outside of what a function or a type holds
    'arccosine beyond one': Kind(
        arccosine_beyond_one, ('acos',), ('invalid argument',), **_at('data', 'cell')
    ),
    'log1p of minus one': Kind(log1p_of_minus_one, ('log1p',), ('division by zero',), **_at('cell', 'loss')),
    'atanh of one': Kind(atanh_of_one, ('atanh',), ('division by zero',), **_at('cell backward', 'dense')),
    'cast to float16': Kind(cast_to_float16, ('convert_element_type',), ('overflow',), **_at('data', 'cell')),
    'cast to bfloat16': Kind(
        cast_to_bfloat16, ('convert_element_type',), ('overflow',), **_at('cell backward', 'dense', 'update')
    ),
    'product in float16': Kind(product_in_float16, ('mul',), ('overflow',), **_at('cell', 'loss')),
    'index out of bounds': Kind(
        index_out_of_bounds, ('gather',), ('index out of range',), **_at('data', 'cell', 'dense')
    ),
    # linear algebra
    'inverse of a singular matrix': Kind(
        inverse_of_a_singular_matrix,
        ('triangular_solve', 'custom_linear_solve'),
        DIVISION,
        **_at('cell', 'loss'),
    ),
    'solution of a singular system': Kind(
        solution_of_a_singular_system,
        ('triangular_solve', 'custom_linear_solve'),
        DIVISION,
        **_at('data', 'dense'),
    ),
    'root of an indefinite matrix': Kind(
        root_of_an_indefinite_matrix, ('cholesky',), ('invalid argument',), **_at('cell', 'loss')
    ),
    # within something
    'in a jitted helper': Kind(
        in_a_jitted_helper, *DIVIDED, marked=_ratio, **_at('cell', 'cell backward', 'dense')
    ),
    'in a checkpoint': Kind(in_a_checkpoint, *DIVIDED, **_at('cell', 'loss')),
    'gradient in a checkpoint': Kind(gradient_in_a_checkpoint, *SLOPE, True, **_at('cell', 'dense')),
    'in a loop': Kind(in_a_loop, *DIVIDED, **_at('cell', 'dense', 'update')),
    'in a while loop': Kind(in_a_while_loop, *DIVIDED, **_at('data', 'cell backward', 'update')),
    'in a nested scan': Kind(in_a_nested_scan, *DIVIDED, **_at('cell', 'loss', 'data')),
    'in a branch': Kind(in_a_branch, *DIVIDED, **_at('cell', 'dense', 'update')),
    'mapped': Kind(mapped, *DIVIDED, **_at('data', 'cell', 'loss')),
    'wrong derivative': Kind(
        wrong_derivative, *DIVIDED, True, marked=_same_jvp, **_at('cell', 'dense', 'loss')
    ),
    # the optimiser
    'root mean square without epsilon': Kind(
        rms_without_epsilon, ('div',), ('division of zero by zero',), **_at('update', 'update of a layer')
    ),
    'centred root mean square': Kind(
        centred_rms, ('sqrt',), ('invalid argument',), **_at('update', 'update of a layer')
    ),
    'bias correction at step 0': Kind(
        bias_correction_at_step_zero, *DIVIDED, **_at('update', 'update of a layer')
    ),
    'schedule with a pole': Kind(
        schedule_with_a_pole, ('div',), ('division by zero',), **_at('update of all')
    ),
    'clipped by a norm of zero': Kind(
        clipped_by_a_norm_of_zero, ('div',), ('division by zero',), **_at('update of all')
    ),
    'optax without epsilon': Kind(
        optax_without_epsilon, ('rsqrt', 'div'), ('division by zero',), **_at('update of all')
    ),
    # what is given
    'NaN in targets': Kind(nan_in_targets, *INPUT, **_at('input')),
    'infinity in targets': Kind(infinity_in_targets, *INPUT, **_at('input')),
    'target that float32 cannot hold': Kind(target_that_float32_cannot_hold, *INPUT, **_at('input')),
    'NaN in inputs': Kind(nan_in_inputs, *INPUT, **_at('input')),
    'NaN in the row of a letter': Kind(nan_in_the_row_of_a_letter, *INPUT, **_at('input')),
}

KINDS = {
    'log of a negative': Kind(log_of_a_negative, ('log',), ('invalid argument',)),
    'root of a negative': Kind(root_of_a_negative, ('sqrt',), ('invalid argument',)),
    'power of a negative': Kind(power_of_a_negative, ('pow',), ('invalid argument',)),
    'overflowing exponential': Kind(overflowing_exponential, ('exp',), ('overflow',)),
    'overflowing product': Kind(overflowing_product, ('mul',), ('overflow',)),
    'divided by zero': Kind(divided_by_zero, ('div',), ('division by zero',)),
    'zero by zero': Kind(zero_by_zero, ('div',), ('division of zero by zero',)),
    'logarithm of zero': Kind(logarithm_of_zero, ('log',), ('division by zero',)),
    'root whose gradient is infinite': Kind(
        root_whose_gradient_is_infinite, ('div', 'mul', 'rsqrt'), ('division by zero', 'infinities'), True
    ),
    'gradient through a where': Kind(
        gradient_through_a_where, ('div', 'mul', 'rsqrt'), ('gradient through where',), True
    ),
    'backward pass by hand': Kind(
        backward_pass_by_hand,
        ('div',),
        ('division by zero', 'division of zero by zero'),
        True,
        _backwards_bwd,
    ),
    **_MORE,
}
