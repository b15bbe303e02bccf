"""Early-warning signals of an Adam step, from its gradients, moments, update and parameters, in one pass over them.

For any loop whose optimiser is Adam, optax's or ours, inside its compiled step:

    record |= signals.of_adam(params, gradients, updates, signals.adam_state(opt_state), learning_rate=1e-3)

with parameters and state after the step. The moments before it are not read, though two signals are about them: a step
whose buffers are donated overwrites them, and to read them would cost it a copy (docs/decisions/0009-signals.md).

All numbers are finite where the step's are: a field that isn't makes the run diverge.
A new signal is a line of `_signals` and an entry of OF_ADAM; detectors, reports and docs read that table.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxrnn import tree
from jaxrnn.optim import transforms
from jaxrnn.types import Array, Record, Signal, Tree

SATURATED = 0.9
"""|m̂/√v̂| from here on is a coordinate whose gradients agree in sign: of independent ones, of which the ratio is
normal with a deviation of .229, one in 11,000 (Molybog et al. 2023, 2304.09871; √((1-b1)/(1+b1)) derived)."""

ULPS = 4
"""Roundings that v may be off by: ours and Kingma's way to write the average differ by two."""

SAMPLE = 64
"""Coordinates of a tensor that the median is taken of: its rank is right to 6.3 %, where the alarm asks for a factor
of 10; XLA:CPU sorts them by one thread."""

ROW = 1024
"""Numbers of a vector summed one after the other; what is longer is summed by rows, as matrices are."""


LARGE = 1 << 14
"""Numbers of a matrix from which on a part of its rows is looked at in a step, where that is asked for."""


ELEMENTWISE = 'one pass over g, m, v, u, θ, shared by all'
"""What each signal of `of_adam` costs."""

HESSIAN_VECTOR = 'products of the Hessian and a vector: 2 to 2.5 gradients each'

RISEN = 'smooth(log({0}), 16) > median(log({0}), 200) + .9'
"""2.5 times what it was, averaged by factors, since batches scatter by factors. Level alone tells nothing: 2.3, the
threshold of Wortsman et al., is passed now and then in 59 of 72 healthy small runs, and for good at a batch of 8.
Measured there: on in .4 % of the steps of healthy runs; on 12 to 163 steps before 5 of 6 spikes and collapses."""

OF_ADAM = (
    Signal(
        'update_rms',
        '√mean(g² / max(v̂, ε²))',
        'highest',
        RISEN.format('update_rms'),
        'the gradient outgrew its own average: v is too slow for it, and the step too long',
        'Wortsman et al. 2023, 2304.13013',
        ELEMENTWISE,
        '1-8',
    ),
    Signal(
        'decoupling',
        '1 - mean(g²) / mean(v̂)',
        'highest',
        'smooth(decoupling, 16) < -.2',
        'near 1, v decays by itself while the step grows; below 0 the gradient has outgrown it',
        'Bai et al. 2026, 2506.04805',
        ELEMENTWISE,
        '100s',
    ),
    Signal(
        'epsilon_margin',
        'median(√v̂) / ε, of some 64 coordinates evenly spread',
        'lowest',
        '',
        'below 10: ε, not v, sets the step of many coordinates, and keeps it from growing further',
        'Molybog et al. 2023, 2304.09871; Wortsman et al. 2023, 2309.14322',
        ELEMENTWISE,
        '',
    ),
    Signal(
        'descent_cosine',
        'cos(u, -g)',
        'whole',
        '',
        'near 0 with long steps, or negative: the update no longer goes downhill',
        'Molybog et al. 2023, 2304.09871',
        ELEMENTWISE,
        '10s',
    ),
    Signal(
        'saturated_ratio',
        'share of |m̂ / √v̂| > .9',
        'highest',
        '',
        'coordinates all take their full step, as correlated gradients make them',
        'Molybog et al. 2023, 2304.09871',
        ELEMENTWISE,
        '10s',
    ),
    Signal(
        'step_rms',
        'RMS(u) / η',
        'highest',
        RISEN.format('step_rms'),
        '.23 for independent gradients, 1 for equal ones; more where gradients outrun √v',
        'derived: √((1-b1)/(1+b1))',
        ELEMENTWISE,
        '10s',
    ),
    Signal(
        'momentum_cosine',
        'cos(g, m before it)',
        'whole',
        'smooth(momentum_cosine, 16) < -.9',
        'below 0 the gradient turns back each step: the edge of stability',
        'Cohen et al. 2022, 2207.14484',
        ELEMENTWISE,
        '5-20',
    ),
    Signal(
        'relative_step',
        '‖u‖ / ‖θ‖, θ after the step',
        'highest',
        '',
        'about 1e-3 in health; a step that rewrites a tensor is 1e-1',
        'WeSaR (Nishida et al. 2024)',
        ELEMENTWISE,
        '',
    ),
    Signal(
        'bound',
        'max|u| / (η C_t), C_t = (1-b1)/(1-b1^t) √((1-b2^t)/(1-b2)) √((1-ρ^t)/(1-ρ)), ρ = b1²/b2',
        'highest',
        'bound > 1.001',
        'a step longer than Adam can take: a corrupted moment, or an update that is not Adam alone',
        'Cauchy-Schwarz, derived; C is 1 at t = 1 and 7.27 for ever, by default',
        ELEMENTWISE,
        '0',
    ),
    Signal(
        'second_moment_broken',
        'share of v_t < b2 v_tm1 + (1-b2) g² beyond 4 ulp; v_tm1 counts as 0 where it is not given',
        'highest',
        'second_moment_broken > 0',
        'v is smaller than it can be: a corrupted moment',
        'algebra',
        ELEMENTWISE,
        '0',
    ),
)
"""Those of `of_adam`."""

