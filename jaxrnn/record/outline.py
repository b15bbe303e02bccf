"""How a tree of arrays is made, as plain data: of dictionaries, lists, tuples and named tuples.

Nothing of a class is kept but its name: a run is data, and brings no code with it.
"""

import collections
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import jax

from jaxrnn.types import Tree, UserError

LEAF = '*'
MOST_FIELDS = 1000
"""Of a named tuple."""


def of(tree: Tree) -> Any:
    """The outline of a tree: JSON.

    >>> of({'x': 1, 'y': (2, None)})
    ['dict', ['x', 'y'], ['*', ['tuple', ['*', ['none']]]]]
    """
    if tree is None:
        return ['none']
    if type(tree) in (dict, collections.OrderedDict) and all(type(key) in (str, int) for key in tree):
        # In JAX's order of leaves: a dictionary's keys are sorted, an ordered one's are not.
        keys = sorted(tree) if type(tree) is dict and _comparable(tree) else list(tree)
        return [type(tree).__name__, keys, [of(tree[key]) for key in keys]]
    if type(tree) in (list, tuple):
        return [type(tree).__name__, [of(child) for child in tree]]
    if isinstance(tree, tuple) and hasattr(tree, '_fields'):
        return ['namedtuple', type(tree).__name__, [*tree._fields], [of(child) for child in tree]]
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(tree)):
        return LEAF
    return ['other', type(tree).__name__, len(jax.tree.leaves(tree))]


def _comparable(tree: Mapping[Any, Any]) -> bool:
    return len({type(key) for key in tree}) <= 1


def made(outline: Any, leaves: Sequence[Any], name: str) -> Tree:
    """The tree of an outline. Raises UserError, with `name` in front, for what isn't one, or has a class that isn't
    known here."""
    rest = iter(leaves)
    try:
        tree = _made(outline, rest)
    except _UnknownError as error:
        raise UserError(f'{name} is a {error}; give one like it: batch_like=') from None
    except (TypeError, ValueError, KeyError, IndexError, StopIteration) as error:
        raise UserError(f'{name} has no structure that is known ({error})') from None
    if next(rest, None) is not None:
        raise UserError(f'{name} has more arrays than its structure')
    return tree


class _UnknownError(Exception):
    """The name of a class."""


def _made(outline: Any, leaves: Iterator[Any]) -> Tree:
    if outline == LEAF:
        return next(leaves)
    kind, *rest = outline
    if kind == 'none':
        return None
    if kind in ('dict', 'OrderedDict'):
        keys, children = rest
        pairs = zip(keys, [_made(child, leaves) for child in children], strict=True)
        return dict(pairs) if kind == 'dict' else collections.OrderedDict(pairs)
    if kind in ('list', 'tuple'):
        children = [_made(child, leaves) for child in rest[0]]
        return children if kind == 'list' else tuple(children)
    if kind == 'namedtuple':
        name, fields, children = rest
        return _class(name, tuple(fields))(*[_made(child, leaves) for child in children])
    if kind == 'other':
        raise _UnknownError(str(rest[0]))
    raise ValueError(f'{kind!r:.20}')


_classes: dict[tuple[str, tuple[str, ...]], type] = {}


def _class(name: str, fields: tuple[str, ...]) -> Any:
    """A named tuple of these fields: the same class each time, as JAX compiles for one. Python's own `namedtuple` would
    compile what a run names."""
    if (name, fields) not in _classes:
        _check(name, fields)
        places = {field: property(operator.itemgetter(place)) for place, field in enumerate(fields)}
        made = type(name, (_Named,), {'__slots__': (), '_fields': fields, **places})
        _classes[name, fields] = made
    return _classes[name, fields]


def _check(name: Any, fields: tuple[Any, ...]) -> None:
    """Raises ValueError."""
    names = (name, *fields)
    if len(fields) > MOST_FIELDS or not all(type(each) is str and each.isidentifier() for each in names):
        raise ValueError('a named tuple of such fields')
    if len({*fields}) < len(fields) or any(field.startswith('_') or len(field) > 200 for field in fields):
        raise ValueError('a named tuple of such fields')


class _Named(tuple):
    """What a named tuple can, as far as a step may ask for it."""

    __slots__ = ()
    _fields: tuple[str, ...] = ()

    def __new__(cls, *values: Any) -> Self:
        if len(values) != len(cls._fields):
            raise ValueError(f'{len(values)} values for {len(cls._fields)} fields')
        return super().__new__(cls, values)

    def _asdict(self) -> dict[str, Any]:
        return dict(zip(self._fields, self, strict=True))

    def _replace(self, **values: Any) -> Self:
        return type(self)(*{**self._asdict(), **values}.values())
