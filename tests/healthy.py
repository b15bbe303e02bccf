"""Train steps that look alarming inside and are healthy: every output is finite, so a trace must not raise an alarm.

The steps are those of `faulty`, of five libraries and jaxrnn itself. What looks alarming is put in the places where
faults are planted, or around the step, or into its optimiser. Each ingredient takes x [..., N] and `hit`, 1 where a
fault would strike, and gives another x; most differ from the first by a thousandth of what they are about.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import faulty
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.scipy import special

from jaxrnn import trace
from jaxrnn.rnn import cells, scan

INF = jnp.inf
A_LITTLE = 1e-3


# Of which elements.


def position(x):
    """Along the last axis."""
    return lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)


def kept(x):
    """All but the last, where there are several."""
    return position(x) < max(1, x.shape[-1] - 1)


def everywhere(hit, x):
    """hit in x's shape, with no gradient."""
    return jnp.broadcast_to(hit, x.shape)


def spoilt(x, hit):
    """NaN where hit, but for the first of each row."""
    return jnp.where((hit > 0) & (position(x) > 0), jnp.nan, x)


# What is computed and not used.


def masked_by_a_double_where(x, hit):
    inside = x * x * (1 - hit)
    safe = jnp.where(inside > 0, inside, 1)
    return x + A_LITTLE * jnp.where(inside > 0, jnp.log(safe) + jnp.sqrt(safe), 0)


def nan_replaced(x, hit):
    there = spoilt(x, hit)
    return jnp.where(jnp.isnan(there), 0, there)


def computed_and_dropped(x, hit):
    jnp.log(-1 - x * x)
    jnp.log(0 * x)
    return x


def nan_that_compares_false(x, hit):
    root = lax.stop_gradient(jnp.sqrt(-1 - x * x))
    return jnp.where(root > 0, root, x)


def ratio_masked_without_gradient(x, hit):
    ratio = lax.stop_gradient(x / (1 - hit))
    return x + A_LITTLE * jnp.where(hit > 0, 0, ratio)


def zero_by_zero_to_number(x, hit):
    rest = lax.stop_gradient(x * (1 - hit))
    return x + A_LITTLE * jnp.nan_to_num(rest / rest, nan=0.0)


def mean_of_those_that_are_numbers(x, hit):
    there = spoilt(x, hit)
    return x - A_LITTLE * jnp.nanmean(there, axis=-1, keepdims=True)


def extremes_of_those_that_are_numbers(x, hit):
    there = spoilt(x, hit)
    spread = jnp.nanmax(there, axis=-1, keepdims=True) - jnp.nanmin(there, axis=-1, keepdims=True)
    return x + A_LITTLE * spread + A_LITTLE * jnp.nansum(there, axis=-1, keepdims=True)


def share_that_is_finite(x, hit):
    good = jnp.isfinite(spoilt(x, hit) / (1 - hit))
    return x * (1 + A_LITTLE * jnp.mean(good.astype(x.dtype), axis=-1, keepdims=True))


def taken_from_beyond_the_end(x, hit):
    """jnp.take fills with NaN."""
    some = jnp.max(jnp.broadcast_to(hit, x.shape), axis=-1, keepdims=True) > 0
    index = jnp.where(some, x.shape[-1] + 7, 0)
    taken = jnp.take_along_axis(x, index, axis=-1, mode='fill')
    return x + A_LITTLE * jnp.where(index < x.shape[-1], taken, 0)


def sentinel_that_is_no_label(x, hit):
    """-1 where there is no label, as one-hot and as an index."""
    label = jnp.where(hit > 0, -1, 0).astype(jnp.int32)
    label = jnp.broadcast_to(label, (*x.shape[:-1], 1))
    losses = -jnp.take_along_axis(jax.nn.log_softmax(x), jnp.maximum(label, 0), axis=-1)
    return x + A_LITTLE * jnp.where(label >= 0, losses, 0)


def branch_not_taken(x, hit):
    return lax.cond(jnp.sum(0 * x) > 1, lambda x: jnp.log(-1 - x * x), lambda x: x, x)


def one_of_many_branches(x, hit):
    branches = [lambda x: x / 0 * 0, lambda x: x * 1.001, lambda x: jnp.log(-x * x)]
    return lax.switch(jnp.int32(1), branches, x)


def loop_that_ends_before_zero(x, hit):
    left, shrunk = lax.while_loop(lambda c: c[0] > 0, lambda c: (c[0] - 1, c[1] / c[0]), (3.0, x))
    return x + A_LITTLE * lax.stop_gradient(shrunk + 0 * left)


def loop_until_the_error_is_small(x, hit):
    """The error is infinite before the first iteration."""

    def better(carry):
        root, _ = carry
        nearer = (root + 2 / root) / 2
        return nearer, jnp.max(jnp.abs(nearer - root))

    root, error = lax.while_loop(lambda c: c[1] > 1e-3, better, (jnp.ones_like(x), jnp.float32(INF)))
    return x + A_LITTLE * (root + error)


# Masks of -inf.


def softmax_of_masked(x, hit):
    return x + A_LITTLE * jax.nn.softmax(jnp.where(kept(x), x, -INF))


