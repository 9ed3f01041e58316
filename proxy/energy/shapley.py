"""The fair share of a batched step: the Shapley value of its cost, in closed form.

A participant's Shapley value is what it adds to the cost of those who came before it, averaged over all orders of
arrival. A constant falls to all in equal parts, what adds up falls to its owners. What is left is the roofline

    max(Σ compute, fixed + Σ memory)

Let participants arrive at random; after a fraction u of them the two sides have grown to u·A and fixed + u·M. Up to
u = q = fixed / (A - M) memory bounds the step and each newcomer adds its memory time, after that its compute time; the
first pays `fixed`. (If A - M never reaches `fixed`, q = 1.) The shares sum to the maximum exactly.
"""

import numpy as np

from proxy.energy.pending import Floats, Ints


def roofline_shares(compute: Floats, memory: Floats, fixed: float, owner: Ints, count: Floats) -> Floats:
    """Each participant's part of `max(Σ compute, fixed + Σ memory)` of its step.

    `compute` and `memory` are per participant (seconds, or any one unit), `owner` says which step each belongs to, and
    `count` how many participants each step has. Exact where one side is the larger in every subset; otherwise within
    some per cent of the exact value (checked in the tests), and always summing to the maximum.
    """
    steps = len(count)
    excess = np.bincount(owner, weights=compute - memory, minlength=steps)
    memory_bound = np.divide(fixed, excess, out=np.ones(steps), where=excess > fixed)[owner]
    shares: Floats = (fixed / count)[owner] + compute + (memory - compute) * memory_bound
    return shares
