"""Steps whose fault lies on one of four devices, and what a trace should say of each.

Run by itself it prints what a trace does say: XLA is told of the number of devices before JAX starts.
"""

import contextlib
import inspect
import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrnn import trace

DEVICES = 4
T, B, H = 5, 8, 3  # time steps, examples, width
BAD = 5  # the example whose values lead to the fault: on the third of four devices


class Case(NamedTuple):
    make: Callable[[], tuple]  # -> step, state, batch
    op: str  # '' for a step in which nothing is wrong
    examples: tuple[int, ...] = (BAD,)
    devices: tuple[dict[str, int], ...] = ({'data': 2},)
    pass_: str = 'forward'
    time_step: int | None = None
    kind: str = ''
    layer: str = ''
    example_axes: int | None = None
    written: Callable | None = None  # what holds the line, if not `make`


def mesh(**sizes):
    sizes = sizes or {'data': DEVICES}
    return Mesh(np.array(jax.devices()).reshape(tuple(sizes.values())), tuple(sizes))


def shards(function, in_specs, out_specs, over=None, **options):
    return jax.shard_map(function, mesh=over or mesh(), in_specs=in_specs, out_specs=out_specs, **options)


def weights():
    return np.full((H, 2), 0.5, np.float32)


def rows(value=-9.0, *shape):
    x = np.ones(shape or (B, H), np.float32)
    x[BAD] = value
    return x


def elementwise():
    def local(w, x):
        return jnp.log(x @ w)  # here

    return shards(local, (P(), P('data')), P('data')), weights(), rows()


def unchecked():
    def local(w, x):
        return lax.pmean(jnp.sum(jnp.log(x @ w)), 'data')  # here

    return shards(local, (P(), P('data')), P(), check_vma=False), weights(), rows()


def gradient_outside():
    def local(w, x):
        return lax.pmean(jnp.mean(jnp.sqrt(x @ w)), 'data')  # here

    return jax.value_and_grad(shards(local, (P(), P('data')), P())), weights(), rows(0.0)


def gradient_inside(**options):
    def local(w, x):
        def loss(w):
            with jax.named_scope('head'):
                return jnp.mean(jnp.sqrt(x @ w))  # here

        loss, gradient = jax.value_and_grad(loss)(w)
        gradient = lax.psum(gradient, 'data') if options else gradient
        return lax.pmean(loss, 'data'), w - gradient

    return shards(local, (P(), P('data')), (P(), P()), **options), weights(), rows(0.0)


def sequences():
    xs = np.ones((T, B, H), np.float32)
    xs[3, BAD] = -9
    return xs


def loop():
    def local(w, xs):
        def body(h_tm1, x):
            h = jnp.log(2 + jnp.tanh(h_tm1) + x @ w)  # here
            return h, h

        return lax.scan(body, 0 * xs[0, :, :2], xs)[0]

    return shards(local, (P(), P(None, 'data')), P('data')), weights(), sequences()


def loop_gradient():
    def local(w, xs):
        def body(h_tm1, x):
            return 0.9 * h_tm1 + jnp.sqrt(x @ w), None  # here

        h, _ = lax.scan(body, 0 * xs[0, :, :2], xs)
        return lax.pmean(jnp.mean(h), 'data')

    xs = np.ones((T, B, H), np.float32)
    xs[3, BAD] = 0
    return jax.jit(jax.grad(shards(local, (P(), P(None, 'data')), P()))), weights(), xs


def sum_over_devices():
    def local(w, x):
        return lax.psum(jnp.sum(x, 0) * jnp.sum(w), 'data')  # here

    return shards(local, (P(), P('data')), P()), np.float32(1), np.full((B, H), 1e38, np.float32)


def one_device():
    def local(w, x):
        place = lax.axis_index('data')
        return jnp.log(x * w - (place == 2))  # here

    return shards(local, (P(), P('data')), P('data')), np.float32(1), rows(1.0)


def cut_by_device():
    def local(w, x):
        mine = lax.dynamic_slice_in_dim(x, 2 * lax.axis_index('data'), 2)
        return jnp.log(mine @ w)  # here

    return shards(local, (P(), P()), P('data')), weights(), rows()


def argument():
    def local(w, x):
        return lax.psum(jnp.sum(x @ w), 'data')

    return shards(local, (P(), P('data')), P()), weights(), {'x': rows(np.nan)}


def argument_of_a_tree():
    step, w, batch = argument()
    return lambda w, batch: step(w, batch['x']), w, batch