OTHERS = (
    Signal(
        'gradient_norm',
        '‖g‖',
        'whole',
        'log(gradient_norm) > mean(log(gradient_norm), 64) + 5 * std(log(gradient_norm), 64)',
        'a gradient far above its average: an outlier in the batch, or the loss already turning',
        'ZClip, 2504.02507',
        'none: it is in every record',
        '0-5',
    ),
    Signal(
        'preconditioned_sharpness',
        'λ₁(P⁻¹H) / ((2+2b1) / ((1-b1) η)), P = (1-b1^t) (√v̂ + ε)',
        'whole',
        'preconditioned_sharpness > 1',
        'the edge of stability: Adam overshoots along the sharpest direction; for a spike it must last',
        'Cohen et al. 2022, 2207.14484',
        'two ' + HESSIAN_VECTOR,
        '10s-100s',
    ),
    Signal(
        'update_curvature',
        'dᵀHd / dᵀPd / ((2+2b1) / ((1-b1) η)), d = P⁻¹g',
        'whole',
        'update_curvature > .8',
        'the gradient turns into the direction along which Adam overshoots: from 1 on a spike is due',
        'Bai et al. 2026, 2506.04805',
        'one of the ' + HESSIAN_VECTOR,
        '0-10',
    ),
)
"""Those of `curvature`, under the names that a record has them by, and of the record itself."""

SIGNALS = OF_ADAM + OTHERS


adam_state = transforms.adam_state


class Adam(NamedTuple):
    """What Adam's step was made with, and at what count."""

    b1: float
    b2: float
    learning_rate: Array  # []
    mean: Array  # 1 - b1^t
    square: Array  # 1 - b2^t
    epsilon: Array  # as algorithm 1 adds it to √v̂
    bound: Array  # of |m̂|/√v̂


NORMS = ('gradient_norm', 'update_norm', 'parameter_norm')
"""What falls out of the same pass, of all tensors as one."""


class _Sums(NamedTuple):
    """Of a tensor's terms, in the wider of its type and float32; of several tensors [K], or added up."""

    size: Any  # numbers of the tensor, known before the step is compiled
    gg: Array
    uu: Array
    mm: Array
    pp: Array
    ug: Array
    gm: Array
    v: Array
    normalised: Array  # g² / max(v̂, ε²)
    saturated: Array
    broken: Array
    largest: Array  # max|u|


