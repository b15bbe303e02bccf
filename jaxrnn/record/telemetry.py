"""Records: made inside the compiled step, and read a step late.

In two phases, as the step runs on the device while the host still writes the record of the one before.
"""

import contextlib
import dataclasses
import functools
import logging
import time
import weakref
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from jaxrnn import tree
from jaxrnn.record import adam, motion
from jaxrnn.record.records import Row
from jaxrnn.types import Array, Record, Staged, Step, Tree, UserError

log = logging.getLogger('jaxrnn')

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
    signals: '_Signals | None' = None  # beside the record
    looked: Array | None = (
        None  # of all numbers of the state: whether they are finite, and the digest; uint32 [3]
    )


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
    digests, as there is nothing to hold them against; signals are computed beside it, by a program that experiments
    share, as it takes longer to compile than most steps; and so is the first part of a staged step. Its bits need not
    be those that training would give."""

    def __init__(self, step: Step):
        staged = (
            step if isinstance(step, Staged) else Staged(_nothing, lambda state, batch, _: step(state, batch))
        )

        def finish(state: Tree, batch: Tree, found: Tree):
            after, record = staged.finish(state, batch, found)
            return after, _scalars(record)

        self._step, self._samples = step, _Samples()
        self._begin, self._finish = jax.jit(staged.begin), jax.jit(finish, donate_argnums=0)
        self._constants: list[adam.Constants | None] = []  # once they are known

    def __call__(self, state: Tree, batch: Tree, digest: bool) -> tuple[Tree, Observation]:
        before, structure = self._samples.of(state), jax.tree.structure(state)
        constants = self._constants_of(state, batch)
        state, record = self._finish(state, batch, self._begin(state, batch))
        alike = structure == jax.tree.structure(state)  # type: ignore[operator]
        found, samples = _seen_beside(before if alike else UNSAMPLED, state, constants)
        self._samples.keep(state, samples)
        return state, Observation({**found, **record, FINITE_STATE: found[FINITE_STATE]}, None)

    def prepare(self, state: Tree, batch: Tree) -> None:
        begun = jax.eval_shape(self._begin, state, batch)
        self._begin.lower(state, batch).compile()
        self._finish.lower(state, batch, begun).compile()
        _seen_beside.lower(self._samples.shape(state), state, self._constants_of(state, batch)).compile()

    def _constants_of(self, state: Tree, batch: Tree) -> adam.Constants | None:
        if not self._constants:
            self._constants.append(adam.constants_of(self._step, state, batch))
        return self._constants[0]


class CalledStep:
    """A step as somebody else's loop calls it: their own function, compiled or not as they have it, and beside it what
    is seen of a step from outside. So a replay has the bits of their training.

    Args:
        step: the step; whether it consumes its state is its own affair.
    """

    def __init__(self, step: Step):
        self._step, self._beside = step, Beside()

    def __call__(self, state: Tree, batch: Tree, digest: bool) -> tuple[Tree, Observation]:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((state, batch))):
            after, record = self._step(state, batch)  # which is looked into; nothing is computed yet
            return after, Observation(_scalars(record), None)
        self._beside.start(state)
        after, record = self._step(state, batch)
        return after, self._beside(after, record, whole=True)

    def prepare(self, state: Tree, batch: Tree) -> None:
        """Nothing: when it is compiled is the step's affair."""


class Beside:
    """What is seen of steps that somebody else computes, of the states between them.

    Args:
        state: what the first step starts from, if that is known yet.
    """

    def __init__(self, state: Tree = None):
        self._samples = _Samples()
        self._before: _Sampled = UNSAMPLED if state is None else self._samples.of(state)
        self._moved = jax.jit(_moved)
        self._whole = jax.jit(_whole)

    def start(self, state: Tree) -> None:
        """The state that the next step starts from, which the step may consume."""
        self._before = self._samples.of(state)

    def __call__(self, state: Tree, record: Tree, *, whole: bool) -> Observation:
        """What is seen of the step that led to a state.

        Args:
            state: after it; the next step may consume it as soon as this returns.
            record: what the step says of itself, any tree of scalars.
            whole: whether to look at every number: whether all are finite, and their digest.
        """
        found, self._before = self._moved(self._before, state)
        self._samples.keep(state, self._before)
        return Observation(_host_scalars(record), None, found, self._whole(state) if whole else None)

    def seconds(self, state: Tree) -> float:
        """What it takes to look at every number of a state."""
        jax.block_until_ready(self._whole(state))
        start = time.perf_counter()
        jax.block_until_ready(self._whole(state))
        return time.perf_counter() - start


@functools.partial(jax.tree_util.register_dataclass, data_fields=['values'], meta_fields=['names'])
@dataclasses.dataclass(frozen=True)
class _Signals:
    """Signals in one array, which takes a fifth of the time to be fetched that five take."""

    values: Array  # float32 [signals]
    names: tuple[str, ...]


