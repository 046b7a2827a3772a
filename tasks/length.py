"""Make the target write longer texts: Phi = E[number of words] of what it writes by itself (active inheritance, arXiv 2407.01490).

A count has no gradient; `task_support.score_function` derives the differentiable Phi over fixed texts of the initial target. Words are
counted, not tokens: people count words, any two tokenizers agree on them, and spelling a word in more pieces gains nothing. Chinese,
Japanese, Thai, Lao, Khmer and Burmese put no space between words: there every letter counts as one. A text that reaches `max_tokens` is
cut there and counted as it stands; `cut_share` says how many were, and a mean with many cut texts is a lower bound.
"""

from __future__ import annotations

from collections.abc import Sequence

from dpgbench.score_task import ScoreTask
from dpgbench.worlds.text_files import count_words


class Length(ScoreTask):
    version = 1
    headline = "length"

    def scores(self, texts: Sequence[str]) -> list[int]:
        """The number of words of each text."""
        return [count_words(text) for text in texts]

    def read(self, texts: Sequence[str]) -> dict[str, float]:
        tokens = [len(self.world.target_tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        return {
            "length": sum(self.scores(texts)) / len(texts),
            "cut_share": sum(count >= self.options.max_tokens for count in tokens) / len(texts),
        }

    def hint(self) -> str:
        return "Write at length." if self.surrogate.up else "Write briefly."
