"""What do XLA's compilers make of a train step for a GPU and a TPU that aren't here?

    python benchmarks/accelerator_compile.py --networks=lstm --targets=h100,v5e-2x2

Compiles the stock networks' train step (mean squared error, Adam) of jaxrnn and of JAX peers, and counts in the
scheduled program. No run time comes out: launches, memory and collectives do. Needs `pip install -e '.[compile]'`.
"""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)

# The compilers must neither look for their devices, nor for the cloud machine that the devices are in.
for _name, _value in {
    'JAX_PLATFORMS': 'cpu',
    'JAX_ENABLE_COMPILATION_CACHE': 'false',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}.items():
    os.environ[_name] = _value

import functools
import importlib.metadata
import importlib.util
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from benchmarks import peers
from jaxrnn import environment
from jaxrnn.cli import common
from jaxrnn.rnn import scan
from jaxrnn.types import Array, Tree, UserError

BATCH = 32

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 9 }
device_description_str: "sm_90"
"""
"""XLA's description of an H100 SXM (a GpuTargetConfigProto)."""


class Target(NamedTuple):
    """What is compiled for."""

    platform: str  # as jaxrnn's plans name it
    plugin: str  # the module that brings the compiler
    topology: Callable[[], Any]
    devices: int  # the batch is split between them


_h100 = functools.partial(
    topologies.get_topology_desc, topology_name='h100', platform='cuda', target_config=H100, topology='1x1x1'
)
_v5e = functools.partial(topologies.get_topology_desc, topology_name='v5e:2x2', platform='tpu')
TARGETS = {
    'h100': Target('gpu', 'jax_cuda12_plugin', _h100, 1),
    'v5e': Target('tpu', 'libtpu', _v5e, 1),
    'v5e-2x2': Target('tpu', 'libtpu', _v5e, 4),
}


IMPLEMENTATIONS = {
    'jaxrnn': 'jaxrnn',
    'nnx': 'flax',
    'linen': 'flax',
    'haiku': 'dm-haiku',
    'equinox': 'equinox',
}
"""Whose networks, and the distribution whose version a row states."""


# The step, compiled.


def make_step(predict: Callable[[Tree, Array], Array], optimiser: optax.GradientTransformation) -> Callable:
    """(params, opt_state), (letters, targets [B, E]) -> (params, opt_state), loss."""

    def step(state: Tree, batch: tuple[Array, Array]) -> tuple[Tree, Array]:
        params, opt_state = state
        letters, targets = batch

        def loss_of(params: Tree) -> Array:
            return jnp.mean(jnp.square(predict(params, letters) - targets))

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimiser.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return step


def compiled(name: str, case: peers.Case, target: Target, *, donate: bool) -> tuple[Any, float]:
    """The train step's executable, and how many seconds XLA took for it."""
    params, predict = peers.IN_JAX[name](case)
    devices = np.array(target.topology().devices[: target.devices])
    mesh = Mesh(devices, ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    same = NamedSharding(mesh, PartitionSpec())
    optimiser = optax.adam(1e-3)

    def like(leaf: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes))
        )

    state = jax.tree.map(like, jax.eval_shape(lambda: (params, optimiser.init(params))))
    time_major = name in peers.TIME_MAJOR
    letters, targets = peers.examples(case, time_major)
    batch = like(letters, *((None, 'data') if time_major else ('data', None))), like(targets, 'data', None)
    step = jax.jit(make_step(predict, optimiser), donate_argnums=0 if donate else (), out_shardings=same)
    with scan.compiled_for(target.platform):
        lowered = step.lower(state, batch)
    begun = time.perf_counter()
    return lowered.compile(), time.perf_counter() - begun


# The program, counted.

FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while'}
"""Instructions that launch nothing."""

COLLECTIVES = (
    'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute', 'collective-broadcast'
)  # fmt: skip


class Instruction(NamedTuple):
    opcode: str
    line: str


class Module(NamedTuple):
    """An HLO module: computation -> its instructions."""

    entry: str
    computations: Mapping[str, Sequence[Instruction]]


_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?[\w.\-]+ = (.*)$')
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r'(?:body|condition|calls|to_apply|\w+_computations)=(?:\{[^}]*\}|%?[\w.\-]+)')


def parse(text: str) -> Module:
    """Reads what `as_text` of an executable prints."""
    entry, name, found = '', '', {}
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            found[name] = []
            entry = name if head[1] else entry
        elif line.startswith('}'):
            name = ''
        elif name and (match := _INSTRUCTION.match(line)):
            found[name].append(Instruction(_opcode(match[1]), line))
    return Module(entry, found)


def _opcode(right: str) -> str:
    """Of `f32[2]{0} add(...)` or `(f32[], s32[]) while(...)`: what follows the type."""
    depth = 0
    for place, letter in enumerate(right):
        depth += (letter == '(') - (letter == ')')
        if depth == 0 and letter == ' ':
            return right[place:].split('(', 1)[0].strip()
    return ''


def called(module: Module, line: str) -> set[str]:
    """Every computation that an instruction names."""
    return set(re.findall(r'[\w.\-]+', ' '.join(_CALLED.findall(line)))) & module.computations.keys()


def launches(module: Module, name: str) -> tuple[int, list[list[int]]]:
    """Launches of a computation, and its loops: [trip count, launches in the body]."""
    count, loops = 0, []
    for opcode, line in module.computations[name]:
        count += opcode not in FREE
        if opcode == 'while':
            trips = _TRIPS.search(line)
            if not trips:
                raise LookupError(f'a loop without a known trip count: {line[:200]}')
            inside, nested = launches(module, re.search(r'body=%?([\w.\-]+)', line)[1])
            count += int(trips[1]) * inside
            loops += [[int(trips[1]), inside], *nested]
    return count, loops


