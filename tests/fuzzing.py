"""Every reader of what somebody else may have written, given any bytes at all: `benchmarks/fuzz.py` makes them up, led
by the coverage of the code, and `fuzz_test.py` reads those of `tests/data/fuzz` again.

A reader may refuse by a `UserError`. Anything else is a finding: another exception; code that is executed, imported or
unpickled; a file outside of the reader's folder; more time or memory than the bytes are worth.
"""

import bz2
import collections
import contextlib
import encodings
import functools
import gc
import gzip
import hashlib
import io
import json
import os
import re
import resource
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import acts
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from absl.testing import flagsaver

from jaxrnn import detect, files
from jaxrnn.cli import common
from jaxrnn.detect import rule_language
from jaxrnn.diagnosis import Symptom
from jaxrnn.experiment import cache
from jaxrnn.record import kept_batches, layout, parts, recorder, resume, rewind
from jaxrnn.record.checkpoint import Checkpoints
from jaxrnn.record.record_file import RecordFile
from jaxrnn.record.records import Records
from jaxrnn.report import evidence, page, plots
from jaxrnn.types import UserError
from jaxrnn.words import config, data, opening, optimisers, run, train
from jaxrnn.words.data import corpus

CORPUS = Path(__file__).parent / 'data' / 'fuzz'
"""One folder a reader."""

MOST_SECONDS = 1.0
"""Of the processor, for one file."""

MOST_MEMORY = 256 << 20
"""Bytes, for one file: a line of 4 MB in some hundred thousand parts has half of it."""

LONGEST = 1 << 16
"""Bytes of a file that is made up."""

IDENTITY = {'config': 'c0ffee5c0ffee5c0', 'data': '0123456789abcdef'}


class Reader(NamedTuple):
    """How a file of a kind is read."""

    file: str  # its path in the reader's folder
    read: Callable[[Path], Any]  # what the package does with that folder; raises UserError
    seeds: Callable[[], list[bytes]]  # such files, whole and hostile
    words: tuple[str, ...] = ()  # that such files are made of
    prepare: Callable[[Path], None] = lambda folder: None  # what else is in the folder


# What is read


def _vectors(folder: Path) -> None:
    path = str(folder / 'file')
    with contextlib.suppress(UserError):
        data.read_vectors(path, max_length=19, num_words=3)
    data.load(config.Data(vectors=path, validation_share=0, test_share=0.2), seed=0)


def _corpus(folder: Path) -> None:
    for words in corpus.sentences(str(folder / 'file')):
        assert len(words) > 1 and not any(word.isspace() for word in words)


def _records(folder: Path) -> None:
    file = RecordFile(folder / 'records.jsonl')
    with contextlib.suppress(UserError):
        _look_into(file.read())
    intact = file.read_intact()
    _look_into(intact)
    if len(intact):
        file.keep_before(int(intact.steps[-1]))
        assert len(file.read()) == len(intact) - 1  # what was damaged is left out
        file.insert({int(intact.steps[-1]): intact[-1]})
        assert file.read().digest() == intact.digest()


def _look_into(found: Any) -> None:
    rows = list(found)
    assert [row['step'] for row in rows] == found.steps.tolist()
    assert len(found.digest()) == 32
    with contextlib.suppress(UserError):  # that there is no loss
        detect.symptoms(found.columns)


def _config(folder: Path) -> None:
    found = run.read_config(layout.Paths(folder))
    assert config.Config.from_json(json.loads(json.dumps(found.to_json()))).digest() == found.digest()
    for use in (
        lambda: train.skipped(found.training.skip_batches) if found.training.skip_batches else None,
        lambda: optimisers.learning_rate(found.optimiser),
        lambda: opening.check_allowed(layout.Paths(folder), found, opening.Source()),
    ):
        with contextlib.suppress(UserError):
            use()


def _checkpoint(folder: Path) -> None:
    acts.run(folder, 2, identity=IDENTITY)


def _meta(folder: Path) -> None:
    """In all that is asked of a checkpoint before a run goes on from it."""
    saved = Checkpoints(folder / 'checkpoints', like=jax.eval_shape(acts.init))
    with contextlib.suppress(UserError):
        resume.check_identity(folder, saved, IDENTITY)
    with contextlib.suppress(UserError):
        opening.check_identity(layout.Paths(folder), config.Config(), _DATA, opening.Source())
    saved.meta(2)
    resume.newest_intact(_Known(saved), lambda step: None)