def log_softmax_of_masked(x, hit):
    logs = jax.nn.log_softmax(jnp.where(kept(x), x, -INF))
    return x + A_LITTLE * jnp.where(kept(x), logs, 0)


def causal_attention(x, hit):
    n = x.shape[-1]
    scores = jnp.expand_dims(x, -1) * jnp.expand_dims(x, -2)
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((n, n), bool)), scores.shape)
    weights = jax.nn.softmax(jnp.where(causal, scores, -INF))
    return x + A_LITTLE * jnp.sum(weights * jnp.expand_dims(x, -2), -1)


def two_masks_that_overflow(x, hit):
    """The smallest float32, twice, is -inf."""
    mask = jnp.where(kept(x), 0, jnp.finfo(x.dtype).min)
    return x + A_LITTLE * jax.nn.softmax(x + mask + mask)


def softmax_where(x, hit):
    return x + A_LITTLE * jax.nn.softmax(x, where=kept(x))


def whole_row_masked_before(x, hit):
    valid = kept(x) & (hit == 0)
    some = jnp.any(valid, -1, keepdims=True)
    weights = jax.nn.softmax(jnp.where(valid | ~some, x, -INF))
    return x + A_LITTLE * jnp.where(some, weights, 0)


def whole_row_masked_after(x, hit):
    """0 / 0 in a row that nobody looks at."""
    valid = kept(x) & (hit == 0)
    weights = lax.stop_gradient(jax.nn.softmax(jnp.where(valid, x, -INF)))
    return x + A_LITTLE * jnp.where(jnp.any(valid, -1, keepdims=True), weights, 0)


def filtered_to_the_largest(x, hit):
    top, _ = lax.top_k(x, min(2, x.shape[-1]))
    return x + A_LITTLE * jax.nn.softmax(jnp.where(x < top[..., -1:], -INF, x))


def filtered_to_the_nucleus(x, hit):
    ranked = jnp.flip(jnp.sort(x, -1), -1)
    before = jnp.cumsum(jax.nn.softmax(ranked), -1) - jax.nn.softmax(ranked)
    least = jnp.min(jnp.where(before < 0.5, ranked, INF), -1, keepdims=True)
    return x + A_LITTLE * jax.nn.softmax(jnp.where(x < least, -INF, x))


def largest_of_masked(x, hit):
    some = jnp.max(jnp.where(kept(x), x, -INF), -1, keepdims=True)
    return x + A_LITTLE * (some - jnp.min(jnp.where(kept(x), x, INF), -1, keepdims=True))


def largest_where(x, hit):
    return x + A_LITTLE * jnp.max(x, -1, keepdims=True, where=kept(x), initial=-INF)


def place_of_the_largest_of_masked(x, hit):
    place = jnp.argmax(jnp.where(kept(x), x, -INF), -1)
    return x + A_LITTLE * jax.nn.one_hot(place, x.shape[-1])


def largest_in_a_window(x, hit):
    window = (1,) * (x.ndim - 1) + (2,)
    return x + A_LITTLE * lax.reduce_window(x, -INF, lax.max, window, (1,) * x.ndim, 'SAME')


def running_largest(x, hit):
    largest = lax.cummax(jnp.where(position(x) == 0, -INF, x), axis=x.ndim - 1)
    return x + A_LITTLE * jnp.where(jnp.isfinite(largest), largest, 0)


def running_largest_in_pairs(x, hit):
    largest = lax.associative_scan(jnp.maximum, jnp.where(kept(x), x, -INF), axis=x.ndim - 1, reverse=True)
    return x + A_LITTLE * jnp.where(largest > -INF, largest, 0)


def sorted_behind_infinities(x, hit):
    return x + A_LITTLE * jnp.sort(jnp.where(kept(x), x, INF), -1)[..., :1]


def largest_of_empty_groups(x, hit):
    """A group without members has -inf."""
    flat = x.reshape(-1)
    largest = jax.ops.segment_max(flat, 2 * (jnp.arange(flat.size) % 2), 5)
    return x + A_LITTLE * jnp.sum(jnp.where(jnp.isneginf(largest), 0, largest))


def beams_that_are_not_there_yet(x, hit):
    """One beam has log probability 0, the others -inf."""
    logs = jax.nn.log_softmax(x)
    beams = jnp.array([0, -INF, -INF])
    scores = jnp.expand_dims(logs, -2) + beams.reshape((1,) * (x.ndim - 1) + (3, 1))
    best, _ = lax.top_k(scores.reshape(*x.shape[:-1], -1), x.shape[-1])
    return x + A_LITTLE * best


# Logarithms of sums.


def logsumexp_of_masked(x, hit):
    members = jnp.concatenate([x, jnp.full_like(x, -INF)], -1)
    return x + A_LITTLE * special.logsumexp(members, axis=-1, keepdims=True)


def logsumexp_with_weights_of_zero(x, hit):
    return x + A_LITTLE * special.logsumexp(x, axis=-1, keepdims=True, b=kept(x).astype(x.dtype))


def logsumexp_of_nothing(x, hit):
    total = special.logsumexp(jnp.full_like(x, -INF), axis=-1, keepdims=True)
    return x + jnp.exp(total)


