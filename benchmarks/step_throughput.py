"""How fast is a whole train step, beside other libraries' and beside the machine's own matrix product?

    python benchmarks/step_throughput.py --networks=lstm --batches=32,128 --rounds=15

Forward pass, mean squared error, gradient and Adam of the stock networks, in each library as its users write it, from
the same weights. A process for each implementation; all compile first, then take turns, one measurement a round. The
first losses must be those of the equations in peers.py, or there is no row.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)

import concurrent.futures
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks.peers import (
    IN_JAX,
    LETTERS,
    PACKAGES,
    RATE,
    SIZE,
    TIME_MAJOR,
    Case,
    Step,
    cases,
    chosen,
    compiled_step,
    define_cases,
    equations,
    examples,
    initial_weights,
    jax_step,
    reorder,
)
from jaxrnn.cli import common
from jaxrnn.types import UserError

CHECKED, LONG_ENOUGH, TOLERANCE = 3, 0.2, 1e-4  # the last: of a loss, relative
SIDES = {'cpu': 2048}  # of the matrices that measure the machine
LARGE_SIDE = 8192  # elsewhere: an accelerator is done with the smaller before the host has asked for the next

ON_TORCH = ('torch', 'keras-torch')
VERSIONED = ('jaxrnn', 'jax', 'jaxlib', 'flax', 'optax', 'dm-haiku', 'equinox', 'keras', 'torch', 'numpy')

TRAINED = {
    'jaxrnn': ('none', 'all'),
    'jaxrnn-reference': ('none', 'all'),
    'nnx': ('none', 'none'),
    'linen': ('none', 'candidate'),
    'haiku': ('none', 'before'),
    'equinox': ('none', 'candidate'),
    'keras-jax': ('none', 'all'),
    'keras-torch': ('none', 'all'),
    'torch': ('all', 'all'),
    'cudnn': ('all', 'all'),
}
"""Which recurrent biases, zero at first, a library trains beside the input's, in its LSTM and in its GRU. The same
function starts from the same loss, but a bias that is there twice learns twice as fast. 'before': Haiku's GRU resets
before the product, another function."""


def gflop(case: Case) -> float:
    """Of the matrix products of a train step, taken as three forward passes; letters cost none."""
    width = case.hidden
    if case.network == 'stacked':
        in_time, after = 2 * 4 * width**2 * 3 + 2 * width**2, width * (width // 2) + (width // 2) * SIZE
    else:
        in_time, after = 2 * (4 if case.network == 'lstm' else 3) * width**2, width * SIZE
    return 3e-9 * case.batch * (case.steps * in_time + 2 * after)


# PyTorch and Keras.


def torch_step(case: Case) -> Step:
    import torch
    from torch.nn import functional

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    layers = torch.nn.ModuleDict({name: _torch_layer(layer) for name, layer in initial_weights(case).items()})
    layers.to(device)
    optimiser = torch.optim.Adam(layers.parameters(), lr=RATE)
    letters, targets = (torch.from_numpy(part).to(device) for part in examples(case, True))
    letters = letters.long()

    def predict():
        xs = functional.one_hot(letters, LETTERS).float()
        if case.network != 'stacked':
            return layers['output'](layers['recurrent'](xs)[0][-1])
        between = torch.sigmoid(layers['between'](layers['lower'](xs)[0]))
        return layers['output'](torch.tanh(layers['narrow'](layers['upper'](between)[0][-1])))

    def advance():
        optimiser.zero_grad(set_to_none=True)
        loss = functional.mse_loss(predict(), targets)
        loss.backward()
        optimiser.step()
        return loss.detach()

    return Step(advance, lambda loss: loss.item(), 0.0, None)


def _torch_layer(layer: dict[str, np.ndarray]) -> Any:
    import torch

    inputs, outputs = layer['kernel'].shape
    if 'recurrent_kernel' not in layer:
        made = torch.nn.Linear(inputs, outputs)
        named = {'weight': layer['kernel'].T, 'bias': layer['bias']}
    else:
        width = layer['recurrent_kernel'].shape[0]
        gru = outputs == 3 * width
        order = (1, 0, 2) if gru else (0, 1, 2, 3)  # the GRU's: r, z, n
        made = (torch.nn.GRU if gru else torch.nn.LSTM)(inputs, width)
        named = {
            'weight_ih_l0': reorder(layer['kernel'], order).T,
            'weight_hh_l0': reorder(layer['recurrent_kernel'], order).T,
            'bias_ih_l0': reorder(layer['bias'], order),
            'bias_hh_l0': np.zeros_like(layer['bias']),
        }
    made.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(w)) for name, w in named.items()})
    return made


def keras_model(case: Case) -> Any:
    """Letters [B, T] -> vectors, compiled with Keras' Adam."""
    import keras

    layers, width = keras.layers, case.hidden
    letters = keras.Input((case.steps,), dtype='int32')
    xs = keras.ops.one_hot(letters, LETTERS)
    if case.network == 'stacked':
        xs = layers.LSTM(width, return_sequences=True, name='lower')(xs)
        xs = layers.TimeDistributed(layers.Dense(width, 'sigmoid'), name='between')(xs)
        xs = layers.LSTM(width, name='upper')(xs)
        xs = layers.Dense(width // 2, 'tanh', name='narrow')(xs)
    else:
        xs = (layers.GRU if case.network == 'gru' else layers.LSTM)(width, name='recurrent')(xs)
    model = keras.Model(letters, layers.Dense(SIZE, name='output')(xs))
    for name, layer in initial_weights(case).items():
        values = [layer[part] for part in ('kernel', 'recurrent_kernel', 'bias') if part in layer]
        if case.network == 'gru' and 'recurrent_kernel' in layer:
            values[2] = np.stack([values[2], np.zeros_like(values[2])])
        model.get_layer(name).set_weights(values)
    model.compile(keras.optimizers.Adam(RATE), 'mse')
    return model


def keras_jax_step(case: Case) -> Step:
    """Keras' stateless form: what its own train_step traces."""
    import jax
    import jax.numpy as jnp

    model = keras_model(case)
    model.optimizer.build(model.trainable_variables)

    def step(state, letters, targets):
        trained, others, optimiser = state

        def loss_of(trained):
            predictions, updated = model.stateless_call(trained, others, letters, training=True)
            return jnp.mean(jnp.square(predictions - targets)), updated

        (loss, updated), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained)
        trained, optimiser = model.optimizer.stateless_apply(optimiser, gradients, trained)
        return (trained, updated, optimiser), loss

    groups = model.trainable_variables, model.non_trainable_variables, model.optimizer.variables
    state = jax.tree.map(jnp.array, tuple([variable.value for variable in group] for group in groups))
    return compiled_step(step, state, examples(case, False))