class _Known(Checkpoints):
    """Those of a run whose states are known: to read one takes longer than all else."""

    def __init__(self, saved: Checkpoints):
        super().__init__(saved.directory)

    def restore(self, step: int) -> Any:
        return {'w': jnp.float32([1, 2, 3])}


def _dataset(folder: Path) -> None:
    found = data.read_dataset(folder / 'data.npz')
    assert len(data.decode(found.letters, found.alphabet)) == len(found.words)
    data.batch_at(found, 3, batch_size=2, seed=0)


def _rewinds(folder: Path) -> None:
    path = folder / 'rewinds.json'
    found = rewind.read(path)
    assert len(rewind.skipped(found)) <= rewind.MOST_SKIPPED
    rewind.plan(_SYMPTOM, [0, 20, 40], found)
    rewind.write(path, found)
    assert rewind.read(path) == found


def _experiments(folder: Path) -> None:
    path, added = folder / 'experiments.jsonl', cache.CachedOutcome('averted', _SYMPTOM, 0.5, 3, True, 9)
    kept = cache.OutcomeCache(path, 'c0ffee')
    for change in ('without_batch 3', ''):
        kept.get(change, 0, 40)
    kept.put('added', 7, 8, added)
    assert cache.OutcomeCache(path, 'c0ffee').get('added', 7, 8) == added


def _batches(folder: Path) -> None:
    """As a file of frames; and as what is in a frame, which a checksum keeps others from."""
    with mock.patch.object(kept_batches, 'MOST_UNPACKED', 16 << 20):
        _all_of(kept_batches.KeptBatches(folder / 'batches'))
        (folder / 'packed').mkdir(exist_ok=True)
        content = (folder / 'batches' / '0.batches').read_bytes()
        (folder / 'packed' / '3.batches').write_bytes(kept_batches.frame_of(3, content))
        _all_of(kept_batches.KeptBatches(folder / 'packed'))


def _all_of(kept: kept_batches.KeptBatches) -> None:
    for step in kept.steps()[:20]:
        with contextlib.suppress(UserError):
            jax.tree.leaves(kept(step))


def _recorder(folder: Path) -> None:
    paths = layout.Paths(folder)
    if (found := recorder.read_notes(paths)) is not None:
        with contextlib.suppress(UserError):
            parts.Parts.named({'w': np.zeros(2), 'name': 3}, found)


def _evidence(folder: Path) -> None:
    """And the page that is made of it; without Bokeh's own megabyte."""
    if (found := evidence.read(folder)) is not None:
        with mock.patch.object(plots, 'script_of_bokeh', lambda: ''):
            page.of(page.Contents('run', _ROWS, found, (0, 2)))


def _rule(folder: Path) -> None:
    found = rule_language.parse((folder / 'file').read_bytes().decode(errors='surrogateescape'))
    columns = {'step': np.arange(24.0), 'loss': np.array([1, np.nan, -0.0, np.inf, 3e38, 1e-320] * 4)}
    rule_language.holds(found, columns)
    rule_language.holds(rule_language.bind(found, {'loss': 'loss'}, columns), columns)


def _flags(folder: Path) -> None:
    def call(words: list[str]) -> int:
        common.config_from_flags()
        assert not common.pickle_allowed()
        return 0

    errors, saved = io.StringIO(), flagsaver.save_flag_values()
    try:
        with (
            contextlib.redirect_stderr(errors),
            contextlib.redirect_stdout(io.StringIO()),
            mock.patch.object(common, 'start'),  # what is set of the process, by no file's word
        ):
            code = common.run(call, '', 'train', [f'--flagfile={folder / "flags.txt"}'])
    finally:
        flagsaver.restore_flag_values(saved)
    said = errors.getvalue()
    assert (code, said) == (0, '') or (code == 2 and said.count('\n') == 1 and said[:-1].isprintable()), (
        code,
        said,
    )


def _define_flags(folder: Path) -> None:
    if 'hidden' not in flags.FLAGS:
        common.define_run('')
        common.define_config()


# What they begin from


