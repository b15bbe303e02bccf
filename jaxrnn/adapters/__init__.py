"""Doors for what people train with. None is imported unless it is used.

nnx      flax.nnx: objects that a step changes in place, as a state, and back
keras    model.fit on JAX: a callback that records, and what bisects and diagnoses its runs
tf_data  tf.data: iterators that know their place, so that a run goes on there
"""