def logaddexp_of_minus_infinity(x, hit):
    none = jnp.full_like(x, -INF)
    return x + A_LITTLE * jnp.logaddexp(none, jnp.logaddexp(x, none))


def logaddexp_of_two_minus_infinities(x, hit):
    """-inf - (-inf) is NaN, which logaddexp itself sees and drops."""
    none = jnp.where(kept(x), x, -INF)
    total = lax.stop_gradient(jnp.logaddexp(none, none))
    return x + A_LITTLE * jnp.exp(total)


def running_logsumexp(x, hit):
    padded = jnp.concatenate([jnp.full_like(x[..., :1], -INF), x], -1)
    return x + A_LITTLE * lax.cumlogsumexp(padded, axis=x.ndim - 1)[..., 1:]


def softmax_in_one_pass(x, hit):
    """As in flash attention: the largest so far begins at -inf."""

    def body(carry, x_t):
        largest, total = carry
        new = jnp.maximum(largest, x_t)
        return (new, total * jnp.exp(largest - new) + jnp.exp(x_t - new)), None

    first = jnp.full(x.shape[:-1], -INF), jnp.zeros(x.shape[:-1])
    (largest, total), _ = lax.scan(body, first, jnp.moveaxis(x, -1, 0))
    return x + A_LITTLE * jnp.expand_dims(largest + jnp.log(total), -1)


def softmax_in_one_pass_over_masked_blocks(x, hit):
    """The first block is masked: -inf - (-inf) is guarded against, as flash attention does."""

    def body(carry, x_t):
        largest, total = carry
        new = jnp.maximum(largest, x_t)
        finite = jnp.where(jnp.isneginf(new), 0, new)
        return (new, total * jnp.exp(largest - finite) + jnp.exp(x_t - finite)), None

    blocks = jnp.moveaxis(jnp.concatenate([jnp.full_like(x[..., :1], -INF), x], -1), -1, 0)
    first = jnp.full(x.shape[:-1], -INF), jnp.zeros(x.shape[:-1])
    (largest, total), _ = lax.scan(body, first, blocks)
    return x + A_LITTLE * jnp.expand_dims(largest + jnp.log(total), -1)


def connectionist_temporal_classification(x, hit):
    rows = x.reshape(-1, x.shape[-1])
    logits = jnp.stack([rows, 2 * rows, -rows, rows, 3 * rows], 1)
    labels = jnp.tile(jnp.array([[1, 2, 0]]), (len(rows), 1))
    losses = optax.ctc_loss(logits, jnp.zeros(logits.shape[:2]), labels, (labels == 0).astype(x.dtype))
    return x + A_LITTLE * jnp.mean(losses)


# What saturates.


def saturated_gates(x, hit):
    gate = jax.nn.sigmoid(1e4 * x + 1e4) * jax.nn.sigmoid(1e4 * x - 1e4) + jnp.tanh(1e4 * x)
    return x + A_LITTLE * gate


def saturated_hard_gates(x, hit):
    return x + A_LITTLE * (jax.nn.hard_sigmoid(1e4 * x) + jax.nn.hard_tanh(-1e4 * x))


def saturated_softplus(x, hit):
    return x + 1e-6 * (jax.nn.softplus(1e4 * x) + jax.nn.log_sigmoid(1e4 * x))


def saturated_units(x, hit):
    large = 1e4 * x
    return x + 1e-6 * (jax.nn.silu(large) + jax.nn.gelu(large) + jax.nn.elu(large) + jax.nn.selu(large))


def sigmoid_by_its_formula(x, hit):
    """exp overflows, and 1 / inf is 0."""
    return x + A_LITTLE * lax.stop_gradient(1 / (1 + jnp.exp(-1e4 * x)))


def overflow_that_is_clipped(x, hit):
    return x + A_LITTLE * lax.stop_gradient(jnp.minimum(jnp.exp(1e4 * x * x + 100), 2))


def binary_cross_entropy_of_large_logits(x, hit):
    logits = 1e3 * jnp.sign(lax.stop_gradient(x)) + 1e3 * x
    losses = optax.sigmoid_binary_cross_entropy(logits, everywhere(hit, x))
    return x + 1e-6 * (losses + optax.sigmoid_focal_loss(logits, everywhere(hit, x)))


def cross_entropy_of_masked_logits(x, hit):
    """0 log 0."""
    logits = jnp.where(kept(x), x, -INF)
    labels = jax.nn.one_hot(jnp.zeros(x.shape[:-1], jnp.int32), x.shape[-1])
    losses = optax.safe_softmax_cross_entropy(logits, labels)
    return x + A_LITTLE * jnp.expand_dims(losses, -1)


def robust_losses(x, hit):
    return x + A_LITTLE * (optax.huber_loss(x * (1 - hit)) + 1e-3 * optax.log_cosh(1e3 * x))


# What is small.


def subnormal_numbers(x, hit):
    return x + 1e-39 * x + jnp.float32(1e-45)


def subnormal_gradients(x, hit):
    return x * 1e-20 * 1e-20


def gradients_that_underflow(x, hit):
    return x * 1e-30 * 1e-30


