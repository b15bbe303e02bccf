"""The question's networks: a word, letter by letter, to its vector. The first user of all the other rooms.

config       what a run is made from               run             a run trained, and opened again
data/        words, vectors, batches               investigation   a run bisected, inspected, diagnosed
models       the networks                          remedies        changes of a configuration, to be tried
optimisers   the optax chain of a configuration    suspects        which of them are tried on a run
train        the train step, and evaluation        fresh_runs      remedies trained with from the start
signals      what a run records as a warning       checks          the seven checks of the answer
"""
