"""A replay that is held against the checkpoints of somebody's own loop, and what is said where it is another run."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jaxrnn
from jaxrnn.bisect import agreement, replay, subject_of

STEPS, EVERY, CHANGED = 400, 50, 270
WEIGHTS = np.float32([1, -2, 3])


def init():
    return {'w': jnp.zeros(3), 'velocity': jnp.zeros(3)}


def batch_at(k):
    x = np.random.default_rng(k).normal(size=(8, 3)).astype(np.float32)
    return x, x @ WEIGHTS + 0.1 * np.sin(k + np.arange(8, dtype=np.float32))


def step_at(rate):
    def step(state, batch):
        x, y = batch
        loss, g = jax.value_and_grad(lambda w: jnp.mean((x @ w - y) ** 2))(state['w'])
        velocity = 0.5 * state['velocity'] + g
        return {'w': state['w'] - rate * velocity, 'velocity': velocity}, {'loss': loss}

    return step


step = step_at(0.01)


def loop(
    directory,
    advance=None,
    *,
    batches=batch_at,
    edit=lambda k, state: state,
    saved=None,
    number=None,
    late=False,
):
    """Somebody's own loop: each EVERY steps, before or after the step, it saves the state.

    Args:
        advance: the compiled step.
        edit: what becomes of the state before step k.
        saved: what becomes of what is saved as checkpoint k, and of it alone.
        number: what checkpoint k is called.
        late: saves after the step.
    """
    advance, state = advance or jax.jit(step), init()
    saved, number = saved or (lambda k, state: state), number or (lambda k: k)
    with ocp.CheckpointManager(directory) as manager:

        def save(k, state):
            if k % EVERY == 0:
                manager.save(number(k), args=ocp.args.StandardSave(saved(k, state)))
                manager.wait_until_finished()

        for k in range(STEPS + 1):
            state = edit(k, state)
            if not late:
                save(k, state)
            state, _ = advance(state, batches(k))
            if late:
                save(k, state)


def bisected(directory, batches=batch_at, **options):
    return jaxrnn.bisect(step, batches, directory, like=init, **options)[0]


def since(k, now, later):
    """One compiled step up to step k, another from there on."""
    count, steps = iter(range(STEPS + 1)), (jax.jit(now), jax.jit(later))
    return lambda state, batch: steps[next(count) >= k](state, batch)


def test_the_run_that_it_is(tmp_path):
    loop(tmp_path)
    found = bisected(tmp_path)
    assert found.symptom is None and found.replay.first_mismatch is None and found.replay.bit_identical
    assert found.cause.why == 'no rule holds at any step'


def test_another_rate_since(tmp_path):
    loop(tmp_path, since(CHANGED, step, step_at(0.0105)))
    found = bisected(tmp_path)
    assert found.replay.first_mismatch == 299 and not found.replay.bit_identical
    assert found.cause.kind == 'program' and found.first_bad_step is None
    said = found.cause.why
    assert 'between checkpoints 250 and 300, nor between 300 and 350: two replays agree' in said
    assert 'velocity (' in said and 'w (' in said and said.endswith('other batches or another rate')


def test_another_program_from_the_start(tmp_path):
    loop(tmp_path, jax.jit(step_at(0.0105)))
    found = bisected(tmp_path)
    assert found.replay.first_mismatch == 49 and found.cause.kind == 'program'
    assert 'between checkpoints 0 and 50, nor between 50 and 100' in found.cause.why


def test_a_resume_that_lost_the_moments(tmp_path):
    loop(tmp_path, edit=lambda k, state: {**state, 'velocity': jnp.zeros(3)} if k == CHANGED else state)
    found = bisected(tmp_path)
    assert found.replay.first_mismatch == 299 and found.cause.kind == 'program'
    assert 'between checkpoints 250 and 300, and there alone' in found.cause.why
    assert 'a resume that lost a part of the state' in found.cause.why


@pytest.mark.parametrize('damage', [1.0001, 1000.0, np.nan])
def test_a_checkpoint_that_was_damaged(damage, tmp_path):
    """The run went on from what it had in memory."""
    loop(tmp_path, saved=lambda k, state: {**state, 'w': state['w'].at[1].mul(damage)} if k == 200 else state)
    found = bisected(tmp_path)
    assert found.replay.first_mismatch == 199 and found.first_bad_step is None
    assert found.cause.kind == 'hardware'
    assert 'checkpoint 200 holds a state that the run never had' in found.cause.why


@pytest.mark.parametrize(('at', 'first'), [(0, 49), (STEPS, STEPS - 1)])
def test_a_checkpoint_at_an_end_that_was_damaged(at, first, tmp_path):
    """There is no checkpoint before the one, and none after the other, that could prove it."""
    loop(tmp_path, saved=lambda k, state: {**state, 'w': state['w'] + 1} if k == at else state)
    found = bisected(tmp_path)
    assert found.replay.first_mismatch == first
    assert f'checkpoint {at}, the {"last" if at else "first"}, was damaged' in found.cause.why


@pytest.mark.parametrize(
    ('options', 'says', 'first'),
    [
        ({'late': True}, 'holds the state after step k', 49),
        ({'number': lambda k: k + 1}, 'holds the state that step k - 1 starts from', 50),
    ],
)
def test_numbers_that_are_one_off(options, says, first, tmp_path):
    loop(tmp_path, **options)
    found = bisected(tmp_path)
    assert found.replay.first_mismatch == first and found.cause.kind == 'program'
    assert says in found.cause.why and 'bit for bit' in found.cause.why


def test_numbers_that_are_one_off_but_for_the_first(tmp_path):
    """The initial state is saved as 0 before the loop, and each later one after its step."""
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.StandardSave(init()))
        state, advance = init(), jax.jit(step)
        for k in range(201):
            state, _ = advance(state, batch_at(k))
            if k % EVERY == 0 and k:
                manager.save(k, args=ocp.args.StandardSave(state))
                manager.wait_until_finished()
    found = bisected(tmp_path)
    assert found.replay.first_mismatch == 49
    assert 'holds the state after step k' in found.cause.why and 'from 50' in found.cause.why


def poisoned(k):
    x, y = batch_at(k)
    return x, y * np.float32(np.nan if k == 220 else 1)


def test_one_off_is_seen_where_all_after_the_symptom_is_nan(tmp_path):
    """A state of NaNs agrees with any other; the checkpoints before the symptom don't."""
    loop(tmp_path, batches=poisoned, late=True)
    found = bisected(tmp_path, poisoned)
    assert found.first_bad_step is None and 'after step k' in found.cause.why


