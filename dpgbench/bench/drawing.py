"""A method's work with the generator: prompts, completions, and teaching it to write others."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dpgbench.bench.accountant import Accountant
from dpgbench.bench.sft import finetune
from dpgbench.core.errors import CellError
from dpgbench.core.exchange import Prompt
from dpgbench.core.seeds import derive, stream
from dpgbench.worlds.generator import Generator
from dpgbench.worlds.world import World


class Drawing:
    """Every draw has a seed made of the cell's and of the names that its caller gives."""

    def __init__(self, seed: int, world: World, generator: Generator, account: Accountant):
        self.cell_seed, self.world, self.generator, self.account = seed, world, generator, account

    def seed(self, *names: object) -> int:
        """A seed of this cell for one purpose; the same for every method with the same seed and names."""
        return derive(self.cell_seed, *names)

    def prompts(self, count: int, *names: object) -> list[Prompt]:
        """Training prompts: the same for every method that asks with the same names."""
        return self.world.prompts("train", count, stream(self.cell_seed, "prompts", *names))

    def sample(self, prompts: Sequence[Prompt], *names: object, generator: Generator | None = None) -> list[str]:
        """One completion per prompt of the generator, or of a copy of it (`Generator.copy`), charged as generation."""
        texts, shapes = (generator or self.generator).sample(prompts, self.seed("sample", *names))
        for shape in shapes:
            self.charge_generation(*shape, generator=generator)
        return texts

    def charge_generation(self, batch: int, prompt_length: int, new_tokens: int, *, generator: Generator | None = None) -> None:
        """For completions sampled by other hands than `sample` (a trainer's rollouts)."""
        self.account.generation(generator or self.generator, batch, prompt_length, new_tokens)

    def finetune(self, prompts: Sequence[Prompt], completions: Sequence[str], *names: object, lr: float, epochs: int, batch: int) -> float:
        """Teach the generator to write these completions: `sft.finetune`, charged as a policy update. Returns the last epoch's loss.

        Cost: 3F of the generator on prompts and completions, per epoch; little more than 2F with adapters (`Shape.training_flops`).
        Raises CellError if the loss is not finite.
        """
        losses, shapes = finetune(
            self.generator, prompts, completions, lr=lr, epochs=epochs, batch=batch, seed=self.seed("finetune", *names)
        )
        self.account.finetuning(self.generator, completions, epochs, shapes)
        if not math.isfinite(losses[-1]):
            raise CellError(f"finetune: the generator's loss is {losses[-1]:g}; lower lr={lr}")
        return losses[-1]
