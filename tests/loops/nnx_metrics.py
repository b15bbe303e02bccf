"""nnx: a step that changes model, optimiser and metrics in place; the metrics are read and reset every ten steps."""

import numpy as np
import optax
from flax import nnx

from jaxrnn.adapters.nnx import Objects


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(6, 16, rngs=rngs)
        self.output = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.output(nnx.relu(self.hidden(x)))


def loss_fn(model, batch):
    logits = model(batch['features'])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean()
    return loss, logits


@nnx.jit
def train_step(model, optimizer, metrics, batch):
    (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, batch)
    metrics.update(loss=loss, logits=logits, labels=batch['label'])
    optimizer.update(model, grads)


def batches(size=8):
    """Shuffled without a seed."""
    data = np.random.default_rng(0)
    features = data.normal(size=(64, 6)).astype(np.float32)
    label = np.argmax(features[:, :3], axis=1)
    while True:
        for chosen in np.random.default_rng().permutation(64).reshape(-1, size):
            yield {'features': features[chosen], 'label': label[chosen]}


def setup():
    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average('loss'))
    return model, optimizer, metrics


def main(loader, directory):
    model, optimizer, metrics = setup()
    history = []
    with Objects(model, optimizer, metrics).recorder(directory, checkpoint_every=10) as recorder:  # recorder
        step = recorder.around(train_step)  # recorder
        for batch in loader:
            step(model, optimizer, metrics, batch)  # recorder: train_step(model, optimizer, metrics, batch)
            history.append(float(metrics.compute()['loss']))
            if optimizer.step[...] % 10 == 0:
                metrics.reset()
    return history


def replayed():
    objects = Objects(*setup())
    return objects.pure(train_step), objects.state
