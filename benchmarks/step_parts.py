"""Where does the time of jaxrnn's train step go?

    python benchmarks/step_parts.py --networks=lstm,gru,stacked --batches=32,128

The step whole, its forward pass and its gradient, each compiled by itself; beside them its matrix products and Adam,
each alone at its shape and in its order: what a product in the loop waits for, it waits for here. What is left is
gates, stores, transposes and the loops. All take turns, one measurement a round.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)

import resource
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import flags
from jax import lax
from rich.console import Console
from rich.table import Table

from benchmarks import peers
from benchmarks.peers import RATE, STEPS, Case, cases, define_cases, examples, jax_step
from jaxrnn import environment
from jaxrnn.cli import common
from jaxrnn.optim import transforms
from jaxrnn.rnn import scan
from jaxrnn.types import Array, UserError

PRODUCT = 2048  # side of the matrices that measure the machine


class Product(NamedTuple):
    """[rows, inner] [inner, columns], `times` over; in a loop each needs the one before."""

    name: str
    backward: bool
    times: int
    rows: int
    inner: int
    columns: int

    @property
    def gflop(self) -> float:
        return 2e-9 * self.times * self.rows * self.inner * self.columns


def recurrence(name: str, gates: int, batch: int) -> Iterator[Product]:
    """The three products of a layer over time, in the plan's order."""
    width = int(name.split()[-1])
    gates *= width
    if scan.best_plan(batch).features_first:
        yield Product(f'{name}: R h', False, STEPS, gates, width, batch)
        yield Product(f"{name}: R' d", True, STEPS, width, gates, batch)
    else:
        yield Product(f'{name}: h R', False, STEPS, batch, width, gates)
        yield Product(f"{name}: d R'", True, STEPS, batch, gates, width)
    yield Product(f'{name}: gradient of R', True, 1, width, STEPS * batch, gates)


def outside(name: str, rows: int, inputs: int, outputs: int) -> Iterator[Product]:
    """The three products of a dense map of `rows` inputs."""
    yield Product(f'{name}: x W', False, 1, rows, inputs, outputs)
    yield Product(f"{name}: d W'", True, 1, rows, outputs, inputs)
    yield Product(f'{name}: gradient of W', True, 1, inputs, rows, outputs)


def products(case: Case) -> list[Product]:
    """Those of a network but for the last layers', which are below 1 % of a step."""
    width, rows = case.hidden, STEPS * case.batch
    if case.network != 'stacked':
        return [*recurrence(f'{case.network} {width}', 4 if case.network == 'lstm' else 3, case.batch)]
    return [
        *recurrence(f'lower lstm {width}', 4, case.batch),
        *outside(f'dense {width}', rows, width, width),
        *outside(f"upper lstm's input {width}", rows, width, 4 * width),
        *recurrence(f'upper lstm {width}', 4, case.batch),
    ]


