"""Gradient transformations of our own: what optax lacks, or means otherwise.

A state keeps its structure and types from `init` on, as a carry of lax.scan must. A number that isn't finite is
never averaged into a statistic and never scales its neighbours: unless said otherwise, it passes, to be found by
whoever looks (or by `guard`), and what is finite beside it is treated as ever.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrnn import tree
from jaxrnn.types import Array, Record, Tree, UserError

SMALLEST_EPSILON = 1e-30
"""What a smaller epsilon counts as: in float32 it would be 0, and a gradient of 0 divided by it a NaN."""


def scale_by_adam(
    b1: float,
    b2: float,
    eps: float,
    *,
    epsilon_hat: bool,
    second_moment: str = 'adam',
    bias_correction: bool = True,
    dtype: Any = None,
) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015).

        m_t = b1 m_tm1 + (1 - b1) g        v_t = b2 v_tm1 + (1 - b2) g^2

    and then algorithm 1, or with `epsilon_hat` the order of computation at the end of section 2, as
    TensorFlow and Keras have it:

        u_t = m_t / (1 - b1^t) / (sqrt(v_t / (1 - b2^t)) + eps)
        u_t = sqrt(1 - b2^t) / (1 - b1^t) * m_t / (sqrt(v_t) + eps)

    The second is the first with an epsilon of eps / sqrt(1 - b2^t): 3.2e-6 at the first step for eps 1e-7.
    Differs from optax.scale_by_adam in: 1. `epsilon_hat`. 2. 1 - b^t keeps its digits, where a power and a
    difference in float32 leave 1 - 0.999^t with a relative error of 1e-5 and more.

    Args:
        second_moment: the rule of v, one of

            adam      as above
            amsgrad   the largest v_t so far takes v_t's place in u_t (Reddi et al. 2018, algorithm 2): it never
                      falls. The largest of v, then the correction 1 - b2^t, as Keras and PyTorch have it; optax
                      takes the largest of v_t / (1 - b2^t), in which the first step's g^2 stays for ever, or
                      with bias_correction_nu=False leaves the correction out.
            yogi      v_t = v_tm1 - (1 - b2) sign(v_tm1 - g^2) g^2 (Zaheer et al. 2018, algorithm 2): it falls
                      by no more than a share of g^2, not of itself. optax.scale_by_yogi with
                      initial_accumulator_value=0, where its default starts m and v at 1e-6.
        bias_correction: without it both 1 - b^t are 1: the first steps are up to 6.57 times as long.
        dtype: that m and v are kept as between steps, rounded to nearest; computed with as the gradients are. With
            b2 = .999 a v in bfloat16 rises only where g^2 is 3 or more times as large, and never falls.
    """
    # long: half of it are equations, of three rules and two places for epsilon.
    eps = max(eps, SMALLEST_EPSILON)
    rule = {'adam': _mean_square, 'amsgrad': _mean_square, 'yogi': _yogi_square}[second_moment]

    def init(params: Tree) -> Any:
        # Two trees of zeros, not one twice: a buffer can be donated only once.
        m, v = optax.tree.zeros_like(params, dtype=dtype), optax.tree.zeros_like(params, dtype=dtype)
        state = optax.ScaleByAdamState(count=jnp.zeros([], jnp.int32), mu=m, nu=v)
        if second_moment != 'amsgrad':
            return state
        return optax.ScaleByAmsgradState(*state, nu_max=optax.tree.zeros_like(params, dtype=dtype))

    def update(grads: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        del params
        t = optax.safe_increment(state.count)
        # bfloat16 and float32 meet as float32.
        m = jax.tree.map(lambda m, g: m + (g - m) * (1 - b1), state.mu, grads)
        v = jax.tree.map(lambda v, g: rule(v, g, b2), state.nu, grads)
        root = jnp.sqrt(one_minus_power(b2, t)) if bias_correction else 1
        correction = root / one_minus_power(b1, t) if bias_correction else 1
        epsilon = eps if epsilon_hat else eps * root
        after = state._replace(count=t, mu=m, nu=v)
        if second_moment == 'amsgrad':
            after = after._replace(nu_max=jax.tree.map(jnp.maximum, state.nu_max, v))
        updates = jax.tree.map(lambda m, v: m * correction / (jnp.sqrt(v) + epsilon), m, _divisor(after))
        return updates, jax.tree.map(lambda new, old: new.astype(old.dtype), after, state)

    return optax.GradientTransformation(init, update)


def _mean_square(v: Array, g: Array, b2: float) -> Array:
    return v + (jnp.square(g) - v) * (1 - b2)


def _yogi_square(v: Array, g: Array, b2: float) -> Array:
    return v - jnp.sign(v - jnp.square(g)) * jnp.square(g) * (1 - b2)


def _divisor(state: Any) -> Tree:
    """The v whose root an Adam's update is divided by."""
    return getattr(state, 'nu_max', state.nu)


def one_minus_power(b: float, t: Array) -> Array:
    """1 - b^t for b in [0, 1), good to a few roundings: the logarithm is taken in float64."""
    return -jnp.expm1(t * math.log(b)) if b else jnp.ones_like(t, float)


def adam_state(opt_state: Tree) -> optax.ScaleByAdamState:
    """Adam's moments within an optimiser's state, wherever in its chain; of AMSGrad the largest v, by which it divides.
    Raises UserError unless there is one."""
    found = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=_is_adam) if _is_adam(leaf)]
    if len(found) != 1:
        raise UserError(f'optimiser: {len(found)} states of optax.scale_by_adam found, one expected')
    (state,) = found
    if isinstance(state, optax.ScaleByAmsgradState):
        return optax.ScaleByAdamState(state.count, state.mu, state.nu_max)
    return state


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState | optax.ScaleByAmsgradState)


