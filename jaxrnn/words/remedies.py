"""Remedies: changes of a configuration by name, each a set of flags, and what each makes of a running train state.

A new one is an entry of REMEDIES. Formulas and sources of what they switch on are where that is defined: `optim`,
`transforms`, `curvature`, `models`.
"""

import json
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn.detect import rule_language
from jaxrnn.experiment.mechanisms import KNOWN, Mechanism
from jaxrnn.experiment.outcome import Change, Changed
from jaxrnn.optim import curvature, signals
from jaxrnn.rnn import cells
from jaxrnn.types import Series, Tree
from jaxrnn.words import data, models, optimisers, presets, train
from jaxrnn.words.config import Config, limited

Overrides = Mapping[str, Any]


MECHANISMS: Mapping[str, Mechanism] = {
    mechanism.name: mechanism
    for mechanism in (
        *KNOWN,
        Mechanism(
            'excessive recurrent gain',
            'the recurrent weights start several times larger than any library has them', 2,
        ),
        Mechanism('excessive learning rate', 'the rate is tens of times that at which Adam is used', 2),
        Mechanism('shut gates', 'hard gates pass no gradient where they are shut', 8, wide=True),
        Mechanism('short memory', 'gates forget a word before it ends', 9, wide=True),
        Mechanism('recurrent gain', 'the recurrent weights amplify the state from step to step', 10, wide=True),
        Mechanism('padding', 'what follows the last letter overwrites the state', 11, wide=True),
    )
}  # fmt: skip
"""What makes these networks break, by name: what anybody's run can suffer from, and their own."""


class Remedy(NamedTuple):
    """A change to a configuration."""

    name: str
    points_to: str  # the cause where it averts a symptom: data, model, optimiser, precision
    options: Callable[[Config], Overrides]  # option -> value; empty where it changes nothing
    means: str  # why it may help
    removes: str = ''  # name of the mechanism that it takes away, of MECHANISMS; '' for none in particular
    unusual: bool = (
        False  # whether it takes back what few runs have, and is the first to be suspected where it is
    )
    against: str = ''  # the one kind of symptom that it is for; '' for any
    # A rule over the records: where it holds before the symptom, this remedy is among the first to be tried.
    suggested: str = ''
    initial: bool = False  # whether it is of what a run starts from: to be replayed from there


class Facts(NamedTuple):
    """What is known of a symptom, by which remedies are chosen and put in order."""

    kind: str
    lasting: bool = False  # whether it is of a network that never started to learn
    columns: Series = MappingProxyType({})  # of the records before it
    sharpness: float | None = None  # λmax of the loss's Hessian, before it


def _fixed(
    name: str,
    points_to: str,
    means: str,
    removes: str = '',
    *,
    unusual: bool = False,
    against: str = '',
    suggested: str = '',
    initial: bool = False,
    **options: Any,
) -> Remedy:
    return Remedy(
        name, points_to, lambda config: options, means, removes, unusual, against, suggested, initial
    )


def _slower(config: Config, by: float) -> Overrides:
    return {'learning_rate': _rounded(config.optimiser.learning_rate * by)}


def _rounded(rate: float) -> float:
    """As a person would write it; so that half of twice a rate is that rate."""
    return limited('learning_rate', float(f'{rate:.6g}'))


def _decaying(config: Config) -> Overrides:
    if config.optimiser.schedule != 'constant':
        return {}
    return {'schedule': 'warmup_cosine', 'decay_steps': config.loop.max_steps}


def _constant(config: Config) -> Overrides:
    return {} if config.optimiser.schedule == 'constant' else {'schedule': 'constant'}


def _faster_forgetting(config: Config, b2: float) -> Overrides:
    return {'b2': b2} if b2 < config.optimiser.b2 else {}


def _epsilon(config: Config) -> float:
    return config.optimiser.epsilon or presets.network_of(config.model.preset).epsilon


