"""jaxrnn's own networks as a program: a state to start from, a train step, and the batch of each step."""

import functools
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxrnn import environment, tree
from jaxrnn.optim import curvature, transforms
from jaxrnn.record import loop
from jaxrnn.rnn import layers
from jaxrnn.rnn.probe import Probe
from jaxrnn.types import Array, BatchAt, Record, Staged, Step, Tree, UserError
from jaxrnn.words import data, models, optimisers, presets, signals
from jaxrnn.words.config import Config, Model
from jaxrnn.words.data import Batch
from jaxrnn.words.signals import TrainState

TINY = 1e-12
"""Keeps a cosine's or a ratio's denominator off zero; far below any squared norm of a float32 word vector."""


class Program(NamedTuple):
    """A configuration and its data, ready to run."""

    init: Callable[[], TrainState]
    step: Step
    batch_at: BatchAt
    predict: Callable[[Tree, Array], Array]  # params, letters [T, B] -> vectors [B, E]


class MakeProgram(Protocol):
    """Makes the program of a configuration; `make_program`, or what alters what that makes."""

    def __call__(self, config: Config, dataset: data.Dataset, /) -> Program: ...


def make_program(config: Config, dataset: data.Dataset) -> Program:
    """The program of a configuration; everything random in it follows from config.training.seed.

    Raises UserError for options that contradict each other, or a network that no memory holds.
    """
    network = _network(config.model, len(dataset.alphabet), dataset.vectors.shape[1])
    _check_state(config, network)
    preset = presets.network_of(config.model.preset)
    optimiser = optimisers.build(config.optimiser, epsilon=preset.epsilon, epsilon_hat=preset.epsilon_hat)

    def init() -> TrainState:
        params = network.init(jax.random.key(config.training.seed))
        return TrainState(jnp.int32(0), params, optimiser.init(params))

    def rate(state: TrainState) -> Array:
        return optimisers.current_learning_rate(config.optimiser, state.step, state.opt_state)

    batch_at: BatchAt = functools.partial(
        data.batch_at, dataset, batch_size=config.training.batch_size, seed=config.training.seed
    )
    if config.training.skip_batches:
        batch_at = loop.without(batch_at, skipped(config.training.skip_batches))
    warnings = signals.of_step(config.optimiser, preset, rate) if config.training.signals else None
    step = make_step(network.predict, optimiser, rate, warnings)
    return Program(init, step, batch_at, network.predict)


def _check_state(config: Config, network: 'Network') -> None:
    """Raises UserError for a state that no memory holds: its parameters and Adam's two means."""
    means = 2 if config.optimiser.moment_dtype == 'float32' else 1
    _check_fits('--hidden', models.width(config.model), network.size * (1 + means))


def check_batch(config: Config, dataset: data.Dataset) -> None:
    """Raises UserError for batches that can't be trained on. Counted is less than that needs: letters, targets, and one
    layer's output at each time step in two bytes a number."""
    (steps, _), size = dataset.letters.shape, dataset.vectors.shape[1]
    batch, each = config.training.batch_size, 4 * steps + 4 * size + 2 * steps * models.width(config.model)
    _check_fits('--batch_size', batch, batch * each)


def _check_fits(flag: str, found: int, need: int) -> None:
    if need > (memory := environment.memory()):
        raise UserError(
            f'{flag}: {found} found, which needs more than {need >> 30:,} GiB, and there are {memory / 2**30:,.1f} GiB '
            'of memory; give a smaller one'
        )


class Network(NamedTuple):
    """A network as functions of its parameters."""

    size: int  # bytes of its parameters

    init: Callable[[Array], Tree]  # key -> parameters
    predict: Callable[[Tree, Array], Array]  # as a program has it


@functools.lru_cache(maxsize=16)
def _network(options: Model, letters: int, vector_size: int) -> Network:
    """The same functions for the same network, so that what was compiled of them serves every program with it."""
    build = functools.partial(models.build, options, letters=letters, vector_size=vector_size)
    graph = nnx.graphdef(nnx.eval_shape(lambda: build(key=jax.random.key(0))))

    def init(key: Array) -> Tree:
        return nnx.to_pure_dict(nnx.state(build(key=key), nnx.Param))

    def predict(params: Tree, letters: Array) -> Array:
        variables = jax.tree.map(nnx.Param, params)
        with jax.default_matmul_precision(None if options.precision == 'default' else options.precision):
            return nnx.merge(graph, nnx.State(variables))(letters)

    return Network(tree.nbytes(jax.eval_shape(init, jax.random.key(0))), init, predict)


def skipped(text: str) -> frozenset[int]:
    """Steps as --skip_batches has them. Raises UserError for what can't be read."""
    steps: set[int] = set()
    for part in text.split(','):
        first, *rest = part.split('-')
        if len(rest) > 1 or not all(_STEP.fullmatch(number) for number in (first, *rest)):
            raise UserError(
                f'--skip_batches: {reprlib.repr(part)} found, a step or a range as 1400-1410 expected'
            )
        bounds = range(int(first), int((rest or [first])[0]) + 1)
        if not bounds or bounds[0] < 1 or len(bounds) + len(steps) > MOST_SKIPPED:
            raise UserError(
                f'--skip_batches: {part!r} found, steps from 1 on, in rising order and at most {MOST_SKIPPED:,} in '
                'all, expected'
            )
        steps |= set(bounds)
    return frozenset(steps)


MOST_SKIPPED = 1_000_000
"""Steps of --skip_batches."""

_STEP = re.compile('[0-9]{1,18}')


