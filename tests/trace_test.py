"""What a trace says of functions whose fault is known."""

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


story = trace.first_bad


def found(function, *arguments, **options):
    finding = story(function, *arguments, **options).finding
    assert finding is not None
    file, _, line = finding.source.rpartition(':')
    assert file == __file__, finding
    return finding, int(line)


def test_a_healthy_function_has_no_finding():
    assert story(lambda w, x: jnp.sum(jnp.tanh(x @ w)), np.ones((4, 2), np.float32), X)[:2] == (None, ())


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

    told = story(step, np.float32(1), X)
    assert told.finding is None
    assert told.harmless[0].op == 'log' and told.harmless[0].harmless


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
    told = story(lambda w, batch: jnp.sum(batch['x'] * w), np.float32(1), batch).finding
    assert (told.kind, told.pass_, told.op, told.source, told.examples) == (
        'input',
        'data',
        'input',
        'batch/x',
        (2,),
    )
    weights = {'a': np.ones(4, np.float32), 'b': np.array([1, np.inf], np.float32)}
    told = story(lambda w, x: jnp.sum(x[0] * w['a']) * w['b'][1], weights, X).finding
    assert (told.source, told.layer) == ('state/b', 'state/b')


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
    assert story(step, np.float32(1), x).finding is None


def test_a_row_that_is_masked_whole():
    """-inf is meant, -inf - (-inf) isn't."""
    finding, line = found(mask_like_attention, np.float32(1), X - 1)
    assert (finding.kind, line) == ('infinities', line_of(mask_like_attention, 'softmax'))


# Values that are bad, are meant or masked, and stand beside a fault. Their own bad elements come first.

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


def test_an_infinity_of_the_state_that_stays_as_it_was_is_meant():
    """The best loss so far, before there is one."""

    def step(state, x):
        w, best = state
        loss = jnp.sum(jnp.log(x * w))  # here
        return (w - loss, jnp.minimum(best, loss)), jnp.where(loss < best, loss, best)

    finding, line = found(step, (np.float32(-1), np.float32(np.inf)), X)
    assert (finding.op, line) == ('log', line_of(step))
    told = story(lambda state, x: (state[0] * jnp.sum(x), state[1]), (np.float32(1), np.float32(np.inf)), X)
    assert told.finding is None and [finding.source for finding in told.harmless] == ['state/1']
    told = story(lambda state, x: state[0] + state[1], (np.float32(1), np.float32(np.inf)), X)
    assert told.finding is not None


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


def test_arguments_stay_as_they_are():
    """Whatever is donated elsewhere, a trace consumes nothing."""
    w = jnp.ones((4, 2))
    step = jax.jit(lambda w, x: jnp.log(-w) + x.sum(), donate_argnums=0)
    story(step, w, X)
    assert not w.is_deleted()


EVERYWHERE = [
    (network, place, kind)
    for network in faulty.SUBJECTS
    for place in faulty.PLACES
    for kind, made in faulty.KINDS.items()
    if faulty.applies(network, place, kind)
]
"""A sample; benchmarks/trace_faults.py runs them all."""


@pytest.mark.parametrize('network,place,kind', EVERYWHERE[:: max(1, len(EVERYWHERE) // 24)])
def test_planted(network, place, kind):
    time_step, example = 4, 3
    missed = faulty.missed(faulty.Fault(network, place, kind, time_step, example))
    assert missed == {}
