"""What the commands share: flags made from the configuration, help, errors, exit codes."""

import dataclasses
import difflib
import io
import os
import pathlib
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from absl import app, flags

from jaxrnn import files
from jaxrnn.errors import UserError
from jaxrnn.escaping import as_json, one_line, visible
from jaxrnn.words import config, presets

if TYPE_CHECKING:
    from rich.console import Console

HEALTHY, FAILED, MISUSE, DIVERGED, IRREPRODUCIBLE = 0, 1, 2, 3, 4
OUT_OF_TIME = 124  # as of the command `timeout`
"""Exit codes; 128 + n where signal n ended a run that can be resumed."""

EXIT_CODES = """exit codes
  0    done, healthy
  2    misuse or bad input: one line on standard error says what to do
  3    diverged: a symptom showed
  4    not reproducible: a replayed step differs from its record
  124  --max_minutes are over: saved; run the same command again to resume
  130  Ctrl-C (143 for SIGTERM, 129 for SIGHUP): saved; likewise
  142  no step finished within --step_timeout: ended where it was; likewise
  1    anything else, with a traceback: a bug of jaxrnn's
"""

FLAGFILE = 'Read flags from a file, one a line; a run keeps its own in flags.txt.'

_groups: list[tuple[str, list[str]]] = []
_bounds: dict[str, Mapping[str, float]] = {}
"""Of flags that aren't of the configuration, which has its own."""

MOST = config.LARGEST[int]
"""Of a flag that counts something."""


def define(
    group: str,
    name: str,
    default: Any,
    help: str,
    choices: tuple[str, ...] | None = None,
    **bounds: float,
) -> None:
    """Defines a flag under a heading of --help, with bounds as `config.check_number` has them."""
    if isinstance(default, bool):
        flags.DEFINE_boolean(name, default, help)
    elif choices:
        flags.DEFINE_enum(name, default, list(choices), help)
    else:
        parser = _parser(name, int if default is None else type(default))
        flags.DEFINE(parser, name, default, help, serializer=flags.ArgumentSerializer())
    _bounds[name] = bounds
    headings = dict(_groups)
    if group not in headings:
        _groups.append((group, []))
    dict(_groups)[group].append(name)


class _Number:
    """In front of a parser of absl's, whose errors have what was found twice, at any length."""

    expected: str

    def __init__(self, flag: str):  # which tells it from others: absl makes one of equal arguments
        super().__init__()
        self.flag = flag

    def parse(self, argument: Any) -> Any:
        try:
            return super().parse(argument)  # type: ignore[misc]
        except (TypeError, ValueError, OverflowError):
            found = reprlib.repr(argument)
            raise UserError(f'--{self.flag}: {found} found, {self.expected} expected') from None


class _WholeNumber(_Number, flags.IntegerParser):
    expected = 'a whole number'


class _AnyNumber(_Number, flags.FloatParser):
    expected = 'a number'


def _parser(name: str, kind: type) -> flags.ArgumentParser:
    if kind is str:
        return flags.ArgumentParser()
    return _WholeNumber(name) if kind is int else _AnyNumber(name)


def _check_bounds() -> None:
    """Raises UserError for a number out of the bounds that its flag was defined with."""
    for name, bounds in _bounds.items():
        if bounds and (value := flags.FLAGS[name].value) is not None:
            config.check_number(f'--{name}', value, bounds)


def define_config() -> None:
    """A flag for every option of the configuration."""
    for group, options in _groups_of_options().items():
        for field in dataclasses.fields(options):
            define(group, field.name, field.default, field.metadata['help'], field.metadata['choices'])


def config_from_flags() -> config.Config:
    """The configuration that the flags say, and its preset where they say nothing. Raises UserError for a value out of
    bounds."""
    groups: dict[str, Any] = {
        group: options(**{field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(options)})
        for group, options in _groups_of_options().items()
    }
    given = {flag.name for flag in defined() if flag.present}
    return presets.completed(config.Config(**groups), given)


def _groups_of_options() -> dict[str, type[config.OptionGroup]]:
    """Those of the configuration, by name."""
    return {group.name: group.type for group in dataclasses.fields(config.Config)}  # type: ignore[misc]


def define_run(help: str, default: str | None = None) -> None:
    """The flags that every command has."""
    define('run', 'run_dir', default or '', help)
    define('run', 'json', False, 'Print the machine-readable result as the last line of standard output.')
    define(
        'run', 'threads', 0, 'Processors to use; 0: all. Replays are bit for bit on the number that trained.',
        at_least=0, at_most=MOST,
    )  # fmt: skip


SOURCE = ('vectors', 'corpus', 'allow_pickle')
"""What may be read from outside of a run, and only on the user's own word, typed anew each time."""

_typed: frozenset[str] = frozenset()