def keras_torch_step(case: Case) -> Step:
    model, batch = keras_model(case), examples(case, False)
    return Step(lambda: model.train_on_batch(*batch), lambda loss: float(loss), 0.0, None)


def make_step(name: str, case: Case) -> Step:
    match name:
        case 'torch':
            return torch_step(case)
        case 'keras-jax':
            return keras_jax_step(case)
        case 'keras-torch':
            return keras_torch_step(case)
    return jax_step(case, *IN_JAX[name](case), time_major=name in TIME_MAJOR)


# A worker: reads one line of JSON, does what it says, writes one line. It sleeps while it waits.


class Worker:
    """Holds the prepared step; each method but the first is a request."""

    def __init__(self, name: str):
        self.name = name
        self.step: Step | None = None
        self.count = 1

    def start(self) -> dict[str, Any]:
        """Reports what this process runs on, or why it can't."""
        if self.name in ON_TORCH:
            import torch

            device = 'cuda' if torch.cuda.is_available() else 'cpu'
            return {'platform': device, 'device': device, 'threads': torch.get_num_threads()}
        import jax

        from jaxrnn import environment

        if self.name == 'cudnn' and jax.default_backend() != 'gpu':
            return {'missing': 'no GPU'}
        if self.name == 'cudnn' and importlib.util.find_spec('jax.experimental.rnn') is None:
            return {'missing': 'this jax has no jax.experimental.rnn'}
        device = jax.devices()[0]
        return {'platform': device.platform, 'device': device.device_kind, 'threads': environment.threads(),
                'machine': environment.describe()}  # fmt: skip

    def prepare(self, **case: Any) -> dict[str, Any]:
        """Builds a step, runs the first steps, and settles how many make a measurement."""
        self.step = None
        self.step = step = make_step(self.name, Case(**case))
        start = time.perf_counter()
        losses = [float(step.advance())]
        first = time.perf_counter() - start
        losses += [float(step.advance()) for _ in range(CHECKED - 1)]
        self.count = 1
        self.count = max(1, math.ceil(LONG_ENOUGH / self.measure()['seconds']))
        seconds = step.compile_seconds or first  # nothing is compiled ahead: what the first step takes
        return {'losses': losses, 'compile_seconds': seconds, 'temp_bytes': step.temp_bytes}

    def losses(self, biases: str, keras: bool, **case: Any) -> dict[str, Any]:
        """What the equations say that the first losses are."""
        made = Case(**case)
        step = jax_step(made, *equations(made, biases), time_major=True, keras=keras)
        return {'losses': [float(step.advance()) for _ in range(CHECKED)]}

    def measure(self) -> dict[str, Any]:
        """Mean seconds of a step over one measurement."""
        start = time.perf_counter()
        for _ in range(self.count):
            loss = self.step.advance()
        self.step.wait(loss)
        return {'seconds': (time.perf_counter() - start) / self.count}

    def drop(self) -> dict[str, Any]:
        self.step = None
        return {}

    def sgemm(self) -> dict[str, Any]:
        """The best GFLOP/s of a float32 product of squares."""
        product = self._product
        product()
        best = math.inf
        for _ in range(3):
            start = time.perf_counter()
            product()
            best = min(best, time.perf_counter() - start)
        return {'rate': 2e-9 * self._side**3 / best}

    @functools.cached_property
    def _side(self) -> int:
        return SIDES.get(self.start()['platform'], LARGE_SIDE)

    @functools.cached_property
    def _product(self) -> Callable[[], None]:
        square = np.random.default_rng(2).normal(size=(self._side, self._side)).astype(np.float32)
        if self.name in ON_TORCH:
            import torch

            on_device = torch.from_numpy(square).to('cuda' if torch.cuda.is_available() else 'cpu')

            def multiply() -> None:
                made = on_device @ on_device
                if made.is_cuda:
                    torch.cuda.synchronize()

            return multiply
        import jax

        on_device, compiled = jax.device_put(square), jax.jit(lambda a: a @ a)
        return lambda: jax.block_until_ready(compiled(on_device))


