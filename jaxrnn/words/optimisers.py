"""One optax chain from a configuration: clip -> Adam -> learning rate [-> plateau] [-> cap], [watched], [guarded].

And the state of one configuration's chain turned into that of another's.
"""

import re
import reprlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrnn.optim import curvature, transforms
from jaxrnn.types import Array, Tree, UserError
from jaxrnn.words import config


def build(
    options: config.Optimiser, *, epsilon: float, epsilon_hat: bool
) -> optax.GradientTransformationExtraArgs:
    """The optimiser of a configuration. Its update takes `value=loss`, which the plateau schedule and the guard need,
    and `loss_of` and `rate`, as `curvature.watched` has them.

    Args:
        options: of the user.
        epsilon: the preset's, in force unless options.epsilon is set.
        epsilon_hat: which form of Adam, see `transforms.scale_by_adam`.
    """
    if options.curvature_cap and not options.curvature_every:
        raise UserError(
            '--curvature_every: 0 found, steps between measurements expected, as --curvature_cap is set'
        )
    epsilon = options.epsilon or epsilon
    chain = optax.with_extra_args_support(optax.chain(*_parts(options, epsilon, epsilon_hat).values()))
    if options.curvature_every:
        chain = curvature.watched(
            chain, options.curvature_every, cap=options.curvature_cap, b1=options.b1, b2=options.b2, eps=epsilon,
            epsilon_hat=epsilon_hat,
        )  # fmt: skip
    return transforms.guard(chain) if options.guard else chain


def convert(opt_state: Tree, before: config.Optimiser, after: config.Optimiser, params: Tree) -> Tree:
    """The optimiser state of one configuration as one that another can go on from.

    What both have is carried over, Adam's count and moments always: moments set to zero are a kick of up to 6.57
    learning rates, and forget what a spike is. The rest:

        clipping   the running norms of zclip and adagc are kept if both are the same, and else start anew
        amsgrad    the largest v starts as the v there is, and is dropped on leaving
        plateau    scale and best loss are kept; counts of windows or steps start anew where what they count to
                   differs. Another schedule has no use for the scale: the rate is then what that schedule says
        cap        its vectors start at random where there were none, and are good after a few steps
        moments    are rounded where they are kept in fewer bits
        curvature  the direction and what was measured last are kept, or start anew
        guard      its counts are kept, or start at 0. The schedule waits on a skipped step under a guard
                   alone: on leaving it, the skipped steps are added to the schedule's count

    For equal configurations it's the same state. The result shares arrays with `opt_state`; no array is in it
    twice.

    Args:
        opt_state: of the optimiser of `before`.
        before: the configuration that it's of.
        after: the one that it shall be of.
        params: of the network, for their shapes.
    """
    fresh = build(after, epsilon=1.0, epsilon_hat=False).init(params)  # a state doesn't depend on either
    old, new = _named(before, opt_state), _named(after, fresh)
    carried = {
        name: old[name] if type(old.get(name)) is type(start) else start for name, start in new.items()
    }
    carried['adam'] = _adam_as(new['adam'], old['adam'])
    if before.guard and not after.guard:
        carried['rate'] = old['rate']._replace(count=old['rate'].count + opt_state.skipped)
    if 'plateau' in old and 'plateau' in new:
        carried['plateau'] = _plateau_as(new['plateau'], old['plateau'], before, after)
    inner: Any = tuple(carried.values())
    if after.curvature_every:
        inner = _watch(after, fresh)._replace(inner=inner)
        if before.curvature_every:
            inner = _watch(before, opt_state)._replace(inner=inner.inner)
    if not after.guard:
        return inner
    return (opt_state if before.guard else fresh)._replace(inner=inner)


def _watch(options: config.Optimiser, opt_state: Tree) -> curvature.WatchState:
    return opt_state.inner if options.guard else opt_state


def _adam_as(start: Any, old: Any) -> Any:
    """The moments of `old` in the type of `start`."""
    if type(start) is not type(old):
        shared = old._asdict() | {'nu_max': jax.tree.map(jnp.copy, old.nu)}
        old = type(start)(**{name: shared[name] for name in start._fields})
    return jax.tree.map(lambda new, known: known.astype(new.dtype), start, old)


def _plateau_as(start: Any, old: Any, before: config.Optimiser, after: config.Optimiser) -> Any:
    """optax asks whether a count equals its end: one that is beyond a nearer end would never meet it."""
    if before.plateau_window != after.plateau_window:
        old = old._replace(count=start.count, avg_value=start.avg_value)
    if before.plateau_patience != after.plateau_patience:
        old = old._replace(plateau_count=start.plateau_count)
    return old


