"""The plain text of a MediaWiki article, as gensim's `filter_wiki` has it, in time that grows as its length does.

gensim looks for each opening mark's closing one up to the end of the article, and where there is none it does so again
from the next opening mark: 700 kB of `[[File:` took minutes. Here a pattern whose closing mark is missing matches, too,
up to where it could have been, and what it matched is left as it is. So each letter is read once by each pattern.

Differs from gensim's in that a file's caption takes that file's place, and not that of an equal one before it.
"""

import re

PASSES = 4
"""Over markup that is within other markup; as gensim's."""


def plain(text: str) -> str:
    """An article without its markup."""
    from gensim.corpora.wikicorpus import remove_template  # slow to import
    from gensim.utils import decode_htmlentities

    text = _without_languages(decode_htmlentities(text))
    text = _FILE.sub(_caption, remove_template(text))
    for _ in range(PASSES):
        before, text = text, _without_tables(_without_marks(text))
        if text == before:
            break
    return text.replace('[', '').replace(']', '')


# In each the last group is the closing mark, and empty where there is none.
_SPANS = (
    re.compile(r'<!--.*?(-->|\Z)', re.DOTALL),
    *(re.compile(rf'<{tag}[> ].*?(</{tag}>|/>|\Z)', re.DOTALL) for tag in ('ref', 'nowiki', 'math')),
    re.compile(r'<[^>]*(>|\Z)'),
)
"""Comments, footnotes, what isn't markup, formulas, and all other tags."""

_LANGUAGE = re.compile(r'\n\[\[[a-z][a-z][\w-]*:[^:\]]+\]\]')
_FILE = re.compile(r'\[\[(?:[fF]ile:|[iI]mage)[^]]*(\]\]|)')
_CATEGORY = re.compile(r'\[\[Category:[^][]*\]\]')
_ADDRESS = re.compile(r'\[\w+://[^ \]\n]*( [^\]\n]*)?(\]|)')
_LINK = re.compile(r'\[([^][]*)(\]|)')
_TABLE_LINE = re.compile(r'(?:\{\||\|-(?!\d)|\|\})[^\n]*(\n|)')
_CELL = re.compile(r'(?<=\n |\n\n|  |.\n|.\t)[|!]([^][\n]*)')
_CELL_ALONE = re.compile(r'(?<=  |.\t)!')
_ATTRIBUTES = re.compile(
    r'\n.{0,4}(?:bgcolor|\d?[ ]?colspan|rowspan|style=|class=|align=|scope=).*'
    r'|^.{0,2}(?:bgcolor|\d?[ ]?colspan|rowspan|style=|class=|align=).*'
)


def _without_languages(text: str) -> str:
    """Without the links to other languages that end an article."""
    begin = end = -1
    for found in _LANGUAGE.finditer(text):
        begin, end = begin if found.start() == end else found.start(), found.end()
    return text[:begin] + text[end:] if begin >= 0 and text[end:] in ('', '\n') else text


def _caption(found: re.Match) -> str:
    return found[0][:-2].rpartition('|')[2] if found[1] else found[0]


def _without_marks(text: str) -> str:
    """Without tags and links, whose descriptions stay."""
    for span in _SPANS:
        text = span.sub(lambda found: '' if found[1] else found[0], text)
    text = _CATEGORY.sub('', text)
    text = _ADDRESS.sub(lambda found: found[1] or '' if found[2] else found[0], text)
    return _LINK.sub(_description, text)


def _description(found: re.Match) -> str:
    return found[1].rpartition('|')[2] if found[2] and '|' in found[1] else found[0]


def _without_tables(text: str) -> str:
    """Only what the cells hold, each on a line of its own."""
    text = text.replace('!!', '\n|').replace('|-||', '\n|')
    # The newline is looked for and not taken.
    text = _TABLE_LINE.sub(lambda found: '\n\n' if found[1] else found[0], text)
    text = text.replace('|||', '|\n|').replace('||', '\n|')
    return _ATTRIBUTES.sub('\n', _CELL.sub(_cell, text)).replace('[]', '')


def _cell(found: re.Match) -> str:
    """What follows a cell's attributes, which end with the last | of its line."""
    content = found[1].rpartition('|')[2]
    return '\n' + _CELL_ALONE.sub('\n', f'|{content}')[1:]  # the mark before it counts, and goes