def nested_jit():
    @jax.jit
    def inner(x):
        return jnp.log(x)  # here

    def local(w, x):
        return lax.pmean(jnp.mean(inner(x @ w)), 'data')

    return jax.jit(shards(local, (P(), P('data')), P())), weights(), rows()


def branch():
    """Each device takes the branch that its own examples ask for; what the other would give there is bad as well."""

    def local(w, x):
        large = lambda x: jnp.log(x + 2)  # noqa: E731  # here
        return lax.cond(jnp.min(x) < 0, large, lambda x: jnp.log(x), x * jnp.sum(w))

    x = rows()
    x[1, 0] = -1 / 6
    return shards(local, (P(), P('data')), P('data')), weights(), x


def uneven_loop():
    """Devices that are done wait for those that aren't."""

    def local(w, x):
        def more(state):
            return state[0] < jnp.max(state[1])

        def body(state):
            n, limit, y = state
            return n + 1, limit, jnp.log(y)  # here

        return lax.while_loop(more, body, (0 * x[0, 0], x, x * jnp.sum(w)))[2]

    x = rows(4.0)
    return shards(local, (P(), P('data')), P('data')), weights(), x


def two_axes():
    def local(w, x):
        with jax.named_scope('dense'):
            y = lax.psum(x @ w, 'model')
        return jnp.log(y + jnp.sum(w))  # here

    x = np.ones((B, 4), np.float32)
    x[BAD] = -9
    split = shards(local, (P('model'), P('data', 'model')), P('data', 'model'), mesh(data=2, model=2))
    return split, np.ones((4, 2), np.float32), x


def gathered():
    def local(w, x):
        everything = lax.all_gather(x @ w, 'data', tiled=True)
        return lax.pmean(jnp.sum(jnp.log(everything)), 'data')  # here

    return shards(local, (P(), P('data')), P()), weights(), rows()


def after():
    """What is made of the joined results knows its examples as well."""

    def step(w, x):
        joined = shards(lambda w, x: x @ w, (P(), P('data')), P('data'))(w, x)
        return jnp.log(joined)  # here

    return step, weights(), rows()


def one_example_each():
    def local(w, x):
        return lax.pmean(jnp.log(jnp.sum(x.reshape(H) * jnp.sum(w))), 'data')  # here

    x = np.ones((DEVICES, H), np.float32)
    x[1] = -9
    return shards(local, (P(), P('data')), P()), weights(), x


def joined_of_one_each():
    def step(w, x):
        joined = shards(lambda w, x: jnp.sum(x * jnp.sum(w), 1), (P(), P('data')), P('data'))(w, x)
        return jnp.log(joined)  # here

    x = np.ones((DEVICES, H), np.float32)
    x[1] = -9
    return step, weights(), x


def sum_of_the_joined():
    def step(w, x):
        joined = shards(lambda w, x: jnp.sum(x * jnp.sum(w), 1), (P(), P('data')), P('data'))(w, x)
        return jnp.log(jnp.sum(joined))  # here

    return step, weights(), -np.ones((DEVICES, H), np.float32)


def branch_on_two_axes():
    """What one axis of the mesh shares, its devices decide together."""

    def local(w, x):
        y = x * jnp.sum(w)
        return lax.cond(jnp.min(x) < 0, lambda x, y: jnp.log(y), lambda x, y: x + y, x, y)  # here

    over = mesh(data=2, model=2)
    return shards(local, (P('model'), P('data')), P('data', 'model'), over), np.ones(2, np.float32), rows()


def within_another():
    """A shard_map within another is named as a whole."""
    over = mesh(data=2, model=2)

    def local(w, x):
        @jax.shard_map(in_specs=(P('model'), P(None, 'model')), out_specs=P(), axis_names={'model'})
        def inner(w, x):
            return lax.psum(jnp.log(x @ w), 'model')

        return inner(w, x)  # here

    step = shards(local, (P(), P('data')), P('data'), over, axis_names={'data'})
    x = np.ones((B, 4), np.float32)
    x[BAD] = -9
    return jax.jit(step), np.ones((4, 2), np.float32), x


def mapped():
    def local(w, x):
        return lax.psum(jnp.log(x @ w), 'i')  # here

    step = jax.pmap(local, axis_name='i', in_axes=(None, 0))
    return step, weights(), rows().reshape(DEVICES, 2, H)


