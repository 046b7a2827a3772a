"""The generator: one way to read prompts, one distribution to write from, wherever it writes.

Rollouts, policy updates, fine-tuning, searches and deployment datasets must see the same model, or a policy is trained on another
distribution than it is deployed on. So prompts become tokens here (`token_ids`), completions are drawn here (`write`) and become texts
here (`texts_of`); `models.load_generator` puts away what a checkpoint brings along that would tell one of them from another.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from transformers import BatchEncoding, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpgbench.core.options import Options
from dpgbench.core.plugin_types import Prompt
from dpgbench.core.seeds import derive, torch_seeded
from dpgbench.worlds import adapters, decoding


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a text: the tokenizer's, and those of the model's two configurations (a chat model's end of a turn)."""
    ends = {tokenizer.eos_token_id}
    for named in (model.config.get_text_config().eos_token_id, model.generation_config and model.generation_config.eos_token_id):
        ends |= set(named if isinstance(named, list) else [named])
    return sorted(ends - {None})


@dataclass
class Generator:
    """pi_theta: a causal LM, its tokenizer, and sampling at temperature 1 from the full distribution."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_completion_tokens: int
    batch: int
    mixed: bool = False
    """Whether float32 weights are multiplied in bfloat16: a bfloat16 generator that is being trained."""

    def copy(self, max_completion_tokens: int | None = None) -> Generator:
        """The same with weights of its own, and perhaps another length: training one leaves the other as it is."""
        return replace(self, model=copy.deepcopy(self.model), max_completion_tokens=max_completion_tokens or self.max_completion_tokens)

    def adapt(self, lora: Options | None, seed: int) -> None:
        """Call before training: from here on train low-rank adapters instead of the weights, which are frozen (`adapters.adapt`).

        None: train all weights. Those of a bfloat16 model become float32 then and only its products stay bfloat16, because a small step
        is less than half the distance between two bfloat16 numbers and would be rounded away. Adapters are float32 in any case.
        """
        if lora is not None:
            self.model = adapters.adapt(self.model, lora, seed)
        elif self.model.dtype == torch.bfloat16:
            self.model, self.mixed = self.model.float(), True

    def products(self) -> AbstractContextManager:
        """What every forward pass of the model belongs into: the precision of its matrix products."""
        return torch.autocast(self.model.device.type, torch.bfloat16) if self.mixed else nullcontext()

    # ---- reading

    def token_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Each prompt as the model reads it, through the chat template where it is messages."""
        if isinstance(prompts[0], str):
            return self.tokenizer(list(prompts))["input_ids"]
        asked = self.tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True)
        return asked["input_ids"]

    def tokenize(self, prompts: Sequence[Prompt]) -> BatchEncoding:
        """`token_ids`, padded on the left: {"input_ids": (B, P) long, "attention_mask": (B, P) long}."""
        return self._padded(self.token_ids(prompts))

    def _padded(self, ids: Sequence[Sequence[int]]) -> BatchEncoding:
        rows, mask = decoding.padded(ids, self.pad)
        return BatchEncoding({"input_ids": rows, "attention_mask": mask})

    # ---- writing

    @property
    def ends(self) -> list[int]:
        """The tokens that end a completion."""
        return ends_of(self.model, self.tokenizer)

    @property
    def pad(self) -> int:
        """What stands where a row has no token: nobody reads it."""
        return self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    @property
    def own_end(self) -> int:
        """The end that the model's own answers have: what its chat template puts after one, or its tokenizer's end token.

        Many a chat model ends a turn with a token that is not its tokenizer's; taught another end, it would have to unlearn its own.
        """
        if not self.tokenizer.chat_template:
            return self.tokenizer.eos_token_id
        asked = [{"role": "user", "content": "a"}]
        chats = [[*asked, {"role": "assistant", "content": content}] for content in ("b", "b c")]
        short, long = (self.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"] for chat in chats)
        shared = next((count for count, (a, b) in enumerate(zip(reversed(short), reversed(long), strict=False)) if a != b), len(short))
        after = short[len(short) - shared :]  # what both answers are followed by
        return next((token for token in after if token in self.ends), self.tokenizer.eos_token_id)

    @torch.no_grad()
    def write(self, prompt_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """One completion per prompt in one call, from torch's default generator: tokens up to and with the end, or cut without one.

        By `decoding.write` where the model's cache is a plain one, else by transformers' `generate`; for a seed both draw the same noise.
        """
        was_training = self.model.training
        self.model.eval()  # in training mode, and with activations that are computed again, transformers keeps no keys and values
        try:
            with self.products():
                if decoding.keeps_plain_cache(self.model):
                    return decoding.write(self.model, prompt_ids, self.ends, self.pad, self.max_completion_tokens)
                return self._generated(prompt_ids)
        finally:
            self.model.train(was_training)

    def _generated(self, prompt_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """`write` for any architecture."""
        inputs = self._padded(prompt_ids).to(self.model.device)
        full = GenerationConfig(
            do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=self.max_completion_tokens,
            pad_token_id=self.pad, eos_token_id=self.ends, bos_token_id=self.tokenizer.bos_token_id,
        )  # fmt: skip
        rows = self.model.generate(**inputs, generation_config=full)[:, inputs["input_ids"].shape[1] :].tolist()
        return decoding.cut(rows, set(self.ends))

    def texts_of(self, completion_ids: Sequence[Sequence[int]]) -> list[str]:
        """Completions as `write` gives them, without their ends and without special tokens."""
        ends = set(self.ends)
        whole = [ids[:-1] if len(ids) and ids[-1] in ends else ids for ids in completion_ids]  # an end may be an ordinary token
        return self.tokenizer.batch_decode(whole, skip_special_tokens=True)

    def sample(self, prompts: Sequence[Prompt], seed: int) -> tuple[list[str], list[tuple[int, int, int]]]:
        """One completion per prompt, and the (batch, prompt length, new tokens) of each call, for the accounts.

        Each call of `batch` prompts has a seed of its own, so a text hangs on no prompts but those of its call.
        """
        texts, shapes = [], []
        for start in range(0, len(prompts), self.batch):
            asked = self.token_ids(prompts[start : start + self.batch])
            with torch_seeded(derive(seed, start)):
                written = self.write(asked)
            shapes.append((len(asked), max(map(len, asked)), max(map(len, written))))
            texts += self.texts_of(written)
        return texts, shapes
