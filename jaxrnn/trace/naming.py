"""Names for what happened: the pass, the layer, the line of code, and the equations that led there."""

import contextlib
import functools
import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.extend import core

from jaxrnn.trace.births import MOVERS
from jaxrnn.trace.equations import name_of
from jaxrnn.trace.findings import CHAIN, Link
from jaxrnn.trace.values import Node, Place, ancestors, outwards, stack


class Flow(NamedTuple):
    """Which nodes lead where; `pass_of` needs it."""

    primal: set[Node]  # to what the function itself needs, not its derivative alone
    backward: set[Node]  # to a backward pass
    update: set[Node]  # to what follows a backward pass


def flow_of(nodes: Sequence[Node], outputs: Sequence[Node]) -> Flow:
    """The flow of all nodes, which are in the order of evaluation.

    A node is primal if a way leads from it to an output, or to a value that nothing uses, and that way meets no
    equation of a backward pass.
    """
    used = {parent for node in nodes for parent in node.parents}
    backward = {node for node in nodes if node.is_backward()}
    ends = [node for node in {*(n for n in nodes if n not in used), *outputs} if node not in backward]
    after: set[Node] = set()
    for node in nodes:
        if node not in backward and any(parent in after or parent in backward for parent in node.parents):
            after.add(node)

    def is_ahead(node: Node) -> bool:
        return node not in backward

    return Flow(
        ancestors(ends, is_ahead), ancestors(list(backward), lambda _: True), ancestors(list(after), is_ahead)
    )


def pass_of(node: Node, flow: Flow) -> str:
    """`data`, `forward`, `backward` or `update`."""
    if node.equation is None:
        return 'data'
    if node.is_backward():
        return 'backward'
    before = ancestors([node], lambda _: True)
    if not any(parent.is_model for parent in before):
        # A layer may act on the batch before any parameter does.
        return 'forward' if _scopes(stack(node.equation, node.place)) else 'data'
    if 'jvp(' in stack(node.equation, node.place):
        return 'forward' if node in flow.primal else 'backward'
    # A learning rate depends on no gradient, but is multiplied with one.
    follows = any(parent.is_backward() for parent in before)
    return 'update' if follows or (node in flow.update and node not in flow.backward) else 'forward'


_TRANSFORM = re.compile(r'^(?:jvp|transpose|vmap|remat|checkpoint|rematted_computation)\((.*)\)$')


def _scopes(stack: str) -> list[str]:
    """Named scopes without the transformations around them."""
    found = []
    for part in _split(stack):
        if part.startswith(('jit(', 'pjit(')):
            continue
        while match := _TRANSFORM.match(part):
            part = match[1]
        within = _split(part)
        if len(within) > 1:
            found += _scopes(part)
        elif (
            part
            and not part.startswith(MARK)
            and '->' not in part  # what einsum calls itself
            and part
            not in ('rematted_computation', 'checkpoint', 'while', 'body', 'cond', 'scan', 'closed_call')
        ):
            found.append(part)
    return found


def _split(stack: str) -> list[str]:
    """At slashes outside of parentheses."""
    parts, depth = [''], 0
    for letter in stack:
        depth += (letter == '(') - (letter == ')')
        if letter == '/' and depth == 0:
            parts.append('')
        else:
            parts[-1] += letter
    return [part for part in parts if part]


def layer_of(node: Node, in_pass: str) -> str:
    """The named scopes of an equation; where it has none, the path of the nearest parameter. An update has the shape of
    its parameter, so there it is the nearest parameter of that shape."""
    if node.equation is not None and (scopes := _scopes(stack(node.equation, node.place))):
        return '/'.join(scopes)
    found = sorted(_parameters(node), key=lambda pair: (not pair[1].shape, pair[0], pair[1].input))
    if in_pass == 'update' and node.equation is not None:
        shape = node.equation.outvars[0].aval.shape
        found.sort(key=lambda pair: not shape or pair[1].shape != shape)
    return found[0][1].input if found else ''


def _parameters(node: Node) -> Iterator[tuple[int, Node]]:
    """Arguments of the model that a value was computed from, and how many equations before."""
    seen, level, distance = {node}, [node], 0
    while level:
        yield from ((distance, one) for one in level if one.is_model)
        level = list({parent for one in level for parent in one.parents} - seen)
        seen |= set(level)
        distance += 1


_LIBRARIES = tuple(
    os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ('stdlib', 'purelib', 'platlib')
)
_CALLER = str(Path(__file__).with_name('tracing.py'))  # which calls make_jaxpr
_OURS = str(Path(__file__).parent.parent) + os.sep
_DOORS = os.path.join(_OURS, 'adapters', '')  # through which somebody else's step is called