def underflowing_exponential(x, hit):
    return x * (1 + jnp.exp(-1e4 * (1 + x * x)))


def near_zero(x, hit):
    little = 1e-30 * x
    return x + jnp.log1p(little) + jnp.expm1(little) - jnp.sin(little)


def zero_times_its_logarithm(x, hit):
    share = everywhere(hit, x)
    return x + A_LITTLE * (special.xlogy(share, share) + special.entr(share) + special.rel_entr(share, 1.0))


def divergence_of_a_certainty(x, hit):
    certain = jax.nn.one_hot(jnp.zeros(x.shape[:-1], jnp.int32), x.shape[-1])
    return x + A_LITTLE * jnp.expand_dims(optax.kl_divergence(jax.nn.log_softmax(x), certain), -1)


def norm_of_zeros(x, hit):
    norms = optax.safe_norm(x * (1 - hit), 1e-6, axis=-1, keepdims=True)
    return x + A_LITTLE * norms


def cosine_of_zeros(x, hit):
    cosine = optax.cosine_similarity(x * (1 - hit), jnp.ones_like(x), epsilon=1e-6)
    return x + A_LITTLE * jnp.expand_dims(cosine, -1)


def normalised_constant_row(x, hit):
    constant = x * (1 - hit) + hit
    return x + A_LITTLE * jax.nn.standardize(constant, axis=-1, epsilon=1e-5)


def normalised_row_of_zeros(x, hit):
    zeros = x * (1 - hit)
    return x + A_LITTLE * zeros * lax.rsqrt(jnp.mean(zeros * zeros, -1, keepdims=True) + 1e-6)


def sinc_at_zero(x, hit):
    return x + A_LITTLE * jnp.sinc(x * (1 - hit))


def powers_of_zero(x, hit):
    zeros = x * (1 - hit)
    return x + A_LITTLE * (zeros**2 + jnp.power(jnp.abs(zeros), 2.0) + zeros**0)


def mean_of_nothing(x, hit):
    valid = jnp.zeros_like(x)
    total, count = jnp.sum(x * valid, -1, keepdims=True), jnp.sum(valid, -1, keepdims=True)
    careless = lax.stop_gradient(total / count)
    return x + total / jnp.maximum(count, 1) + jnp.where(count > 0, careless, 0)


# What is drawn.


def dropped_out(x, hit):
    keep = jax.random.bernoulli(jax.random.key(0), 0.7, x.shape)
    return jnp.where(keep, x / 0.7, 0)


def drawn_by_gumbel(x, hit):
    noise = jax.random.gumbel(jax.random.key(0), x.shape)
    return x + A_LITTLE * jax.nn.softmax(jnp.where(kept(x), x + noise, -INF))


def drawn_of_masked_logits(x, hit):
    drawn = jax.random.categorical(jax.random.key(0), jnp.where(kept(x), x, -INF))
    return x + A_LITTLE * jax.nn.one_hot(drawn, x.shape[-1])


def truncated_noise(x, hit):
    key = jax.random.key(0)
    return x + A_LITTLE * (jax.random.truncated_normal(key, -2, 2, x.shape) + jax.random.normal(key, x.shape))


# What is narrow.


def half_precision(x, hit):
    half = (x * 2.0**10).astype(jnp.float16)
    return x + A_LITTLE * (jnp.tanh(half) / 2).astype(x.dtype)


def half_precision_that_overflows_and_saturates(x, hit):
    large = lax.stop_gradient(1e6 * x).astype(jnp.float16)
    return x + A_LITTLE * jnp.tanh(large).astype(x.dtype)


def half_precision_mask(x, hit):
    half = x.astype(jnp.bfloat16)
    return x + A_LITTLE * jax.nn.softmax(jnp.where(kept(x), half, -INF)).astype(x.dtype)


# What guards gradients.


def guarded(x, hit):
    return jnp.where(jnp.all(jnp.isfinite(x)), x, jnp.full_like(x, jnp.nan) * 0)


def nans_zeroed(x, hit):
    x = jnp.where(jnp.isnan(x), 0, x)
    return jnp.nan_to_num(jnp.clip(x, -1, 1))


def clipped_by_norm_of_zeros(x, hit):
    x = 0 * x
    norm = jnp.sqrt(jnp.sum(x * x))
    return jnp.where(norm < 1, x, x / norm)


def histogram_of_logarithms(x, hit):
    """log 0 is counted in the first bin."""
    logs = jnp.log10(jnp.abs(x * (1 - hit)))
    counts = jnp.sum(jnp.clip(logs, -9, 3))
    return x + 0 * counts


ANY = ('data', 'cell', 'dense', 'loss', 'update', 'cell backward')
FORWARD = ('data', 'cell', 'dense')
ROWS = ('data', 'dense')

