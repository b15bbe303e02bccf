"""Files of word vectors, row by row: word2vec text and binary, GloVe text, gensim's KeyedVectors.

The format is found from the content, never from the name. Nothing is allocated on a header's word.
"""

import codecs
import contextlib
import io
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxrnn.escaping import as_shell_word
from jaxrnn.types import UserError
from jaxrnn.words.config import LONGEST_VECTOR
from jaxrnn.words.data.files import OpenFile, opened

# Ours rather than gensim's parser: that one allocates what the header claims, keeps no line numbers for
# its messages, cuts GloVe's words at their first space, and its `limit` counts words we then drop.

LONGEST_LINE = 4 << 20  # bytes: LONGEST_VECTOR numbers of 63 characters
LONGEST_WORD = 10_000  # bytes; word2vec's own limit is 100
SAMPLE = 1 << 16  # bytes that decide between text and binary

HEADER = re.compile(rb'\s*(\d{1,18})\s+(\d{1,18})\s*')
CONTROL = re.compile(rb'[\0-\x08\x0e-\x1f]')
EXPECTED = 'word2vec text or binary, GloVe text (each also gzipped), or KeyedVectors expected'


class VectorRow(NamedTuple):
    number: int  # counted from 1, of the line (text) or vector (else)
    word: str
    vector: np.ndarray  # float32 [E]


class VectorTable(NamedTuple):
    kind: str
    unit: str  # what a row's number counts: line or row
    size: int  # E
    rows: Iterator[VectorRow]


@contextlib.contextmanager
def vector_table(path: str, *, allow_pickle: bool = False) -> Iterator[VectorTable]:
    """The rows of a file of word vectors, read as they are asked for.

    Raises:
      UserError: here or while the rows are read, in bounded memory and time.
    """
    with opened(path) as file:
        if _is_pickle(file.stream.peek(2)):
            yield _keyed_vectors(path, allow_pickle)
            return
        first = _line(path, 1, file.stream).removeprefix(codecs.BOM_UTF8)
        if header := HEADER.fullmatch(first):
            yield _word2vec(path, file, int(header[1]), int(header[2]))
        else:
            yield _glove(path, file.stream, first)


def _word2vec(path: str, file: OpenFile, count: int, size: int) -> VectorTable:
    if not count or not 0 < size <= LONGEST_VECTOR:
        raise UserError(
            f'{path}: the header claims {count} vectors of size {size}; at least 1 vector of size 1 to'
            f' {LONGEST_VECTOR} expected: fetch or make it again'
        )
    text = _is_text(file.stream.peek()[:SAMPLE], size)
    # The shortest row: a space and a digit, or four bytes, for each number, and one byte of the word.
    least = count * ((2 if text else 4) * size + 1)
    if least > file.most:
        raise UserError(
            f'{path}: the header claims {count} vectors of size {size}, at least {least} bytes, but the file'
            f' holds at most {file.most}: cut short or damaged, fetch it again'
        )
    if text:
        return VectorTable('word2vec text', 'line', size, _text_rows(path, file.stream, size, count))
    return VectorTable('word2vec binary', 'row', size, _binary_rows(path, file.stream, size, count))


def _glove(path: str, stream: io.BufferedReader, first: bytes) -> VectorTable:
    size = len(first.split()) - 1
    if not 0 < size <= LONGEST_VECTOR or CONTROL.search(first):
        raise UserError(f'{path}: unknown format, it begins with {shown(first[:20])}; {EXPECTED}')
    return VectorTable('GloVe text', 'line', size, _text_rows(path, stream, size, None, first))


def _text_rows(
    path: str, stream: io.BufferedReader, size: int, count: int | None, first: bytes = b''
) -> Iterator[VectorRow]:
    """Rows of text; `count` is what a header claimed, `first` a first line already read."""
    if first:
        yield _text_row(path, 1, first, size)
    number, rows = 1, 0
    while line := _line(path, number + 1, stream):
        number += 1
        if not line.isspace():
            rows += 1
            yield _text_row(path, number, line, size)
        elif stream.read(LONGEST_LINE).strip():  # blank lines may end the file
            raise UserError(f'{path}: line {number} is blank; a word and {size} numbers expected: remove it')
    if count is not None and rows != count:
        raise UserError(
            f'{path}: the header claims {count} vectors, {rows} found: cut short, or put right line 1'
        )


def _text_row(path: str, number: int, line: bytes, size: int) -> VectorRow:
    fields = line.rsplit(None, size)
    if len(fields) == size and line[:1].isspace():
        fields.insert(0, b'')  # the empty word, as some writers of word2vec text leave it
    # Words hold spaces in GloVe (`. . .`, `at name@domain.com`); a number before the numbers is one too many.
    if len(fields) <= size or any(map(_is_number, fields[0].split()[1:])):
        raise UserError(
            f'{path}: line {number} has {len(line.split()) - 1} numbers, {size} expected as in the lines'
            ' before; put the line right or fetch the file again'
        )
    try:
        values = list(map(float, fields[1:]))
    except ValueError:
        wrong = next(field for field in fields[1:] if not _is_number(field))
        raise UserError(
            f'{path}: line {number}: {shown(wrong)} is not a number; a word and {size} numbers expected in'
            f' each line ({EXPECTED})'
        ) from None
    with np.errstate(over='ignore'):  # becomes infinite, which is reported where the rows are gathered
        return VectorRow(
            number, _word(path, f'line {number}', fields[0].strip()), np.array(values, np.float32)
        )


