"""A bit flips in a saved array: who notices?

    python benchmarks/peers_flips.py --flips=500

The same state of 1 MB, saved by orbax, PyTorch, safetensors, NumPy and jaxrnn, each as its documentation shows. One
random bit of the file that holds the arrays is flipped, and the state is loaded again: refused, the same, or another
state without a word. Needs torch and safetensors (the extra `bench`).
"""

import collections
import json
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
import torch
from absl import flags

from jaxrnn.cli import common
from jaxrnn.record import checkpoint, loop


class Library(NamedTuple):
    """How a state is saved to a folder, and loaded from it."""

    save: Callable[[Path, dict[str, np.ndarray]], Any]
    load: Callable[[Path], dict[str, np.ndarray]]


def _orbax_save(folder: Path, state: dict[str, np.ndarray]) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / 'state', state)


def _orbax_load(folder: Path) -> dict[str, np.ndarray]:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / 'state')


def _torch_load(folder: Path) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in torch.load(folder / 'state.pt').items()}


def _jaxrnn_save(folder: Path, state: dict[str, np.ndarray]) -> None:
    writer = checkpoint.Writer(folder, keep_latest=1, keep_every=1)
    writer.save(1, state, {'step': 1, 'state': loop.state_digest(state)})
    writer.close()


def _jaxrnn_load(folder: Path) -> dict[str, np.ndarray]:
    saved = checkpoint.Checkpoints(folder)
    state = saved.restore(1)
    checkpoint.check_digest(saved, 1, state)
    return state


LIBRARIES = {
    'orbax': Library(_orbax_save, _orbax_load),
    'torch.save': Library(
        lambda folder, state: torch.save({n: torch.tensor(v) for n, v in state.items()}, folder / 'state.pt'),
        _torch_load,
    ),
    'safetensors': Library(
        lambda folder, state: safetensors.numpy.save_file(state, folder / 'state.safetensors'),
        lambda folder: safetensors.numpy.load_file(folder / 'state.safetensors'),
    ),
    'numpy.savez': Library(
        lambda folder, state: np.savez(folder / 'state.npz', **state),
        lambda folder: dict(np.load(folder / 'state.npz')),
    ),
    'jaxrnn': Library(_jaxrnn_save, _jaxrnn_load),
}


def one(library: Library, folder: Path, state: dict[str, np.ndarray], draw: np.random.Generator) -> str:
    """What becomes of one flip in the largest file."""
    path = max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
    place, bit = int(draw.integers(0, path.stat().st_size)), int(draw.integers(0, 8))
    with open(path, 'r+b') as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))
    try:
        found = library.load(folder)
        same = found.keys() == state.keys() and all(
            np.asarray(found[name]).tobytes() == state[name].tobytes() for name in state
        )
        return 'the same' if same else 'another state'
    except Exception:
        return 'refused'
    finally:
        with open(path, 'r+b') as file:
            file.seek(place)
            file.write(bytes([byte]))


def main(arguments: list[str]) -> int:
    del arguments
    logging.disable()
    draw = np.random.default_rng(0)
    state = {name: draw.standard_normal((256, 256)).astype(np.float32) for name in 'abcd'}
    for name, library in LIBRARIES.items():
        with tempfile.TemporaryDirectory() as directory:
            library.save(Path(directory), state)
            counts = collections.Counter(
                one(library, Path(directory), state, draw) for _ in range(flags.FLAGS.flips)
            )
        print(json.dumps({'library': name, **counts}))
    print(
        {
            'orbax': ocp.__version__,
            'torch': torch.__version__,
            'numpy': np.__version__,
            'jax': jax.__version__,
        }
    )
    return common.HEALTHY


flags.DEFINE_integer('flips', 500, 'Of each library.', lower_bound=1)

if __name__ == '__main__':
    common.main(main, __doc__)
