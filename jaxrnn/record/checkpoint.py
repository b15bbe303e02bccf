"""States on disk, through orbax: the only door to it.

Checkpoint k holds the state that step k starts from, so that 0 is the initial state.
"""

import concurrent.futures
import contextlib
import itertools
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jaxrnn import files, tree
from jaxrnn.record import bit_flips, quiet
from jaxrnn.types import Tree, UserError

# One line a save is of no use to the user of a progress bar; warnings and errors still come through.
quiet.ABSL.setLevel(logging.WARNING)


PLAIN = re.compile(r'[\w/.=+,@-]*', re.ASCII)
"""Paths that orbax takes as they are. Of others it makes patterns (`x[0]` is the folder x0), or addresses (`gs:/`)."""


DELETED = 'deleted'
"""The folder in which checkpoints are deleted. Each is renamed into it first: one that is half deleted would count."""


@contextlib.contextmanager
def _plainly(directory: Path) -> Iterator[Path]:
    """A path that orbax takes as it is: the folder's own, or that of a link to it. Raises UserError where there can be
    none."""
    if PLAIN.fullmatch(str(directory)):
        yield directory
        return
    with contextlib.ExitStack() as stack:
        try:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='jaxrnn-'))).absolute()
            link = home / 'checkpoints'
            link.symlink_to(directory, target_is_directory=True)
        except OSError as error:
            raise UserError(
                f'--run_dir: {directory} needs a link to it from {tempfile.gettempdir()} ({error.strerror}); choose a '
                'name of letters and digits, or another TMPDIR'
            ) from error
        if not PLAIN.fullmatch(str(link)):
            raise UserError(
                f'--run_dir: {directory} needs a link to it from a folder with a name of letters and digits, and '
                f'TMPDIR is {tempfile.gettempdir()}; choose another of the two'
            )
        yield link


META_FILE, MOST_META = 'metadata', 1 << 20
"""Where orbax puts what is saved beside a state, and its bytes; it has 2,000."""

MOST_NOTES = 64 << 20
"""Bytes of a file in which orbax notes what a state consists of; an array has 300 in it."""


def _meta_of(found: Any) -> dict[str, Any]:
    """Raises TypeError for what isn't one that `Writer.save` was given."""
    if not isinstance(found, dict):
        raise TypeError(f'a {type(found).__name__} found, a dictionary expected')
    for name, kind in (('step', int), ('state', str), ('environment', str), ('environment_details', dict)):
        if name in found and type(found[name]) is not kind:
            raise TypeError(f'{name}: a {type(found[name]).__name__} found, a {kind.__name__} expected')
    return found


