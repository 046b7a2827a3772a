"""A method's work with the generator: prompts, completions, and teaching it to write others."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

from dpgbench.bench.accountant import Accountant
from dpgbench.bench.sft import finetune
from dpgbench.core.errors import CellError
from dpgbench.core.exchange import Prompt
from dpgbench.core.seeds import derive, stream
from dpgbench.worlds.generator import Generator
from dpgbench.worlds.world import World


class _Drawn(NamedTuple):
    """Texts that may be asked for again, and what they cost."""

    prompts: list[Prompt]
    texts: list[str]
    shapes: list[tuple[int, int, int]]
    seconds: float


class Drawing:
    """Every draw has a seed made of the cell's and of the names that its caller gives."""

    def __init__(self, seed: int, world: World, generator: Generator, account: Accountant):
        self.cell_seed, self.world, self.generator, self.account = seed, world, generator, account
        self._drawn: dict[tuple, _Drawn] = {}

    def seed(self, *names: object) -> int:
        """A seed of this cell for one purpose; the same for every method with the same seed and names."""
        return derive(self.cell_seed, *names)

    def prompts(self, count: int, *names: object) -> list[Prompt]:
        """Training prompts: the same for every method that asks with the same names."""
        return self.world.prompts("train", count, stream(self.cell_seed, "prompts", *names))

    def sample(self, prompts: Sequence[Prompt], *names: object, generator: Generator | None = None, remember: bool = False) -> list[str]:
        """One completion per prompt of the generator, or of a copy of it (`Generator.copy`), charged as generation.

        With `remember` the texts are kept until `finetune`, for the method that will ask for them again and trains the generator in no
        other way: the same call is then given them, and charged what it was charged before, seconds included.
        """
        known = self._drawn.get(names) if remember else None
        if known is not None and known.prompts == list(prompts):
            self.account.meter.remembered(known.seconds)
        else:
            clock = time.perf_counter()
            texts, shapes = (generator or self.generator).sample(prompts, self.seed("sample", *names))
            known = _Drawn(list(prompts), texts, shapes, time.perf_counter() - clock)
            if remember:
                self._drawn[names] = known
        for shape in known.shapes:
            self.charge_generation(*shape, generator=generator)
        return list(known.texts)

    def charge_generation(self, batch: int, prompt_length: int, new_tokens: int, *, generator: Generator | None = None) -> None:
        """For completions sampled by other hands than `sample` (a trainer's rollouts)."""
        self.account.generation(generator or self.generator, batch, prompt_length, new_tokens)

    def finetune(self, prompts: Sequence[Prompt], completions: Sequence[str], *names: object, lr: float, epochs: int, batch: int) -> float:
        """Teach the generator to write these completions: `sft.finetune`, charged as a policy update. Returns the last epoch's loss.

        Cost: 3F of the generator on prompts and completions, per epoch; little more than 2F with adapters (`Shape.training_flops`).
        Raises CellError if the loss is not finite.
        """
        self._drawn.clear()
        losses, shapes = finetune(
            self.generator, prompts, completions, lr=lr, epochs=epochs, batch=batch, seed=self.seed("finetune", *names)
        )
        self.account.finetuning(self.generator, completions, epochs, shapes)
        if not math.isfinite(losses[-1]):
            raise CellError(f"finetune: the generator's loss is {losses[-1]:g}; lower lr={lr}")
        return losses[-1]