def _texts() -> list[bytes]:
    """Of no kind."""
    return [b'', b'\0' * 9, b'\xff\xfe', b'[' * 2000, b'{"a": ' * 900, b'"\\ud800"', b'1' * 5000, b'NaN']


def _of_vectors() -> list[bytes]:
    text = b'4 3\ncat 1 0 0\ndog 0 1 0\nca\xcc\x81t 0 -1e-3 1\n. . . 4 5 6\n'
    rows = [word + b' ' + np.float32([n, 1, -n]).tobytes() for n, word in enumerate([b'ab', b'cd', b'ef'], 1)]
    binary = b'3 3\n' + b''.join(rows)
    found = [text, text.partition(b'\n')[2], binary, b'2 2\na 1 2\na 3 4\n', b'1 1\nx 1e999\n', b'\x80\x04N.']
    return [*found, *map(_gzipped, found[:3]), bz2.compress(text), _gzipped(b'a' * 300_000)]


_gzipped = functools.partial(gzip.compress, mtime=0)

PAGE = (
    '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/"><page><title>A</title><ns>0</ns><id>1</id>'
    '<revision><text>{}</text></revision></page></mediawiki>'
)
MARKUP = (
    "'''A''' is [[b|c]] d. [[File:x.png|thumb|a b]] {{cite|a=b}} &lt;ref name=x&gt;no&lt;/ref&gt; e f!\n"
    '{| class="a"\n|-\n! h !! i\n| j || k\n|}\n[http://a.b c d] [[Category:x]]\n[[fr:A]]\n&amp;nbsp; &lt;!-- x --&gt;'
)


def _of_corpus() -> list[bytes]:
    page = PAGE.format(MARKUP).encode()
    bomb = (
        b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "c d"><!ENTITY e "&b;&b;">]><mediawiki>&e;</mediawiki>'
    )
    outside = b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><mediawiki>&b;</mediawiki>'
    other = page.replace(b'<mediawiki', b'<?xml version="1.0" encoding="iso8859-7"?><mediawiki', 1)
    text = 'The cat sat. On the mat!\nΔεν είναι, हिन्दी में.\n'.encode()
    marks = ('a' + '\u0301\u0323' * 60 + ' b. ').encode()
    found = [text, page, bomb, outside, other, marks, PAGE.format('[[File:' * 200).encode()]
    return [*found, *map(_gzipped, found[:2]), *map(bz2.compress, found[:2])]


def _of_records() -> list[bytes]:
    rows = [{'step': n, 'loss': 1 / (1 + n), 'finite_loss': True, 'digest': f'{n:016x}'} for n in range(40)]
    rows[7]['loss'], rows[8]['loss'], rows[9]['note'] = float('nan'), float('inf'), 'a'
    with tempfile.TemporaryDirectory() as folder:
        file = RecordFile(Path(folder) / 'records.jsonl')
        for row in rows:
            file.append(row)
        file.close()
        sealed = file.path.read_bytes()
    plain = re.sub(rb', "crc32": "\w+"', b'', sealed)
    strange = (
        b'{"step": 0, "a b": 1}\n{"step": 1, "loss\\u0000": 2, "x > 1 or y": "NaN"}\n{"step": 2, "True": 3}\n'
    )
    large = b'{"step": 0, "loss": 18446744073709551615}\n{"step": 9007199254740991, "loss": -1e308}\n'
    return [sealed, plain, strange, large, b'{"step": 1}\n{"step": 0}\n', b'{"step": 0', *_texts()]


def _of_config() -> list[bytes]:
    made = config.Config().changed(
        skip_batches='3,5-9', boundaries='10,20', schedule='piecewise', vectors='/x/y.txt', warmup_steps=3
    )
    few = {'optimiser': {'schedule': 'exponential', 'decay_rate': 0.5}, 'training': {'skip_batches': '1-2'}}
    hostile = [b'{"data": null}', b'{"model": {"hidden": 1e400}}', b'{"optimiser": {"b1": NaN}}', b'[1, 2]']
    return [json.dumps(made.to_json()).encode(), json.dumps(few).encode(), *hostile, *_texts()]