class Checkpoints:
    """The checkpoints of a directory: those that `save` made, or those of somebody's orbax CheckpointManager.

    Args:
        directory: with one folder a step.
        like: a state (of arrays or jax.ShapeDtypeStruct) whose structure restored states get. Without it they
            are made of dictionaries and lists, which suits a state that is.
        since: a step; earlier ones don't count, as nothing is known of the steps after them.
    """

    def __init__(self, directory: str | os.PathLike, like: Tree = None, since: int = 0):
        self.directory = Path(directory).absolute()
        self.like, self.since = like, since

    def steps(self) -> list[int]:
        """The steps that have a whole checkpoint, ascending."""
        found = (step for step in self._numbered() if self._item(step) is not None)
        return sorted(step for step in found if step >= self.since)

    def restore(self, step: int) -> Tree:
        """The state that step `step` starts from. Raises UserError where it can't be read."""
        path = self._item(step)
        if path is None:
            raise UserError(
                f'{self.directory}: no checkpoint of step {step}; there are {_ranges(self.steps())}'
            )
        _check_notes(path)
        target = None if self.like is None else _boxed(jax.tree.map(_abstract, self.like))
        try:
            state = self._read(path, ocp.StandardCheckpointHandler(), ocp.args.StandardRestore(target))
        except UserError:
            raise
        except Exception as error:  # orbax and tensorstore raise whatever they like on a damaged file
            raise UserError(
                f"{path}: the checkpoint can't be read ({_first_line(error)}); "
                'it is damaged or of another program: delete its folder to go on from the one before'
            ) from error
        state = jax.tree.map(_own, state)
        return state[0] if self.like is not None and _is_leaf(self.like) else state

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved beside the state; empty for somebody else's checkpoint. Raises UserError where it can't be
        read."""
        path = self.directory / str(step) / 'meta'
        if not path.is_dir():
            return {}
        try:
            # Not through orbax, which has no limits.
            return _meta_of(files.read_json(path / META_FILE, MOST_META))
        except (OSError, TypeError, UserError) as error:
            said = (error.strerror if isinstance(error, OSError) else '') or _first_line(error)
            said = said.removeprefix(f'{path / META_FILE}: ').partition('; ')[0]
            raise UserError(
                f"{path}: it can't be read ({said}); delete it to go by the records alone"
            ) from error

    def drop_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, the newest first, so that what is left is always a run's start. None
        comes back, even after a power loss."""
        _empty_deleted(self.directory)  # of names that may be needed
        for later in reversed([at for at in self.steps() if at > step]):
            (self.directory / DELETED).mkdir(exist_ok=True)
            (self.directory / str(later)).rename(self.directory / DELETED / str(later))
            files.sync(self.directory)
        _empty_deleted(self.directory)

    def _read(self, path: Path, handler: ocp.CheckpointHandler, args: Any) -> Any:
        with (
            _plainly(self.directory) as home,
            ocp.Checkpointer(handler) as checkpointer,
            warnings.catch_warnings(),
        ):
            # Without a structure nothing says where arrays go, and orbax warns that it has to look.
            warnings.filterwarnings('ignore', message='Sharding info not provided', category=UserWarning)
            return checkpointer.restore(home / path.relative_to(self.directory), args=args)

    def set_aside_after(self, step: int) -> list[tuple[int, Path]]:
        """Renames every folder of a later step, so that it counts as none and nothing is lost; theirs and new paths."""
        later = sorted(at for at in self._numbered() if at > step)
        return [(at, self._set_aside(at)) for at in later]

    def _set_aside(self, step: int) -> Path:
        for number in itertools.count(1):
            aside = self.directory / f'{step}.damaged{f".{number}" if number > 1 else ""}'
            if not aside.exists():
                break
        return (self.directory / str(step)).rename(aside)

    def _numbered(self) -> list[int]:
        if not self.directory.is_dir():
            return []
        return [int(path.name) for path in self.directory.iterdir() if path.name.isdecimal()]

    def _item(self, step: int) -> Path | None:
        for name in ('state', 'default'):  # `default` is what a CheckpointManager calls its only item
            path = self.directory / str(step) / name
            if path.is_dir():
                return path
        return None


def _empty_deleted(directory: Path) -> None:
    """Deletes what was renamed in order to be deleted, once that name is on the disk."""
    home = directory / DELETED
    if not home.is_dir():
        return
    there = list(home.iterdir())  # what comes later has a name that may not be on the disk
    files.sync(directory)
    for path in there:
        shutil.rmtree(path)


def check_digest(checkpoints: Checkpoints, step: int, state: Tree) -> None:
    """Raises UserError when a restored state isn't the one that was saved."""
    saved = checkpoints.meta(step).get('state')
    if saved is not None and saved != state_digest(state):
        raise altered(checkpoints.directory / str(step), state, saved, 'when it was saved')


def altered(path: Path, state: Tree, digest: str, where: str) -> UserError:
    """That a checkpoint isn't of the digest that it has somewhere; by which bit, if it is one."""
    flip = bit_flips.of_state(state, digest)
    bit = '' if flip is None else f', that of the same state but for bit {flip.bit} of {flip.leaf}'
    return UserError(
        f'{path}: the checkpoint was altered on disk (digest {state_digest(state)}, {digest} {where}{bit}); '
        'delete its folder to go on from the one before'
    )


_digest = jax.jit(tree.digest)


def state_digest(state: Tree) -> str:
    """A state's digest, as a record has it."""
    return tree.hex_digest(jax.device_get(_digest(state)))


FILES = 40
"""Files and folders that there must be room for: a checkpoint has 21, and a few more while it is written."""

PATIENCE = 10.0
"""Seconds for which what orbax began is waited for when it has failed."""