def of_adam(
    params: Tree,
    gradients: Tree,
    updates: Tree,
    state: optax.ScaleByAdamState,
    *,
    before: optax.ScaleByAdamState | None = None,
    learning_rate: Any,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    epsilon_hat: bool = False,
    parts: int = 1,
) -> Record:
    """The signals of one step: those of OF_ADAM, each the worst over the tensors or of the whole tree, and
    `gradient_norm`, `update_norm` and `parameter_norm`, which are of all, and fall out of the same pass.

    Tensors that are empty, of integers, or not Adam's are left out. Where a ratio is 0/0 (no gradient yet, a
    learning rate of 0) it is 0. A NaN in a tensor makes its signals NaN; it counts as broken, not as saturated.

    Args:
        params: after the step, so that a bias that starts at zero has a norm.
        gradients: as Adam was given them, after any clipping.
        updates: as added to the parameters: the learning rate in it, and nothing but Adam.
        state: Adam's after the step, as `adam_state` finds it.
        before: Adam's before the step, to have v compared with all of its recurrence and not only its last term.
        learning_rate: of this step.
        eps: and `epsilon_hat`: as `transforms.scale_by_adam` has them.
        parts: of matrices of LARGE numbers and more, of how many blocks of rows one is looked at, another in each
            step. To read all of them is what signals cost. What breaks a single number of a single step can be missed.
    """
    adam = _adam(state.count, learning_rate, b1, b2, eps, epsilon_hat)
    tensors = _tensors(params, gradients, updates, state, before)
    if not tensors:
        zero = jnp.float32(0)
        return dict.fromkeys((*(signal.name for signal in OF_ADAM), *NORMS), zero)
    sums = _stacked([_sums(adam, *_part(leaves, state.count, parts)) for leaves in tensors.values()])
    sums = _scaled(sums, np.array([leaves[0].size for leaves in tensors.values()]))
    each = _signals(adam, sums) | {
        'epsilon_margin': _margins(adam, [leaves[4] for leaves in tensors.values()])
    }
    record = _record(each, adam, sums)
    if parts == 1:
        return record
    leaves = zip(*(leaves[:3] for leaves in tensors.values()), strict=True)
    thetas, gs, us = (tree.norm(list(column)) for column in leaves)
    return record | dict(zip(NORMS, (gs, us, thetas), strict=True))


def of_samples(
    gradients: Array,
    m: Array,
    v: Array,
    v_tm1: Array,
    *,
    count: Any,
    sizes: np.ndarray,
    params: Array | None = None,
    moved: Array | None = None,
    b1: float,
    b2: float,
    eps: float | None = None,
) -> Record:
    """The signals of `of_adam`, estimated from some numbers of each tensor, where no more than a state is known.

    The update is taken to be m̂ / (√v̂ + ε), which is of a learning rate of 1.

    Args:
        gradients: [tensors, samples], as are the next three; that follow from the mean and the mean before it.
        m: after the step.
        v: after the step.
        v_tm1: before it.
        count: of the steps that Adam made.
        sizes: of the tensors [tensors].
        params: after the step, and
        moved: how far the step moved them; without them there is no `relative_step` and no norm of theirs.
        eps: None where it isn't known; then there is no `epsilon_margin`.
    """
    adam = _adam(count, 1.0, b1, b2, NO_EPSILON if eps is None else eps, False)
    u = direction(m, v, count=count, b1=b1, b2=b2, eps=eps)
    rounding = ULPS * (1 + 1 / (1 - b1))  # of a gradient that is a difference of means
    theta = jnp.zeros_like(m) if params is None else params
    sums = _scaled(_of_rows(_terms(adam, theta, gradients, u, m, v, v_tm1, rounding)), sizes)
    record = _record(
        _signals(adam, sums) | {'epsilon_margin': _margins_of_rows(adam, v[:, _places(v.shape[1])])},
        adam,
        sums,
    )
    if eps is None:
        del record['epsilon_margin']
    for name in ('relative_step', 'update_norm', 'parameter_norm'):
        del record[name]
    if params is None or moved is None:
        return record
    squares = jnp.asarray(sizes / m.shape[1], m.dtype)[None] * jnp.sum(
        jnp.square(jnp.stack([moved, params])), axis=2
    )
    steps, thetas = jnp.sqrt(squares)
    norms = jnp.sqrt(jnp.sum(squares, axis=1))
    return record | {
        'relative_step': jnp.max(_ratio(steps, thetas)),
        'update_norm': norms[0],
        'parameter_norm': norms[1],
    }