INGREDIENTS: dict[Callable, tuple[str, ...]] = {
    masked_by_a_double_where: ANY,
    nan_replaced: ANY,
    computed_and_dropped: ANY,
    nan_that_compares_false: ANY,
    ratio_masked_without_gradient: ('data', 'cell', 'dense', 'loss'),
    zero_by_zero_to_number: ('cell', 'dense', 'loss'),
    mean_of_those_that_are_numbers: FORWARD,
    extremes_of_those_that_are_numbers: ('dense',),
    share_that_is_finite: FORWARD,
    taken_from_beyond_the_end: FORWARD,
    sentinel_that_is_no_label: ('dense',),
    branch_not_taken: ('cell', 'dense', 'update'),
    one_of_many_branches: ('dense', 'loss'),
    loop_that_ends_before_zero: ('cell', 'loss'),
    loop_until_the_error_is_small: ('dense', 'update'),
    softmax_of_masked: FORWARD,
    log_softmax_of_masked: FORWARD,
    causal_attention: FORWARD,
    two_masks_that_overflow: FORWARD,
    softmax_where: ROWS,
    whole_row_masked_before: FORWARD,
    whole_row_masked_after: FORWARD,
    filtered_to_the_largest: ROWS,
    filtered_to_the_nucleus: ('dense',),
    largest_of_masked: FORWARD,
    largest_where: ('cell', 'dense'),
    place_of_the_largest_of_masked: ROWS,
    largest_in_a_window: FORWARD,
    running_largest: FORWARD,
    running_largest_in_pairs: ROWS,
    sorted_behind_infinities: ('dense',),
    largest_of_empty_groups: ('dense', 'loss'),
    beams_that_are_not_there_yet: ('dense',),
    logsumexp_of_masked: FORWARD,
    logsumexp_with_weights_of_zero: ROWS,
    logsumexp_of_nothing: ('dense', 'loss'),
    logaddexp_of_minus_infinity: FORWARD,
    logaddexp_of_two_minus_infinities: FORWARD,
    running_logsumexp: ('dense',),
    softmax_in_one_pass: ('cell', 'dense'),
    softmax_in_one_pass_over_masked_blocks: ('cell', 'dense'),
    connectionist_temporal_classification: ('dense',),
    saturated_gates: FORWARD,
    saturated_hard_gates: FORWARD,
    saturated_softplus: FORWARD,
    saturated_units: FORWARD,
    sigmoid_by_its_formula: ANY,
    overflow_that_is_clipped: ANY,
    binary_cross_entropy_of_large_logits: ('dense', 'loss'),
    cross_entropy_of_masked_logits: ('dense',),
    robust_losses: ('dense', 'loss'),
    subnormal_numbers: ANY,
    subnormal_gradients: ('dense', 'loss', 'update', 'cell backward'),
    gradients_that_underflow: ('loss', 'update', 'cell backward'),
    underflowing_exponential: FORWARD,
    near_zero: FORWARD,
    zero_times_its_logarithm: FORWARD,
    divergence_of_a_certainty: ('dense',),
    norm_of_zeros: ROWS,
    cosine_of_zeros: ROWS,
    normalised_constant_row: FORWARD,
    normalised_row_of_zeros: FORWARD,
    sinc_at_zero: FORWARD,
    powers_of_zero: FORWARD,
    mean_of_nothing: ('dense', 'loss'),
    dropped_out: FORWARD,
    drawn_by_gumbel: ('dense',),
    drawn_of_masked_logits: ROWS,
    truncated_noise: ROWS,
    half_precision: FORWARD,
    half_precision_that_overflows_and_saturates: FORWARD,
    half_precision_mask: FORWARD,
    guarded: ('update', 'cell backward'),
    nans_zeroed: ('update', 'cell backward'),
    clipped_by_norm_of_zeros: ('update', 'cell backward'),
    histogram_of_logarithms: ('update', 'cell backward'),
}
"""Ingredient -> the places where it is put."""


# Optimisers, at their first step, with gradients that are all zero: 0 / (0 + epsilon), or 0 / 0 that is discarded.


def without_gradient(x, hit):
    return 0 * x


OPTIMISERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    'adam': lambda: optax.adam(1e-2),
    'adamw with clipping': lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    'apply_if_finite': lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
    'zero_nans': lambda: optax.chain(optax.zero_nans(), optax.adam(1e-2)),
    'adaptive clipping': lambda: optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(1e-2)),
    'clipping by block': lambda: optax.chain(optax.clip_by_block_rms(1.0), optax.sgd(1e-2)),
    'rmsprop': lambda: optax.rmsprop(1e-2),
    'adagrad': lambda: optax.adagrad(1e-2),
    'adadelta': lambda: optax.adadelta(1e-2),
    'adafactor': lambda: optax.adafactor(1e-2),
    'amsgrad': lambda: optax.amsgrad(1e-2),
    'lamb': lambda: optax.lamb(1e-2),
    'lars': lambda: optax.lars(1e-2),
    'nadam': lambda: optax.nadam(1e-2),
    'yogi': lambda: optax.yogi(1e-2),
    'lion': lambda: optax.lion(1e-3),
    'novograd': lambda: optax.novograd(1e-2),
    'warmup from zero': lambda: optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 5, 20)),
    'accumulated': lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    'sign descent': lambda: optax.chain(optax.scale_by_sign(), optax.scale(-1e-3)),
}


# Around the step: what it is given and keeps.