class Writer:
    """Saves checkpoints while training goes on, and thins them out.

    Args:
        directory: made if it isn't there.
        keep_latest: how many of the newest are kept.
        keep_every: those at multiples of it are kept for ever, the first (step 0) always.
    """

    def __init__(self, directory: str | os.PathLike, *, keep_latest: int, keep_every: int):
        self.directory = Path(directory).absolute()
        keep = checkpoint_managers.AnyPreservationPolicy(
            [checkpoint_managers.LatestN(keep_latest), checkpoint_managers.EveryNSteps(keep_every)]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,  # what a killed process left half written
            todelete_subdir=DELETED,
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self._sync_written,
                # Where a folder can't be made in the background, the threads that wait for it keep the process alive.
                create_directories_asynchronously=False,
            ),
        )
        self._writing: int | None = None  # the step whose checkpoint is being written, or was written last
        self._syncing: concurrent.futures.Future | None = None
        self._background = concurrent.futures.ThreadPoolExecutor(1)
        self._failed = False
        self._aside = quiet.Aside()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._guard(lambda: _empty_deleted(self.directory))
        self._open = contextlib.ExitStack()
        home = self._open.enter_context(_plainly(self.directory))
        self._quiet = quiet.Quiet(self.directory)
        self._quiet.begin()
        self._manager = ocp.CheckpointManager(home, options=options, item_names=('state', 'meta'))

    def save(self, step: int, state: Tree, meta: Mapping[str, Any]) -> bool:
        """Copies the state and starts to write it; returns before it is written. False where it is there already.

        Raises UserError when the disk is too full, or when the write before this one failed.
        """
        if step in self._manager.all_steps():
            return False
        self._finish()
        self._check_room(state)
        # A copy, since the next step donates the state while orbax still writes it.
        copied = _boxed(jax.tree.map(jnp.copy, state))
        items = {'state': ocp.args.StandardSave(copied), 'meta': ocp.args.JsonSave(dict(meta))}
        self._writing = step
        self._guard(lambda: self._manager.save(step, args=ocp.args.Composite(**items), force=True))
        return True

    def wait(self) -> None:
        """Until everything is on the disk. Raises UserError when a write failed."""
        self._finish()
        if self._syncing is not None:
            self._guard(self._syncing.result)

    def close(self) -> None:
        """Waits likewise, and ends the threads. What follows from a failure that was raised is not raised again."""
        try:
            if not self._failed:
                self.wait()
        finally:
            self._background.shutdown()
            with self._open, contextlib.suppress(*[UserError] if self._failed else []):
                self._guard(self._manager.close)
            if not self._failed:  # else threads of orbax's may outlive it
                self._quiet.end()

    def _finish(self) -> None:
        """Waits until all is written; the names of files and folders still go to the disk then, which takes no CPU but
        tens of milliseconds."""
        self._guard(self._manager.wait_until_finished)
        if self._writing is None:
            return
        if self._syncing is not None:
            self._guard(self._syncing.result)
        self._syncing = self._background.submit(self._sync_names, self._writing)
        self._writing = None

    def _sync_written(self) -> None:
        """Called in the thread that writes, when all is written and nothing has its name yet, so that what counts is on
        the disk."""
        for path in self.directory.glob(f'{self._writing}.orbax*'):
            files.sync_tree(path)

    def _sync_names(self, step: int) -> None:
        """And a last line that orbax adds to a checkpoint that has its name."""
        with contextlib.suppress(FileNotFoundError):  # it may have been thinned out meanwhile
            files.sync_tree(self.directory / str(step))
        files.sync(self.directory)
        files.sync(self.directory.parent)
        _empty_deleted(self.directory)

    def _check_room(self, state: Tree) -> None:
        need, free = 2 * tree.nbytes(state), shutil.disk_usage(self.directory).free
        disk = os.statvfs(self.directory)
        if free < need:
            lacks = f'{free >> 20} MB free and a checkpoint needs {-(-need >> 20)} MB'
        elif disk.f_files and disk.f_favail < FILES:  # some file systems have no limit, and say 0
            lacks = f'room for {disk.f_favail} more files and a checkpoint needs {FILES}'
        else:
            return
        raise UserError(
            f'{self.directory}: the disk has {lacks}; make room or lower --keep_latest, then run the same command '
            'again to resume'
        )

    def _guard(self, action: Callable[[], Any]) -> None:
        """Does it where threads that orbax begins keep no process alive; waits for none for long after a failure."""
        try:
            self._aside(action, PATIENCE if self._failed else None)
        except Exception as error:  # a full or failing disk comes as OSError, ValueError or RuntimeError
            self._failed = True
            self._aside.settle(PATIENCE)
            raise UserError(
                f"{self.directory}: a checkpoint couldn't be written ({_reason(error)}); make room or check "
                'the disk, then run the same command again to resume'
            ) from error


