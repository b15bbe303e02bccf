"""What a probe measures of a layer, against a loop over its equations in float64; and that it changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from jaxrnn.rnn import cells, layers, scan, signals
from jaxrnn.rnn.probe import UNITS, Probe, new_probe
from jaxrnn.words import train

T, B, V, H = 7, 5, 4, 6
CELLS = {
    'lstm': cells.lstm(cells.SIGMOID),
    'hard lstm': cells.lstm(cells.HARD_SIGMOID),
    'gru after': cells.gru_reset_after(cells.HARD_SIGMOID),
    'gru before': cells.gru_reset_before(cells.HARD_SIGMOID),
}
PLANS = {'loop': scan.CPU, 'as it is': scan.CPU_LARGE_BATCH, 'unrolled': scan.ACCELERATOR}


def weights_of(cell: cells.Cell, hidden: int = H, scale: float = 2.0) -> scan.Weights:
    rng, gates = np.random.default_rng(0), sum(cell.blocks)

    def draw(*shape):
        return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)

    return scan.Weights(draw(V, gates * hidden), draw(gates * hidden), draw(hidden, gates * hidden))


def letters_of(steps: int = T, examples: int = B) -> np.ndarray:
    return np.random.default_rng(1).integers(0, V, (steps, examples))


def loss_of(h: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(h - jnp.linspace(-1, 1, h.shape[1])[None]))


def found(cell, weights, letters, *, plan=scan.CPU, mask=None, ends=None) -> Probe:
    def loss(probe):
        _, carry = scan.run(
            cell, weights, letters, mask=mask, ends=ends, plan=plan, sequences=False, probe=probe
        )
        return loss_of(carry.h)

    return jax.jit(jax.grad(loss))(new_probe(cell))


def expected(cell, weights, letters, *, mask=None, ends=None) -> dict:
    """From the cell's own equations, one time step after the other; gradients by JAX, of zeros added to the product."""
    steps, examples = letters.shape
    width, gates = weights.recurrent_kernel.shape[0], sum(cell.blocks)
    valid = np.ones(letters.shape, bool) if mask is None else np.asarray(mask)
    ends = np.full(examples, steps) if ends is None else np.asarray(ends)
    kept = {}

    def run(added):
        tm1 = cell.carry(*[jnp.zeros((examples, width))] * len(cell.carry._fields))
        states, gate_values = [tm1], []
        for t in range(steps):
            splits = np.cumsum(cell.blocks)[:-1] * width
            blocks = jnp.split(weights.recurrent_kernel, splits, axis=1)

            def product(k, block, h, t=t):
                u = h @ block + (added[t] if k == 0 else 0)
                return jnp.split(u, u.shape[1] // width, axis=1)

            products = [functools.partial(product, k, block) for k, block in enumerate(blocks)]
            x_t = (weights.kernel + weights.bias[None])[letters[t]]
            new, saved = cell.forward(products, jnp.split(x_t, gates, axis=1), tm1)
            tm1 = jax.tree.map(lambda a, b, t=t: jnp.where(valid[t][:, None], a, b), new, tm1)
            states.append(tm1)
            gate_values.append({name: saved[k] for name, k in cell.gates})
        kept.update(states=states, gates=gate_values)
        return loss_of(tm1.h)

    with jax.enable_x64(True):
        weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), weights)
        d = np.asarray(jax.grad(run)(jnp.zeros((steps, examples, cell.blocks[0] * width))))
        run(jnp.zeros_like(d))
    rms = [np.sqrt(np.sum(np.square(d[t])) / max(valid[t].sum(), 1)) for t in range(steps)]
    final = max(t for t in range(steps) if valid[t].any())
    norms = np.linalg.norm(d, axis=2)
    padded = [b for b in range(examples) if ends[b] < steps and mask is None]
    gains = [np.log(norms[ends[b] - 1, b] / norms[-1, b]) for b in padded]
    h = np.stack([np.asarray(state.h) for state in kept['states']])
    at_end = h[ends, np.arange(examples)]
    values = {name: np.stack([np.asarray(g[name]) for g in kept['gates']]) for name, _ in cell.gates}
    shut = {name: (v <= 0) | (v >= 1) | ~valid[:, :, None] for name, v in values.items()}
    cell_states = np.stack([np.asarray(getattr(s, 'c', s.h)) for s in kept['states']])[:-1]
    return {
        **{
            ('saturated', n): np.mean((v < 0.1) | (v > 0.9), where=valid[:, :, None])
            for n, v in values.items()
        },
        **{('dead', name): np.mean(np.all(x, axis=(0, 1))) for name, x in shut.items()},
        'large_cells': np.mean(np.abs(cell_states) > 4, where=valid[:, :, None]),
        'memory': np.var(h[-1], axis=0).sum() / np.var(at_end, axis=0).sum(),
        'through_time': rms[0] / rms[final],
        'padding_gain': np.mean(gains) if gains else 0.0,
    }


def flat(probe: Probe) -> dict:
    return {
        **{('saturated', name): value for name, value in probe.saturated.items()},
        **{('dead', name): value for name, value in probe.dead.items()},
        **{name: getattr(probe, name) for name in ('large_cells', 'memory', 'through_time', 'padding_gain')},
    }


