"""The embedded world of `scale=tiny`: a five-language phrasebook, a word-level tokenizer and two small pretrained models.

Everything is in the package: no download, no network. `grammar` holds the sentences, `tokenizer` the tokens, `pretrain` is the
command that made `weights/`. Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from dpgbench.worlds.phrasebook import grammar

WEIGHTS = Path(__file__).parent / "weights"  # generator/ and target/, each a folder for `from_pretrained`


class Phrasebook:
    """The world of `scale=tiny`: English prompts for the generator, held-out sentences in every language. Has no state."""

    languages: tuple[str, ...] = grammar.LANGUAGES

    def prompts(self, split: str, count: int, rng: random.Random) -> list[str]:
        """`count` prompts "english sentence <sep>" of ideas of `split` ("train", "dev", "test"), in random word orders.

        Ideas are drawn with replacement. Ready to tokenise: the tokenizer adds <s>. Raises ValueError for an unknown split.
        """
        ideas = grammar.draw_ideas(split, count, rng)
        return [f"{grammar.say(idea, 'en', rng.randrange(len(grammar.ORDERS)))} <sep>" for idea in ideas]

    def longest(self, tokens: int) -> Iterator[str]:
        """Of 512 prompts, which cannot all be looked through, those of more than so many bytes."""
        return (prompt for prompt in self.prompts("train", 512, random.Random(0)) if len(prompt.encode()) > tokens)

    def instruct(self, prompt: str, instruction: str) -> str:
        """`prompt` with `instruction` ("Write in French.") before its separator. Words the phrasebook lacks become <unk>."""
        return f"{prompt.removesuffix(' <sep>')} {instruction} <sep>"

    def instructions(self) -> list[str]:
        """One for each goal the generator was pretrained to follow, in the same opening."""
        return [f"{grammar.OPENINGS[0]} {goal}." for goal in grammar.GOALS]

    def instruction_request(self) -> str:
        """The pretrained generator answers with one of the instructions it knows, in any opening, each about equally often."""
        return f"{grammar.OPENINGS[0]} {grammar.RUBRIC}."

    def held_out(self, language: str, split: str, count: int = 256) -> list[str]:
        """`count` sentences in `language` of ideas no model was pretrained on; always the same ones, a shorter list opens a longer one.

        `split` is "dev" or "test". The languages are parallel: the i-th sentences of two languages say the same idea in the
        same order. Raises ValueError for an unknown language and for any other split.
        """
        if split not in ("dev", "test"):
            raise ValueError(f"split={split!r} is not held out: the models were pretrained on train; use dev or test")
        rng = random.Random(f"phrasebook held-out {split}")
        sentences = []
        for _ in range(count):
            (idea,) = grammar.draw_ideas(split, 1, rng)
            sentences.append(grammar.say(idea, language, rng.randrange(len(grammar.ORDERS))))
        return sentences

    def identify_language(self, text: str) -> str:
        """One of `languages`, or "other" for a mixture, digits or an empty text. See `grammar.identify_language`."""
        return grammar.identify_language(text)

    def language_probability(self, text: str, language: str) -> float:
        """The share of a text's words that the language has, 0 for no text."""
        words = text.replace(".", " ").split()
        return sum(word in grammar.words_of(language) for word in words) / len(words) if words else 0.0
