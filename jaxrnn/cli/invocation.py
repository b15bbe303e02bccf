"""How the user called this program, so that what it tells the user to type is typed in the same way.

There are three: `jaxrnn train`, `python -m jaxrnn train`, and from a checkout `python scripts/train.py`.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

from jaxrnn.cli.commands import COMMANDS
from jaxrnn.escaping import as_shell_word


class Invocation(NamedTuple):
    """A command, called as this program was."""

    name: str  # stands before an error: 'jaxrnn train', 'train.py'
    typed: str  # 'jaxrnn train', 'python scripts/train.py'
    argv: tuple[str, ...]  # starts it as a process


def of(command: str) -> Invocation:
    """A command, to be called as this program was."""
    program = Path(sys.argv[0] or 'jaxrnn')  # empty where Python is asked line by line
    script, name = program.with_name(f'{command}.py'), f'jaxrnn {command}'
    if program.suffix != '.py':
        return Invocation(name, name, (sys.argv[0], command))
    if program.name == '__main__.py' or not script.exists():
        return Invocation(name, f'python -m {name}', (sys.executable, '-m', 'jaxrnn', command))
    return Invocation(script.name, f'python {as_shell_word(str(script))}', (sys.executable, str(script)))


def as_typed(text: str) -> str:
    """A text with every `jaxrnn COMMAND` in it as the user types it."""
    commands = '|'.join(COMMANDS)
    return re.sub(rf'\bjaxrnn ({commands})\b', lambda found: of(found[1]).typed, text)


def line(command: str, *flags: str) -> str:
    """What is typed into a shell to call a command; it can be copied."""
    return ' '.join([of(command).typed, *map(as_shell_word, flags)])


def following(command: str, *flags: str) -> str:
    """The line that says what to do next."""
    return f'next: {line(command, *flags)}'
