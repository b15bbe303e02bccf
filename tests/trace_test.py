"""What a trace reports of functions whose fault is known."""

import doctest
import inspect

import faulty
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxrnn import trace

X = np.linspace(0.5, 1.5, 12, dtype=np.float32).reshape(3, 4)


def line_of(function, mark='# here'):
    lines, start = inspect.getsourcelines(function)
    return start + next(n for n, line in enumerate(lines) if mark in line)


first_bad = trace.first_bad


def found(function, *arguments, **options):
    finding = first_bad(function, *arguments, **options).finding
    assert finding is not None
    file, _, line = finding.source.rpartition(':')
    assert file == __file__, finding
    return finding, int(line)


@pytest.mark.parametrize(
    'function', [trace.first_bad, trace.compare, trace.lost_precision], ids=lambda f: f.__name__
)
def test_the_example_in_the_docstring(function):
    (example,) = doctest.DocTestFinder(recurse=False).find(function, function.__name__, globs={})
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0


def test_a_healthy_function_has_no_finding():
    assert first_bad(lambda w, x: jnp.sum(jnp.tanh(x @ w)), np.ones((4, 2), np.float32), X)[:2] == (None, ())


def test_an_overflow_is_named_before_the_nan_that_it_turns_into():
    def step(w, x):
        large = jnp.exp(100 * x * w)  # here
        return jnp.sum(large / (1 + large))

    finding, line = found(step, np.float32(1), X)
    assert (finding.kind, finding.op, line) == ('overflow', 'exp', line_of(step))
    assert finding.results[0].infinities == finding.elements > 0 and finding.results[0].nans == 0
    assert finding.operands[0].high == pytest.approx(150)


def test_the_operation_in_an_iteration_of_a_loop():
    def step(w, xs):
        def body(carry, x):
            carry = carry * 0.5 + x @ w
            return jnp.sqrt(carry), carry  # here

        return lax.scan(body, jnp.ones((3, 2)), xs)

    xs = np.ones((6, 3, 4), np.float32)
    xs[4, 1] = -9
    finding, line = found(step, np.ones((4, 2), np.float32), xs, example_axes=1)
    assert (finding.op, line, finding.iterations, finding.time_step) == ('sqrt', line_of(step), (4,), 4)
    assert finding.examples == (1,)


def test_every_level_of_nested_loops():
    def step(w, xs):
        def inner(carry, x):
            return jnp.log(carry + x), None  # here

        def outer(carry, x):
            return lax.scan(inner, carry, x)[0], None

        return lax.scan(outer, w, xs)[0]

    xs = np.full((3, 5), 9, np.float32)
    xs[1, 2] = -90
    finding, line = found(step, np.float32(1), xs)
    assert (finding.iterations, line) == ((1, 2), line_of(step))


def test_a_loop_that_counts():
    def step(w, x):
        return lax.while_loop(lambda c: c[0] < 7, lambda c: (c[0] + 1, jnp.log(c[1])), (0, w * x))[1]  # here

    finding, line = found(step, np.float32(1), np.float32(2.0))
    assert (finding.op, finding.iterations, line) == ('log', (2,), line_of(step))


def _custom_jvp(f):
    wrapped = jax.custom_jvp(f)
    wrapped.defjvps(lambda t, ans, x: t)
    return wrapped


def _custom_vjp(f):
    wrapped = jax.custom_vjp(f)
    wrapped.defvjp(lambda x: (f(x), None), lambda _, d: (d,))
    return wrapped


WRAPPERS = {
    'jit': jax.jit,
    'remat': jax.checkpoint,
    'vmap': jax.vmap,
    'cond': lambda f: lambda x: lax.cond(x.sum() > 0, f, lambda x: x, x),
    'switch': lambda f: lambda x: lax.switch(1, [lambda x: x, f], x),
    'custom_jvp': _custom_jvp,
    'custom_vjp': _custom_vjp,
    'jit in jit': lambda f: jax.jit(jax.jit(f)),
}


@pytest.mark.parametrize('name', WRAPPERS)
def test_through(name):
    def bad(x):
        return jnp.log(x - 0.6)  # here

    finding, line = found(lambda w, x: WRAPPERS[name](bad)(x) * w, np.float32(1), X)
    assert (finding.op, line, finding.examples) == ('log', line_of(bad), (0,))