def nan_in_padding(subject: faulty.Subject) -> faulty.Subject:
    """The data are NaN beyond their ends, and masked before use."""

    def step(state, batch):
        letters = jnp.where(batch['valid'], batch['letters'], 0)
        return subject.step(state, {**batch, 'letters': letters})

    def batch(time_step, example):
        made = subject.batch(time_step, example)
        valid = made['hit'] == 0
        return {**made, 'letters': np.where(valid, made['letters'], np.float32(np.nan)), 'valid': valid}

    return subject._replace(step=step, batch=batch)


def nan_in_targets(subject: faulty.Subject) -> faulty.Subject:
    """An example without targets, whose loss isn't counted."""

    def spoilt_targets(targets, example):
        targets = np.array(targets)
        targets[example] = np.nan
        return targets

    def step(state, batch):
        def clean(targets):
            return jnp.where(jnp.isnan(targets), 0, targets)

        if isinstance(batch, dict):
            return subject.step(state, {**batch, 'targets': clean(batch['targets'])})
        return subject.step(state, batch._replace(targets=clean(batch.targets)))

    def batch(time_step, example):
        made = subject.batch(time_step, example)
        if isinstance(made, dict):
            return {**made, 'targets': spoilt_targets(made['targets'], example)}
        return made._replace(targets=spoilt_targets(made.targets, example))

    return subject._replace(step=step, batch=batch)


def best_loss_from_infinity(subject: faulty.Subject) -> faulty.Subject:
    """For early stopping."""

    def step(state, batch):
        state, best, since = state
        state, record = subject.step(state, batch)
        better = record['loss'] < best
        best, since = jnp.minimum(best, record['loss']), jnp.where(better, 0, since + 1)
        return (state, best, since), {**record, 'best': best}

    return subject._replace(step=step, init=lambda: (subject.init(), jnp.float32(INF), jnp.int32(0)))


def average_from_nan(subject: faulty.Subject) -> faulty.Subject:
    """A running mean that has no value yet."""

    def step(state, batch):
        state, mean = state
        state, record = subject.step(state, batch)
        mean = jnp.where(jnp.isnan(mean), record['loss'], 0.9 * mean + 0.1 * record['loss'])
        return (state, mean), {**record, 'mean': mean}

    return subject._replace(step=step, init=lambda: (subject.init(), jnp.float32(jnp.nan)))


def step_skipped_if_bad(subject: faulty.Subject) -> faulty.Subject:
    """A guard that has nothing to do."""

    def step(state, batch):
        new, record = subject.step(state, batch)
        ok = jnp.isfinite(record['loss'])
        return jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, state), record

    return subject._replace(step=step)


def two_steps_in_a_loop(subject: faulty.Subject) -> faulty.Subject:
    def step(state, batch):
        return lax.scan(subject.step, state, jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), batch))

    return subject._replace(step=step)


def masked_inside_two_steps(subject: faulty.Subject) -> faulty.Subject:
    """The second batch is padding: its step is computed, is bad, and is dropped."""

    def step(state, batch):
        def body(state, at):
            batch, valid = at
            new, record = subject.step(state, batch)
            kept = jax.tree.map(lambda new, old: jnp.where(valid, new, old), new, state)
            return kept, jnp.where(valid, record['loss'], 0)

        nothing = jax.tree.map(
            lambda leaf: jnp.full_like(leaf, jnp.nan if leaf.dtype == jnp.float32 else 0), batch
        )
        batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), batch, nothing)
        state, losses = lax.scan(body, state, (batches, jnp.array([True, False])))
        return state, {'loss': jnp.sum(losses)}

    return subject._replace(step=step)


def logarithms_recorded(subject: faulty.Subject) -> faulty.Subject:
    """Perplexity and logarithms, kept finite."""

    def step(state, batch):
        state, record = subject.step(state, batch)
        loss = record['loss']
        told = jnp.log10(jnp.maximum(loss * 0, 1e-12)), jnp.exp(jnp.minimum(1e5 * loss, 20.0))
        careless = jnp.exp(1e5 * (1 + loss))
        return state, {**record, 'log': told[0], 'perplexity': told[1], 'sane': careless < 1e6}

    return subject._replace(step=step)


AROUND: dict[Callable[[faulty.Subject], faulty.Subject], tuple[str, ...]] = {
    nan_in_padding: ('plain', 'nnx', 'linen', 'haiku', 'equinox'),
    nan_in_targets: ('nnx', 'haiku', 'lstm'),
    best_loss_from_infinity: ('linen', 'equinox', 'gru'),
    average_from_nan: ('plain', 'haiku', 'stacked'),
    step_skipped_if_bad: ('nnx', 'equinox', 'lstm'),
    two_steps_in_a_loop: ('plain', 'gru'),
    masked_inside_two_steps: ('plain', 'haiku', 'lstm'),
    logarithms_recorded: ('linen', 'stacked'),
}
"""What is around a step -> whose steps it is put around."""


# Loss scaling is at home in two places; hence the pairs.

SCALE = 2.0**15


def scaled_up(x, hit):
    return x * SCALE


def scaled_down(x, hit):
    small = x / SCALE
    return jnp.where(jnp.all(jnp.isfinite(small)), small, 0)


