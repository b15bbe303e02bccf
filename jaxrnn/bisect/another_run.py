"""A run that is another than its replay: what that says of it.

Two replays that disagree with each other say that the step is no pure function. Two that agree say that the run did
something else; the checkpoints around tell what.
"""

from collections.abc import Sequence

import numpy as np

from jaxrnn import environment
from jaxrnn.bisect import agreement, flipped_bits
from jaxrnn.bisect.agreement import Agreement, LeafDifference
from jaxrnn.bisect.replayer import Replayer
from jaxrnn.diagnosis import Cause
from jaxrnn.record import loop, telemetry
from jaxrnn.record.records import different, same

MOST = 3
"""Leaves of the state that are named."""

NEAR = 1e-3
"""Share of a leaf's largest number by which a replay of other batches may miss a checkpoint that it explains: rounding
is far below it, and another batch far above."""

AGREE, DISAGREE = (
    'two replays agree with each other, not with the run',
    'two replays disagree with each other',
)


def cause_of(replayer: Replayer) -> Cause:
    """Why a replay is another run than the one recorded, of a replay that is."""
    step = replayer.first_mismatch
    assert step is not None
    first = next((each for each in replayer.broken if each.stop - 1 == step), None)
    return _by_record(replayer, step) if first is None else _by_checkpoint(replayer, first)


def _by_record(replayer: Replayer, step: int) -> Cause:
    """Says whether two replays agree with each other, and what differs around the run."""
    checkpoint = replayer.checkpoint_before(step)
    again = Replayer(replayer.subject)
    again.replay(checkpoint, step + 1)
    agree = same(replayer.rows[step], again.rows[step])
    differences, around = _around(replayer, checkpoint)
    recorded_row = replayer.recorded.at(step) or {}
    fields = different(recorded_row, replayer.rows[step])
    if agree and telemetry.DIGEST in recorded_row and telemetry.DIGEST not in fields:
        measured = f'{", ".join(fields)} measured otherwise'
        return Cause(
            'none',
            f'not reproducible from step {step} on: the states agree bit for bit, but {measured}, as by another '
            f'version of the code that makes the record{around}; train again with this one',
        )
    if (
        agree
        and not differences
        and step == checkpoint
        and (other := _also_from(replayer, checkpoint)) is not None
    ):
        return Cause(
            'program',
            f'not reproducible from step {step} on, nor from step {other} on: {AGREE}; {_another(replayer)}',
        )
    if agree and not differences and (flipped := flipped_bits.of_step(replayer, step)) is not None:
        return Cause('hardware', f'not reproducible from step {step} on: {_bit(flipped, step)}')
    if agree and not differences and replayer.subject.other_program:
        return Cause('program', f'not reproducible from step {step} on: {AGREE}; {_another(replayer)}')
    kind = 'hardware' if agree and not differences else 'nondeterminism'
    return Cause(kind, f'not reproducible from step {step} on: {AGREE if agree else DISAGREE}{around}')


def _another(replayer: Replayer) -> str:
    """What is to be said of a run that was trained otherwise; in which equation, if its own were kept."""
    if other := replayer.subject.other_program:
        return f'the step is another program than trained: {other}'
    return 'the run was trained with another program, other batches or another rate'


def _bit(found: flipped_bits.FlippedBit, step: int) -> str:
    """A bit that made a run another, and how that is known."""
    if not found.before:
        return f'the state after it has, by the digest in its record, another {found.flip} than the replay'
    return (
        f'the state that step {step} starts from had another {found.flip}; with it, the replay gives the record of '
        f'step {step} bit for bit'
    )


def _also_from(replayer: Replayer, checkpoint: int) -> int | None:
    """A neighbouring checkpoint whose first step, too, doesn't give its record: a fault of the hardware doesn't come
    again where one looks."""
    steps = replayer.subject.checkpoints.steps()
    place = steps.index(checkpoint)
    for other in (*steps[place + 1 : place + 2], *steps[max(place - 1, 0) : place]):
        (*_, row) = Replayer(replayer.subject).replay(other, other + 1)
        recorded = replayer.recorded.at(other)
        if recorded is not None and not same(recorded, row):
            return other
    return None


