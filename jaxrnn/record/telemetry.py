"""Records: made inside the compiled step, read a step late, kept as JSON lines.

In two phases, as the step runs on the device while the host still writes the record of the one before.
"""

import errno
import functools
import io
import json
import logging
import math
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from jaxrnn import files, tree
from jaxrnn.record import adam, motion
from jaxrnn.types import Record, Series, Staged, Step, Tree, UserError

log = logging.getLogger('jaxrnn')

Row = Mapping[str, Any]
"""A record on the host: `step`, then the scalars by name, `digest` as hex or absent."""

FINITE_STATE, DIGEST = 'finite_state', 'digest'
"""What `instrument` adds to a record."""

RESERVED = frozenset(
    ('step', FINITE_STATE, DIGEST, 'checkify', 'debug_nans', 'all_finite', 'sound', *motion.FIELDS)
)
"""Names that a row, or a rule, gives a meaning of its own."""

OURS = RESERVED | {*adam.FIELDS}
"""All that we add; of an optimiser's signals a step may have its own, by the same names."""

OWN = 'record_'
"""What a step's own field of a reserved name is called by: its `step` is `record_step`."""


class Observation(NamedTuple):
    """What comes out of a step beside the next state."""

    record: Record
    error: checkify.Error | None  # of checkify, where it is on


class CompiledStep(Protocol):
    """A compiled step whose record also says whether the new state is finite, and its digest."""

    def __call__(self, state: Tree, batch: Tree, digest: bool) -> tuple[Tree, Observation]:
        """One step. It consumes `state`, whose buffers are donated.

        Args:
            state: what the step starts from.
            batch: of the step.
            digest: whether the record shall have a digest of the state after it.
        """

    def prepare(self, state: Tree, batch: Tree) -> None:
        """Compiles for states and batches of the types of these, of which nothing else is read; so that another thread
        can do it before the first call."""


class InstrumentedStep:
    """The step as training compiles it, see `instrument`.

    Args:
        step: the step.
        checks: as in `instrument`.
        signals: whether the record has what `motion` says of the state; without, to measure what that costs.
    """

    def __init__(self, step: Step, *, checks: bool, signals: bool = True):
        def observed(state: Tree, batch: Tree, before: _Sampled, digest: bool):
            after, record = step(state, batch)
            digested = jax.lax.cond(digest, tree.digest, lambda _: jnp.asarray(NO_DIGEST), after)
            found = _signals(step, state, batch, before, after) if signals else {}
            return after, _observed(found, after, record, digested), _sampled(after) if signals else UNSAMPLED

        self._checks = checks
        self._samples = _Samples(signals)
        whole = checkify.checkify(observed, errors=checkify.float_checks) if checks else observed
        self._compiled = jax.jit(whole, donate_argnums=0)

    def __call__(self, state: Tree, batch: Tree, digest: bool) -> tuple[Tree, Observation]:
        out = self._compiled(state, batch, self._samples.of(state), digest)
        error, (state, record, samples) = out if self._checks else (None, out)
        self._samples.keep(state, samples)
        return state, Observation(record, error)

    def prepare(self, state: Tree, batch: Tree) -> None:
        self._compiled.lower(state, batch, self._samples.shape(state), False).compile()


class PlainStep:
    """The step as an experiment of a hundred steps, of which compiling must not take the most time: there are no
    digests, as there is nothing to hold them against, and a staged step is compiled in its two parts, of which
    experiments share the first. Its bits need not be those that training would give."""

    def __init__(self, step: Step):
        staged = (
            step if isinstance(step, Staged) else Staged(_nothing, lambda state, batch, _: step(state, batch))
        )

        def finish(state: Tree, batch: Tree, found: Tree, before: _Sampled):
            after, record = staged.finish(state, batch, found)
            signals = _signals(step, state, batch, before, after)
            return after, _observed(signals, after, record, NO_DIGEST), _sampled(after)

        self._samples = _Samples()
        self._begin, self._finish = jax.jit(staged.begin), jax.jit(finish, donate_argnums=0)

    def __call__(self, state: Tree, batch: Tree, digest: bool) -> tuple[Tree, Observation]:
        samples = self._samples.of(state)
        state, record, samples = self._finish(state, batch, self._begin(state, batch), samples)
        self._samples.keep(state, samples)
        return state, Observation(record, None)

    def prepare(self, state: Tree, batch: Tree) -> None:
        begun = jax.eval_shape(self._begin, state, batch)
        self._begin.lower(state, batch).compile()
        self._finish.lower(state, batch, begun, self._samples.shape(state)).compile()


