"""Optimisers as their papers have them: float64 NumPy, one loop over steps, names as in the equations."""

from collections.abc import Callable

import numpy as np

Tree = dict[str, np.ndarray]


def norm(x: np.ndarray) -> float:
    return np.sqrt(np.sum(np.square(x)))


def norm_of_all(g: Tree) -> float:
    return np.sqrt(sum(norm(leaf) ** 2 for leaf in g.values()))


def to_norm(x: np.ndarray, largest: float) -> np.ndarray:
    return x * largest / norm(x) if norm(x) > largest else x


def clip_global_norm(g: Tree, threshold: float) -> Tree:
    total = norm_of_all(g)
    return {name: leaf * threshold / total if total > threshold else leaf for name, leaf in g.items()}


def clip_per_leaf(g: Tree, threshold: float) -> Tree:
    return {name: to_norm(leaf, threshold) for name, leaf in g.items()}


def clip_adaptive(g: Tree, params: Tree, threshold: float) -> Tree:
    """Brock et al. 2021, equation 3: by output unit, which is a column of a kernel; a bias is one unit."""
    units = [
        to_norm(u, threshold * max(norm(w), 1e-3))
        for u, w in zip(g['kernel'].T, params['kernel'].T, strict=True)
    ]
    bias = to_norm(g['bias'], threshold * max(norm(params['bias']), 1e-3))
    return {'bias': bias, 'kernel': np.stack(units, axis=1)}


def zclip(gs: list[Tree], z_thres: float, *, warmup: int = 25, alpha: float = 0.97) -> list[Tree]:
    """Kumar et al. 2025, algorithm 1."""
    made, norms = [], []
    for t, g in enumerate(gs):
        total = norm_of_all(g)
        if t < warmup:
            norms.append(total)
            mu, var = np.mean(norms), np.var(norms)
        else:
            z, clipped = (total - mu) / np.sqrt(var), total
            if z > z_thres:
                clipped = mu + z_thres * np.sqrt(var) / (z / z_thres)
            mu = alpha * mu + (1 - alpha) * clipped
            var = alpha * var + (1 - alpha) * (clipped - mu) ** 2
            g = {name: leaf * clipped / total for name, leaf in g.items()}
        made.append(g)
    return made


def adagc(
    gs: list[Tree], lambda_rel: float, lambda_abs: float, *, warmup: int = 100, beta: float = 0.98
) -> list[Tree]:
    """Wang et al. 2025, algorithm 1."""
    made, gamma = [], dict.fromkeys(gs[0], np.inf)
    for t, g in enumerate(gs):
        if t < warmup:
            g = clip_global_norm(g, lambda_abs)
            gamma = {name: min(gamma[name], norm(leaf)) for name, leaf in g.items()}
        else:
            h = {name: min(lambda_rel * gamma[name] / norm(leaf), 1) for name, leaf in g.items()}
            g = {name: h[name] * leaf for name, leaf in g.items()}
            gamma = {name: beta * gamma[name] + (1 - beta) * norm(leaf) for name, leaf in g.items()}
        made.append(g)
    return made


def adam(
    gs: list[np.ndarray],
    b1: float,
    b2: float,
    epsilon: float,
    *,
    hat: bool,
    second_moment: str = 'adam',
    theta: float = np.inf,
    spam_warmup: int = 20,
    d: float = np.inf,
    corrected: bool = True,
    keep: Callable[[np.ndarray], np.ndarray] = lambda x: x,
) -> list[np.ndarray]:
    """Kingma & Ba 2015: algorithm 1, or with `hat` the order of computation at the end of section 2.

    With AMSGrad's or Yogi's v, SPAM's threshold theta, and StableAdamW's d; without the correction of bias; and with
    means that lose digits by being kept until the next step.
    """
    m, v, largest, made = 0 * gs[0], 0 * gs[0], 0 * gs[0], []
    for t, g in enumerate(gs, 1):
        if t > spam_warmup:
            g = np.where(g**2 > theta * v, np.sign(g) * np.sqrt(np.minimum(theta * v, g**2)), g)
        m = b1 * m + (1 - b1) * g
        v = v - (1 - b2) * (np.sign(v - g**2) * g**2 if second_moment == 'yogi' else v - g**2)
        largest = np.maximum(largest, v)
        used = largest if second_moment == 'amsgrad' else v
        c1, c2 = (1 - b1**t, 1 - b2**t) if corrected else (1, 1)
        root = np.sqrt(used) / np.sqrt(c2)
        u = m / c1 / (root + (epsilon / np.sqrt(c2) if hat else epsilon))
        rms = np.sqrt(np.mean(g**2 / np.maximum(used / c2, epsilon**2)))
        made.append(u / max(1, rms / d))
        m, v, largest = keep(m), keep(v), keep(largest)
    return made