def _of_meta() -> list[bytes]:
    meta = {'step': 2, 'state': '0123456789abcdef', **IDENTITY}
    found = [meta, {'step': 1}, {'state': 7}, {'config': [1]}, {'data': {'a': 1}}, {}, [1]]
    return [*(json.dumps(each).encode() for each in found), *_texts()]


def _of_dataset() -> list[bytes]:
    written = io.BytesIO()
    texts = {'words': b'ab\ncd\nef', 'alphabet': b'$abcdef', 'source': b's'}
    np.savez(
        written,
        **{name: np.frombuffer(text, np.uint8) for name, text in texts.items()},
        letters=np.int32([[0, 0, 0], [1, 3, 5], [2, 4, 6]]),
        vectors=np.eye(3, 2, dtype=np.float32),
        **{
            name: np.arange(count, dtype=np.int32)
            for name, count in (('train', 2), ('validation', 1), ('test', 0))
        },
    )
    objects = io.BytesIO()
    np.savez(objects, words=np.array([None, {}], object))
    return [written.getvalue(), objects.getvalue(), b'PK\x05\x06' + b'\0' * 18, *_texts()]


def _of_rewinds() -> list[bytes]:
    made = [rewind.Rewind('spike', 50, 20, (41, 50), True), rewind.Rewind('collapse', 90, 60, None, False)]
    with tempfile.TemporaryDirectory() as folder:
        rewind.write(Path(folder) / 'rewinds.json', made)
        sealed = (Path(folder) / 'rewinds.json').read_bytes()
    plain = json.dumps([each._asdict() for each in made]).encode()
    hostile = [b'[{"kind": "spike", "step": 5, "to": 0, "skipped": [1, 1000000000000], "done": true}]', b'{}']
    return [sealed, plain, *hostile, *_texts()]


def _of_experiments() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        kept = cache.OutcomeCache(Path(folder) / 'x', 'c0ffee')
        for n, loss in enumerate((0.5, float('nan'))):
            kept.put(
                f'without_batch {n}', 0, 40, cache.CachedOutcome('averted', _SYMPTOM, loss, 40, True, 40)
            )
        sealed = (Path(folder) / 'x').read_bytes()
    plain = re.sub(rb', "crc32": "\w+"', b'', sealed)
    return [sealed, plain, b'{"scope": "c0ffee"}', b'{"scope": "c0ffee"}\n{"change": [1]}', *_texts()]


def _of_batches() -> list[bytes]:
    batches = [
        {'x': np.arange(4, dtype=np.float32), 'y': (np.bool_([True]), 3, None, 0.5)},
        [jnp.bfloat16([1, 2]), jax.random.key(3), fuzzed_tuple(np.int8(1), 2j)],
    ]
    packed = [kept_batches.packed(kept_batches.taken(batch)) for batch in batches]
    frames = b''.join(kept_batches.frame_of(step, content) for step, content in enumerate(packed))
    hostile = [
        {'leaves': [['array', 'float32', [1 << 40]]], 'tree': '*'},
        {'leaves': [['array', 'O', [1]]], 'tree': '*'},
        {'leaves': [['number', 'int', '9' * 5000]], 'tree': '*'},
        {'leaves': [['key', 'nosuch', [2]]], 'tree': '*'},
        {'leaves': [], 'tree': ['namedtuple', 'x', ['__class__'], ['*']]},
        {'leaves': [], 'tree': ['list', [['none']] * 9]},
    ]
    texts = [json.dumps(each).encode() for each in hostile]
    return [
        frames,
        *packed,
        *(kept_batches.SIZE.pack(len(text)) + text + bytes(8) for text in texts),
        *_texts(),
    ]


fuzzed_tuple = collections.namedtuple('fuzzed_tuple', ['a', 'b'])


def _of_recorder() -> list[bytes]:
    made = {'format': 1, 'state': ['w', 'opt/0/mu']}
    others = [files.sealed(made), made, {'format': 2, 'state': []}, {'format': [], 'state': {'w': 1}}, [1]]
    return [*(json.dumps(each).encode() for each in others), *_texts()]


