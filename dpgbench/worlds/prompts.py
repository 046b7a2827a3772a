"""How a passage becomes a prompt of one generator: a chat where its tokenizer has a template for one, plain text otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpgbench.core.errors import UserError
from dpgbench.core.plugin_types import Prompt
from dpgbench.core.settings import Scale

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The instruction of the DPG paper (arXiv 2604.08423): the goal of a task is nowhere in it.
REPHRASE = "Help read the following article and then rephrase it in different terms. Answer with the rephrased article only.\n\n{passage}"
PASSAGE = "{passage}"
CUE = "\n\nRephrased article:\n"  # ours: after which a model without a chat template goes on
SHORTEST = 16  # tokens of a passage that a limit must leave room for; ours


class Wording:
    """Prompts of at most `max_tokens`, the chat template's own and the scale's instruction included; a longer passage loses its end.

    `request` is what is asked, with {passage} where the passage goes. Without a tokenizer prompts are chats of any length.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_tokens: int | None = None,
        instruction: str | None = None,
        request: str | None = None,
    ):
        self.tokenizer, self.room, self.taken, self.request = tokenizer, None, 0, request or REPHRASE
        self.chat = tokenizer is None or bool(tokenizer.chat_template)
        if tokenizer is None:
            return
        empty = self._prompt("")
        self.taken = self._length(empty if instruction is None else self.instruct(empty, instruction))
        """Tokens of a prompt without its passage."""
        if max_tokens is not None:
            self.room = max_tokens - self.taken
            if self.room < SHORTEST:
                raise UserError(
                    f"scale.max_prompt_tokens={max_tokens}: the instruction alone takes {self.taken}, and a passage should have {SHORTEST} "
                    f"or more; write max_prompt_tokens={self.taken + 10 * SHORTEST}, or null for no limit"
                )

    @classmethod
    def of(cls, scale: Scale, tokenizer: PreTrainedTokenizerBase | None) -> Wording:
        """As a scale sets it, for its generator's tokenizer."""
        return cls(tokenizer, scale.get("max_prompt_tokens"), scale.get("instruction"), scale.get("wording"))

    def prompt(self, passage: str) -> Prompt:
        """The passage, cut if it must be, with the instruction to rephrase it."""
        return self._prompt(passage if self.room is None else self._cut(passage))

    def instruct(self, prompt: Prompt, instruction: str) -> Prompt:
        """`prompt` with `instruction` said after it."""
        if isinstance(prompt, str):
            return f"{prompt.removesuffix(CUE)}\n\n{instruction}{CUE}"
        *before, last = prompt
        return [*before, {**last, "content": f"{last['content']}\n\n{instruction}"}]

    def _prompt(self, passage: str) -> Prompt:
        said = self.request.replace(PASSAGE, passage)
        return [{"role": "user", "content": said}] if self.chat else f"{said}{CUE}"

    def _cut(self, passage: str) -> str:
        """As much of a passage's beginning as there is room for. Tokens may join across the cut, so it is measured once more."""
        passage = passage[: 64 * self.room]  # far more than any tokenizer puts into so many tokens: articles may be books
        tokens = self._tokens(passage)
        if len(tokens) <= self.room - 2:  # a passage's first and last token may be others inside the prompt
            return passage
        limit = self.room + self._length(self._prompt(""))
        for kept in range(self.room, 0, -1):
            shorter = self.tokenizer.decode(tokens[:kept]).strip()
            if self._length(self._prompt(shorter)) <= limit:
                return shorter
        return ""

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _length(self, prompt: Prompt) -> int:
        """In tokens, as the generator reads it."""
        return lengths(self.tokenizer, [prompt])[0]


def lengths(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[int]:
    """Of each prompt in tokens, as a generator reads it, through its chat template where they are messages."""
    if not prompts:
        return []
    if isinstance(prompts[0], str):
        return list(map(len, tokenizer(list(prompts), verbose=False)["input_ids"]))
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "tokenizer_kwargs": {"verbose": False}}
    return list(map(len, tokenizer.apply_chat_template(list(prompts), **how)["input_ids"]))


class Room:
    """What a generator reads at most, a prompt and its completion together: no longer prompt is ever handed to it.

    Beyond its learned positions a model fails in the middle of a cell, and beyond those that rotary ones were trained on it writes badly
    without a word.
    """

    def __init__(self, scale: Scale, tokenizer: PreTrainedTokenizerBase, context: int):
        self.scale, self.tokenizer, self.context = scale, tokenizer, context
        self.most = context - scale.max_completion_tokens

    def check(self, prompts: Sequence[Prompt], before: Sequence[Prompt] | None = None) -> None:
        """Raises UserError for the longest prompt if it is too long; `before`: the same without what a method says after each."""
        found = lengths(self.tokenizer, prompts)
        longest = max(found, default=0)
        if longest > self.most:
            place = found.index(longest)
            more = 0 if before is None else longest - lengths(self.tokenizer, [before[place]])[0]
            raise self.too_long(longest, more)

    def too_long(self, tokens: int, more: int = 0) -> UserError:
        """For a prompt of so many tokens, `more` of them a method's, which `max_prompt_tokens` does not count."""
        limit = self.most - more
        free = limit - Wording(self.tokenizer, None, self.scale.get("instruction"), self.scale.get("wording")).taken
        fix = f"write max_prompt_tokens={limit}"
        if free < SHORTEST or self.scale.corpus == "phrasebook":  # whose prompts are never cut
            fix = "choose a generator that reads more, or fewer max_completion_tokens"
        said = f", {more} of them what the method says after it" if more else ""
        return UserError(
            f"scale.generator={self.scale.generator}: it reads {self.context} tokens, a completion takes "
            f"scale.max_completion_tokens={self.scale.max_completion_tokens}, and a prompt of scale.corpus={self.scale.corpus} takes "
            f"{tokens}{said}; {fix}"
        )
