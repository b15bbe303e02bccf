"""Remedies: flags that say what is replayed, and states that go on."""

import dataclasses

import jax
import numpy as np
import pytest
import small

from jaxrnn import cells, config, remedy, train

NAMES = [each.name for each in remedy.REMEDIES]
CONFIG = small.configuration('lstm', preset='keras1').changed(
    dtype='bfloat16', moment_dtype='bfloat16', bias_correction=False, learning_rate=6e-3
)
"""One to which all of them apply."""


def by_name(name):
    return next(each for each in remedy.REMEDIES if each.name == name)


def test_names_are_told_apart():
    assert len(set(NAMES)) == len(NAMES)
    assert {each.points_to for each in remedy.REMEDIES} <= {'data', 'model', 'optimiser', 'precision'}
    assert [each.name for each in remedy.applicable(CONFIG)] == NAMES


def test_the_first_suspected_are_tried_first():
    """What is out of the ordinary; then what is for this symptom alone; of a network that never learnt the network."""
    unusual = ['float32 products', 'float32 moments', 'bias correction']
    usual = [name for name in NAMES if name not in unusual and name != 'guard']

    def names(*arguments, **options):
        return [each.name for each in remedy.suspects(CONFIG, *arguments, **options)]

    assert names('collapse') == unusual + usual
    assert names('nonfinite') == [*unusual, 'guard', *usual]
    never_learnt = names('constant', lasting=True)
    assert sorted(never_learnt) == sorted(unusual + usual) and never_learnt[:3] == unusual
    model = [name for name in usual if by_name(name).points_to == 'model']
    assert never_learnt[3 : 3 + len(model)] == model and len(model) == 3


@pytest.mark.parametrize('name', NAMES)
def test_flags_are_what_is_replayed(name):
    """Read from the command line, beside those of the run."""
    values = {
        field.name: value
        for group in dataclasses.fields(CONFIG)
        for field in dataclasses.fields(getattr(CONFIG, group.name))
        for value in [getattr(getattr(CONFIG, group.name), field.name)]
    }
    for text in remedy.flags(CONFIG, by_name(name)).split(' '):
        option, _, value = text.removeprefix('--').partition('=')
        kind = type(values[option])
        values[option] = value == 'true' if kind is bool else kind(value)
    groups = {
        group.name: group.type(**{f.name: values[f.name] for f in dataclasses.fields(group.type)})
        for group in dataclasses.fields(config.Config)
    }
    assert config.Config(**groups) == remedy.applied(CONFIG, by_name(name)) != CONFIG


def test_what_changes_nothing_is_not_applicable():
    changed = CONFIG.changed(
        gate='sigmoid',
        epsilon=1e-4,
        b2=0.9,
        schedule='exponential',
        dtype='float32',
        mask_padding=True,
        moment_dtype='float32',
        bias_correction=True,
        recurrent_gain=1.0,
        guard=True,
        update_clip=1.0,
        clip='zclip',
        second_moment='amsgrad',
    )
    left = {each.name for each in remedy.applicable(changed)}
    assert left == {'half the learning rate', 'an eighth of the learning rate', 'norm clipping'}
    assert cells.PRESETS['keras3'].gate is cells.SIGMOID
    assert 'sigmoid gates' not in {each.name for each in remedy.applicable(small.configuration())}


def test_two_remedies_as_one():
    """Each on top of the other, in the flags as in what is replayed; None of what is about the rate already."""
    short = CONFIG.changed(max_steps=500)
    both = remedy.combined(short, 'update clipping')
    assert both.name == 'update clipping, half the rate, decaying' and both.removes == 'outrun second moment'
    assert remedy.flags(short, both) == (
        '--learning_rate=0.003 --update_clip=1.0 --schedule=warmup_cosine --decay_steps=500'
    )
    scheduled = CONFIG.changed(schedule='exponential')
    both = remedy.combined(scheduled, 'update clipping')
    assert remedy.flags(scheduled, both) == '--learning_rate=0.003 --update_clip=1.0'
    assert remedy.combined(CONFIG, remedy.HALF) is remedy.combined(CONFIG, remedy.DECAY) is None
    eighth = remedy.together(by_name(remedy.HALF), by_name('an eighth of the learning rate'), name='')
    assert remedy.applied(CONFIG, eighth).optimiser.learning_rate == 6e-3 / 16


def test_a_remedy_under_longer_steps():
    """The same key for the same run; nothing where it is the run as it was; and none of what is unusual."""

    def made(name):
        return remedy.change(CONFIG, small.dataset(), by_name(name))

    half, eighth = made('half the learning rate'), made('an eighth of the learning rate')
    assert half.stressed(2) is None and eighth.stressed(4).key == half.key
    assert half.stressed(4).key == CONFIG.changed(learning_rate=1.2e-2)
    assert eighth.stressed(4).stressed is None and eighth.stressed(2).name == f'{eighth.name}, 2 x the rate'
    assert made('bias correction').stressed is None is made('guard').stressed
    with pytest.raises(ValueError, match='changes nothing'):
        remedy.change(CONFIG.changed(update_clip=1.0), small.dataset(), by_name('update clipping'))


@pytest.mark.parametrize('name', NAMES)
def test_a_running_state_goes_on_under_each(name):
    """Its parameters and moments are kept, and the next step is finite."""
    made = CONFIG
    program = train.make_program(made, small.dataset())
    state = program.init()
    step = jax.jit(program.step)
    for number in range(3):
        state, _ = step(state, program.batch_at(number))
    changed = remedy.change(made, small.dataset(), by_name(name)).make()
    other = changed.convert(state)
    if name != 'recurrent gain of 1':
        jax.tree.map(np.testing.assert_array_equal, other.params, state.params)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    kept = [np.asarray(leaf) for leaf in jax.tree.leaves(other.opt_state)]
    for moment in moments:
        assert any(leaf.shape == moment.shape and np.array_equal(leaf, moment) for leaf in kept)
    expected = jax.eval_shape(train.make_program(remedy.applied(made, by_name(name)), small.dataset()).init)
    assert jax.eval_shape(lambda: other) == expected
    after, record = jax.jit(changed.step)(other, changed.batch_at(3))
    assert np.isfinite(record['loss']) and int(after.step) == 4


def test_a_recurrent_gain_scales_the_recurrent_kernels_there_are():
    """From step 0 on it is the run that the flag gives."""
    one = by_name('recurrent gain of 1')
    before, after = (train.make_program(c, small.dataset()) for c in (CONFIG, remedy.applied(CONFIG, one)))
    changed = remedy.change(CONFIG, small.dataset(), one).make().convert(before.init())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), changed.params, after.init().params
    )
    old, new = (
        np.asarray(params['recurrent']['recurrent_kernel'])
        for params in (before.init().params, changed.params)
    )
    assert np.linalg.norm(old[:, :8], 2) == pytest.approx(1.1) and np.linalg.norm(
        new[:, :8], 2
    ) == pytest.approx(1)


@pytest.mark.parametrize('name', ['float32 moments', 'float32 products'])
def test_what_widens_is_of_precision(name):
    assert (by_name(name).points_to, by_name(name).removes) == ('precision', 'low precision')
