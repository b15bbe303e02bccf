"""A run that begins where another one was at a step, and goes on under other flags."""

from pathlib import Path
from typing import NamedTuple

import jax

from jaxrnn import environment, files
from jaxrnn.bisect import replay
from jaxrnn.escaping import one_line
from jaxrnn.record import layout, loop
from jaxrnn.record.checkpoint import Checkpoints
from jaxrnn.types import Tree, UserError
from jaxrnn.words import data, remedies, train
from jaxrnn.words.config import Config
from jaxrnn.words.opening import begins, check_files
from jaxrnn.words.run import LoadedRun, open_run

OF_THE_START = ('initial_weights', 'recurrent_gain', 'chrono_steps')
"""Options that only change what a run starts from: under them nothing would be another than before."""


class Branch(NamedTuple):
    """Where a run begins."""

    run: str  # directory of the run that it comes from
    step: int  # the first that it makes itself


def begin(
    branch: Branch,
    directory: Path,
    config: Config,
    make_program: train.MakeProgram = train.make_program,
) -> None:
    """Gives a new run the data of another one and, as its first checkpoint, the state that a step of it started from.
    Does nothing where the run has begun there already.

    The state is that of the nearest checkpoint, replayed up to the step and held against the records; then converted
    as an experiment converts it: moments are kept, never set to zero. The new run's records begin at that step.

    Args:
        branch: where to begin.
        directory: of the new run.
        config: of the new run.
        make_program: as in `run.train_run`, of both.

    Raises:
        UserError: no such run or step; one whose steps don't come out as they were recorded; options that can't be
            changed on the way; a directory with a run that began elsewhere.
    """
    paths = layout.Paths(directory)
    check_files(paths)
    note = {'run': str(Path(branch.run).absolute()), 'step': branch.step}
    if Checkpoints(paths.checkpoints).steps():
        begins(paths)  # refuses a damaged note
        if not paths.branch.exists() or files.read_json(paths.branch) != note:
            raise UserError(
                f'--branch_from: {directory} holds a run that did not begin at step {branch.step} of {branch.run}; '
                'choose another directory'
            )
        return
    parent = open_run(branch.run, make_program)
    _check(branch, parent, config)
    state = _state(branch, parent)
    like = jax.eval_shape(make_program(config, parent.dataset).init)
    converted = remedies.converted(parent.config, config, state)
    _check_same(branch, like, converted)
    layout.make_directory(paths.root)
    data.write_dataset(paths.data, parent.dataset)
    layout.write_json(paths.branch, note)
    identity = {'config': config.digest(), 'data': parent.dataset.digest}
    loop.begin_at(paths.root, branch.step, converted, identity)


def _check(branch: Branch, parent: LoadedRun, config: Config) -> None:
    steps = parent.checkpoints.steps()
    last = steps[-1] if steps else -1
    if not steps or not steps[0] <= branch.step <= last:
        has = f'its checkpoints reach from step {steps[0]} to {last}' if steps else 'it has no checkpoint'
        raise UserError(f'--branch_at: {branch.step} found, but {has}')
    before, after = parent.config.to_json(), config.to_json()
    fixed = [*((name, 'data') for name in before['data']), *((name, 'model') for name in OF_THE_START)]
    for name, group in fixed:
        if before[group][name] != after[group][name] and name != 'allow_pickle':
            raise UserError(
                f'--{name}: {after[group][name]} found, and {before[group][name]} in the run that is branched from; '
                f'it can not be changed at a step (--flagfile={branch.run}/flags.txt has all of its flags)'
            )


def _state(branch: Branch, parent: LoadedRun) -> Tree:
    """What the step started from."""
    options = parent.config.training
    subject = replay.subject(
        parent.program.step, parent.program.batch_at, parent.checkpoints, parent.records,
        digest_every=options.digest_every, checkify=options.checkify,
    )  # fmt: skip
    replayer = replay.Replayer(subject)
    state = replayer.state(branch.step)
    if replayer.first_mismatch is not None:
        start = replayer.checkpoint_before(branch.step)
        trained = parent.checkpoints.meta(start).get('environment_details', {})
        other = environment.differences(trained, environment.describe()) if trained else []
        why = f' ({one_line(", ".join(other))})' if other else ''
        raise UserError(
            f'--branch_from: {branch.run} is not reproduced here from step {replayer.first_mismatch} on{why}; choose '
            'one of its checkpoints as --branch_at'
        )
    return state


def _check_same(branch: Branch, like: Tree, state: Tree) -> None:
    ours, theirs = (jax.tree.map(lambda leaf: f'{leaf.dtype}{leaf.shape}', tree) for tree in (like, state))
    if ours != theirs:
        raise UserError(
            f'--branch_from: {branch.run} has another network; --network, --hidden and --preset must be its own'
        )
