"""Loops as people write them (tests/loops), with the lines of the recorder and without; and faults to plant in them.

A line that a recorder needs ends in `# recorder`; one that it changes in `# recorder: ` and what it was before.
Run by itself it is a person's program that can be killed: python looping.py NAME DIRECTORY STEPS KILLED_AT
"""

import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

FOLDER = Path(__file__).parent / 'loops'
NAMES = sorted(path.stem for path in FOLDER.glob('*.py'))
MARK = '# recorder'


def marked(name: str) -> list[str]:
    """The lines that the recorder needs."""
    return [line.strip() for line in _text(name).splitlines() if MARK in line]


def without_recorder(text: str) -> str:
    """The program as it was before."""
    lines: list[str] = []
    within: list[int] = []  # the indentation of each block of the recorder's that is open
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        while line.strip() and within and indent <= within[-1]:
            within.pop()
        code, mark, was = line.partition(MARK)
        if mark and code.strip().startswith('with '):
            within.append(indent)
        elif mark and was:
            lines.append(' ' * (indent - 4 * len(within)) + was.removeprefix(': '))
        elif not mark:
            lines.append(line[4 * len(within) :] if line.strip() else line)
    return '\n'.join(lines) + '\n'


def load(name: str, *, recorded: bool = True) -> ModuleType:
    """A program, anew: nothing of it is compiled yet."""
    module = ModuleType(name)
    module.__file__ = str(FOLDER / f'{name}.py')
    text = _text(name) if recorded else without_recorder(_text(name))
    exec(compile(text, module.__file__, 'exec'), module.__dict__)
    return module


def _text(name: str) -> str:
    return (FOLDER / f'{name}.py').read_text(encoding='utf-8')


class EndedError(Exception):
    """Ends a loop in the middle."""


def ending(batches: Sequence[Any]) -> Iterator[Any]:
    yield from batches
    raise EndedError


# Faults. A program is told of none: it gets another batch, or another optimiser under the same name.


class Fault(NamedTuple):
    planted: Callable[[pytest.MonkeyPatch, list[Any], int], None]  # into optax or the batches, at an update
    shown: int  # steps later that it is seen in the record


def nan_in_batch(patch: pytest.MonkeyPatch, batches: list[Any], at: int) -> None:
    leaves, structure = jax.tree.flatten(batches[at])
    broken = np.array(leaves[0])
    broken[(..., *(size // 2 for size in broken.shape[-2:]))] = np.nan
    batches[at] = jax.tree.unflatten(structure, [broken, *leaves[1:]])


def infinite_parameter(patch: pytest.MonkeyPatch, batches: list[Any], at: int) -> None:
    def set_one(updates: Any) -> Any:
        leaves, structure = jax.tree.flatten(updates)
        return jax.tree.unflatten(structure, [jnp.full_like(leaves[0], jnp.inf), *leaves[1:]])

    _patch(patch, at, set_one)


def rate_too_high(patch: pytest.MonkeyPatch, batches: list[Any], at: int) -> None:
    _patch(patch, at, lambda updates: jax.tree.map(lambda x: x * 1e24, updates))


FAULTS = {
    'nan in a batch': Fault(nan_in_batch, 0),
    'infinite parameter': Fault(infinite_parameter, 0),
    'rate too high': Fault(rate_too_high, 1),
}


def _patch(patch: pytest.MonkeyPatch, at: int, change: Callable[[Any], Any]) -> None:
    """Optimisers that change their update number `at`."""
    faulty = optax.GradientTransformation(
        lambda params: jnp.int32(0),
        lambda updates, count, params=None: (
            jax.lax.cond(count == at, change, lambda same: same, updates),
            count + 1,
        ),
    )
    for name in ('adam', 'adamw', 'sgd'):
        made = getattr(optax, name)
        patch.setattr(optax, name, lambda *a, made=made, **k: optax.chain(made(*a, **k), faulty))


def killed(batches: Iterable[Any], at: int) -> Iterator[Any]:
    """The process ends while step `at` is to be taken."""
    for number, batch in enumerate(batches):
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch


def main(name: str, directory: str, batches: str, first: str, kill_at: str) -> None:
    kept = pickle.loads(Path(batches).read_bytes())[int(first) :]
    load(name).main(killed(kept, int(kill_at)), directory)


if __name__ == '__main__':
    main(*sys.argv[1:])