def scaled_up_in_half_precision(x, hit):
    """Of float16 predictions."""
    return x.astype(jnp.float16).astype(jnp.float32) * SCALE


PAIRS: dict[str, tuple[tuple[str, Callable], ...]] = {
    'loss scaling': (('loss', scaled_up), ('update', scaled_down)),
    'loss scaling of float16': (('loss', scaled_up_in_half_precision), ('update', scaled_down)),
    'masked attention over masked words': (('data', nan_replaced), ('dense', softmax_of_masked)),
    'saturated cells and a vanishing gradient': (('cell', saturated_gates), ('loss', subnormal_gradients)),
}


# Steps of their own.


def padded_scan() -> faulty.Subject:
    """jaxrnn.scan spares what is masked, NaN and all."""
    names = ('kernel', 'bias', 'recurrent_kernel')

    def predict(params, xs, batch):
        weights = scan.Weights(*(params['lstm'][name] for name in names))
        _, last = scan.run(cells.lstm(cells.SIGMOID), weights, xs.swapaxes(0, 1), mask=batch['mask'])
        return last.h @ params['output']

    return _around_learn(
        predict,
        {
            'lstm': {'kernel': (27, 24), 'bias': (24,), 'recurrent_kernel': (6, 24)},
            'output': (6, 4),
        },
        nan_padded,
    )


def padded_rnn_of_nnx() -> faulty.Subject:
    """nnx.RNN with lengths, over inputs that are masked."""
    from flax import nnx

    graph, params, rest = nnx.split(
        nnx.RNN(nnx.LSTMCell(27, 4, rngs=nnx.Rngs(0)), return_carry=True), nnx.Param, ...
    )

    def predict(params, xs, batch):
        xs = jnp.where(batch['mask'].swapaxes(0, 1)[..., None], xs, 0)
        lengths = jnp.sum(batch['mask'], 0, dtype=jnp.int32)
        (_, h), _ = nnx.merge(graph, params, jax.tree.map(lambda leaf: leaf, rest))(xs, seq_lengths=lengths)
        return h

    return _around_learn(predict, params, nan_padded)


def attention_with_a_mask_in_the_batch() -> faulty.Subject:
    """0 and -inf, added to the scores of jax.nn.dot_product_attention."""

    def predict(params, xs, batch):
        heads = (xs @ params['inputs'])[:, :, None]  # [B, T, 1, E]
        values = jax.nn.dot_product_attention(heads, heads, heads, bias=batch['bias'])
        return jnp.mean(values[:, :, 0], 1)

    def batch(time_step, example):
        made = faulty.batch_of(time_step, example)
        valid = np.arange(faulty.T)[None] < 1 + np.arange(faulty.B)[:, None]
        bias = np.where(valid, 0, -np.inf)[:, None, None].astype(np.float32)
        return {**made, 'bias': np.broadcast_to(bias, (faulty.B, 1, faulty.T, faulty.T)).copy()}

    return _around_learn(predict, {'inputs': (27, 4)}, batch)


def causal_attention_of_a_library() -> faulty.Subject:
    def predict(params, xs, batch):
        heads = (xs @ params['inputs'])[:, :, None]
        return jnp.mean(jax.nn.dot_product_attention(heads, heads, heads, is_causal=True)[:, :, 0], 1)

    return _around_learn(predict, {'inputs': (27, 4)}, faulty.batch_of)


def learning_rate_on_plateau() -> faulty.Subject:
    """optax keeps the best value, infinite at first."""
    optimiser = optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(accumulation_size=1))

    def step(state, batch):
        params, opt_state = state

        def loss_of(params):
            return jnp.mean((jnp.mean(batch['letters'], 1) @ params['w'] - batch['targets']) ** 2)

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimiser.update(gradients, opt_state, params, value=loss)
        return (optax.apply_updates(params, updates), opt_state), {'loss': loss}

    def init():
        params = faulty.random_params({'w': (26, 4)})
        return params, optimiser.init(params)

    return faulty.Subject(step, init, faulty.batch_of, {})


def nan_padded(time_step: int, example: int) -> dict[str, np.ndarray]:
    """Words of several lengths, NaN beyond their ends, and mask [T, B]."""
    made = faulty.batch_of(time_step, example)
    mask = np.arange(faulty.T)[:, None] < 2 + np.arange(faulty.B)[None]
    letters = np.where(mask.T[:, :, None], made['letters'], np.float32(np.nan))
    return {**made, 'letters': letters, 'mask': mask}


def _around_learn(predict: Callable, shapes: Any, batch: Callable) -> faulty.Subject:
    def step(state, batch):
        params, opt_state, record = faulty.learn(predict, *state, batch)
        return (params, opt_state), record

    def init():
        is_shape = all(isinstance(leaf, int) for leaf in jax.tree.leaves(shapes))
        params = faulty.random_params(shapes) if is_shape else shapes
        return params, faulty.ADAM.init(params)

    return faulty.Subject(step, init, batch, {})


OF_THEIR_OWN = (
    padded_scan,
    padded_rnn_of_nnx,
    attention_with_a_mask_in_the_batch,
    causal_attention_of_a_library,
    learning_rate_on_plateau,
)


