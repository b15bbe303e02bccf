"""The door for nnx: what objects hold is a state, and back; what a loop does to them between steps is kept."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxrnn
from jaxrnn.adapters.nnx import Objects
from jaxrnn.record import adam, kept_batches, layout, motion
from jaxrnn.types import UserError


class Model(nnx.Module):
    """Two dropouts have their streams from one; a weight is used twice; an array is no variable."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)])
        self.tied = self.layers[0]
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.centre = jnp.zeros(3)

    def __call__(self, x):
        for layer in self.layers:
            x = self.dropout(jnp.tanh(layer(x)))
        return self.tied(x - self.centre[None])


def made(tx=None):
    model = Model(nnx.Rngs(0))
    return model, nnx.Optimizer(model, tx or optax.adam(1e-2), wrt=nnx.Param), nnx.metrics.Average('loss')


@nnx.jit
def train_step(model, optimizer, metric, x, *, y):
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
    optimizer.update(model, grads)
    metric.update(loss=loss)


def batch(number):
    x = np.random.default_rng(number).normal(size=(4, 3)).astype(np.float32)
    return x, np.roll(x, 1, axis=1)


def same(one, other):
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), one, other)))


def test_a_state_is_of_plain_dictionaries_and_of_optax_tuples():
    """So that the optimiser's means are known for what they are, and Adam's signals are there."""
    state = Objects(*made()).state()
    assert sorted(state) == ['metrics', 'model', 'optimizer'] and 'centre' in state['model']
    assert isinstance(state['optimizer']['opt_state'][0], optax.ScaleByAdamState)
    assert adam.sampled(state).params is not None
    assert len(motion.moving(state)) == len(motion.moving(state['model']))


def test_a_state_goes_into_the_objects_and_comes_out():
    objects, others = Objects(*made()), Objects(*made())
    train_step(*objects.objects, batch(0)[0], y=batch(0)[1])
    state = objects.state()
    assert not same(state, others.state())
    others.update(state)
    assert same(state, others.state())


def test_the_pure_step_does_what_the_step_does():
    objects = Objects(*made())
    step = Objects(*made()).pure(lambda *given: train_step(*given[:3], given[3][0], y=given[3][1]))
    state = objects.state()
    for number in range(3):
        x, y = batch(number)
        total = float(objects.objects[2].total[...])
        train_step(*objects.objects, x, y=y)
        state, record = step(state, (x, y))
        assert same(state, objects.state())
        assert float(record['metrics']) == np.float32(float(objects.objects[2].total[...]) - total)
    program = jax.make_jaxpr(step)(state, batch(0))
    assert any(equation.primitive.name == 'jit' for equation in program.eqns)


def test_what_the_loop_changes_is_kept_with_the_batch(tmp_path):
    """A metric that is set back, a rate that is set, an array that is put in the model: none by a step."""
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    model, optimizer, metric = made(tx)
    with Objects(model, optimizer, metric).recorder(
        tmp_path, checkpoint_every=10, digest_every=1
    ) as recorder:
        step = recorder.around(train_step)
        for number in range(40):
            x, y = batch(number)
            step(model, optimizer, metric, x, y=y)
            if number % 7 == 6:
                metric.reset()
            if number == 15:
                optimizer.opt_state.hyperparams['learning_rate'][...] = jnp.float32(0.01)
            if number == 25:
                model.centre = jnp.ones(3)
    kept = kept_batches.KeptBatches(layout.Paths(tmp_path).batches)
    changed = {number: sorted(kept(number).changed) for number in range(40) if kept(number).changed}
    assert sorted(changed) == [7, 14, 16, 21, 26, 28, 35]
    assert changed[26] == ['model/centre'] and 'learning_rate' in changed[16][0]
    objects = Objects(*made(tx))
    found, _ = jaxrnn.bisect(objects.pure(train_step), None, tmp_path, like=objects.state(), verify=True)
    assert found.replay.bit_identical and found.replay.steps_replayed >= 40 and found.symptom is None


