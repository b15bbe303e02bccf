"""The examples: they learn, they compute what their libraries do, and the debugger takes them."""

import functools
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from flax import nnx
from tolerance import assert_close

import jaxrnn
from jaxrnn.rnn import scan

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(
    path.stem for path in (ROOT / 'examples').glob('*.py') if path.stem not in ('words', 'question')
)
BAD = 17


@pytest.fixture(params=EXAMPLES)
def example(request, monkeypatch) -> Iterator[ModuleType]:
    # haiku's own Orthogonal promotes ranks
    with jax.numpy_rank_promotion('allow' if request.param == 'haiku_module' else 'raise'):
        yield load('examples', request.param, monkeypatch)


def load(folder: str, name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / folder)
    return importlib.import_module(name)


def test_there_is_one_for_each_library():
    assert EXAMPLES == ['equinox_module', 'haiku_module', 'linen_module', 'nnx_module', 'plain']


def test_it_learns(example, capsys):
    example.main()
    losses = [float(loss) for loss in re.findall(r'loss (\S+)', capsys.readouterr().out)]
    assert len(losses) == 7 and losses[-1] < losses[0] / 100


def test_the_debugger_names_its_step(example, tmp_path):
    """One target of one batch is NaN."""

    def batch_at(step):
        batch = example.batch_at(step)
        if step == BAD:
            batch['targets'][2, 3] = np.nan
        return batch

    jaxrnn.record(example.step, batch_at, example.init, tmp_path, max_steps=30, checkpoint_every=10)
    diagnosis, _ = jaxrnn.bisect(example.step, batch_at, tmp_path, like=example.init)
    assert (diagnosis.symptom.kind, diagnosis.first_bad_step) == ('nonfinite', BAD)
    assert diagnosis.replay.bit_identical and diagnosis.replay.steps_replayed == BAD % 10 + 1


# The modules with given weights: layer -> name -> array, as `peers.initial_weights` has them, of some sizes V, H, E.


def in_plain(plain: ModuleType, weights: dict, sizes: tuple[int, int, int]) -> Callable:
    params = {'gru': scan.Weights(**weights['recurrent']), 'output': weights['output']['kernel']}
    return lambda letters, mask: plain.predict(params, letters, mask) + weights['output']['bias']


def in_linen(example: ModuleType, weights: dict, sizes: tuple[int, int, int]) -> Callable:
    params = {'lstm': weights['recurrent'], 'output': weights['output']}
    return functools.partial(example.Network(*sizes).apply, {'params': params})


def in_haiku(example: ModuleType, weights: dict, sizes: tuple[int, int, int]) -> Callable:
    import haiku

    named = dict(zip(('alphabet', 'width', 'size'), sizes, strict=True))
    network = haiku.transform(functools.partial(example.network, **named))
    output = {'w': weights['output']['kernel'], 'b': weights['output']['bias']}
    params = {'lstm': weights['recurrent'], 'output': output}
    return functools.partial(haiku.without_apply_rng(network).apply, params)


def in_equinox(example: ModuleType, weights: dict, sizes: tuple[int, int, int]) -> Callable:
    import equinox

    def leaves(network):
        return network.lstm.weights, network.output.weight, network.output.bias

    output = weights['output']
    given = scan.Weights(**weights['recurrent']), output['kernel'].T, output['bias']
    return equinox.tree_at(leaves, example.Network(*sizes, key=jax.random.key(0)), given)


def in_nnx(example: ModuleType, weights: dict, sizes: tuple[int, int, int]) -> Callable:
    network = example.Network(*sizes, rngs=nnx.Rngs(0))
    nnx.update(network, {'lstm': weights['recurrent'], 'output': weights['output']})
    return lambda letters, mask: network(letters, mask.sum(axis=0))


FILLED = {
    'plain': in_plain,
    'linen_module': in_linen,
    'haiku_module': in_haiku,
    'equinox_module': in_equinox,
    'nnx_module': in_nnx,
}


def test_it_computes_what_its_library_does(example, monkeypatch):
    """The library's own LSTM (plain: the equations of the GRU), run over each word's letters alone."""
    peers = load('benchmarks', 'peers', monkeypatch)
    name = example.__name__.removesuffix('_module')
    lengths = np.array([20, 1, 7, 20, 7])
    case = peers.Case('gru' if name == 'plain' else 'lstm', batch=len(lengths), hidden=12)
    sizes, weights = (peers.LETTERS, case.hidden, peers.SIZE), peers.initial_weights(case)
    params, theirs = peers.equations(case, 'all') if name == 'plain' else peers.IN_JAX[name](case)
    if name == 'plain':
        weights['recurrent']['recurrent_bias'] = np.linspace(-1, 1, 3 * case.hidden, dtype=np.float32)
        params = weights
    letters, _ = peers.examples(case, time_major=True)
    mask = np.arange(len(letters))[:, None] < lengths
    with jax.numpy_rank_promotion('allow'):
        found = FILLED[example.__name__](example, weights, sizes)(letters, mask)
        for length in set(lengths):
            alone = letters[:length]
            expected = theirs(params, alone if name in (*peers.TIME_MAJOR, 'plain') else alone.T)
            assert_close(found[lengths == length], expected[lengths == length], 'float32 forward')
