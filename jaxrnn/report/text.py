"""Numbers, places and tables, as all reports write them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text


def number(value: Any) -> str:
    """Three digits."""
    if value is None:
        return ''
    return f'{value:.3g}' if isinstance(value, float) else str(value)


def pair(values: Sequence[float]) -> str:
    """Before → now."""
    return ' → '.join(number(float(value)) for value in values)


def percent(share: float) -> str:
    return f'{100 * share:.0f} %'


def count(number: int, noun: str) -> str:
    return f'{number:,} {noun}{"" if number == 1 else "s"}'


def some(words: Sequence[str], most: int = 12) -> str:
    return ' '.join(words[:most]) + (f' … ({len(words)})' if len(words) > most else '')


def short(source: str) -> str:
    """A path from the working directory, where it lies below."""
    file, _, line = source.rpartition(':')
    path = Path(file)
    return f'{path.relative_to(Path.cwd())}:{line}' if path.is_relative_to(Path.cwd()) else source


class PlainTable(Table):
    """A table whose cells are letters alone, whoever prints it: `[b]` is no markup, and `:bee:` no picture."""

    def add_column(self, header: Any = '', *arguments: Any, **options: Any) -> None:
        super().add_column(_plain(header), *arguments, **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*map(_plain, cells), **options)


def _plain(cell: Any) -> Any:
    return Text(cell) if isinstance(cell, str) else cell


def table(*columns: str, left: Sequence[str] = ()) -> PlainTable:
    """Columns with two spaces between, so that many fit on 80; numbers to the right, but for those of `left`."""
    made = PlainTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    for column in columns:
        made.add_column(column, justify='left' if column in left else 'right', overflow='fold')
    return made