def _larger_epsilon(config: Config) -> Overrides:
    return {'epsilon': 1e-5} if _epsilon(config) < 1e-5 else {}


def epsilon_by_rule(sharpness: float) -> Remedy:
    """Adam's ε so large that its steps stay below the edge of stability however small v gets: η λmax(H) / 38, by
    default (`curvature.epsilon_for`), at a sharpness that was measured before the symptom; with two digits, rounded up.
    """

    def options(config: Config) -> Overrides:
        least = float(curvature.epsilon_for(sharpness, config.optimiser.learning_rate, config.optimiser.b1))
        if not (np.isfinite(least) and least > _epsilon(config)):
            return {}
        unit = 10.0 ** (np.floor(np.log10(least)) - 1)
        return {'epsilon': limited('epsilon', float(f'{np.ceil(round(least / unit, 6)) * unit:.1e}'))}

    return Remedy(
        EPSILON, 'optimiser', options,
        'however small v gets, no step is longer than the curvature allows', 'second-moment decay',
    )  # fmt: skip


def _narrow(config: Config) -> Overrides:
    width = config.model.hidden or models.WIDTHS[config.model.network]
    return _slower(config, NARROW / width) if width > NARROW else {}


def _exact_products(config: Config) -> Overrides:
    return {'precision': 'highest'} if jax.default_backend() != 'cpu' else {}


def _soft_gates(config: Config) -> Overrides:
    gate = config.model.gate
    hard = gate == 'hard_sigmoid' or presets.network_of(config.model.preset).gate is cells.HARD_SIGMOID
    return {'gate': 'sigmoid'} if hard and gate != 'sigmoid' else {}


def _chrono(config: Config) -> Overrides:
    steps = config.data.pad_to or config.data.max_length + 1
    return {} if config.model.chrono_steps else {'chrono_steps': limited('chrono_steps', steps)}


USUAL_GAIN = 1.5
"""Of initial recurrent weights that are orthogonal times a number: libraries have 1 or 1.1."""


def _smaller_gain(config: Config) -> Overrides:
    return {'recurrent_gain': 1.0} if 1 < gain(config) <= USUAL_GAIN else {}


def _usual_gain(config: Config) -> Overrides:
    return {'recurrent_gain': 1.0} if gain(config) > USUAL_GAIN else {}


def gain(config: Config) -> float:
    """Of the initial recurrent weights."""
    return config.model.recurrent_gain or presets.weights_of(config.model).recurrent_gain


DECAY = 'decaying learning rate'
"""The fourth of the seven checks."""

HALF = 'half the learning rate'
EPSILON = 'larger epsilon'

NARROW = 128
"""Width at which a stock learning rate is at home: an Adam step is as long as √(n m) of a matrix [n, m], whose norm
doesn't grow with its width, so that the rate goes with 1 / width (Yang & Hu 2021, 2011.14522, for Adam)."""

OUTGREW = next(signal.alarm for signal in signals.OF_ADAM if signal.name == 'step_rms')

DECAYING = ('warmup_cosine', 'exponential')
"""Schedules under which a rate goes on falling."""

SHORTENING = {'learning_rate', 'schedule', 'decay_steps', 'warmup_steps'}
"""Options that make steps shorter, or longer, and nothing else."""

USUAL_RATE, UNUSUAL_RATE = 1e-3, 0.03
"""Adam's stock rate, and thirty times that: above it, that rate is the first suspect."""


def _usual_rate(config: Config) -> Overrides:
    return {'learning_rate': USUAL_RATE} if config.optimiser.learning_rate > UNUSUAL_RATE else {}


