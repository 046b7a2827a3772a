"""How a passage becomes a prompt of one generator: a chat where its tokenizer has a template for one, plain text otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpgbench.api import Options, Prompt
from dpgbench.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The instruction of the DPG paper (arXiv 2604.08423): the goal of a task is nowhere in it.
REPHRASE = "Help read the following article and then rephrase it in different terms. Answer with the rephrased article only.\n\n{passage}"
CUE = "\n\nRephrased article:\n"  # ours: after which a model without a chat template goes on
SHORTEST = 16  # tokens of a passage that a limit must leave room for; ours


class Wording:
    """Prompts of at most `max_tokens`, the chat template's own and the scale's instruction included; a longer passage loses its end.

    Without a tokenizer prompts are chats of any length.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None, max_tokens: int | None = None, instruction: str | None = None):
        self.tokenizer, self.room = tokenizer, None
        self.chat = tokenizer is None or bool(tokenizer.chat_template)
        if tokenizer is not None and max_tokens is not None:
            empty = self._prompt("")
            taken = self._length(empty if instruction is None else self.instruct(empty, instruction))
            self.room = max_tokens - taken
            if self.room < SHORTEST:
                raise UserError(
                    f"scale.max_prompt_tokens={max_tokens}: the instruction alone takes {taken}, and a passage should have {SHORTEST} or "
                    f"more; write max_prompt_tokens={taken + 10 * SHORTEST}, or null for no limit"
                )

    @classmethod
    def of(cls, scale: Options, tokenizer: PreTrainedTokenizerBase | None) -> Wording:
        """As a scale sets it, for its generator's tokenizer."""
        return cls(tokenizer, scale.get("max_prompt_tokens"), scale.get("instruction"))

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
        said = REPHRASE.format(passage=passage)
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
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _length(self, prompt: Prompt) -> int:
        """In tokens, as the generator reads it."""
        if isinstance(prompt, str):
            return len(self.tokenizer(prompt)["input_ids"])
        return len(self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"])