def _of_evidence() -> list[bytes]:
    line = {'name': 'clip', 'steps': [0, 1], 'values': [0.5, None], 'kind': 'averted'}
    heat_map = {
        'name': 'gates',
        'rows': ['a'],
        'places': [0, 1],
        'before': [[0, 1]],
        'now': [[1, None]],
        'log': True,
    }
    cell = {'lines': [[['x', ['red', 'bold']], ['y', []]]]}
    made = {
        'format': 1,
        'diagnosis': {
            'symptom': ['spike', 1],
            'first_bad_step': 1,
            'onset_step': 0,
            'versions': {'jax': '1'},
        },
        'sections': [
            {'name': 'step', 'title': 'T', 'body': [cell, {'head': ['h'], 'left': [True], 'rows': [[cell]]}]}
        ],
        'experiments': {'name': 'loss', 'log': True, 'lines': [line, {**line, 'kind': 'control'}]},
        'heat_maps': [heat_map],
        'way': {'links': ['a'], 'broke': 'b'},
        'command': 'jaxrnn train',
        'size': 3,
    }
    bare = {**made, 'sections': [], 'experiments': None, 'heat_maps': [], 'way': None}
    others = [made, files.sealed(made), bare, {**bare, 'heat_maps': [heat_map] * 3}, {**bare, 'sections': {}}]
    return [*(json.dumps(each).encode() for each in others), *_texts()]


def _of_rules() -> list[bytes]:
    named = [detector.rule.text.encode() for detector in (*detect.DETECTORS, *detect.ALARMS)]
    hostile = [
        b'__import__("os").system("true") > 1', b'loss.__class__ > 1', b'(' * 90, b'-' * 900 + b'1 > 0',
        b'loss > 9**9**9',
        b'first(loss) > 1e999', b'loss > 1 if loss else 2', b'lambda: loss', b'loss > 0x' + b'f' * 300, b'loss[0] > 1',
        b'median(median(loss, 300), 3) > 1j', b'"a" > loss', b'f"{loss}" > 1', b'(loss := 3) > 1', b'loss > \xff',
        b'a\0',
    ]  # fmt: skip
    return [*named, *hostile]


def _of_flags() -> list[bytes]:
    own = '\n'.join(
        f'--{name}={value}' for name, value in (('hidden', 8), ('guard', 'true'), ('clip', 'zclip'))
    )
    hostile = [
        b'--hidden=8\r--flagfile=/etc/passwd', b'--hidden=8\x0b--flagfile=/etc/passwd', b'--flagfile /etc/passwd',
        b'--hidden 99999999999999999999', b'--b1=nan', b'--nosuch', b'--hidden=\xff', b'// x\n# y\n--',
        b'--threads=1e9',
        b'--undefok=flagfile\n--flagfil=/etc/passwd', b'--seed=0x10', b'--network=\x1b[31m', b'--allow_pickle', b'word',
    ]  # fmt: skip
    return [own.encode(), *hostile]


_SYMPTOM = Symptom('spike', 50)
_ROWS = Records.of([{'step': k, 'loss': 1.0 + k} for k in range(4)])
_DATA = data.Dataset((), '', *[np.zeros(0)] * 5, dropped={}, digest='0123456789abcdef', source='')

JSON = (
    'null',
    'true',
    'NaN',
    '"',
    '{',
    '}',
    '[',
    ']',
    ': ',
    ', ',
    '-1',
    '1e308',
    '\\ud800',
    '\\u0000',
    '"crc32"',
)
OPTIONS = tuple(sorted(config.Config().to_json())) + tuple(
    name for group in config.Config().to_json().values() for name in group
)

