"""The recurrence's masks, directions, types and limits: against the float64 oracle and the plain scan."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import oracle
import pytest
from tolerance import TOLERANCES, assert_close

from jaxrnn.rnn import cells, scan
from jaxrnn.trace.equations import scan_counts

CELLS = {
    'lstm': (cells.lstm(cells.SIGMOID), oracle.lstm),
    'gru_reset_after': (cells.gru_reset_after(cells.SIGMOID), oracle.gru_reset_after),
    'gru_reset_before': (cells.gru_reset_before(cells.SIGMOID), oracle.gru_reset_before),
}
PLANS = {
    'cpu': scan.CPU,
    'large batch': scan.CPU_LARGE_BATCH,
    'accelerator': scan.ACCELERATOR,
    'partly unrolled': scan.Plan(features_first=False, unroll=3, scatter_from=0),
}
SIZES = ((1, 1, 2, 3), (6, 3, 2, 4))
"""T, B, D, H."""

MASKS = {
    'none': lambda rng, shape: None,
    'all': lambda rng, shape: np.ones(shape, bool),
    'nothing': lambda rng, shape: np.zeros(shape, bool),
    'random': lambda rng, shape: rng.random(shape) < 0.5,
    'a row': lambda rng, shape: np.broadcast_to(np.arange(shape[1]) > 0, shape),
}

each_cell = pytest.mark.parametrize('cell', CELLS)
each_plan = pytest.mark.parametrize('plan', PLANS)


def draw(cell: str, sizes: tuple[int, int, int, int], seed: int = 0) -> dict:
    """Weights, inputs, carry, and cotangents of the outputs and of the last carry."""
    steps, batch, width_in, width = sizes
    made = CELLS[cell][0]
    gates = sum(made.blocks) * width
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    weights = scan.Weights(
        normal(width_in, gates),
        normal(gates),
        normal(width, gates) / np.float32(np.sqrt(width)),
        normal(gates) if made.takes_recurrent_bias else None,
    )
    return {
        'weights': weights,
        'xs': normal(steps, batch, width_in),
        'carry': made.carry(*(normal(batch, width) for _ in made.carry._fields)),
        'd_outputs': normal(steps, batch, width),
        'd_last': normal(batch, width),
    }


@functools.cache
def compiled(cell: str, plan: str | None, *, reverse: bool = False, dtype: str | None = None) -> Callable:
    """Outputs, last h, and gradients of their weighted sum by weights, inputs and carry; None: the reference."""
    how = {'reference': True} if plan is None else {'plan': PLANS[plan]}

    def loss(weights, xs, carry, mask, d_outputs, d_last):
        outputs, last = scan.run(
            CELLS[cell][0], weights, xs, carry, mask=mask, reverse=reverse, dtype=dtype, **how
        )
        total = jnp.sum(d_outputs * outputs) + jnp.sum(d_last * last.h)
        return total, (outputs, last.h)

    def run(drawn, mask):
        d = drawn['d_outputs'], drawn['d_last']
        by = (0, 2) if jnp.issubdtype(drawn['xs'].dtype, jnp.integer) else (0, 1, 2)
        (_, results), slopes = jax.value_and_grad(loss, by, has_aux=True)(
            drawn['weights'], drawn['xs'], drawn['carry'], mask, *d
        )
        return results, slopes

    return jax.jit(run)


def expected(cell: str, drawn: dict, mask: np.ndarray | None, *, reverse: bool) -> tuple:
    """Outputs and last h: each example's valid steps alone, through the oracle, kept over the steps between."""
    weights, xs, carry = drawn['weights'], drawn['xs'].astype(np.float64), drawn['carry']
    mask = np.ones(xs.shape[:2], bool) if mask is None else mask
    named = {name: value for name, value in weights._asdict().items() if value is not None}
    outputs = np.empty((*xs.shape[:2], carry.h.shape[1]))
    order = range(len(xs))[::-1] if reverse else range(len(xs))
    for b in range(xs.shape[1]):
        valid = [t for t in order if mask[t, b]]
        started = {name: value[b : b + 1] for name, value in carry._asdict().items()}
        hs = CELLS[cell][1](xs[valid, b : b + 1], **started, **named, gate=oracle.sigmoid) if valid else []
        h, made = carry.h[b], iter(hs)
        for t in order:
            h = next(made)[0] if mask[t, b] else h
            outputs[t, b] = h
    return outputs, outputs[order[-1]]


def combinations():
    """All; of which those of plans that little else uses are a battery where the cell is not the LSTM."""
    for cell, plan, reverse in itertools.product(CELLS, PLANS, (False, True)):
        telling = cell == 'lstm' or plan in ('cpu', 'accelerator')
        yield pytest.param(cell, plan, reverse, marks=() if telling else pytest.mark.battery)


