"""The faults, by name. Each gives a run and its truth, or None where this draw does nothing that is worth asking."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.foreign.common import Run, Setting
from benchmarks.foreign.planting import (
    HEALTHY,
    Draw,
    Planted,
    Truth,
    in_batches,
    in_state,
    moments_of,
    parameters,
    row,
    seen,
    with_leaf,
)

DATA, OPTIMISER, MODEL = frozenset({'data'}), frozenset({'optimiser'}), frozenset({'model'})
STATE = frozenset({'model', 'program', 'hardware'})
"""What a state that changes of itself may be called."""


def planted(
    draw: Draw, run: Run, truth: Truth, *, at: int | None = None, size: str = '', changes=()
) -> Planted:
    return Planted(
        program=draw.program,
        fault='',
        at=draw.at if at is None else at,
        size=size,
        steps=draw.steps,
        run=run,
        truth=truth,
        changes=tuple(changes),
    )


def none(draw: Draw) -> Planted:
    return planted(draw, draw.program.make(draw.setting), HEALTHY, at=0)


# Batches.


def in_batch(draw: Draw, setting: Setting, path, change, truth: Truth, mends=(), *, size='', exact=True):
    """One batch is bad. What a guard leaves out, or what has no effect, is healthy, or nothing to ask about."""

    def plant(s: Setting) -> Run:
        return in_batches(draw.program.make(s), lambda k: k == draw.at, path, change)

    run = plant(setting)
    what = seen(draw, run, draw.program.make(setting))
    truth = dataclasses.replace(truth, steps=(draw.at, draw.at))
    if draw.program.guarded and what.broken is None and not np.isfinite(what.losses[draw.at]):
        truth = HEALTHY
    elif what.first is None or (exact and what.first != draw.at):
        return None
    truth = dataclasses.replace(truth, needed=truth.needed and what.lasting)
    changes = [(name, points_to, plant(s)) for name, points_to, s in mends]
    return planted(draw, run, truth, size=size, changes=changes)


def slower(draw: Draw, setting: Setting):
    """What somebody tries first, whatever is wrong."""
    tenth = ('a tenth of the rate', 'optimiser', dataclasses.replace(setting, rate=setting.rate / 10))
    return draw.choose([], [tenth])


def leaf_of(path: tuple) -> str:
    return path[0] if path else ''


def nan_row(draw: Draw) -> Planted | None:
    e, value = draw.example(), draw.choose(np.nan, np.nan, np.inf)

    def change(leaf, k):
        place = row(draw.program, e)
        part = leaf[place].reshape(-1)
        part[draw.at % part.size] = value
        leaf[place] = part.reshape(leaf[place].shape)
        return leaf

    path = draw.program.inputs
    truth = Truth(
        kinds=frozenset({'nonfinite'}),
        passes=frozenset({'data'}),
        leaf=leaf_of(path),
        examples=(e,),
        causes=DATA,
    )
    mends = slower(draw, draw.setting)
    return in_batch(draw, draw.setting, path, change, truth, mends, size=str(value))


def bad_row(draw: Draw) -> Planted | None:
    e, factor = draw.example(), draw.between(1e2, 1e5)

    def change(leaf, k):
        leaf[row(draw.program, e)] *= np.float32(factor)
        return leaf

    path = draw.program.targets
    truth = Truth(passes=frozenset({'data'}), leaf=leaf_of(path), examples=(e,), causes=DATA)
    mends = slower(draw, draw.setting)
    return in_batch(draw, draw.setting, path, change, truth, mends, size=f'x {factor:g}')


def bad_batch(draw: Draw, path=None) -> Planted | None:
    factor = draw.between(1e2, 1e4)
    path = draw.program.targets if path is None else path
    truth = Truth(passes=frozenset({'data'}), leaf=leaf_of(path), causes=DATA)
    mends = slower(draw, draw.setting)

    def change(leaf, k):
        return leaf * np.float32(factor)

    return in_batch(draw, draw.setting, path, change, truth, mends, size=f'x {factor:g}')


def bad_inputs(draw: Draw) -> Planted | None:
    return bad_batch(draw, draw.program.inputs)


def mended(draw: Draw, name: str, setting: Setting):
    return draw.choose([], [(name, 'model', setting)])


def zero_row(draw: Draw, *, flaw='unguarded', passes=('forward', 'data'), name='a floor under the division'):
    e = draw.example()
    setting = dataclasses.replace(draw.setting, flaw=flaw)

    def change(leaf, k):
        leaf[row(draw.program, e)] = 0
        return leaf

    truth = Truth(
        kinds=frozenset({'nonfinite'}),
        passes=frozenset(passes),
        code=draw.program.code[flaw],
        examples=(e,),
        causes=DATA | MODEL,
    )
    mends = mended(draw, name, dataclasses.replace(setting, flaw=f'{flaw}, mended'))
    return in_batch(draw, setting, draw.program.zeros, change, truth, mends, size='0')


def zero_gradient(draw: Draw) -> Planted | None:
    return zero_row(draw, flaw='root', passes=('backward',), name='a floor under the root')


def zero_batch(draw: Draw) -> Planted | None:
    """All advantages of a batch are the same."""
    setting = dataclasses.replace(draw.setting, flaw='unguarded')
    truth = Truth(
        kinds=frozenset({'nonfinite'}),
        passes=frozenset({'forward', 'data'}),
        code=draw.program.code['unguarded'],
        causes=DATA | MODEL,
    )
    mends = mended(draw, 'a floor under the division', draw.setting)
    return in_batch(draw, setting, draw.program.zeros, lambda leaf, k: leaf * 0, truth, mends, size='0')


def overflowing_row(draw: Draw) -> Planted | None:
    e, factor = draw.example(), draw.between(1e3, 1e5)
    setting = dataclasses.replace(draw.setting, flaw='naive')

    def change(leaf, k):
        leaf[row(draw.program, e)] *= np.float32(factor)
        return leaf

    truth = Truth(
        kinds=frozenset({'nonfinite'}),
        passes=frozenset({'forward', 'backward'}),
        code=draw.program.code['naive'],
        examples=(e,),
        causes=DATA | MODEL,
    )
    mends = mended(draw, 'a softmax that subtracts the maximum', draw.setting)
    return in_batch(draw, setting, draw.program.inputs, change, truth, mends, size=f'x {factor:g}')


def overflowing_half(draw: Draw) -> Planted | None:
    """A target whose squared error float16 can't hold, where what overflows is not left out."""
    e, factor = draw.example(), draw.between(3e2, 5e3)
    setting = dataclasses.replace(draw.setting, flaw='unscaled')

    def change(leaf, k):
        leaf[row(draw.program, e)] *= np.float32(factor)
        return leaf

    truth = Truth(
        kinds=frozenset({'nonfinite'}),
        passes=frozenset({'forward'}),
        code=draw.program.code['unscaled'],
        examples=(e,),
        causes=DATA | {'precision'},
    )
    mends = draw.choose([], [('float32', 'precision', dataclasses.replace(setting, half=False))])
    loose = dataclasses.replace(draw, program=dataclasses.replace(draw.program, guarded=False))
    return in_batch(loose, setting, draw.program.targets, change, truth, mends, size=f'x {factor:g}')