def clip_update_rms(
    adam: optax.GradientTransformation, b2: float, eps: float, largest: float, *, bias_correction: bool = True
) -> optax.GradientTransformation:
    """Adam whose step is shortened, leaf by leaf, where v underestimates g^2 (StableAdamW: Wortsman et al. 2023,
    algorithm 2, with `largest` = 1).

        RMS_t = sqrt(mean(g^2 / max(v_t / (1 - b2^t), eps^2)))        u_t / max(1, RMS_t / largest)

    RMS_t is about 1 in the long run and never more than 1 / sqrt(1 - b2). The state is Adam's; with amsgrad
    v_t is the largest so far. A leaf whose RMS_t isn't finite passes as it is.
    """
    eps = max(eps, SMALLEST_EPSILON)

    def update(grads: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        updates, state = adam.update(grads, state, params)
        root = jnp.sqrt(one_minus_power(b2, state.count)) if bias_correction else 1

        def clip(u: Array, g: Array, v: Array) -> Array:
            ratio = g / jnp.maximum(jnp.sqrt(v) / root, eps)  # roots first: eps^2 can underflow
            rms = tree.norm(ratio) / math.sqrt(max(g.size, 1))
            return _scaled(u, jnp.where(jnp.isfinite(rms), largest / jnp.maximum(rms, largest), 1))

        return jax.tree.map(clip, updates, grads, _divisor(state)), state

    return optax.GradientTransformation(adam.init, update)


SPAM_WARMUP = 20
"""Steps before SPAM clips, `grad_accu_steps` of the authors' code: v knows nothing yet."""


def clip_spikes(adam: optax.GradientTransformation, threshold: float) -> optax.GradientTransformation:
    """Adam, each number of whose gradient is compared with its own v (SPAM: Huang et al. 2025, equation 2).

        g = sign(g) sqrt(threshold v_tm1)        where g^2 > threshold v_tm1

    The state is Adam's. Differs from the authors' code in: 1. No moment reset: it leaves the count of the bias
    correction as it is, whereby constant gradients take steps up to 6.57 times the learning rate (1.00 with the
    count restarted). 2. A number whose v is 0 is left alone, instead of held at 0 for ever. 3. So is an infinite
    one, instead of passed off as finite.
    """

    def update(grads: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        warm = state.count >= SPAM_WARMUP

        def clip(g: Array, v: Array) -> Array:
            largest = jnp.sqrt(threshold * v)
            spike = warm & (v > 0) & jnp.isfinite(g) & (jnp.abs(g) > largest)
            return jnp.where(spike, jnp.copysign(largest, g), g)

        return adam.update(jax.tree.map(clip, grads, state.nu), state, params)

    return optax.GradientTransformation(adam.init, update)


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


ZCLIP_DECAY, ZCLIP_WARMUP = 0.97, 25
"""alpha, and steps of which only the statistics are taken (Kumar et al. 2025, section 4)."""


class ZClipState(NamedTuple):
    """The norms that gradients had after clipping."""

    seen: Array  # int32, norms so far; the name is in checkpoints
    mean: Array  # float32
    variance: Array  # float32


def zclip(threshold: float) -> optax.GradientTransformation:
    """Clips the norm of all gradients against its own past (ZClip: Kumar et al. 2025, algorithm 1).

        z = (norm - mean) / deviation        where z > threshold, norm becomes mean + threshold^2 deviation / z

    Mean and variance are those of the first 25 norms, and from then on decay with alpha = 0.97, the variance
    around the new mean; the norm that enters them is the clipped one. Differs from the authors' code in: 1. There
    is no 1e-6 beside the deviation nor the norm, and no largest norm: it does the same for gradients of any
    scale, as Adam does. 2. Norms that don't vary at all (as those of no gradient) clip nothing. 3. A norm that
    isn't finite passes with its gradients, and leaves the statistics alone.
    """

    def init(params: Tree) -> ZClipState:
        del params
        return ZClipState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32), jnp.zeros([], jnp.float32))

    def update(grads: Tree, state: ZClipState, params: Tree = None) -> tuple[Tree, ZClipState]:
        del params
        norm = tree.norm(grads)
        seen, mean, variance = state
        warm, finite, excess = seen >= ZCLIP_WARMUP, jnp.isfinite(norm), norm - mean
        spike = warm & finite & (variance > 0) & (excess > threshold * jnp.sqrt(variance))
        limit = mean + threshold**2 * variance / jnp.where(spike, excess, 1)
        factor = jnp.where(spike, limit / jnp.where(spike, norm, 1), 1)

        weight = jnp.where(warm, 1 - ZCLIP_DECAY, jnp.float32(1) / (1 + seen))
        change = jnp.where(spike, limit, norm) - mean
        square = jnp.where(warm, jnp.square((1 - weight) * change), (1 - weight) * jnp.square(change))
        after = ZClipState(
            optax.safe_increment(seen), mean + weight * change, variance + weight * (square - variance)
        )
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
        return jax.tree.map(lambda g: _scaled(g, factor), grads), after

    return optax.GradientTransformation(init, update)