def of_the_arguments():
    """A shard_map that leaves open which devices it runs on."""

    def local(w, x):
        return jnp.log(x @ w)  # here

    step = shards(local, (P(), P('data')), P('data'), mesh().abstract_mesh)
    w, x = (jax.device_put(a, NamedSharding(mesh(), P())) for a in (weights(), rows()))
    return jax.jit(step), w, x


def partly_manual():
    def local(w, x):
        return jnp.log(x @ w)  # here

    step = shards(local, (P(), P('data')), P('data'), mesh(data=2, model=2), axis_names={'data'})
    return jax.jit(step), weights(), rows()


def explicit():
    over = jax.make_mesh((DEVICES,), ('data',), axis_types=(jax.sharding.AxisType.Explicit,))

    def local(w, x):
        return lax.pmean(jnp.mean(jnp.log(x @ w)), 'data')  # here

    x = jax.device_put(rows(), NamedSharding(over, P('data')))
    return shards(local, (P(), P('data')), P(), over), jax.device_put(weights(), NamedSharding(over, P())), x


def no_shard_map():
    def step(w, x):
        return jnp.mean(jnp.log(x @ w))  # here

    over = mesh()
    x = jax.device_put(rows(), NamedSharding(over, P('data')))
    return jax.jit(jax.value_and_grad(step)), jax.device_put(weights(), NamedSharding(over, P())), x


def keys():
    """Random numbers that differ between devices."""

    def local(state, x):
        w, key = state
        key = jax.random.fold_in(key, lax.axis_index('data'))
        kept = jax.random.bernoulli(key, 0.999, x.shape)
        return jnp.log(jnp.where(kept, x, 0.5) @ w)  # here

    return shards(local, (P(), P('data')), P('data')), (weights(), jax.random.key(0)), rows()


def talk():
    """Through collectives of each kind, in bfloat16; the last one gives every device a row of each sum."""

    def local(w, x):
        x = lax.ppermute(x * w, 'data', [(n, (n + 1) % DEVICES) for n in range(DEVICES)])
        x = lax.all_to_all(x, 'data', 1, 0, tiled=True)
        x = lax.pmax(x, 'data') + 0 * x
        x = lax.psum_scatter(x, 'data', tiled=True)
        return jnp.log(x - 4 * DEVICES * (lax.axis_index('data') == 3))  # here

    return shards(local, (P(), P('data')), P('data')), jnp.bfloat16(1), jnp.ones((B, 4), jnp.bfloat16)


def rematerialised():
    @jax.custom_vjp
    def root(x):
        return jnp.sqrt(x)

    root.defvjp(lambda x: (jnp.sqrt(x), x), lambda x, d: (d * 0.5 / jnp.sqrt(x),))  # here

    def local(w, x):
        return lax.pmean(jnp.mean(jax.checkpoint(lambda w: root(x @ w))(w)), 'data')

    return jax.grad(shards(local, (P(), P('data')), P())), weights(), rows(0.0)


def context():
    """A mesh that stands around the step."""
    step = jax.shard_map(lambda w, x: jnp.log(x @ w), in_specs=(P(), P('data')), out_specs=P('data'))  # here
    return step, weights(), rows()


def healthy():
    def local(w, x):
        loss = lambda w: jnp.sum(jnp.where(jnp.isnan(x * jnp.nan), x @ w @ jnp.ones((2, H)), 0) ** 2)  # noqa: E731
        loss, gradient = jax.value_and_grad(loss)(w)
        return lax.pmean(loss, 'data'), gradient

    return shards(local, (P(), P('data')), (P(), P())), weights(), rows()


def masked():
    def local(w, x):
        return lax.psum(jnp.sum(jnp.where(x > 0, jnp.log(x), 0) * jnp.sum(w)), 'data')

    return shards(local, (P(), P('data')), P()), weights(), rows()


def written_down():
    """An infinity that is meant comes by a sum to devices that had none."""

    def local(w, x):
        return lax.psum(jnp.where(x > 0, x * jnp.sum(w), -jnp.inf), 'data')

    return shards(local, (P(), P('data')), P(), check_vma=False), weights(), rows()


def loop_around():
    """A shard_map in each iteration."""

    def step(w, xs):
        def local(h, x, w):
            return jnp.log(2 + 0.1 * h + x @ w)  # here

        def body(h, x):
            return shards(local, (P('data'), P('data'), P()), P('data'))(h, x, w), None

        return lax.scan(body, jnp.zeros((B, 2)), xs)[0]

    return step, weights(), sequences()


