"""Sampling from a causal LM with a key-value cache: the draws of transformers' `generate`, without the work that no text needs.

Three things are left out. The prompts of a group are one prompt, so each distinct one is read once and its keys and values are repeated.
Rows that have ended leave the batch. Only the last position goes through the LM head. And one thing is kept: `generate` draws a column of
tokens by `torch.multinomial`, an exponential race, argmax p_v / e_v with e_v ~ Exp(1), whose noise belongs to all rows of the batch, ended
ones too. It is drawn for all of them here as well, so a seed gives the same texts, but for probabilities that differ in their last bits.

Shape suffixes: B rows, P tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

LEAVING = 8  # ended rows leave once they are one in so many: each time, the keys and values that stay are copied
OWN_WAYS = ("generate", "_sample", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_prefill")


def keeps_plain_cache(model: nn.Module) -> bool:
    """Whether keys and values of all tokens before are all that the model needs to go on from, and `generate` treats it as any other.

    Not so: encoder-decoders, state spaces, sliding windows, layers that share keys, and architectures that prepare inputs in their own way.
    """
    model = without_adapters(model)
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder or model._is_stateful:
        return False
    if any(getattr(type(model), way, None) is not getattr(GenerationMixin, way) for way in OWN_WAYS):
        return False
    if not {"past_key_values", "attention_mask", "use_cache"} <= arguments(model):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def without_adapters(model: nn.Module) -> nn.Module:
    """The model inside, whose layers have the adapters in them."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def padded(ids: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows of one length, padded on the left, and their mask: both (B, P) long."""
    longest = max(map(len, ids))
    rows = [[pad] * (longest - len(row)) + list(row) for row in ids]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in ids]
    return torch.tensor(rows), torch.tensor(mask)


class _RoomyLayer(DynamicLayer):
    """Keys and values in a room of their final size: a token is written into it, where transformers would copy all of them."""

    def __init__(self, room: int):
        super().__init__()
        self.room, self.length = room, 0

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values = (self._emptied(states, len(states)) for states in (key_states, value_states))
        start, self.length = self.length, self.length + key_states.shape[-2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def select(self, rows_B: Tensor) -> None:
        """Go on with these rows, some perhaps several times."""
        for name in ("keys", "values"):
            before = getattr(self, name)
            after = self._emptied(before, len(rows_B))
            after[:, :, : self.length] = before[:, :, : self.length].index_select(0, rows_B)
            setattr(self, name, after)

    def _emptied(self, like: Tensor, rows: int) -> Tensor:
        return like.new_empty(rows, like.shape[1], self.room, like.shape[3])


@torch.no_grad()
def write(model: nn.Module, prompts: Sequence[Sequence[int]], ends: Sequence[int], pad: int, most: int) -> list[list[int]]:
    """One completion per prompt at temperature 1, of `most` tokens at most, up to and with its end; from torch's default generator.

    For a model in evaluation mode that `keeps_plain_cache`. Cost: `Shape.sampling_flops` at most.
    """
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    device, rows = model.device, len(prompts)
    ids, mask = (tensor.to(device) for tensor in padded(list(numbers), pad))
    of_prompt_B = torch.tensor([numbers[tuple(prompt)] for prompt in prompts], device=device)
    end_tokens = torch.tensor(sorted(ends), device=device)
    cache = Cache(layers=[_RoomyLayer(ids.shape[1] + most - 1) for _ in DynamicCache(config=without_adapters(model).config).layers])
    known = arguments(without_adapters(model))

    def next_logits(ids: Tensor, mask: Tensor) -> Tensor:
        """Of the token after the last of `ids`, which follow what is in the cache; the mask covers both. (B, V) float32."""
        more = {"position_ids": positions(mask)[:, -ids.shape[1] :]} if "position_ids" in known else {}
        if "logits_to_keep" in known:
            more["logits_to_keep"] = 1
        return model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more).logits[:, -1].float()

    written = torch.full((rows, most), pad, device=device)
    logits_BV = next_logits(ids, mask)[of_prompt_B]
    mask = mask[of_prompt_B]
    for layer in cache.layers:
        layer.select(of_prompt_B)
    here_B = torch.arange(rows, device=device)  # the rows that are still computed
    going_B = torch.ones(rows, dtype=torch.bool, device=device)  # and of those, the ones that have not ended
    for column in range(most):
        tokens_B = race(logits_BV.softmax(-1), here_B, rows)
        written[here_B[going_B], column] = tokens_B[going_B]
        going_B = going_B & (tokens_B[:, None] != end_tokens).all(1)
        left = int(going_B.sum())
        if not left or column + 1 == most:
            break
        if left * LEAVING <= len(here_B) * (LEAVING - 1):
            staying = going_B.nonzero()[:, 0]
            here_B, tokens_B, mask, going_B = here_B[staying], tokens_B[staying], mask[staying], going_B[staying]
            for layer in cache.layers:
                layer.select(staying)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits_BV = next_logits(tokens_B[:, None], mask)
    return cut(written.tolist(), set(ends))


def cut(rows: Sequence[list[int]], ends: set[int]) -> list[list[int]]:
    """Each row up to and with its first end."""
    lengths = [next((place + 1 for place, token in enumerate(row) if token in ends), len(row)) for row in rows]
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def positions(mask: Tensor) -> Tensor:
    """Of every token, counted from its row's first; as `generate` counts them."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def arguments(model: nn.Module) -> set[str]:
    """What its forward pass can be told, by name."""
    return set(inspect.signature(model.forward).parameters)


def race(p_BV: Tensor, here_B: Tensor, rows: int) -> Tensor:
    """A token for each row that is here, from noise for all `rows`: what `torch.multinomial(p, 1)` would draw, to the bit. (B,) long.

    On a CPU most of a draw is the logarithm in -log(1 - u). torch takes it in float64, of a u from the stream of `uniform_`, so only the
    rows that are here need one.
    """
    if p_BV.device.type == "cpu":
        uniform = torch.empty(rows, p_BV.shape[1], dtype=torch.float64).uniform_()
        noise_BV = (uniform if len(here_B) == rows else uniform[here_B]).neg_().log1p_().neg_().float()
    else:
        noise_BV = p_BV.new_empty(rows, p_BV.shape[1]).exponential_()[here_B]
    return (p_BV / noise_BV).argmax(1)
