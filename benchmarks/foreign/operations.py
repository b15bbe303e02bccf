"""Operations that random steps are made of: each takes [B, D] and a weight [D, D], and gives [B, D]."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

D = 4


def matmul(x, w):
    return x @ w


def einsum(x, w):
    return jnp.einsum('bi,ji->bj', x, w)


def scan(x, w):
    """Over columns, with a carry and what it collects."""
    _, out = lax.scan(lambda h, c: (jnp.tanh(h + c * w[0, 0]), h + c), jnp.zeros_like(x[:, 0]), x.T)
    return out.T


def scan_float32(x, w):
    """With a carry that is written down in float32."""
    h, _ = lax.scan(
        lambda h, c: (h * 0.5 + c.astype(jnp.float32), None), jnp.zeros(x.shape[0], jnp.float32), x.T
    )
    return x * w[0] + h[:, None].astype(x.dtype)


def scan_over_nothing(x, w):
    """No inputs, a tuple for a carry, unrolled in part."""
    (h, _), out = lax.scan(
        lambda c, _: ((c[0] @ w, c[1] + 1), c[0].sum(-1)), (x, 0), None, length=3, unroll=2
    )
    return jnp.tanh(h) + out.mean(0)[:, None]


def nested_scan(x, w):
    def outer(h, c):
        h, _ = lax.scan(lambda g, d: (g + d * w[0, 1], None), h, jnp.stack([c, -c]))
        return h, h

    return lax.scan(outer, x[:, 0], x.T)[1].T


def reverse_scan(x, w):
    return lax.scan(lambda h, c: (h * w[1, 1] + c, h), x[:, 0], x.T, reverse=True)[1].T


def fori(x, w):
    return lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ w) + i * 0, x)


def while_loop(x, w):
    """A number of turns that depends on the data; nothing is differentiated through it."""
    still = lax.stop_gradient(x).astype(jnp.float32)
    n, scale = lax.while_loop(
        lambda c: (c[1] > 0.5) & (c[0] < 6), lambda c: (c[0] + 1, c[1] / 2), (0, jnp.abs(still).max())
    )
    return x * (scale + n * 0).astype(x.dtype) + w[0] * 0


def cond(x, w):
    return lax.cond(x.sum() > 0, lambda x: x @ w, lambda x: jnp.sin(x), x)


def switch(x, w):
    index = jnp.clip(jnp.abs(x.astype(jnp.float32).sum()), 0, 9).astype(jnp.int32) % 3
    return lax.switch(index, [lambda x: x @ w, lambda x: x * 0.5, jnp.tanh], x)


def cond_in_scan(x, w):
    return lax.scan(
        lambda h, c: (lax.cond(c.sum() > 0, lambda: h + c, lambda: h * w[0, 0]), h), x[:, 0], x.T
    )[1].T


def reshape(x, w):
    return (x.reshape(-1) * 2).reshape(2, -1).reshape(x.shape[::-1]).T @ w


def micro_batches(x, w):
    parts = x.reshape(2, -1, x.shape[-1])
    return lax.map(lambda part: part @ w, parts).reshape(x.shape)


def sort(x, w):
    return jnp.sort(x, axis=-1) * w[0]


def sort_examples(x, w):
    return x[jnp.argsort(x[:, 0])] + w[0]


def gather(x, w):
    return jnp.take_along_axis(x, jnp.argsort(-x, axis=-1), -1) @ w


def top_k(x, w):
    values, at = lax.top_k(x, D)
    return values * w[0] + at.astype(x.dtype)


def table(x, w):
    """Indices into a table; one that is too large is NaN."""
    at = jnp.nan_to_num(jnp.abs(x[:, 0]).astype(jnp.float32), posinf=9, neginf=0).astype(jnp.int32)
    return x + jnp.take(w, at % D, axis=0)


def scatter(x, w):
    at = jnp.arange(x.shape[0]) % 3
    return x.at[at].add(x * w[0]).at[:, 1].mul(0.5)


def segments(x, w):
    sums = jax.ops.segment_sum(x, jnp.arange(x.shape[0]) % 2, num_segments=2)
    return x + sums[jnp.arange(x.shape[0]) % 2] * w[0]


def dynamic_slice(x, w):
    start = jnp.int32(jnp.isfinite(x[0, 0]))
    return lax.dynamic_update_slice(x, lax.dynamic_slice(x, (start, 0), (1, D)) @ w, (0, 0))


def pad_and_cut(x, w):
    return jnp.pad(x, ((1, 1), (0, 2)))[1:-1, 1 : D + 1] @ w


def roll(x, w):
    return jnp.roll(x, 1, axis=0) + jnp.flip(x, -1) * w[0]


def norm(x, w):
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + jnp.asarray(1e-3, x.dtype)) @ w


def layer_norm(x, w):
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + jnp.asarray(1e-2, x.dtype)) * w[0]


def batch_norm(x, w):
    return (x - x.mean(0)) / (x.std(0) + jnp.asarray(0.1, x.dtype)) + w[0]


def softmax(x, w):
    return jax.nn.softmax(x @ w)


def attention(x, w):
    scores = (x @ w) @ x.T / 2
    mask = jnp.tril(jnp.ones(scores.shape, bool))
    return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)) @ x


def relu(x, w):
    return jax.nn.relu(x @ w + w[0])


def gelu(x, w):
    return jax.nn.gelu(x) @ w


def log_exp(x, w):
    return jnp.log1p(jnp.exp(jnp.clip(x, -10, 10))) * w[0]


def logarithm(x, w):
    """Of what may be negative, under a where that doesn't help its gradient."""
    return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1)), 0) + w[0]