def test_a_symptom_is_proven_against_a_checkpoint(tmp_path):
    loop(tmp_path, batches=poisoned)
    found = bisected(tmp_path, poisoned)
    assert found.first_bad_step == 220 and found.replay.bit_identical


def test_nothing_is_verified_where_nothing_could_differ(tmp_path):
    """Two checkpoints, of which the second is all NaN: it would be reached from anywhere."""

    def batches(k):
        x, y = batch_at(k)
        return x, y * np.float32(np.nan if k == 20 else 1)

    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.StandardSave(init()))
        manager.save(50, args=ocp.args.StandardSave(jax.tree.map(lambda x: x * np.nan, init())))
    found = bisected(tmp_path, batches)
    assert found.first_bad_step == 20 and not found.replay.bit_identical


def test_a_symptom_is_judged_on_what_the_run_had(tmp_path):
    """From step 270 on the state grows faster: a replay that went on from its own would be NaN nowhere; and what a rule
    sees at the seam between two states is no symptom."""
    loop(tmp_path, edit=lambda k, state: jax.tree.map(lambda x: x * 1.3, state) if k >= CHANGED else state)
    replayer = replay.Replayer(subject_of(step, batch_at, tmp_path, init, 1))
    rows = replayer.replay(200, 400)
    losses = [row['loss'] for row in rows]
    assert losses[100] > 100 * losses[99] and losses[150] > 100 * losses[149]
    assert [each.stop for each in replayer.broken] == [300, 350, 400]
    for when in ('loss > 3 * median(loss, 50)', ''):
        found = bisected(tmp_path, when=when)
        assert found.symptom is None and found.replay.first_mismatch == 299


def test_batches_that_are_no_function_of_the_step(tmp_path):
    loop(tmp_path)
    count = iter(range(10**6))
    found = bisected(tmp_path, lambda k: batch_at(next(count)))
    assert found.cause.kind == 'nondeterminism' and 'two replays disagree' in found.cause.why


def shuffled(rate):
    """The same step in other words: what is summed, and in which order, is up to a compiler."""

    def step(state, batch):
        x, y = batch
        misses = x[:, 2] * state['w'][2] + x[:, 0] * state['w'][0] + (x[:, 1] * state['w'][1] - y)
        g = jnp.stack([(misses * x[:, n]).sum() for n in range(3)]) * 2 / len(y)
        velocity = g + 0.5 * state['velocity']
        return {'w': state['w'] - rate * velocity, 'velocity': velocity}, {'loss': jnp.mean(misses**2)}

    return step


def test_another_program_than_the_records_are_of(tmp_path):
    """No fault of the hardware comes again at each checkpoint."""
    jaxrnn.record(step, batch_at, init, tmp_path, max_steps=STEPS, checkpoint_every=EVERY)
    found = jaxrnn.bisect(step_at(0.0105), batch_at, tmp_path, like=init, when='step == 230')[0]
    assert found.replay.first_mismatch == 200 and found.cause.kind == 'program'
    assert 'nor from step 250 on' in found.cause.why