def work(name: str) -> int:
    """Answers requests until standard input ends."""
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what libraries print doesn't mix with answers
    worker = Worker(name)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop('do'))(**request)
        except Exception:
            answer = {'error': traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)
    return common.HEALTHY


# The parent.


class Peer:
    """A worker's process, seen from the parent."""

    def __init__(self, name: str, threads: int):
        settings = {'OMP_WAIT_POLICY': 'PASSIVE', 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
        if name.startswith('keras'):
            settings['KERAS_BACKEND'] = name.removeprefix('keras-')
        if name == 'equations':
            settings['JAX_PLATFORMS'] = 'cpu'
        command = [sys.executable, str(Path(__file__).resolve()), f'--worker={name}', f'--threads={threads}']
        command.append(f'--keep_memory={flags.FLAGS.keep_memory}')
        pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE}
        self.name = name
        self.process = subprocess.Popen(command, text=True, env={**os.environ, **settings}, **pipes)
        self.about: dict[str, Any] = {}

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        try:
            print(json.dumps({'do': do, **request}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ''
        return json.loads(line) if line else {'error': f'the process ended: {self.process.wait()}'}

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def leave_out(why: str, **what: Any) -> None:
    """Says which rows there won't be; under --json in a line of its own, too."""
    say(f'{" ".join(str(part) for part in what.values())}: {why}')
    if flags.FLAGS.json:
        common.print_json({**what, 'left_out': why})


def start_peers(names: list[str], threads: int) -> Iterator[Peer]:
    """Starts those that are installed, all at once."""
    started = []
    for name in names:
        package = (
            'torch' if name == 'keras-torch' and importlib.util.find_spec('torch') is None else PACKAGES[name]
        )
        if importlib.util.find_spec(package) is None:
            leave_out(f'skipped, {package} is not installed', implementation=name)
        else:
            started.append(Peer(name, threads))
    for peer in started:
        peer.about = peer.ask('start')
        if reason := peer.about.get('missing') or peer.about.get('error'):
            leave_out(f'skipped, {reason}', implementation=peer.name)
            peer.stop()
        else:
            yield peer


def biases_of(name: str, network: str) -> str:
    return TRAINED[name][network == 'gru']


def same_function(name: str, network: str) -> bool:
    return biases_of(name, network) != 'before'


def prepare(peers: list[Peer], oracle: Peer, case: Case) -> dict[Peer, dict[str, Any]]:
    """Compiles the case everywhere, one process after the other; returns those whose losses are right."""
    right = {}
    peers = [peer for peer in peers if has(peer, case)]
    with concurrent.futures.ThreadPoolExecutor(1) as waiting:
        expected = {
            (biases, keras): waiting.submit(
                oracle.ask, 'losses', biases=biases, keras=keras, **case._asdict()
            )
            for biases, keras in dict.fromkeys(variant(peer, case) for peer in peers)
        }
        if any(
            peer.about['platform'] == 'cpu' for peer in peers
        ):  # no compilation beside another computation
            concurrent.futures.wait(expected.values())
        for peer in peers:
            made = peer.ask('prepare', **case._asdict())
            wanted = expected[variant(peer, case)].result()
            row = {'implementation': peer.name, 'network': case.network, 'batch': case.batch}
            if problem := made.get('error') or wanted.get('error'):
                leave_out(f'refused\n{problem}', **row)
            elif not np.allclose(made['losses'], wanted['losses'], rtol=TOLERANCE, atol=0):
                leave_out(f'refused, losses {made["losses"]} found, {wanted["losses"]} expected', **row)
            else:
                right[peer] = made
                continue
            peer.ask('drop')
    return right


def has(peer: Peer, case: Case) -> bool:
    return peer.name != 'cudnn' or case.network != 'gru'


def variant(peer: Peer, case: Case) -> tuple[str, bool]:
    """Which form of the equations a peer's losses are those of: recurrent biases, Keras' Adam."""
    return biases_of(peer.name, case.network), peer.name.startswith('keras')


def measure(peers: list[Peer], meters: list[Peer], rounds: int) -> tuple[dict[str, list], dict[str, list]]:
    """Takes turns: seconds of a step for each implementation, and rates of the plain product."""
    times: dict[str, list[float]] = {peer.name: [] for peer in peers}
    rates: dict[str, list[float]] = {peer.name: [] for peer in meters}
    for _ in range(rounds):
        for peer in meters:
            rates[peer.name].append(peer.ask('sgemm')['rate'])
        for peer in peers:
            times[peer.name].append(peer.ask('measure')['seconds'])
    return times, rates


def ratios(name: str, case: Case, medians: dict[str, float]) -> dict[str, float | None]:
    """How many times as long the others take."""
    others = [
        median
        for other, median in medians.items()
        if other != 'torch' and other not in ('keras-torch', 'jaxrnn', 'jaxrnn-reference')
        and same_function(other, case.network)
    ]  # fmt: skip
    return {
        'ratio_to_best_jax_peer': round(min(others) / medians[name], 3) if others else None,
        'ratio_to_torch': round(medians['torch'] / medians[name], 3) if 'torch' in medians else None,
    }


def rows_of(case: Case, right: dict[Peer, dict], times: dict, rates: dict) -> list[dict[str, Any]]:
    """One row for each implementation of a case."""
    sgemm = max(statistics.median(found) for found in rates.values())
    medians = {name: statistics.median(found) for name, found in times.items()}
    rows = []
    for peer, made in right.items():
        low, high = np.percentile(times[peer.name], [25, 75])
        rate = gflop(case) / medians[peer.name]
        rows.append({
            'implementation': peer.name,
            **case._asdict(),
            'median_ms': round(1e3 * medians[peer.name], 3),
            'spread_ms': round(1e3 * (high - low), 3),
            'min_ms': round(1e3 * min(times[peer.name]), 3),
            'gflops': round(rate, 2),
            'fraction_of_sgemm': round(rate / sgemm, 4),
            'sgemm_gflops': {name: round(statistics.median(found), 1) for name, found in rates.items()},
            'temp_bytes': made['temp_bytes'],
            'compile_seconds': round(made['compile_seconds'], 2),
            **ratios(peer.name, case, medians),
            'same_function': same_function(peer.name, case.network),
            'losses': made['losses'],
            'threads': peer.about['threads'],
            'device': peer.about['device'],
        })  # fmt: skip
    return rows


def surroundings(peers: list[Peer], oracle: Peer) -> dict[str, Any]:
    """The machine and the versions, for every row."""
    described = next(
        (peer.about['machine'] for peer in peers if 'machine' in peer.about), oracle.about['machine']
    )
    versions = {}
    for name in VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    machine = {'processor': described['processor'], 'cores': os.cpu_count(), 'device': described['device']}
    return {'matmul_precision': described['matmul_precision'], 'machine': machine, 'versions': versions}


SHOWN = {
    'network': 'network',
    'batch': 'batch',
    'median_ms': 'ms',
    'spread_ms': 'spread',
    'gflops': 'GF/s',
    'fraction_of_sgemm': 'of sgemm',
    'ratio_to_best_jax_peer': 'x best JAX',
    'ratio_to_torch': 'x torch',
}
"""Column of a row -> its heading; all the others are under --json."""


def show(rows: list[dict[str, Any]], to_stderr: bool) -> None:
    table = Table('implementation', *SHOWN.values(), box=None)
    for row in rows:
        note = '' if row['same_function'] else ' (another function)'
        table.add_row(row['implementation'] + note, *(str(row[name]) for name in SHOWN))
    Console(stderr=to_stderr).print(table)


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """A panel for each network: share of the plain product's rate over the batch size."""
    import matplotlib

    matplotlib.use('agg')
    from matplotlib import pyplot

    networks = list(dict.fromkeys(row['network'] for row in rows))
    names = list(dict.fromkeys(row['implementation'] for row in rows))
    figure, panels = pyplot.subplots(
        1, len(networks), figsize=(5 * len(networks), 4), sharey=True, squeeze=False
    )
    for network, panel in zip(networks, panels[0], strict=True):
        for name in names:
            found = [row for row in rows if (row['network'], row['implementation']) == (network, name)]
            shares = [100 * row['fraction_of_sgemm'] for row in found]
            width = 2.5 if name == 'jaxrnn' else 1.2
            panel.plot([row['batch'] for row in found], shares, 'o-', label=name, linewidth=width)
        batches = sorted({row['batch'] for row in rows})
        panel.set(title=network, xlabel='words in a batch', xscale='log')
        panel.set_xticks(batches, [str(batch) for batch in batches])
        panel.set_xticks([], minor=True)
    panels[0][0].set_ylabel("train step's rate, % of a plain product's")
    panels[0][-1].legend(fontsize='small', loc='upper left', bbox_to_anchor=(1.02, 1))
    figure.savefig(path, bbox_inches='tight', dpi=150)


def main(arguments: list[str]) -> int:
    del arguments
    values = flags.FLAGS
    if values.worker:
        return work(values.worker)
    if values.rounds < 1:
        raise UserError(f'--rounds: {values.rounds} found, at least 1 expected')
    wanted, names = cases(), chosen('implementations', PACKAGES)
    oracle = Peer('equations', values.threads)
    oracle.about = oracle.ask('start')
    peers = list(start_peers(names, values.threads))
    rows: list[dict[str, Any]] = []
    try:
        for found in compare(peers, oracle, wanted, values.rounds):
            rows += found
            if values.json:
                for row in found:
                    common.print_json(row)
    finally:
        for peer in (*peers, oracle):
            peer.stop()
    show(rows, values.json)
    if values.plot:
        plot(rows, values.plot)
    expected = sum(has(peer, case) for peer in peers for case in wanted)
    return common.HEALTHY if len(rows) == expected else common.FAILED


def compare(
    peers: list[Peer], oracle: Peer, wanted: Sequence[Case], rounds: int
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each case."""
    groups = [[p for p in peers if (p.name in ON_TORCH) is on_torch] for on_torch in (False, True)]
    meters = [group[0] for group in groups if group]
    everywhere = surroundings(peers, oracle)
    for case in wanted:
        say(f'{case.network}, batch {case.batch}')
        right = prepare(peers, oracle, case)
        if right:
            found = rows_of(case, right, *measure(list(right), meters, rounds))
            yield [{**row, **everywhere} for row in found]
        for peer in right:
            peer.ask('drop')


define_cases()
common.define('run', 'implementations', '', f'As jaxrnn,torch; none: all of {",".join(PACKAGES)}.')
common.define('run', 'rounds', 15, 'Measurements of each.')
common.define('run', 'threads', 0, 'Processors to use; 0: all.')
common.define('run', 'keep_memory', False, 'Let every process keep freed memory, as the scripts do.')
common.define('run', 'plot', '', 'Draw the comparison into this file.')
common.define('run', 'json', False, 'Print each row as a line of JSON on standard output, when it is there.')
common.define('run', 'worker', '', 'Used by the benchmark itself: serve this implementation.')

if __name__ == '__main__':
    common.main(main, __doc__)
