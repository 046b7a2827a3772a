"""A method's work with the generator: prompts, completions, and teaching it to write others."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

from dpgbench.bench.accountant import Accountant
from dpgbench.bench.sft import finetune
from dpgbench.core.errors import CellError
from dpgbench.core.plugin_types import Prompt
from dpgbench.core.seeds import derive, stream
from dpgbench.worlds.generator import Generator
from dpgbench.worlds.world import World


class Draw(NamedTuple):
    """One completion per prompt, and what it took: the (batch, prompt length, new tokens) of each call, and wall-clock seconds."""

    texts: list[str]
    shapes: list[tuple[int, int, int]]
    seconds: float


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
        drawn = self.drawn(prompts, *names, generator=generator)
        self.charge(drawn, generator)
        return drawn.texts

    def shared_draws(self, *names: object) -> SharedDraws:
        """For several completions per prompt, of which one snapshot takes more than another: see `SharedDraws`."""
        return SharedDraws(self, *names)

    def charge_generation(self, batch: int, prompt_length: int, new_tokens: int, *, generator: Generator | None = None) -> None:
        """For completions sampled by other hands than `sample` (a trainer's rollouts)."""
        self.account.generation(generator or self.generator, batch, prompt_length, new_tokens)

    def drawn(self, prompts: Sequence[Prompt], *names: object, generator: Generator | None = None) -> Draw:
        """What `sample` draws, before it is charged."""
        clock = time.perf_counter()
        texts, shapes = (generator or self.generator).sample(prompts, self.seed("sample", *names))
        return Draw(texts, shapes, time.perf_counter() - clock)

    def charge_again(self, draw: Draw) -> None:
        """What a draw of the bench's generator cost, to one who takes it without drawing it: FLOPs, tokens and seconds."""
        self.charge(draw)
        self.account.again(draw.seconds)

    def charge(self, draw: Draw, generator: Generator | None = None) -> None:
        """FLOPs and tokens of a draw; its seconds are the clock's."""
        for shape in draw.shapes:
            self.charge_generation(*shape, generator=generator)

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


class SharedDraws:
    """Completions of the same prompts by the bench's generator: drawn once, and charged in full to every snapshot that takes them.

    A snapshot is charged what it would have cost alone, because nobody who wants only that answer pays for another one. Draw 0 is that of
    `sample(prompts, *names)`, draw k that of `sample(prompts, *names, k)`, so the texts are those of a run that shares nothing. Other
    prompts, or a generator whose weights were written since, make all draws anew. Memory: the texts.
    """

    def __init__(self, drawing: Drawing, *names: object):
        self._drawing, self._names = drawing, names
        self._asked: tuple[list[Prompt], object] | None = None
        self._draws: list[Draw] = []

    def first(self, count: int, prompts: Sequence[Prompt]) -> list[list[str]]:
        """Draws 0 to `count` - 1, one completion per prompt each. Cost: sampling of `count` completions per prompt, charged every time."""
        asked = (list(prompts), self._weights())
        if asked != self._asked:
            self._asked, self._draws = asked, []
        for number in range(count):
            if number < len(self._draws):
                self._drawing.charge_again(self._draws[number])
            else:
                self._draws.append(self._drawing.drawn(prompts, *self._names, *([number] if number else [])))
                self._drawing.charge(self._draws[-1])
        return [draw.texts for draw in self._draws[:count]]

    def _weights(self) -> object:
        """Another value after every write to the generator's weights that autograd sees (an optimizer's step, `copy_`, adapters)."""
        return [(id(weight), weight._version) for weight in self._drawing.generator.model.parameters()]