ADAGC_DECAY, ADAGC_WARMUP = 0.98, 100
"""beta, and steps in which the norm of all gradients is clipped (Wang et al. 2025, section 4)."""


class AdaGCState(NamedTuple):
    """What each leaf's norm has been."""

    steps: Array  # int32, done
    norms: Tree  # float32 [] a leaf: gamma, the mean of its clipped norms; 0 before the first


def adagc(threshold: float, max_norm: float) -> optax.GradientTransformation:
    """Clips the norm of each leaf against its own past (AdaGC: Wang et al. 2025, algorithm 1).

        h = min(threshold gamma_tm1 / norm(g), 1)        gamma_t = beta gamma_tm1 + (1 - beta) norm(h g)

    In the first 100 steps h = min(max_norm / norm of all, 1) and gamma is the smallest norm(h g) so far. Differs
    from the paper in: 1. A norm of 0 doesn't enter gamma, which would hold the leaf at 0 for ever. 2. A leaf
    whose norm isn't finite passes and leaves gamma alone; in the first 100 steps it lets all others pass, too.
    """

    def init(params: Tree) -> AdaGCState:
        return AdaGCState(
            jnp.zeros([], jnp.int32), jax.tree.map(lambda _: jnp.zeros([], jnp.float32), params)
        )

    def update(grads: Tree, state: AdaGCState, params: Tree = None) -> tuple[Tree, AdaGCState]:
        del params
        warm, total = state.steps >= ADAGC_WARMUP, tree.norm(grads)
        of_all = jnp.where(jnp.isfinite(total), max_norm / jnp.maximum(total, max_norm), 1)

        def factor(norm: Array, gamma: Array) -> Array:
            known = (gamma > 0) & jnp.isfinite(norm)
            limit = jnp.where(known, threshold * gamma, 1)
            return jnp.where(warm, jnp.where(known, limit / jnp.maximum(norm, limit), 1), of_all)

        def average(gamma: Array, clipped: Array) -> Array:
            later = jnp.where(
                warm, gamma + (clipped - gamma) * (1 - ADAGC_DECAY), jnp.minimum(gamma, clipped)
            )
            new = jnp.where(gamma > 0, later, clipped)
            return jnp.where(jnp.isfinite(clipped) & (clipped > 0), new, gamma)

        norms = jax.tree.map(tree.norm, grads)
        factors = jax.tree.map(factor, norms, state.norms)
        clipped = jax.tree.map(jnp.multiply, factors, norms)
        after = AdaGCState(optax.safe_increment(state.steps), jax.tree.map(average, state.norms, clipped))
        return jax.tree.map(_scaled, grads, factors), after

    return optax.GradientTransformation(init, update)


POWER_ITERATIONS = 4
"""Of each matrix and step; the vectors of the step before are the start."""
SMALLEST_NORM = 1e-3
"""What a smaller norm of a weight counts as, so that one of zeros can leave them: Brock et al. 2021, section 4.1."""


class SpectralCapState(NamedTuple):
    """Leading right singular vectors, one of each leaf of rank 2."""

    updates: tuple[Array, ...]  # float32 [columns], of its update
    weights: tuple[Array, ...]  # float32 [columns], of itself