def alone(product: Product, features_first: bool) -> Callable[[], Any]:
    """A program that makes this product and nothing else that takes long."""
    make = jax.nn.initializers.normal(product.inner**-0.5)
    a = make(jax.random.key(0), (product.rows, product.inner), jnp.float32)
    b = make(jax.random.key(1), (product.inner, product.columns), jnp.float32)
    fixed, moving = (a, b) if features_first else (b, a)

    def chain(fixed: Array, moving: Array) -> Array:
        if product.times == 1:
            return fixed @ moving if features_first else moving @ fixed

        def body(x: Array, _: None) -> tuple[Array, None]:
            y = fixed @ x if features_first else x @ fixed
            axis = 0 if features_first else 1
            copies = -(-x.shape[axis] // y.shape[axis])
            return lax.slice_in_dim(jnp.concatenate([y] * copies, axis), 0, x.shape[axis], axis=axis), None

        return lax.scan(body, moving, None, length=product.times)[0]

    compiled = jax.jit(chain)
    return lambda: jax.block_until_ready(compiled(fixed, moving))


def adam(params: Any) -> Callable[[], Any]:
    """The update alone, with donated state."""
    optimiser = optax.chain(
        transforms.scale_by_adam(0.9, 0.999, 1e-7, epsilon_hat=True), optax.scale_by_learning_rate(RATE)
    )

    def update(state: tuple, gradients: Any) -> tuple:
        params, opt_state = state
        updates, opt_state = optimiser.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    compiled = jax.jit(update, donate_argnums=0)
    gradients = jax.tree.map(jnp.zeros_like, params)
    kept = [(jax.tree.map(jnp.array, params), optimiser.init(params))]

    def advance() -> None:
        kept[0] = jax.block_until_ready(compiled(kept[0], gradients))

    return advance


def programs(case: Case) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    params, predict = peers.jaxrnn(case)
    params = jax.tree.map(jnp.array, params)
    letters, targets = map(jnp.asarray, examples(case, time_major=True))

    def loss_of(params: Any) -> Array:
        return jnp.mean(jnp.square(predict(params, letters) - targets))

    forward, gradient = jax.jit(loss_of), jax.jit(jax.value_and_grad(loss_of))
    step = jax_step(case, params, predict, time_major=True)
    square = jnp.ones((PRODUCT, PRODUCT))
    first = scan.best_plan(case.batch).features_first
    plain = jax.jit(jnp.matmul)
    return {
        'step': lambda: step.wait(step.advance()),
        'forward': lambda: jax.block_until_ready(forward(params)),
        'gradient': lambda: jax.block_until_ready(gradient(params)),
        'adam': adam(params),
        'sgemm': lambda: jax.block_until_ready(plain(square, square)),
        **{product.name: alone(product, first) for product in products(case)},
    }


class Measured(NamedTuple):
    seconds: dict[str, float]  # medians
    faults: float  # page faults of a step
    system_seconds: float  # of a step, all threads together


def measure(case: Case, rounds: int) -> Measured:
    """Times all programs in turn."""
    ready = programs(case)
    times: dict[str, list[float]] = {name: [] for name in ready}
    faults, system = [], []
    for turn in range(rounds + 2):
        for name, run in ready.items():
            before = resource.getrusage(resource.RUSAGE_SELF)
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            after = resource.getrusage(resource.RUSAGE_SELF)
            if turn < 2:  # compiles, and the first touch of memory
                continue
            times[name].append(elapsed)
            if name == 'step':
                faults.append(after.ru_minflt - before.ru_minflt)
                system.append(after.ru_stime - before.ru_stime)
    medians = {name: statistics.median(found) for name, found in times.items()}
    return Measured(medians, statistics.median(faults), statistics.median(system))


def rows_of(case: Case, measured: Measured) -> list[dict[str, Any]]:
    """The account: phases, the products in each, and the rest of each."""
    seconds = measured.seconds
    whole = seconds['step']
    rows = []

    def row(phase: str, part: str, of: float, gflop: float | None = None) -> None:
        rows.append(
            {
                'network': case.network,
                'batch': case.batch,
                'phase': phase,
                'part': part,
                'median_ms': round(1e3 * of, 1),
                'share': round(of / whole, 3),
                'gflops': round(gflop / of, 1) if gflop else None,
            }
        )

    phases = {'forward': seconds['forward'], 'backward': seconds['gradient'] - seconds['forward']}
    for phase, spent in phases.items():
        made = [product for product in products(case) if product.backward == (phase == 'backward')]
        for product in made:
            row(phase, product.name, seconds[product.name], product.gflop)
        row(phase, 'gates, stores, transposes, loop', spent - sum(seconds[product.name] for product in made))
    row('update', 'Adam', seconds['adam'])
    row('', 'not in any part', whole - seconds['gradient'] - seconds['adam'])
    row('', 'step', whole, sum(product.gflop for product in products(case)))
    row('', f'plain product of {PRODUCT} x {PRODUCT}', seconds['sgemm'], 2e-9 * PRODUCT**3)
    rows[-2] |= {'page_faults': measured.faults, 'system_ms': round(1e3 * measured.system_seconds, 1)}
    return rows


def main(arguments: list[str]) -> int:
    del arguments
    values = flags.FLAGS
    if values.rounds < 1:
        raise UserError(f'--rounds: {values.rounds} found, at least 1 expected')
    rows = []
    for case in cases():
        made = rows_of(case, measure(case, values.rounds))
        table = Table('phase', 'part', 'ms', 'share', 'GFLOP/s', title=f'{case.network}, batch {case.batch}')
        for row in made:
            rate = '' if row['gflops'] is None else f'{row["gflops"]:.0f}'
            table.add_row(row['phase'], row['part'], f'{row["median_ms"]:.1f}', f'{row["share"]:.0%}', rate)
        whole = made[-2]
        table.caption = (
            f'{whole["page_faults"]:.0f} page faults a step, {whole["system_ms"]} ms in the system'
        )
        Console(stderr=values.json).print(table)
        rows += made
    if values.json:
        common.print_json({'machine': environment.describe(), 'rounds': values.rounds, 'rows': rows})
    return common.HEALTHY


define_cases()
common.define('run', 'rounds', 9, 'Measurements of each.')
common.define('run', 'threads', 0, 'Processors to use; 0: all.')
common.define('run', 'json', False, 'Print the machine-readable result as the last line of standard output.')

if __name__ == '__main__':
    common.main(main, __doc__)
