"""Keras 3 on JAX: `model.fit` recorded by a callback, bisected and diagnosed.

    model.fit(x, y, callbacks=[jaxrnn.keras.Recorder('runs/question')])
    diagnosis, report = jaxrnn.keras.diagnose(model, 'runs/question')

recording   the callback                        variables   a model's variables as a state, by Keras' names
replaying   a recorded model's step again       metrics     Keras' running means, and those of one step
changes     what diagnose tries by itself       trainer     all that is private to Keras
"""

from jaxrnn.adapters.keras.recording import KerasRecorder as Recorder
from jaxrnn.adapters.keras.replaying import bisect, diagnose

__all__ = ['Recorder', 'bisect', 'diagnose']
