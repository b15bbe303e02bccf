"""Remedies: flags that say what is replayed, and states that go on."""

import dataclasses

import jax
import numpy as np
import pytest
import small

from jaxrnn.detect import rule_language
from jaxrnn.rnn import cells
from jaxrnn.words import config, remedies, train
from jaxrnn.words.signals import SIGNALS

ELSEWHERE = (
    'learning rate by width', 'exact products', 'constant learning rate', 'usual recurrent gain',
    'usual learning rate',
)  # fmt: skip
"""Of wide networks, of accelerators, of rates that decay, of large gains, and of rates that are far too high."""

NAMES = [each.name for each in remedies.REMEDIES if each.name not in ELSEWHERE]
CONFIG = small.configuration('lstm', preset='keras1').changed(
    dtype='bfloat16', moment_dtype='bfloat16', bias_correction=False, learning_rate=6e-3
)
"""One to which all of them apply."""


def by_name(name):
    return next(each for each in remedies.REMEDIES if each.name == name)


def test_names_are_told_apart():
    every = [each.name for each in remedies.REMEDIES]
    assert len(set(every)) == len(every)
    assert {each.removes for each in remedies.REMEDIES} <= {'', *remedies.MECHANISMS}
    assert {each.points_to for each in remedies.REMEDIES} <= {'data', 'model', 'optimiser', 'precision'}
    assert [each.name for each in remedies.applicable(CONFIG)] == NAMES


def test_the_first_suspected_are_tried_first():
    """What is out of the ordinary; then what is for this symptom alone; of a network that never learnt the network."""
    unusual = ['float32 products', 'float32 moments', 'bias correction']
    usual = [name for name in NAMES if name not in unusual and not by_name(name).against]

    def names(kind, **facts):
        return [each.name for each in remedies.suspects(CONFIG, remedies.Facts(kind, **facts))]

    usual.sort(key=lambda name: by_name(name).initial)
    assert names('collapse') == unusual + usual
    assert names('nonfinite') == [*unusual, 'guard', *usual]
    assert names('stall') == [*unusual, 'four times the learning rate', *usual]
    never_learnt = names('constant', lasting=True)
    assert sorted(never_learnt) == sorted(unusual + usual) and never_learnt[:3] == unusual
    model = [name for name in usual if by_name(name).points_to == 'model']
    assert never_learnt[3 : 3 + len(model)] == model and len(model) == 4


def test_of_a_rate_far_too_high_the_usual_one_is_the_first_suspect():
    high = small.configuration('gru').changed(learning_rate=30.0)
    first = remedies.suspects(high, remedies.Facts('diverged'))[0]
    assert (first.name, first.options(high)) == ('usual learning rate', {'learning_rate': 1e-3})
    made = remedies.change(high, small.dataset(), first)
    assert (made.flags, made.shortens) == ('--learning_rate=0.001', pytest.approx(30_000))
    assert not first.options(high.changed(learning_rate=0.02))


def test_what_the_records_suggest_is_tried_first():
    """Of what isn't suspected before all: by a rule over the steps before the symptom."""
    steps = np.arange(300.0)
    quiet = {
        'step': steps,
        'memory': np.full(300, 1.0),
        'padding_gain': np.zeros(300),
        'step_rms': np.ones(300),
    }

    def first(**columns):
        facts = remedies.Facts('collapse', columns={**quiet, **columns})
        names = [each.name for each in remedies.suspects(CONFIG, facts)]
        return names[3]  # after what is unusual

    def first_of_the_start(columns):
        facts = remedies.Facts('collapse', columns={**quiet, **columns})
        return next(each.name for each in remedies.suspects(CONFIG, facts) if each.initial)

    assert first() == 'update clipping'
    assert first(update_curvature=np.full(300, 0.9)) == 'capped curvature'
    assert first(relative_step=np.full(300, 0.3)) == 'capped spectral step'
    burst = first(step_rms=np.where(steps < 280, 1.0, 9.0), relative_step=np.full(300, 0.3))
    assert burst == 'update clipping'  # in the order of the table, where several are
    padding = [{'memory': np.full(300, 0.01)}, {'padding_gain': np.full(300, -3.0)}]
    assert [first_of_the_start(columns) for columns in padding] == ['masked padding'] * 2
    gates = {'dead_input_gate': np.zeros(300), 'dead_output_gate': np.full(300, 0.7)}
    assert first_of_the_start(gates) == 'sigmoid gates'
    assert first_of_the_start({}) == 'sigmoid gates' != first_of_the_start(padding[0])
    for each in remedies.REMEDIES:
        if each.suggested:
            fields = rule_language.parse(each.suggested).fields - {'step'}
            assert fields <= {signal.name for signal in SIGNALS}


def test_what_needs_a_run_from_the_start_is_tried_last():
    """Unless the window begins there anyway, as that of a network that never learnt."""
    initial = {'sigmoid gates', 'warm-up', 'recurrent gain of 1', 'masked padding', 'chrono biases'}
    assert {each.name for each in remedies.REMEDIES if each.initial} == {*initial, 'usual recurrent gain'}
    for lasting in (False, True):
        facts = remedies.Facts('constant', lasting=lasting)
        names = [each.name for each in remedies.suspects(CONFIG, facts)]
        assert (set(names[-len(initial) :]) == initial) == (not lasting)
    made = remedies.change(CONFIG, small.dataset(), by_name('masked padding'))
    assert made.initial and made.stressed is None


