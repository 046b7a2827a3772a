"""What a method has spent, and how much it may spend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

PHASES = ("generate", "training", "metagradient", "policy_update", "scoring", "deployment")


@dataclass
class Meter:
    """Running totals. Everything a method does through its workbench is charged here; the harness's own scoring is not."""

    flops: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    tokens_generated: int = 0
    tokens_trained: int = 0
    seconds: float = 0.0
    _deployment: Meter | None = field(default=None, repr=False)

    def charge(self, phase: str, flops: float, *, generated: int = 0, trained: int = 0) -> None:
        """Add FLOPs to a phase, and the tokens that were sampled or trained on."""
        if phase not in PHASES:
            raise ValueError(f"phase={phase!r}: not a phase of the budget; one of {', '.join(PHASES)}")
        if self._deployment is not None:
            phase = "deployment"
        meter = self._deployment or self
        meter.flops[phase] += flops
        meter.tokens_generated += generated
        meter.tokens_trained += trained

    def remembered(self, seconds: float) -> None:
        """Seconds that work took when it was done, for a caller who is given its outcome again; FLOPs and tokens are charged as ever."""
        (self._deployment or self).seconds += seconds

    @contextmanager
    def deployment(self) -> Iterator[Meter]:
        """Inside, all charges go to the yielded meter as "deployment".

        A snapshot's price is what was spent so far plus one deployment dataset; the datasets drawn at earlier snapshots were drawn
        for the plot's sake and are nobody's cost.
        """
        self._deployment = Meter()
        try:
            yield self._deployment
        finally:
            self._deployment = None

    def __add__(self, other: Meter) -> Meter:
        return Meter(
            {phase: self.flops[phase] + other.flops[phase] for phase in PHASES},
            self.tokens_generated + other.tokens_generated,
            self.tokens_trained + other.tokens_trained,
            self.seconds + other.seconds,
        )

    def state(self) -> dict[str, Any]:
        """The totals, as JSON can hold them, to go on from."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from totals that `state` gave."""
        for name, value in state.items():
            setattr(self, name, value)

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())


@dataclass(frozen=True)
class Budget:
    """What a method's answer may cost, its deployment dataset included: FLOPs, generated tokens, seconds. None: no limit.

    A limit on seconds makes a cell's numbers depend on the machine and on what else it does; the other two do not.
    """

    flops: float | None = None
    tokens: int | None = None
    seconds: float | None = None

    def __bool__(self) -> bool:
        return any(limit is not None for limit in (self.flops, self.tokens, self.seconds))

    def share(self, spent: Meter) -> float:
        """The largest share of a limit that is spent: 0 without limits, above 1 if it is too much."""
        used = ((self.flops, spent.total_flops), (self.tokens, spent.tokens_generated), (self.seconds, spent.seconds))
        return max((value / limit for limit, value in used if limit is not None), default=0.0)