def test_what_reduces_several_arrays_is_no_call():
    """It holds what it does to two numbers, with as many arguments and results as it has itself."""

    def add(a, b):
        return a[0] + b[0], a[1] * b[1]

    def sums(x):
        logs = jnp.log(x - 0.6)  # here
        return lax.reduce((logs, x), (np.float32(0), np.float32(1)), add, (1,))

    finding, line = found(lambda w, x: w * sums(x)[0], np.float32(1), X)
    assert (finding.op, line, finding.examples) == ('log', line_of(sums), (0,))

    def step(w, x):
        return jax.tree.map(lambda part: jnp.sum(w * part), sums(x + 1)), {'loss': w}

    change = trace.compare(
        lambda w, x: (step(w, x)[0][0], {'loss': w}), (np.float32(1), X), (np.float32(2), X)
    )
    assert change.scores['loss'] == (1, 1, 2)
    report = trace.lost_precision(lambda w, x: (step(w, x)[0][0], {'loss': w}), np.float32(1), X)
    assert report.lost is None and 'reduce' not in report.restarted


def test_the_call_is_named_where_a_library_function_was_traced_before():
    """A function that is jitted within a library is traced once; it may remember its first caller's line."""

    def step(w, x):
        fine = jnp.corrcoef(x)
        same = jnp.sum(x * 0, axis=0, keepdims=True) + jnp.ones_like(x)
        return w * fine + jnp.corrcoef(same)  # here

    with jax.numpy_rank_promotion('allow'):
        _, line = found(step, np.float32(1), X)
    assert line == line_of(step)


def test_a_discarded_nan_is_harmless():
    def step(w, x):
        safe = jnp.where(x > 1, jnp.log(x - 1), 0.0)
        return jnp.sum(safe * w)

    report = first_bad(step, np.float32(1), X)
    assert report.finding is None
    assert report.harmless[0].op == 'log' and report.harmless[0].harmless


def test_a_gradient_that_leaks_through_a_where():
    def step(w, x):
        def loss(w):
            distance = jnp.sqrt(jnp.maximum(x - 1, 0) * w)  # here
            return jnp.sum(jnp.where(x > 1, distance, 0.0))

        return jax.value_and_grad(loss)(w)

    finding, line = found(step, np.float32(1), X)
    assert (finding.kind, finding.pass_, line) == ('gradient through where', 'backward', line_of(step))


def test_a_bad_argument_is_named_by_its_path():
    batch = {'x': X.copy()}
    batch['x'][2, 1] = np.nan
    finding = first_bad(lambda w, batch: jnp.sum(batch['x'] * w), np.float32(1), batch).finding
    assert (finding.kind, finding.pass_, finding.op, finding.source, finding.examples) == (
        'input',
        'data',
        'input',
        'batch/x',
        (2,),
    )
    weights = {'a': np.ones(4, np.float32), 'b': np.array([1, np.inf], np.float32)}
    finding = first_bad(lambda w, x: jnp.sum(x[0] * w['a']) * w['b'][1], weights, X).finding
    assert (finding.source, finding.layer) == ('state/b', 'state/b')


def mask_like_attention(w, x):
    scores = jnp.where(x > 0.7, x * w, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)


def log_of_sums(w, x):
    return jax.nn.logsumexp(jnp.concatenate([x * w, jnp.full((3, 2), -jnp.inf)], 1), axis=1)


def saturated_gates(w, x):
    return jax.nn.sigmoid(1e4 * x * w) * jnp.tanh(-1e4 * x)


def subnormal_numbers(w, x):
    return x * w * jnp.float32(1e-39) + jnp.float32(1e-45)


def masked_nan(w, x):
    return jnp.where(jnp.isnan(x * jnp.nan), x * w, 0)


def masked_twice(w, x):
    safe = jnp.where(x > 1, x - 1, 1)
    return jnp.where(x > 1, jnp.log(safe) * w, 0)


@pytest.mark.parametrize(
    'function',
    [mask_like_attention, log_of_sums, saturated_gates, subnormal_numbers, masked_nan, masked_twice],
    ids=lambda f: f.__name__,
)
def test_no_false_alarm(function):
    """Forward and backward."""
    x = X.copy()
    x[0] = 0.9
    step = jax.value_and_grad(lambda w, x: jnp.sum(function(w, x) ** 2))
    assert first_bad(step, np.float32(1), x).finding is None


def test_a_row_that_is_masked_whole():
    """-inf is intended, -inf - (-inf) isn't."""
    finding, line = found(mask_like_attention, np.float32(1), X - 1)
    assert (finding.kind, line) == ('infinities', line_of(mask_like_attention, 'softmax'))


