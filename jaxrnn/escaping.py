r"""Text that somebody else wrote, on its way to a person: words, paths, names of metrics, other programs' errors.

It may move a terminal's cursor, turn its letters round, or show nothing at all. What can't be seen is spelled out, as
Python's `repr` does, and all else stays as it is. Every way out of jaxrnn leads through here:

    lines       the command's output, every `UserError`, and the log, which a filter guards
    screens     `report` takes `all_visible` of what it is given, and no cell of its tables is markup
    commands    to be copied: `as_shell_word`
    HTML        `as_html`
    JSON        `as_json`, which leaves the text as it is

>>> print(visible('caf\u00e9 \x1b[31m \u202e \u65e5\u672c\u8a9e'))
café \x1b[31m \u202e 日本語
"""

import copy
import dataclasses
import html
import json
import logging
import math
import os
import re
import shlex
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

Value = TypeVar('Value')

_BLANK = re.compile(
    '[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]'
)
"""What Python calls printable and nobody sees: ignorable letters and marks (Unicode's Default_Ignorable_Code_Point),
and the empty braille pattern."""

MOST_MARKS = 8
"""Combining marks on one letter, beyond which they cover the lines around it; biblical Hebrew has up to 4 or 5."""


def visible(text: str) -> str:
    r"""A text in which everything can be seen; newlines are spelled out, too.

    >>> visible('\n')
    '\\n'
    """
    return text if text.isascii() and text.isprintable() else ''.join(_seen(text))


def _seen(text: str) -> Iterator[str]:
    marks = 0
    for letter in text:
        marks = marks + 1 if unicodedata.category(letter).startswith('M') else 0
        plain = letter.isprintable() and not _BLANK.match(letter) and marks <= MOST_MARKS
        yield letter if plain else letter.encode('unicode_escape').decode()


MOST_OF_A_LINE = 4000
"""Letters; a name of a million is no help, and a terminal takes its time."""


def one_line(text: str) -> str:
    r"""A text of several lines, of which others' errors are made, as one in which everything can be seen; the middle of
    a very long one is left out, as the end often says what to do.

    >>> one_line('no such file:\n  a\tb\n')
    'no such file: a\\tb'
    """
    lines = (line.strip(' \t\r') for line in text.split('\n'))
    line = ' '.join(line for line in lines if line)
    if len(line) > MOST_OF_A_LINE:
        line = f'{line[: MOST_OF_A_LINE // 2]} … {line[-MOST_OF_A_LINE // 2 :]}'
    return visible(line)


def as_shell_word(text: str) -> str:
    r"""As one word of a command that is copied into a shell: quoted where need be. What can't be seen is spelled in a
    way that bash and zsh read.

    >>> print(as_shell_word('a b'), as_shell_word('\x1bc'))
    'a b' $'\x1bc'
    """
    if visible(text) == text:
        return shlex.quote(text)
    return f"$'{''.join(map(_in_dollar_quotes, text))}'"


def _in_dollar_quotes(letter: str) -> str:
    if letter in "\\'":
        return f'\\{letter}'
    if visible(letter) == letter and not unicodedata.category(letter).startswith('M'):
        return letter
    try:
        content = os.fsencode(letter)
    except UnicodeEncodeError:  # a surrogate that no name of a file has
        content = letter.encode('utf-8', 'surrogatepass')
    return ''.join(f'\\x{byte:02x}' for byte in content)


def as_html(text: str) -> str:
    """As text between tags, or as an attribute's value in quotes.

    >>> as_html('<b title="&">')
    '&lt;b title=&quot;&amp;&quot;&gt;'
    """
    return html.escape(visible(text))


def as_json(value: Any, *, indent: int | None = None) -> str:
    r"""As JSON in ASCII, from which a program gets the very text; NaN and infinities, which JSON lacks, as null.

    >>> print(as_json({'word': '\x1b', 'loss': float('nan')}))
    {"word": "\u001b", "loss": null}
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return None
        case Mapping():
            return {name: _finite(item) for name, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
    return value


def all_visible(value: Value) -> Value:
    r"""The same data with every string in it visible: in dictionaries (keys, too), lists, tuples, named tuples and
    dataclasses, however deep.

    >>> all_visible({'words': ('a', '\x1b'), 'step': 3})
    {'words': ('a', '\\x1b'), 'step': 3}
    """
    return _all_visible(value)


def _all_visible(value: Any) -> Any:
    match value:
        case str():
            return visible(value)
        case Mapping():
            return {_all_visible(key): _all_visible(one) for key, one in value.items()}
        case tuple() if hasattr(value, '_make'):
            return value._make(map(_all_visible, value))
        case tuple():
            return tuple(map(_all_visible, value))
        case list():
            return [*map(_all_visible, value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)  # not built anew, as that may check its fields
        for field in dataclasses.fields(value):
            object.__setattr__(made, field.name, _all_visible(getattr(value, field.name)))
        return made
    return value


def _guard(record: logging.LogRecord) -> bool:
    """A line of the log is one line, whoever reads it."""
    record.msg, record.args = one_line(record.getMessage()), None
    return True


logging.getLogger('jaxrnn').addFilter(_guard)