def direction(m: Array, v: Array, *, count: Any, b1: float, b2: float, eps: float | None = None) -> Array:
    """-m̂ / (√v̂ + ε): a step of Adam at a learning rate of 1; of moments after `count` steps."""
    adam = _adam(count, 1.0, b1, b2, NO_EPSILON if eps is None else eps, False)
    return -(m / adam.mean) / (jnp.sqrt(v / adam.square) + adam.epsilon)


NO_EPSILON = 1e-18
"""Stands for an epsilon that isn't known: its square is still a float32."""


def per_tensor(
    params: Tree,
    gradients: Tree,
    updates: Tree,
    state: optax.ScaleByAdamState,
    *,
    before: optax.ScaleByAdamState | None = None,
    learning_rate: Any,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    epsilon_hat: bool = False,
) -> Mapping[str, Record]:
    """The signals of each tensor, by path: for replays, where `of_adam` has said that something is wrong."""
    adam = _adam(state.count, learning_rate, b1, b2, eps, epsilon_hat)
    tensors = _tensors(params, gradients, updates, state, before)
    if not tensors:
        return {}
    sums = _stacked([_sums(adam, *leaves) for leaves in tensors.values()])
    margins = _margins(adam, [leaves[4] for leaves in tensors.values()])
    found = _signals(adam, sums) | {'epsilon_margin': margins}
    return {name: {key: values[place] for key, values in found.items()} for place, name in enumerate(tensors)}


def largest_ratio(t: Array, b1: float, b2: float) -> Array:
    """C_t: what |m̂_t| / √v̂_t can't exceed; inf where nothing bounds it.

    By Cauchy and Schwarz, as m_t = (1-b1) Σ b1^(t-i) g_i and v_t = (1-b2) Σ b2^(t-i) g_i²:

        C_t = (1-b1) / (1-b1^t) √((1-b2^t) / (1-b2)) √(Σ_{i<t} ρ^i),  ρ = b1² / b2

    attained by g_i ~ (b1/b2)^(t-i). 1 at the first step, then rising to 7.27 for .9, .999.
    """
    if b1 and b1**2 >= b2:
        terms = jnp.asarray(t, float) if b1**2 == b2 else jnp.inf
    else:
        ratio = b1**2 / b2 if b1 else 0.0
        terms = transforms.one_minus_power(ratio, t) / (1 - ratio)
    mean = transforms.one_minus_power(b1, t) / (1 - b1)
    return jnp.sqrt(transforms.one_minus_power(b2, t) / (1 - b2) * terms) / mean


def _adam(t: Array, learning_rate: Any, b1: float, b2: float, eps: float, epsilon_hat: bool) -> Adam:
    t = jnp.asarray(t)
    mean, square = transforms.one_minus_power(b1, t), transforms.one_minus_power(b2, t)
    epsilon = eps / jnp.sqrt(square) if epsilon_hat else jnp.asarray(eps, square.dtype)
    return Adam(b1, b2, jnp.asarray(learning_rate), mean, square, epsilon, largest_ratio(t, b1, b2))


def _tensors(params: Tree, gradients: Tree, updates: Tree, state: Any, before: Any) -> dict[str, tuple]:
    """Path -> (θ, g, u, m, v[, v before]) of each tensor that Adam moves."""
    trees = [params, gradients, updates, state.mu, state.nu, *([before.nu] if before else [])]
    named = [tree.named_leaves(one) for one in trees]
    return {
        name: tuple(leaves[name] for leaves in named)
        for name, v in named[4].items()
        if all(name in leaves for leaves in named) and v.size and _are_real([v, named[1][name]])
    }


def _are_real(leaves: list[Array]) -> bool:
    return all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves)