REMEDIES = (
    _fixed(
        'float32 products', 'precision', 'products keep their digits', 'low precision', unusual=True,
        dtype='float32',
    ),
    _fixed(
        'float32 moments', 'precision', "v follows small changes of the gradients' size", 'low precision',
        unusual=True, moment_dtype='float32',
    ),
    _fixed(
        'bias correction', 'optimiser', 'the first steps are no longer than the others',
        'missing bias correction', unusual=True, bias_correction=True,
    ),
    Remedy(
        'usual recurrent gain', 'model', _usual_gain, 'the state is not amplified from step to step',
        'excessive recurrent gain', unusual=True, initial=True,
    ),
    Remedy(
        'usual learning rate', 'optimiser', _usual_rate, "steps are as long as Adam's stock rate makes them",
        'excessive learning rate', unusual=True,
    ),
    Remedy(
        'constant learning rate', 'optimiser', _constant, 'steps do not shrink before anything is learnt',
        'vanishing steps', against='stall',
    ),
    Remedy(
        'four times the learning rate', 'optimiser', lambda config: _slower(config, 4), 'steps are four times as long',
        'vanishing steps', against='stall',
    ),
    _fixed('guard', 'data', 'a step that is not finite changes nothing', against='nonfinite', guard=True),
    _fixed(
        'update clipping', 'optimiser', 'no update is larger than the squared gradients of the past justify',
        'outrun second moment', suggested=OUTGREW, update_clip=1.0,
    ),
    Remedy(
        'faster second moment', 'optimiser', lambda config: _faster_forgetting(config, 0.99),
        "Adam's squared gradients follow a burst within 100 steps, not 1,000", 'outrun second moment',
        suggested=OUTGREW,
    ),
    Remedy(DECAY, 'optimiser', _decaying, 'steps shrink as the loss landscape sharpens'),
    Remedy(
        HALF, 'optimiser', lambda config: _slower(config, 0.5),
        'steps are half as long',
    ),
    Remedy(
        'sigmoid gates', 'model', _soft_gates, 'gates keep a gradient where hard ones are shut', 'shut gates',
        suggested=' or '.join(f'smooth(dead_{gate}, 16) > .5' for gate in ('input_gate', 'output_gate')),
        initial=True,
    ),
    _fixed(
        'warm-up', 'optimiser', 'the first steps, whose averages are of a few gradients, are short', initial=True,
        warmup_steps=500,
    ),
    Remedy(
        'an eighth of the learning rate', 'optimiser', lambda config: _slower(config, 0.125),
        'steps are an eighth as long',
    ),
    _fixed(
        'AMSGrad', 'optimiser', 'the second moment never decays, so quiet steps do not make the next ones long',
        'second-moment decay', second_moment='amsgrad',
    ),
    Remedy(
        EPSILON, 'optimiser', _larger_epsilon,
        'coordinates with tiny gradients take no full steps', 'second-moment decay',
    ),
    Remedy(
        'recurrent gain of 1', 'model', _smaller_gain, 'the state is not amplified from step to step',
        'recurrent gain', initial=True,
    ),
    _fixed(
        'ZClip', 'optimiser', 'gradients far above their running norm are cut', 'outlying gradients', clip='zclip',
    ),
    _fixed(
        'norm clipping', 'optimiser', 'gradients of a norm above 1 are cut', 'outlying gradients', clip='global_norm',
        clip_threshold=1.0,
    ),
    _fixed(
        'masked padding', 'model', 'a word ends at its last letter', 'padding', mask_padding=True,
        suggested='smooth(memory, 16) < .05 or smooth(memory, 16) > 20 or smooth(abs(padding_gain), 16) > 2.3',
        initial=True,
    ),
    Remedy(
        'exact products', 'precision', _exact_products, 'products of float32 round none of their operands',
        'low precision',
    ),
    _fixed(
        'capped curvature', 'optimiser', 'steps are shortened where the loss curves along them',
        'edge of stability',
        suggested='update_curvature > .8', curvature_every=10, curvature_cap=0.8,
    ),
    _fixed(
        'Yogi', 'optimiser', 'the second moment falls slowly, whatever the gradients do', 'second-moment decay',
        second_moment='yogi',
    ),
    _fixed(
        'capped spectral step', 'optimiser', "no step is larger than a twentieth of the matrix that it's added to",
        suggested='relative_step > .1', spectral_cap=0.05,
    ),
    Remedy(
        'learning rate by width', 'optimiser', _narrow, 'a matrix of any width moves by the same share of itself',
    ),
    _fixed(
        'AdaGC', 'optimiser', "gradients far above their tensor's running norm are cut", 'outlying gradients',
        clip='adagc',
    ),
    _fixed(
        'SPAM clipping', 'optimiser', 'numbers of a gradient far above their own v are cut', 'outlying gradients',
        clip='spam',
    ),
    _fixed(
        'adaptive clipping', 'optimiser', 'gradients are cut at a share of the weights that they move',
        'outlying gradients', clip='adaptive', clip_threshold=0.01,
    ),
    Remedy(
        'chrono biases', 'model', _chrono, 'gates start with memories as long as the words', 'short memory',
        initial=True,
    ),
)  # fmt: skip
"""In the order in which they are tried."""