def out_of_range(draw: Draw) -> Planted | None:
    e, by = draw.example(), int(draw.rng.integers(60, 1000))

    def change(leaf, k):
        if leaf.ndim == 1:
            leaf[e] = by
        else:
            leaf[e, draw.at % 3] = by
        return leaf

    truth = Truth(
        kinds=frozenset({'nonfinite'}),
        passes=frozenset({'forward', 'data'}),
        code=draw.program.code['ids'],
        examples=(e,),
        causes=DATA,
    )
    return in_batch(
        draw, draw.setting, draw.program.ids, change, truth, slower(draw, draw.setting), size=str(by)
    )


def shuffled_labels(draw: Draw) -> Planted | None:
    """From a step on; silent by nature, where no accuracy is kept."""

    def change(leaf, k):
        order = np.random.default_rng(k).permutation(leaf.shape[draw.program.axis])
        return np.take(leaf, order, axis=draw.program.axis)

    run = in_batches(draw.program.make(draw.setting), lambda k: k >= draw.at, draw.program.labels, change)
    truth = Truth(needed=False, steps=(draw.at, draw.at + 60), causes=DATA)
    return planted(draw, run, truth)


# Rates.


def in_schedule(
    draw: Draw, setting: Setting, schedule, at: int, grace: int, size='', mend='a rate that stays'
):
    """The rate is another from a step on; what is seen of it, and when, is the twin's to say."""
    faulty = dataclasses.replace(setting, schedule=schedule)
    run = draw.program.make(faulty)
    what = seen(draw, run, draw.program.make(setting))
    if what.first is None:
        return None
    changes = draw.choose([], [(mend, 'optimiser', draw.program.make(setting))])
    truth = Truth(needed=what.lasting, steps=(at, what.first + grace), causes=OPTIMISER)
    return planted(draw, run, truth, at=at, size=size, changes=changes)


