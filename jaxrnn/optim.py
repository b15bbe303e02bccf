"""One optax chain from a configuration: clip -> Adam -> learning rate [-> plateau]."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrnn import config
from jaxrnn.types import Array, UserError


def build(
    options: config.Optimiser, *, epsilon: float, epsilon_hat: bool
) -> optax.GradientTransformationExtraArgs:
    """The optimiser of a configuration. Its update takes `value=loss`, which the plateau schedule needs.

    Args:
        options: of the user.
        epsilon: the preset's, in force unless options.epsilon is set.
        epsilon_hat: which form of Adam, see `scale_by_adam`.
    """
    parts = [
        clipping(options),
        scale_by_adam(options.b1, options.b2, options.epsilon or epsilon, epsilon_hat=epsilon_hat),
        optax.scale_by_learning_rate(learning_rate(options)),
    ]
    if options.schedule == 'plateau':
        parts.append(_plateau(options))
    return optax.with_extra_args_support(optax.chain(*parts))


def scale_by_adam(b1: float, b2: float, eps: float, *, epsilon_hat: bool) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015).

        m_t = b1 m_tm1 + (1 - b1) g        v_t = b2 v_tm1 + (1 - b2) g^2

    and then algorithm 1, or with `epsilon_hat` the order of computation at the end of section 2, as
    TensorFlow and Keras have it:

        u_t = m_t / (1 - b1^t) / (sqrt(v_t / (1 - b2^t)) + eps)
        u_t = sqrt(1 - b2^t) / (1 - b1^t) * m_t / (sqrt(v_t) + eps)

    The second is the first with an epsilon of eps / sqrt(1 - b2^t): 3.2e-6 at the first step for eps 1e-7.
    Differs from optax.scale_by_adam in: 1. `epsilon_hat`. 2. 1 - b^t keeps its digits, where a power and a
    difference in float32 leave 1 - 0.999^t with a relative error of 1e-5 and more.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        # Two trees of zeros, not one twice: a buffer can be donated only once.
        m, v = optax.tree.zeros_like(params), optax.tree.zeros_like(params)
        return optax.ScaleByAdamState(count=jnp.zeros([], jnp.int32), mu=m, nu=v)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        del params
        t = optax.safe_increment(state.count)
        m = jax.tree.map(lambda m, g: m + (g - m) * (1 - b1), state.mu, grads)
        v = jax.tree.map(lambda v, g: v + (jnp.square(g) - v) * (1 - b2), state.nu, grads)
        root = jnp.sqrt(one_minus_power(b2, t))
        correction = root / one_minus_power(b1, t)
        epsilon = eps if epsilon_hat else eps * root
        updates = jax.tree.map(lambda m, v: m * correction / (jnp.sqrt(v) + epsilon), m, v)
        return updates, optax.ScaleByAdamState(count=t, mu=m, nu=v)

    return optax.GradientTransformation(init, update)


def one_minus_power(b: float, t: Array) -> Array:
    """1 - b^t for b in [0, 1), good to a few roundings: the logarithm is taken in float64."""
    return -jnp.expm1(t * math.log(b)) if b else jnp.ones_like(t, float)


def learning_rate(options: config.Optimiser) -> optax.Schedule:
    """Step -> learning rate; the plateau's factor comes on top."""
    peak = options.learning_rate
    match options.schedule:
        case 'constant' | 'plateau':
            after = optax.constant_schedule(peak)
        case 'warmup_cosine':
            steps = options.decay_steps - options.warmup_steps
            if steps < 1:
                raise UserError(
                    f'--decay_steps: {options.decay_steps} found, more than --warmup_steps '
                    f'{options.warmup_steps} expected'
                )
            after = optax.cosine_decay_schedule(peak, steps, alpha=options.end_learning_rate / peak)
        case 'exponential':
            after = optax.exponential_decay(
                peak, options.decay_steps, options.decay_rate, end_value=options.end_learning_rate
            )
        case 'piecewise':
            factors = dict.fromkeys(_boundaries(options), options.decay_rate)
            after = optax.piecewise_constant_schedule(peak, factors)
        case other:
            raise UserError(f'--schedule: no schedule {other!r}')
    if not options.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, peak, options.warmup_steps)
    return optax.join_schedules([warmup, after], [options.warmup_steps])


def current_learning_rate(options: config.Optimiser, step: Array, opt_state: Any) -> Array:
    """The learning rate that the step numbered `step` applies, from the optimiser's state before it."""
    rate = jnp.asarray(learning_rate(options)(step), jnp.float32)
    return rate * opt_state[-1].scale if options.schedule == 'plateau' else rate


def _plateau(options: config.Optimiser) -> optax.GradientTransformationExtraArgs:
    """Differs from optax's in that a lowered rate takes force with the next step, as in Keras: so the rate
    of a step follows from the state before it."""
    optaxs = optax.contrib.reduce_on_plateau(
        factor=options.decay_rate,
        patience=options.plateau_patience,
        accumulation_size=options.plateau_window,
    )

    def update(updates: Any, state: Any, params: Any = None, *, value: Array, **_: Any) -> tuple[Any, Any]:
        _, after = optaxs.update(updates, state, params, value=value)
        return jax.tree.map(lambda u: state.scale * u, updates), after

    return optax.GradientTransformationExtraArgs(optaxs.init, update)


def _boundaries(options: config.Optimiser) -> list[int]:
    try:
        boundaries = [int(part) - options.warmup_steps for part in options.boundaries.split(',')]
    except ValueError:
        boundaries = []
    if not boundaries or boundaries[0] <= 0 or boundaries != sorted(set(boundaries)):
        raise UserError(
            f'--boundaries: {options.boundaries!r} found, rising steps after the warm-up expected, as 1000,2000'
        )
    return boundaries


def clipping(options: config.Optimiser) -> optax.GradientTransformation:
    """What gradients go through before Adam; stateless."""
    match options.clip:
        case 'none':
            return optax.identity()
        case 'global_norm':
            return optax.clip_by_global_norm(options.clip_threshold)
        case 'per_leaf':
            return clip_by_leaf_norm(options.clip_threshold)
        case 'adaptive':
            return optax.adaptive_grad_clip(options.clip_threshold)
    raise UserError(f'--clip: no clipping {options.clip!r}')


def clip_by_leaf_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales each leaf whose norm exceeds `max_norm` down to it, as Keras 3's `clipnorm`.

    Differs from optax.clip_by_global_norm in that one leaf's NaN stays in that leaf.
    """

    def clip(g: Array) -> Array:
        norm = jnp.sqrt(jnp.sum(jnp.square(g)))
        return g * (max_norm / jnp.maximum(norm, max_norm))

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(clip, grads), state

    return optax.GradientTransformation(optax.init_empty_state, update)
