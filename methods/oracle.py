"""The score scale's 1, not a competing method: the wanted texts where a task has them, else gradient ascent on Phi (ours).

A task with `references` (texts that show what is wanted, known to every method) gets them as its deployment dataset, over and over. For any
other task there are no right texts to be had, and the target takes the T steps of a deployment, with its own optimizer and learning rate,

    phi_{t+1} = A(phi_t, -grad Phi(phi_t)),

on Phi itself. Scores are normalised by it: (value - base) / (oracle - base). Cost: none for texts, T gradients of Phi otherwise. It is
no upper bound: on what people read, which Phi only stands for, a method may pass it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice
from typing import TYPE_CHECKING

from dpgbench.api import Method, Snapshot

if TYPE_CHECKING:
    from dpgbench.bench.prices import Prices
    from dpgbench.bench.workbench import Workbench


class Oracle(Method):
    def planned_flops(self, prices: Prices) -> float:
        return 0.0 if "references" in prices.task.defines else prices.deployment()  # and T gradients of Phi

    def run(self, bench: Workbench) -> Iterator[Snapshot]:
        references = bench.task.references()
        if references is not None:
            yield Snapshot(step=0, sample=lambda prompts: list(islice(cycle(references), len(prompts))))
        else:
            yield Snapshot(step=0, sample=lambda prompts: bench.sample(prompts, "deployment"), params=bench.ascend())