# Values that are bad, are intended or masked, and are beside a fault. Their own bad elements come first.

VALID = np.array([[True, True, True], [True, True, False], [True, False, False]])  # [T, B]
PADDED = np.where(VALID[..., None], np.ones((3, 3, 4), np.float32), np.float32(np.nan))
BIAS = np.array([0, 0, 0, -np.inf], np.float32)[None]


def mask_in_a_loop(w, batch):
    def body(h, at):
        x, valid = at
        h = jnp.tanh(h + jnp.where(valid[:, None], x, 0) @ w)
        return h + jnp.log(h), None  # here

    h, _ = lax.scan(body, jnp.zeros((3, 4)), (batch['padded'], batch['valid']))
    return jnp.sum(h)


def infinite_bias_in_a_loop(w, batch):
    def body(h, valid):
        h = jax.nn.softmax(h + batch['bias']) @ w + 0.5 * valid[:, None]
        return h + jnp.sqrt(h), None  # here

    return jnp.sum(lax.scan(body, jnp.zeros((3, 4)), batch['valid'])[0])


def infinite_bias(w, batch):
    scores = jnp.log(jnp.sum(w, 0, keepdims=True))  # here
    return jnp.sum(jax.nn.softmax(scores + batch['bias']))


def computed_mask(w, batch):
    bias = jnp.log(batch['valid'].astype(jnp.float32))
    scores = jnp.log(jnp.sum(w))  # here
    return jnp.sum(jax.nn.softmax(scores + bias, 0))


def other_case_of_a_where(w, batch):
    spoilt = batch['padded'][2]
    scores = jnp.log(jnp.sum(w, 0, keepdims=True) + 0 * batch['padded'][0])  # here
    return jnp.sum(jnp.where(batch['valid'][0][:, None], scores, spoilt))