def _moved(before: '_Sampled', after: Tree) -> tuple[_Signals | None, '_Sampled']:
    found = {} if before.moving.moving is None else motion.of_step(before.moving, after)
    names = tuple(found)
    return _Signals(jnp.stack([found[n] for n in names]), names) if names else None, _sampled(after)


def _whole(state: Tree) -> Array:
    return jnp.concatenate([tree.all_finite(state).astype(jnp.uint32)[None], tree.digest(state)])


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
        with contextlib.suppress(TypeError):  # of a number of NumPy's, which nobody can refer to
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
    return _signals_between(before, after, adam.constants_of(step, state, batch) if before.adam else None)


def _signals_between(before: _Sampled, after: Tree, constants: adam.Constants | None) -> Record:
    if before.moving.moving is None:
        return {}
    found = motion.of_step(before.moving, after)
    if before.adam is None or constants is None:
        return found
    of_adam = adam.of_step(constants, before.adam, after)
    # Of numbers whose squares overflow no ratio is known; a NaN would be taken for the step's own (--debug_nans).
    sound = tree.all_finite(after)
    known = {name: jnp.where(sound & jnp.isnan(value), 0, value) for name, value in of_adam.items()}
    return {**known, **found}


@functools.partial(jax.jit, static_argnames='constants')
def _seen_beside(
    before: _Sampled, after: Tree, constants: adam.Constants | None
) -> tuple[dict[str, Any], _Sampled]:
    """The signals of a step, whether the state after it is finite, and its samples."""
    found = _signals_between(before, after, constants)
    return {**found, FINITE_STATE: tree.all_finite(after)}, _sampled(after)


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
    record, signals, looked = jax.device_get((observation.record, observation.signals, observation.looked))
    found: dict[str, Any] = {} if signals is None else dict(zip(signals.names, signals.values, strict=True))
    fetched = {name: np.asarray(value) for name, value in {**found, **record}.items()}
    words = fetched.pop(DIGEST, NO_DIGEST)
    row: dict[str, Any] = {'step': step, **{name: _plain(value) for name, value in fetched.items()}}
    if looked is not None:
        row[FINITE_STATE], words = bool(looked[0]), looked[1:]
    error = observation.error
    if words.any():
        row[DIGEST] = tree.hex_digest(words)
    if error is not None and (message := error.get()):
        row['checkify'] = message.splitlines()[0]
    return row


def _scalars(record: Tree) -> dict[str, jax.Array]:
    """A record of any structure as a flat dictionary of scalars, under names that mean nothing else.

    Raises UserError for what isn't a scalar, and for two fields that come to the same name.
    """
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(record)):
        record = {'loss': record}
    fields = _fields(record)
    return {name: jnp.reshape(jnp.asarray(leaf), ()) for name, leaf in fields.items()}


def _host_scalars(record: Tree) -> dict[str, Any]:
    """Likewise, without asking the device for anything."""
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(record)):
        record = {'loss': record}
    return {name: _host_scalar(name, leaf) for name, leaf in _fields(record).items()}


def _host_scalar(name: str, leaf: Any) -> Any:
    """A number of a record as the device has it. Raises UserError for what is none."""
    if isinstance(leaf, jax.Array):
        return leaf
    value = np.asarray(leaf)
    if value.dtype.kind not in 'biufV':
        raise UserError(f'record: numbers expected, {name} = {leaf!r:.40} found; leave it out')
    if value.dtype == np.float64 and np.float32(value) == value:
        return np.float32(value)  # float(loss) is the same number as loss
    return value


def _fields(record: Tree) -> dict[str, Any]:
    """Scalars by the names that they are recorded under."""
    fields: dict[str, tuple[str, Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(record):
        found = jax.tree_util.keystr(path, simple=True, separator='/')
        if np.size(leaf) != 1:
            raise UserError(
                f'record: scalars expected, {found} {np.shape(leaf)} found; reduce them inside the step'
            )
        name = _named(found)
        if name in fields:
            raise UserError(
                f'record: the fields {fields[name][0]!r} and {found!r} would both be recorded as {name!r}; rename one'
            )
        fields[name] = found, leaf
    return {name: value for name, (_, value) in fields.items()}


def _named(field: str) -> str:
    """What a field of a step's record is called in its row."""
    name = field.replace('/', '_')
    return OWN + name if name in RESERVED else name


def _plain(value: np.ndarray) -> float | int | bool:
    value = value.reshape(())
    if value.dtype == np.bool_:
        return bool(value)
    if np.issubdtype(value.dtype, np.integer):
        return int(value)
    return float(str(value.astype(np.float64) if value.dtype.itemsize < 4 else value[()]))