def source_of(equation: Any, place: Place | None) -> tuple[str, str]:
    """The line of the user's code, and that of a library if the operation is in one."""
    ours = library = ''
    around = (equation, *(outer.equation for outer in outwards(place)))
    for at in around:
        # In JAX 0.8 a shard_map isn't bound as other primitives are, and has no mark.
        framed = at is around[-1] or _frames_end() or at.primitive.name == 'shard_map'
        for named, whose in (*_mark(at), *(_frames(at) if framed else ())):
            if whose == 'user':
                return named, ours or library
            ours, library = ours or named * (whose == 'ours'), library or named * (whose == 'library')
    return (ours, library) if ours else (library, '')


MARK, MARK_AND, SLASH = '@', '|', chr(0x2215)
"""Of the scopes that hold lines of code. There a slash would part two scopes, so SLASH is written for it."""

WHOSE = ('ours', 'library', 'user')


@contextlib.contextmanager
def marked() -> Iterator[None]:
    """While it lasts, every equation is put into a scope that names the line of code that Python is at.

    JAX itself does not know that line inside a backward pass that is written by hand (custom_vjp). It names the call.
    """
    bind = core.Primitive.bind

    def bind_marked(primitive: Any, *arguments: Any, **params: Any) -> Any:
        mark = _line_of(sys._getframe(1))
        if mark is None:
            return bind(primitive, *arguments, **params)
        with jax.named_scope(mark):
            return bind(primitive, *arguments, **params)

    core.Primitive.bind = bind_marked  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        core.Primitive.bind = bind  # type: ignore[method-assign]


def _line_of(frame: Any) -> str | None:
    """The innermost lines of the user's code, of ours and of another library's, as a mark. None where there is only
    JAX, as in a rule of differentiation."""
    found = dict.fromkeys(WHOSE, '')
    while frame is not None:
        file = frame.f_code.co_filename
        if file.endswith(_DERIVING) or file == _CALLER:
            break
        whose = _whose(file)
        if whose in found:
            found[whose] = found[whose] or f'{file}:{frame.f_lineno}'
        if found['user']:
            break
        frame = frame.f_back
    if not any(found.values()):
        return None
    return MARK + MARK_AND.join(found.values()).replace('/', SLASH)


def _whose(file: str) -> str:
    if file.startswith((_JAX, _DOORS)) or file == __file__:
        return 'jax'
    if file.startswith(_OURS):
        return 'ours'
    return 'library' if file.startswith((*_LIBRARIES, '<frozen', '<string')) else 'user'


_JAX = str(Path(jax.__file__).parent) + os.sep
_DERIVING = tuple(os.path.join('interpreters', name) for name in ('ad.py', 'partial_eval.py', 'batching.py'))


def _mark(equation: Any) -> Iterator[tuple[str, str]]:
    """The lines that `marked` wrote into an equation's scopes, as `_frames`."""
    marks = re.findall(f'{MARK}([^/()]+)', str(equation.source_info.name_stack))
    for whose, named in zip(WHOSE, marks[-1].split(MARK_AND) if marks else (), strict=False):
        if named:
            yield named.replace(SLASH, '/'), whose


def _frames(equation: Any) -> Iterator[tuple[str, str]]:
    """Lines and whose they are, the innermost first, up to the call that traced the jaxpr. The frames around that call
    may be those of an earlier one, since jit traces a function once."""
    traceback = equation.source_info.traceback
    for frame in [] if traceback is None else traceback.frames:
        if frame.file_name == _CALLER:
            return
        if not frame.file_name.startswith(_JAX):
            yield f'{frame.file_name}:{frame.line_num}', _whose(frame.file_name)


@functools.cache
def _frames_end() -> bool:
    """Whether in this version of JAX the frames of an inner jaxpr end at the function that was traced."""
    inner = jax.jit(lambda x: -x)
    (outer,) = jax.make_jaxpr(lambda x: inner(x))(0.0).jaxpr.eqns
    (equation,) = outer.params['jaxpr'].eqns
    return all(frame.function_name != '_frames_end' for frame in equation.source_info.traceback.frames)


def code_at(source: str) -> str:
    """The text of a line of code."""
    file, _, line = source.rpartition(':')
    try:
        return Path(file).read_text().splitlines()[int(line) - 1].strip()
    except (OSError, ValueError, IndexError):
        return ''


def chain(node: Node) -> tuple[Link, ...]:
    """What was computed just before, the latest first. Equations that only move values are left out."""
    before = ancestors([node], lambda parent: parent.equation is not None and node.order - parent.order < 64)
    ordered = sorted((n for n in before if n is not node and n.equation is not None), key=lambda n: -n.order)
    computed = [n for n in ordered if n.equation.primitive.name not in MOVERS]
    return tuple(Link(name_of(n.equation), source_of(n.equation, n.place)[0]) for n in computed[:CHAIN])


def origin(node: Node) -> str:
    """Where an operand came from: the path of an argument, a literal, or a primitive."""
    if node.input:
        return node.input
    return name_of(node.equation) if node.equation is not None else 'constant'
