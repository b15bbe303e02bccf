"""The command `jaxrnn`: its answers, its table of commands, what it says to people's mistakes, and what TAB offers."""

import importlib
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import jaxrnn
from jaxrnn import cli
from jaxrnn.cli import common, completion, demo, invocation
from jaxrnn.cli.commands import COMMANDS, summary

ROOT = Path(__file__).parent.parent
SHARED = {'__init__', 'commands', 'common', 'completion', 'invocation', 'own_runs', 'showing'}
"""Files of the room that aren't commands."""


def environ(**more: str) -> dict[str, str]:
    return {**os.environ, 'PYTHONPATH': str(ROOT), **more}


def call(*arguments):
    """Runs `python -m jaxrnn`: exit code, standard output, standard error, what was imported."""
    command = [sys.executable, '-X', 'importtime', '-m', 'jaxrnn', *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environ(), timeout=60)
    lines = done.stderr.splitlines()
    imported = {line.split('|')[-1].strip() for line in lines if line.startswith('import time:')}
    errors = [line for line in lines if not line.startswith('import time:')]
    return done.returncode, done.stdout, errors, imported


@pytest.fixture
def answer(monkeypatch, capsys):
    """Runs the program in this process: for what imports no command, as flags can be defined once."""

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['jaxrnn', *arguments])
        return cli.main(), *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ('arguments', 'code'),
    [
        ((), 2),
        (('--version',), 0),
        (('--help',), 0),
        (('dignose',), 2),
        (('train', '--help'), 0),
        (('help', 'trace'), 0),
        (('train', '--learning_rat=3'), 2),
        (('--complete', 'diagnose', '--'), 0),
    ],
)
def test_it_answers_without_jax(arguments, code):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    returned, out, errors, imported = call(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert returned == code and bool(out) == (code == 0), errors
    assert 'jaxrnn.cli.common' in imported and not {'jax', 'numpy'} & imported
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    assert seconds < 0.5  # of a processor, as others may be busy; a tenth is usual


def test_help_lists_every_command(answer):
    code, out, errors = answer('--help')
    assert (code, errors) == (0, '') and answer('help')[1] == answer('-h')[1] == out
    for name in COMMANDS:
        assert re.search(rf'^  {name} +{re.escape(summary(name))}$', out, re.MULTILINE)
    assert common.EXIT_CODES.strip() in out and '    jaxrnn demo\n' in out
    code, nothing, errors = answer()
    assert (code, nothing, errors) == (2, '', out)


def test_version(answer):
    assert answer('--version') == (0, f'jaxrnn {jaxrnn.__version__}\n', '')


@pytest.mark.parametrize(
    ('word', 'says'),
    [
        ('dignose', "'dignose' found, a command expected; did you mean diagnose?"),
        ('--hlep', "'--hlep' found, a command expected; did you mean --help?"),
        ('xyzzy', "'xyzzy' found, a command expected; see jaxrnn --help"),
        ('--completion=ksh', '--completion: ksh found, one of bash, zsh, fish expected'),
        ('--completion', '--completion: nothing found, one of bash, zsh, fish expected'),
    ],
)
def test_a_mistake_is_one_line(word, says, answer):
    assert answer(word) == (2, '', f'jaxrnn: {says}\n')


@pytest.mark.parametrize(
    ('flag', 'says'),
    [
        ('--learning_rat=3', '--learning_rat: no such flag; did you mean --learning_rate?'),
        ('--nosignal', '--nosignal: no such flag; did you mean --nosignals?'),
        ('--xyzzy', '--xyzzy: no such flag; see --help'),
    ],
)
def test_a_mistaken_flag_is_one_line(flag, says):
    code, out, errors, _ = call('train', flag)
    assert (code, out, errors) == (2, '', [f'jaxrnn train: {says}'])


@pytest.mark.parametrize('name', COMMANDS)
def test_help_names_every_flag(name):
    code = (
        f'import sys; sys.argv = ["jaxrnn", "{name}", "--help"]\n'
        'from absl import flags; from jaxrnn import cli; cli.main()\n'
        'print(*(flag.name for flag in flags.FLAGS.flags_by_module_dict()["jaxrnn.cli.common"]))'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environ())
    *told, names = done.stdout.splitlines()
    assert 'run_dir' in names.split(), done.stderr
    for flag in names.split():
        assert any(re.match(rf'  --(\[no\])?{flag}(=|$)', line) for line in told), flag
    assert told[0] == summary(name) and f'    jaxrnn {name}' in '\n'.join(told)


def test_the_table_has_every_command():
    """Whose modules can be imported together: flags are defined when a command is run."""
    files = {path.stem for path in Path(cli.__file__).parent.glob('*.py')}
    assert files - SHARED == set(COMMANDS)
    for name in COMMANDS:
        module = importlib.import_module(f'jaxrnn.cli.{name}')
        assert callable(module.main) and callable(module.define_flags)
        assert module.__doc__.startswith(summary(name)) and 0 < len(summary(name)) < 100


def test_scripts_are_the_same_commands():
    for path in (ROOT / 'scripts').glob('*.py'):
        assert path.stem in COMMANDS and f"cli.run('{path.stem}'" in path.read_text(encoding='utf-8')


WAYS = {
    './jaxrnn': ('jaxrnn diagnose', 'jaxrnn diagnose', ('./jaxrnn', 'diagnose')),
    '/usr/bin/jaxrnn': ('jaxrnn diagnose', 'jaxrnn diagnose', ('/usr/bin/jaxrnn', 'diagnose')),
    '/lib/jaxrnn/__main__.py': (
        'jaxrnn diagnose',
        'python -m jaxrnn diagnose',
        (sys.executable, '-m', 'jaxrnn', 'diagnose'),
    ),
    'scripts/train.py': (
        'diagnose.py',
        'python scripts/diagnose.py',
        (sys.executable, 'scripts/diagnose.py'),
    ),
}
"""What the user called -> how another command is called in the same way."""


@pytest.mark.parametrize('program', WAYS)
def test_what_is_to_be_typed_next_is_typed_as_before(program, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'argv', [program])
    _, typed, argv = WAYS[program]
    assert tuple(invocation.of('diagnose')) == WAYS[program]
    assert invocation.following('diagnose', '--run_dir=a b') == f"next: {typed} '--run_dir=a b'"
    assert (
        invocation.as_typed('Then jaxrnn diagnose says, of jaxrnn runs')
        == f'Then {typed} says, of jaxrnn runs'
    )
    monkeypatch.setattr(subprocess, 'call', lambda command: command)
    assert demo._call('diagnose', '--run_dir=r') == [*argv, '--run_dir=r']
    assert capsys.readouterr().out == f'\n$ {typed} --run_dir=r\n'


def test_a_command_without_a_script_is_called_by_its_name(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['scripts/train.py'])
    assert invocation.of('novelty').typed == 'python -m jaxrnn novelty'


def test_nobody_need_read_to_the_end():
    command = [sys.executable, '-m', 'jaxrnn', 'train', '--help']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ())
    process.stdout.close()
    assert process.stderr.read() == b'' and process.wait() == 0
    process.stderr.close()


