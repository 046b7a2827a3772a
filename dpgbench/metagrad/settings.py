"""How a training run and its metagradients are computed, as one value that can be handed on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class EngineSettings:
    """The arguments of `metagradients` that say how, not what, and those of them that `training.train` has too: see there.

    `reduction` is part of the loss, `precision` of the arithmetic; the others change memory and time and no number beyond rounding.
    """

    reduction: str = "length"
    precision: str = "full"
    micro_batch: int | None = None
    memory_budget: int | float | None = None
    checkpoint: str | int = "all"
    mode: str = "auto"
    offload: str | None = None
    activation_checkpointing: bool = False
    data_parallel: bool = False

    def for_training(self) -> dict[str, Any]:
        """The keywords of `train`."""
        return {"reduction": self.reduction, "precision": self.precision, "micro_batch": self.micro_batch}

    def for_metagradients(self) -> dict[str, Any]:
        """The keywords of `metagradients`."""
        return asdict(self)


DEFAULTS = EngineSettings()
