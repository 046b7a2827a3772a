"""Make the target write with a richer vocabulary: Phi = E[MTLD] of groups of its texts (active inheritance, arXiv 2407.01490).

MTLD (McCarthy & Jarvis 2010, doi:10.3758/BRM.42.2.381) reads a text until the share of different words falls to 0.72, counts one factor,
and starts again. The words left over at the end count as a partial factor: how far their share has fallen on the way from 1 to 0.72. MTLD =
words / factors, the mean of forward and backward
reading. Of a short text it says little (without a repetition it has no factor at all), so Phi's score reads `group` texts
one after the other; `task_support.score_function` derives the differentiable Phi. People read the MTLD of all fresh texts as one long
text.

`score`, the black-box score of a single text, reads the text over and over, as often as Phi reads texts: a text of n different words
then gets about n / 0.72, and one that repeats itself less, without the jumps of a partial factor (the wrap-around of MTLD-W).
"""

from __future__ import annotations

from collections.abc import Sequence

from dpgbench.score_task import ScoreTask
from dpgbench.worlds import text_files as user_texts


def words_of(text: str) -> list[str]:
    """Lower-case words and digits, without punctuation; of scripts without spaces between words every letter."""
    return user_texts.words_of(text.lower())


def mtld(texts: Sequence[str]) -> list[float]:
    """MTLD of each text at the published threshold; 0 for a text without words."""
    from lexicalrichness import LexicalRichness  # brings pandas and nltk, which are slow to import

    # Given words, because its own way of splitting a text drops digits.
    read = (LexicalRichness(words, preprocessor=None, tokenizer=None) for words in map(words_of, texts))
    return [float(reader.mtld(threshold=0.72)) if reader.words else 0.0 for reader in read]


class LexicalDiversity(ScoreTask):
    version = 1
    headline = "mtld"

    def scores(self, texts: Sequence[str]) -> list[float]:
        return mtld(texts)

    def read(self, texts: Sequence[str]) -> dict[str, float]:
        groups = self.surrogate.score(self.surrogate.grouped(texts))
        everything = " ".join(texts)
        return {
            "mtld": mtld([everything])[0],
            "mtld_of_groups": sum(groups) / len(groups),
            "different_words": float(len(set(words_of(everything)))),
        }

    def score(self, texts: Sequence[str]) -> list[float]:
        return self.surrogate.better([" ".join([text] * self.surrogate.group) for text in texts])

    def hint(self) -> str:
        return "Write with many different words." if self.surrogate.up else "Write with few words, again and again."
