"""nnx: a recurrent classifier; the step takes inputs and labels apart, and returns a pair."""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxrnn.adapters.nnx import Objects


class Parity(nnx.Module):
    def __init__(self, hidden, *, rngs):
        self.rnn = nnx.RNN(nnx.GRUCell(2, hidden, rngs=rngs))
        self.head = nnx.Linear(hidden, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(x)[:, -1])


@nnx.jit
def train_step(model, optimizer, x, y):
    def loss_fn(model):
        logits = model(x)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, jnp.mean(jnp.argmax(logits, -1) == y)

    (loss, accuracy), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    return {'loss': loss, 'accuracy': accuracy}


def batches(size=4, length=6):
    rng = np.random.default_rng()
    while True:
        x = rng.normal(size=(size, length, 2)).astype(np.float32)
        yield x, (x[:, 0, 0] > 0).astype(np.int32)


def setup():
    model = Parity(8, rngs=nnx.Rngs(3))
    return model, nnx.Optimizer(model, optax.adamw(optax.cosine_decay_schedule(1e-2, 500)), wrt=nnx.Param)


def main(loader, directory):
    model, optimizer = setup()
    history = []
    with Objects(model, optimizer).recorder(directory, checkpoint_every=10) as recorder:  # recorder
        step = recorder.around(train_step)  # recorder
        for x, y in loader:
            metrics = step(model, optimizer, x, y)  # recorder: metrics = train_step(model, optimizer, x, y)
            history.append(float(metrics['loss']))
    return history


def replayed():
    objects = Objects(*setup())
    return objects.pure(train_step), objects.state
