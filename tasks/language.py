"""Make the target good at another language: Phi = -mean loss on held-out text of that language (arXiv 2604.08423, section 4).

The held-out text has the layout of LAMBADA: only the last word of a text is a label (`labels=last_word`; `labels=all` counts every
token). Methods see the dev split. People read the share of deployment texts in that language, and the trained target's loss and
last-word accuracy on the test split. No prompt contains a word of the language.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpgbench.api import Options, Task
from dpgbench.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dpgbench.data import World

NAMES = {"de": "German", "es": "Spanish", "fr": "French", "it": "Italian"}
TEXTS = 64  # per split


class Language(Task):
    headline = "share"

    def __init__(self, options: Options):
        super().__init__(options)
        if options.lang not in NAMES:
            raise UserError(f"task.lang={options.lang}: no such language; {did_you_mean(options.lang, NAMES)}")
        if options.labels not in ("last_word", "all"):
            raise UserError(f"task.labels={options.labels}: no such layout; {did_you_mean(options.labels, ('last_word', 'all'))}")

    def supports(self, scale: Options) -> str | None:
        if self.options.lang not in scale.languages:
            return f"scale={scale.name} has no held-out text in {NAMES[self.options.lang]}; it has {', '.join(scale.languages)}"

    def prepare(self, world: World) -> None:
        super().prepare(world)
        self.dev, self.test = (self._held_out(split) for split in ("dev", "test"))

    def signal(self, model: nn.Module) -> Tensor:
        return -self._losses(model, self.dev)[0].mean()

    def measure(self, model: nn.Module, texts: Sequence[str]) -> dict[str, float]:
        losses, correct = self._losses(model, self.test)
        found = self.world.identify_language(texts)
        return {
            "share": found.count(self.options.lang) / len(found),
            "test_loss": losses.mean().item(),
            "test_accuracy": correct.float().mean().item(),
        }

    def score(self, texts: Sequence[str]) -> list[float]:
        """1 for a text in the language, 0 for any other."""
        return [float(language == self.options.lang) for language in self.world.identify_language(texts)]

    def hint(self) -> str:
        return f"Write in {NAMES[self.options.lang]}."

    def _losses(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every label, and whether it is the most likely token; both (number of labels,)."""
        from torch.nn.functional import cross_entropy

        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        kept = labels != -100
        return cross_entropy(logits[kept], labels[kept], reduction="none"), logits[kept].argmax(-1) == labels[kept]

    def _held_out(self, split: str) -> dict[str, Tensor]:
        texts = self.world.held_out(self.options.lang, split, TEXTS)
        if self.options.labels == "last_word":
            texts = [text.rstrip(".!?…» ") for text in texts]
        batch = self.world.encode(texts)
        if self.options.labels == "last_word":
            for row, text in enumerate(texts):
                context = len(self.world.target_tokenizer(text.rsplit(" ", 1)[0])["input_ids"])
                whole = len(self.world.target_tokenizer(text)["input_ids"])
                batch["labels"][row, :context] = -100
                batch["labels"][row, whole:] = -100  # nor is the end of the text a word
        return batch
