"""Loaders of other libraries, where they are installed: recorded without a seed, gone on with, bisected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorder_test import WEIGHTS, equal, start, train_step

import jaxrnn
from jaxrnn.record import drawn, kept_batches
from jaxrnn.types import UserError

BAD = 1234
"""The example of which a number is infinite."""


def examples(count=2000):
    x = np.random.default_rng(1).normal(size=(count, 8)).astype(np.float32)
    y = x @ WEIGHTS
    x[BAD, 2] = np.inf
    return x, y


def torch_loader():
    """Shuffled, without any seed."""
    torch = pytest.importorskip('torch')
    x, y = map(torch.from_numpy, examples())
    dataset = torch.utils.data.TensorDataset(x, y)
    return torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True, drop_last=True)


def test_a_shuffled_torch_loader_is_bisected_and_diagnosed(tmp_path):
    loader = torch_loader()
    losses = []
    with jaxrnn.Recorder(tmp_path, state := start(), checkpoint_every=20) as recorder:
        for x, y in loader:
            batch = {'x': jnp.asarray(x), 'y': jnp.asarray(y)}
            state, metrics = train_step(state, batch)
            recorder(state, metrics, batch)
            losses.append(float(metrics['loss']))
    kept = kept_batches.KeptBatches(tmp_path / 'batches')
    assert kept.steps() == [*range(125)]
    bad = next(k for k in range(125) if not np.isfinite(kept(k)['x']).all())
    diagnosis, report = jaxrnn.diagnose(train_step, None, tmp_path, like=start())
    assert (diagnosis.symptom.kind, diagnosis.first_bad_step) == ('nonfinite', bad)
    assert diagnosis.where['pass'] == 'data' and diagnosis.replay.bit_identical
    assert len(diagnosis.where['examples']) == 1
    if bad:  # the first batch of a run has none before it
        assert diagnosis.cause.kind == 'data'
    assert report.control.verdict == 'unchanged'


def test_torch_s_own_tensors_are_kept(tmp_path):
    x, y = next(iter(torch_loader()))
    writer = kept_batches.BatchWriter(tmp_path)
    writer.put(0, kept_batches.taken({'x': x, 'y': y}))
    writer.close()
    assert equal(kept_batches.KeptBatches(tmp_path)(0), {'x': np.asarray(x), 'y': np.asarray(y)})


def test_a_torn_batch_is_named(tmp_path):
    with jaxrnn.Recorder(tmp_path, state := start(), checkpoint_every=20) as recorder:
        for x, y in torch_loader():
            batch = {'x': jnp.asarray(x), 'y': jnp.asarray(y)}
            state, metrics = train_step(state, batch)
            recorder(state, metrics, batch)
    for path in (tmp_path / 'batches').iterdir():
        path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(
        UserError, match=r'no batch of step \d*[94] is kept; there are those of steps 0 to 18, 20 to 38, '
    ):
        jaxrnn.bisect(train_step, None, tmp_path, like=start(), verify=True)


def tf_data(seed=3):
    tf = pytest.importorskip('tensorflow')
    x, y = examples()
    return tf.data.Dataset.from_tensor_slices({'x': x, 'y': y}).shuffle(50, seed=seed).repeat().batch(16)


class Counting:
    """What draws of the iterators over a dataset were taken."""

    def __init__(self, places):
        self._places, self.taken = places, 0

    def __iter__(self):
        made, counted = iter(self._places), self

        class Iterator(type(made)):
            def __next__(self):
                counted.taken += 1
                return super().__next__()

        made.__class__ = Iterator
        return made


@pytest.mark.parametrize('placed', [True, False])
def test_tf_data_goes_on_where_it_was(tmp_path, placed, monkeypatch):
    """Also where its place is too large to be noted: then it is counted forward."""
    pytest.importorskip('tensorflow')
    from jaxrnn.adapters import tf_data as door

    if not placed:
        monkeypatch.setattr(drawn, 'MOST_PLACE', 100)
    for steps, expected in ((30, 30), (40, 10 if placed else 40)):
        source = Counting(door.Places(tf_data()))
        with jaxrnn.Recorder(tmp_path, start(), checkpoint_every=10) as recorder:
            state = recorder.state
            for batch in recorder.batches(source):
                state, metrics = train_step(state, batch)
                recorder(state, metrics)
                if recorder.step == steps:
                    break
        assert source.taken == expected
    kept, whole = kept_batches.KeptBatches(tmp_path / 'batches'), iter(door.Places(tf_data()))
    assert all(equal(kept(k), next(whole)) for k in range(40))
    batch_at = jaxrnn.Drawn(lambda: door.Places(tf_data()))
    assert equal(batch_at(35), kept(35)) and equal(batch_at(3), kept(3))


def test_a_place_of_another_dataset_is_refused():
    tf = pytest.importorskip('tensorflow')
    from jaxrnn.adapters import tf_data as door

    place = iter(door.Places(tf_data())).get_state()
    other = iter(door.Places(tf.data.Dataset.range(5)))
    for wrong in (place, b'none'):
        with pytest.raises(UserError, match='a place found that is none in this dataset'):
            other.set_state(wrong)


def grain_loader(seed=3):
    grain = pytest.importorskip('grain')
    x, y = examples()
    source = grain.MapDataset.source([{'x': a, 'y': b} for a, b in zip(x, y, strict=True)])
    return source.seed(seed).shuffle().batch(16).to_iter_dataset()


def test_a_grain_loader_goes_on_where_it_was(tmp_path):
    def go_on(stop):
        with jaxrnn.Recorder(tmp_path, start(), checkpoint_every=20) as recorder:
            state = recorder.state
            for batch in recorder.batches(grain_loader()):
                state, metrics = train_step(state, batch)
                recorder(state, metrics)
                if recorder.step == stop:
                    return

    go_on(30)
    go_on(999)
    kept, whole = kept_batches.KeptBatches(tmp_path / 'batches'), list(grain_loader())
    assert kept.steps() == [*range(125)] and all(equal(kept(k), whole[k]) for k in range(125))
    batch_at = jaxrnn.Drawn(grain_loader)
    assert all(equal(batch_at(k), whole[k]) for k in (100, 3, 124, 50))
    bad = next(k for k, batch in enumerate(whole) if not np.isfinite(batch['x']).all())
    for batches in (None, batch_at):
        diagnosis, _ = jaxrnn.bisect(train_step, batches, tmp_path, like=start())
        assert diagnosis.first_bad_step == bad and diagnosis.replay.bit_identical
    assert jax.tree.structure(kept(0)) == jax.tree.structure(whole[0])
