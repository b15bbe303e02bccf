"""Words as integers: which words can be used, the alphabet, encoding and decoding, the split.

A word is written as one leading `$`, its letters (code points, NFC), and `$` up to T time steps.
"""

import functools
import hashlib
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxrnn.types import UserError

PAD = '$'


class Split(NamedTuple):
    """Rows of the data set, ascending, each row in one of the three."""

    train: np.ndarray  # int32
    validation: np.ndarray  # int32
    test: np.ndarray  # int32


MOST_MARKS = 30
"""Combining marks in a row; no language comes near. The stream-safe text format has the same limit (Unicode Standard
Annex 15, section 13)."""


def composed(text: str) -> str:
    """NFC, in time that grows as the length does: more than MOST_MARKS marks in a row, which take the square of their
    number to be put in order, are parted by U+034F, as in the stream-safe text format."""
    if _MAYBE_MARKS.search(text):
        text = _too_many_marks().sub('\\g<0>\u034f', text)
    return unicodedata.normalize('NFC', text)


_MAYBE_MARKS = re.compile(f'[^\\x00-\u02ff]{{{MOST_MARKS + 1}}}')


@functools.cache
def _too_many_marks() -> re.Pattern:
    return re.compile(f'[{marks()}]{{{MOST_MARKS}}}(?=[{marks()}])')


@functools.cache
def marks() -> str:
    """Every combining mark."""
    return ''.join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c).startswith('M'))


def why_unusable(word: str, max_length: int) -> str:
    """Why a word (NFC) can't be kept; '' if it can."""
    if not (parts := word.split()):
        return 'empty'
    if parts != [word]:
        return 'with a space'
    if PAD in word:
        return f'with a {PAD}'
    if len(word) > max_length:
        return f'of more than {max_length} letters'
    return ''


def alphabet_of(words: Iterable[str]) -> str:
    """`$`, then the letters of the words by code point."""
    return PAD + ''.join(sorted(set(''.join(words)) - {PAD}))


def steps_for(words: Iterable[str], pad_to: int) -> int:
    """Time steps T: as the longest word and its leading `$` need, or `pad_to` if not 0.

    Raises:
      UserError: if `pad_to` is too few.
    """
    longest = max(words, key=len)
    if 0 < pad_to <= len(longest):
        raise UserError(
            f'--pad_to: {pad_to} found, but the word {longest!r} needs {len(longest) + 1} time steps; give'
            f' at least {len(longest) + 1}, or 0, or a smaller --max_length'
        )
    return max(len(longest) + 1, pad_to)


def encode(words: Sequence[str], alphabet: str, steps: int) -> np.ndarray:
    """Words as integers, int32 [T, n] for T = `steps`.

    Raises:
      UserError: for a letter that isn't in the alphabet, or a word of `steps` letters or more.
    """
    number = {letter: n for n, letter in enumerate(alphabet) if letter != PAD}
    words = [composed(word) for word in words]
    lengths = np.array([len(word) for word in words], int)
    if len(words) and lengths.max() >= steps:
        word = words[int(lengths.argmax())]
        raise UserError(f'the word {word!r} has {len(word)} letters; at most {steps - 1} fit')
    try:
        flat = [number[letter] for word in words for letter in word]
    except KeyError as error:
        raise _unknown_letter(error.args[0], words) from None
    columns = np.repeat(np.arange(len(words)), lengths)
    starts = np.cumsum(lengths) - lengths
    letters = np.zeros((steps, len(words)), np.int32)
    letters[1 + np.arange(len(flat)) - starts[columns], columns] = flat
    return letters


def decode(letters: np.ndarray, alphabet: str) -> list[str]:
    """The words of int32 [T, n]: `encode` backwards."""
    return [''.join(alphabet[n] for n in column)[1:].rstrip(PAD) for column in np.asarray(letters).T.tolist()]


def split(words: Sequence[str], *, seed: int, validation: float, test: float) -> Split:
    """Deals the words out by a hash of (seed, word), whatever their order.

    The first round(test * N) by hash are the test, the next round(validation * N) the validation.

    Raises:
      UserError: if fewer than 2 are left to train on.
    """
    order = sorted(range(len(words)), key=lambda n: (_hash(seed, words[n]), words[n]))
    tested = round(test * len(words))
    held_out = tested + round(validation * len(words))
    if len(words) - held_out < 2:
        raise UserError(
            f'--validation_share {validation} and --test_share {test} leave {max(0, len(words) - held_out)} of'
            f' {len(words)} words to train on; at least 2 expected: lower them or give more words'
        )
    parts = order[held_out:], order[tested:held_out], order[:tested]
    return Split(*(np.sort(np.array(part, np.int32)) for part in parts))


def _hash(seed: int, word: str) -> bytes:
    return hashlib.blake2b(f'{seed} {word}'.encode(), digest_size=8).digest()


def _unknown_letter(letter: str, words: Sequence[str]) -> UserError:
    word = next(word for word in words if letter in word)
    return UserError(
        f'the letter {letter!r} (U+{ord(letter):04X}) of {word!r} is not in the alphabet; a word of the letters'
        ' trained on expected'
    )