def of_updates(draw: Draw, at: int) -> tuple[int, int]:
    """The update that step `at` makes or is gathered for, and the step that makes it."""
    count = at // draw.program.updates_every
    return count, (count + 1) * draw.program.updates_every - 1


def rate_jump(draw: Draw) -> Planted | None:
    factor = draw.between(30, 1000)
    count, at = of_updates(draw, draw.at)
    schedule = lambda n: jnp.where(n >= count, factor, 1.0)  # noqa: E731
    return in_schedule(draw, draw.setting, schedule, at, 20, f'x {factor:g}')


def wrong_sign(draw: Draw) -> Planted | None:
    count, at = of_updates(draw, draw.at)
    return in_schedule(draw, draw.setting, lambda n: jnp.where(n >= count, -1.0, 1.0), at, 40, 'x -1')


def rate_huge(draw: Draw) -> Planted | None:
    factor = draw.between(30, 1000)
    return in_schedule(draw, draw.setting, lambda n: factor, 0, 20, f'x {factor:g}', 'the usual rate')


def stopped(draw: Draw) -> Planted | None:
    """A rate that is 0 long before anything is learnt."""
    at = int(draw.steps * draw.rng.uniform(0.05, 0.2))
    count, _ = of_updates(draw, at)
    setting = dataclasses.replace(draw.setting, schedule=lambda n: jnp.maximum(0.0, 1 - n / max(count, 1)))
    run = draw.program.make(setting)
    what = seen(draw, run, draw.program.make(draw.setting))
    behind = np.median(what.twin[-50:]) < 0.4 * np.median(what.losses[-50:])
    changes = draw.choose([], [('a rate that stays', 'optimiser', draw.program.make(draw.setting))])
    truth = Truth(needed=bool(behind), steps=(int(0.7 * at), at + 20), causes=OPTIMISER)
    return planted(draw, run, truth, at=at, changes=changes)


# Adam.