def together(first: Remedy, *others: Remedy, name: str) -> Remedy:
    """Several as one, the later ones applied to what the earlier ones make; it takes away what the first does."""

    def options(config: Config) -> Overrides:
        changes: Overrides = {}
        for remedy in (first, *others):
            changes = {**changes, **remedy.options(config.changed(**changes))}
        return changes

    every = (first, *others)
    return first._replace(
        name=name,
        options=options,
        means='; '.join(remedy.means for remedy in every),
    )


def combined(config: Config, remedy: Remedy) -> Remedy | None:
    """A remedy with steps half as long, and from then on shorter; None for one that is about the learning rate already.

    What one remedy averts on the steps before a symptom comes later, mostly: the loss landscape goes on sharpening, and
    a rate that decays keeps ahead of it.
    """
    half, decay = (next(each for each in REMEDIES if each.name == wanted) for wanted in (HALF, DECAY))
    if remedy.options(config).keys() & {'learning_rate', 'schedule'}:
        return None
    return together(remedy, half, decay, name=f'{remedy.name}, half the rate, decaying')


def applicable(config: Config) -> list[Remedy]:
    """Those that change something of a configuration."""
    return [remedy for remedy in REMEDIES if applied(config, remedy) != config]


def suspects(config: Config, facts: Facts) -> list[Remedy]:
    """Those that may avert a symptom, the first suspected first: what takes back something unusual; what is for this
    kind of symptom; for a network that never started to learn what changes the network; then what can be replayed
    without going back to the start; of equals what the records suggest."""
    found = applicable(config)
    if facts.sharpness is not None:
        ruled = epsilon_by_rule(facts.sharpness)
        found = [ruled if each.name == EPSILON and ruled.options(config) else each for each in found]

    def order(remedy: Remedy) -> tuple[bool, ...]:
        first = (
            remedy.unusual, bool(remedy.against), facts.lasting and remedy.points_to == 'model',
            facts.lasting or not remedy.initial, _holds(remedy.suggested, facts.columns),
        )  # fmt: skip
        return tuple(not each for each in first)

    return sorted((each for each in found if each.against in ('', facts.kind)), key=order)


def _holds(rule: str, columns: Series) -> bool:
    """At the last record that has all that the rule asks for; a rule that asks for what there isn't doesn't."""
    parsed = rule_language.parse(rule) if rule else None
    if parsed is None or not columns or not parsed.fields <= columns.keys():
        return False
    return bool(rule_language.holds(parsed, columns)[-1])


def applied(config: Config, remedy: Remedy) -> Config:
    return config.changed(**remedy.options(config))


def flags(config: Config, remedy: Remedy) -> str:
    """As the command line has them."""
    changed, before = applied(config, remedy).to_json(), config.to_json()
    return ' '.join(
        f'--{name}={str(value).lower() if isinstance(value, bool) else value}'
        for group, options in changed.items()
        for name, value in options.items()
        if value != before[group][name]
    )


