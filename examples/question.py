"""The question's three networks in Keras, recorded by a callback and diagnosed.

    python examples/question.py --network=lstm --hidden=64 --steps=300
    python examples/question.py --keras1 --hidden=128 --learning_rate=0.006 --steps=2000  # collapses by itself

A word is spelled letter by letter, `$word$$$`, each letter one-hot; the network gives its vector. Without --hidden the
networks are as wide as the question has them. With --keras1 gates and initial weights are those of the Keras of 2016.
KERAS_BACKEND=jax is set where it isn't. The words are the most frequent ones of the Wikipedia articles that come with
gensim, with the vectors that Word2Vec finds in them.
"""

import argparse
import os

os.environ.setdefault('KERAS_BACKEND', 'jax')

import keras
import numpy as np

import jaxrnn
from jaxrnn.words import config, data

NETWORKS = {'lstm': 1024, 'gru': 1024, 'stacked': 512}
"""And how wide the question has them."""

BATCH = 32


def words(count=256, steps=20):
    """One-hot letters [N, T, V], and vectors [N, E]."""
    found = data.load(config.Data(num_words=count, pad_to=steps), seed=0)
    letters = np.eye(len(found.alphabet), dtype=np.float32)[found.letters.T]
    return letters, found.vectors


class PerGate(keras.initializers.Initializer):
    """Weights of a layer of several gates, each of which is drawn by itself, as in Keras 1."""

    def __init__(self, gates, *drawn):
        self.gates, self.drawn = gates, drawn  # each instance draws the same, whenever it is called

    def __call__(self, shape, dtype=None):
        size = shape[1] // self.gates
        return keras.ops.concatenate([draw((shape[0], size), dtype) for draw in self.drawn], axis=1)


def as_keras1(gates):
    """What Keras 1.0.7 did otherwise (keras/layers/recurrent.py, keras/initializations.py)."""
    draw = keras.initializers
    return {
        'recurrent_activation': lambda x: keras.ops.clip(0.2 * x + 0.5, 0, 1),
        'kernel_initializer': PerGate(gates, *(draw.GlorotUniform() for _ in range(gates))),
        'recurrent_initializer': PerGate(gates, *(draw.Orthogonal(1.1) for _ in range(gates))),
    }


def make(network='lstm', hidden=0, shape=(20, 27), size=300, learning_rate=1e-3, keras1=False):
    """A compiled model.

    Args:
        network: of NETWORKS.
        hidden: width; 0 for the question's.
        shape: of a word, (T, V).
        size: of a vector, E.
        learning_rate: of Adam, whose stock rate it is if nothing is said.
        keras1: whether it starts and gates as in the Keras of 2016.
    """
    hidden = hidden or NETWORKS[network]
    layers = keras.layers

    def lstm(**options):
        return layers.LSTM(hidden, **options, **(as_keras1(4) if keras1 else {}))

    model = keras.Sequential([keras.Input(shape)])
    if network == 'lstm':
        model.add(lstm())
    elif network == 'gru':
        model.add(layers.GRU(hidden, **({'reset_after': False, **as_keras1(3)} if keras1 else {})))
    else:
        model.add(lstm(return_sequences=True))
        model.add(layers.TimeDistributed(layers.Dense(hidden, activation='sigmoid')))
        model.add(lstm())
        model.add(layers.Dense(hidden // 2, activation='tanh'))
    model.add(layers.Dense(size))
    adam = keras.optimizers.Adam(learning_rate, epsilon=1e-8 if keras1 else 1e-7)
    model.compile(loss='mse', optimizer=adam, metrics=['accuracy'])
    return model


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--network', choices=NETWORKS, default='stacked')
    parser.add_argument('--hidden', type=int, default=0, help='width; 0: as wide as the question has it')
    parser.add_argument('--steps', type=int, default=2000, help='steps of the training')
    parser.add_argument(
        '--keras1', action='store_true', help='gates and initial weights of the Keras of 2016'
    )
    parser.add_argument('--learning_rate', type=float, default=1e-3, help='of Adam; else its stock rate')
    parser.add_argument('--words', type=int, default=256, help='words to learn, the most frequent ones')
    parser.add_argument('--seed', type=int, default=0, help='of the weights and the order of the words')
    parser.add_argument('--run_dir', default='runs/question')
    given = parser.parse_args(arguments)
    keras.utils.set_random_seed(given.seed)
    letters, vectors = words(given.words)
    model = make(
        given.network, given.hidden, letters.shape[1:], vectors.shape[1], given.learning_rate, given.keras1
    )
    epochs = -(-given.steps * BATCH // len(letters))
    model.fit(
        letters, vectors, batch_size=BATCH, epochs=epochs, verbose=2, callbacks=[jaxrnn.keras.Recorder(given.run_dir)]
    )  # fmt: skip
    diagnosis, _ = jaxrnn.keras.diagnose(model, given.run_dir)
    print(diagnosis)
    return diagnosis


if __name__ == '__main__':
    main()
