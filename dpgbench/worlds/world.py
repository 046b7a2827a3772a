"""What a scale's texts are: prompts for the generator, held-out texts for tasks, and texts as training examples of the target."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from dpgbench.core.labels import IGNORED_LABEL
from dpgbench.core.plugin_types import Prompt
from dpgbench.core.settings import Scale, Training
from dpgbench.worlds import text_files
from dpgbench.worlds.corpora import Corpus, Topics
from dpgbench.worlds.prompts import Room, Wording, lengths

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase


def corpus(scale: Scale, tokenizer: PreTrainedTokenizerBase | None = None) -> Corpus:
    """The corpus a scale names, its prompts worded for its generator's `tokenizer`. Raises UserError for an unknown one."""
    if scale.corpus == "phrasebook":
        from dpgbench.worlds.phrasebook import Phrasebook

        return Phrasebook()
    wording = Wording.of(scale, tokenizer)
    if scale.corpus == "topics":
        texts = Topics(wording)
    else:
        from dpgbench.worlds.user_corpora import FileTexts, HubTexts

        texts = FileTexts(scale, wording) if text_files.is_passages(scale.corpus) else HubTexts(scale, wording)
    texts.foreign = scale.get("held_out") or texts.foreign
    return texts


def check_room(scale: Scale, corpus: Corpus, room: Room, instructions: Sequence[str] = ()) -> None:
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
    appended = [text for text in (scale.get("instruction"), longest) if text is not None]
    prompts = corpus.longest(room.most - 2 * sum(lengths(room.tokenizer, appended)))
    while part := list(islice(prompts, 256)):
        before = part
        for text in appended:
            before, part = part, [corpus.instruct(prompt, text) for prompt in part]
        room.check(part, before if instructions else None)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    """Texts as training examples of the target: the tokenizer's tokens of the text alone (with a start, if it adds one), EOS appended, cut
    and padded to `max_length`.

    The tokenizer is one that adds no end by itself, as `models.load_target` gives it.
    Returns {"input_ids": (N, L) long, "labels": (N, L) long}. Pad positions carry `IGNORED_LABEL`; the EOS is a real label, also where a
    model pads with its EOS token. A text that is cut loses its EOS: it did not end there.
    """
    import torch

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    input_ids = torch.full((len(texts), max_length), pad, dtype=torch.long)
    labels = torch.full((len(texts), max_length), IGNORED_LABEL, dtype=torch.long)
    written = tokenizer(list(texts))["input_ids"] if texts else []  # one call: one for each text takes a tenth of a small step
    for row, ids in enumerate(written):
        tokens = torch.tensor([*ids, tokenizer.eos_token_id][:max_length])
        input_ids[row, : len(tokens)] = labels[row, : len(tokens)] = tokens
    return {"input_ids": input_ids, "labels": labels}


class World:
    """What a task may see of the scale: the initial target, the tokenizers, held-out texts, a language identifier."""

    def __init__(self, scale: Scale, training: Training, corpus: Corpus, target: nn.Module, target_tokenizer: PreTrainedTokenizerBase):
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

    def language_probabilities(self, texts: Sequence[str], language: str) -> list[float]:
        return [self.corpus.language_probability(text, language) for text in texts]