@pytest.mark.parametrize('cell, plan, reverse', list(combinations()))
def test_masks_and_directions(cell, plan, reverse):
    for sizes, (name, make) in itertools.product(SIZES, MASKS.items()):
        drawn, mask = draw(cell, sizes), make(np.random.default_rng(1), sizes[:2])
        if mask is not None:  # what is masked is as if it weren't there
            drawn['xs'] = np.where(mask[:, :, None], drawn['xs'], np.float32(np.nan))
        results, slopes = compiled(cell, plan, reverse=reverse)(drawn, mask)
        wanted = expected(cell, drawn, mask, reverse=reverse)
        for found, of_oracle in zip(results, wanted, strict=True):
            assert_close(found, of_oracle, 'float32 forward')
        _, reference = compiled(cell, None, reverse=reverse)(drawn, mask)
        for path, slope in jax.tree.leaves_with_path(slopes):
            assert np.all(np.isfinite(slope)), (sizes, name, path)
        jax.tree.map(lambda a, b: assert_close(a, b, 'float32 gradient'), slopes, reference)


@each_cell
def test_reference_gradients_under_a_mask(cell):
    """The oracle's, by central differences, as the reference is what the fast path is compared with."""
    drawn, mask = draw(cell, SIZES[1]), MASKS['random'](np.random.default_rng(1), SIZES[1][:2])
    _, (of_weights, of_xs, of_carry) = compiled(cell, None)(drawn, mask)
    flat = {'xs': drawn['xs'], 'h': drawn['carry'].h, 'recurrent_kernel': drawn['weights'].recurrent_kernel}

    def f(values):
        changed = drawn | {
            'xs': values['xs'],
            'carry': drawn['carry']._replace(h=values['h']),
            'weights': drawn['weights']._replace(recurrent_kernel=values['recurrent_kernel']),
        }
        outputs, last = expected(cell, changed, mask, reverse=False)
        return np.sum(drawn['d_outputs'] * outputs) + np.sum(drawn['d_last'] * last)

    slopes = oracle.central_differences(f, flat)
    found = {'xs': of_xs, 'h': of_carry.h, 'recurrent_kernel': of_weights.recurrent_kernel}
    for name, slope in slopes.items():
        assert_close(found[name], slope, 'float32 gradient')
    assert np.all(np.asarray(of_xs)[~mask] == 0)


@each_plan
@each_cell
def test_letters(cell, plan):
    """Letters are one-hot rows; one that isn't in the alphabet is a row of zeros. Small and large alphabets."""
    for alphabet in (5, 300):
        drawn = draw(cell, (6, 3, alphabet, 4))
        letters = np.random.default_rng(2).integers(-1, alphabet + 1, (6, 3), np.int32)
        rows = np.where((letters >= 0) & (letters < alphabet), letters, alphabet)
        one_hot = np.eye(alphabet + 1, alphabet, dtype=np.float32)[rows]
        outputs, (weights, carry) = compiled(cell, plan)(drawn | {'xs': letters}, None)
        wanted, (of_weights, _, of_carry) = compiled(cell, 'cpu')(drawn | {'xs': one_hot}, None)
        jax.tree.map(lambda a, b: assert_close(a, b, 'float32 forward'), outputs, wanted)
        jax.tree.map(
            lambda a, b: assert_close(a, b, 'float32 gradient'), (weights, carry), (of_weights, of_carry)
        )


@each_cell
def test_a_bad_row_of_the_table_strikes_its_letter_alone(cell):
    drawn = draw(cell, (4, 3, 5, 4))
    drawn['weights'].kernel[2] = np.nan
    letters = np.array([[0, 1, 2], [1, 1, 0], [3, 4, 0], [0, 0, 0]], np.int32)
    (outputs, _), _ = compiled(cell, 'cpu')(drawn | {'xs': letters}, None)
    assert np.all(np.isfinite(outputs[:, :2])) and np.all(np.isnan(outputs[:, 2, :]))


@each_plan
@each_cell
def test_a_bad_input_stays_in_its_example(cell, plan):
    drawn, bad = draw(cell, (6, 3, 2, 4)), np.zeros((6, 3), bool)
    drawn['xs'][2, 1, 0] = np.nan
    bad[2:, 1] = True
    (outputs, _), _ = compiled(cell, plan)(drawn, None)
    assert np.array_equal(np.isnan(outputs), np.broadcast_to(bad[:, :, None], outputs.shape))