READERS: Mapping[str, Reader] = {
    'vectors': Reader('file', _vectors, _of_vectors, ('\n', ' 1', ' -1e9', 'nan', '\u0301', '\x1f\x8b', 'BZh9')),
    'corpus': Reader(
        'file',
        _corpus,
        _of_corpus,
        ('[[', ']]', '{{', '}}', '{|', '|}', '|-', '||', '!!', '&lt;ref&gt;', '&lt;!--', '<page>', '</page>', '<text>',
         '<ns>0</ns>', '&#0;', '&amp;#55296;', '<!DOCTYPE a [', '<!ENTITY b "', '&b;', 'encoding="', 'utf-16',
         '\u0301'),
    ),
    'records': Reader('records.jsonl', _records, _of_records, (*JSON, '"step"', '"loss"', '\n', 'finite_', '"NaN"')),
    'config': Reader('config.json', _config, _of_config, (*JSON, *OPTIONS, 'piecewise', '1-9')),
    'meta': Reader(
        'checkpoints/2/meta/metadata', _meta, _of_meta, (*JSON, '"step"', '"state"', '"config"', '"data"'), _checkpoint
    ),
    'data': Reader('data.npz', _dataset, _of_dataset, ('<i4', '<f4', "'shape': (", 'True', 'PK\x03\x04', '<M8[ns]')),
    'rewinds': Reader('rewinds.json', _rewinds, _of_rewinds, (*JSON, '"skipped"', '"done"', '"kind"', '"to"')),
    'experiments': Reader('experiments.jsonl', _experiments, _of_experiments, (*JSON, '"symptom"', '"loss"', '\n')),
    'batches': Reader(
        'batches/0.batches', _batches, _of_batches,
        (*JSON, '"leaves"', '"tree"', '"array"', '"key"', '"number"', '"namedtuple"', '"dict"', '"*"', '"float32"',
         'JXB1', '"threefry2x32"'),
    ),
    'recorder': Reader('recorder.json', _recorder, _of_recorder, (*JSON, '"format"', '"state"', '"w"', 'Infinity')),
    'evidence': Reader(
        'evidence.json', _evidence, _of_evidence,
        (*JSON, '"sections"', '"lines"', '"head"', '"rows"', '"heat_maps"', '"places"', '"way"', '"log"', 'red'),
    ),
    'rules': Reader(
        'file',
        _rule,
        _of_rules,
        (*rule_language.WINDOWS, *rule_language.FUNCTIONS, 'first(', 'prev(', 'smooth(', 'loss', 'all_finite', ' and ',
         ' or ', 'not ', ' > ', ' != ', '**', ', 3)', '(', ')', '9e999', 'j', 'sound', 'step', 'lambda', '[0]'),
    ),
    'flags': Reader(
        'flags.txt', _flags, _of_flags, (*(f'--{name}=' for name in OPTIONS), '--no', '--flagfile=', '\r', '\n',
        '/etc/passwd'),
        _define_flags,
    ),
}  # fmt: skip


# What is forbidden

FORBIDDEN = re.compile(
    r'exec|import|marshal\.load.*|pickle\..*|subprocess\..*|os\.(system|exec|posix_spawn|spawn|fork|forkpty|putenv|kill)'
    r'|socket\.(?!__new__).*|ctypes\..*|code\.__new__|urllib\..*|webbrowser\..*|ftplib\..*|signal\.pthread_kill'
)
OF_FILES = re.compile(
    r'open|os\.(listdir|scandir|rename|remove|mkdir|rmdir|symlink|link|truncate|ch\w+)|shutil\..*'
)
CODECS = os.path.dirname(encodings.__file__)
ALLOWED = (CODECS, '/sys/fs/cgroup')
"""Beside the reader's folder: an XML file may name an encoding, and how much memory there is stands in files."""

_armed: Path | None = None
_seen: list[str] = []


def _hook(event: str, arguments: tuple) -> None:
    if _armed is None or not (FORBIDDEN.fullmatch(event) or OF_FILES.fullmatch(event)):
        return
    if OF_FILES.fullmatch(event):
        named = arguments[: 1 if event == 'open' else 2]
        paths = [os.path.abspath(os.fsdecode(a)) for a in named if isinstance(a, str | bytes | os.PathLike)]
        outside = [
            path
            for path in paths
            if not f'{path}/'.startswith(tuple(f'{root}/' for root in (_armed, *ALLOWED)))
        ]
    else:
        outside = [] if _is_codec(event, arguments) else [repr(arguments)[:200]]
    if outside:
        _seen.append(f'{event} {outside[0]}')
        raise PermissionError(f'forbidden: {event} {outside[0]}')


def _is_codec(event: str, arguments: tuple) -> bool:
    """Python's own, which an XML file names."""
    if event == 'import':
        return arguments[0].startswith('encodings.')
    code = getattr(arguments[0], 'co_filename', '') if event == 'exec' else ''
    return code.startswith(CODECS)


@functools.cache
def _install() -> None:
    sys.addaudithook(_hook)


