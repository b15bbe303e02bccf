"""What a run is made from: frozen dataclasses, checked where they are built.

Each field is the one home of its default, its bounds and its help; the scripts make their flags
from these fields. A configuration goes to JSON and back, and has a digest: two runs of equal
digest, data and environment are bit for bit the same run.
"""

import dataclasses
import hashlib
import json
import math
import re
import reprlib
from collections.abc import Mapping
from typing import Any, Self

from jaxrnn.errors import UserError


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    later: bool = False,
) -> Any:
    """A dataclass field with its help and bounds; every number is at most LARGEST of its type if nothing else is said.

    `later`: runs were recorded before there was this option, as its default has it; that mustn't alter a digest.
    """
    bounds = {'choices': choices, 'at_least': at_least, 'at_most': at_most, 'above': above, 'below': below}
    return dataclasses.field(default=default, metadata={'help': help, 'later': later, **bounds})


LARGEST: Mapping[type, float] = {int: 2**31 - 1, float: float.fromhex('0x1.fffffep+127')}
"""Steps are counted in int32, and numbers are computed in float32."""

LONGEST_VECTOR = 1 << 16
"""Far above any known word vector."""

_BREAKS = re.compile('[\n\r\0\ud800-\udfff]')
"""What neither flags.txt, with one flag a line, nor any text in UTF-8 can hold."""