def define_source() -> None:
    """The flags that say what may be read where a run has no copy of its data: never what the run itself names."""
    of_data = {field.name: field for field in dataclasses.fields(config.Data)}
    where = (
        "Where the run's data.npz is gone: read its data from here; what its config.json names is not opened."
    )
    for name in SOURCE:
        define(
            'source',
            name,
            of_data[name].default,
            of_data[name].metadata['help'] if name == 'allow_pickle' else where,
        )


def source():
    """What the user lets be read from outside of a run. Raises UserError for what stands in a file of flags."""
    from jaxrnn.words import opening

    for name in SOURCE:
        if flags.FLAGS[name].value and name not in _typed:
            raise UserError(
                f'--{name}: found in a file of flags; type it on the command line itself if you trust it'
            )
    return opening.Source(flags.FLAGS.vectors, flags.FLAGS.corpus, flags.FLAGS.allow_pickle)


def typed(name: str) -> str:
    """What a flag says that names code of the user's own. Raises UserError for what stands in a file of flags."""
    value = flags.FLAGS[name].value or ''
    if value and name not in _typed:
        raise UserError(
            f'--{name}: found in a file of flags; type it on the command line itself if you trust it'
        )
    return value


def pickle_allowed() -> bool:
    """Whether --allow_pickle was typed on this command line: what a file of flags says is the word of who wrote it."""
    return flags.FLAGS.allow_pickle and 'allow_pickle' in _typed


def define_detectors(group: str) -> None:
    """The flags that say what is looked for, and between which steps."""
    kinds = 'nonfinite, dead, collapse, constant, stall, spike, diverged'
    define(group, 'symptom', '', f'Look for this only; else for the gravest: {kinds}.')
    define(
        group,
        'when',
        '',
        "Look for the first step at which this rule holds, as 'loss > 3 * median(loss, 200)'.",
    )
    define(group, 'good', None, 'Look only after this step.', at_least=0, at_most=MOST)
    define(group, 'bad', None, 'Look only up to this step.', at_least=0, at_most=MOST)


def detectors():
    """Those that the flags ask for, gravest first. Raises UserError where they contradict each other."""
    from jaxrnn import detect

    symptom, when = flags.FLAGS.symptom, flags.FLAGS.when
    if symptom and when:
        raise UserError('--symptom and --when: both found, one expected')
    if when:
        return (detect.custom(when),)
    return (detect.by_name(symptom),) if symptom else detect.DETECTORS


def start() -> None:
    """Settles what must be settled before JAX starts."""
    from jaxrnn import environment

    if 'threads' not in flags.FLAGS:
        return
    if 'keep_memory' not in flags.FLAGS or flags.FLAGS.keep_memory:
        environment.keep_memory()
    if flags.FLAGS.threads:
        environment.use_threads(flags.FLAGS.threads)


def run_dir() -> str:
    """The directory named by --run_dir. Raises UserError where none is."""
    if not flags.FLAGS.run_dir:
        raise UserError('--run_dir: nothing found, the directory of a run expected')
    return flags.FLAGS.run_dir


def print_json(value: Any) -> None:
    """The machine-readable result, on one line."""
    print(as_json(value), flush=True)


def main(call: Callable[[list[str]], int], doc: str) -> NoReturn:
    """Runs a program that isn't a command, as a benchmark."""
    sys.exit(run(call, doc, os.path.basename(sys.argv[0]), sys.argv[1:]))


def run(call: Callable[[list[str]], int], doc: str, name: str, arguments: list[str]) -> int:
    """Parses flags, prints help, and turns a user's error into one line and exit code 2.

    Args:
        call: what to run, of what stands after the flags; gives an exit code.
        doc: what help says before it lists the flags.
        name: of the program, as errors have it in front.
        arguments: flags, and what stands after them.
    """
    _spell_what_has_no_place()
    if {'--help', '-help', '-h', '--helpfull'} & set(arguments):
        show(_help(doc))
        return HEALTHY
    try:
        _remember(arguments)
        words = flags.FLAGS([name, *arguments])
        _check_bounds()
        start()
        return call(words[1:])
    except flags.UnrecognizedFlagError as error:
        near = nearest(f'--{error.flagname}', _words())
        return refuse(name, f'--{error.flagname}: no such flag; {near or "see --help"}')
    except flags.Error as error:
        return refuse(name, f'{one_line(str(error))}; see --help')
    except UserError as error:
        return refuse(name, str(error))
    except BrokenPipeError:
        _close_output(sys.stdout)
        return HEALTHY


def _spell_what_has_no_place() -> None:
    """Letters that the output's encoding lacks are spelled out, as everything else that can't be seen."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')


MOST_BYTES = 1 << 20
"""Of a file of flags; a run's own has 2 kB."""


