"""Word vectors trained on a text with gensim's Word2Vec: reproducibly, and once."""

import codecs
import functools
import glob
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import re
import tempfile
import types
import unicodedata
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from jaxrnn import environment
from jaxrnn.files import replacing
from jaxrnn.types import UserError
from jaxrnn.words import config
from jaxrnn.words.data import wikitext
from jaxrnn.words.data.files import opened, raw
from jaxrnn.words.data.letters import composed, marks

SAMPLE = 'test/test_data/enwiki-latest-pages-articles1*shortened.bz2'  # 2 MB, part of gensim's wheel
SENTENCE_END = re.compile(r'[.!?]\s|\n+')
XML = re.compile(rb'(?:\xef\xbb\xbf)?\s*<(?:\?xml|mediawiki)')
LONGEST_PIECE = 1 << 20  # bytes of a line handled at once; a longer line may have a word cut in two
RECIPE = 1  # for a corpus' sentences; count it up with any change that moves one
WORDS_PER_SECOND = 350_000  # skip-gram on one core of 2024

logger = logging.getLogger('jaxrnn')


class TrainedVectors(NamedTuple):
    """What Word2Vec made of a corpus."""

    words: tuple[str, ...]  # the most frequent first
    vectors: np.ndarray  # float32 [N, E]
    tokens: int  # words of the corpus, repetitions counted


def trained_on(
    path: str,
    options: config.Data,
    seed: int,
    cache_dir: str | os.PathLike | None,
    progress: Callable[[str], None],
) -> TrainedVectors:
    """Word2Vec on a corpus, or what the cache holds of the same corpus, options, seed and versions.

    Raises:
      UserError: for a corpus that can't be read or has too few words.
    """
    settings = {
        'vector_size': options.word2vec_size,
        'window': options.word2vec_window,
        'min_count': options.word2vec_min_count,
        'epochs': options.word2vec_epochs,
        'sg': int(options.word2vec_skip_gram),
        'seed': seed % 2**32,  # NumPy takes no larger
        'workers': 1,  # more race for the vectors, and no two runs agree
    }
    cache = os.path.join(_cache_folder(cache_dir), f'word2vec-{_digest(path, settings)}.npz')
    if (found := _cached(cache, options.word2vec_size)) is None:
        found = _train(path, settings, progress)
        _keep(cache, found)
    return found


def sample_path() -> str:
    """The part of the English Wikipedia that gensim's wheel brings along."""
    spec = importlib.util.find_spec('gensim')  # importing gensim is slow
    for folder in (spec and spec.submodule_search_locations) or ():
        if found := sorted(glob.glob(os.path.join(glob.escape(folder), SAMPLE))):
            return found[0]
    raise UserError(
        'neither --vectors nor --corpus is given, and this build of gensim lacks its sample of Wikipedia'
        f' ({SAMPLE}); give one of the two, or install gensim from PyPI'
    )


def sentences(path: str) -> Iterator[list[str]]:
    """The words of each sentence of two or more: a shorter one teaches Word2Vec nothing."""
    with opened(path) as file:
        wiki = XML.match(file.stream.peek()[:1024])
        for text in (_articles if wiki else _lines)(path, file.stream):
            yield from tokenise(text)


def tokenise(text: str) -> Iterator[list[str]]:
    """The words of each sentence of two or more, lower-cased, NFC."""
    for sentence in SENTENCE_END.split(composed(text.lower())):
        words = _word_pattern().findall(sentence)
        if len(words) > 1:
            yield words


@functools.cache
def _word_pattern() -> re.Pattern:
    """Letters and their combining marks. Python's \\w has no marks, without which Hindi falls to pieces."""
    return re.compile(rf'[^\W\d_]+(?:[{marks()}]+[^\W\d_]*)*')


def _lines(path: str, stream: io.BufferedReader) -> Iterator[str]:
    decoder, offset = codecs.getincrementaldecoder('utf-8')(), 0
    while True:
        piece = stream.readline(LONGEST_PIECE)
        held = len(decoder.getstate()[0])  # of a letter that the last piece cut
        try:
            yield decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            raise UserError(
                f'{path}: byte {offset - held + error.start} is not UTF-8; convert the file, as'
                ' iconv -t UTF-8 does'
            ) from None
        if not piece:
            return
        offset += len(piece)


