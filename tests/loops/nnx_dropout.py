"""nnx: batch normalisation and dropout, whose state and random streams are in the model; evaluated after each epoch."""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxrnn.adapters.nnx import Objects

EPOCH = 10


class Block(nnx.Module):
    def __init__(self, features, rngs):
        self.linear = nnx.Linear(features, features, rngs=rngs)
        self.norm = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(nnx.gelu(self.norm(self.linear(x))))


class Regressor(nnx.Module):
    def __init__(self, rngs):
        self.block = Block(5, rngs)
        self.head = nnx.Linear(5, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.block(x))


def mse(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


@nnx.jit
def train_step(model, optimizer, batch):
    loss, grads = nnx.value_and_grad(mse)(model, *batch)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def eval_step(model, batch):
    return mse(model, *batch)


class DataLoader:
    """As torch has it: an iterable that shuffles anew each time."""

    def __init__(self, x, y, batch_size):
        self.x, self.y, self.batch_size = x, y, batch_size

    def __iter__(self):
        order = np.random.permutation(len(self.x))  # noqa: NPY002
        for chosen in order.reshape(-1, self.batch_size):
            yield self.x[chosen], self.y[chosen]


def batches():
    x = np.random.default_rng(1).normal(size=(64, 5)).astype(np.float32)
    loader = DataLoader(x, np.sin(x[:, :1]), batch_size=8)
    while True:
        yield from loader


def setup():
    model = Regressor(nnx.Rngs(params=0, dropout=1))
    return model, nnx.Optimizer(
        model, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)), wrt=nnx.Param
    )


def main(loader, directory):
    model, optimizer = setup()
    history = []
    with Objects(model, optimizer).recorder(directory, checkpoint_every=10) as recorder:  # recorder
        step = recorder.around(train_step)  # recorder
        for number, batch in enumerate(loader):
            loss = step(model, optimizer, batch)  # recorder: loss = train_step(model, optimizer, batch)
            history.append(float(loss))
            if number % EPOCH == EPOCH - 1:
                model.eval()
                history.append(float(eval_step(model, batch)))
                model.train()
    return history


def replayed():
    objects = Objects(*setup())
    return objects.pure(train_step), objects.state
