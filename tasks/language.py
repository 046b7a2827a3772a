"""Make the target good at another language: Phi = -mean loss on held-out text of that language (arXiv 2604.08423, section 4).

The held-out text has the layout of LAMBADA: only the last word of a text is a label (`labels=last_word`; `labels=all` counts every
token). Methods see the dev split. People read the trained target's loss on the test split, over the same labels; beside it its accuracy
there, and the share of deployment texts in that language, which says what the dataset looks like and not what the target learned. No
prompt contains a word of the language. `file` brings held-out texts of your own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from dpgbench.api import Options, Task
from dpgbench.core.errors import UserError, did_you_mean
from dpgbench.core.labels import IGNORED_LABEL
from dpgbench.core.settings import Scale
from dpgbench.worlds.text_files import read, split

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dpgbench.worlds.world import World

NAMES = {"de": "German", "es": "Spanish", "fr": "French", "it": "Italian"}
FEWEST = 8  # in a file, half of them for each split; ours


class Language(Task):
    version = 2
    headline = "test_loss"
    higher_is_better = False
    defaults: ClassVar = {"held_out_texts": 64}

    def __init__(self, options: Options):
        super().__init__(options)
        if options.lang not in NAMES:
            raise UserError(f"task.lang={options.lang}: no such language; {did_you_mean(options.lang, NAMES)}")
        if options.labels not in ("last_word", "all"):
            raise UserError(f"task.labels={options.labels}: no such layout; {did_you_mean(options.labels, ('last_word', 'all'))}")
        count = options.held_out_texts
        if not isinstance(count, int) or count < 1:
            raise UserError(f"task.held_out_texts={count}: at most so many of a split, 1 or more; write task.held_out_texts=64")
        file = options.get("file")  # cells stored before there was this option have none
        self.own = None if file is None else read(file, options.get("file_sha256"))
        if self.own is not None and len({line.text for line in self.own}) < FEWEST:
            raise UserError(f"{file}: {len(self.own)} texts, some perhaps twice; {FEWEST} different ones are the least, write more")

    def supports(self, scale: Scale) -> str | None:
        if self.own is None and self.options.lang not in scale.languages:
            return f"scale={scale.name} has no held-out text in {NAMES[self.options.lang]}; it has {', '.join(scale.languages)}"

    def prepare(self, world: World) -> None:
        super().prepare(world)
        if self.own is None:
            found = [world.held_out(self.options.lang, name, self.options.held_out_texts) for name in ("dev", "test")]
            texts = [[self._shortened(text) for text in half] for half in found]
        else:
            self._check_lines()
            texts = [half[: self.options.held_out_texts] for half in split(line.text for line in self.own)]
        self.dev_texts = texts[0]
        self.dev, self.test = map(self._encoded, texts)

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

    def references(self) -> list[str]:
        """The dev split's texts."""
        return self.dev_texts

    def hint(self) -> str:
        return f"Write in {NAMES[self.options.lang]}."

    def draw(self, model: nn.Module, texts: Sequence[str], axes) -> None:
        """What languages the deployment texts are in; the wanted one in blue."""
        found = Counter(self.world.identify_language(texts)).most_common(6)
        for row, (language, count) in enumerate(found):
            axes.barh(row, count / len(texts), color="#56b4e9" if language == self.options.lang else "#dddddd")
            axes.text(0.02, row, f"{language}  {count / len(texts):.0%}", va="center", fontsize=11)
        axes.set(xlim=(0, 1), ylim=(5.5, -0.5))
        axes.set_axis_off()

    def _losses(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every label, and whether it is the most likely token; both (number of labels,)."""
        from torch.nn.functional import cross_entropy

        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        kept = labels != IGNORED_LABEL
        return cross_entropy(logits[kept], labels[kept], reduction="none"), logits[kept].argmax(-1) == labels[kept]

    def _encoded(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """A batch with labels where the option wants them."""
        tokenizer = self.world.target_tokenizer
        if self.options.labels == "all":
            return self.world.encode(texts)
        texts = [without_stop(text) for text in texts]
        batch = self.world.encode(texts)
        for row, text in enumerate(texts):
            context = len(tokenizer(text.rsplit(maxsplit=1)[0])["input_ids"])
            batch["labels"][row, :context] = IGNORED_LABEL
            batch["labels"][row, len(tokenizer(text)["input_ids"]) :] = IGNORED_LABEL  # nor is the end of the text a word
        return batch

    def _length(self, text: str) -> int:
        """In tokens, with its end."""
        return len(self.world.target_tokenizer(text)["input_ids"]) + 1

    def _shortened(self, text: str) -> str:
        """As much of the end of a text as an example holds, by whole words: the last word is what counts."""
        while self._length(text) > self.world.training.max_length and " " in text:
            text = text.split(maxsplit=1)[1]
        return text

    def _check_lines(self) -> None:
        """A user's text is never cut in silence."""
        longest = self.world.training.max_length
        for number, text in self.own:
            where = f"{self.options.file}, line {number}"
            if (length := self._length(text)) > longest:
                fix = f"shorten it or write training.max_length={length}"
                raise UserError(f"{where}: {length} tokens with its end, and an example holds training.max_length={longest}; {fix}")
            if self.options.labels == "last_word" and len(without_stop(text).split()) < 2:
                raise UserError(f"{where}: labels=last_word needs a word and some text before it; write more, or labels=all")


def without_stop(text: str) -> str:
    """Up to the last word's end."""
    return text.rstrip('.!?…»”" ')