def masked_beside_a_fault():
    """A NaN that is thrown away, and travelled before, isn't blamed for another."""

    def local(w, x):
        thrown = lax.ppermute(jnp.log(x), 'data', [(n, (n + 1) % DEVICES) for n in range(DEVICES)])
        kept = jnp.where(jnp.isnan(thrown), 0, thrown)
        return jnp.sqrt(kept + x @ w @ jnp.ones((2, H)))  # here

    return shards(local, (P(), P('data')), P('data')), weights(), rows()


NOWHERE: tuple[dict[str, int], ...] = ()
EVERYONE = tuple(range(B))

CASES = {
    'elementwise': Case(elementwise, 'log'),
    'unchecked': Case(unchecked, 'log'),
    'gradient outside': Case(gradient_outside, 'div', pass_='backward', kind='division by zero'),
    'gradient inside': Case(gradient_inside, 'div', pass_='backward', kind='division by zero', layer='head'),
    'gradient inside, unchecked': Case(
        lambda: gradient_inside(check_vma=False),
        'div',
        pass_='backward',
        kind='division by zero',
        layer='head',
        written=gradient_inside,
    ),
    'loop': Case(loop, 'log', time_step=3, example_axes=1),
    'gradient of a loop': Case(loop_gradient, 'div', pass_='backward', time_step=3, example_axes=1),
    'sum over devices': Case(sum_over_devices, 'psum', (), NOWHERE, kind='overflow'),
    'one device': Case(one_device, 'log', (4, 5), kind='division by zero'),
    'cut by device': Case(cut_by_device, 'log'),
    'argument': Case(argument_of_a_tree, 'input', devices=NOWHERE, pass_='data'),
    'nested jit': Case(nested_jit, 'log'),
    'branch': Case(branch, 'log'),
    'uneven loop': Case(uneven_loop, 'log', (4, 5), time_step=3),
    'two axes': Case(two_axes, 'log', devices=({'data': 1, 'model': 0}, {'data': 1, 'model': 1})),
    'gathered': Case(gathered, 'log', devices=tuple({'data': n} for n in range(DEVICES))),
    'after': Case(after, 'log', devices=NOWHERE),
    'one example each': Case(one_example_each, 'log', (1,), ({'data': 1},)),
    'joined of one each': Case(joined_of_one_each, 'log', (1,), NOWHERE),
    'sum of the joined': Case(sum_of_the_joined, 'log', (), NOWHERE),
    'branch on two axes': Case(
        branch_on_two_axes, 'log', devices=({'data': 1, 'model': 0}, {'data': 1, 'model': 1})
    ),
    'within another': Case(within_another, 'shard_map', devices=({'data': 1},)),
    # [devices, per device]: the place in the first axis is the device's, not the example's
    'mapped': Case(mapped, 'log', (), ({'i': 2},)),
    'of the arguments': Case(of_the_arguments, 'log'),
    'partly manual': Case(partly_manual, 'log', devices=({'data': 1},)),
    'explicit': Case(explicit, 'log'),
    'no shard_map': Case(no_shard_map, 'log', devices=NOWHERE),
    'keys': Case(keys, 'log'),
    'talk': Case(talk, 'log', (), ({'data': 3},)),
    'rematerialised': Case(rematerialised, 'div', pass_='backward', kind='division by zero'),
    'context': Case(context, 'log'),
    'healthy': Case(healthy, ''),
    'masked': Case(masked, ''),
    'written down': Case(written_down, ''),
    'loop around': Case(loop_around, 'log', time_step=3, example_axes=1),
    'masked beside a fault': Case(masked_beside_a_fault, 'sqrt'),
}


def line_of(case: Case) -> int | None:
    lines, start = inspect.getsourcelines(case.written or case.make)
    return next((start + n for n, line in enumerate(lines) if '# here' in line), None)


def told(case: Case) -> dict[str, Any]:
    step, *arguments = case.make()
    with jax.set_mesh(mesh()) if case.make is context else contextlib.nullcontext():
        told = trace.first_bad(step, *arguments, example_axes=case.example_axes)
    return {} if told.finding is None else told.finding._asdict()


if __name__ == '__main__':
    found = {}
    for name in sys.argv[1:] or CASES:
        try:
            found[name] = told(CASES[name])
        except Exception as error:  # it's for the test to fail
            found[name] = {'error': f'{type(error).__name__}: {error}'}
            if sys.argv[1:]:
                raise
    print(json.dumps(found))
