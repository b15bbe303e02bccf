"""The recurrence: LSTM and GRU cells over time, with a backward pass written by hand. Needs JAX and Flax alone.

cells     the equations, initial weights and presets       scan      a cell over time, forward and back
layers    the same as flax.nnx modules                     probe     what a layer did in one pass
"""
