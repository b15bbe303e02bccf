"""The question's three networks in Keras, recorded by a callback and diagnosed.

    python examples/question.py --network=lstm --hidden=64 --steps=300

A word is spelled letter by letter, `$word$$$`, each letter one-hot; the network gives its vector. Without --hidden the
networks are as wide as the question has them. KERAS_BACKEND=jax is set where it isn't. The words are the most
frequent ones of the Wikipedia articles that come with gensim, with the vectors that Word2Vec finds in them.
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


def make(network='lstm', hidden=0, shape=(20, 27), size=300):
    """A compiled model.

    Args:
        network: of NETWORKS.
        hidden: width; 0 for the question's.
        shape: of a word, (T, V).
        size: of a vector, E.
    """
    hidden = hidden or NETWORKS[network]
    layers = keras.layers
    model = keras.Sequential([keras.Input(shape)])
    if network == 'lstm':
        model.add(layers.LSTM(hidden))
    elif network == 'gru':
        model.add(layers.GRU(hidden))
    else:
        model.add(layers.LSTM(hidden, return_sequences=True))
        model.add(layers.TimeDistributed(layers.Dense(hidden, activation='sigmoid')))
        model.add(layers.LSTM(hidden))
        model.add(layers.Dense(hidden // 2, activation='tanh'))
    model.add(layers.Dense(size))
    model.compile(loss='mse', optimizer='adam', metrics=['accuracy'])
    return model


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--network', choices=NETWORKS, default='stacked')
    parser.add_argument('--hidden', type=int, default=0, help='width; 0: as wide as the question has it')
    parser.add_argument('--steps', type=int, default=2000, help='steps of the training')
    parser.add_argument('--run_dir', default='runs/question')
    given = parser.parse_args(arguments)
    letters, vectors = words()
    model = make(given.network, given.hidden, letters.shape[1:], vectors.shape[1])
    epochs = -(-given.steps * BATCH // len(letters))
    model.fit(
        letters, vectors, batch_size=BATCH, epochs=epochs, verbose=2, callbacks=[jaxrnn.keras.Recorder(given.run_dir)]
    )  # fmt: skip
    diagnosis, _ = jaxrnn.keras.diagnose(model, given.run_dir)
    print(diagnosis)
    return diagnosis


if __name__ == '__main__':
    main()