def _check(field: dataclasses.Field, value: Any) -> None:
    flag, bounds = f'--{field.name}', field.metadata
    if field.type is float and type(value) is int:
        pass  # an integer is a fine float
    elif type(value) is not field.type:
        kind = getattr(field.type, '__name__', field.type)
        raise UserError(f'{flag}: {_shown(value)} found, {kind} expected')
    if bounds['choices'] and value not in bounds['choices']:
        raise UserError(f'{flag}: {_shown(value)} found, one of {", ".join(bounds["choices"])} expected')
    if isinstance(value, str) and _BREAKS.search(value):
        raise UserError(
            f'{flag}: {_shown(value)} found, one line of UTF-8 expected; give the file another name'
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        most = LARGEST[field.type] if bounds['at_most'] is None else bounds['at_most']
        check_number(flag, value, bounds | {'at_most': most})


def check_number(flag: str, value: float, bounds: Mapping[str, Any]) -> None:
    """Raises UserError for a number that isn't finite, or out of the bounds of `option`."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f'{flag}: {value} found, a finite number expected')
    for bound, holds, words in (
        ('at_least', lambda x, b: x >= b, 'at least'),
        ('at_most', lambda x, b: x <= b, 'at most'),
        ('above', lambda x, b: x > b, 'more than'),
        ('below', lambda x, b: x < b, 'less than'),
    ):
        if bounds.get(bound) is not None and not holds(value, bounds[bound]):
            raise UserError(f'{flag}: {_shown(value)} found, {words} {bounds[bound]} expected')


def limited(name: str, value: float) -> float:
    """The nearest number that an option may be: of a value that is computed from others at their bounds."""
    field = next(field for group in GROUPS for field in dataclasses.fields(group) if field.name == name)
    bounds, kind = field.metadata, type(value)
    least = bounds['at_least'] if bounds['above'] is None else math.nextafter(bounds['above'], math.inf)
    most = LARGEST[int if field.type is int else float] if bounds['at_most'] is None else bounds['at_most']
    return kind(min(max(value, -most if least is None else least), most))


def _shown(value: Any) -> str:
    """A value in an error: Python takes its time for a number of a million digits, and refuses one in the end."""
    if isinstance(value, int) and abs(value) >> 128:
        return f'a number of some {int(value.bit_length() * math.log10(2)) + 1} digits'
    return reprlib.repr(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptionGroup:
    """A group of options; building one checks every field against its type and bounds."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(OptionGroup):
    """Which words and vectors."""

    vectors: str = option(
        '', 'Word vectors: word2vec text or binary, GloVe text (each also gzipped), or KeyedVectors.'
    )
    corpus: str = option(
        '', 'Text to train word vectors on: plain, gzipped, or a MediaWiki dump (.xml, .bz2).'
    )
    allow_pickle: bool = option(
        False, 'Read gensim KeyedVectors files, whose unpickling can run any code they contain.'
    )
    word2vec_size: int = option(100, 'Word2Vec: length of the vectors.', at_least=1, at_most=LONGEST_VECTOR)
    word2vec_window: int = option(
        5, 'Word2Vec: distance between a word and its context.', at_least=1, at_most=10_000
    )
    word2vec_min_count: int = option(5, 'Word2Vec: drop words that are rarer in the corpus.', at_least=1)
    word2vec_epochs: int = option(20, 'Word2Vec: passes over the corpus.', at_least=1)
    word2vec_skip_gram: bool = option(True, 'Word2Vec: skip-gram; else continuous bag of words.')
    num_words: int = option(0, 'Keep the most frequent words only; 0 keeps all.', at_least=0)
    max_length: int = option(19, 'Drop words of more letters.', at_least=1)
    pad_to: int = option(
        0, 'Time steps of an encoded word, its leading $ included; 0: as the longest word needs.',
        at_least=0, at_most=10_000,
    )  # fmt: skip
    normalise: bool = option(True, 'Scale every vector to length 1.')
    validation_share: float = option(0.05, 'Share of the words held out for validation.', at_least=0, below=1)
    test_share: float = option(0.05, 'Share of the words held out for the test.', at_least=0, below=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(OptionGroup):
    """Which network (design, section 5)."""

    network: str = option('lstm', 'The network.', choices=('lstm', 'gru', 'stacked'))
    preset: str = option(
        'keras3', "Initialisers, gates, GRU variant and Adam's epsilon of a library. stable: those of keras3, and what "
        'helped most against a collapse: half the stock rate, falling to 0 by a cosine at --max_steps, '
        '--update_clip=1, and --initial_weights=keras1, where no flag says otherwise.',
        choices=('keras1', 'keras3', 'flax', 'stable'),
    )  # fmt: skip
    hidden: int = option(
        0, 'Width of the recurrent layers; 0: 1024 (lstm, gru), 512 (stacked).', at_least=0, at_most=1 << 20
    )
    gate: str = option(
        'preset', "The gates' squashing function, in place of the preset's.",
        choices=('preset', 'sigmoid', 'hard_sigmoid'), later=True,
    )  # fmt: skip
    initial_weights: str = option(
        'preset', "Whose initial weights, in place of the preset's. keras1 and flax draw a matrix for each gate, "
        "keras3 one for all gates, in which those of a gate are half as large.",
        choices=('preset', 'keras1', 'keras3', 'flax'), later=True,
    )  # fmt: skip
    recurrent_gain: float = option(
        0.0, "Gain of the initial recurrent weights, which are orthogonal; 0: the library's, 1.1 for keras1, else 1.",
        at_least=0, later=True,
    )  # fmt: skip
    chrono_steps: int = option(
        0, "Time steps of the longest memory that forget gates' initial biases are made for (Tallec & Ollivier 2018); "
        "0: the preset's biases.", at_least=0, later=True,
    )  # fmt: skip
    precision: str = option(
        'default', 'Of products of float32 on a GPU or TPU, which round their operands unless this says otherwise.',
        choices=('default', 'highest'), later=True,
    )  # fmt: skip
    mask_padding: bool = option(
        False, 'End each word at its last letter: padding moves no state.', later=True
    )
    recurrence: str = option(
        'fast', "The recurrence with a hand-written backward pass, or the plain scan that JAX differentiates.",
        choices=('fast', 'reference'),
    )  # fmt: skip
    dtype: str = option(
        'float32', 'What products multiply; weights, sums and carries stay float32.',
        choices=('float32', 'bfloat16'),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimiser(OptionGroup):
    """Adam, its learning-rate schedule, and what keeps its steps in bounds."""

    learning_rate: float = option(1e-3, 'Learning rate, or the peak of its schedule.', above=0)
    b1: float = option(0.9, "Adam: decay of the gradient's mean.", at_least=0, below=1)
    b2: float = option(0.999, "Adam: decay of the squared gradient's mean.", at_least=0, below=1)
    epsilon: float = option(0.0, "Adam: added to the denominator; 0 takes the preset's.", at_least=0)
    second_moment: str = option(
        'adam', "Rule of the squared gradient's mean: adam; amsgrad, which divides by its largest so far; yogi, "
        'which lets it fall slowly (published with --epsilon=1e-3; here, too, 0 takes the preset\'s).',
        choices=('adam', 'amsgrad', 'yogi'), later=True,
    )  # fmt: skip
    bias_correction: bool = option(
        True, 'Adam: divide its means by 1 - b1^t and 1 - b2^t, as they start at zero.', later=True
    )
    moment_dtype: str = option(
        'float32', "What Adam's means are kept as between steps; bfloat16 halves their memory, but its v does not "
        'follow changes below .4 %.', choices=('float32', 'bfloat16'), later=True,
    )  # fmt: skip
    clip: str = option(
        'none', 'What gradients are clipped by: the norm of all, of each leaf, relative to the weights; or against '
        "their own past: the norm of all (zclip), of each leaf (adagc), each number against Adam's v (spam).",
        choices=('none', 'global_norm', 'per_leaf', 'adaptive', 'zclip', 'adagc', 'spam'),
    )  # fmt: skip
    clip_threshold: float = option(
        1.0, 'global_norm, per_leaf: the largest norm; adaptive: the largest ratio; adagc: the largest norm of all '
        'in its first 100 steps. The others have a threshold of their own.', above=0,
    )  # fmt: skip
    zclip_threshold: float = option(
        2.5, 'zclip: standard deviations above the mean norm.', above=0, later=True
    )
    adagc_threshold: float = option(
        1.05, "adagc: largest ratio to a leaf's mean norm.", at_least=1, later=True
    )
    spam_threshold: float = option(
        5000.0, "spam: largest ratio of a squared gradient to Adam's v.", at_least=1, later=True
    )
    update_clip: float = option(
        0.0, "Largest root mean square of a leaf's gradient over sqrt(v), beyond which its step is shortened: "
        "1 is StableAdamW's; 0: off.", at_least=0, later=True,
    )  # fmt: skip
    spectral_cap: float = option(
        0.0, "Largest spectral norm of a matrix's step, relative to the matrix's own; 0: off.", at_least=0,
        later=True,
    )  # fmt: skip
    curvature_every: int = option(
        0, "Steps between measurements of the curvature as Adam feels it, and along its update: in the record as "
        'preconditioned_sharpness and update_curvature, 1 where a spike is due. One costs some 7 gradients; 0: off.',
        at_least=0, later=True,
    )  # fmt: skip
    curvature_cap: float = option(
        0.0, 'Largest curvature along the update, beyond which steps are shortened until the next measurement: .8 is '
        'ours; 0: off. Needs --curvature_every.', at_least=0, later=True,
    )  # fmt: skip
    guard: bool = option(
        False,
        'Skip every step whose loss, gradients or update are not finite: it changes nothing.',
        later=True,
    )
    schedule: str = option(
        'constant', 'How the learning rate moves.',
        choices=('constant', 'warmup_cosine', 'exponential', 'piecewise', 'plateau'),
    )  # fmt: skip
    warmup_steps: int = option(0, 'Linear warm-up before any schedule.', at_least=0)
    decay_steps: int = option(
        10_000, 'warmup_cosine: step at which the end is reached; exponential: steps of one decay.',
        at_least=1,
    )  # fmt: skip
    decay_rate: float = option(0.5, 'exponential, piecewise, plateau: factor of one decay.', above=0, below=1)
    end_learning_rate: float = option(0.0, 'warmup_cosine, exponential: the lowest.', at_least=0)
    boundaries: str = option('', 'piecewise: steps at which the rate decays, as 1000,2000.')
    plateau_patience: int = option(10, 'plateau: windows without a lower loss before a decay.', at_least=1)
    plateau_window: int = option(100, 'plateau: steps over which the loss is averaged.', at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(OptionGroup):
    """What else decides the bits of a run."""

    seed: int = option(
        0, 'Of everything random: initial weights, order of the words, split.', at_least=0, at_most=2**63 - 1
    )
    batch_size: int = option(32, 'Words in a batch.', at_least=1)
    skip_batches: str = option(
        '',
        'Steps whose batch is left out, that of the step before in its place; as 1302,1400-1410.',
        later=True,
    )
    digest_every: int = option(1, 'Steps between digests of the state, which prove a replay.', at_least=1)
    signals: bool = option(False, 'Record the early-warning signals of every step.', later=True)
    debug_nans: bool = option(False, "Run under JAX's own jax_debug_nans.")
    checkify: bool = option(False, "Run under JAX's own checkify.float_checks.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop(OptionGroup):
    """What a run can be continued with differently: none of it moves a bit."""

    max_steps: int = option(10_000, 'Steps to train.', at_least=1)
    max_minutes: float = option(
        0.0, 'Minutes after which training ends with a checkpoint, when a step is done (exit code 124); the same '
        'command resumes it. 0: no limit.', at_least=0,
    )  # fmt: skip
    step_timeout: float = option(
        0.0, 'Seconds without a finished step after which the process is ended, whatever hangs (exit code 142); ten '
        'times as many for the first step, which compiles. 0: no limit.', at_least=0,
    )  # fmt: skip
    checkpoint_every: int = option(100, 'Steps between checkpoints.', at_least=1)
    keep_latest: int = option(100, 'Checkpoints to keep, counted from the newest.', at_least=1)
    keep_every: int = option(1000, 'Checkpoints at multiples of these steps are kept for ever.', at_least=1)
    on_divergence: str = option(
        'continue',
        'What to do when a symptom shows: train on; stop soon after; or go back to a checkpoint before it and train on '
        'from there, a second time without the batches around it, and stop after a few tries (rewinds.json).',
        choices=('continue', 'stop', 'rewind'),
    )


GROUPS = (Data, Model, Optimiser, Training, Loop)


def _check_group(name: str, values: Any) -> None:
    if not isinstance(values, Mapping):
        raise UserError(f'{name}: {reprlib.repr(values)} found, names and their values expected')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run's whole configuration."""

    data: Data = Data()
    model: Model = Model()
    optimiser: Optimiser = Optimiser()
    training: Training = Training()
    loop: Loop = Loop()

    def to_json(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Mapping[str, Any]]) -> Self:
        """Reads what `to_json` wrote. Raises UserError for a group or option it doesn't know, or a value that isn't of
        its type or out of bounds."""
        groups: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(cls)}
        made: dict[str, Any] = {}
        _check_group('config', values)
        for name, options in values.items():
            if name not in groups:
                raise UserError(
                    f'config: unknown group {name!r}; it was written by another version of jaxrnn'
                )
            _check_group(f'config: {name!r}', options)
            known = {field.name for field in dataclasses.fields(groups[name])}
            if unknown := set(options) - known:
                raise UserError(
                    f'config: unknown option {min(unknown)!r} in {name!r}; another version wrote it'
                )
            made[name] = groups[name](**options)
        return cls(**made)

    def changed(self, **options: Any) -> Self:
        """With other values for some options, whichever group they are in."""
        groups = {}
        for group in dataclasses.fields(self):
            names = {field.name for field in dataclasses.fields(getattr(self, group.name))} & options.keys()
            values = {name: options[name] for name in names}
            groups[group.name] = dataclasses.replace(getattr(self, group.name), **values)
            options = {name: value for name, value in options.items() if name not in names}
        if options:
            raise TypeError(f'no option {min(options)!r}')
        return dataclasses.replace(self, **groups)

    def digest(self) -> str:
        """16 hex digits over every option that decides bits: all groups but `loop`, and of the options that
        came later those that aren't at their default."""
        values = self.to_json()
        del values['loop']
        for group, options in values.items():
            for field in dataclasses.fields(getattr(self, group)):
                if field.metadata['later'] and options[field.name] == field.default:
                    del options[field.name]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, other: 'Config') -> list[str]:
        """The options that decide bits and differ, each as `name: ours, theirs`."""
        ours, theirs = self.to_json(), other.to_json()
        return [
            f'--{name}: {value}, {theirs[group][name]}'
            for group, options in ours.items()
            if group != 'loop'
            for name, value in options.items()
            if value != theirs[group][name]
        ]