def _remember(arguments: list[str]) -> None:
    """Notes which flags were typed. Raises UserError for a file of flags that can't be read, or names another."""
    global _typed
    _typed = frozenset()
    words = iter(arguments)
    for word in words:
        if word == '--' or not word.startswith('-'):
            return
        _check_name(word)
        name, equals, value = word.lstrip('-').partition('=')
        if name == 'flagfile':
            _check_flags((value if equals else next(words, '')).strip())
        elif name.startswith('no') or (equals and value.lower() in ('false', 'f', '0', 'no', 'n')):
            _typed -= {name, name.removeprefix('no')}
        else:
            _typed |= {name}
        if not equals and name in flags.FLAGS and not flags.FLAGS[name].boolean:
            next(words, '')


def _check_flags(path: str) -> None:
    path = os.path.expanduser(path)
    try:
        text = files.read_text(pathlib.Path(path), MOST_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(
            f'--flagfile: {path} can not be read ({getattr(error, "strerror", None) or error})'
        ) from error
    if '\0' in text:
        raise UserError(f'--flagfile: {path} has zero bytes, flags were expected, one a line')
    lines = text.replace('\r', '\n').split('\n')  # absl ends a line at either
    if any(re.match(r'\s*--?flagfile\b', line) for line in lines):
        raise UserError(f'--flagfile: {path} names another file of flags; give that one by itself')
    for line in lines:
        _check_name(line.strip())


LONGEST_NAME = 100
"""Letters of a flag's name. For an unknown one absl looks for the nearest, in time that grows as the square of its
length, and by as many calls within each other."""


def _check_name(word: str) -> None:
    name = word.partition('=')[0]  # with its dashes, of which there may be any number
    if word.startswith('-') and len(name) > LONGEST_NAME:
        raise UserError(f'{name[:20]}…: a flag of {len(name):,} letters found, no such flag; see --help')


def show(text: str) -> None:
    """Prints a text, of which nobody need read all."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _close_output(sys.stdout)


def say(*lines: str, file: TextIO | None = None) -> None:
    """Prints lines in which everything can be seen; on standard error if no other is given, which leaves the result its
    place."""
    out = file or sys.stderr
    try:
        for line in lines:
            print(visible(line), file=out, flush=True)
    except OSError:  # of a terminal that is closed, which must not be the end of a run
        _close_output(out)


def console(**options: Any) -> 'Console':
    """What prints screens: no text in them is markup, a pattern to be coloured or the name of an emoji."""
    from rich.console import Console  # slow to import

    return Console(markup=False, highlight=False, emoji=False, **options)


def refuse(name: str, message: str) -> int:
    """Says what a user got wrong; the exit code for it."""
    say(f'{name}: {message}')
    return MISUSE


def nearest(word: str, known: Iterable[str]) -> str:
    """Asks whether the most similar of the known words was meant; '' where none is."""
    similar = difflib.get_close_matches(word, [*known], n=1)
    return f'did you mean {similar[0]}?' if similar else ''


def defined() -> list[flags.Flag]:
    """Every flag of this program, in the order of its help."""
    return [flags.FLAGS[name] for _, names in _groups for name in names]


def _words() -> list[str]:
    """Every way to begin a flag."""
    negated = [f'--no{flag.name}' for flag in defined() if flag.boolean]
    return [*(f'--{flag.name}' for flag in defined()), *negated, '--flagfile', '--help']


def meaning(flag: flags.Flag) -> str:
    """A flag's help."""
    return re.sub(r'^<[^>]*>: ', '', flag.help or '')  # absl puts an enum's values there a second time


def _close_output(file: TextIO) -> None:
    """Nobody reads any more, as behind `| head`; else Python complains when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


class Lasting:
    """Standard error, which may go before the run does: its terminal is closed, or what reads it has ended. That must
    not be the end of a run, which is to be saved first."""

    def __init__(self) -> None:
        self._file = sys.stderr  # a bar puts something else in its place while it is shown

    def write(self, text: str) -> int:
        self._do(lambda: self._file.write(text))
        return len(text)

    def flush(self) -> None:
        self._do(self._file.flush)

    def _do(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError:
            _close_output(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _help(doc: str) -> str:
    app.define_help_flags()
    lines = [doc.strip(), '']
    for group, names in _groups:
        lines.append(group)
        lines += [_flag_help(flags.FLAGS[name]) for name in names]
        lines.append('')
    lines += [
        'files',
        '  --flagfile=PATH',
        f'      {FLAGFILE}',
        '',
    ]
    return '\n'.join([*lines, EXIT_CODES.rstrip()])


def _flag_help(flag: flags.Flag) -> str:
    if flag.boolean:
        usage = f'--[no]{flag.name}'
        default = str(flag.default).lower()
    else:
        values = getattr(flag.parser, 'enum_values', None)
        usage = f'--{flag.name}={"|".join(values) if values else flag.flag_type().upper()}'
        default = 'none' if flag.default in ('', None) else flag.default
    return f'  {usage}\n      {meaning(flag)} (default: {default})'