def make_step(
    predict: Callable[[Tree, Array], Array],
    optimiser: optax.GradientTransformationExtraArgs,
    rate: Callable[[TrainState], Array],
    signals_of: signals.OfStep | None = None,
) -> Step:
    """The train step: mean squared error and its gradient; then one update, and the record of it all."""

    def finish(state: TrainState, batch: Batch, found: Tree) -> tuple[TrainState, Record]:
        (loss, predictions), (gradients, probes) = found
        updates, opt_state = optimiser.update(
            gradients, state.opt_state, state.params, value=loss, rate=rate(state),
            loss_of=lambda params: loss_of(predict, params, batch)[0],
        )  # fmt: skip
        params = optax.apply_updates(state.params, updates)
        record = {
            'loss': loss,
            **quality(predictions, batch.targets),
            'gradient_norm': tree.norm(gradients),
            'update_norm': tree.norm(updates),
            'parameter_norm': tree.norm(params),
            'learning_rate': rate(state),
            'finite_loss': jnp.isfinite(loss),
            'finite_gradients': tree.all_finite(gradients),
            'finite_updates': tree.all_finite(updates),
            **transforms.skips(opt_state),
            **curvature.measured(opt_state),
        }
        after = TrainState(state.step + 1, params, opt_state)
        if signals_of:
            # What is computed of a step must not change how XLA fuses the step.
            after, gradients, updates, probes = jax.lax.optimization_barrier(
                (after, gradients, updates, probes)
            )
            record |= signals_of(state, after, gradients, updates, probes)
        return after, record

    return Staged(_begin(predict, signals_of is not None), finish)


@functools.lru_cache(maxsize=16)
def _begin(
    predict: Callable[[Tree, Array], Array], look: bool = False
) -> Callable[[TrainState, Batch], Tree]:
    """State, batch -> (loss, predictions), (gradients, what was measured of each recurrent layer if `look`)."""

    def probed(params: Tree, probes: list[Probe], batch: Batch) -> tuple[Array, Array]:
        with layers.probed(probes, models.lengths_of(batch.letters) if probes else None):
            return loss_of(predict, params, batch)

    def begin(state: TrainState, batch: Batch) -> Tree:
        probes = layers.probes(predict, state.params, batch.letters) if look else []
        return jax.value_and_grad(probed, (0, 1), has_aux=True)(state.params, probes, batch)

    return begin


def loss_of(predict: Callable[[Tree, Array], Array], params: Tree, batch: Batch) -> tuple[Array, Array]:
    """The loss of a batch, and the predictions."""
    predictions = predict(params, batch.letters)
    with jax.named_scope('loss'):
        return mean_squared_error(predictions, batch.targets), predictions


def mean_squared_error(predictions: Array, targets: Array) -> Array:
    """Mean over the coordinates, then over the examples; [B, E], [B, E] -> []."""
    return jnp.mean(jnp.mean(jnp.square(predictions - targets), axis=-1))


def quality(predictions: Array, targets: Array) -> Record:
    """How good predictions are, and whether they vary; [B, E], [B, E] -> scalars.

    accuracy        share of examples whose largest coordinate agrees: what Keras calls accuracy here
    cosine          mean cosine of prediction and target
    variance_ratio  variance of the predictions over the batch, over that of the targets: 0 for the same
                    output for every input, 1 where both vary alike
    """
    agree = jnp.argmax(predictions, axis=-1) == jnp.argmax(targets, axis=-1)
    dots = jnp.sum(predictions * targets, axis=-1)
    squares = jnp.sum(jnp.square(predictions), axis=-1) * jnp.sum(jnp.square(targets), axis=-1)
    varied = jnp.sum(jnp.var(predictions, axis=0)), jnp.sum(jnp.var(targets, axis=0))
    return {
        'accuracy': jnp.mean(agree.astype(jnp.float32)),
        'cosine': jnp.mean(dots / jnp.sqrt(squares + TINY)),
        'variance_ratio': varied[0] / (varied[1] + TINY),
    }


EVALUATED_AT_ONCE = 256


def evaluate(
    predict: Callable[[Tree, Array], Array], params: Tree, dataset: data.Dataset
) -> Mapping[str, Mapping[str, float]]:
    """What the network knows of each split: words, loss, accuracy, cosine, nearest (share of words whose
    nearest vector among all words is their own) and r2 (1 - squared error over the targets' variance)."""
    predict = jax.jit(predict)
    splits = {'train': dataset.train, 'validation': dataset.validation, 'test': dataset.test}
    return {name: _evaluate(predict, params, dataset, index) for name, index in splits.items() if index.size}


def _evaluate(predict: Callable, params: Tree, dataset: data.Dataset, index: np.ndarray) -> dict[str, Any]:
    targets = dataset.vectors[index]
    predictions = predict_words(predict, params, dataset.letters[:, index])
    on_device = jnp.asarray(predictions), jnp.asarray(targets)
    loss, scores = mean_squared_error(*on_device), quality(*on_device)
    nearest, _ = data.nearest(dataset.vectors, predictions, 1)
    variance = np.mean(np.var(targets, axis=0))
    return {
        'words': int(index.size),
        'loss': float(loss),
        'accuracy': float(scores['accuracy']),
        'cosine': float(scores['cosine']),
        'nearest': float(np.mean(nearest[:, 0] == index)),
        'r2': float(1 - loss / variance) if variance > 0 else float('nan'),
    }


def predict_words(predict: Callable[[Tree, Array], Array], params: Tree, letters: np.ndarray) -> np.ndarray:
    """Vectors of any number of words, in batches of one shape; letters [T, N] -> [N, E]."""
    count = letters.shape[1]
    padded = np.pad(letters, ((0, 0), (0, -count % EVALUATED_AT_ONCE)))
    parts = np.split(padded, padded.shape[1] // EVALUATED_AT_ONCE, axis=1)
    return np.concatenate([np.asarray(predict(params, jnp.asarray(part))) for part in parts])[:count]