def _record(each: dict[str, Array], adam: Adam, sums: _Sums) -> dict[str, Array]:
    """The worst of each tensor's signals, those that are of the whole tree, and the norms."""
    whole = _joined(sums)
    wholes = _signals(adam, whole)
    worst = {'highest': jnp.max, 'lowest': jnp.min, 'whole': lambda x: x}
    record = {
        signal.name: worst[signal.worst]((wholes if signal.worst == 'whole' else each)[signal.name])
        for signal in OF_ADAM
    }
    norms = zip(NORMS, (whole.gg, whole.uu, whole.pp), strict=True)
    return record | {name: jnp.sqrt(square) for name, square in norms}


def _sums(adam: Adam, p: Array, g: Array, u: Array, m: Array, v: Array, v_tm1: Array | None = None) -> _Sums:
    return _Sums(v.size, *_reduced(_terms(adam, p, g, u, m, v, v_tm1)))


def _of_rows(terms: tuple[Array, ...]) -> _Sums:
    """Of terms [tensors, samples] each row's sums."""
    zeros = tuple(np.zeros((), term.dtype) for term in terms)
    return _Sums(terms[0].shape[1], *lax.reduce(terms, zeros, _combine, (1,)))


def _terms(
    adam: Adam,
    p: Array,
    g: Array,
    u: Array,
    m: Array,
    v: Array,
    v_tm1: Array | None = None,
    ulps: float = ULPS,
) -> tuple[Array, ...]:
    """What is summed of a tensor's numbers, in the order of _Sums; of the last the maximum is taken."""
    stored = jnp.finfo(v.dtype)
    wide = jnp.promote_types(v.dtype, jnp.float32)
    p, g, u, m, v = (x.astype(wide) for x in (p, g, u, m, v))
    least = (1 - adam.b2) * g * g + (0 if v_tm1 is None else adam.b2 * v_tm1.astype(wide))
    square = 1 / adam.square
    terms = (
        g * g,
        u * u,
        m * m,
        p * p,
        u * g,
        g * m,
        v,
        g * g / jnp.maximum(v * square, jnp.maximum(adam.epsilon**2, stored.tiny)),
        (m * m > SATURATED**2 * adam.mean**2 * square * v).astype(wide),
        (~(v >= (1 - ulps * float(stored.eps)) * least - float(stored.tiny))).astype(wide),
        jnp.abs(u),
    )
    return tuple(term.astype(wide) for term in terms)  # under 64-bit types the constants are wider


