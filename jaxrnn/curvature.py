"""Curvature as Adam feels it: how near a step is to where Adam turns unstable, and the ε which rules that out.

Adam is stable on a quadratic of Hessian H while λ₁(P⁻¹H) < (2+2b1) / ((1-b1) η), 38/η by default, where
P = (1-b1^t) diag(√v̂ + ε) (Cohen et al. 2022, 2207.14484). As v decays P does, whatever the Hessian does.

`loss_of` is a function of the parameters alone: close it over the batch. All of it costs products of the Hessian and
a vector, 2 to 2.5 gradients each, and works under jit.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrnn import transforms
from jaxrnn.types import Array, Tree

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