# TAB. What shells offer, they ask of the program: `words` -> what may stand in place of the last.
OFFERED = [
    (['dia'], ['diagnose']),
    (['--vers'], ['--version']),
    (['help', 'tr'], ['train', 'trace']),
    (['train', '--learning'], ['--learning_rate=']),
    (['train', '--nosig'], ['--nosignals']),
    (['train', '--network='], ['--network=lstm', '--network=gru', '--network=stacked']),
    (['train', '--network', 'g'], ['gru']),
    (['train', '--hidden=8', '--network=gru', '--checki'], ['--checkify']),
]
FILES = [['train', '--flagfile=setup.c'], ['train', '--flagfile', 'setup.c'], ['xyzzy', 'setup.c']]
"""Where nothing is offered, and the shell falls back to files."""


@pytest.fixture
def on_path(tmp_path):
    """An environment in which `jaxrnn` is this checkout's."""
    program = tmp_path / 'jaxrnn'
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m jaxrnn "$@"\n')
    program.chmod(0o755)
    return environ(PATH=f'{tmp_path}:{os.environ["PATH"]}', HOME=str(tmp_path))


def shell(name, source, env):
    """A shell's output, line by line."""
    if not shutil.which(name):
        pytest.skip(f'no {name}')
    done = subprocess.run([name, '-c', source], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.stderr == ''
    return [line.split() for line in done.stdout.splitlines()]


def parted(words):
    """As bash parts them."""
    return [part for word in words for part in re.split('(=)', word) if part]


def test_words_are_joined_again():
    for words, _ in OFFERED:
        assert completion._joined(words) == completion._joined(parted(words)) == words


def test_bash_completes(on_path):
    tries = '\n'.join(
        f'try {shlex.join(parted(words))}' for words in [*(words for words, _ in OFFERED), *FILES]
    )
    found = shell(
        'bash',
        'eval "$(jaxrnn --completion=bash)"\n'
        'try() { COMP_WORDS=(jaxrnn "$@"); COMP_CWORD=$#; _jaxrnn jaxrnn; echo "${COMPREPLY[@]}"; }\n'
        + tries,
        on_path,
    )
    expected = [
        [offer.split('=')[1] if '=' in words[-1] else offer for offer in offers] for words, offers in OFFERED
    ]
    assert found == [*expected, *([] for _ in FILES)]
    assert shell('bash', 'eval "$(jaxrnn --completion=bash)"; complete -p jaxrnn', on_path) == [
        ['complete', '-o', 'default', '-F', '_jaxrnn', 'jaxrnn']
    ]


def test_zsh_completes(on_path):
    """With its library's functions, which need a terminal, told to print what they are given."""
    tries = '\n'.join(f'try {shlex.join(words)}' for words in [*(words for words, _ in OFFERED), *FILES])
    found = shell(
        'zsh',
        'compdef() {}; compset() {}; _files() { print files }; _describe() { print -- ${whole%%:*} ${open%%:*} }\n'
        'eval "$(jaxrnn --completion=zsh)"\n'
        'try() { local -a words; words=(jaxrnn "$@"); local CURRENT=$#words; _jaxrnn }\n' + tries,
        on_path,
    )
    assert found == [*(offers for _, offers in OFFERED), *(['files'] for _ in FILES)]


def test_fish_completes(on_path):
    tries = '\n'.join(
        f"string join -- ' ' (complete -C {shlex.quote(shlex.join(['jaxrnn', *words]))} | string replace -r '\\t.*' '')"
        for words in [*(words for words, _ in OFFERED), *FILES]
    )
    found = shell('fish', f'jaxrnn --completion=fish | source\n{tries}', on_path)
    files = [['--flagfile=setup.cfg'], ['setup.cfg'], ['setup.cfg']]
    assert [sorted(line) for line in found] == [*(sorted(offers) for _, offers in OFFERED), *files]


def test_tab_is_silent_whatever_goes_wrong(monkeypatch, answer):
    monkeypatch.setattr(completion, 'load', lambda name: 1 / 0)
    assert answer('--complete', 'train', '--')[0::2] == (0, '')


def test_a_wheel_has_every_folder():
    """One without an __init__.py is left out of it."""
    folders = {path.parent for path in (ROOT / 'jaxrnn').rglob('*.py')}
    assert all((folder / '__init__.py').exists() for folder in folders)
    assert (ROOT / 'jaxrnn' / 'py.typed').exists()