@each_plan
@each_cell
def test_every_product_is_of_the_type_and_precision_that_were_asked_for(cell, plan):
    drawn = draw(cell, (6, 3, 2, 4))
    with jax.default_matmul_precision('highest'):
        traced = jax.make_jaxpr(compiled(cell, plan, dtype='bfloat16'))(drawn, None)
    products = jaxprs.named(traced, 'dot_general')
    # x W, and its two gradients; for each R_k the forward product, the backward one and the gradient
    assert len(products) >= 3 + 3 * len(CELLS[cell][0].blocks)
    for product in products:
        assert {operand.aval.dtype.name for operand in product.invars} == {'bfloat16'}
        assert product.outvars[0].aval.dtype == jnp.float32
        assert set(product.params['precision']) == {jax.lax.Precision.HIGHEST}


@pytest.mark.parametrize('plan', [None, *PLANS])
@each_cell
def test_sums_over_time_are_wide(cell, plan):
    drawn = draw(cell, (7, 3, 2, 4))
    traced = jax.make_jaxpr(compiled(cell, plan, dtype='bfloat16'))(drawn, None)
    loops = jaxprs.named(traced, 'scan')
    assert len(loops) == (0 if plan == 'accelerator' else 2)
    for loop in loops:
        carries = loop.outvars[: scan_counts(loop.params)[1]]
        assert {carry.aval.dtype.name for carry in carries} == {'float32'}


@each_plan
@each_cell
def test_bfloat16(cell, plan):
    drawn = draw(cell, (6, 3, 2, 4))
    (outputs, last), slopes = compiled(cell, plan, dtype='bfloat16')(drawn, None)
    assert outputs.dtype == jnp.bfloat16
    assert last.dtype == jnp.float32 and {leaf.dtype.name for leaf in jax.tree.leaves(slopes)} == {'float32'}
    wanted = expected(cell, drawn, None, reverse=False)
    assert_close(outputs, wanted[0], 'bfloat16 forward')
    assert_close(last, wanted[1], 'bfloat16 forward')
    _, exact = compiled(cell, None)(drawn, None)
    jax.tree.map(lambda a, b: assert_close(a, b, 'bfloat16 gradient'), slopes, exact)
    rough = max(
        float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
        for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(exact), strict=True)
    )
    assert rough > 2 * TOLERANCES['float32 gradient'].scaled  # it is bfloat16 that multiplies


BFLOAT16_SIZES = (21, 5, 6, 33)
"""T, B, D, H."""

BFLOAT16_MASKS = {
    'all': MASKS['all'],
    'ragged': lambda rng, shape: np.arange(shape[0])[:, None] < rng.integers(1, shape[0] + 1, shape[1]),
    'a row': MASKS['a row'],
}


@pytest.mark.parametrize('reverse', [False, True])
@each_cell
def test_bfloat16_masks_and_directions(cell, reverse):
    """Against the plain scan of the same operands, and against float64: the oracle, and its gradient in float64."""
    for make in BFLOAT16_MASKS.values():
        drawn, mask = draw(cell, BFLOAT16_SIZES), make(np.random.default_rng(1), BFLOAT16_SIZES[:2])
        with jax.enable_x64(True):
            _, exact = compiled(cell, None, reverse=reverse)(jax.tree.map(np.float64, drawn), mask)
        of_oracle = expected(cell, drawn, mask, reverse=reverse)
        drawn['xs'] = np.where(mask[:, :, None], drawn['xs'], np.float32(np.nan))
        reference, of_reference = compiled(cell, None, reverse=reverse, dtype='bfloat16')(drawn, mask)
        for plan in ('cpu', 'partly unrolled'):
            results, slopes = compiled(cell, plan, reverse=reverse, dtype='bfloat16')(drawn, mask)
            assert [result.dtype for result in results] == [jnp.bfloat16, jnp.float32]
            for wanted in (reference, of_oracle):
                jax.tree.map(lambda a, b: assert_close(a, b, 'bfloat16 forward'), results, wanted)
            for wanted in (of_reference, exact):
                jax.tree.map(lambda a, b: assert_close(a, b, 'bfloat16 gradient'), slopes, wanted)


@each_cell
def test_float64(cell):
    drawn = draw(cell, (6, 3, 2, 4))
    with jax.enable_x64(True):
        wide = jax.tree.map(np.float64, drawn)
        (outputs, _), slopes = compiled(cell, 'cpu')(wide, None)
        _, reference = compiled(cell, None)(wide, None)
    assert outputs.dtype == np.float64
    assert_close(outputs, expected(cell, wide, None, reverse=False)[0], 'float64')
    jax.tree.map(lambda a, b: assert_close(a, b, 'float64'), slopes, reference)