def _parts(
    options: config.Optimiser, epsilon: float = 1.0, epsilon_hat: bool = False
) -> dict[str, optax.GradientTransformation]:
    """The links of the chain, in order."""
    parts = {
        'clip': _clipping(options),
        'adam': _adam(options, epsilon, epsilon_hat),
        'rate': optax.scale_by_learning_rate(learning_rate(options)),
    }
    if options.schedule == 'plateau':
        parts['plateau'] = _plateau(options)
    if options.spectral_cap:
        parts['cap'] = transforms.spectral_cap(options.spectral_cap)
    return parts


def _named(options: config.Optimiser, opt_state: Tree) -> dict[str, Any]:
    """The states of the chain's links."""
    links = opt_state.inner if options.guard else opt_state
    links = links.inner if options.curvature_every else links
    return dict(zip(_parts(options), links, strict=True))


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
    """The learning rate that the step numbered `step` applies, from the optimiser's state before it; under a
    guard the number is that of the steps taken, which is in the state."""
    states = _named(options, opt_state)
    rate = jnp.asarray(learning_rate(options)(states['rate'].count if options.guard else step), jnp.float32)
    return rate * states['plateau'].scale if options.schedule == 'plateau' else rate


def _plateau(options: config.Optimiser) -> optax.GradientTransformationExtraArgs:
    """Differs from optax's in that a lowered rate takes force with the next step, as in Keras: so the rate
    of a step follows from the state before it; and in that the best loss starts as the largest number, not as an
    infinity, which would count as a state gone bad."""
    optaxs = optax.contrib.reduce_on_plateau(
        factor=options.decay_rate,
        patience=options.plateau_patience,
        accumulation_size=options.plateau_window,
    )

    def update(updates: Any, state: Any, params: Any = None, *, value: Array, **_: Any) -> tuple[Any, Any]:
        _, after = optaxs.update(updates, state, params, value=value)
        return jax.tree.map(lambda u: state.scale * u, updates), after

    def init(params: Any) -> Any:
        state = optaxs.init(params)
        return state._replace(best_value=jnp.asarray(jnp.finfo(state.best_value.dtype).max))

    return optax.GradientTransformationExtraArgs(init, update)


def _boundaries(options: config.Optimiser) -> list[int]:
    parts = options.boundaries.split(',')
    usable = len(parts) <= MOST_BOUNDARIES and all(_STEP.fullmatch(part.strip()) for part in parts)
    boundaries = [int(part) - options.warmup_steps for part in parts] if usable else []
    if not boundaries or boundaries[0] <= 0 or boundaries != sorted(set(boundaries)):
        raise UserError(
            f'--boundaries: {reprlib.repr(options.boundaries)} found, at most {MOST_BOUNDARIES} rising steps after '
            'the warm-up expected, as 1000,2000'
        )
    return boundaries


MOST_BOUNDARIES = 100
"""Each is compiled into the step."""

_STEP = re.compile('[0-9]{1,9}')
"""A number of a step: every whole number of 9 digits fits an int32."""


def clipped(options: config.Optimiser, gradients: Tree, opt_state: Tree, params: Tree) -> Tree:
    """What the clipping hands on to Adam, from the optimiser's state before the step."""
    return _clipping(options).update(gradients, _named(options, opt_state)['clip'], params)[0]


def _clipping(options: config.Optimiser) -> optax.GradientTransformation:
    match options.clip:
        case 'none' | 'spam':  # SPAM needs Adam's v: `_adam`
            return optax.identity()
        case 'global_norm':
            return optax.clip_by_global_norm(options.clip_threshold)
        case 'per_leaf':
            return transforms.clip_by_leaf_norm(options.clip_threshold)
        case 'adaptive':
            return optax.adaptive_grad_clip(options.clip_threshold)
        case 'zclip':
            return transforms.zclip(options.zclip_threshold)
        case 'adagc':
            return transforms.adagc(options.adagc_threshold, options.clip_threshold)
    raise UserError(f'--clip: no clipping {options.clip!r}')


def _adam(options: config.Optimiser, epsilon: float, epsilon_hat: bool) -> optax.GradientTransformation:
    corrected = options.bias_correction
    adam = transforms.scale_by_adam(
        options.b1,
        options.b2,
        epsilon,
        epsilon_hat=epsilon_hat,
        second_moment=options.second_moment,
        bias_correction=corrected,
        dtype=None if options.moment_dtype == 'float32' else options.moment_dtype,
    )
    if options.update_clip:
        adam = transforms.clip_update_rms(
            adam, options.b2, epsilon, options.update_clip, bias_correction=corrected
        )
    if options.clip == 'spam':
        adam = transforms.clip_spikes(adam, options.spam_threshold)
    return adam