@pytest.mark.parametrize(
    ('name', 'plan'),
    [
        pytest.param(name, plan, marks=() if plan == 'loop' or name == 'lstm' else pytest.mark.battery)
        for name in CELLS
        for plan in PLANS
    ],
)
@pytest.mark.parametrize('masked', [False, True])
def test_formulas(name, plan, masked):
    cell, letters = CELLS[name], letters_of()
    ends = np.array([3, 7, 1, 5, 6])
    mask = np.arange(T)[:, None] < np.minimum(ends, 6) if masked else None
    options = {'mask': mask, 'ends': ends}
    weights = weights_of(cell)
    got, wanted = (
        flat(found(cell, weights, letters, plan=PLANS[plan], **options)),
        expected(cell, weights, letters, **options),
    )
    assert got.keys() == wanted.keys()
    for field, value in wanted.items():
        np.testing.assert_allclose(got[field], value, rtol=2e-4, atol=1e-6, err_msg=str(field))
    assert 0 < wanted['saturated', cell.gates[0][0]] < 1
    assert (wanted['memory'] == 1) == masked  # what is masked changes no state


def test_units_whose_gate_is_shut_for_all_are_dead():
    """As many as have a bias so low that nothing reaches them."""
    cell = CELLS['hard lstm']
    weights = weights_of(cell, scale=0.1)
    bias = weights.bias.at[:2].set(-9).at[3 * H].set(9)
    got = found(cell, weights._replace(bias=bias), letters_of())
    assert {name: round(float(value) * H) for name, value in got.dead.items()} == {
        cells.INPUT: 2, cells.FORGET: 0, cells.OUTPUT: 1,
    }  # fmt: skip


def test_of_many_units_some_are_looked_at():
    """Those of an eighth of 512: a share that is theirs, near that of all."""
    cell = CELLS['lstm']
    weights = weights_of(cell, hidden=8 * UNITS, scale=0.1)
    got, wanted = flat(found(cell, weights, letters_of())), expected(cell, weights, letters_of())
    for field, value in wanted.items():
        np.testing.assert_allclose(got[field], value, rtol=0.25, atol=0.05, err_msg=str(field))


@pytest.mark.parametrize('reverse', [False, True])
def test_looking_moves_nothing(reverse):
    cell, letters = CELLS['lstm'], letters_of()

    def gradient(probe):
        def loss(weights):
            return loss_of(scan.run(cell, weights, letters, reverse=reverse, probe=probe)[1].h)

        return jax.jit(jax.value_and_grad(loss))(weights_of(cell))

    jax.tree.map(np.testing.assert_array_equal, gradient(None), gradient(new_probe(cell)))


def test_backwards_masked_steps_do_not_count():
    """Gates and cells lie at their inputs' places, whichever way time runs."""
    cell, letters, weights = CELLS['hard lstm'], letters_of(), weights_of(CELLS['hard lstm'])
    mask = np.arange(T)[:, None] < np.array([3, 7, 1, 5, 6])

    def measured(letters, reverse):
        def loss(probe):
            return loss_of(scan.run(cell, weights, letters, mask=mask, reverse=reverse, probe=probe)[1].h)

        return flat(jax.grad(loss)(new_probe(cell)))

    turned = np.where(
        mask, letters[(mask.sum(axis=0) - 1 - np.arange(T)[:, None]) % T, np.arange(B)], letters
    )
    one, other = measured(letters, True), measured(turned, False)
    for field in [*(key for key in one if isinstance(key, tuple)), 'large_cells']:
        np.testing.assert_allclose(one[field], other[field], rtol=1e-5, err_msg=str(field))


def test_backwards_the_first_step_is_the_last():
    cell, letters = CELLS['lstm'], letters_of()

    def through_time(letters, reverse):
        def loss(probe):
            return loss_of(scan.run(cell, weights_of(cell), letters, reverse=reverse, probe=probe)[1].h)

        return jax.grad(loss)(new_probe(cell))

    one, other = through_time(letters, False), through_time(letters[::-1], True)
    np.testing.assert_allclose(one.through_time, other.through_time, rtol=1e-5)
    assert other.memory == 1 and other.padding_gain == 0


def test_a_network_of_ours_is_looked_at_layer_by_layer():
    """Two layers, one probe each, in their order; the plain recurrence has none."""
    for recurrence, count in (('fast', 2), ('reference', 0)):
        made = small.configuration('stacked').changed(recurrence=recurrence)
        program = train.make_program(made, small.dataset())
        params, batch = program.init().params, program.batch_at(0)
        for _ in range(2):
            assert len(layers.probes(program.predict, params, batch.letters)) == count
    assert layers.probes(lambda x: x, 1.0) == []


def test_the_worst_layer_speaks():
    def layer(saturated, memory, through_time):
        gate = {cells.INPUT: jnp.float32(saturated)}
        return Probe(gate, gate, *(jnp.float32(x) for x in (saturated / 2, memory, through_time, -memory)))

    got = signals.of_layers([layer(0.5, 0.1, 1e-4), layer(0.25, 0.2, 50.0)])
    assert {name: round(float(value), 6) for name, value in got.items()} == {
        'saturated_input_gate': 0.5, 'dead_input_gate': 0.5, 'large_cells': 0.25, 'memory': 0.2, 'through_time': 1e-4,
        'padding_gain': -0.2,
    }  # fmt: skip
    assert signals.of_layers([]) == {}