def _part(leaves: tuple[Array, ...], count: Array, parts: int) -> tuple[Array, ...]:
    """Of a tensor's rows those that are looked at in a step."""
    size, rows = leaves[0].size, leaves[0].shape[0] if leaves[0].ndim > 1 else 1
    if parts == 1 or size < LARGE or rows < parts:
        return leaves
    block = -(-rows // parts)
    first = jnp.minimum(block * (count % parts), rows - block)
    return tuple(lax.dynamic_slice_in_dim(leaf, first, block) for leaf in leaves)


def _scaled(sums: _Sums, sizes: np.ndarray) -> _Sums:
    """Of parts, as if of the whole tensors."""
    scales = sizes / sums.size
    scaled = {
        name: x * scales.astype(x.dtype)
        for name, x in sums._asdict().items()
        if name not in ('size', 'largest')
    }
    return sums._replace(size=sizes, **scaled)


def _reduced(terms: tuple[Array, ...]) -> list[Array]:
    """Sums of all terms but the last, and the maximum of that: one loop, where XLA:CPU has a loop for each sum."""
    if terms[0].ndim < 2:
        terms = tuple(_in_rows(term) for term in terms)
    zeros = tuple(np.zeros((), term.dtype) for term in terms)
    rows = lax.reduce(terms, zeros, _combine, (terms[0].ndim - 1,))
    return lax.reduce(rows, zeros, _combine, tuple(range(rows[0].ndim)))


def _in_rows(x: Array) -> Array:
    x = jnp.ravel(x)
    return jnp.pad(x, (0, -x.size % ROW)).reshape(-1, ROW) if x.size > ROW else x


def _combine(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    return (*(x + y for x, y in zip(a[:-1], b[:-1], strict=True)), jnp.maximum(a[-1], b[-1]))


def _stacked(sums: list[_Sums]) -> _Sums:
    """Of each tensor side by side: what is computed of them is then one small loop, and not one for each."""
    sizes, *columns = zip(*sums, strict=True)
    return _Sums(np.array(sizes), *(jnp.stack(column) for column in columns))


def _joined(s: _Sums) -> _Sums:
    """Of all tensors as one."""
    added = {name: jnp.sum(x) for name, x in s._asdict().items() if name not in ('size', 'largest')}
    return _Sums(size=s.size.sum(), largest=jnp.max(s.largest), **added)


def _signals(adam: Adam, s: _Sums) -> dict[str, Array]:
    """Of sums, all that need no more than these; element by element."""
    size = np.asarray(s.size, s.uu.dtype)
    rms = jnp.sqrt(s.uu / size)
    return {
        'update_rms': jnp.sqrt(s.normalised / size),
        'decoupling': jnp.where(s.v == 0, 0, 1 - _ratio(s.gg * adam.square, s.v)),
        'descent_cosine': _cosine(-s.ug, s.uu, s.gg),
        'saturated_ratio': s.saturated / size,
        'step_rms': _ratio(rms, adam.learning_rate),
        'momentum_cosine': _momentum_cosine(adam, s),
        'relative_step': _ratio(jnp.sqrt(s.uu), jnp.sqrt(s.pp)),
        'bound': _ratio(s.largest, adam.learning_rate * adam.bound),
        'second_moment_broken': s.broken / size,
    }


def _momentum_cosine(adam: Adam, s: _Sums) -> Array:
    """cos(g, m_tm1) from m_t = b1 m_tm1 + (1-b1) g; 0 where g is a thousand times m_tm1, whose digits it swallows."""
    gm = (s.gm - (1 - adam.b1) * s.gg) / (adam.b1 or 1)
    mm = (s.mm - 2 * (1 - adam.b1) * s.gm + (1 - adam.b1) ** 2 * s.gg) / (adam.b1 or 1) ** 2
    lost = mm <= 1e-6 * s.gg
    return _cosine(jnp.where(lost, 0, gm), jnp.where(lost, 0, mm), s.gg)


def _cosine(ab: Array, aa: Array, bb: Array) -> Array:
    """Of two vectors, from their products; 0 where a square is too small for its type, as of a gradient of 1e-23."""
    lengths = jnp.sqrt(aa) * jnp.sqrt(bb)
    return jnp.where(lengths == 0, 0, ab / jnp.where(lengths == 0, 1, lengths))


def _ratio(a: Array, b: Array) -> Array:
    """a / b, but 0/0 = 0."""
    return jnp.where((a == 0) & (b == 0), 0, a / jnp.where((a == 0) & (b == 0), 1, b))


def _margins(adam: Adam, tensors: list[Array]) -> Array:
    """Of each tensor's v, [K]; sorted side by side."""
    samples = [jnp.ravel(v)[_places(v.size)] for v in tensors]
    sizes = np.array([sample.size for sample in samples])
    wide = jnp.result_type(jnp.float32, *samples)
    return _margins_of_rows(
        adam, jnp.stack([_padded(sample.astype(wide), sizes.max()) for sample in samples]), sizes
    )


def _places(size: int) -> slice:
    """Which numbers of a tensor are sorted; by an odd step, as an even one would stay in some columns."""
    return slice(None, None, max(size // SAMPLE, 1) | 1)


def _margins_of_rows(adam: Adam, v: Array, sizes: np.ndarray | None = None) -> Array:
    """Of samples of v [K, samples], of which the first `sizes` are; else all. Without ε a margin is as large as a
    number can be, and still finite."""
    if sizes is None:
        sizes = np.full(v.shape[0], v.shape[1])
    ordered = jnp.sort(v, axis=1)
    middles = (ordered[np.arange(len(sizes)), places] for places in ((sizes - 1) // 2, sizes // 2))
    root = sum(jnp.sqrt(middle / adam.square) for middle in middles) / 2
    largest = jnp.finfo(v.dtype)
    margins = jnp.minimum(root / jnp.maximum(adam.epsilon, largest.tiny), largest.max)
    return jnp.where(jnp.any(jnp.isnan(v), axis=1), jnp.nan, margins)


def _padded(sample: Array, length: int) -> Array:
    return jnp.pad(sample, (0, length - sample.size), constant_values=jnp.inf)
