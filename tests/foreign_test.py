"""The debugger knows nothing of LSTMs: two train steps that aren't jaxrnn's, written as their users write them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen
from flax.training import train_state

from jaxrnn import detect
from jaxrnn.bisect import replay
from jaxrnn.diagnosis import Symptom
from jaxrnn.record import checkpoint, loop
from jaxrnn.record.record_file import RecordFile

BAD = 61
STEPS = 100


class Regression:
    """Linear regression in plain JAX: the state is a dictionary; one batch has a row that overflows."""

    weights = np.linspace(-1, 1, 5).astype(np.float32)

    def init(self):
        return {'w': jnp.zeros(5), 'velocity': jnp.zeros(5)}

    def batch_at(self, step):
        rng = np.random.default_rng(step)
        x = rng.normal(size=(16, 5)).astype(np.float32)
        y = x @ self.weights
        if step == BAD:
            y[3] = 3e38
        return x, y

    @staticmethod
    def step(state, batch):
        x, y = batch

        def loss_of(w):
            return jnp.mean((x @ w - y) ** 2)

        loss, gradient = jax.value_and_grad(loss_of)(state['w'])
        velocity = 0.9 * state['velocity'] + gradient
        return {'w': state['w'] - 0.01 * velocity, 'velocity': velocity}, loss


class LinenLoop:
    """A linen classifier with flax's TrainState; at one step the learning rate is a thousand times too large."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(3)(jnp.tanh(linen.Dense(16)(x)))

    def __init__(self):
        self.net = self.Net()

    def init(self):
        params = self.net.init(jax.random.key(0), jnp.zeros((1, 4)))['params']
        return train_state.TrainState.create(apply_fn=self.net.apply, params=params, tx=optax.adam(3e-3))

    def batch_at(self, step):
        rng = np.random.default_rng(step)
        x = rng.normal(size=(32, 4)).astype(np.float32)
        return {'x': x, 'y': np.argmax(x[:, :3], axis=1), 'scale': np.float32(1000 if step == BAD else 1)}

    @staticmethod
    def step(state, batch):
        def loss_of(params):
            logits = state.apply_fn({'params': params}, batch['x'])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['y'])
            return losses.mean(), (logits.argmax(-1) == batch['y']).mean()

        (loss, accuracy), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        after = state.apply_gradients(grads=gradients)
        params = jax.tree.map(lambda old, new: old + batch['scale'] * (new - old), state.params, after.params)
        return after.replace(params=params), {'metrics': {'loss': loss, 'accuracy': accuracy}}


def recorded(task, directory):
    """Under jaxrnn's loop: one call."""
    loop.run(
        task.step, task.batch_at, task.init, directory, loop.LoopOptions(max_steps=STEPS, checkpoint_every=15)
    )
    rows = RecordFile(directory / 'records.jsonl').read()
    return checkpoint.Checkpoints(directory / 'checkpoints', like=jax.eval_shape(task.init)), rows


def own_loop(task, directory):
    """Their own loop and their own orbax manager, no records: checkpoint k is what step k starts from."""
    step, state = jax.jit(task.step), task.init()
    with ocp.CheckpointManager(directory) as manager:
        for number in range(STEPS):
            if number % 15 == 0:
                manager.save(number, args=ocp.args.StandardSave(state))
            state, _ = step(state, task.batch_at(number))
        manager.save(STEPS, args=ocp.args.StandardSave(state))
    return checkpoint.Checkpoints(directory, like=jax.eval_shape(task.init)), ()


CASES = {
    'regression': (Regression, detect.DETECTORS, BAD, 'nonfinite'),
    # The kick of step 61 is in the state that step 62 starts from.
    'linen': (LinenLoop, [detect.custom('metrics_loss > 5 * median(metrics_loss, 30)')], BAD + 1, 'when'),
}


@pytest.mark.parametrize('make', [recorded, own_loop])
@pytest.mark.parametrize('name', CASES)
def test_names_the_step(name, make, tmp_path):
    task_class, detectors, expected, kind = CASES[name]
    task = task_class()
    checkpoints, rows = make(task, tmp_path)
    subject = replay.subject(task.step, task.batch_at, checkpoints, rows)
    found, replayed = replay.bisect(subject, detectors)
    assert (found.symptom, found.first_bad_step) == (Symptom(kind, expected), expected)
    assert found.replay.first_mismatch is None
    assert expected in [row['step'] for row in replayed]
    if make is recorded:
        assert found.replay.bit_identical and found.replay.steps_replayed == expected % 15 + 1


def test_structure_is_not_needed_for_a_state_of_dictionaries(tmp_path):
    task = Regression()
    own_loop(task, tmp_path)
    subject = replay.subject(task.step, task.batch_at, checkpoint.Checkpoints(tmp_path))
    found, _ = replay.bisect(subject)
    assert found.first_bad_step == BAD


def test_their_state_comes_back_as_theirs(tmp_path):
    task = LinenLoop()
    checkpoints, rows = recorded(task, tmp_path)
    state = replay.Replayer(replay.subject(task.step, task.batch_at, checkpoints, rows)).state(20)
    assert isinstance(state, train_state.TrainState) and int(state.step) == 20
    assert state.apply_fn == task.net.apply


def test_random_keys_of_both_kinds_in_the_state(tmp_path):
    """A step that draws noise from a key that it carries: typed and raw."""

    def init():
        return {'typed': jax.random.key(1), 'raw': jax.random.PRNGKey(2), 'sum': jnp.float32(0)}

    def step(state, batch):
        typed, use = jax.random.split(state['typed'])
        raw, also = jax.random.split(state['raw'])
        drawn = jax.random.normal(use) + jax.random.normal(also)
        return {'typed': typed, 'raw': raw, 'sum': state['sum'] + drawn}, drawn

    loop.run(step, lambda n: 0, init, tmp_path, loop.LoopOptions(max_steps=20, checkpoint_every=7))
    rows = RecordFile(tmp_path / 'records.jsonl').read()
    checkpoints = checkpoint.Checkpoints(tmp_path / 'checkpoints', like=jax.eval_shape(init))
    found, _ = replay.bisect(
        replay.subject(step, lambda n: 0, checkpoints, rows), [detect.custom('step == 17')]
    )
    assert found.first_bad_step == 17 and found.replay.bit_identical
