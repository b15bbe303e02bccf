"""One file of comma-separated values (RFC 4180): a line a record, and a line of names above them."""

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxrnn.escaping import visible
from jaxrnn.exports import Recorded, names
from jaxrnn.record.records import ABSENT, values_of

MOST_TEXT = 32_000
"""Letters of a text; a cell of a spreadsheet holds 32,767."""

_FORMULA = re.compile('(^|[,;|"])(\\s*)(?=[=+\\-@\uff0b\uff0d\uff1d\uff20])')
"""Where a spreadsheet may take what follows for a formula: at the start of a cell, or of what is one where another
letter parts cells than a comma. The last four are wide forms of the others, which some read alike (OWASP, "CSV
Injection")."""


def write(run: Recorded, path: Path) -> None:
    """NaN and infinities are `nan`, `inf` and `-inf`, yes and no `true` and `false`; what is missing is empty. Numbers
    have the fewest digits that read back to the same bits."""
    spelled = names.distinct(run.records.stored, as_text)
    with open(path, 'w', encoding='utf-8', newline='') as file:
        rows = csv.writer(file, lineterminator='\n')
        rows.writerow(spelled.values())
        for block in run.records.blocks():
            rows.writerows(zip(*map(_cells, block.stored.values()), strict=True))


def as_text(text: str) -> str:
    """A text that ends no line and is no formula: an apostrophe stands before what may be one."""
    shown = visible(text)
    if len(shown) > MOST_TEXT:
        shown = f'{shown[:MOST_TEXT]}…'
    return _FORMULA.sub(r"\1\2'", shown)


def _cells(values: np.ndarray) -> list[Any]:
    if values.dtype == np.float64 or values.dtype == np.int64:
        return [None if value is ABSENT else value for value in values_of(values)]
    return [_CELL.get(type(value), _as_it_is)(value) for value in values_of(values)]


def _as_it_is(value: Any) -> Any:
    return value


_CELL: dict[type, Callable[[Any], Any]] = {
    bool: lambda value: 'true' if value else 'false',
    str: as_text,
    object: lambda value: None,
}