def collectives(module: Module) -> dict[str, int]:
    """How many of each kind there are, and how many of them all lie in a loop."""
    looped: set[str] = set()
    waiting = [line for lines in module.computations.values() for opcode, line in lines if opcode == 'while']
    while waiting:
        new = called(module, waiting.pop()) - looped
        looped |= new
        waiting += [line for name in new for _, line in module.computations[name]]
    found, in_loops = dict.fromkeys(COLLECTIVES, 0), 0
    for name, lines in module.computations.items():
        for opcode, _ in lines:
            kind = opcode.removesuffix('-start')
            if kind in found:
                found[kind] += 1
                in_loops += name in looped
    return {**{kind: count for kind, count in found.items() if count}, 'in_loops': in_loops}


# The rows.


def versions(name: str) -> dict[str, str]:
    """Package -> version, the compilers' among them."""
    wanted = (IMPLEMENTATIONS[name], 'jax-cuda12-plugin', 'nvidia-cuda-nvcc-cu12', 'libtpu')
    found = environment.versions()
    for package in wanted:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def measure(name: str, network: str, target: str, unroll: int, steps: int) -> dict[str, Any]:
    """One row: an implementation's step of one network, compiled for one target."""
    case = peers.Case(network, BATCH, peers.WIDTHS[network], unroll, steps)
    plain, seconds = compiled(name, case, TARGETS[target], donate=False)
    donated, _ = compiled(name, case, TARGETS[target], donate=True)
    module = parse(plain.as_text())
    try:
        count, loops = launches(module, module.entry)
    except LookupError:  # XLA:TPU doesn't print them
        count, loops = None, None
    return {
        'implementation': name if unroll == 1 else f'{name} unroll={unroll}',
        'network': network,
        'target': target,
        'launches': count,
        'loops': loops,
        'temp_bytes': plain.memory_analysis().temp_size_in_bytes,
        'donated_temp_bytes': donated.memory_analysis().temp_size_in_bytes,
        'collectives': collectives(module),
        'parameters': len(jax.tree.leaves(peers.IN_JAX[name](case)[0])),
        'compile_seconds': round(seconds, 2),
        'matmul_precision': str(jax.config.values['jax_default_matmul_precision'] or 'default'),
        'versions': versions(name),
    }


def chosen(flag: str, known: Sequence[str]) -> list[str]:
    """The names that a flag lists. Raises UserError for one that isn't known."""
    names = flags.FLAGS[flag].value.split(',')
    for name in names:
        if name not in known:
            raise UserError(f'--{flag}: {name!r} found, some of {",".join(known)} expected')
    return names


def installed(names: Sequence[str], module_of: Callable[[str], str]) -> list[str]:
    """Those whose module is there; the others are named on standard error."""
    there = [name for name in names if importlib.util.find_spec(module_of(name))]
    for name in sorted(set(names) - set(there)):
        print(f'{name}: skipped, {module_of(name)} is not installed', file=sys.stderr)
    return there


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(
        'implementation',
        'network',
        'target',
        'launches',
        'loops',
        'temp MB',
        'donated',
        'collectives',
        box=None,
    )
    for row in rows:
        loops = row['loops'] and '+'.join(f'{trips}x{inside}' for trips, inside in row['loops'])
        exchanged = [f'{count} {kind}' for kind, count in row['collectives'].items() if count]
        table.add_row(
            *(row[name] for name in ('implementation', 'network', 'target')),
            *('?' if row['loops'] is None else str(shown) for shown in (row['launches'], loops or 'none')),
            *(f'{row[name] / 1e6:.1f}' for name in ('temp_bytes', 'donated_temp_bytes')),
            ', '.join(exchanged) or 'none',
        )
    Console().print(table)


def main(arguments: list[str]) -> int:
    del arguments
    names = installed(chosen('implementations', tuple(IMPLEMENTATIONS)), lambda name: peers.PACKAGES[name])
    targets = installed(chosen('targets', tuple(TARGETS)), lambda name: TARGETS[name].plugin)
    rows, steps = [], flags.FLAGS.steps
    if steps < 1:
        raise UserError(f'--steps: {steps} found, at least 1 expected')
    for target in targets:
        for network in chosen('networks', tuple(peers.WIDTHS)):
            for name in names:
                # jaxrnn chooses by itself, so it has one row.
                for unroll in (1, steps) if flags.FLAGS.unroll and name != 'jaxrnn' else (1,):
                    rows.append(measure(name, network, target, unroll, steps))
                    if flags.FLAGS.json:
                        common.print_json(rows[-1])
    if rows and not flags.FLAGS.json:
        show(rows)
    return common.HEALTHY


common.define('run', 'implementations', ','.join(IMPLEMENTATIONS), 'Whose step, with commas between.')
common.define('run', 'networks', ','.join(peers.WIDTHS), 'Which networks, with commas between.')
common.define('run', 'targets', ','.join(TARGETS), 'What to compile for, with commas between.')
common.define('run', 'steps', peers.STEPS, 'T; from 33 on jaxrnn keeps a loop.')
common.define('run', 'unroll', False, 'Compile the peers with their loops unrolled, too.')
common.define('run', 'json', False, 'Print one object a row, each on a line of standard output.')

if __name__ == '__main__':
    common.main(main, __doc__)
