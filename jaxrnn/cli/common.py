"""What the scripts share: flags made from the configuration, help, errors, exit codes."""

import dataclasses
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags

from jaxrnn.types import UserError
from jaxrnn.words import config

HEALTHY, FAILED, MISUSE, DIVERGED, IRREPRODUCIBLE = 0, 1, 2, 3, 4
"""Exit codes; 128 + n where signal n ended a run that can be resumed."""

EXIT_CODES = """exit codes
  0    done, healthy
  2    misuse or bad input: one line on standard error says what to do
  3    diverged: a symptom showed
  4    not reproducible: a replayed step differs from its record
  130  Ctrl-C (143 for SIGTERM): saved; run the same command again to resume
  1    anything else, with a traceback: a bug of jaxrnn's
"""

_KINDS = {str: flags.ArgumentParser, int: flags.IntegerParser, float: flags.FloatParser}
_groups: list[tuple[str, list[str]]] = []


def define(group: str, name: str, default: Any, help: str, choices: tuple[str, ...] | None = None) -> None:
    """Defines a flag under a heading of --help."""
    if isinstance(default, bool):
        flags.DEFINE_boolean(name, default, help)
    elif choices:
        flags.DEFINE_enum(name, default, list(choices), help)
    else:
        parser = _KINDS[type(default) if default is not None else int]()
        flags.DEFINE(parser, name, default, help, serializer=flags.ArgumentSerializer())
    headings = dict(_groups)
    if group not in headings:
        _groups.append((group, []))
    dict(_groups)[group].append(name)


def define_config() -> None:
    """A flag for every option of the configuration."""
    for group, options in _groups_of_options().items():
        for field in dataclasses.fields(options):
            define(group, field.name, field.default, field.metadata['help'], field.metadata['choices'])


def config_from_flags() -> config.Config:
    """The configuration that the flags say. Raises UserError for a value out of bounds."""
    groups: dict[str, Any] = {
        group: options(**{field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(options)})
        for group, options in _groups_of_options().items()
    }
    return config.Config(**groups)


def _groups_of_options() -> dict[str, type[config.OptionGroup]]:
    """Those of the configuration, by name."""
    return {group.name: group.type for group in dataclasses.fields(config.Config)}  # type: ignore[misc]


def define_run(help: str, default: str | None = None) -> None:
    """The flags that every script has."""
    define('run', 'run_dir', default or '', help)
    define('run', 'json', False, 'Print the machine-readable result as the last line of standard output.')
    define(
        'run', 'threads', 0, 'Processors to use; 0: all. Replays are bit for bit on the number that trained.'
    )


def define_detectors(group: str) -> None:
    """The flags that say what is looked for, and between which steps."""
    kinds = 'nonfinite, collapse, constant, stall, spike'
    define(group, 'symptom', '', f'Look for this only; else for the gravest: {kinds}.')
    define(
        group,
        'when',
        '',
        "Look for the first step at which this rule holds, as 'loss > 3 * median(loss, 200)'.",
    )
    define(group, 'good', None, 'Look only after this step.')
    define(group, 'bad', None, 'Look only up to this step.')


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
    if flags.FLAGS.threads < 0:
        raise UserError(f'--threads: {flags.FLAGS.threads} found, at least 0 expected')
    if flags.FLAGS.threads:
        environment.use_threads(flags.FLAGS.threads)


def run_dir() -> str:
    """The directory named by --run_dir. Raises UserError where none is."""
    if not flags.FLAGS.run_dir:
        raise UserError('--run_dir: nothing found, the directory of a run expected')
    return flags.FLAGS.run_dir


def keep_compiled() -> None:
    """Keeps compiled steps with the run, so that whoever looks into it later need not wait for them again."""
    from jaxrnn import environment
    from jaxrnn.record import loop

    environment.keep_compiled(loop.Paths(pathlib.Path(run_dir())).compiled)


def print_json(value: Any) -> None:
    """The machine-readable result, on one line."""
    print(json.dumps(value, allow_nan=False), flush=True)


def main(call: Callable[[list[str]], int], doc: str) -> NoReturn:
    """Runs a script: parses flags, prints help, and turns a user's error into one line and exit code 2."""
    if {'--help', '-help', '-h', '--helpfull'} & set(sys.argv[1:]):
        print(_help(doc))
        sys.exit(HEALTHY)
    try:
        arguments = flags.FLAGS(sys.argv)
        start()
        code = call(arguments[1:])
    except flags.Error as error:
        _refuse(f'{error}'.strip().replace('\n', ' ') + '; see --help')
    except UserError as error:
        _refuse(str(error))
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = HEALTHY
    sys.exit(code)


def _refuse(message: str) -> NoReturn:
    print(f'{os.path.basename(sys.argv[0])}: {message}', file=sys.stderr)
    sys.exit(MISUSE)


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
        '      Read flags from a file, one a line; a run keeps its own in flags.txt.',
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
    text = re.sub(r'^<[^>]*>: ', '', flag.help)  # absl puts an enum's values there a second time
    return f'  {usage}\n      {text} (default: {default})'
