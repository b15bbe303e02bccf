"""Which examples a bad value is due to: in random programs exactly the one that is poisoned, or none is named."""

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from jax import lax

from jaxrnn import trace
from jaxrnn.trace import culprits


def asked(bad, count=8, together=False):
    """A value that is bad if one of these examples is there, or only if all are."""
    trials = []

    def is_bad(rows):
        trials.append(rows)
        return (all if together else any)(place in rows for place in bad)

    return is_bad, trials


@pytest.mark.parametrize('claimed', [(), (2,), (2, 5), (1, 2, 5), tuple(range(8)), (0, 1)])
@pytest.mark.parametrize('bad', [(2,), (2, 5), (0, 7)])
def test_what_is_claimed_is_tried(bad, claimed):
    is_bad, trials = asked(bad)
    assert culprits.search(is_bad, 8, claimed) == bad
    assert len(trials) <= 30


def test_a_right_claim_takes_few_trials():
    is_bad, trials = asked((3,), 1000)
    assert culprits.search(is_bad, 1000, (3,)) == (3,) and len(trials) <= 5
    is_bad, trials = asked((613,), 1000)
    assert culprits.search(is_bad, 1000, ()) == (613,) and len(trials) <= 30


def test_what_cannot_be_told_is_unknown():
    assert culprits.search(lambda rows: False, 8, (2,)) is None  # computed again it is finite
    assert culprits.search(lambda rows: True, 8, (2,)) == ()  # whatever the examples
    assert culprits.search(lambda rows: True, 8, tuple(range(8))) == tuple(range(8))  # each by itself
    is_bad, _ = asked((2, 5), together=True)
    assert culprits.search(is_bad, 8, ()) == ()
    assert culprits.search(is_bad, 8, (2, 5)) == (2, 5)  # two that overflow together
    is_bad, _ = asked(tuple(range(0, 500, 2)), 500)
    assert culprits.search(is_bad, 500, ()) == ()  # too many to be tried


@pytest.mark.parametrize(
    'seed', [*range(20), *(pytest.param(n, marks=pytest.mark.battery) for n in range(20, 400))]
)
def test_the_poisoned_example_or_none(seed):
    program = programs.program(seed)
    if not program.breaks():
        return
    finding = trace.first_bad(program.step, program.state, program.poisoned).finding
    assert finding.examples in ((), (program.example,)), program.about


def test_most_poisoned_examples_are_found():
    found = []
    for seed in range(500, 530):
        program = programs.program(seed)
        if program.breaks():
            finding = trace.first_bad(program.step, program.state, program.poisoned).finding
            found.append(finding.examples == (program.example,))
    assert sum(found) >= 0.7 * len(found) > 0


X = np.ones((6, 4), np.float32)


def bad_at(*index, value=-1.0, shape=(6, 4)):
    x = np.ones(shape, np.float32)
    x[index] = value
    return x


def examples_of(function, batch, **options):
    finding = trace.first_bad(
        lambda w, b: (w, {'loss': function(w, b)}), jnp.float32(1), batch, **options
    ).finding
    return finding.examples, finding.time_step


def over_time(w, x):
    """[T, B] in a loop."""
    return jnp.mean(
        lax.scan(lambda h, at: (jnp.tanh(at * w + h + jnp.sqrt(at)), None), jnp.zeros(x.shape[1]), x)[0]
    )


def counted(w, x):
    def body(t, h):
        return jnp.tanh(h + w * jnp.sqrt(x[t]))

    return jnp.mean(lax.fori_loop(0, len(x), body, jnp.zeros(x.shape[1])))


def unrolled(w, x):
    h = jnp.zeros(x.shape[1])
    for t in range(len(x)):
        h = jnp.tanh(h + w * jnp.sqrt(x[t]))
    return jnp.mean(h)


@pytest.mark.parametrize('function', [over_time, counted, unrolled], ids=lambda f: f.__name__)
def test_time_that_comes_first_is_no_example(function):
    assert examples_of(function, bad_at(5, 2)) == ((2,), 5)
    batch = {'x': bad_at(5, 2), 'weights': np.ones(4, np.float32)}
    assert examples_of(lambda w, b: function(w, b['x']) + b['weights'].mean(), batch) == ((2,), 5)


def in_micro_batches(w, batch):
    """A gradient for each part, in a loop over the first axis."""

    def one(total, part):
        loss, g = jax.value_and_grad(lambda w: jnp.mean(w * jnp.sqrt(part['x']).sum(-1) * part['y']))(w)
        return total + g, loss

    g, losses = lax.scan(one, jnp.zeros(()), batch)
    return losses.mean() + g


def test_the_number_of_a_micro_batch_is_neither_example_nor_time_step():
    batch = {'x': bad_at(5, 2, shape=(6, 4, 3)), 'y': np.ones((6, 4), np.float32)}
    assert examples_of(in_micro_batches, batch) == ((), None)

    def parted(w, batch):
        return in_micro_batches(w, jax.tree.map(lambda x: x.reshape(3, 2, *x.shape[1:]), batch))

    batch = {'x': bad_at(5, 2, shape=(6, 4)), 'y': np.ones(6, np.float32)}
    assert examples_of(parted, batch) == ((5,), None)


def test_a_device_is_no_example():
    """[devices, per device], a gradient for each device."""

    def step(w, batch):
        def loss_of(w, x, y):
            return jnp.mean(w * jnp.sqrt(x).sum(-1) * y)

        return jax.vmap(jax.grad(loss_of), (None, 0, 0))(w, batch['x'], batch['y']).mean()

    batch = {'x': bad_at(5, 2, shape=(6, 4, 3)), 'y': np.ones((6, 4), np.float32)}
    assert examples_of(step, batch)[0] == ()
    assert examples_of(step, batch, example_axes={'x': 1, 'y': 1})[0] == (2,)
