"""Supervised fine-tuning of the generator on completions it should write more often: ordinary likelihood, completions only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from dpgbench.core.labels import IGNORED_LABEL
from dpgbench.core.plugin_types import Prompt
from dpgbench.worlds.adapters import trained
from dpgbench.worlds.generator import Generator

MAX_GRAD_NORM = 1.0  # as in the policy's update


def finetune(
    generator: Generator, prompts: Sequence[Prompt], completions: Sequence[str], *, lr: float, epochs: int, batch: int, seed: int
) -> tuple[list[float], list[tuple[int, int]]]:
    """`epochs` passes over the pairs in a seeded order, one AdamW step per `batch` of them, minimising

        -1/K sum_k log pi_theta(x_k | q, x_<k),     over the K tokens of the batch's completions, ends included.

    Changes the generator's trained weights; no weight decay, no dropout, gradients clipped at 1. Returns each epoch's mean loss (nats a
    token, each batch before its step) and the (texts, length) of every step, for the accounts. Cost: 3F of the generator on prompts and
    completions, per epoch; less where adapters are what is trained.
    """
    order_of = torch.Generator().manual_seed(seed)
    weights = list(trained(generator.model).values())
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    was_training, losses, shapes = generator.model.training, [], []
    generator.model.eval()
    for _ in range(epochs):
        total, tokens = 0.0, 0
        for rows in torch.randperm(len(prompts), generator=order_of).split(batch):
            inputs, labels = pairs(generator, [prompts[row] for row in rows], [completions[row] for row in rows])
            with generator.products():
                logits = generator.model(**inputs).logits[:, :-1]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # a bfloat16 generator's loss needs more digits
            loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            count = int((labels != IGNORED_LABEL).sum())
            optimizer.zero_grad()
            (loss / max(1, count)).backward()
            clip_grad_norm_(weights, MAX_GRAD_NORM)
            optimizer.step()
            total, tokens = total + loss.item(), tokens + count
            shapes.append(tuple(labels.shape))
        losses.append(total / max(1, tokens))
    optimizer.zero_grad()
    generator.model.train(was_training)
    return losses, shapes


def pairs(generator: Generator, prompts: Sequence[Prompt], completions: Sequence[str]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Prompts, padded on the left as for sampling, and completions after them, padded on the right: (model inputs, labels), each (B, L).

    Labels are the completions' tokens, -100 elsewhere. A completion ends as the generator's own do unless it fills
    `max_completion_tokens`: it was cut there.
    """
    tokenizer, room, end = generator.tokenizer, generator.max_completion_tokens, generator.own_end
    asked = generator.tokenize(prompts)
    written = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in completions]
    written = [torch.tensor([*tokens, end][:room]) for tokens in written]
    labels = torch.nn.utils.rnn.pad_sequence(written, batch_first=True, padding_value=IGNORED_LABEL)
    ids = torch.cat([asked["input_ids"], labels.masked_fill(labels == IGNORED_LABEL, tokenizer.pad_token_id)], dim=1)
    mask = torch.cat([asked["attention_mask"], (labels != IGNORED_LABEL).long()], dim=1)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    labels = torch.cat([torch.full_like(asked["input_ids"], IGNORED_LABEL), labels], dim=1)
    device = generator.model.device
    return {name: tensor.to(device) for name, tensor in inputs.items()}, labels.to(device)
