"""Runs in which nothing is wrong, and which are seen to be healthy: by their losses, without the debugger."""

import jax.numpy as jnp
import numpy as np

from benchmarks.foreign import twin
from benchmarks.foreign.common import Program, Setting, constant
from benchmarks.foreign.planting import HEALTHY, Planted

RELAPSE = 4.0
"""No mean of 25 steps is so many times the best before it."""

LEAP = 15.0
"""No loss is so many times the median of the steps around it."""

TRIES = 12


def cosine(steps: int):
    return lambda n: 0.05 + 0.475 * (1 + jnp.cos(jnp.pi * jnp.minimum(n / steps, 1.0)))


def linear(steps: int):
    return lambda n: jnp.maximum(1 - 0.9 * n / steps, 0.1)


def exponential(steps: int):
    return lambda n: jnp.exp(-3 * n / steps)


def warm_up(steps: int):
    return lambda n: jnp.minimum(1.0, (n + 1) / (steps / 10))


def stairs(steps: int):
    return lambda n: jnp.where(n < steps / 2, 1.0, 0.1)


SCHEDULES = {
    'constant': lambda steps: constant,
    'cosine': cosine,
    'linear': linear,
    'exponential': exponential,
    'warm-up': warm_up,
    'stairs': stairs,
}


def is_healthy(losses: np.ndarray, broken: int | None, falls: float) -> bool:
    """Ends well below where it began, or at its floor, and lost nothing in between that it had learnt."""
    if broken is not None or not np.isfinite(losses).all():
        return False
    smooth = twin.smooth(losses)
    began, ended = np.median(losses[:5]), np.median(losses[-50:])
    best = np.minimum.accumulate(smooth)
    around = np.array([np.median(losses[max(0, k - 25) : k + 26]) for k in range(len(losses))])
    lost = smooth > RELAPSE * np.maximum(best, 1e-12)
    leapt = losses > LEAP * np.maximum(around, 1e-12)
    return bool(ended <= falls * began and not lost.any() and not leapt[25:].any())


def drawn(program: Program, rng: np.random.Generator, long: bool) -> Planted | None:
    for _ in range(TRIES):
        steps = int(rng.integers(2000, 2600)) if long else int(rng.integers(300, 900))
        schedule = str(rng.choice([*SCHEDULES]))
        low, high = program.rate_limits
        setting = Setting(
            seed=int(rng.integers(1000)),
            batch_size=int(rng.choice([4, 8, 16, 32, 64])),
            rate=float(np.exp(rng.uniform(np.log(low), np.log(high)))),
            schedule=SCHEDULES[schedule](steps // program.updates_every),
        )
        run = program.make(setting)
        if is_healthy(*twin.losses(program, run, steps), program.falls):
            said = f'{schedule}, rate x {setting.rate:.2f}, batch {setting.batch_size}'
            return Planted(
                program=program,
                fault='none',
                at=0,
                size=said,
                steps=steps,
                run=run,
                truth=HEALTHY,
                changes=(),
            )
    return None


def runs(program: Program, seed: int, number: int):
    """Of one program; one in eight is long, where a step is short."""
    rng = np.random.default_rng([seed, 1, *program.name.encode()])
    for index in range(number):
        found = drawn(program, rng, long=index == 0)
        if found is not None:
            yield found