def test_a_step_that_has_its_objects_already(tmp_path):
    """As nnx.cached_partial gives it."""

    def linear():
        model = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer, given):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(given[0]) - given[1]) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    objects = Objects(*linear())
    with objects.recorder(tmp_path) as recorder:
        step = recorder.around(nnx.cached_partial(train, *objects.objects))
        losses = [float(step(batch(number))) for number in range(34)]
    fresh = Objects(*linear())
    found, _ = jaxrnn.bisect(fresh.pure(train), None, tmp_path, like=fresh.state(), verify=True)
    assert found.replay.bit_identical and found.replay.steps_replayed >= 34 and losses[-1] < losses[0]


def test_the_states_of_a_loop_that_calls_the_recorder_itself(tmp_path):
    def taken(directory, given):
        objects = Objects(*made())
        with jaxrnn.Recorder(directory, objects.state()) as recorder:
            objects.update(recorder.state)
            for x, y in given:
                train_step(*objects.objects, x, y=y)
                recorder(objects.state(), {'n': 1}, (x, y))
        return objects.state()

    given = [batch(number) for number in range(12)]
    taken(tmp_path / 'a', given[:5])
    assert same(taken(tmp_path / 'a', given[5:]), taken(tmp_path / 'b', given))


class Growing(nnx.Module):
    def __init__(self):
        self.x = nnx.Param(jnp.ones(2))


def replaced(model, batch):
    model.x = nnx.Param(model.x[...] * batch)


def added(model, batch):
    model.y = nnx.Param(model.x[...] * batch)


def test_a_variable_that_a_step_replaces_is_found(tmp_path):
    objects = Objects(Growing())
    with objects.recorder(tmp_path) as recorder:
        step = recorder.around(replaced)
        for number in range(4):
            step(*objects.objects, np.float32(number + 2))
    assert objects.state()['model']['x'].tolist() == [120, 120]
    like = Objects(Growing())
    found, _ = jaxrnn.bisect(like.pure(replaced), None, tmp_path, like=like.state(), verify=True)
    assert found.replay.bit_identical


def test_one_that_it_adds_is_refused(tmp_path):
    objects = Objects(Growing())
    said = r'objects: a step leaves other variables than it begins with \(0/y\); make Objects after'
    with pytest.raises(UserError, match=said), objects.recorder(tmp_path) as recorder:
        recorder.around(added)(*objects.objects, np.float32(2))
    with pytest.raises(UserError, match=said):
        fresh = Objects(Growing())
        fresh.pure(added)(fresh.state(), np.float32(2))


def test_what_is_refused(tmp_path):
    model, optimizer, metric = made()
    with pytest.raises(UserError, match='objects: a float found at place 1, an object of nnx expected'):
        Objects(model, 0.1)
    with pytest.raises(UserError, match="state: another structure found than the objects'"):
        Objects(model).update({'model': {}})
    with Objects(model, optimizer, metric).recorder(tmp_path) as recorder:
        for given in [(optimizer, model, metric), made(), (model, optimizer)]:
            with pytest.raises(
                UserError, match=r'around: a step of .* found, of Model, Optimizer, Average expected'
            ):
                recorder.around(train_step)(*given, *batch(0))


def test_a_run_that_ended_in_its_first_steps_is_gone_on_with(tmp_path):
    """Its only checkpoint is of step 0; the objects are others, as of another seed."""
    model, *rest = made()
    model.centre = model.centre + 7
    saved = Objects(model, *rest)
    with saved.recorder(tmp_path) as recorder:
        x, y = batch(0)
        began = jax.tree.map(jnp.copy, saved.state())
        recorder.around(train_step)(*saved.objects, x, y=y)
    shutil.rmtree(tmp_path / 'checkpoints' / '1')
    objects = Objects(*made())
    with objects.recorder(tmp_path) as recorder:
        assert recorder.step == 0 and same(objects.state(), began)
        recorder.around(train_step)(*objects.objects, x, y=y)
    assert same(objects.state(), saved.state())
