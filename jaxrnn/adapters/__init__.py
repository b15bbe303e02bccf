"""Doors for what people train with, each imported by who needs it: what a step changes, as a state, and back.

nnx      flax.nnx: objects that a step changes in place
"""