def test_a_damaged_checkpoint_of_a_loop_compiled_otherwise(tmp_path):
    def damage(k, state):
        return {**state, 'w': state['w'].at[1].mul(1.01)} if k == 200 else state

    loop(tmp_path, jax.jit(shuffled(0.01)), saved=damage)
    found = bisected(tmp_path)
    assert found.replay.first_mismatch == 199 and found.cause.kind == 'hardware'
    assert 'checkpoint 250 is reached' in found.cause.why


def test_one_off_in_a_loop_compiled_otherwise(tmp_path):
    loop(tmp_path, jax.jit(shuffled(0.01)), late=True)
    found = bisected(tmp_path)
    assert found.replay.first_mismatch == 49 and 'after step k' in found.cause.why


class TestRounding:
    """Their own loop compiled the step otherwise."""

    @pytest.mark.parametrize('batches', [batch_at, lambda k: (batch_at(k)[0], batch_at(k)[0] @ WEIGHTS)])
    def test_op_by_op_it_is_theirs_bit_for_bit(self, batches, tmp_path):
        with jax.disable_jit():
            loop(tmp_path, step, batches=batches)
        found = bisected(tmp_path, batches)
        assert found.replay.first_mismatch is None and found.symptom is None and found.replay.bit_identical

    def test_else_it_agrees_to_some_digits(self, tmp_path):
        loop(tmp_path, jax.jit(shuffled(0.01)))
        found = bisected(tmp_path)
        assert found.replay.first_mismatch is None and found.symptom is None
        assert not found.replay.bit_identical
        digits = int(found.cause.why.split(' digits')[0].split()[-1])
        assert digits >= 4 and 'not bit for bit' in found.cause.why

    @pytest.mark.parametrize('change', [0, CHANGED])
    def test_another_rate_is_no_rounding(self, change, tmp_path):
        loop(tmp_path, since(change, shuffled(0.01), shuffled(0.0105)))
        found = bisected(tmp_path)
        assert found.replay.first_mismatch == change // EVERY * EVERY + EVERY - 1
        assert found.cause.kind == 'program'

    def test_what_can_not_be_told_is_not_said(self, tmp_path):
        """Of a momentum that has shrunk to rounding errors nothing can be known."""

        def batches(k):
            x, _ = batch_at(k)
            return x, x @ WEIGHTS

        loop(tmp_path, jax.jit(shuffled(0.01)), batches=batches)
        found = bisected(tmp_path, batches)
        assert found.replay.first_mismatch is not None and found.cause.kind == 'none'
        assert 'can not be told' in found.cause.why

    def test_another_rate_is_no_rounding_of_what_was_exact(self, tmp_path):
        """Converged, and compiled as we do it."""

        def batches(k):
            x, _ = batch_at(k)
            return x, x @ WEIGHTS

        loop(tmp_path, since(CHANGED, step, step_at(0.0105)), batches=batches)
        assert bisected(tmp_path, batches).replay.first_mismatch == 299


def test_a_run_that_amplifies_rounding_proves_nothing():
    """Where one rounding leads as far as another program does, neither can be told from the other."""
    state = {'w': np.float32([1, 2])}
    near, far = ({'w': np.float32(x)} for x in ([1.000001, 2], [1.1, 2]))
    assert agreement.apart_by_rounding(near, state, [near]) == (True, True)
    assert agreement.apart_by_rounding(far, state, [near]) == (False, False)
    assert agreement.apart_by_rounding(far, state, [far]) == (True, False)
    assert agreement.apart_by_rounding({'w': np.float32([np.nan, 2])}, state, [near]) == (False, False)


def test_differences_are_those_of_bits():
    nan, other = np.uint32([0x7FC00000, 0x7FC00001]).view(np.float32)
    same = {'x': np.float32([nan, 1]), 'n': np.int32(3), 'key': jax.random.key(1)}
    assert agreement.differences(same, {**same, 'x': np.float32([other, 1])}) == ()
    assert [d.path for d in agreement.differences(same, {**same, 'key': jax.random.key(2)})] == ['key']
    assert [d.path for d in agreement.differences(same, {**same, 'n': np.int32(4)})] == ['n']
    (found,) = agreement.differences(same, {**same, 'x': np.float32([np.nan, 1.5])})
    assert found.path == 'x' and found.size == pytest.approx(1 / 3)
    assert agreement.differences({'x': np.float32(0)}, {'x': np.float32(-0.0)})
    assert agreement.differences({'x': np.float32(np.nan)}, {'x': np.float32(1)})[0].size == np.inf
    assert agreement.differences({'x': 1}, {'y': 1, 'z': 2})