def _articles(path: str, stream: io.BufferedReader) -> Iterator[str]:
    """The plain text of each article of a MediaWiki dump."""
    from gensim.corpora.wikicorpus import extract_pages  # slow to import

    pages = 0
    # It reads 16 kB at once, and expat before 2.6 begins a tag or comment anew with each.
    pieces = types.SimpleNamespace(read=lambda size: stream.read(max(size, LONGEST_PIECE)))
    try:
        for _, text, _ in extract_pages(pieces, filter_namespaces=('0',)):
            pages += 1
            yield wikitext.plain(text)
    except (SyntaxError, ValueError, AttributeError, RuntimeError) as error:  # all of extract_pages'
        raise UserError(f'{path}: no MediaWiki dump ({error}); give one, or plain text') from error
    if not pages:
        raise UserError(f'{path}: XML without MediaWiki pages found; give a MediaWiki dump, or plain text')


def _train(path: str, settings: dict[str, int], progress: Callable[[str], None]) -> TrainedVectors:
    from gensim.models.word2vec import LineSentence, Word2Vec  # slow to import

    # On disk, so that a corpus may be larger than the memory and is taken to words only once.
    with tempfile.TemporaryFile() as lines:
        tokens = _write_sentences(path, lines)
        model = Word2Vec(**settings)
        model.build_vocab(LineSentence(lines))
        if len(model.wv) < 2:
            raise UserError(
                f'{path}: {tokens:,} words in sentences found, {len(model.wv)} of them at least'
                f' {settings["min_count"]} times; 2 or more expected: give more text or a smaller'
                ' --word2vec_min_count'
            )
        seconds = max(1, round(tokens * settings['epochs'] / WORDS_PER_SECOND))
        progress(f'training Word2Vec on {tokens:,} words: about {seconds:,} s, once')
        model.train(LineSentence(lines), total_examples=model.corpus_count, epochs=model.epochs)
    return TrainedVectors(tuple(model.wv.index_to_key), np.asarray(model.wv.vectors, np.float32), tokens)


def _write_sentences(path: str, lines: BinaryIO) -> int:
    """One sentence a line; returns the number of words."""
    tokens = 0
    try:
        for words in sentences(path):
            lines.write((' '.join(words) + '\n').encode())
            tokens += len(words)
        lines.flush()
    except OSError as error:
        raise UserError(
            f'{tempfile.gettempdir()}: cannot hold the sentences of {path} ({error.strerror}); set TMPDIR'
        ) from error
    return tokens


def _cache_folder(cache_dir: str | os.PathLike | None) -> str:
    return os.fspath(environment.cache_folder() if cache_dir is None else cache_dir)


def _digest(path: str, settings: dict[str, int]) -> str:
    """Over everything that decides the vectors."""
    with raw(path) as file:
        corpus = hashlib.file_digest(file, 'sha256').hexdigest()
    versions = [importlib.metadata.version(name) for name in ('gensim', 'numpy')]
    key = [RECIPE, corpus, settings, versions, unicodedata.unidata_version]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def _cached(cache: str, size: int) -> TrainedVectors | None:
    try:
        with open(cache, 'rb') as opened_cache, np.load(opened_cache, allow_pickle=False) as file:
            words = tuple(file['words'].tobytes().decode().split('\n'))
            vectors, tokens = file['vectors'], int(file['tokens'])
        if vectors.shape != (len(words), size) or vectors.dtype != np.float32:
            raise ValueError(f'{len(words)} words but {vectors.dtype} {vectors.shape}')
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # zipfile, zlib and NumPy raise what they like
        logger.warning('%s: unreadable (%s); training anew', cache, error)
        return None
    return TrainedVectors(words, vectors, tokens)


def _keep(cache: str, found: TrainedVectors) -> None:
    words = np.frombuffer('\n'.join(found.words).encode(), np.uint8)
    try:
        os.makedirs(os.path.dirname(cache), mode=0o700, exist_ok=True)
        with replacing(cache) as file:
            np.savez(file, words=words, vectors=found.vectors, tokens=found.tokens)
    except (OSError, UserError) as error:
        why = getattr(error, 'strerror', None) or error
        logger.warning('%s: cannot be written (%s); the next run trains Word2Vec again', cache, why)
