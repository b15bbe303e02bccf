"""Is jaxrnn right on this machine's GPU, does a replay give the same bits there, and how fast is it?

    python benchmarks/accelerator_check.py --minutes=8
    python benchmarks/accelerator_check.py --only=parity,replay --again

Nothing of jaxrnn needs to be installed, only what it imports. Each part is a process of its own, killed when its time
is over, and what it finds is written at once to benchmarks/results/accelerator_check-PLATFORM-DEVICE.json. The same
command again does the parts that aren't there yet for the same machine, versions and sources.

Exit codes here: 0 all that ran is right; 3 a part found something wrong; 1 a part crashed, or found nothing in its
time; 2 misuse.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import concurrent.futures
import contextlib
import functools
import glob
import gzip
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks import peers
from jaxrnn.cli import common
from jaxrnn.types import Tree, UserError

Row = Mapping[str, Any]
"""What a part found: `right` says whether it is as it must be, None or absent where that isn't asked; `error` that it
couldn't be found; `left_out` why it wasn't looked for."""


class Size(NamedTuple):
    """How large everything is."""

    hidden: int = 1024
    narrow: int = 512  # width where many programs are compiled
    batch: int = 32
    steps: int = 20  # T
    trained: int = 300  # train steps of a run; the checkpoints are at thirds
    batches: str = '32,128,512'  # timed
    large: int = 512  # batch whose memory is looked at
    rounds: int = 7
    every: int = 1  # of the cases of parity, one in so many


REAL = Size()
REHEARSED = Size(hidden=32, narrow=24, batch=6, steps=4, trained=60, batches='4', large=8, rounds=2, every=8)

HIGHEST, DEFAULT, NARROW = 1e-5, 5e-3, 5e-2
"""Relative errors allowed: of float32 products, of a GPU's default (TF32, 10 bits of mantissa), of bfloat16 (7)."""

DETERMINISTIC = '--xla_gpu_deterministic_ops=true'
"""What the README asks for: no atomics, and no choice of kernels by the clock, which would differ by process."""

NO_AUTOTUNING = '--xla_gpu_autotune_level=0'
NO_GRAPHS = '--xla_gpu_enable_command_buffer='

TIMED = ('jaxrnn', 'jaxrnn-reference', 'cudnn', 'torch', 'nnx', 'linen', 'keras-jax')
COUNTED = ('jaxrnn', 'nnx', 'cudnn')
PROFILED = 5  # steps
VERSIONED = (
    'torch', 'keras', 'dm-haiku', 'equinox', 'jax-cuda12-plugin', 'jax-cuda13-plugin', 'nvidia-cudnn-cu12',
    'nvidia-cudnn-cu13', 'nvidia-cublas', 'nvidia-cublas-cu12', 'nvidia-cuda-nvcc', 'nvidia-cuda-nvcc-cu12',
)  # fmt: skip

SOURCES = ('accelerator_check', 'accelerator_compile', 'peers', 'step_throughput')
"""Benchmarks on which results depend, beside jaxrnn."""


# This machine.


def probe(size: Size) -> Iterator[Row]:
    """What results depend on."""
    import jax

    from jaxrnn import environment

    device = jax.devices()[0]
    versions = environment.versions()
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    sources = hashlib.sha256(environment.sources().encode())
    for name in SOURCES:
        sources.update((ROOT / 'benchmarks' / f'{name}.py').read_bytes())
    yield {
        'machine': environment.describe(),
        'runtime': device.client.platform_version,
        'versions': versions,
        'sources': sources.hexdigest()[:16],
        'size': size._asdict(),
    }


# Parity: the recurrence and its gradients, beside the equations in float64.


class ParityCase(NamedTuple):
    cell: str
    inputs: str  # 'letters'; 'masked, reversed': vectors; 'long': letters, and a loop remains
    plan: str
    precision: str


def parity_cases() -> list[ParityCase]:
    """Those that matter most first."""
    inputs = [(cell, inputs) for inputs in ('letters', 'masked, reversed') for cell in CELLS] + [
        ('lstm', 'long')
    ]
    return [
        ParityCase(*pair, plan, precision)
        for precision in ('highest', 'default', 'bfloat16')
        for plan in ('accelerator', 'cpu')
        for pair in inputs
        if (pair[1], plan) != ('long', 'cpu')
    ]


CELLS = ('lstm', 'gru, reset after', 'gru, reset before')


def make_cell(name: str) -> Any:
    from jaxrnn.rnn import cells

    make = {
        'lstm': cells.lstm,
        'gru, reset after': cells.gru_reset_after,
        'gru, reset before': cells.gru_reset_before,
    }
    return make[name](cells.SIGMOID)


