"""Names of fields, which anybody's loop may have made, as a format can hold them: no two become one."""

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable

MOST = 250
"""Letters of a name: what MLflow takes at most; of the others none takes less."""


def distinct(names: Iterable[str], spell: Callable[[str], str], most: int = MOST) -> dict[str, str]:
    """Each name -> as it is spelled in a format: cut where it is too long, and numbered where another is spelled so.

    >>> distinct(['a b', 'a_x0020_b', 'loss'], as_word)
    {'a b': 'a_x0020_b', 'a_x0020_b': 'a_x0020_b-2', 'loss': 'loss'}
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        whole = spell(name)
        if len(whole) > most:
            ending = hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:16]
            whole = f'{whole[: most - 24]}-{ending}'  # the rest is for a number
        numbered = (whole if n == 1 else f'{whole}-{n}' for n in itertools.count(1))
        found[name] = next(spelled for spelled in numbered if spelled not in taken)
        taken.add(found[name])
    return found


_PLAIN = re.compile(r'[A-Za-z0-9][A-Za-z0-9_.\-]*(?:/[A-Za-z0-9_\-][A-Za-z0-9_.\-]*)*')
"""Parts between slashes, none of which is empty, `.` or `..`."""


def as_word(name: str) -> str:
    """In letters, digits and `_-./`; all else is spelled _xHHHH_, as SQL/XML does (ISO 9075-14, section 9.1), and dots
    and slashes, too, where they make no name of a file.

    >>> as_word('grad/norm'), as_word('../up'), as_word('=x'), as_word('')
    ('grad/norm', '_x002E__x002E__x002F_up', '_x003D_x', '_')
    """
    if _PLAIN.fullmatch(name):
        return name
    spelled = re.sub(r'[^A-Za-z0-9_\-./]', _spelled, name)
    if _PLAIN.fullmatch(spelled.lstrip('_')):
        return spelled
    return re.sub(r'[./]', _spelled, spelled) or '_'


def _spelled(letter: re.Match[str]) -> str:
    return f'_x{ord(letter[0]):04X}_'