class ManagersWriter:
    """Saves checkpoints through somebody's own orbax CheckpointManager, by its own policies; what it wrote, it syncs.

    Args:
        manager: of one item, in the directory of a run's checkpoints.
        directory: of these.

    Raises:
        UserError: it saves elsewhere.
    """

    def __init__(self, manager: ocp.CheckpointManager, directory: str | os.PathLike):
        self.directory, self._manager = Path(directory).absolute(), manager
        if Path(manager.directory).absolute().resolve() != self.directory.resolve():
            raise UserError(
                f'checkpoints: a manager of {manager.directory} found, one of {self.directory} expected, where a run '
                'has its checkpoints'
            )
        manager.reload()  # of what was set aside

    def due(self, step: int) -> bool:
        """Whether the manager would save."""
        return bool(self._manager.should_save(step))

    def save(self, step: int, state: Tree, meta: Mapping[str, Any]) -> bool:
        """As `Writer.save`; `meta` is left out, as the manager has no place for it."""
        del meta
        if step in self._manager.all_steps():
            return False
        copied = _boxed(jax.tree.map(jnp.copy, state))
        self._guard(lambda: self._manager.save(step, args=ocp.args.StandardSave(copied), force=True))
        return True

    def wait(self) -> None:
        """Until everything is written."""
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits; the manager is closed by whom it belongs to."""
        self.wait()

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # orbax raises whatever it likes
            raise UserError(
                f"{self.directory}: a checkpoint couldn't be written by the manager ({_reason(error)}); it must be one "
                'of a single item, as ocp.CheckpointManager(directory) makes'
            ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


OF_SYSTEM = re.compile(r': ([^:]+) \[os_error_code=')


def _reason(error: Exception) -> str:
    """Why a write failed: what the system said, if it did. tensorstore has a long way of names before that."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = OF_SYSTEM.search(str(error))
    return said[1] if said else _first_line(error)


def _own(leaf: Any) -> jax.Array:
    """A leaf in a buffer of its own, never a view of what orbax holds: the step donates its state. On the first device
    it is not bound to that, as what a program starts with is not either: else JAX compiles the step a second time."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if leaf.sharding == first and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return jnp.array(np.asarray(leaf))
    return jnp.copy(leaf)


def _is_leaf(state: Tree) -> bool:
    return jax.tree_util.treedef_is_leaf(jax.tree.structure(state))


def _boxed(state: Tree) -> Tree:
    """A state that is one bare array in a list: orbax saves trees only."""
    return [state] if _is_leaf(state) else state


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """A leaf's shape and type, and where it goes: without a place of its own to the first device, wherever it was
    when it was saved, so that a run can be diagnosed on another machine."""
    leaf = leaf if hasattr(leaf, 'dtype') else jnp.asarray(leaf)
    place = getattr(leaf, 'sharding', None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _check_notes(path: Path) -> None:
    """Raises UserError where what orbax notes of a state is larger than of any: it reads it whole."""
    with contextlib.suppress(OSError):
        for note in path.iterdir():
            if note.name.startswith('_') and note.stat().st_size > MOST_NOTES:
                raise UserError(
                    f'{note}: {note.stat().st_size:,} bytes found, at most {MOST_NOTES:,} expected; it is damaged: '
                    'delete the folder of the step to go on from the one before'
                )


def _ranges(steps: list[int]) -> str:
    return f'{len(steps)} from {steps[0]} to {steps[-1]}' if steps else 'none'