@each_plan
@each_cell
def test_no_time_at_all(cell, plan):
    drawn = draw(cell, (0, 3, 2, 4))
    (outputs, last), slopes = compiled(cell, plan)(drawn, None)
    assert outputs.shape == (0, 3, 4)
    assert np.array_equal(last, drawn['carry'].h)
    assert np.array_equal(slopes[2].h, drawn['d_last'])
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(slopes[0]))


@each_cell
def test_carry_of_zeros_is_the_default(cell):
    drawn = draw(cell, SIZES[1])
    zeros = jax.tree.map(np.zeros_like, drawn['carry'])
    run = functools.partial(scan.run, CELLS[cell][0], drawn['weights'], drawn['xs'])
    jax.tree.map(np.testing.assert_array_equal, run(), run(zeros))
    assert not np.array_equal(run()[0], run(drawn['carry'])[0])


@each_cell
def test_last_alone_is_the_last_of_all(cell):
    drawn = draw(cell, SIZES[1])
    _, last = scan.run(CELLS[cell][0], drawn['weights'], drawn['xs'])
    nothing, alone = scan.run(CELLS[cell][0], drawn['weights'], drawn['xs'], sequences=False)
    assert nothing is None
    jax.tree.map(np.testing.assert_array_equal, last, alone)


def loss_of(cell: str, drawn: dict, reference: bool) -> Callable:
    """A weighted sum of the outputs, as a function of the recurrent kernel."""

    def loss(kernel):
        weights = drawn['weights']._replace(recurrent_kernel=kernel)
        outputs, _ = scan.run(CELLS[cell][0], weights, drawn['xs'], reference=reference)
        return jnp.sum(drawn['d_outputs'] * outputs)

    return loss


def kernel_and_direction(drawn: dict) -> tuple[jax.Array, jax.Array]:
    kernel = jnp.asarray(drawn['weights'].recurrent_kernel)
    return kernel, jnp.asarray(np.random.default_rng(3).normal(size=kernel.shape))


def difference(f: Callable, kernel: jax.Array, towards: jax.Array) -> jax.Array:
    """The directional derivative by central differences."""
    step = 1e-5
    return (f(kernel + step * towards) - f(kernel - step * towards)) / (2 * step)


@each_cell
def test_reference_goes_forward(cell):
    drawn = jax.tree.map(np.float64, draw(cell, SIZES[1]))
    with jax.enable_x64(True):
        kernel, towards = kernel_and_direction(drawn)
        loss = loss_of(cell, drawn, reference=True)
        _, slope = jax.jvp(loss, (kernel,), (towards,))
        assert_close(slope, difference(loss, kernel, towards), 'float64 differences')
        with pytest.raises(TypeError, match='forward-mode'):
            jax.jvp(loss_of(cell, drawn, reference=False), (kernel,), (towards,))


@pytest.mark.parametrize('reference', [False, True])
@each_cell
def test_hessian_vector_products(cell, reference):
    drawn = jax.tree.map(np.float64, draw(cell, SIZES[1]))
    with jax.enable_x64(True):
        kernel, towards = kernel_and_direction(drawn)
        gradient = jax.grad(loss_of(cell, drawn, reference))
        _, product = jax.jvp(gradient, (kernel,), (towards,))
        assert_close(product, difference(gradient, kernel, towards), 'float64 differences')


def test_wrong_shapes_are_named():
    drawn = draw('lstm', SIZES[1])
    weights, xs, cell = drawn['weights'], drawn['xs'], CELLS['lstm'][0]
    bad = {
        'recurrent_kernel': {'weights': weights._replace(recurrent_kernel=np.zeros((4, 12)))},
        'kernel': {'weights': weights._replace(kernel=np.zeros((2, 12)))},
        'bias': {'weights': weights._replace(bias=np.zeros(12))},
        'xs': {'xs': np.zeros((6, 3, 5))},
        'carry.h': {'carry': cells.LSTMCarry(c=np.zeros((3, 4)), h=np.zeros((2, 4)))},
        'mask': {'mask': np.zeros((3, 6), bool)},
        'recurrent_bias': {'weights': weights._replace(recurrent_bias=np.zeros(16))},
    }
    for name, change in bad.items():
        arguments = {'weights': weights, 'xs': xs} | change
        with pytest.raises(ValueError, match=f'^{name}: shape'):
            scan.run(cell, **arguments)


def test_the_plan_is_the_platforms():
    assert scan.best_plan(255) == scan.CPU
    assert scan.best_plan(256) == scan.CPU_LARGE_BATCH
    with scan.compiled_for('gpu'):
        assert scan.best_plan(32) == scan.best_plan(512) == scan.ACCELERATOR
    assert scan.best_plan(32) == scan.CPU