def change(
    config: Config,
    dataset: data.Dataset,
    remedy: Remedy,
    make_program: train.MakeProgram = train.make_program,
    *,
    signals: bool = False,
    at: int = 0,
) -> Change:
    """A remedy as an experiment on a run of a configuration.

    Args:
        config: of the run.
        dataset: its data.
        remedy: what is done otherwise.
        make_program: as in `run.train_run`.
        signals: whether its records have signals, too.
        at: the first step that is replayed under it.
    """

    def longer(times: int) -> Change | None:
        other = applied(config, remedy)
        rate = other.optimiser.learning_rate
        if times > 1:
            other = other.changed(learning_rate=_rounded(rate * times))
        quiet = other.changed(signals=signals and config.training.signals)
        if not (other.optimiser.curvature_cap or signals):
            quiet = quiet.changed(curvature_every=0)  # what only measures

        def make() -> Changed:
            program = make_program(quiet, dataset)
            biases = None
            if other.model.chrono_steps != config.model.chrono_steps:
                before = make_program(config, dataset).init().params
                biases = jax.tree.map(jnp.subtract, program.init().params, before)
            return Changed(
                program.step, program.batch_at, lambda state: converted(config, quiet, state, biases)
            )

        if other == config:
            return None
        identity = json.dumps([quiet.to_json(), dataset.digest], sort_keys=True)
        can_be_stressed = times == 1 and not (remedy.unusual or remedy.against or remedy.initial)
        name = remedy.name if times == 1 else f'{remedy.name}, {times} x the rate'
        return Change(
            name, remedy.points_to, make, flags(config, remedy) if times == 1 else '', remedy.means,
            MECHANISMS.get(remedy.removes), other, remedy.initial, identity,
            shortens=_shorter(config, other, at) if {*remedy.options(config)} <= SHORTENING else 0,
            here=_rate_at(config, other, at),
            decays=other.optimiser.schedule in DECAYING and other.optimiser.schedule != config.optimiser.schedule,
            stressed=longer if can_be_stressed else None,
        )  # fmt: skip

    made = longer(1)
    if made is None:
        raise ValueError(f'{remedy.name} changes nothing')
    return made


def _rate_at(config: Config, other: Config, step: int) -> str:
    """What another schedule makes of the rate at a step, as a person reads it; '' where the schedule is no other."""
    ours, theirs = config.optimiser, other.optimiser
    if (ours.schedule, ours.warmup_steps) == (theirs.schedule, theirs.warmup_steps):
        return ''
    times = _shorter(config, other, step)
    share = f'{1 / times:.2g}' if 0 < times < math.inf else '1'
    return '' if share == '1' else f'{share} x the rate at step {step}'


def _shorter(config: Config, other: Config, step: int) -> float:
    """How many times as short the steps are at a step."""
    ours, theirs = (float(optimisers.learning_rate(each.optimiser)(step)) for each in (config, other))
    return ours / theirs if theirs > 0 else math.inf


def converted(
    config: Config, other: Config, state: train.TrainState, biases: Tree | None = None
) -> train.TrainState:
    """A train state of one configuration as that of another: moments are kept, never zeroed. Another recurrent gain
    scales the recurrent kernels there are, and other initial biases are added to those there are, by what they differ:
    from step 0 it is what the flags would have given.

    Args:
        config: that the state is of.
        other: that it shall be of.
        state: consumed in part.
        biases: parameters that `other` starts from less those that `config` does, of which biases are used.
    """
    opt_state: Tree = optimisers.convert(state.opt_state, config.optimiser, other.optimiser, state.params)
    factor = gain(other) / gain(config)
    params = state.params
    if factor != 1:
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * factor if path[-1].key == 'recurrent_kernel' else leaf, params
        )
    if biases is not None:
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf, more: leaf + more if path[-1].key == 'bias' else leaf, params, biases
        )
    return state._replace(params=params, opt_state=opt_state)
