"""A door for flax.nnx: objects that a train step changes in place, as the state of a pure step.

What a step needs, and what it leaves, is in the variables of its objects. So a state is their values. A replay makes
objects of a state, lets the person's own train step change them, and takes the state from them again.
"""

import functools
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrnn.record import Recorder
from jaxrnn.types import Step, Tree, UserError

LOOK_EVERY = 100
"""Steps between looks whether the objects still have the variables that they began with."""


class Given(NamedTuple):
    """What a step was called with, where that is more than one batch."""

    arguments: tuple[Any, ...]  # after the objects
    keywords: dict[str, Any]
    changed: dict[str, Any]  # by path: what the loop changed in the objects since the step before


class Objects:
    """A view of nnx objects as one state.

    Args:
        objects: in the order in which the train step takes them: modules, optimisers, metrics, random streams.

    Raises:
        UserError: one that isn't an object of nnx.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> import optax
    >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    >>> objects = Objects(model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param))
    >>> sorted(objects.state()), sorted(objects.state()['model'])
    (['model', 'optimizer'], ['bias', 'kernel'])
    """

    def __init__(self, *objects: Any):
        for number, each in enumerate(objects):
            if not nnx.graphlib.is_graph_node(each):
                raise UserError(
                    f'objects: a {type(each).__name__} found at place {number}, an object of nnx expected, as a '
                    'module; what else the step takes belongs to the batch'
                )
        self.objects = objects
        names = _names(objects)
        flat = _flat(objects)
        tree = _tree(objects, names, flat)
        in_tree, self._structure = jax.tree.flatten(tree, is_leaf=_is_place)
        self._order = [place.number for place in in_tree]  # of each leaf in the tree its number in `flat`
        self._paths = [path for path, _ in flat]
        self._names = ['/'.join(map(str, (names[path[0]], *path[1:]))) for path in self._paths]
        self._graph = nnx.graphdef(objects)
        self._averages = _averages(objects, names, self._paths)
        self._variables = [leaf for _, leaf in flat]
        self._stay = all(isinstance(leaf, nnx.Variable) for leaf in self._variables)

    def state(self) -> Tree:
        """The values of all variables now: dictionaries by the objects' kinds and the variables' names, an optimiser's
        as optax has it."""
        return self.state_of(self.values())

    def update(self, state: Tree) -> None:
        """Puts a state into the objects."""
        nnx.update(self.objects, self._as_nnx(self._values_of(state)))

    def pure(self, train_step: Callable[..., Any]) -> Step:
        """A pure step, `(state, batch) -> (state, metrics)`, that calls the train step, compiled as it is.

        What the train step returns is its record, without what is no scalar; with the average that a metric has of the
        step alone.

        Args:
            train_step: `(*objects, batch)`, changes the objects in place.
        """

        def step(state: Tree, batch: Tree) -> tuple[Tree, Tree]:
            given = _given_of(batch)
            values = self._with(self._values_of(state), given.changed)
            objects = nnx.merge(self._graph, self._as_nnx(values))
            out = train_step(*objects, *given.arguments, **given.keywords)
            after = self._values_in(objects)
            return self.state_of(after), self.record(out, values, after)

        return step

    def recorder(self, directory: str | os.PathLike, **options: Any) -> 'ObjectsRecorder':
        """A recorder of what a loop does with the objects; of a run that is there already, the objects get the state.

        Args:
            directory: of the run.
            options: of `jaxrnn.Recorder`.
        """
        return ObjectsRecorder(self, Recorder(directory, self.state(), **options))

    def values(self) -> list[Any]:
        """Of the variables, in the order of nnx."""
        if not self._stay:
            return self._values_in(self.objects)
        return [variable.get_raw_value() for variable in self._variables]

    def look(self) -> None:
        """Whether a step left the variables in their places, or puts new ones there, of which each is to be found anew.

        Raises:
            UserError: there are others than before.
        """
        flat = _flat(self.objects)
        self._check([path for path, _ in flat])
        self._stay = self._stay and all(
            now is before for (_, now), before in zip(flat, self._variables, strict=True)
        )

    def changes(self, before: Sequence[Any], now: Sequence[Any]) -> dict[str, Any]:
        """What isn't the array that it was, by path."""
        return {
            name: value for name, value, was in zip(self._names, now, before, strict=True) if value is not was
        }

    def record(self, out: Any, before: Sequence[Any], after: Sequence[Any]) -> dict[str, Any]:
        """What a step says of itself, of what it returned and of the averages that it went into."""
        if jax.tree_util.treedef_is_leaf(jax.tree.structure(out)):
            out = {'loss': out}
        returned = {
            jax.tree_util.keystr(path, simple=True, separator='/'): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(out)
            if _is_scalar(leaf)
        }
        sums = {name: (before[t], before[n], after[t], after[n]) for name, (t, n) in self._averages.items()}
        return {**(_of_step(sums) if sums else {}), **returned}

    def state_of(self, values: Sequence[Any]) -> Tree:
        """The state that has these values."""
        return jax.tree.unflatten(self._structure, [values[number] for number in self._order])

    def _values_of(self, state: Tree) -> list[Any]:
        try:
            leaves = self._structure.flatten_up_to(state)  # type: ignore[attr-defined]
        except ValueError as error:
            raise UserError(
                f"state: another structure found than the objects' ({str(error).splitlines()[0]}); give a state that "
                'Objects.state made, of the same objects'
            ) from None
        placed = dict(zip(self._order, leaves, strict=True))
        return [placed[number] for number in range(len(leaves))]

    def _with(self, values: Sequence[Any], changed: dict[str, Any]) -> list[Any]:
        return [changed.get(name, value) for name, value in zip(self._names, values, strict=True)]

    def _as_nnx(self, values: Sequence[Any]) -> nnx.State:
        pairs = zip(self._paths, self._variables, values, strict=True)
        return nnx.from_flat_state(
            [
                (path, leaf.replace(value) if isinstance(leaf, nnx.Variable) else value)
                for path, leaf, value in pairs
            ]
        )

    def _values_in(self, objects: Any) -> list[Any]:
        flat = _flat(objects)
        self._check([path for path, _ in flat])
        return [leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf for _, leaf in flat]

    def _check(self, paths: Sequence[Any]) -> None:
        if paths != self._paths:
            other = {*paths} ^ {*self._paths}
            named = '/'.join(map(str, min(other, key=str))) if other else 'their order'
            raise UserError(
                f'objects: a step leaves other variables than it begins with ({named}); make Objects after what makes '
                'them, as a first call of the model, or remove what the step adds (nnx.pop)'
            )