def _by_checkpoint(replayer: Replayer, found: Agreement) -> Cause:
    """What the checkpoints around say of the interval in which the run was first another."""
    start, stop = found.start, found.stop
    said = f'not reproducible between checkpoints {start} and {stop}'
    differences, around = _around(replayer, start)
    if loop.state_digest(replayer.reached(start, stop)) != found.reached:
        return Cause('nondeterminism', f'{said}: {DISAGREE}{around}')
    if differences:
        return Cause('nondeterminism', f'{said}: {AGREE}{around}')
    following = next((at for at in replayer.subject.checkpoints.steps() if at > stop), None)
    after = None if following is None else replayer.agreement(stop, following)
    # A first checkpoint that was saved before any step has the right number where all others are one off.
    for each in (found, after):
        if each is not None and each.broken and (why := _misnumbered(replayer, each)):
            return Cause('program', f'{said}: {why}')
    apart = f'{AGREE}: {_apart(found)}'
    if found.undecided:
        return Cause(
            'none',
            f'{said}: {apart}, as far as rounding alone leads this run; whether the step was only compiled otherwise, '
            'or another program was trained with, can not be told',
        )
    if after is None:
        damaged = '' if _is_ours(replayer, stop) else f', or checkpoint {stop}, the last, was damaged'
        return Cause('program', f'{said}: {apart}; {_another(replayer)}{damaged}')
    if not after.broken:
        return _once(replayer, found, f'{said}, and there alone: {apart}')
    saved = replayer.subject.checkpoints.restore(after.stop)
    past = agreement.differences(saved, replayer.reached(start, after.stop))
    if _explained(past, found):
        return Cause(
            'hardware',
            f'{said}: checkpoint {stop} holds a state that the run never had: replayed past it, checkpoint '
            f'{after.stop} is reached{_how_well(past)}; it was damaged on disk, or edited: delete its folder',
        )
    return Cause('program', f'{said}, nor between {stop} and {after.stop}: {apart}; {_another(replayer)}')


def _once(replayer: Replayer, found: Agreement, said: str) -> Cause:
    """What came once and left the run another: as it was saved with a digest, or not."""
    if _is_ours(replayer, found.stop):
        return Cause('hardware', f'{said}; a fault of the hardware, or other batches')
    if found.start == replayer.subject.checkpoints.steps()[0]:
        said = f'{said}; checkpoint {found.start}, the first, was damaged, or'
    else:
        said = f'{said};'
    return Cause(
        'program',
        f'{said} something was done once: a resume that lost a part of the state (as the moments of an optimiser), '
        'other batches, an edit, or a fault of the hardware',
    )


def _is_ours(replayer: Replayer, checkpoint: int) -> bool:
    """Whether a checkpoint has a digest, by which damage would have shown."""
    return replayer.subject.checkpoints.meta(checkpoint).get('state') is not None


def _misnumbered(replayer: Replayer, found: Agreement) -> str:
    """What is to be said where the batches of the steps one later, or one earlier, lead to the checkpoint; else ''."""
    start, stop = found.start, found.stop
    saved = replayer.subject.checkpoints.restore(stop)
    for shift, holds in ((1, 'the state after step k'), (-1, 'the state that step k - 1 starts from')):
        try:
            reached = replayer.reached(start, stop, shift)
        except Exception:  # there may be no batch of another number
            continue
        leaves = agreement.differences(saved, reached)
        if not _explained(leaves, found):
            continue
        number = f'k {"+" if shift > 0 else "-"} 1'
        return (
            f'checkpoint k holds {holds}: numbers are one off (from {start}, the batches of steps {start + shift} to '
            f'{stop - 1 + shift} lead to {stop}{_how_well(leaves)}). Save that state '
            f'as checkpoint {number}, or shift the batches: lambda k: batch_at({number})'
        )
    return ''


def _explained(leaves: Sequence[LeafDifference], found: Agreement) -> bool:
    """Whether another way to a checkpoint leads there, where the replay's own did not."""
    return not leaves or leaves[0].size <= min(NEAR, found.leaves[0].size / 100)


def _how_well(leaves: Sequence[LeafDifference]) -> str:
    return ' but for rounding' if leaves else ' bit for bit'


def _apart(found: Agreement) -> str:
    """Which leaves differ, and by how much."""
    named = [
        f'{leaf.path} ({leaf.size:.0%} of its largest)' if 0.005 <= leaf.size < np.inf
        else f'{leaf.path} ({leaf.size:.1g} of its largest)' if leaf.size < np.inf
        else leaf.path
        for leaf in found.leaves[:MOST]
    ]  # fmt: skip
    more = f' and {len(found.leaves) - MOST} more' if len(found.leaves) > MOST else ''
    return f'{", ".join(named)}{more} differ'


def _around(replayer: Replayer, checkpoint: int) -> tuple[list[str], str]:
    """What has changed around the run since, and as it is said."""
    recorded = replayer.subject.checkpoints.meta(checkpoint).get('environment_details', {})
    differences = environment.differences(recorded, environment.describe()) if recorded else []
    return differences, f'; since the run, {", ".join(differences)}' if differences else ''
