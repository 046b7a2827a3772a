"""What a scale's texts are: prompts for the generator, held-out texts for tasks, and texts as training examples of the target."""

from __future__ import annotations

import random
import re
import textwrap
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from dpgbench import texts
from dpgbench.api import Options, Prompt
from dpgbench.errors import UserError, did_you_mean
from dpgbench.wording import Room, Wording, lengths

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

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
    other languages the held-out texts are LAMBADA's, from the model hub or its cache."""

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
            raise ValueError(f"split={split!r} is not held out: LAMBADA has dev and test")
        return _lambada(language)[split == "test"][:count]

    def identify_language(self, text: str) -> str:
        """What py3langid is more sure of than of all other languages together; a mixture, digits and no text at all are "other"."""
        language, probability = _identifier().classify(text)
        return language if probability >= 0.5 else "other"

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
    if texts.digest(path) != LAMBADA_SHA256[language]:
        raise UserError(f"{path}: not the file that {LAMBADA} vouches for (another SHA-256); delete it and run again")
    return texts.split(text for _, text in texts.read(path))


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


def corpus(scale: Options, tokenizer: PreTrainedTokenizerBase | None = None) -> Corpus:
    """The corpus a scale names, its prompts worded for its generator's `tokenizer`. Raises UserError for an unknown one."""
    if scale.corpus == "phrasebook":
        from dpgbench.phrasebook import Phrasebook

        return Phrasebook()
    wording = Wording.of(scale, tokenizer)
    if scale.corpus == "topics":
        return Topics(wording)
    from dpgbench.own_texts import FileTexts, HubTexts

    return FileTexts(scale, wording) if texts.is_passages(scale.corpus) else HubTexts(scale, wording)


def check_room(scale: Options, corpus: Corpus, room: Room, instructions: Sequence[str] = ()) -> None:
    """Every prompt of the corpus, with the scale's instruction and any of `instructions` after it, leaves its generator room to write.

    Raises UserError, one line, for one that does not. Cost: prompts that may be too long are tokenised, none where there is a limit.
    """
    more, longest = 0, None
    if instructions:
        (prompt,) = corpus.prompts("train", 1, random.Random(0))
        alone, *sizes = lengths(room.tokenizer, [prompt, *(corpus.instruct(prompt, text) for text in instructions)])
        more, longest = max(sizes) - alone, instructions[sizes.index(max(sizes))]
    limit = scale.get("max_prompt_tokens")
    if limit is not None and scale.corpus != "phrasebook":
        if limit + more > room.most:
            raise room.too_long(limit + more, more)
        return
    said = [text for text in (scale.get("instruction"), longest) if text is not None]
    prompts = corpus.longest(room.most - 2 * sum(lengths(room.tokenizer, said)))
    while part := list(islice(prompts, 256)):
        before = part
        for text in said:
            before, part = part, [corpus.instruct(prompt, text) for prompt in part]
        room.check(part, before if instructions else None)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    """Texts as training examples of the target (DESIGN: the text alone, EOS appended, cut and padded to `max_length`).

    The tokenizer is one that adds no end by itself, as `models.load_target` gives it.
    Returns {"input_ids": (N, L) long, "labels": (N, L) long}. Pad positions carry label -100; the EOS is a real label, also where a
    model pads with its EOS token. A text that is cut loses its EOS: it did not end there.
    """
    import torch

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    input_ids = torch.full((len(texts), max_length), pad, dtype=torch.long)
    labels = torch.full((len(texts), max_length), -100, dtype=torch.long)
    written = tokenizer(list(texts))["input_ids"] if texts else []  # one call: one for each text takes a tenth of a small step
    for row, ids in enumerate(written):
        tokens = torch.tensor([*ids, tokenizer.eos_token_id][:max_length])
        input_ids[row, : len(tokens)] = labels[row, : len(tokens)] = tokens
    return {"input_ids": input_ids, "labels": labels}


class World:
    """What a task may see of the scale: the initial target, the tokenizers, held-out texts, a language identifier."""

    def __init__(self, scale: Options, training: Options, corpus: Corpus, target: nn.Module, target_tokenizer: PreTrainedTokenizerBase):
        self.scale, self.training, self.corpus = scale, training, corpus
        self.target = target
        """phi_0. Read it, never write it."""
        self.target_tokenizer = target_tokenizer
        self.room: Room | None = None
        """What the generator can read, where that is known."""

    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """As training examples of the target, on its device; see `encode`."""
        batch = encode(self.target_tokenizer, texts, self.training.max_length)
        return {name: tensor.to(self.target.device) for name, tensor in batch.items()}

    def prompts(self, split: str, count: int, rng: random.Random) -> list[Prompt]:
        """The corpus's, with the scale's `instruction` after each if it has one: the same for every method."""
        prompts, instruction = self.corpus.prompts(split, count, rng), self.scale.get("instruction")
        if instruction is not None:
            prompts = [self.corpus.instruct(prompt, instruction) for prompt in prompts]
        if self.room is not None:
            self.room.check(prompts)
        return prompts

    def instruct(self, prompts: Sequence[Prompt], instruction: str) -> list[Prompt]:
        """Each prompt with `instruction` said after it. Raises UserError if that is more than the generator can read."""
        instructed = [self.corpus.instruct(prompt, instruction) for prompt in prompts]
        if self.room is not None:
            self.room.check(instructed, prompts)
        return instructed

    def check_room(self, instructions: Sequence[str] = ()) -> None:
        """`check_room` of the whole corpus, for a method to ask before it spends anything on these instructions."""
        if self.room is not None:
            check_room(self.scale, self.corpus, self.room, instructions)

    def instructions(self) -> list[str]:
        """What the corpus has to choose from, in a fixed order."""
        return self.corpus.instructions()

    def instruction_request(self) -> str:
        """What makes the generator answer with an instruction."""
        return self.corpus.instruction_request()

    def held_out(self, language: str, split: str, count: int) -> list[str]:
        return self.corpus.held_out(language, split, count)

    def identify_language(self, texts: Sequence[str]) -> list[str]:
        return [self.corpus.identify_language(text) for text in texts]
