"""The command `jaxrnn`, for people who have no program of their own.

commands     the table of commands             common       flags, help, errors, exit codes
invocation   how the user called it            completion   what a shell offers on TAB
own_runs     runs of the user's own program

Every other file is a command. The one that is asked for is imported alone; help and errors don't wait for JAX.
"""

import sys

import jaxrnn
from jaxrnn.cli import common, completion, invocation
from jaxrnn.cli.commands import COMMANDS, load, summary
from jaxrnn.errors import UserError

HELP = ('help', '--help', '-help', '-h', '--helpfull')

_OVERVIEW = """{about}

    jaxrnn demo
    jaxrnn train --network=stacked --hidden=128 --run_dir=runs/first
    jaxrnn diagnose --run_dir=runs/first

commands
{commands}

options
  COMMAND --help
      Explain a command and its flags.
  --completion=bash|zsh|fish
      Print what makes a shell complete commands, flags and values on TAB. In its start-up file:
      eval "$(jaxrnn --completion=bash)", the same with zsh, or jaxrnn --completion=fish | source
  --version
      Print the version.

{exit_codes}"""


def main() -> int:
    """Does what sys.argv says. Returns the exit code."""
    if len(sys.argv) < 2:
        print(overview(), file=sys.stderr)
        return common.MISUSE
    command, *arguments = sys.argv[1:]
    if command in COMMANDS:
        return run(command, arguments)
    if command in HELP and arguments and arguments[0] in COMMANDS:
        return run(arguments[0], ['--help'])
    try:
        common.show(_answer(command, arguments))
    except UserError as error:
        return common.refuse('jaxrnn', str(error))
    return common.HEALTHY


def run(command: str, arguments: list[str]) -> int:
    """Runs a command. Returns its exit code."""
    module = load(command)
    doc = invocation.as_typed(module.__doc__ or '')
    return common.run(module.main, doc, invocation.of(command).name, arguments)


def overview() -> str:
    """What `jaxrnn --help` prints."""
    width = max(map(len, COMMANDS))
    text = _OVERVIEW.format(
        about=(jaxrnn.__doc__ or '').partition('\n')[0],
        commands='\n'.join(f'  {name:<{width}}  {summary(name)}' for name in COMMANDS),
        exit_codes=common.EXIT_CODES.rstrip(),
    )
    return invocation.as_typed(text)


def _answer(option: str, arguments: list[str]) -> str:
    """What is printed where no command is named. Raises UserError where there is no such option."""
    if option in HELP:
        return overview()
    if option == '--version':
        return f'jaxrnn {jaxrnn.__version__}'
    if option == completion.CALLBACK:
        return '\n'.join(completion.lines(arguments))
    name, _, shell = option.partition('=')
    if name == '--completion':
        return completion.script(shell or ''.join(arguments[:1]))
    near = common.nearest(option, [*COMMANDS, *completion.OPTIONS])
    raise UserError(f'{option!r} found, a command expected; {near or "see jaxrnn --help"}')
