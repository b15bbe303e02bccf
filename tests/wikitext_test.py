"""Articles without their markup: the text that gensim makes of them, in time that grows as the length does."""

import bz2
import random
import time

import pytest
from gensim.corpora.wikicorpus import extract_pages, filter_wiki

from jaxrnn.words.data import corpus, letters, wikitext

SHAPES = (
    '[[File:', '\n[[Image', '<ref ', '<ref a>', '<nowiki ', '<math>', '<!--', '<', '<a ', '[', '[a|', 'a|', '[[[a|',
    '[http://a ', '[a:// ', '[http://', '{{', '{', '{|', '|-', '  !', ' \t!', '  |', '\n[[de:a]]', '\n[[de:', '!!',
    '[[Category:', '&amp;', '&', '&#x', '\ncolspan', ' ', '\n', 'a', '|||', '[[File:a|b]]', ']]', '. ', 'a\u0300',
    '\u0300\u0327',
)  # fmt: skip
"""Markup that is opened and never closed, and what else was or could be slow."""

MORE = (
    'b', ']', '[[', '|', '}}', '|}', '-->', '/>', '>', '</ref>', '</math>', ':', '//', '!', '\t', '1', '}', 'Category:',
    'class=', '-', '[[File:a]]',
)  # fmt: skip
PAGE = '<page><title>a</title><ns>0</ns><id>1</id><revision><text>One two.</text></revision></page>'


def test_articles_are_what_gensim_makes_of_them():
    with bz2.open(corpus.sample_path()) as file:
        for number, (_, text, _) in enumerate(extract_pages(file, filter_namespaces=('0',))):
            if number % 4 == 0:
                assert wikitext.plain(text) == filter_wiki(text)


def test_any_markup_is_what_gensim_makes_of_it():
    draw = random.Random(0)
    for _ in range(6000):
        text = ''.join(draw.choice(SHAPES + MORE) for _ in range(draw.randint(1, 14)))
        assert wikitext.plain(text) == filter_wiki(text), repr(text)


def test_a_caption_takes_its_own_file_s_place():
    """Where gensim puts it in the place of an equal one before."""
    text = '[[File:x[[File:a]]]] b [[File:a]]'
    assert wikitext.plain(text) == 'File:xFile:a b File:a'
    assert filter_wiki('[[File:a|c]] ' * 2) == wikitext.plain('[[File:a|c]] ' * 2) == 'c c '


def seconds(call, *arguments) -> float:
    """The least of three: a busy machine may take its time once."""

    def once() -> float:
        start = time.process_time()
        call(*arguments)
        return time.process_time() - start

    return min(once() for _ in range(3))


@pytest.mark.parametrize('shape', SHAPES)
def test_no_text_takes_long(shape):
    """The square of 150 kB took 6 to 60 s, and more."""
    text = 'x\n' + shape * (150_000 // len(shape))
    assert seconds(wikitext.plain, text) < 1
    assert seconds(lambda: list(corpus.tokenise(text))) < 1


def test_marks_in_a_row():
    """Are put in order as ever; of more than a language has, 30 at a time."""
    assert letters.composed('e\u0301') == 'é'
    few = 'a' + '\u0300\u0327' * 15
    assert letters.composed(few) == letters.unicodedata.normalize('NFC', few)
    many = letters.composed('a' + '\u0300\u0327' * 100_000)
    assert many.count('\u034f') == 200_000 // letters.MOST_MARKS and many[0] == 'à'
    assert letters.composed('カタカナ' * 20) == 'カタカナ' * 20


@pytest.mark.parametrize('token', ['<!--{}-->', '<a b="{}"/>'])
def test_a_long_token_of_a_dump_is_read_once(token, tmp_path):
    path = tmp_path / 'dump.xml'
    head = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/"><siteinfo><a/></siteinfo>'
    path.write_text(head + token.format('a' * 12_000_000) + PAGE + '</mediawiki>')
    list(corpus.sentences(str(path)))  # imports what it needs
    assert seconds(lambda: list(corpus.sentences(str(path)))) < 0.8