class _Sampled(NamedTuple):
    """What signals need of the state before a step."""

    moving: motion.SampledState
    adam: adam.SampledMoments | None


UNSAMPLED = _Sampled(motion.SampledState(None, None, None), None)


class _Samples:
    """Of the state before a step: what came out of the step before with it, if it is that state."""

    def __init__(self, wanted: bool = True):
        self._wanted = wanted
        self._kept: tuple[list[weakref.ref], _Sampled] | None = None

    def of(self, state: Tree) -> _Sampled:
        if not self._wanted:
            return UNSAMPLED
        kept, self._kept = self._kept, None
        if kept is not None:
            leaves, (refs, samples) = jax.tree.leaves(state), kept
            if len(leaves) == len(refs) and all(map(_is_still, leaves, refs)):
                return samples
        return _compiled_sampled(state)

    def keep(self, state: Tree, samples: _Sampled) -> None:
        """Without holding the state, whose buffers belong to the next step."""
        self._kept = [weakref.ref(leaf) for leaf in jax.tree.leaves(state)], samples

    def shape(self, state: Tree) -> Any:
        return jax.eval_shape(_sampled, state) if self._wanted else UNSAMPLED


def _is_still(leaf: Any, kept: weakref.ref) -> bool:
    return leaf is kept()


def _sampled(state: Tree) -> _Sampled:
    """Nothing of a state that can't be sampled, as where its arrays lie on a mesh with explicit axes."""
    try:
        return _Sampled(motion.sampled(state), adam.sampled(state))
    except Exception as error:  # JAX raises whatever it likes; signals are beside a run, and never its end
        log.debug("no signals of the state: it can't be sampled: %s", error)
        return UNSAMPLED


_compiled_sampled = jax.jit(_sampled)


def _signals(step: Step, state: Tree, batch: Tree, before: _Sampled, after: Tree) -> Record:
    """Signals of a step, if it gives a state like the one that it takes."""
    alike = jax.tree.structure(state) == jax.tree.structure(after)  # type: ignore[operator]
    if before.moving.moving is None or not alike:
        return {}
    found = motion.of_step(before.moving, after)
    if before.adam is None or (constants := adam.constants_of(step, state, batch)) is None:
        return found
    of_adam = adam.of_step(constants, before.adam, after)
    # Of numbers whose squares overflow no ratio is known; a NaN would be taken for the step's own (--debug_nans).
    sound = tree.all_finite(after)
    known = {name: jnp.where(sound & jnp.isnan(value), 0, value) for name, value in of_adam.items()}
    return {**known, **found}


NO_DIGEST = np.zeros(2, np.uint32)


def _nothing(state: Tree, batch: Tree) -> Tree:
    return ()


def _observed(signals: Record, state: Tree, record: Record, digest: Any) -> Record:
    """A field of the step's own stays its own, also where it is called as one of Adam's signals is."""
    ours = {FINITE_STATE: tree.all_finite(state), DIGEST: digest}
    return {**signals, **_scalars(record), **ours}


@functools.lru_cache(maxsize=16)
def instrument(step: Step, *, checks: bool = False) -> CompiledStep:
    """Compiles a step so that its record also says whether the new state is finite, and its digest.

    Training, replay and every experiment call the function this returns, so that they compute the same bits;
    the same step gives the same function, compiled once.

    Args:
        step: any pure train step; its record may be any tree of scalars.
        checks: run it under checkify.float_checks.
    """
    return InstrumentedStep(step, checks=checks)


def row(step: int, observation: Observation) -> Row:
    """A step's record as plain Python values; waits for the device.

    Floats are written with the fewest digits that read back to the same bits. `step` is the loop's number: a field of
    that name which the step has of its own is in `record_step`.
    """
    record, error = observation
    values = {name: _plain(value) for name, value in jax.device_get(record).items() if name != DIGEST}
    words = np.asarray(record[DIGEST])
    row: dict[str, Any] = {'step': step, **values}
    if words.any():
        row[DIGEST] = tree.hex_digest(words)
    if error is not None and (message := error.get()):
        row['checkify'] = message.splitlines()[0]
    return row


def same(recorded: Row, computed: Row) -> bool:
    """Whether two records of a step agree bit for bit in all they share, and share a measurement."""
    shared = (recorded.keys() & computed.keys()) - {'step'}
    return bool(shared) and not different(recorded, computed)


def different(recorded: Row, computed: Row) -> list[str]:
    """Which of the fields that two records share differ by a bit."""
    return [name for name in recorded if name in computed and not _same(recorded[name], computed[name])]


def sound(row: Row) -> bool:
    """Whether each of its `finite_*` flags is set."""
    return all(value for name, value in row.items() if name.startswith('finite_'))


