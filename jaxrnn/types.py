"""The words that all of jaxrnn shares: axis letters, the step contract, the user's error.

Axes, in every docstring and field comment:

    T  time steps (letters of a padded word)     B  examples in a batch
    D  size of the layer's input                 H  hidden width
    V  letters of the alphabet                   E  size of a word vector
    N  words in a data set                       S  steps of a run
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxrnn.errors import UserError as UserError

Array = jax.Array
ArrayLike = jax.typing.ArrayLike
Tree = Any
"""A pytree of arrays."""

Record = Mapping[str, Array]
"""What one step tells its observer: name -> scalar."""


class Step(Protocol):
    """A train step: a pure function of the state and the batch (design, section 2).

    State is what the next step needs; the record is what an observer needs.
    """

    def __call__(self, state: Tree, batch: Tree, /) -> tuple[Tree, Record]: ...

    def __hash__(self) -> int: ...  # it is compiled once, and known again


class Staged:
    """A step in two parts, so that one of another `finish` is compiled without compiling `begin` anew.

    Args:
        begin: state, batch -> what `finish` needs, as the gradients.
        finish: state, batch, what `begin` gave -> next state and record.
    """

    def __init__(
        self,
        begin: Callable[[Tree, Tree], Tree],
        finish: Callable[[Tree, Tree, Tree], tuple[Tree, Record]],
    ):
        self.begin, self.finish = begin, finish

    def __call__(self, state: Tree, batch: Tree, /) -> tuple[Tree, Record]:
        return self.finish(state, batch, self.begin(state, batch))


class BatchAt(Protocol):
    """The batch of a step: a pure function of the step's number, counted from 0."""

    def __call__(self, step: int, /) -> Tree: ...


class Signal(NamedTuple):
    """A number in the record that warns of a symptom."""

    name: str  # of the field
    formula: str
    # 'highest' or 'lowest' over the tensors, or the layers; 'farthest' from 1; 'last' of the layers; 'whole': of all
    # tensors as one
    worst: str
    alarm: str  # in the language of `detect.rule_language`; '' where the number is to be read beside others
    means: str
    source: str
    cost: str
    lead: str  # steps from alarm to symptom


Series = Mapping[str, np.ndarray]
"""Records of consecutive steps: name -> [S]."""