@pytest.mark.parametrize(
    'function',
    [mask_in_a_loop, infinite_bias_in_a_loop, infinite_bias, computed_mask, other_case_of_a_where],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize('differentiated', [False, True])
def test_what_is_masked_is_not_blamed(function, differentiated):
    batch = {'padded': PADDED, 'valid': VALID, 'bias': BIAS}
    step = jax.value_and_grad(function) if differentiated else function
    finding, line = found(step, -np.ones((4, 4), np.float32), batch)
    assert (finding.kind, line) == ('invalid argument', line_of(function))


def test_an_infinity_of_the_state_that_stays_as_it_was_is_intended():
    """The best loss so far, before there is one."""

    def step(state, x):
        w, best = state
        loss = jnp.sum(jnp.log(x * w))  # here
        return (w - loss, jnp.minimum(best, loss)), jnp.where(loss < best, loss, best)

    finding, line = found(step, (np.float32(-1), np.float32(np.inf)), X)
    assert (finding.op, line) == ('log', line_of(step))
    report = first_bad(
        lambda state, x: (state[0] * jnp.sum(x), state[1]), (np.float32(1), np.float32(np.inf)), X
    )
    assert report.finding is None and [finding.source for finding in report.harmless] == ['state/1']
    report = first_bad(lambda state, x: state[0] + state[1], (np.float32(1), np.float32(np.inf)), X)
    assert report.finding is not None


@pytest.mark.parametrize('moved', [jnp.transpose, jnp.flip, lambda x: x @ x, lambda x: jnp.cumsum(x, 0)])
def test_what_keeps_its_shape_and_not_its_places(moved):
    """Beside a NaN that stays where it is, and comes later."""

    def step(w, x):
        early = jnp.log(x * w)  # here
        late = jnp.sqrt(w * jnp.ones((3, 3)).at[2, 2].set(-1))
        return jnp.sum(moved(early) + 0 * late)

    x = np.ones((3, 3), np.float32)
    x[0, 1] = -1
    finding, line = found(step, np.float32(1), x)
    assert (finding.op, line) == ('log', line_of(step))


def test_a_product_of_square_matrices_is_not_taken_element_by_element():
    """Its other rows go bad of the one that was: no new cause, although all three have one shape."""

    def f(w, x):
        x = x.at[5].set(x[5] * jnp.nan)
        return w.T @ (x @ w)

    found = trace.first_bad(f, jnp.ones((8, 8)), jnp.ones((8, 8))).finding
    assert (found.op, found.kind, found.examples) == ('mul', trace.WRITTEN, (5,))


def test_arguments_stay_as_they_are():
    """Whatever is donated elsewhere, a trace consumes nothing."""
    w = jnp.ones((4, 2))
    step = jax.jit(lambda w, x: jnp.log(-w) + x.sum(), donate_argnums=0)
    first_bad(step, w, X)
    assert not w.is_deleted()


# Time steps, with a loop and without.


def cell(h, x):
    return jnp.sqrt(0.5 * h + x)  # here


def unrolled(h, xs):
    for t in range(xs.shape[1]):
        h = cell(h, xs[:, t])
    return h


def unstacked(h, xs):
    for x in jnp.unstack(xs, axis=1):
        h = cell(h, x)
    return h


def split(h, xs):
    for x in jnp.split(xs, xs.shape[1], axis=1):
        h = cell(h, x[:, 0])
    return h


def jitted(h, xs):
    jitted_cell = jax.jit(cell)
    for t in range(xs.shape[1]):
        h = jitted_cell(h, xs[:, t])
    return h


def scanned(h, xs):
    return lax.scan(lambda h, x: (cell(h, x), None), h, xs.swapaxes(0, 1))[0]


def scanned_from_the_end(h, xs):
    return lax.scan(lambda h, x: (cell(h, x), None), h, xs.swapaxes(0, 1), reverse=True)[0]


def scanned_in_chunks(h, xs):
    chunks = xs.reshape(xs.shape[0], -1, 2, xs.shape[-1]).swapaxes(0, 1)
    return lax.scan(lambda h, chunk: (cell(cell(h, chunk[:, 0]), chunk[:, 1]), None), h, chunks)[0]


def counted(h, xs):
    return lax.fori_loop(0, xs.shape[1], lambda t, h: cell(h, xs[:, t]), h)


def with_a_loop_inside(h, xs):
    def step(h, x):
        return lax.fori_loop(0, 3, lambda n, h: cell(h, x / 3), h), None

    return lax.scan(step, h, xs.swapaxes(0, 1))[0]


LOOPS = [unrolled, unstacked, split, jitted, scanned, scanned_from_the_end, scanned_in_chunks, counted]
LOOPS.append(with_a_loop_inside)


def sequences(time_step, example=1):
    xs = np.ones((3, 6, 4), np.float32)
    xs[example, time_step] = -90
    return xs


@pytest.mark.parametrize('loop', LOOPS, ids=lambda f: f.__name__)
@pytest.mark.parametrize('time_step', [0, 3, 5])
def test_the_time_step_of_a_loop(loop, time_step):
    def step(w, xs):
        return jnp.sum(loop(jnp.ones((3, 4)), w * xs))

    finding, line = found(step, np.float32(1), sequences(time_step), example_axes=0)
    assert (line, finding.time_step, finding.examples) == (line_of(cell), time_step, (1,))


@pytest.mark.parametrize('loop', LOOPS, ids=lambda f: f.__name__)
@pytest.mark.parametrize('time_step', [0, 3, 5])
def test_the_time_step_of_a_gradient(loop, time_step, monkeypatch):
    """The root of h is 0 at one time step, where its derivative is infinite: found going back from the last."""

    def cell(h, x):
        return 0.5 * h + jnp.sqrt(h * 0 + x)

    def step(w, xs):
        return jax.grad(lambda w: jnp.sum(loop(jnp.ones((3, 4)), w * xs)))(w)

    monkeypatch.setitem(globals(), 'cell', cell)
    finding = first_bad(step, np.float32(1), np.maximum(sequences(time_step), 0), example_axes=0).finding
    assert (finding.pass_, finding.time_step, finding.examples) == ('backward', time_step, (1,))


def the_last(w, xs):
    return jnp.sqrt(xs[:, -1] * w)


def the_first_and_the_last(w, xs):
    return jnp.sqrt(w * xs[:, 0]) + jnp.sqrt(w * xs[:, 5])


def columns(w, xs):
    a, b, c, d, e, f = (xs[:, n] for n in range(6))
    return jnp.sqrt(a * w) + jnp.sqrt(b * w) + jnp.abs(c + d) + e + f


def after_an_unrolled_loop(w, xs):
    last = unrolled(jnp.ones((3, 4)), jnp.abs(xs * w))
    return jnp.sqrt(last + jnp.where(xs.min() < 0, -90.0, 0.0))


def after_a_loop(w, xs):
    return jnp.sqrt(scanned(jnp.ones((3, 4)), jnp.abs(xs * w)) + xs[:, -1] - 90)


def in_a_loop_over_no_data(w, xs):
    last = scanned(jnp.ones((3, 4)), jnp.abs(xs * w))
    return lax.fori_loop(0, 3, lambda n, x: jnp.sqrt(x - 10 * n), last)


@pytest.mark.parametrize(
    'function',
    [
        the_last,
        the_first_and_the_last,
        columns,
        after_an_unrolled_loop,
        after_a_loop,
        in_a_loop_over_no_data,
    ],
    ids=lambda f: f.__name__,
)
def test_what_is_of_no_time_step(function):
    findings = [first_bad(function, np.float32(1), sequences(t), example_axes=0).finding for t in range(6)]
    assert {(one.op, one.time_step) for one in findings if one is not None} == {('sqrt', None)}


def test_a_loop_over_examples_is_not_over_time():
    def step(w, xs):
        return lax.map(lambda x: scanned(jnp.ones((1, 4)), w * x[None]), xs)

    finding, _ = found(step, np.float32(1), sequences(3, example=2), example_axes=0)
    assert (finding.time_step, finding.examples) == (3, (2,))


def test_a_long_sequence_is_unrolled_in_pieces():
    """As jaxrnn lays it out on accelerators: 40 time steps in 2 iterations of 20."""
    faults = faulty.Fault('lstm unrolled', 'cell', 'log of a negative', 33, (2,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faulty, 'T', 40)
        assert faulty.missed(faults) == {}
        assert faulty.missed(faults._replace(place='cell backward', time_step=7)) == {}


# Which of several is named.


def test_a_loop_is_opened_only_where_another_value_goes_bad():
    """Of 50 iterations, 48 have the NaN of the second."""

    def step(w, xs):
        return lax.scan(lambda carry, x: (carry + jnp.log(x * w), None), 0.0, xs)[0]

    def equations(number):
        return first_bad(
            step, np.float32(1), np.where(np.arange(50) == number, -1, 1).astype(np.float32)
        ).equations

    assert equations(1) == equations(48) < 80


def test_the_forward_pass_is_named_before_what_it_keeps_for_the_backward_pass():
    """The derivative of the root is infinite, and stands before the division."""

    def step(w, x):
        def loss(w):
            v = (x - x) * w
            return jnp.sum(v / jnp.linalg.norm(v))  # here

        return jax.value_and_grad(loss)(w)

    finding, line = found(step, np.float32(1), X)
    assert (finding.pass_, finding.kind, line) == ('forward', trace.ZERO_BY_ZERO, line_of(step))


def test_a_zero_that_a_where_left_is_a_leak_in_a_backward_pass_alone():
    def step(w, x):
        kept = jnp.where(x > 1, x, 0.0)
        return kept / (w - w) * kept  # here

    finding, line = found(step, np.float32(1), X - 2)
    assert (finding.pass_, finding.kind, line) == ('forward', trace.ZERO_BY_ZERO, line_of(step))


def test_a_nan_that_was_written_down_and_discarded_is_not_named():
    def step(w, x):
        spread = jnp.log(x - 0.6).sum() * w  # here
        return spread, jnp.where(x > 0, spread, jnp.float32('nan')), jnp.var(x) * spread

    finding, line = found(step, np.float32(1), X)
    assert (finding.op, line) == ('log', line_of(step))


def test_a_rate_that_depends_on_no_gradient_is_of_the_update():
    def step(state, x):
        gradient = jax.grad(lambda w: jnp.sum(w * x))(state['w'])
        rate = 1.0 / state['step']  # here
        return state['w'] - rate * gradient

    finding, line = found(step, {'step': np.float32(0), 'w': np.float32(1)}, X)
    assert (finding.pass_, line) == ('update', line_of(step))


def test_the_layer_is_the_nearest_array_not_a_count():
    def step(state, x):
        gradient = jax.grad(lambda w: jnp.sum((x * w['inner']) @ w['outer']))(state['w'])['outer']
        return gradient / (state['step'] * 1.0)

    state = {'step': np.int32(0), 'w': {'inner': np.float32([[1]]), 'outer': np.ones(4, np.float32)}}
    state['w']['inner'] = np.ones((1, 4), np.float32)
    finding = first_bad(step, state, X).finding
    assert finding.layer.startswith('state/w')


def test_examples_that_a_sum_has_no_more():
    """Of two that are alike both, and not the smaller ones."""

    def step(w, x):
        return jnp.sum(x * w)

    x = X.copy()
    x[0, 1], x[2, 3], x[1, 1] = 3e38, 2e38, 1e37
    finding, _ = found(step, np.float32(1), x)
    assert (finding.op, finding.kind, finding.examples) == ('reduce_sum', 'overflow', (0, 2))


def test_numbers_that_float32_cannot_hold_are_bad_arguments():
    finding = first_bad(lambda w, x: jnp.sum(w * x), np.float32(1), np.float64([[1, 2], [1e39, 3]])).finding
    assert (finding.op, finding.source, finding.examples) == ('input', 'batch', (1,))


# Faults planted in whole train steps: a sample in which each kind, network and place has its turn.
# benchmarks/trace_faults.py plants them all.


@pytest.mark.parametrize('fault', faulty.spread(faulty.sample()), ids=lambda fault: '-'.join(fault[:3]))
def test_planted(fault):
    assert faulty.missed(fault) == {}


# Of those that the sample doesn't have, three that were named wrongly once: by a value that has the names of another
# leaf along the axis that an unrolled loop takes apart; by a solver that mixes axes; and by a loop whose compiled form
# makes a NaN of what overflows.
ONCE_MISSED = (
    faulty.Fault('plain unrolled', 'data', 'log of a negative', 2, (1,)),
    faulty.Fault('plain', 'data', 'solution of a singular system', 4, (2,)),
    faulty.Fault('plain', 'cell', 'overflowing sum', 5, (0, 2)),
)


@pytest.mark.parametrize('fault', ONCE_MISSED, ids=lambda fault: '-'.join(fault[:3]))
def test_planted_and_once_missed(fault):
    assert faulty.missed(fault) == {}


def test_the_sample_has_each_kind_network_and_place():
    found = {name for fault in faulty.sample() for name in fault}
    assert found == {*faulty.SUBJECTS, *faulty.KINDS, *faulty.PLACES}


def test_each_time_step_and_example_has_its_turn():
    faults = faulty.spread(faulty.sample())
    assert {fault.time_step for fault in faults} == set(range(faulty.T))
    assert {fault.examples for fault in faults} >= {(n,) for n in range(faulty.B)}
    assert any(len(fault.examples) == 2 for fault in faults)


@pytest.mark.parametrize('index', [25, 40, -26, 3])
def test_an_index_out_of_range(index):
    def look_up(table, ids):
        return table, jnp.take(table, ids, axis=0).sum()  # here

    ids = np.int32([[1, 2], [3, index]])
    told = first_bad(look_up, jnp.ones((25, 4)), ids).finding
    if index == 3:
        assert told is None
        return
    finding, line = found(look_up, jnp.ones((25, 4)), ids)
    assert (finding.kind, finding.pass_, line) == (trace.OUT_OF_RANGE, 'forward', line_of(look_up))
    assert finding.detail == f'index {index}, where there are 25: 0 to 24'
    assert (finding.layer, finding.examples, finding.elements) == ('state', (1,), 4)


def test_a_label_out_of_range():
    def step(w, batch):
        x, y = batch
        logits = jax.nn.log_softmax(x @ w)
        return w, -jnp.take_along_axis(logits, y[:, None], 1).mean()  # here

    y = np.int32([0, 5, 1])
    finding, line = found(step, np.ones((4, 5), np.float32), (X, y))
    assert (finding.kind, line, finding.examples) == (trace.OUT_OF_RANGE, line_of(step), (1,))
    assert finding.detail == 'index 5, where there are 5: 0 to 4'


def test_zero_by_zero_and_one_by_zero():
    for above, kind in ((0, trace.ZERO_BY_ZERO), (1, 'division by zero')):
        x = np.float32([above, 1])
        finding, _ = found(lambda w, x: w * jnp.sum(x / (x - x[:1])), np.float32(1), x)
        assert (finding.op, finding.kind) == ('div', kind)


def test_a_layer_that_acts_on_the_batch_before_any_parameter():
    def step(w, x, scope=None):
        def loss_of(w):
            with jax.named_scope('lift'):
                x_ = jnp.log(x)  # here
            return jnp.mean(x_ @ w)

        return w, jax.value_and_grad(loss_of)(w)

    x = X.copy()
    x[2, 1] = 0
    finding, line = found(step, np.ones(4, np.float32), x)
    assert (finding.pass_, finding.layer, finding.examples) == ('forward', 'lift', (2,))
    assert line == line_of(step)
    finding, _ = found(lambda w, x: jnp.log(x) @ w, np.ones(4, np.float32), x)
    assert (finding.pass_, finding.layer) == ('data', '')
