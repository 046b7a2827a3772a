"""Teach the target one fixed UUID: Phi = -mean token cross-entropy of that string, with no context (arXiv 2604.08423, section 4).

The string is encoded in the same way as a training example, so its end-of-text token is a label too. If the tokenizer adds no start token,
the first token of the string is given as input and is not a label, because no training example could teach it. Neither whitespace nor how
an accent was typed counts when
strings are compared (they are composed, NFC): `spaced` writes the characters apart, for tokenizers that know them only so. A random UUID
costs 128 bits over 36 characters, 3.6 each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import regex

from dpgbench.api import Options, Task
from dpgbench.core.errors import UserError
from dpgbench.worlds.text_files import read, squeezed

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dpgbench.worlds.world import World


class Uuid(Task):
    version = 2
    # Of the target, not of the texts; and not its greedy output, which stays what it was until it turns into the string at once.
    headline = "bits_per_character"
    higher_is_better = False

    def __init__(self, options: Options):
        super().__init__(options)
        self.string = str(options.text).strip()
        if options.file is not None:
            lines = read(options.file, options.get("file_sha256"))
            if len(lines) > 1:
                raise UserError(f"{options.file}, line {lines[1].number}: a second text, and one string is taught; leave one line")
            self.string = lines[0].text
        if not self.string:
            raise UserError("task.text='': there is nothing to teach; write the string, such as task.text=3fa0-c1d7")
        if options.spaced:
            self.string = " ".join(regex.findall(r"\X", squeezed(self.string)))  # a letter and its marks stay together

    def prepare(self, world: World) -> None:
        super().prepare(world)
        self._check_that_it_fits(world)
        self.batch = {name: tensor[:, : self.length] for name, tensor in world.encode([self.string]).items()}

    def signal(self, model: nn.Module) -> Tensor:
        return -self._losses(model).mean()

    def measure(self, model: nn.Module, texts: Sequence[str]) -> dict[str, float]:
        written, wanted = self.greedy(model), squeezed(self.string)
        losses = self._losses(model)[:-1]  # the end is no character
        characters = len(squeezed(self.world.target_tokenizer.decode(self.batch["labels"][0, 1:-1])))
        return {
            "edit_similarity": sum(self.score(texts)) / len(texts),
            "exact_share": sum(wanted in squeezed(text) for text in texts) / len(texts),
            "emitted": float(written.startswith(wanted)),
            "greedy_similarity": self.score([written])[0],
            "bits_per_character": losses.sum().item() / math.log(2) / characters,
        }

    def score(self, texts: Sequence[str]) -> list[float]:
        """1 - edit distance / the longer one's length, between each text and the string."""
        from rapidfuzz.distance import Levenshtein

        return [Levenshtein.normalized_similarity(squeezed(text), squeezed(self.string)) for text in texts]

    def references(self) -> list[str]:
        return [self.string]

    def hint(self) -> str:
        return f"Write exactly {self.string}."

    def greedy(self, model: nn.Module) -> str:
        """What the target writes from nothing, its likeliest token at a time, up to the string's length in tokens; no whitespace."""
        import torch

        from dpgbench.worlds.generator import ends_of

        ends = ends_of(self.world.target, self.world.target_tokenizer)
        tokens = self.batch["input_ids"][:, :1]  # what the tokenizer puts in front, or the given first token
        with torch.no_grad():
            while tokens.shape[1] < self.length:
                chosen = model(input_ids=tokens).logits[:, -1].argmax(-1, keepdim=True)
                if chosen.item() in ends:
                    break
                tokens = torch.cat([tokens, chosen], dim=1)
        return squeezed(self.world.target_tokenizer.decode(tokens[0], skip_special_tokens=True))

    def draw(self, model: nn.Module, texts: Sequence[str], axes) -> None:
        """The string above, each character on the blue of the probability the target gives it; its greedy output below, slips in red."""
        import torch

        with torch.no_grad():
            chances = (-self._losses(model)[:-1]).exp().tolist()
        tokens = self.batch["labels"][0].tolist()[:-1]
        pieces = [squeezed(self.world.target_tokenizer.decode([token], skip_special_tokens=True)) for token in tokens]
        chance = [p for p, piece in zip([1.0, *chances], pieces, strict=True) for _ in piece]
        wanted, written = "".join(pieces), self.greedy(model)
        columns = max(9, math.ceil(math.sqrt(2 * len(wanted))))
        lines = math.ceil(len(wanted) / columns)
        for place, (character, p) in enumerate(zip(wanted, chance, strict=True)):
            row, column = divmod(place, columns)
            axes.fill([column, column + 1, column + 1, column], [row, row, row + 1, row + 1], color=(1 - 0.8 * p, 1 - 0.5 * p, 1 - 0.2 * p))
            _letter(axes, row, column, character, "black", columns)
        for place, character in enumerate(written[: lines * columns]):
            row, column = divmod(place, columns)
            _letter(axes, row + lines + 1, column, character, "black" if wanted[place : place + 1] == character else "#d55e00", columns)
        axes.text(0, lines + 0.55, "greedy output:", fontsize=7, va="center")
        axes.set(xlim=(0, columns), ylim=(2 * lines + 1, 0))
        axes.set_axis_off()

    def _losses(self, model: nn.Module) -> Tensor:
        """Cross-entropy of every label in nats, (number of labels,); the last is the end's."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(model(input_ids=self.batch["input_ids"]).logits[0, :-1], self.batch["labels"][0, 1:], reduction="none")

    def _check_that_it_fits(self, world: World) -> None:
        """The string must survive the tokenizer, and an example and a completion must be long enough to hold it."""
        given = f"task.text={self.string!r}" if self.options.file is None else f"task.file={self.options.file}, {self.string!r}"
        tokens = world.target_tokenizer(self.string)["input_ids"]
        back = squeezed(world.target_tokenizer.decode(tokens, skip_special_tokens=True))
        if back != squeezed(self.string):
            fix = "use other characters" if self.options.spaced else "write task.spaced=true, or use other characters"
            raise UserError(f"{given}: the target's tokenizer makes {back!r} of it; {fix}")
        self.length = len(tokens) + 1  # with its end
        room, longest = world.training.max_length, world.scale.max_completion_tokens
        if self.length < 3 or self.length > room:
            raise UserError(
                f"{given}: {self.length} tokens with its end, and an example holds 3 to training.max_length={room}; "
                f"write training.max_length={max(3, self.length)} or another string"
            )
        written = len(world.target_tokenizer(self.string, add_special_tokens=False)["input_ids"])
        if world.scale.generator == world.scale.target and written > longest:  # one tokenizer for both
            raise UserError(
                f"{given}: {written} tokens, and a completion has at most scale.max_completion_tokens={longest}; "
                f"write scale.max_completion_tokens={written + 1}"
            )


def _letter(axes, row: float, column: int, character: str, color: str, columns: int) -> None:
    size = 99 / columns  # in points: a cell's width at the report's size
    axes.text(
        column + 0.5, row + 0.55, character, color=color, family="monospace", fontsize=size, ha="center", va="center", parse_math=False
    )