class ObjectsRecorder:
    """Records what a loop does with nnx objects; `Objects.recorder` makes it."""

    def __init__(self, objects: Objects, recorder: Recorder):
        self._objects, self._recorder = objects, recorder
        if recorder.resumed:
            objects.update(recorder.state)
        self._last = objects.values()

    @property
    def step(self) -> int:
        """The number of the next step: how many were taken, in all."""
        return self._recorder.step

    def around(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """The train step, called and answering as it is, that records itself.

        What the loop changes in the objects between two steps is kept with the batch: metrics that are reset, a rate
        that is set.

        Args:
            train_step: `(*objects, batch)`, or without the objects where it has them already, as of nnx.cached_partial.

        Raises:
            UserError: as `jaxrnn.Recorder`; arguments that don't begin with the objects in their order.
        """

        objects = self._objects
        self._recorder.replayed_by(objects.pure(train_step))

        @functools.wraps(train_step)
        def recorded(*arguments: Any, **keywords: Any) -> Any:
            before, out = objects.values(), None
            batch = self._batch(arguments, keywords, objects.changes(self._last, before))

            def step(state: Tree, batch: Tree) -> tuple[Tree, Tree]:
                nonlocal out
                out = train_step(*arguments, **keywords)
                if self.step % LOOK_EVERY == 0:
                    objects.look()
                self._last = objects.values()
                return objects.state_of(self._last), objects.record(out, before, self._last)

            self._recorder.around(step)(None, batch)
            return out

        return recorded

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._recorder.__exit__(kind, error, where)

    def close(self) -> None:
        """As of `jaxrnn.Recorder`."""
        self._recorder.close()

    def _batch(self, arguments: Sequence[Any], keywords: dict[str, Any], changed: dict[str, Any]) -> Any:
        """What a replay is to be given: the batch as it is, if nothing else is needed."""
        ours = self._objects.objects
        first = [nnx.graphlib.is_graph_node(each) for each in arguments].count(True)
        if first and (first != len(ours) or any(a is not b for a, b in zip(arguments, ours, strict=False))):
            found = ', '.join(type(each).__name__ for each in arguments[:first])
            expected = ', '.join(type(each).__name__ for each in ours)
            raise UserError(
                f'around: a step of {found} found, of {expected} expected, the very objects that Objects was made of, '
                'in their order'
            )
        given = Given(tuple(arguments[first:]), keywords, changed)
        alone = len(given.arguments) == 1 and not keywords and not given.changed
        return given.arguments[0] if alone else given


class _Place(NamedTuple):
    """Where the value of a leaf stands."""

    number: int


def _is_place(node: Any) -> bool:
    return isinstance(node, _Place)


def _flat(objects: Any) -> list[tuple[tuple[Any, ...], Any]]:
    return list(nnx.to_flat_state(nnx.state(objects)))


_KINDS = ((nnx.Optimizer, 'optimizer'), (nnx.Metric, 'metrics'), (nnx.Rngs, 'rngs'), (object, 'model'))


def _names(objects: Sequence[Any]) -> list[str]:
    """What they are called in a state: by their kind, those after the first of a kind with a number."""
    names: list[str] = []
    for each in objects:
        name = next(name for kind, name in _KINDS if isinstance(each, kind))
        count = sum(other.split('_')[0] == name for other in names)
        names.append(f'{name}_{count + 1}' if count else name)
    return names


def _tree(objects: Sequence[Any], names: Sequence[str], flat: Sequence[tuple[tuple[Any, ...], Any]]) -> Tree:
    """Dictionaries with the place of each leaf; optax's own tuples where an optimiser has them, by whose fields its
    means of gradients are known."""
    places = {id(leaf): _Place(number) for number, (_, leaf) in enumerate(flat)}
    tree: dict[str, Any] = {name: {} for name in names}
    for number, (path, _) in enumerate(flat):
        node = tree[names[path[0]]]
        for key in path[1:-1]:
            node = node.setdefault(str(key), {})
        node[str(path[-1])] = _Place(number)
    for name, each in zip(names, objects, strict=True):
        if isinstance(each, nnx.Optimizer):
            tree[name]['opt_state'] = _of_optax(each.opt_state, places)
    return tree


def _of_optax(opt_state: Any, places: dict[int, _Place]) -> Tree:
    def of(node: Any) -> Any:
        if isinstance(node, nnx.State):
            return {str(key): jax.tree.map(of, child, is_leaf=_is_node) for key, child in node.items()}
        return places[id(node)]

    return jax.tree.map(of, opt_state, is_leaf=_is_node)


def _is_node(node: Any) -> bool:
    return isinstance(node, nnx.State | nnx.Variable)


def _averages(
    objects: Sequence[Any], names: Sequence[str], paths: Sequence[tuple[Any, ...]]
) -> dict[str, tuple[int, int]]:
    """Of each metric that is an average, by its name, where its total and its count stand."""
    at = {path: number for number, path in enumerate(paths)}
    found = {}
    for where, node in nnx.iter_graph(tuple(objects)):
        path: tuple[Any, ...] = tuple(where)
        if isinstance(node, nnx.metrics.Average) and (*path, 'total') in at:
            name = '/'.join(map(str, (names[path[0]], *path[1:])))
            found[name] = at[*path, 'total'], at[*path, 'count']
    return found


@jax.jit
def _of_step(sums: dict[str, tuple[Any, ...]]) -> dict[str, jax.Array]:
    """The average of one step alone, of the totals and counts before and after it."""
    return {name: (after - before) / (n - m) for name, (before, m, after, n) in sums.items()}


def _is_scalar(leaf: Any) -> bool:
    return isinstance(leaf, bool | int | float) or (
        isinstance(leaf, jax.Array) and leaf.size == 1 and jnp.issubdtype(leaf.dtype, jnp.number)
    )


def _given_of(batch: Tree) -> Given:
    """Also of one that was read from a disk, which is of another class of that name."""
    if type(batch).__name__ == Given.__name__ and getattr(batch, '_fields', None) == Given._fields:
        return Given(*batch)
    return Given((batch,), {}, {})
