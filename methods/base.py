"""The untouched generator: the control every other method is compared with (ours).

Cost: the deployment dataset's sampling, nothing else. It fails by design: whatever moves here moves by training on the generator's
ordinary text alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dpgbench.api import Method, Snapshot

if TYPE_CHECKING:
    from dpgbench.bench.workbench import Workbench


class Base(Method):
    def target_passes(self, steps: int) -> float:
        return 0.0

    def run(self, bench: Workbench) -> Iterator[Snapshot]:
        yield Snapshot(step=0, sample=lambda prompts: bench.sample(prompts, "deployment"))