def parity_inputs(size: Size, cell: str, inputs: str) -> dict[str, Any]:
    """In NumPy: weights by name, xs, mask, and cotangents of the outputs and of the last h."""
    rng, width = np.random.default_rng(0), size.narrow
    network = 'lstm' if cell == 'lstm' else 'gru'
    layer = peers.initial_weights(peers.Case(network, size.batch, width))['recurrent']
    if cell == 'gru, reset after':
        layer['recurrent_bias'] = rng.uniform(-0.1, 0.1, 3 * width).astype(np.float32)
    steps = 2 * size.steps if inputs == 'long' else size.steps
    xs = rng.integers(0, peers.LETTERS, (steps, size.batch), np.int32)
    mask = None
    if inputs == 'masked, reversed':
        xs = rng.normal(size=(steps, size.batch, peers.LETTERS)).astype(np.float32)
        mask = np.arange(steps)[:, None] < rng.integers(1, steps + 1, size.batch)
    d_outputs = rng.normal(size=(steps, size.batch, width)).astype(np.float32)
    d_last = rng.normal(size=(size.batch, width)).astype(np.float32)
    return {'weights': layer, 'xs': xs, 'mask': mask, 'd_outputs': d_outputs, 'd_last': d_last}


def both_ways(cell: str, inputs: str, given: Mapping[str, Any], **options: Any) -> tuple[Tree, Tree]:
    """What the recurrence gives on the default device: outputs and last h; gradients of weights and vectors."""
    import jax
    import jax.numpy as jnp

    from jaxrnn.rnn import scan

    def loss_of(trained: Tree, given: Tree) -> tuple[Any, Tree]:
        xs = trained.get('xs', given['xs'])
        outputs, last = scan.run(
            make_cell(cell),
            scan.Weights(**trained['weights']),
            xs,
            mask=given['mask'],
            reverse=inputs == 'masked, reversed',
            **options,
        )
        d_outputs, d_last = given['d_outputs'], given['d_last']
        loss = jnp.sum(outputs.astype(d_outputs.dtype) * d_outputs) + jnp.sum(last.h * d_last)
        return loss, {'outputs': outputs, 'last': last.h}

    given = jax.tree.map(jnp.asarray, dict(given))
    trained = {'weights': given.pop('weights')}
    if inputs == 'masked, reversed':
        trained['xs'] = given['xs']
    gradients, results = jax.jit(jax.grad(loss_of, has_aux=True))(trained, given)
    return jax.device_get((results, gradients))


def exactly(size: Size, cell: str, inputs: str) -> tuple[Tree, Tree]:
    """The same by the equations as they stand, differentiated by JAX, in float64 on the CPU."""
    import jax

    given = parity_inputs(size, cell, inputs)
    given = jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, given)
    with jax.enable_x64(True), jax.default_device(jax.devices('cpu')[0]):
        return both_ways(cell, inputs, given, reference=True)


def error(found: Tree, exact: Tree) -> float:
    """The largest relative error over the arrays, each by its norm."""
    import jax

    def of(a: Any, b: Any) -> float:
        return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b))

    return float(np.max(jax.tree.leaves(jax.tree.map(of, found, exact))))  # NaN where there is one


def parity(size: Size) -> Iterator[Row]:
    import jax
    import jax.numpy as jnp

    from jaxrnn.rnn import scan

    plans = {'accelerator': scan.ACCELERATOR, 'cpu': scan.CPU}
    allowed = {'highest': HIGHEST, 'default': DEFAULT, 'bfloat16': NARROW}
    cases = parity_cases()[:: size.every]
    exact = {pair: exactly(size, *pair) for pair in dict.fromkeys((case.cell, case.inputs) for case in cases)}

    def row(case: ParityCase) -> Row:
        options = {'plan': plans[case.plan], 'dtype': jnp.bfloat16 if case.precision == 'bfloat16' else None}
        given = parity_inputs(size, case.cell, case.inputs)
        begun = time.perf_counter()
        with jax.default_matmul_precision('highest' if case.precision == 'highest' else 'default'):
            found = both_ways(case.cell, case.inputs, given, **options)
        seconds = time.perf_counter() - begun
        errors = [error(*pair) for pair in zip(found, exact[case.cell, case.inputs], strict=True)]
        return {
            **case._asdict(),
            **dict(zip(('forward', 'gradients'), map(finite, errors), strict=True)),
            'allowed': allowed[case.precision],
            'right': all(found <= allowed[case.precision] for found in errors),
            'seconds': round(seconds, 2),
        }

    # Mostly compilation, which needs no lock.
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for done in concurrent.futures.as_completed([pool.submit(row, case) for case in cases]):
            yield done.result()


def finite(value: float) -> float | None:
    """As JSON has it."""
    return value if math.isfinite(value) else None


# A program to train, replay, bisect and trace.


