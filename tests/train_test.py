"""What a configuration makes of data and network, beside what `presets_test` and `layers_test` hold against others."""

import jax.numpy as jnp
import numpy as np
import pytest
import small

from jaxrnn.types import UserError
from jaxrnn.words import models, train


def test_skipped_batches_are_replaced_by_the_one_before():
    configuration = small.configuration(skip_batches='3,5-7')
    batch_at = train.make_program(configuration, small.dataset()).batch_at
    plain = small.program().batch_at
    for step, taken in {2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 4, 8: 8}.items():
        np.testing.assert_array_equal(batch_at(step).index, plain(taken).index)


@pytest.mark.parametrize('text', ['x', '3-', '0', '7-5', '-3', '1,,2', '1-99999999', '1.5', '²'])
def test_skipped_batches_that_cannot_be_read(text):
    with pytest.raises(UserError, match='--skip_batches'):
        train.skipped(text)


def test_lengths_end_with_the_last_letter():
    letters = jnp.array([[0, 0, 0], [1, 2, 3], [2, 0, 1], [0, 0, 4], [0, 0, 0]])
    assert models.lengths_of(letters).tolist() == [3, 2, 4]


@pytest.mark.parametrize('network', small.NETWORKS)
def test_masked_padding_moves_nothing(network):
    """More padding gives the same vectors, which it doesn't without the mask."""
    letters = jnp.asarray(small.dataset().letters[:, :6])
    padded = jnp.pad(letters, ((0, 5), (0, 0)))
    for masked in (True, False):
        made = small.configuration(network).changed(mask_padding=masked)
        program = train.make_program(made, small.dataset())
        params = program.init().params
        same = np.allclose(program.predict(params, letters), program.predict(params, padded), atol=1e-6)
        assert same is masked


def test_gates_can_be_other_than_the_preset_s():
    letters = jnp.asarray(small.dataset().letters[:, :6])
    made = small.configuration(preset='keras1')
    programs = [
        train.make_program(config, small.dataset())
        for config in (made, made.changed(gate='hard_sigmoid'), made.changed(gate='sigmoid'))
    ]
    params = programs[0].init().params
    of_preset, hard, soft = (program.predict(params, letters) for program in programs)
    np.testing.assert_array_equal(of_preset, hard)
    assert not np.allclose(hard, soft, atol=1e-4)
