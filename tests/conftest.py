"""Settings of every test: ranks are never promoted in silence, warnings are errors (setup.cfg)."""

import os

os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['KERAS_BACKEND'] = 'jax'
