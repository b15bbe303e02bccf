"""What the programs share: their settings, how one is described, and a few lines that people write again and again."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


def constant(count):
    """A schedule: times the program's own rate."""
    del count
    return 1.0


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a program is made with; a fault, or a change that mends it, is another setting."""

    seed: int = 0
    batch_size: int = 16
    rate: float = 1.0  # times the program's own
    schedule: Callable = constant
    clip: float = 0.0  # global norm of the gradient; 0: none
    epsilon: float = 1e-8
    moments: str = 'float32'
    clip_after: float = 0.0  # each element of Adam's update, in the wrong place
    half: bool = True  # of programs in half precision
    flaw: str = ''  # a mistake in the code, by a name that the program knows

    def rate_of(self, base: float) -> Callable:
        return lambda count: base * self.rate * self.schedule(count)

    def rng(self, step: int) -> np.random.Generator:
        """Of a batch: a pure function of the step."""
        return np.random.default_rng((self.seed, int(step)))

    @property
    def key(self) -> jax.Array:
        return jax.random.key(self.seed)

    @property
    def floor(self) -> float:
        """Under a denominator; what was forgotten where it is 0."""
        return 0.0 if self.flaw in ('unguarded', 'root') else 1e-6

    @property
    def units(self) -> bool:
        """Whether rows of the input are brought to one length, by those that need not."""
        return self.flaw in ('unguarded', 'unguarded, mended')


class Run(NamedTuple):
    """What the debugger is handed."""

    step: Callable
    batch_at: Callable
    init: Callable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A program in the style of public training code, and where faults can be planted in it."""

    name: str
    make: Callable[[Setting], Run]
    loss: tuple = ('loss',)  # where the record has it; () for a bare scalar
    inputs: tuple | None = None  # path of a float leaf of the batch, one row an example
    targets: tuple | None = None  # of the leaf that is multiplied
    labels: tuple | None = None  # of a leaf whose rows can be shuffled
    ids: tuple | None = None  # of a leaf of indices into a table that answers an index beyond it with NaN
    zeros: tuple | None = None  # of the leaf that must not be zero
    axis: int = 0  # of the examples
    code: dict[str, tuple[str, ...]] = dataclasses.field(
        default_factory=dict
    )  # flaw -> texts of which the line that breaks has one
    relu_bias: str = ''  # path of a bias before a relu, as jax.tree_util.keystr has it
    kinds: tuple[str, ...] = ()  # faults that can be planted, by name
    guarded: bool = False  # what is not finite is skipped
    rate_limits: tuple[float, float] = (0.3, 1.5)  # within which it trains well
    falls: float = 0.6  # a healthy run ends below this share of where it began
    half: bool = False
    held_out: bool = False
    updates_every: int = 1


def tidy(gradients, s: Setting):
    """Clipped, if the setting says so; there is no state, so that a run can be continued with it."""
    if not s.clip:
        return gradients
    return optax.clip_by_global_norm(s.clip).update(gradients, optax.EmptyState())[0]


def adam(s: Setting, base: float, b2: float = 0.999, decay: float = 0.0, schedule=constant):
    """Adam, or AdamW, with what can be got wrong about it."""
    parts = [optax.scale_by_adam(b2=b2, eps=s.epsilon)]
    if s.clip_after:
        parts.append(optax.clip(s.clip_after))
    if decay:
        parts.append(optax.add_decayed_weights(decay))
    parts.append(optax.scale_by_learning_rate(lambda count: schedule(count) * s.rate_of(base)(count)))
    chain = optax.chain(*parts)
    return chain if s.moments == 'float32' else in_dtype(chain, s.moments)


def in_dtype(chain, dtype: str):
    """Its moments kept in few digits."""

    def cast(state, to):
        return jax.tree.map(
            lambda node: (
                node._replace(mu=optax.tree.cast(node.mu, to), nu=optax.tree.cast(node.nu, to))
                if isinstance(node, optax.ScaleByAdamState)
                else node
            ),
            state,
            is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState),
        )

    def update(updates, state, params=None):
        updates, state = chain.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(chain.init(params), dtype), update)


def unit(x, floor: float):
    """Rows of length 1."""
    return x / jnp.maximum(jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True)), floor)


def cross_entropy(logits, labels, s: Setting):
    """Of each example; [..., C] and [...]. Written out by hand it overflows where a logit is above 88."""
    if s.flaw == 'naive':
        weights = jnp.exp(logits)
        p = weights / weights.sum(-1, keepdims=True)
        return -jnp.log(jnp.take_along_axis(p, labels[..., None], -1)[..., 0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def initialiser(s: Setting, default: Any) -> Any:
    """Of kernels: all units alike, if that is the mistake."""
    if s.flaw == 'identical':
        return lambda key, shape, dtype=jnp.float32, *rest: jnp.full(shape, 0.1, dtype)
    return default


def one_hot(ids, size: int) -> np.ndarray:
    return np.eye(size, dtype=np.float32)[ids]


def prototypes(seed: int, classes: int, features: int) -> np.ndarray:
    return np.random.default_rng(seed + 1000).normal(size=(classes, features)).astype(np.float32)