def _binary_rows(path: str, stream: io.BufferedReader, size: int, count: int) -> Iterator[VectorRow]:
    for number in range(1, count + 1):
        word = _binary_word(path, stream, number).lstrip(b'\n')  # word2vec.c ends each row with one
        data = stream.read(4 * size)
        if len(data) < 4 * size:
            raise UserError(f'{path}: ends inside row {number} of {count}: cut short, fetch it again')
        yield VectorRow(
            number, _word(path, f'row {number}', word), np.frombuffer(data, '<f4').astype(np.float32)
        )
    if stream.read(2).strip():
        raise UserError(f'{path}: goes on after the {count} vectors its header claims; make it again')


def _binary_word(path: str, stream: io.BufferedReader, number: int) -> bytes:
    """The bytes up to the next space, or the end."""
    word = bytearray()
    while (byte := stream.read(1)) not in (b' ', b''):
        if len(word) == LONGEST_WORD:
            raise UserError(
                f'{path}: row {number}: no word ends within {LONGEST_WORD} bytes; damaged, or the header'
                ' claims another vector size: fetch it again'
            )
        word += byte
    return bytes(word)


def _keyed_vectors(path: str, allow_pickle: bool) -> VectorTable:
    if not allow_pickle:
        code = (
            'from gensim.models import KeyedVectors as K;'
            f' K.load({path!a}).save_word2vec_format({path + ".bin"!a}, binary=True)'
        )
        raise UserError(
            f'{path}: a pickled file, as gensim saves KeyedVectors; unpickling can run any code in it. If you'
            f' trust it, type --allow_pickle, or convert it: python -c {as_shell_word(code)}'
        )
    try:
        words, vectors = _unpickled(path)
    except Exception as error:  # a pickle can raise anything
        raise UserError(
            f'{path}: no readable KeyedVectors ({type(error).__name__}: {error}); save them with'
            ' KeyedVectors.save, and keep the .npy files beside'
        ) from error
    rows = (
        VectorRow(n, word, vector) for n, (word, vector) in enumerate(zip(words, vectors, strict=True), 1)
    )
    return VectorTable('KeyedVectors', 'row', vectors.shape[1], rows)


def _unpickled(path: str) -> tuple[list[str], np.ndarray]:
    """Words [N] and float32 [N, E]. Raises anything."""
    from gensim.models import KeyedVectors  # slow to import

    # An absolute path, so that nothing in it reads as an address to smart_open.
    found = KeyedVectors.load(os.path.abspath(path))
    if not isinstance(found, KeyedVectors):
        raise TypeError(f'a {type(found).__name__} found')
    words = list(found.index_to_key)
    if any(not isinstance(word, str) for word in words):
        raise TypeError('keys other than strings found')
    ''.join(words).encode()  # raises for what no UTF-8 file could hold
    with np.errstate(over='ignore'):
        vectors = np.ascontiguousarray(found.vectors, np.float32)
    if vectors.ndim != 2 or len(vectors) != len(words) or not vectors.size:
        raise ValueError(f'{len(words)} words but vectors of shape {vectors.shape} found')
    return words, vectors


def _line(path: str, number: int, stream: io.BufferedReader) -> bytes:
    """The next line, b'' at the end."""
    line = stream.readline(LONGEST_LINE + 1)
    if len(line) > LONGEST_LINE:
        raise UserError(f'{path}: line {number} is longer than {LONGEST_LINE:,} bytes; {EXPECTED}')
    return line


def _word(path: str, where: str, word: bytes) -> str:
    try:
        return word.decode()
    except UnicodeDecodeError:
        raise UserError(f'{path}: {where}: the word {shown(word)} is not UTF-8; convert the file') from None


def shown(word: str | bytes) -> str:
    """A word as messages show it: quoted, on one line, cut at 40 letters; as bytes if it isn't UTF-8."""
    with contextlib.suppress(UnicodeDecodeError):
        word = word.decode() if isinstance(word, bytes) else word
    return repr(word[:40]) + '…' * (len(word) > 40)


def _is_pickle(start: bytes) -> bool:
    """Whether it begins as pickles of protocols 2 to 5 do; no UTF-8 text does."""
    return len(start) > 1 and start[0] == 0x80 and 2 <= start[1] <= 5


def _is_text(sample: bytes, size: int) -> bool:
    """Whether rows are text. `sample` is what follows the header, perhaps cut short.

    Small rows can look like either: numbers where they belong decide first, then control bytes and
    broken UTF-8, of which binary numbers are full.
    """
    fields = sample.split(b'\n', 1)[0].split()
    if len(fields) > size and all(map(_is_number, fields[-size:])):
        return True
    try:
        codecs.getincrementaldecoder('utf-8')().decode(sample)
    except UnicodeDecodeError:
        return False
    return not CONTROL.search(sample)


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True
