"""What a person reads, in sections of rich's texts and tables: the terminal prints them, and a page is made of the same
ones, as plain data.
"""

import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

PLAIN_STYLES = ('bold', 'dim', 'red', 'green', 'yellow', 'cyan')
"""Styles of a span that a page knows."""

_CONSOLE = Console(file=io.StringIO(), color_system=None)
"""Looks up what a style is; prints nothing."""


class Section(NamedTuple):
    """A part of a report."""

    name: str
    title: str  # a heading, where there are headings
    body: tuple[RenderableType, ...]
    apart: bool = True  # whether a line is left free before it, where there are no headings
    in_full: bool = False  # whether it is for who has room, as a page has


def on_a_screen(sections: Iterable[Section]) -> Group:
    """What a terminal prints."""
    parts: list[RenderableType] = []
    for section in sections:
        if section.in_full or not section.body:
            continue
        parts += [Text()] if section.apart and parts else []
        parts += section.body
    return Group(*parts)


def plain(section: Section) -> dict[str, Any]:
    """A section as JSON has it: `name`, `title`, and `body`, a list of lines and tables.

    Lines are {'lines': [[[text, styles], ..], ..]}, a list of spans for each. A table is {'head': [text, ..],
    'left': [bool, ..], 'rows': [[lines, ..], ..]}; `head` is empty for one without.
    """
    body = [made for part in section.body for made in _plain(part)]
    return {'name': section.name, 'title': section.title, 'body': body}


def _plain(part: RenderableType) -> Iterator[dict[str, Any]]:
    match part:
        case Group():
            for each in part.renderables:
                yield from _plain(each)
        case Table():
            yield from [_table(part)] if part.rows else []
        case Text() | str():
            yield from ([{'lines': found}] if any(found := _lines(part)) else [])
        case _:
            raise TypeError(f'{type(part).__name__} found, a text, a table or a group expected')


def _lines(part: Text | str, style: str | Style = '') -> list[list[Any]]:
    text = Text(part) if isinstance(part, str) else part
    return [_spans(line, style) for line in text.split('\n', allow_blank=True)]


def _spans(line: Text, style: str | Style) -> list[Any]:
    around = Style.combine(
        [Style.null(), *(_CONSOLE.get_style(each) for each in (style, line.style) if each)]
    )
    return [
        [segment.text, _styles(around + (segment.style or Style.null()))]
        for segment in line.render(_CONSOLE, end='')
        if segment.text
    ]


def _styles(style: Style) -> list[str]:
    named = {style.color.name} if style.color is not None else set()
    named |= {name for name in ('bold', 'dim') if getattr(style, name)}
    return [name for name in PLAIN_STYLES if name in named]


def _table(made: Table) -> dict[str, Any]:
    columns = [list(column.cells) for column in made.columns]
    head = ['\n'.join(_text(column.header)) for column in made.columns] if made.show_header else []
    cells = zip(*columns, strict=True)
    rows = [
        [{'lines': _lines(cell, row.style or '')} for cell in each]
        for each, row in zip(cells, made.rows, strict=True)
    ]
    return {'head': head, 'left': [column.justify != 'right' for column in made.columns], 'rows': rows}


def _text(part: RenderableType) -> list[str]:
    return [part.plain if isinstance(part, Text) else str(part)]


def is_plain(found: Any) -> bool:
    """Whether it is what `plain` makes: asked of what was read from a file."""
    return (
        isinstance(found, Mapping)
        and isinstance(found.get('name'), str)
        and isinstance(found.get('title'), str)
        and isinstance(found.get('body'), list)
        and all(map(_is_part, found['body']))
    )


def _is_part(part: Any) -> bool:
    if not isinstance(part, Mapping):
        return False
    if 'lines' in part:
        return isinstance(part['lines'], list) and all(map(_is_line, part['lines']))
    head, left, rows = (part.get(name) for name in ('head', 'left', 'rows'))
    if not (isinstance(head, list) and isinstance(left, list) and isinstance(rows, list)):
        return False
    wide = all(isinstance(row, list) and len(row) == len(left) for row in rows)
    return (
        wide and all(isinstance(name, str) for name in head) and all(_is_part(c) for row in rows for c in row)
    )


def _is_line(line: Any) -> bool:
    return isinstance(line, list) and all(
        isinstance(span, list)
        and len(span) == 2
        and isinstance(span[0], str)
        and isinstance(span[1], list)
        and all(style in PLAIN_STYLES for style in span[1])
        for span in line
    )