def test_epsilon_by_the_rule():
    """η λ / 38 with two digits, rounded up; in place of a fixed one where the sharpness calls for more."""
    found = remedies.epsilon_by_rule(2.0)
    assert remedies.flags(CONFIG, found) == '--epsilon=0.00032'  # 6e-3 * 2 / 38 = 3.158e-4
    assert remedies.applied(CONFIG.changed(learning_rate=0.019), found).optimiser.epsilon == 1e-3
    assert remedies.applied(CONFIG.changed(epsilon=1e-3), found) == CONFIG.changed(epsilon=1e-3)

    def epsilon(sharpness):
        suspected = remedies.suspects(CONFIG, remedies.Facts('collapse', sharpness=sharpness))
        (one,) = (each for each in suspected if each.name == remedies.EPSILON)
        return remedies.applied(CONFIG, one).optimiser.epsilon

    assert (epsilon(None), epsilon(2.0), epsilon(1e-9)) == (1e-5, 3.2e-4, 1e-5)


def test_the_rate_goes_with_the_width():
    by_width = by_name('learning rate by width')
    assert remedies.flags(config.Config(), by_width) == '--learning_rate=0.000125'
    stacked = config.Config(model=config.Model(network='stacked'))
    assert remedies.flags(stacked, by_width) == '--learning_rate=0.00025'
    assert by_width not in remedies.applicable(CONFIG)


def test_a_rate_that_decayed_may_be_kept_constant():
    decaying = CONFIG.changed(schedule='exponential')
    constant = by_name('constant learning rate')
    assert remedies.flags(decaying, constant) == '--schedule=constant'
    names = [each.name for each in remedies.suspects(decaying, remedies.Facts('stall')) if not each.unusual]
    assert names[:2] == ['constant learning rate', 'four times the learning rate']
    assert constant not in remedies.suspects(decaying, remedies.Facts('collapse'))
    assert constant not in remedies.applicable(CONFIG)


def test_a_gain_that_no_library_has_is_suspected_first():
    names = [
        each.name
        for each in remedies.suspects(CONFIG.changed(recurrent_gain=2.0), remedies.Facts('collapse'))
    ]
    assert 'usual recurrent gain' in names[:4] and 'recurrent gain of 1' not in names
    assert (
        remedies.flags(CONFIG.changed(recurrent_gain=2.0), by_name('usual recurrent gain'))
        == '--recurrent_gain=1.0'
    )


def test_exact_products_are_of_accelerators(monkeypatch):
    exact = by_name('exact products')
    assert exact not in remedies.applicable(CONFIG)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    assert remedies.flags(CONFIG, exact) == '--precision=highest'


@pytest.mark.parametrize('name', NAMES)
def test_flags_are_what_is_replayed(name):
    """Read from the command line, beside those of the run."""
    values = {
        field.name: value
        for group in dataclasses.fields(CONFIG)
        for field in dataclasses.fields(getattr(CONFIG, group.name))
        for value in [getattr(getattr(CONFIG, group.name), field.name)]
    }
    for text in remedies.flags(CONFIG, by_name(name)).split(' '):
        option, _, value = text.removeprefix('--').partition('=')
        kind = type(values[option])
        values[option] = value == 'true' if kind is bool else kind(value)
    groups = {
        group.name: group.type(**{f.name: values[f.name] for f in dataclasses.fields(group.type)})
        for group in dataclasses.fields(config.Config)
    }
    assert config.Config(**groups) == remedies.applied(CONFIG, by_name(name)) != CONFIG


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
        chrono_steps=20,
        warmup_steps=500,
        curvature_every=10,
        curvature_cap=0.8,
        spectral_cap=0.05,
    )
    left = {each.name for each in remedies.applicable(changed)}
    rates = {'half the learning rate', 'an eighth of the learning rate'}
    clippings = {'norm clipping', 'AdaGC', 'SPAM clipping', 'adaptive clipping'}
    stalled = {'constant learning rate', 'four times the learning rate'}
    assert left == {*rates, *clippings, *stalled, 'Yogi'}
    assert cells.PRESETS['keras3'].gate is cells.SIGMOID
    assert 'sigmoid gates' not in {each.name for each in remedies.applicable(small.configuration())}