def wiped(draw: Draw) -> Planted | None:
    """The second moment is lost during the descent, the first isn't."""
    at = max(20, draw.at // 2)

    def change(state):
        return moments_of(state, lambda node: node._replace(nu=jax.tree.map(jnp.zeros_like, node.nu)))

    run = in_state(draw.program.make(draw.setting), at, change)
    what = seen(draw, run, draw.program.make(draw.setting))
    if what.first is None:
        return None
    truth = Truth(needed=what.lasting, steps=(at, what.first + 10), causes=OPTIMISER)
    return planted(draw, run, truth, at=at)


def throughout(draw: Draw, causes, **changed) -> Planted:
    """Silent by nature: it trains, and worse than it could."""
    run = draw.program.make(dataclasses.replace(draw.setting, **changed))
    return planted(draw, run, Truth(needed=False, steps=(0, draw.steps), causes=causes), at=0)


def bfloat16_moments(draw: Draw) -> Planted:
    return throughout(draw, OPTIMISER | {'precision'}, moments='bfloat16')


def clip_after(draw: Draw) -> Planted:
    return throughout(draw, OPTIMISER, clip_after=draw.between(1e-3, 1e-2))


def identical(draw: Draw) -> Planted:
    return throughout(draw, MODEL, flaw='identical')


def dropout(draw: Draw) -> Planted:
    return throughout(draw, MODEL, flaw='dropout')


def epsilon_0(draw: Draw) -> Planted | None:
    """0/0 in Adam where no gradient ever came: rows of a table that the first batch doesn't ask for."""
    setting = dataclasses.replace(draw.setting, epsilon=0.0)
    run = draw.program.make(setting)
    what = seen(draw, run, draw.program.make(draw.setting))
    if what.broken != 0:
        return None
    changes = draw.choose([], [('an epsilon of 1e-8', 'optimiser', draw.program.make(draw.setting))])
    truth = Truth(
        kinds=frozenset({'nonfinite'}),
        passes=frozenset({'update'}),
        code=('update(',),
        steps=(0, 0),
        causes=OPTIMISER,
    )
    return planted(draw, run, truth, at=0, changes=changes)


# States.


def corrupt_weight(draw: Draw) -> Planted | None:
    """One number of the parameters grows a millionfold before a step."""
    run = draw.program.make(draw.setting)
    name = draw.choose(*parameters(run.init()))
    place = int(draw.rng.integers(1000))

    def change(leaf):
        flat = leaf.reshape(-1)
        at = place % flat.size
        return (
            flat.at[at]
            .set(1e6 * jnp.where(flat[at] < 0, -1, 1) * jnp.maximum(jnp.abs(flat[at]), 0.1))
            .reshape(leaf.shape)
        )

    broken = in_state(run, draw.at, lambda state: with_leaf(state, name, change))
    what = seen(draw, broken, run)
    if what.first != draw.at:
        return None
    passes = frozenset({'forward', 'backward', 'update', ''})
    truth = Truth(needed=what.lasting, steps=(draw.at, draw.at), passes=passes, leaf=name, causes=STATE)
    return planted(draw, broken, truth, size=name)


def dead_relu(draw: Draw) -> Planted | None:
    name = next(n for n in parameters(draw.program.make(draw.setting).init()) if draw.program.relu_bias in n)
    run = draw.program.make(draw.setting)
    dead = in_state(run, draw.at, lambda state: with_leaf(state, name, lambda leaf: leaf * 0 - 1e3))
    what = seen(draw, dead, run)
    if what.first is None:
        return None
    truth = Truth(needed=what.lasting, steps=(draw.at, what.first + 20), causes=STATE)
    return planted(draw, dead, truth, size=name)


FAULTS = {
    fault.__name__: fault
    for fault in (
        none,
        nan_row,
        bad_row,
        bad_batch,
        bad_inputs,
        zero_row,
        zero_gradient,
        zero_batch,
        overflowing_row,
        overflowing_half,
        out_of_range,
        shuffled_labels,
        rate_jump,
        wrong_sign,
        rate_huge,
        stopped,
        wiped,
        bfloat16_moments,
        clip_after,
        identical,
        dropout,
        epsilon_0,
        corrupt_weight,
        dead_relu,
    )
}
TRIES = 8


def draw_of(program, rng: np.random.Generator) -> Draw:
    """Early in a quarter of the runs, otherwise anywhere."""
    steps = int(rng.integers(300, 601))
    at = int(rng.integers(3, 40)) if rng.random() < 0.25 else int(rng.integers(3, steps - 3))
    setting = Setting(seed=int(rng.integers(1000)), batch_size=int(rng.choice([8, 16, 32])))
    return Draw(program, rng, setting, steps, at)


def drawn(program, fault: str, rng: np.random.Generator) -> Planted | None:
    """One of a program's faults; drawn again while it does nothing."""
    for _ in range(TRIES):
        found = FAULTS[fault](draw_of(program, rng))
        if found is not None:
            return dataclasses.replace(found, fault=fault)
    return None


def battery(program, seed: int, number: int):
    """Some faults of a program, none among them, each another; a generator, since truth takes its time."""
    rng = np.random.default_rng([seed, *program.name.encode()])
    kinds = list(rng.permutation(['none', *program.kinds]))
    while kinds and number:
        found = drawn(program, kinds.pop(), rng)
        if found is not None:
            number -= 1
            yield found
