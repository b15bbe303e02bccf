"""What optax lacks, and what an Adam step says of itself. Needs JAX and optax alone.

transforms   gradient transformations: Adam variants, clipping, guard, caps
curvature    sharpness of the loss, as Adam feels it
signals      early-warning signals of an Adam step
"""
