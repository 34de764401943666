"""
The learning rate as a pure function of the step, so that every server node and worker agrees.

Shapes (w: warm-up steps, T: all steps, f: final factor; the factor multiplies `optimizer.lr`):

    constant  1                       linear  1 - (1-f) * p        p = (s-w) / (T-1-w)
    step      gamma ** ((s-w)//every) cosine  f + (1-f) * (1 + cos(pi * p)) / 2

and (s+1)/w in the warm-up, s < w. The cosine is of Loshchilov & Hutter, SGDR, 2017.
"""

import math

from distplat.platform.optimizers import Schedule


def factor(schedule: Schedule, step: int, total_steps: int) -> float:
    """Give the factor on the base learning rate in step `step` of `total_steps`, both from 0."""
    warmup = schedule.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
    match schedule.name:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - (1.0 - schedule.final_factor) * done
        case "cosine":
            final = schedule.final_factor
            return final + (1.0 - final) * (1.0 + math.cos(math.pi * done)) / 2.0
        case "step":
            return float(schedule.gamma ** ((step - warmup) // schedule.every_steps))
