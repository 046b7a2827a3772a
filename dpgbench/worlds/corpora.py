"""Where prompts and held-out texts come from."""

from __future__ import annotations

import random
import re
import textwrap
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Protocol

from dpgbench.core.errors import UserError, did_you_mean
from dpgbench.core.plugin_types import Prompt
from dpgbench.worlds import text_files
from dpgbench.worlds.prompts import Wording

SPLITS = {"train": range(0, 90), "dev": range(90, 95), "test": range(95, 100)}


class Corpus(Protocol):
    """Where a scale's texts come from. `split` is "train", "dev" or "test"; the three share no text."""

    def prompts(self, split: str, count: int, rng: random.Random) -> list[Prompt]:
        """Drawn with replacement; the same `rng` state gives the same prompts."""

    def longest(self, tokens: int) -> Iterator[Prompt]:
        """Those of its prompts that may have more than so many tokens; of a corpus too large to look through, some."""

    def instruct(self, prompt: Prompt, instruction: str) -> Prompt:
        """`prompt` with `instruction` said after it."""

    def instructions(self) -> list[str]:
        """Instructions that its generator can follow, whatever the task: what a search over prompts has to choose from."""

    def instruction_request(self) -> str:
        """What to say after a prompt so that its generator answers with an instruction rather than with a text."""

    def held_out(self, language: str, split: str, count: int) -> list[str]:
        """The first `count` texts of a fixed list, in that language."""

    def identify_language(self, text: str) -> str:
        """A language code, or "other"."""

    def language_probability(self, text: str, language: str) -> float:
        """How much of a text is in that language, from 0 to 1."""


# Ours: ways of writing that differ in language, length, tone and material, for a search over prompts.
INSTRUCTIONS = (
    "Write in English.", "Write in German.", "Write in Spanish.", "Write in French.", "Write in Italian.", "Write at length.",
    "Write in one short sentence.", "Write politely.", "Write rudely.", "Use many different words.", "Use few words, again and again.",
    "Write in digits only.",
)  # fmt: skip


# Ours: a generator asked this answers with an instruction, which the passage and it are then given together.
REQUEST = (
    "But do not rephrase it yet. Write one instruction on how it should be written: language, style, length or form. "
    "Answer with the instruction only."
)


# Multilingual LAMBADA on the model hub, and the SHA-256 its card gives for each file: machine translations of one English test set.
LAMBADA = "EleutherAI/lambada_openai"


LAMBADA_REVISION = "1bbe8198cad894ffee8ca70f3c1e5aff16f381eb"


LAMBADA_SHA256 = {
    "de": "51c6c1795894c46e88e4c104b5667f488efe79081fb34d746b82b8caa663865e",
    "es": "ffd760026c647fb43c67ce1bc56fd527937304b348712dce33190ea6caba6f9c",
    "fr": "941ec6a73dba7dc91c860bf493eb66a527cd430148827a4753a4535a046bf362",
    "it": "86654237716702ab74f42855ae5a78455c1b0e50054a4593fb9c6fcf7fad0850",
}


