"""What the examples learn: words, letter by letter, and a vector for each."""

import jax
import numpy as np

WORDS = ['time', 'year', 'people', 'way', 'day', 'man', 'thing', 'woman', 'life', 'child', 'world', 'school']
ALPHABET, LONGEST, SIZE = 26, 6, 8  # V, T, E
VECTORS = np.random.default_rng(0).normal(size=(len(WORDS), SIZE)).astype(np.float32)


def batch_at(step):
    """8 words, a pure function of the step: letters and mask [T, B], targets [B, E]."""
    chosen = np.random.default_rng(step).choice(len(WORDS), 8)
    spelled = [[ord(letter) - ord('a') for letter in WORDS[k].ljust(LONGEST)] for k in chosen]
    letters = np.array(spelled, np.int32).T
    return {'letters': letters, 'mask': letters >= 0, 'targets': VECTORS[chosen]}


def train(init, step, batch_at, max_steps=301):
    """The plain loop. `jaxrnn.record` is one whose steps can be replayed."""
    state, step = init(), jax.jit(step)
    for number in range(max_steps):
        state, record = step(state, batch_at(number))
        if number % 50 == 0:
            print(f'step {number:3}  loss {record["loss"]:.5f}')