def test_two_remedies_as_one():
    """Each on top of the other, in the flags as in what is replayed; None of what is about the rate already."""
    short = CONFIG.changed(max_steps=500)
    both = remedies.combined(short, by_name('update clipping'))
    assert both.name == 'update clipping, half the rate, decaying' and both.removes == 'outrun second moment'
    assert remedies.flags(short, both) == (
        '--learning_rate=0.003 --update_clip=1.0 --schedule=warmup_cosine --decay_steps=500'
    )
    scheduled = CONFIG.changed(schedule='exponential')
    both = remedies.combined(scheduled, by_name('update clipping'))
    assert remedies.flags(scheduled, both) == '--learning_rate=0.003 --update_clip=1.0'
    for rate in (remedies.HALF, remedies.DECAY):
        assert remedies.combined(CONFIG, by_name(rate)) is None
    eighth = remedies.together(by_name(remedies.HALF), by_name('an eighth of the learning rate'), name='')
    assert remedies.applied(CONFIG, eighth).optimiser.learning_rate == 6e-3 / 16


def test_a_remedy_under_longer_steps():
    """The same key for the same run; nothing where it is the run as it was; and none of what is unusual."""

    def made(name):
        return remedies.change(CONFIG, small.dataset(), by_name(name))

    half, eighth = made('half the learning rate'), made('an eighth of the learning rate')
    assert half.stressed(2) is None and eighth.stressed(4).key == half.key
    assert half.stressed(4).key == CONFIG.changed(learning_rate=1.2e-2)
    assert eighth.stressed(4).stressed is None and eighth.stressed(2).name == f'{eighth.name}, 2 x the rate'
    assert made('bias correction').stressed is None is made('guard').stressed
    with pytest.raises(ValueError, match='changes nothing'):
        remedies.change(CONFIG.changed(update_clip=1.0), small.dataset(), by_name('update clipping'))


def test_what_depends_on_the_step_says_what_it_comes_to_there():
    """A cosine of 8,000 steps is at .038 of its peak at step 7,000; at its start it is as it was."""
    config = CONFIG.changed(max_steps=8000)

    def here(name, at):
        return remedies.change(config, small.dataset(), by_name(name), at=at).here

    assert here(remedies.DECAY, 7000) == '0.038 x the rate at step 7000'
    assert here(remedies.DECAY, 4000) == '0.5 x the rate at step 4000'
    assert here(remedies.DECAY, 0) == '', 'the rate as it was'
    assert here('half the learning rate', 4000) == here('update clipping', 4000) == ''
    combined = remedies.combined(config, by_name('update clipping'))
    both = remedies.change(config, small.dataset(), combined, at=4000)
    assert both.here == '0.25 x the rate at step 4000'


@pytest.mark.parametrize('name', NAMES)
def test_a_running_state_goes_on_under_each(name):
    """Its parameters and moments are kept, and the next step is finite."""
    made = CONFIG
    program = train.make_program(made, small.dataset())
    state = program.init()
    step = jax.jit(program.step)
    for number in range(3):
        state, _ = step(state, program.batch_at(number))
    changed = remedies.change(made, small.dataset(), by_name(name)).make()
    other = changed.convert(state)
    if name not in ('recurrent gain of 1', 'chrono biases'):
        jax.tree.map(np.testing.assert_array_equal, other.params, state.params)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    kept = [np.asarray(leaf) for leaf in jax.tree.leaves(other.opt_state)]
    for moment in moments:
        assert any(leaf.shape == moment.shape and np.array_equal(leaf, moment) for leaf in kept)
    expected = jax.eval_shape(train.make_program(remedies.applied(made, by_name(name)), small.dataset()).init)
    assert jax.eval_shape(lambda: other) == expected
    after, record = jax.jit(changed.step)(other, changed.batch_at(3))
    assert np.isfinite(record['loss']) and int(after.step) == 4


def test_a_recurrent_gain_scales_the_recurrent_kernels_there_are():
    """From step 0 on it is the run that the flag gives."""
    one = by_name('recurrent gain of 1')
    before, after = (train.make_program(c, small.dataset()) for c in (CONFIG, remedies.applied(CONFIG, one)))
    changed = remedies.change(CONFIG, small.dataset(), one).make().convert(before.init())
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


@pytest.mark.parametrize('network', ['lstm', 'gru'])
def test_chrono_biases_are_added_to_those_there_are(network):
    """From step 0 on it is the run that the flag gives; later what was learnt stays."""
    made = CONFIG.changed(network=network)
    chrono = by_name('chrono biases')
    assert remedies.flags(made, chrono) == '--chrono_steps=20'
    before, after = (train.make_program(c, small.dataset()) for c in (made, remedies.applied(made, chrono)))
    convert = remedies.change(made, small.dataset(), chrono).make().convert
    start = before.init()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), convert(start).params, after.init().params
    )
    moved = start._replace(params=jax.tree.map(lambda x: x + 1, start.params))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b + 1, rtol=1e-5, atol=1e-6),
        convert(moved).params,
        after.init().params,
    )
    bias = np.asarray(after.init().params['recurrent']['bias'])
    memory = np.linspace(1, 19, 8)
    expected = [np.log(memory)] if network == 'gru' else [-np.log(memory), np.log(memory)]
    np.testing.assert_allclose(bias, np.concatenate([*expected, np.zeros(16)]), rtol=1e-6)


@pytest.mark.parametrize('name', ['float32 moments', 'float32 products'])
def test_what_widens_is_of_precision(name):
    assert (by_name(name).points_to, by_name(name).removes) == ('precision', 'low precision')