def square_root(x, w):
    return jnp.sqrt(jnp.abs(x) + jnp.asarray(1e-3, x.dtype)) * w[1]


def cumulative(x, w):
    return jnp.cumsum(x, -1) * w[0] + lax.cummax(x, axis=0)


def associative(x, w):
    return lax.associative_scan(jnp.add, x * w[0], axis=1)


def convolution(x, w):
    out = lax.conv_general_dilated(x[:, None], w[:1][None], (1,), 'SAME')
    return out[:, 0]


def solve(x, w):
    matrix = w.astype(jnp.float32) @ w.astype(jnp.float32).T + jnp.eye(D)
    return jnp.linalg.solve(matrix, x.astype(jnp.float32).T).T.astype(x.dtype)


def cholesky(x, w):
    matrix = w.astype(jnp.float32) @ w.astype(jnp.float32).T + 2 * jnp.eye(D)
    return x @ jnp.linalg.cholesky(matrix).astype(x.dtype)


def eigenvalues(x, w):
    values = jnp.linalg.eigvalsh(w.astype(jnp.float32) + w.astype(jnp.float32).T + jnp.diag(jnp.arange(4.0)))
    return x * values.astype(x.dtype)


def triangular(x, w):
    matrix = (jnp.tril(w) + 2 * jnp.eye(D, dtype=w.dtype)).astype(jnp.float32)
    return jax.scipy.linalg.solve_triangular(matrix, x.astype(jnp.float32).T, lower=True).T.astype(x.dtype)


def fourier(x, w):
    return jnp.abs(jnp.fft.rfft(x.astype(jnp.float32), n=6)).astype(x.dtype) * w[0]


def bits(x, w):
    n = jnp.clip(jnp.nan_to_num(x.astype(jnp.float32)), -9, 9).astype(jnp.int32)
    return x + (((n << 2) ^ 5) & 3).astype(x.dtype) * w[0]


def mapped(x, w):
    return jax.vmap(lambda row: jnp.tanh(w @ row))(x)


def jitted(x, w):
    return jax.jit(lambda x: x @ w + 1)(x)


def rematerialised(x, w):
    return jax.checkpoint(lambda x: jnp.sin(x @ w))(x)


@jax.custom_vjp
def straight(x):
    return jnp.round(x)


straight.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


def custom_gradient(x, w):
    return straight(x) * w[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def leaky(x, slope):
    return jnp.where(x > 0, x, x * slope)


@leaky.defjvp
def _(slope, primals, tangents):
    return leaky(primals[0], slope), jnp.where(primals[0] > 0, 1, slope).astype(tangents[0].dtype) * tangents[
        0
    ]


def custom_tangent(x, w):
    return leaky(x @ w, 0.1)


def noise(x, w):
    return x + 0.1 * jax.random.normal(jax.random.key(7), x.shape, x.dtype) * w[0]


def barrier(x, w):
    return lax.optimization_barrier(x * w[0])


def reductions(x, w):
    return x * w[0] + (x.max(0) - x.min(0)) + jnp.prod(jnp.tanh(x), -1, keepdims=True) + jnp.median(x)


ALL = {
    function.__name__: function
    for function in (
        *(
            matmul,
            einsum,
            scan,
            scan_float32,
            scan_over_nothing,
            nested_scan,
            reverse_scan,
            fori,
            while_loop,
            cond,
        ),
        *(
            switch,
            cond_in_scan,
            reshape,
            micro_batches,
            sort,
            sort_examples,
            gather,
            top_k,
            table,
            scatter,
            segments,
        ),
        *(
            dynamic_slice,
            pad_and_cut,
            roll,
            norm,
            layer_norm,
            batch_norm,
            softmax,
            attention,
            relu,
            gelu,
            log_exp,
        ),
        *(
            logarithm,
            square_root,
            cumulative,
            associative,
            convolution,
            solve,
            cholesky,
            eigenvalues,
            triangular,
        ),
        *(
            fourier,
            bits,
            mapped,
            jitted,
            rematerialised,
            custom_gradient,
            custom_tangent,
            noise,
            barrier,
            reductions,
        ),
    )
}