@contextlib.contextmanager
def _watched(folder: Path) -> Iterator[list[str]]:
    """Notes what is done that is forbidden, and doesn't let it happen."""
    global _armed
    _install()
    _seen.clear()
    _armed = folder
    try:
        yield _seen
    finally:
        _armed = None


# One file


class Finding(NamedTuple):
    """What a reader did that it may not do."""

    kind: str  # the same for the same cause, as far as can be told
    said: str


class Folder:
    """Where a reader's file is; what it wrote there is gone before the next."""

    def __init__(self, name: str, home: Path):
        self.reader, self.home = READERS[name], home / name
        self.home.mkdir(parents=True)
        self.reader.prepare(self.home)
        self.whole = {path: path.read_bytes() for path in self.home.rglob('*') if path.is_file()}
        for content in self.reader.seeds():  # what is imported, compiled or cached on the way
            with contextlib.suppress(Exception):
                self._read(content)

    def judge(self, content: bytes) -> Finding | None:
        """Reads a file of these bytes."""
        start, most, failed = time.process_time(), _peak(), None
        with _watched(self.home) as seen:
            try:
                self._read(content)
            except UserError:
                pass
            except Exception as error:
                failed = error
        seconds, grown = time.process_time() - start, _peak() - most
        if seen:
            return Finding(re.sub(r'\W+', ' ', seen[0])[:60], '; '.join(seen))
        if failed is not None:
            return Finding(_kind(failed), ''.join(traceback.format_exception(failed))[-1500:])
        if seconds > MOST_SECONDS and (seconds := self._seconds(content)) > MOST_SECONDS:
            return Finding('time', f'{seconds:.1f} s')
        return Finding('memory', f'{grown >> 20} MB') if grown > MOST_MEMORY else None

    def _seconds(self, content: bytes) -> float:
        """How long a file takes; without what the collection of everybody's garbage takes meanwhile."""
        gc.collect()
        gc.disable()
        try:
            start = time.process_time()
            with contextlib.suppress(Exception):
                self._read(content)
            return time.process_time() - start
        finally:
            gc.enable()

    def _read(self, content: bytes) -> None:
        for path in [path for path in self.home.rglob('*') if path.is_file() and path not in self.whole]:
            path.unlink()
        path = self.home / self.reader.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        self.reader.read(self.home)


def _peak() -> int:
    """The most bytes that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _kind(error: Exception) -> str:
    """What failed, by the last line of the package that it came through."""
    places = [f for f in traceback.extract_tb(error.__traceback__) if '/jaxrnn/' in f.filename]
    where = f' in {places[-1].name} at {Path(places[-1].filename).name}:{places[-1].lineno}' if places else ''
    return f'{type(error).__name__}{where}'


def named(content: bytes) -> str:
    """A file's name in the corpus."""
    return hashlib.sha256(content).hexdigest()[:12]


def kept(name: str) -> list[bytes]:
    """A reader's corpus."""
    return [path.read_bytes() for path in sorted((CORPUS / name).glob('*'))]


def shrunk(folder: Folder, content: bytes, finding: Finding, seconds: float = 20) -> bytes:
    """The same finding with fewer bytes."""
    until, size = time.monotonic() + seconds, max(len(content) // 2, 1)
    while size and time.monotonic() < until:
        start = 0
        while start < len(content) and time.monotonic() < until:
            shorter = content[:start] + content[start + size :]
            found = folder.judge(shorter)
            if found is not None and found.kind == finding.kind:
                content = shorter
            else:
                start += size
        size //= 2
    return content


def with_right_checksums(archive: bytes) -> bytes:
    """A zip archive whose stored members agree with their checksums, so that what is in them is looked at."""
    made = bytearray(archive)
    for found in re.finditer(rb'PK\x01\x02', archive):
        entry = archive[found.start() : found.start() + 46]
        if len(entry) < 46:
            continue
        number = functools.partial(int.from_bytes, byteorder='little')
        size, local = number(entry[20:24]), number(entry[42:46])
        start = (
            local + 30 + number(archive[local + 26 : local + 28]) + number(archive[local + 28 : local + 30])
        )
        crc = zlib.crc32(archive[start : start + size])
        made[found.start() + 16 : found.start() + 20] = crc.to_bytes(4, 'little')
    return bytes(made)