class Healthy(NamedTuple):
    """A train step, and what of it looks alarming."""

    subject: Callable[[], faulty.Subject]
    strikes: tuple[tuple[str, Callable], ...] = ()  # place, ingredient
    optimiser: Callable[[], optax.GradientTransformation] | None = None


@contextlib.contextmanager
def made(healthy: Healthy) -> Iterator[faulty.Subject]:
    """The step; to be traced while this lasts."""
    with contextlib.ExitStack() as stack:
        for place, function in healthy.strikes:
            stack.enter_context(faulty.strike_with(place, function))
        if healthy.optimiser is not None:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(faulty, 'ADAM', healthy.optimiser())
        yield healthy.subject()


OURS = ('lstm', 'gru', 'stacked')
NETWORKS = ('plain', 'nnx', 'linen', 'haiku', 'equinox', *OURS)
"""Whose loops are loops."""


def networks_with(place: str) -> Sequence[str]:
    return OURS if place == 'cell backward' else NETWORKS


def _all(everywhere: bool) -> Iterator[tuple[str, Healthy]]:
    turn = itertools.count()
    for function, places in INGREDIENTS.items():
        for place in places:
            networks = networks_with(place)
            for network in networks if everywhere else [networks[next(turn) % len(networks)]]:
                name = f'{function.__name__} in {place} of {network}'
                yield name, Healthy(faulty.SUBJECTS[network], ((place, function),))
    for optimiser, build in OPTIMISERS.items():
        for network in NETWORKS if everywhere else [NETWORKS[next(turn) % len(NETWORKS)]]:
            yield (
                f'{optimiser} of {network}',
                Healthy(faulty.SUBJECTS[network], (('loss', without_gradient),), build),
            )
    for around, networks in AROUND.items():
        for network in networks:
            yield f'{around.__name__} of {network}', Healthy(_put_around(around, network))
    for name, strikes in PAIRS.items():
        for network in NETWORKS if everywhere else ('plain', 'linen', 'stacked'):
            yield f'{name} of {network}', Healthy(faulty.SUBJECTS[network], strikes)
    for subject in OF_THEIR_OWN:
        yield subject.__name__, Healthy(subject)


def _put_around(around: Callable, network: str) -> Callable[[], faulty.Subject]:
    return lambda: around(faulty.SUBJECTS[network]())


STEPS: dict[str, Healthy] = dict(_all(everywhere=False))
"""Each ingredient in each of its places; whose step it is goes round."""


def everywhere_steps() -> dict[str, Healthy]:
    """Each ingredient in each of its places of every network."""
    return dict(_all(everywhere=True))


def not_finite(tree: Any) -> list[str]:
    """Paths of leaves that hold a NaN or an infinity."""
    return [
        jax.tree_util.keystr(path, simple=True, separator='/')
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) and not np.isfinite(np.asarray(leaf)).all()
    ]


TIME_STEP, EXAMPLE = 4, 3


def told(healthy: Healthy) -> tuple[list[str], trace.TraceReport]:
    """Outputs that aren't finite, and what a trace tells of the step."""
    with made(healthy) as subject:
        state, batch = subject.init(), subject.batch(TIME_STEP, EXAMPLE)
        outputs = jax.jit(subject.step)(state, batch)
        return not_finite(outputs), trace.first_bad(subject.step, state, batch)


LATER = {
    'data': ('dense', 'loss'),
    'cell': ('loss', 'dense'),
    'dense': ('loss',),
    'loss': ('update',),
    'cell backward': ('update',),
    'update': ('loss', 'dense'),
}
"""Where an ingredient is -> where a fault is planted beside it, whose NaN doesn't meet the ingredient before the
backward pass, or the update."""


ONCE = (nan_in_padding, nan_in_targets, best_loss_from_infinity, average_from_nan, step_skipped_if_bad)
"""What is around a step that is done once."""


def faults_beside(steps: dict[str, Healthy]) -> dict[str, faulty.Fault]:
    """For each step with one ingredient, or one thing around it, a fault that must be named although that looks
    alarming."""
    turn, found = itertools.count(), {}
    for name, healthy in steps.items():
        is_around = name.split(' ')[0] in {around.__name__ for around in ONCE}
        if not is_around and (len(healthy.strikes) != 1 or healthy.optimiser is not None):
            continue
        network, number = name.rsplit(' ', 1)[-1], next(turn)
        places = ('loss',) if is_around else LATER[healthy.strikes[0][0]]
        place = places[number % len(places)]
        kinds = [kind for kind in faulty.KINDS if faulty.applies(network, place, kind)]
        found[name] = faulty.Fault(network, place, kinds[number % len(kinds)], TIME_STEP, (EXAMPLE,))
    return found


def missed_beside(healthy: Healthy, fault: faulty.Fault) -> dict[str, tuple[Any, Any]]:
    """What a trace says otherwise than it should of the fault."""
    with made(healthy) as subject, pytest.MonkeyPatch.context() as patch:
        patch.setattr(faulty, 'subject_of', lambda network: subject)
        patch.setattr(faulty, 'init_of', lambda network: subject.init())
        return faulty.missed(fault)