class Program(NamedTuple):
    """What `jaxrnn.record` takes."""

    step: Callable[[Tree, Tree], tuple[Tree, Tree]]
    batch_at: Callable[[int], Tree]
    init: Callable[[], Tree]


def program(
    width: int, batch: int, steps: int, *, bad_step: int | None = None, gate: Any = None, plan: Any = None
) -> Program:
    """An LSTM that reads letters and learns a vector for each word, by mean squared error and Adam.

    Args:
        width: H.
        batch: B.
        steps: T.
        bad_step: whose targets are NaN.
        gate: of the LSTM, the sigmoid if not given.
        plan: of its loops, the platform's if not given.
    """
    import jax
    import jax.numpy as jnp
    import optax

    from jaxrnn.rnn import cells, scan

    optimiser = optax.adam(peers.RATE)
    vectors = np.random.default_rng(1).normal(size=(peers.LETTERS, peers.SIZE)).astype(np.float32)

    def init() -> Tree:
        params = jax.tree.map(jnp.asarray, peers.initial_weights(peers.Case('lstm', batch, width)))
        return {'params': params, 'optimiser': optimiser.init(params)}

    def batch_at(step: int) -> Tree:
        letters = np.random.default_rng(step).integers(0, peers.LETTERS, (steps, batch), np.int32)
        targets = vectors[letters].mean(axis=0)
        return letters, targets * np.float32(np.nan) if step == bad_step else targets

    def step(state: Tree, batch: Tree) -> tuple[Tree, Tree]:
        letters, targets = batch

        def loss_of(params: Tree) -> Any:
            cell, weights = cells.lstm(gate or cells.SIGMOID), scan.Weights(**params['recurrent'])
            _, last = scan.run(cell, weights, letters, sequences=False, plan=plan)
            predicted = scan.project(params['output']['kernel'], params['output']['bias'], last.h)
            return jnp.mean(jnp.square(predicted - targets))

        loss, gradients = jax.value_and_grad(loss_of)(state['params'])
        updates, moments = optimiser.update(gradients, state['optimiser'], state['params'])
        return {'params': optax.apply_updates(state['params'], updates), 'optimiser': moments}, {'loss': loss}

    return Program(step, batch_at, init)


# Replay: the same bits, in the same process and in others.


def record(size: Size, directory: str) -> Iterator[Row]:
    """Trains, and replays in the same process from the first checkpoint after the start."""
    from jaxrnn.record import record

    made = program(size.hidden, size.batch, size.steps)
    every = size.trained // 3
    record(*made, directory, max_steps=size.trained, checkpoint_every=every)
    yield replayed(made, directory, every, size.trained)


def replay_again(size: Size, directory: str) -> Iterator[Row]:
    """Replays all of another process's run."""
    yield replayed(program(size.hidden, size.batch, size.steps), directory, 0, size.trained)


def replayed(made: Program, directory: str, start: int, stop: int) -> Row:
    """Whether steps of a run give the digests and the records that they gave."""
    from jaxrnn.bisect import replay, subject_of

    subject = subject_of(made.step, made.batch_at, directory, made.init, 1)
    replayer = replay.Replayer(subject)
    rows = replayer.replay(start, stop)
    recorded = {row['step']: row for row in subject.records}
    other = [row['step'] for row in rows if row['digest'] != recorded[row['step']]['digest']]
    outcome = replayer.outcome()
    return {
        'steps': len(rows),
        'digests_differ': len(other),
        'first_digest': other[0] if other else None,
        'bit_identical': outcome.bit_identical,
        'first_mismatch': outcome.first_mismatch,
        'losses': [recorded[0]['loss'], recorded[stop - 1]['loss']],
        'right': outcome.bit_identical and not other and len(rows) == stop - start,
    }


def replay(size: Size) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        asked, as_it_is = ('as asked for', DETERMINISTIC), ('without flags', '')
        same = yield from _replays(size, folder, 'record', [asked, as_it_is])
        others = yield from _replays(size, folder, 'replay_again', [asked, asked, as_it_is])
        # Is it the choice of kernels that differs by process?
        if same[asked] and not others[asked]:
            pinned = 'no autotuning either', f'{DETERMINISTIC} {NO_AUTOTUNING}'
            yield from _replays(size, folder, 'record', [pinned])
            yield from _replays(size, folder, 'replay_again', [pinned])


def _replays(size: Size, folder: str, task: str, settings: Sequence[tuple[str, str]]) -> Iterator[Row]:
    """Processes side by side. Gives back whether all of each setting are right."""
    started = [
        (pair, begin(task, pair[1], directory=str(Path(folder) / pair[0].replace(' ', '_'))))
        for pair in settings
    ]
    right: dict[tuple[str, str], bool] = {}
    for pair, process in started:
        for row in finish(process, task):
            right[pair] = right.get(pair, True) and bool(row.get('right'))
            # That bits differ without the flag is a fact, not a fault.
            judged = row.get('right') if pair[1] == DETERMINISTIC else None
            in_process = 'the same process' if task == 'record' else 'another process'
            yield {
                'setting': pair[0],
                'xla_flags': pair[1],
                'replayed_in': in_process,
                **row,
                'right': judged,
            }
    return right


