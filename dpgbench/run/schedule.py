"""Which snapshots of a method are scored."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dpgbench.core.cell import RunSpec


class _Schedule:
    """Which of a method's snapshots are scored."""

    def __init__(self, steps: set[int] | None = None, shares: Sequence[float] | None = None):
        """At these steps, or else the first at or past each of these shares of the budget, and the very first. With neither, all."""
        self.steps, self.shares = steps, shares
        self.passed = -1

    @property
    def skips(self) -> bool:
        """Whether some snapshots are not scored."""
        return self.steps is not None or self.shares is not None

    def is_due(self, step: int, share: float) -> bool:
        if self.steps is not None:
            return step in self.steps
        if self.shares is None:
            return True
        passed = sum(share >= threshold for threshold in self.shares)
        due = passed > self.passed
        self.passed = max(self.passed, passed)
        return due


def schedule_of(spec: RunSpec) -> _Schedule:
    """A method that counts policy steps is scored at log-spaced ones, or at halvings of its budget; any other at all its snapshots."""
    policy = spec.method.get("policy")
    if policy is None:
        return _Schedule()
    if spec.budget:
        return _Schedule(shares=[2.0**-k for k in range(1, spec.scale.snapshots - 1)])  # the last one is scored in any case
    return _Schedule(steps=snapshot_steps(policy.steps, spec.scale.snapshots))


def snapshot_steps(last: int, count: int) -> set[int]:
    """About `count` steps from 0 to `last`, evenly spaced on a log scale: 0, 1, ... `last`."""
    if count == 1:
        return {last}
    return {0, last} | {round(math.exp(math.log(last) * k / (count - 2))) for k in range(count - 1)} if count > 2 else {0, last}