def contiguous(rows: list[Row]) -> bool:
    """Whether no step is missing between the first row and the last."""
    return all(row['step'] == rows[0]['step'] + place for place, row in enumerate(rows))


class RecordFile:
    """The records of a run, one JSON line a step, in ascending order of steps.

    A line that a killed process left half written is dropped, and with it nothing else.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._file: io.FileIO | None = None
        self._named = False  # whether its name is on the disk

    def read(self) -> list[Row]:
        """All whole rows. Raises UserError where a line in the middle is damaged."""
        return [row for _, row in self._lines()]

    def keep_before(self, step: int) -> list[Row]:
        """Drops the rows of `step` and later, which a resumed run computes again, and returns them."""
        self.close()
        lines = list(self._lines())
        end = next((start for start, row in lines if row['step'] >= step), None)
        if end is None:
            end = self._whole_bytes()
        if self.path.exists():
            os.truncate(self.path, end)
        return [row for start, row in lines if start >= end]

    def append(self, row: Row) -> None:
        """Writes a row straight to the system: a process killed a moment later has lost nothing.

        Raises OSError where the system takes less than all of it.
        """
        if self._file is None:
            self._file = io.FileIO(self.path, 'a')
        line = _line(row)
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Waits until what was appended is on the disk. Raises OSError where it can't be written."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        if self._file is not None and not self._named:
            files.sync(self.path.absolute().parent)
            self._named = True

    def rewrite(self, rows: Iterable[Row]) -> None:
        """Puts other rows in their place, all or none. Raises UserError where the disk refuses."""
        self.close()
        files.write_bytes(self.path, b''.join(map(_line, rows)))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _whole_bytes(self) -> int:
        content = self.path.read_bytes() if self.path.exists() else b''
        return content.rfind(b'\n') + 1

    def _lines(self) -> Iterator[tuple[int, Row]]:
        """Where each whole line starts, and its row."""
        content = self.path.read_bytes()[: self._whole_bytes()] if self.path.exists() else b''
        start = 0
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            try:
                row = _decode(json.loads(line))
                row['step'] + 0
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f'{self.path}: line {number} is not a record; delete the file to bisect from the '
                    'checkpoints alone'
                ) from None
            yield start, row
            start += len(line)


def series(rows: Iterable[Row]) -> Series:
    """Rows as columns: name -> float64 [S], NaN where a row lacks the name. Texts are left out."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, str))
    return {name: np.array([row.get(name, math.nan) for row in rows], np.float64) for name in names}


def _scalars(record: Tree) -> dict[str, jax.Array]:
    """A record of any structure as a flat dictionary of scalars, under names that mean nothing else.

    Raises UserError for what isn't a scalar, and for two fields that come to the same name.
    """
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(record)):
        record = {'loss': record}
    fields: dict[str, tuple[str, jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(record):
        found, value = jax.tree_util.keystr(path, simple=True, separator='/'), jnp.asarray(leaf)
        if value.size != 1:
            raise UserError(
                f'record: scalars expected, {found} {value.shape} found; reduce them inside the step'
            )
        name = _named(found)
        if name in fields:
            raise UserError(
                f'record: the fields {fields[name][0]!r} and {found!r} would both be recorded as {name!r}; rename one'
            )
        fields[name] = found, jnp.reshape(value, ())
    return {name: value for name, (_, value) in fields.items()}


def _named(field: str) -> str:
    """What a field of a step's record is called in its row."""
    name = field.replace('/', '_')
    return OWN + name if name in RESERVED else name


def _same(a: Any, b: Any) -> bool:
    return a == b or (a != a and b != b)  # NaN is the only value unequal to itself


def _plain(value: np.ndarray) -> float | int | bool:
    if value.dtype == np.bool_:
        return bool(value)
    if np.issubdtype(value.dtype, np.integer):
        return int(value)
    return float(str(value.astype(np.float64) if value.dtype.itemsize < 4 else value[()]))


# JSON has no NaN and no infinities; a file with Python's own spellings can't be read by other languages.
_SPELLINGS = {'NaN': math.nan, 'Infinity': math.inf, '-Infinity': -math.inf}


def _line(row: Row) -> bytes:
    return json.dumps(_encode(row)).encode() + b'\n'


def _encode(row: Row) -> Row:
    return {name: _spell(value) if isinstance(value, float) else value for name, value in row.items()}


def _spell(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return 'NaN' if math.isnan(value) else 'Infinity' if value > 0 else '-Infinity'


def _decode(row: Row) -> Row:
    return {
        name: _SPELLINGS.get(value, value) if isinstance(value, str) else value for name, value in row.items()
    }
