"""Curvature as Adam feels it: how near a step is to where Adam turns unstable, and the ε which rules that out.

Adam is stable on a quadratic of Hessian H while λ₁(P⁻¹H) < (2+2b1) / ((1-b1) η), 38/η by default, where
P = (1-b1^t) diag(√v̂ + ε) (Cohen et al. 2022, 2207.14484). As v decays P does, whatever the Hessian does.

`loss_of` is a function of the parameters alone: close it over the batch. All of it costs products of the Hessian and
a vector, 2 to 2.5 gradients each, and works under jit. `watched` measures while training, every so many steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrnn.optim import transforms
from jaxrnn.types import Array, Record, Tree

LossOf = Callable[[Tree], Array]
"""Parameters -> loss [], of one batch."""


class Sharpness(NamedTuple):
    """An estimate of the largest eigenvalue, from below."""

    eigenvalue: Array  # []
    vector: Tree  # of norm 1; where the next call starts
    residual: Array  # ‖A x - λ x‖: an eigenvalue lies within it of λ


def preconditioner(
    state: optax.ScaleByAdamState,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    epsilon_hat: bool = False,
) -> Tree:
    """The diagonal of P = (1-b1^t) (√v̂ + ε), by which Adam's momentum is divided.

    Args:
        state: Adam's, at a count of 1 or more.
        eps: and `epsilon_hat`: as `transforms.scale_by_adam` has them.
    """
    mean, root = (
        transforms.one_minus_power(b1, state.count),
        jnp.sqrt(transforms.one_minus_power(b2, state.count)),
    )
    epsilon = eps / root if epsilon_hat else eps
    return jax.tree.map(lambda v: (mean * (jnp.sqrt(v) / root + epsilon)).astype(v.dtype), state.nu)


def stable_below(learning_rate: Any, b1: float = 0.9) -> Array:
    """The largest λ₁(P⁻¹H) at which Adam is stable: (2+2b1) / ((1-b1) η), 38/η by default."""
    return (2 + 2 * b1) / ((1 - b1) * jnp.asarray(learning_rate))


def hessian_vector(loss_of: LossOf, params: Tree, vector: Tree) -> Tree:
    """H v, forward over reverse."""
    return jax.jvp(jax.grad(loss_of), (params,), (vector,))[1]


def update_curvature(loss_of: LossOf, params: Tree, scale: Tree, direction: Tree) -> Array:
    """κ = dᵀHd / dᵀPd, the curvature along a direction as Adam feels it; never more than λ₁(P⁻¹H). 0 for d = 0.

    κ over `stable_below` warns from .8 on, and a spike is due above 1 (Bai et al. 2026, 2506.04805). One product.

    Args:
        scale: P, of `preconditioner`.
        direction: d: P⁻¹ times the gradient, or Adam's update.
    """
    curved = _dot(direction, hessian_vector(loss_of, params, direction))
    length = _dot(direction, jax.tree.map(jnp.multiply, scale, direction))
    return jnp.where(length == 0, 0, curved / jnp.where(length == 0, 1, length))


def preconditioned_sharpness(
    loss_of: LossOf, params: Tree, scale: Tree, start: Tree, *, iterations: int = 1
) -> Sharpness:
    """λ₁(P⁻¹H), as that of P^(-1/2) H P^(-1/2); its ratio to `stable_below` warns from 1 on.

    The start is improved as `sharpness` says. Steps change H and P little: started from the last vector, one
    iteration a step follows the eigenvalue, at 2 products.
    """
    root = jax.tree.map(lambda p: jax.lax.rsqrt(p), scale)

    def product(x: Tree) -> Tree:
        return _times(root, hessian_vector(loss_of, params, _times(root, x)))

    return _climb(product, start, iterations)


def sharpness(loss_of: LossOf, params: Tree, start: Tree, *, iterations: int = 20) -> Sharpness:
    """λmax(H), from below.

    From a start x, any tree that isn't zero or at right angles to the eigenvector: x becomes the best vector of the
    plane of x and its residual, which is found in closed form. Unlike the power method, which has the eigenvalue of
    largest size, be it negative, this climbs to the most positive one. iterations + 1 products.
    """
    return _climb(lambda x: hessian_vector(loss_of, params, x), start, iterations)


def epsilon_for(sharpness: Any, learning_rate: Any, b1: float = 0.9) -> Array:
    """The least ε with which Adam is stable on a quadratic of that λmax(H), however small v gets: ηλ/38 by default.

    As P ≽ ε once b1^t is negligible, λ₁(P⁻¹H) <= λ/ε. Of ε as algorithm 1 has it, and of ε-hat once b2^t is.
    """
    return jnp.asarray(sharpness) / stable_below(learning_rate, b1)


def random_start(params: Tree, seed: int = 0) -> Tree:
    """A vector of normal numbers, which is at right angles to nothing in particular."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        structure,
        [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)],
    )


class WatchState(NamedTuple):
    """What was measured last, as a share of where Adam turns unstable, and where the next measurement starts."""

    inner: Tree
    steps: Array  # int32, so far
    vector: Tree  # of norm 1: the sharpest direction, in the metric of the square root of P
    sharpness: Array  # λ₁(P⁻¹H) over `stable_below`
    along: Array  # κ of the update, over `stable_below`