def spectral_cap(ratio: float) -> optax.GradientTransformation:
    """Scales the update of a matrix W so that its spectral norm is at most ratio max(norm(W), 1e-3).

    It comes after the learning rate. Both norms are estimates by power iteration: never above the true ones, so
    the cap of W is never too high, and that of the update is exceeded by what the estimate lacks: of noise under
    Adam's b1 = 0.9, the hardest there is, 1 % in the median and 23 % at worst. Leaves of other ranks pass,
    as does a matrix whose norms aren't finite.
    """

    def init(params: Tree) -> SpectralCapState:
        def start() -> tuple[Array, ...]:
            shapes = [leaf.shape for leaf in jax.tree.leaves(params) if _is_matrix(leaf)]
            return tuple(_unit(jax.random.normal(jax.random.key(n), s[1:]))[0] for n, s in enumerate(shapes))

        return SpectralCapState(start(), start())

    def update(updates: Tree, state: SpectralCapState, params: Tree = None) -> tuple[Tree, SpectralCapState]:
        leaves, structure = jax.tree.flatten(updates)
        places = [place for place, leaf in enumerate(leaves) if _is_matrix(leaf)]
        weights = jax.tree.leaves(params)
        of_updates, of_weights = [], []
        for place, *vectors in zip(places, *state, strict=True):
            (found, v), (held, w) = map(_spectral_norm, (leaves[place], weights[place]), vectors)
            limit = ratio * jnp.maximum(held, SMALLEST_NORM)
            known = jnp.isfinite(found) & jnp.isfinite(held)
            leaves[place] = _scaled(leaves[place], jnp.where(known, limit / jnp.maximum(found, limit), 1))
            of_updates.append(v)
            of_weights.append(w)
        return jax.tree.unflatten(structure, leaves), SpectralCapState(tuple(of_updates), tuple(of_weights))

    return optax.GradientTransformation(init, update)


def _is_matrix(leaf: Array) -> bool:
    return leaf.ndim == 2 and leaf.size > 0


def _spectral_norm(matrix: Array, start: Array) -> tuple[Array, Array]:
    """From below, the largest singular value, and its right vector; [rows, columns], [columns] -> [], [columns]."""
    vector = start
    for _ in range(POWER_ITERATIONS):
        left, _ = _unit(jnp.dot(matrix, vector, precision='highest'))
        vector, size = _unit(jnp.dot(left, matrix, precision='highest'))
    return size, jnp.where(jnp.isfinite(size) & (size > 0), vector, start)


def _unit(x: Array) -> tuple[Array, Array]:
    """A vector at length 1, and its length; no square over- or underflows. Zeros stay zeros."""
    largest = jnp.max(jnp.abs(x))
    x = x / jnp.where(largest > 0, largest, 1)
    length = tree.norm(x)
    return x / jnp.where(length > 0, length, 1), largest * length


def _scaled(x: Array, factor: Array) -> Array:
    return x * factor.astype(x.dtype)


class GuardState(NamedTuple):
    """An optimiser's state, and what was kept from it."""

    inner: Tree
    skipped: Array  # int32, steps skipped in all
    in_a_row: Array  # int32, how many of them since the last step taken


def guard(inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """Skips a step that isn't finite: its updates are -0, which alone changes no bit of what it's added to, and
    the state of `inner` stays what it was. It belongs around everything else.

    A step is skipped where `value` (the loss), a gradient or an update isn't finite, or where a number of the
    state would cease to be: a square that overflows leaves the update finite, and the state spoilt. Differs from
    optax.apply_if_finite, which looks at the gradients alone, in all but these, and in that it never gives in.
    """

    def init(params: Tree) -> GuardState:
        return GuardState(inner.init(params), jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32))

    def update(
        grads: Tree, state: GuardState, params: Tree = None, *, value: Array, **extra: Any
    ) -> tuple[Tree, GuardState]:
        updates, after = inner.update(grads, state.inner, params, value=value, **extra)
        taken = tree.all_finite((value, grads, updates)) & _stays_finite(state.inner, after)
        return jax.tree.map(lambda u: jnp.where(taken, u, -0.0), updates), GuardState(
            jax.tree.map(lambda new, old: jnp.where(taken, new, old), after, state.inner),
            jnp.where(taken, state.skipped, optax.safe_increment(state.skipped)),
            jnp.where(taken, 0, optax.safe_increment(state.in_a_row)),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def skips(opt_state: Tree) -> Record:
    """What a record has of a guarded optimiser's state; nothing for another's."""
    if not isinstance(opt_state, GuardState):
        return {}
    return {'skipped': opt_state.skipped, 'skipped_in_a_row': opt_state.in_a_row}


def _stays_finite(before: Tree, after: Tree) -> Array:
    """Whether no number that was finite has ceased to be: some begin as infinity, such as a smallest loss."""
    spoilt = jax.tree.map(lambda old, new: jnp.any(jnp.isfinite(old) & ~jnp.isfinite(new)), before, after)
    return ~jnp.any(jnp.array(jax.tree.leaves(spoilt)))