# The debugger.


def bisect(size: Size) -> Iterator[Row]:
    """The README's fault: targets of one step are NaN."""
    import jaxrnn

    bad = 137 * size.trained // 300
    made = program(size.narrow, size.batch, size.steps, bad_step=bad)
    with tempfile.TemporaryDirectory() as folder:
        jaxrnn.record(*made, folder, max_steps=size.trained, checkpoint_every=size.trained // 3)
        diagnosis, _ = jaxrnn.bisect(made.step, made.batch_at, folder, like=made.init)
    found = diagnosis.symptom and diagnosis.symptom.kind
    yield {
        'planted': bad,
        'symptom': found,
        'first_bad_step': diagnosis.first_bad_step,
        'where': diagnosis.where and {name: str(value)[:200] for name, value in diagnosis.where.items()},
        'bit_identical': diagnosis.replay.bit_identical,
        'steps_replayed': diagnosis.replay.steps_replayed,
        'right': (found, diagnosis.first_bad_step) == ('nonfinite', bad) and diagnosis.replay.bit_identical,
    }


def trace(size: Size) -> Iterator[Row]:
    """A square root of a negative number, in the forget gate, at one time step, for one example."""
    import jax
    import jax.numpy as jnp

    from jaxrnn.rnn import cells, scan
    from jaxrnn.trace import first_bad

    def value(a: Any) -> Any:
        return jax.nn.sigmoid(a) * jnp.minimum(jnp.sqrt(1e3 - a), 1)

    gate = cells.Gate(value, cells.SIGMOID.slope)
    time_step, example, letter = size.steps // 3 + 1, 3, peers.LETTERS - 1
    for name, plan in {'accelerator': scan.ACCELERATOR, 'cpu': scan.CPU}.items():
        made = program(size.hidden, size.batch, size.steps, gate=gate, plan=plan)
        letters, targets = made.batch_at(0)
        letters = letters % letter  # nowhere else
        letters[time_step, example] = letter
        state = made.init()
        kernel = state['params']['recurrent']['kernel']
        state['params']['recurrent']['kernel'] = kernel.at[letter, size.hidden + 5].set(1e4)
        begun = time.perf_counter()
        finding = first_bad(made.step, state, (letters, targets)).finding
        seconds = time.perf_counter() - begun
        names = ('op', 'time_step', 'examples', 'layer', 'pass_', 'elements', 'code')
        told = {name: getattr(finding, name, None) for name in names}
        expected = {
            'op': 'sqrt',
            'time_step': time_step,
            'examples': (example,),
            'pass_': 'forward',
            'elements': 1,
        }
        right = all(told[name] == wanted for name, wanted in expected.items())
        yield {
            'plan': name,
            **told,
            'right': right and cells.FORGET in told['layer'],
            'seconds': round(seconds, 1),
        }


# Speed, launches, memory.


def throughput(size: Size, network: str) -> Iterator[Row]:
    """Rows of step_throughput.py, which checks losses and measures in turns."""
    command = [sys.executable, str(ROOT / 'benchmarks/step_throughput.py'), '--json']
    command += [f'--networks={network}', f'--batches={size.batches}', f'--hidden={size.hidden}']
    command += [f'--rounds={size.rounds}', f'--implementations={",".join(TIMED)}']
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        row = json.loads(line)
        why = row.get('left_out', '')
        if not row['implementation'].startswith('jaxrnn') or not why:
            yield {**row, 'right': None if why else True}
        elif why.startswith('refused, losses'):
            yield {**row, 'right': False}
        else:
            yield {**row, 'error': why}
    if process.wait() not in (common.HEALTHY, common.FAILED):  # the latter: some were left out
        yield {'error': f'step_throughput.py: exit code {process.returncode}'}


def accelerator_compile() -> Any:
    """The module, which turns the environment of a process that imports it to the CPU: JAX has begun by then."""
    import jax

    jax.devices()
    before = dict(os.environ)
    try:
        from benchmarks import accelerator_compile
    finally:
        os.environ.clear()
        os.environ.update(before)
    return accelerator_compile


def missing(name: str) -> str:
    """Why an implementation can't be run here, '' if it can."""
    import jax

    if importlib.util.find_spec(peers.PACKAGES[name]) is None:
        return f'{peers.PACKAGES[name]} is not installed'
    if name != 'cudnn':
        return ''
    if jax.default_backend() != 'gpu':
        return 'no GPU'
    return '' if importlib.util.find_spec('jax.experimental.rnn') else 'this jax has no jax.experimental.rnn'


def compiled_step(name: str, case: peers.Case) -> tuple[Any, Tree, Tree]:
    """The train step's executable, its state, which it consumes, and a batch."""
    import jax
    import jax.numpy as jnp
    import optax

    params, predict = peers.IN_JAX[name](case)
    optimiser = optax.adam(peers.RATE)
    params = jax.tree.map(jnp.array, params)
    state = params, optimiser.init(params)
    batch = jax.device_put(peers.examples(case, name in peers.TIME_MAJOR))
    step = accelerator_compile().make_step(predict, optimiser)
    return jax.jit(step, donate_argnums=0).lower(state, batch).compile(), state, batch


def of_each(names: Sequence[str], size: Size, batch: int, measure: Callable[..., Row]) -> Iterator[Row]:
    """A row for each implementation of an LSTM's step; what goes wrong with a peer is no fault of ours."""
    for name in names:
        case = peers.Case('lstm', batch, size.hidden)
        about = {'implementation': name, 'batch': batch}
        if why := missing(name):
            yield {**about, 'left_out': why}
            continue
        try:
            yield {**about, **measure(*compiled_step(name, case))}
        except Exception as problem:
            traceback.print_exc()
            told = f'{type(problem).__name__}: {problem}'[:500]
            yield {**about, 'error' if name == 'jaxrnn' else 'left_out': told}


def count_launches(size: Size) -> Iterator[Row]:
    yield from of_each(COUNTED, size, size.batch, _launches)


def _launches(compiled: Any, state: Tree, batch: Tree) -> Row:
    import jax

    for _ in range(3):
        state, loss = compiled(state, batch)
    jax.block_until_ready((state, loss))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(PROFILED):
                state, loss = compiled(state, batch)
            jax.block_until_ready((state, loss))
        profile = profiled(folder)
    module = accelerator_compile()
    try:
        parsed = module.parse(compiled.as_text())
        instructions = module.launches(parsed, parsed.entry)[0]
    except (LookupError, TypeError):  # a loop of unknown length
        instructions = None
    if profile['kernels']:
        source = 'profiler'
    elif jax.default_backend() == 'cpu':
        source = 'no device kernels'
    else:
        source = 'compiled program: the profiler saw no kernels'
    return {'counted_by': source, **profile, 'instructions': instructions}


API = re.compile(r'^(cu|cuda)(Launch\w*|GraphLaunch\w*|Memcpy\w*|Memset\w*)')
"""Calls of the driver that start something on the device."""


def profiled(folder: str) -> dict[str, Any]:
    """Of a profile of PROFILED steps, a step: kernels and copies on the device's streams, how long they took together,
    and the driver's calls that started them."""
    processes: dict[Any, str] = {}
    threads: dict[Any, str] = {}
    events: list[dict] = []
    for path in glob.glob(f'{folder}/plugins/profile/*/*.trace.json.gz'):
        with gzip.open(path) as file:
            found = json.load(file)['traceEvents']
        for event in found:
            match event.get('ph'), event.get('name'):
                case 'M', 'process_name':
                    processes[path, event['pid']] = event['args']['name']
                case 'M', 'thread_name':
                    threads[path, event['pid'], event['tid']] = event['args']['name']
                case 'X', _:
                    events.append({**event, 'path': path})
    kernels, copies, busy, calls, lines = 0, 0, 0.0, dict[str, int](), dict[str, int]()
    for event in events:
        process = processes.get((event['path'], event['pid']), '')
        thread = threads.get((event['path'], event['pid'], event['tid']), '')
        if process.startswith('/device:'):
            lines[f'{process} {thread}'] = lines.get(f'{process} {thread}', 0) + 1
        if process.startswith('/device:') and thread.startswith('Stream'):
            is_copy = event['name'].lower().startswith(('memcpy', 'memset'))
            kernels, copies = kernels + (not is_copy), copies + is_copy
            busy += event.get('dur', 0)
        elif match := API.match(event['name']):
            calls[match[0]] = calls.get(match[0], 0) + 1
    return {
        'kernels': kernels / PROFILED,
        'copies': copies / PROFILED,
        'busy_ms': round(1e-3 * busy / PROFILED, 4),
        'calls': {name: count / PROFILED for name, count in sorted(calls.items())},
        'events': len(events),
        'device_lines': lines,  # all of them, to check what was counted against
    }


def launches(size: Size) -> Iterator[Row]:
    """Twice: as it is, where kernels may be started as graphs, and without graphs."""
    settings = {'as it is': '', 'without graphs': NO_GRAPHS}
    started = {name: begin('count_launches', xla_flags) for name, xla_flags in settings.items()}
    for name, process in started.items():
        for row in finish(process, 'count_launches'):
            yield {'setting': name, 'xla_flags': settings[name], **row}


def hold(size: Size, name: str) -> Iterator[Row]:
    yield from of_each([name], size, size.large, _memory)


def _memory(compiled: Any, state: Tree, batch: Tree) -> Row:
    import jax

    for _ in range(3):
        state, loss = compiled(state, batch)
    jax.block_until_ready((state, loss))
    analysis, used = compiled.memory_analysis(), jax.devices()[0].memory_stats() or {}
    return {
        'peak_bytes': used.get('peak_bytes_in_use'),
        'temp_bytes': analysis and analysis.temp_size_in_bytes,
        'argument_bytes': analysis and analysis.argument_size_in_bytes,
    }


def memory(size: Size) -> Iterator[Row]:
    """A process each, as the peak is a process's; without autotuning, whose trials take memory, too."""
    for process in [begin('hold', NO_AUTOTUNING, name=name) for name in COUNTED]:
        for row in finish(process, 'hold'):
            yield {'xla_flags': NO_AUTOTUNING, **row}


# Parts and processes.


WHOLE = 8.0  # minutes for which the bounds of the parts are made


class Part(NamedTuple):
    """Of the check."""

    rows: Callable[[Size], Iterator[Row]]
    least: float  # seconds without which it isn't begun
    most: float  # seconds after which it is killed, where WHOLE minutes are the whole
    summary: Callable[[Sequence[Row]], list[str]]  # lines for the screen
    xla_flags: str = ''
    extra: bool = False  # whether it is done with what time is left


def _by(rows: Sequence[Row], *names: str) -> dict[tuple, list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return groups


def _say_parity(rows: Sequence[Row]) -> list[str]:
    lines = []
    for (precision, plan), found in _by(rows, 'precision', 'plan').items():
        worst = [max(row[name] or math.inf for row in found) for name in ('forward', 'gradients')]
        right = sum(row['right'] for row in found)
        lines.append(
            f'{precision}, {plan} plan: {right} of {len(found)} right, errors up to {worst[0]:.1e} forward, '
            f'{worst[1]:.1e} gradients'
        )
    return sorted(lines)


def _say_replay(rows: Sequence[Row]) -> list[str]:
    def told(row: Row) -> str:
        if 'error' in row:
            return row['error']
        if row['bit_identical'] and not row['digests_differ']:
            return f'{row["steps"]} steps bit-identical'
        return f'differs from step {row["first_mismatch"]} on ({row["digests_differ"]} of {row["steps"]} digests)'

    return [f'{row["setting"]}, in {row["replayed_in"]}: {told(row)}' for row in rows]


def _say_bisect(rows: Sequence[Row]) -> list[str]:
    return [
        f'planted at {row["planted"]}, found {row["symptom"]} at {row["first_bad_step"]}; '
        f'{row["steps_replayed"]} steps replayed, {"" if row["bit_identical"] else "NOT "}bit-identical'
        for row in rows
    ]


def _say_trace(rows: Sequence[Row]) -> list[str]:
    return [
        f'{row["plan"]} plan: {row["op"]}, time step {row["time_step"]}, example {row["examples"]}, {row["layer"]} '
        f'({row["seconds"]} s)'
        for row in rows
    ]


def _say_throughput(rows: Sequence[Row]) -> list[str]:
    timed = [row for row in rows if 'median_ms' in row]
    ours = {row['batch']: row['median_ms'] for row in timed if row['implementation'] == 'jaxrnn'}

    def told(row: Row) -> str:
        ratio = f' (x{row["median_ms"] / ours[row["batch"]]:.2f})' if row['batch'] in ours else ''
        return f'{row["batch"]}: {row["median_ms"]} ms{ratio}'

    lines = [
        f'{key[0]}: {", ".join(map(told, found))}' for key, found in _by(timed, 'implementation').items()
    ]
    return lines + _left_out(rows)


def _say_launches(rows: Sequence[Row]) -> list[str]:
    return [
        f'{row["setting"]}, {row["implementation"]}: {row["kernels"]:g} kernels and {row["copies"]:g} copies a step, '
        f'{row["busy_ms"]} ms busy; {row["instructions"]} in the program ({row["counted_by"]})'
        for row in rows
        if 'kernels' in row
    ] + _left_out(rows)


def _say_memory(rows: Sequence[Row]) -> list[str]:
    def mb(value: int | None) -> str:
        return '?' if value is None else f'{value / 1e6:.1f} MB'

    return [
        f'{row["implementation"]}, batch {row["batch"]}: peak {mb(row["peak_bytes"])}, '
        f'temporary {mb(row["temp_bytes"])}, arguments {mb(row["argument_bytes"])}'
        for row in rows
        if 'peak_bytes' in row
    ] + _left_out(rows)


def _left_out(rows: Sequence[Row]) -> list[str]:
    found = {
        f'{row["implementation"]}: {row["left_out"].splitlines()[0]}': None
        for row in rows
        if 'left_out' in row
    }
    return list(found)


PARTS = {
    'parity': Part(parity, 20, 110, _say_parity),
    'replay': Part(replay, 30, 170, _say_replay),
    'trace': Part(trace, 15, 80, _say_trace),
    'bisect': Part(bisect, 20, 80, _say_bisect, DETERMINISTIC),
    'throughput': Part(functools.partial(throughput, network='lstm'), 60, 210, _say_throughput),
    'launches': Part(launches, 30, 100, _say_launches),
    'throughput-gru': Part(
        functools.partial(throughput, network='gru'), 50, 150, _say_throughput, extra=True
    ),
    'memory': Part(memory, 20, 60, _say_memory, extra=True),
}

TASKS: dict[str, Callable[..., Iterator[Row]]] = {
    **{name: part.rows for name, part in PARTS.items()},
    'probe': probe,
    'record': record,
    'replay_again': replay_again,
    'count_launches': count_launches,
    'hold': hold,
}

DONE = {'done': True}

HANG = 'JAXRNN_CHECK_HANG'
"""Names a task that hangs: how the bounds are tested."""


def work(task: str, arguments: Mapping[str, Any]) -> int:
    """A process of the check: one line of JSON for each row."""
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what libraries print doesn't mix with answers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if os.environ.get(HANG) == task:
        time.sleep(3600)
    for row in itertools.chain(TASKS[task](REHEARSED if flags.FLAGS.rehearse else REAL, **arguments), [DONE]):
        print(json.dumps(row, allow_nan=False), file=answers, flush=True)
    return common.HEALTHY


def _end_with_parent() -> None:
    """Nothing is left running when the check itself is killed."""
    while os.read(0, 1):
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def begin(
    task: str, xla_flags: str = '', *, apart: bool = False, log: Any = None, **arguments: Any
) -> subprocess.Popen:
    """Starts a process; `apart`: at the head of a group, to be killed with all that it starts."""
    command = [sys.executable, str(Path(__file__).resolve()), f'--task={task}']
    command += [f'--arguments={json.dumps(arguments)}', f'--rehearse={str(flags.FLAGS.rehearse).lower()}']
    environ = {**os.environ, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
    environ['XLA_FLAGS'] = f'{environ.get("XLA_FLAGS", "")} {xla_flags}'.strip()
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'stderr': log}
    return subprocess.Popen(command, text=True, env=environ, start_new_session=apart, **pipes)


def finish(process: subprocess.Popen, task: str) -> list[Row]:
    """All rows of a process; one with an error where it didn't come to its end."""
    rows = [json.loads(line) for line in process.stdout]
    code = process.wait()
    process.stdin.close()
    if DONE in rows:
        return rows[: rows.index(DONE)]
    return [*rows, {'error': f'{task}: ended with exit code {code}'}]


class Outcome(NamedTuple):
    """How a part went."""

    status: str  # right, wrong, cut: right as far as it came; failed, timed out: nothing found; skipped
    seconds: float
    rows: list[Row]
    log: str  # end of standard error, where it isn't right


def bounded(task: str, xla_flags: str, seconds: float, on_row: Callable[[list[Row]], None]) -> Outcome:
    """Runs a process for so many seconds at most."""
    rows: list[Row] = []
    begun = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process, over = begin(task, xla_flags, apart=True, log=log), threading.Event()

        def read() -> None:
            for line in process.stdout:
                if over.is_set():
                    return
                rows.append(json.loads(line))
                on_row([row for row in rows if row != DONE])

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            reader.join(seconds)
            timed_out = reader.is_alive()
            if not timed_out:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(
            subprocess.TimeoutExpired
        ):  # a process inside of a driver may not die at once
            process.wait(10)
        reader.join(5)
        over.set()
        status = judge(list(rows), timed_out)
        log.seek(max(0, log.seek(0, os.SEEK_END) - 4000))
        tail = '' if status == 'right' else log.read().decode(errors='replace')
    return Outcome(status, round(time.monotonic() - begun, 1), [row for row in rows if row != DONE], tail)


def judge(rows: list[Row], timed_out: bool) -> str:
    """The status of a part whose process has ended."""
    if any(row.get('right') is False for row in rows):
        return 'wrong'
    if timed_out:
        return 'cut' if any(row.get('right') or 'kernels' in row for row in rows) else 'timed out'
    return 'failed' if DONE not in rows or any('error' in row for row in rows) else 'right'


def allowance(name: str, waiting: Sequence[str], left: float, minutes: float) -> float:
    """Seconds for a part, such that those waiting can begin that aren't extra; 0 where too few are left."""
    scale = min(1.0, minutes / WHOLE)
    kept = scale * sum(PARTS[other].least for other in waiting if not PARTS[other].extra)
    found = min(PARTS[name].most * minutes / WHOLE, left - kept)
    return found if found >= PARTS[name].least * scale else 0.0


# Results.


class Results:
    """The file, written whole after each row; parts of another machine, versions or sources are dropped."""

    def __init__(self, directory: Path, about: Mapping[str, Any], rehearsed: bool):
        machine = about['machine']
        name = re.sub(r'[^A-Za-z0-9]+', '-', f'{machine["platform"]}-{machine["device"]}').strip('-')
        self.path = directory / f'accelerator_check-{name}{"-rehearsal" if rehearsed else ""}.json'
        self.about = about
        self.parts: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            before = json.loads(self.path.read_text(encoding='utf-8'))
            if before['about'] == json.loads(json.dumps(about)):
                self.parts = dict(before['parts'])

    def has(self, name: str) -> bool:
        return self.parts.get(name, {}).get('status') in ('right', 'wrong')

    def put(self, name: str, **outcome: Any) -> None:
        self.parts[name] = outcome
        part = self.path.with_name(self.path.name + '.part')
        part.write_text(
            json.dumps({'about': self.about, 'parts': self.parts}, indent=1) + '\n', encoding='utf-8'
        )
        os.replace(part, self.path)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(names: Sequence[str], results: Results, deadline: float, minutes: float, again: bool) -> None:
    """The parts, one after the other."""
    names = [name for name in names if again or not results.has(name)]
    for place, name in enumerate(names):
        most = allowance(name, names[place + 1 :], deadline - time.monotonic(), minutes)
        if not most:
            say(f'{name}: skipped, no time is left')
            if not results.has(name):
                results.put(name, status='skipped', seconds=0, rows=[])
            continue
        say(f'{name}: at most {most:.0f} s')
        settings = {
            'xla_flags': PARTS[name].xla_flags,
            'at': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
        }
        put = functools.partial(results.put, name, **settings)
        outcome = bounded(
            name, PARTS[name].xla_flags, most, lambda rows, put=put: put(status='running', rows=rows)
        )
        put(**outcome._asdict())
        say(f'{name}: {outcome.status}, {outcome.seconds} s')
        if outcome.status in ('failed', 'timed out', 'wrong'):
            say(outcome.log[-1500:])


def show(names: Sequence[str], results: Results) -> None:
    console = Console(width=max(118, Console().width))
    table = Table('part', 's', 'found', box=None, title=f'{results.path.name}')
    for name in names:
        found = results.parts.get(name, {'status': 'skipped', 'seconds': 0, 'rows': []})
        try:
            lines = PARTS[name].summary(found['rows'])
        except (KeyError, TypeError):  # a row that says why there is none
            lines = [str(row) for row in found['rows']][:8]
        table.add_row(f'{name}\n{found["status"]}', str(found['seconds']), '\n'.join(lines))
    console.print(table)


def main(arguments: list[str]) -> int:
    del arguments
    values = flags.FLAGS
    if values.task:
        return work(values.task, json.loads(values.arguments))
    names = peers.chosen('only', PARTS)
    if values.minutes <= 0:
        raise UserError(f'--minutes: {values.minutes} found, a positive number expected')
    deadline = time.monotonic() + 60 * values.minutes
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    directory = Path(values.out)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(
            f'--out: {directory} can not be made ({problem.strerror}); choose another'
        ) from problem
    probed = bounded('probe', '', min(90, 30 * values.minutes), lambda rows: None)
    if probed.status != 'right':
        say(f'JAX does not start: {probed.status}\n{probed.log}')
        return common.FAILED
    results = Results(directory, probed.rows[0], values.rehearse)
    run(names, results, deadline, values.minutes, values.again)
    show(names, results)
    statuses = [results.parts[name]['status'] for name in names if name in results.parts]
    if 'wrong' in statuses:
        return common.DIVERGED
    return common.FAILED if {'failed', 'timed out'} & set(statuses) else common.HEALTHY


common.define('run', 'only', '', f'Parts, with commas between; none: {",".join(PARTS)}.')
common.define('run', 'minutes', WHOLE, 'Bound of the whole; what does not fit is skipped.')
common.define('run', 'out', str(ROOT / 'benchmarks/results'), 'Directory of the results.')
common.define('run', 'again', False, 'Do parts again that are in the results.')
common.define('run', 'rehearse', False, 'Everything small, to see that it runs at all.')
common.define('run', 'task', '', 'Used by the check itself: do this in this process.')
common.define('run', 'arguments', '{}', 'Used by the check itself: of the task.')

if __name__ == '__main__':
    common.main(main, __doc__)