def watched(
    inner: optax.GradientTransformationExtraArgs,
    every: int,
    *,
    cap: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    epsilon_hat: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """An optimiser with Adam in it, whose curvature is measured in every `every`-th step, the first among them: three
    products of the Hessian and a vector then, and two numbers in the state. Its update takes `loss_of`, of the step's
    batch, and `rate`, the step's learning rate.

    With a cap, the updates are multiplied by cap / along wherever that is below 1: so the curvature along the update,
    as Adam feels it at the rate that is left, never exceeds the cap, .8 of where a spike is due (Bai et al. 2026,
    2506.04805; the cap is ours). Between measurements the last one counts. What is measured isn't finite counts as 0.

    Args:
        inner: its state holds one of Adam's.
        every: steps between measurements.
        cap: of the curvature along the update; 0 to measure alone.
        b1, b2, eps, epsilon_hat: as `preconditioner` has them.
    """

    # long: a transformation is two closures over its settings, and half of this says what it measures.
    def init(params: Tree) -> WatchState:
        start = random_start(params)
        start = _over(start, _norm(start))
        # Two zeros, since a step consumes its state: no array may stand in it twice.
        return WatchState(inner.init(params), jnp.int32(0), start, jnp.float32(0), jnp.float32(0))

    def update(
        grads: Tree,
        state: WatchState,
        params: Tree = None,
        *,
        loss_of: LossOf,
        rate: Array,
        **extra: Any,
    ) -> tuple[Tree, WatchState]:
        updates, after = inner.update(grads, state.inner, params, **extra)
        adam = transforms.adam_state(after)

        def measure() -> tuple[Tree, Array, Array]:
            scale = preconditioner(adam, b1=b1, b2=b2, eps=eps, epsilon_hat=epsilon_hat)
            stable = stable_below(rate, b1)
            found = preconditioned_sharpness(loss_of, params, scale, state.vector)
            along = update_curvature(loss_of, params, scale, updates)
            finite = jnp.isfinite(found.eigenvalue) & jnp.isfinite(found.residual)
            vector = jax.tree.map(lambda new, old: jnp.where(finite, new, old), found.vector, state.vector)
            return vector, _finite(found.eigenvalue / stable), _finite(along / stable)

        def keep() -> tuple[Tree, Array, Array]:
            return state.vector, state.sharpness, state.along

        vector, sharpness, along = jax.lax.cond(state.steps % every == 0, measure, keep)
        if cap:
            factor = jnp.where(along > cap, cap / jnp.where(along > cap, along, 1), 1)
            updates = jax.tree.map(lambda u: (factor * u).astype(u.dtype), updates)
        return updates, WatchState(after, state.steps + 1, vector, sharpness, along)

    return optax.GradientTransformationExtraArgs(init, update)


def measured(opt_state: Tree) -> Record:
    """What a record has of a watched optimiser's state; nothing for another's."""
    found = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=_is_watch) if _is_watch(leaf)]
    return (
        {'preconditioned_sharpness': found[0].sharpness, 'update_curvature': found[0].along} if found else {}
    )


def _is_watch(node: Any) -> bool:
    return isinstance(node, WatchState)


def _finite(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x), x, 0).astype(jnp.float32)


def _climb(product: Callable[[Tree], Tree], start: Tree, iterations: int) -> Sharpness:
    x = _over(start, _norm(start))
    ax = product(x)

    def improve(_: Any, xs: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
        x, ax = xs
        value, rest, size = _residual(x, ax)
        w = _over(rest, size)
        aw = product(w)
        # The plane's matrix [[value, size], [size, beside]]: its upper eigenvector is (cos, sin).
        angle = jnp.arctan2(2 * size, value - _dot(w, aw)) / 2
        mixed = [
            jax.tree.map(lambda a, b: jnp.cos(angle) * a + jnp.sin(angle) * b, *pair)
            for pair in ((x, w), (ax, aw))
        ]
        length = _norm(mixed[0])
        return _over(mixed[0], length), _over(mixed[1], length)

    x, ax = jax.lax.fori_loop(0, iterations, improve, (x, ax))
    value, _, size = _residual(x, ax)
    return Sharpness(value, x, size)


def _residual(x: Tree, ax: Tree) -> tuple[Array, Tree, Array]:
    """xᵀAx, Ax less its share along x, and the norm of that; x has norm 1."""
    value = _dot(x, ax)
    rest = jax.tree.map(lambda a, b: b - value * a, x, ax)
    return value, rest, _norm(rest)


def _dot(a: Tree, b: Tree) -> Array:
    return optax.tree.vdot(a, b)


def _norm(a: Tree) -> Array:
    return jnp.sqrt(_dot(a, a))


def _times(a: Tree, b: Tree) -> Tree:
    return jax.tree.map(jnp.multiply, a, b)


def _over(a: Tree, length: Array) -> Tree:
    """a / length, and zeros where that is 0."""
    return jax.tree.map(lambda leaf: jnp.where(length == 0, 0, leaf / jnp.where(length == 0, 1, length)), a)