class Topics:
    """English passages that are always present, the language reference in the standard library's `pydoc_data.topics`, as prompts; in
    other languages the held-out texts are LAMBADA's, from the model hub or its cache, or sentences that come with dpgbench."""

    foreign = "lambada"
    """Where held-out texts in other languages are from: one of `FOREIGN`."""

    def __init__(self, wording: Wording | None = None) -> None:
        self.wording = wording or Wording()
        self._passages: dict[str, list[str]] = {split: [] for split in SPLITS}
        for passage in _passages():
            split = next(name for name, buckets in SPLITS.items() if bucket_of(passage) in buckets)
            self._passages[split].append(passage)

    def prompts(self, split: str, count: int, rng: random.Random) -> list[Prompt]:
        return [self.wording.prompt(rng.choice(self._of(split))) for _ in range(count)]

    def longest(self, tokens: int) -> Iterator[Prompt]:
        passages = (passage for split in self._passages.values() for passage in split)
        room = tokens - self.wording.taken
        return (self.wording.prompt(passage) for passage in passages if len(passage.encode()) > room)  # a token is a byte or more

    def instruct(self, prompt: Prompt, instruction: str) -> Prompt:
        return self.wording.instruct(prompt, instruction)

    def instructions(self) -> list[str]:
        return list(INSTRUCTIONS)

    def instruction_request(self) -> str:
        return REQUEST

    def held_out(self, language: str, split: str, count: int) -> list[str]:
        if language == "en":
            return self._held_out_english(split, count)
        if split not in ("dev", "test"):
            raise ValueError(f"split={split!r} is not held out: {self.foreign} has dev and test")
        return FOREIGN[self.foreign](language)[split == "test"][:count]

    def identify_language(self, text: str) -> str:
        """What py3langid is more sure of than of all other languages together; a mixture, digits and no text at all are "other"."""
        language, probability = _identifier().classify(text)
        return language if probability >= 0.5 else "other"

    def language_probability(self, text: str, language: str) -> float:
        """py3langid's probability, 0 for a language that it does not know and for no text at all."""
        return dict(_identifier().rank(text)).get(language, 0.0) if text.strip() else 0.0

    def _held_out_english(self, split: str, count: int) -> list[str]:
        return self._of(split)[:count]

    def _of(self, split: str) -> list[str]:
        if split not in self._passages:
            raise ValueError(f"split={split!r}: not a split of the corpus; one of {', '.join(SPLITS)}")
        return self._passages[split]


@cache
def _identifier():
    """py3langid's own model, 139 languages, which comes with the package; about a second to load."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@cache
def _lambada(language: str) -> tuple[list[str], list[str]]:
    """Dev and test texts of one language. Raises UserError if the hub has none, or the file is neither there nor to be had."""
    if language not in LAMBADA_SHA256:
        raise UserError(f"task.lang={language}: {LAMBADA} has no such language; {did_you_mean(language, ['en', *LAMBADA_SHA256])}")
    path = _downloaded(f"data/lambada_test_{language}.jsonl")
    if text_files.digest(path) != LAMBADA_SHA256[language]:
        raise UserError(f"{path}: not the file that {LAMBADA} vouches for (another SHA-256); delete it and run again")
    return text_files.split(text for _, text in text_files.read(path))


@cache
def _sentences(language: str) -> tuple[list[str], list[str]]:
    """Dev and test of the 200 sentences of one language in `sentences/`, written for this. Raises UserError if there are none."""
    folder = Path(__file__).with_name("sentences")
    if not (path := folder / f"{language}.txt").is_file():
        there = ["en", *sorted(file.stem for file in folder.glob("*.txt"))]
        raise UserError(f"task.lang={language}: scale.held_out=sentences has no such language; {did_you_mean(language, there)}")
    return text_files.split(path.read_text(encoding="utf-8").splitlines())


FOREIGN = {"lambada": _lambada, "sentences": _sentences}


def _downloaded(name: str) -> str:
    """A file of LAMBADA, from the hub's cache if it is there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    where = {"repo_id": LAMBADA, "filename": name, "repo_type": "dataset", "revision": LAMBADA_REVISION}
    logging.set_verbosity_error()  # the hub's retries are nobody's business: the line below says what happened
    try:
        return hf_hub_download(**where, local_files_only=True)
    except OSError:
        pass
    try:
        return hf_hub_download(**where)
    except OSError as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0]
        raise UserError(
            f"{LAMBADA}/{name}: cannot be loaded ({reason}); go online once, or give texts of your own with task.file=mine.txt"
        ) from None


def _passages(shortest: int = 200, longest: int = 600) -> list[str]:
    """Paragraphs of running prose (no grammar tables, no code), unwrapped, of `shortest` to `longest` characters."""
    from pydoc_data import topics

    passages = []
    for _, text in sorted(topics.topics.items()):
        for paragraph in re.split(r"\n\s*\n", text):
            prose = " ".join(textwrap.dedent(paragraph).split())
            if shortest <= len(prose) and "::=" not in prose and ">>>" not in prose and prose[0].isupper():
                passages.append(textwrap.shorten(prose, longest, placeholder=" ..."))
    return passages


def bucket_of(text: str) -> int:
    """One of a hundred, by content."""
    return zlib.crc32(text.encode()) % 100
