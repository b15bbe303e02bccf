"""How a fault gets into a run: by its setting, a batch, or the state at one step; and what is then true."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.foreign import twin
from benchmarks.foreign.common import Program, Run, Setting

ANY = frozenset()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Truth:
    """What may be said of a run. An empty set, or None: it isn't judged."""

    sick: bool = True
    needed: bool = True  # a symptom must be told; otherwise silence is as right
    steps: tuple[int, int] = (0, 0)  # it began within; both inclusive
    kinds: frozenset[str] = ANY
    passes: frozenset[str] = ANY
    code: tuple[str, ...] = ()  # the line that is named has one of these
    leaf: str = ''  # what of the batch or the state must be named
    examples: tuple[int, ...] | None = None
    causes: frozenset[str] = ANY


HEALTHY = Truth(sick=False, needed=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planted:
    """A run with its fault, and what is true of it."""

    program: Program
    fault: str
    at: int
    size: str
    steps: int
    run: Run
    truth: Truth
    changes: tuple[tuple[str, str, Run], ...] = ()  # name, what it points to, the run under it


@dataclasses.dataclass(frozen=True)
class Draw:
    """What is drawn for a fault: everything random comes from rng."""

    program: Program
    rng: np.random.Generator
    setting: Setting
    steps: int
    at: int

    def example(self) -> int:
        return int(self.rng.integers(self.setting.batch_size))

    def between(self, low: float, high: float) -> float:
        """Evenly by magnitude, with three digits."""
        return float(f'{np.exp(self.rng.uniform(np.log(low), np.log(high))):.3g}')

    def choose(self, *values):
        return values[self.rng.integers(len(values))]


class Counted(NamedTuple):
    inner: Any
    count: jax.Array


def in_state(run: Run, at: int, change: Callable) -> Run:
    """The state that a step starts from is changed, once; a counter beside the state says when."""

    def init():
        return Counted(run.init(), jnp.int32(0))

    def step(state, batch):
        hit = state.count == at
        inner = jax.tree.map(lambda new, old: jnp.where(hit, new, old), change(state.inner), state.inner)
        inner, record = run.step(inner, batch)
        return Counted(inner, state.count + 1), record

    return Run(step, run.batch_at, init)


def in_batches(run: Run, hit: Callable[[int], bool], path: tuple, change: Callable) -> Run:
    """A leaf of some batches is changed."""

    def batch_at(k):
        batch = run.batch_at(k)
        return edited(batch, path, lambda leaf: change(leaf, k)) if hit(k) else batch

    return run._replace(batch_at=batch_at)


def edited(batch, path: tuple, change: Callable):
    if not path:
        return change(np.array(batch))
    if isinstance(batch, tuple):
        place = int(path[0])
        return (*batch[:place], change(np.array(batch[place])), *batch[place + 1 :])
    return {**batch, path[0]: change(np.array(batch[path[0]]))}


def row(program: Program, example: int) -> tuple:
    """Index of an example, time first or not."""
    return (slice(None), example) if program.axis else (example,)


def moments_of(state, change: Callable):
    """Adam's state, wherever it lies in a state."""
    return jax.tree.map(
        lambda node: change(node) if isinstance(node, optax.ScaleByAdamState) else node,
        state,
        is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState),
    )


def parameters(state) -> list[str]:
    """Paths of the leaves that are trained."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    for prefix in ('.params', "['params']", '[0]', "['w']", '.w', '.rows'):
        found = [name for name in names if name.startswith(prefix)]
        if found:
            return found
    raise ValueError(f'no parameters among {names}')


def with_leaf(state, name: str, change: Callable):
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: change(leaf) if jax.tree_util.keystr(path) == name else leaf, state
    )


class Seen(NamedTuple):
    """What a run did beside its twin."""

    first: (
        int | None
    )  # the first step whose loss is far above the twin's, or after which the state isn't finite
    broken: int | None  # the first step after which the state isn't finite
    lasting: bool  # it did not come back within 60 steps
    losses: np.ndarray
    twin: np.ndarray


def seen(draw: Draw, run: Run, clean: Run) -> Seen:
    losses, broken = twin.losses(draw.program, run, draw.steps)
    healthy, _ = twin.losses(draw.program, clean, draw.steps)
    away = np.flatnonzero(twin.away(losses, healthy))
    firsts = [k for k in (away[0] if len(away) else None, broken) if k is not None]
    lasting = broken is not None or len(away) > 60 or (len(away) > 0 and away[-1] >= draw.steps - 10)
    return Seen(min(map(int, firsts), default=None), broken, bool(lasting), losses, healthy)
