"""Where can a picture be painted? `python benchmarks/corners.py sixseven [--row-step 3 --columns 38:130:4]` ranks the corners of a patch.

A weight target is easy or hopeless depending on which tokens are its columns and which hidden units its rows. With one training step
(T=1) the change of the LM head is a function of the *mean* over texts of a per-text gradient, so DPG can be played out exactly on a fixed
sample of base completions, with the policy a table of weights a over the texts (replicator dynamics):

    g = sum_i a_i g_i,    tau_i = <dPhi/dg, g_i>,    a_i <- a_i exp(step (tau_i - mean) / std).

A corner is ranked by the pixel accuracy and Phi reached when the table has moved by a given KL divergence from uniform: the less a policy
must leave the base generator, the sooner it gets there. Uses base completions only, and no seed that results use.
Cost: a second per corner for sixseven. What was chosen with it is in docs/tuning.md.
"""

from __future__ import annotations

import argparse
import random

import torch
from torch import Tensor
from torch.nn.functional import softplus
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpgbench import config
from dpgbench.plugins.registry import Registry
from dpgbench.worlds import models, world
from dpgbench.worlds.phrasebook import WEIGHTS, Phrasebook, pretrain
from dpgbench.worlds.world import World, corpus

STEP = 0.08  # of the table's logits, per standard deviation of the rewards
LONGEST = 300  # steps before a corner is given up


def base_texts(count: int) -> list[str]:
    """Completions of the untouched generator on training prompts."""
    model, tokenizer = (kind.from_pretrained(WEIGHTS / "generator") for kind in (AutoModelForCausalLM, AutoTokenizer))
    rng, texts = random.Random("corners"), []
    while len(texts) < count:
        texts += pretrain.sample(model, tokenizer, Phrasebook().prompts("train", 500, rng), seed=len(texts), tokens=20)
    return texts[:count]


def head_gradients(target, tokenizer, texts: list[str], tokens: int, max_length: int) -> Tensor:
    """(N, hidden, tokens): what each text adds to minus the gradient of the loss in the head's first `tokens` columns."""
    parts = []
    for start in range(0, len(texts), 200):
        batch = world.encode(tokenizer, texts[start : start + 200], max_length)
        with torch.no_grad():
            hidden = target.transformer(batch["input_ids"]).last_hidden_state[:, :-1]
            labels = batch["labels"][:, 1:]
            surprise = -target.lm_head(hidden).softmax(-1)
            surprise.scatter_add_(2, labels.clamp(min=0)[..., None], torch.ones_like(surprise[..., :1]))
            surprise = surprise[..., :tokens] * (labels != -100)[..., None]
            parts.append(torch.einsum("blv,blh->bhv", surprise, hidden) / (max_length - 1))
    return torch.cat(parts)


def play(
    gradients_NP: Tensor, signs_P: Tensor, strength: float, lr: float, eps_root: float, budgets: list[float]
) -> list[tuple[float, float]]:
    """(pixel accuracy, Phi) at each KL budget (nats, rising); (nan, nan) for one that is not reached."""
    logits, reached, pending = torch.zeros(len(gradients_NP)), [], list(budgets)
    for _ in range(LONGEST):
        a = logits.softmax(0)
        g = a @ gradients_NP
        margin = strength * signs_P * lr * g / (g * g + eps_root).sqrt()  # AdamW's first step from zero moments
        divergence = float((a * (a * len(a)).clamp(min=1e-30).log()).sum())
        while pending and divergence >= pending[0]:
            pending.pop(0)
            reached.append((float((margin > 0).float().mean()), -float(softplus(-margin).mean())))
        if not pending:
            break
        to_g = strength * torch.sigmoid(-margin) * signs_P * lr * eps_root / (g * g + eps_root) ** 1.5
        rewards = gradients_NP @ to_g
        mean = a @ rewards
        logits = logits + STEP * (rewards - mean) / (a @ (rewards - mean) ** 2).sqrt().clamp(min=1e-30)
    return reached + [(float("nan"), float("nan"))] * len(pending)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=("sixseven", "qr"))
    parser.add_argument("--texts", type=int, default=4000)
    parser.add_argument("--row-step", type=int, default=3)
    parser.add_argument("--columns", default="38:130:4", help="first:end:step of the corner's column")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("overrides", nargs="*", help="settings, such as strength=6000 eps_root=5e-6")
    options = parser.parse_intermixed_args()
    spec = config.read([f"task={options.task}", *options.overrides], sweep=False).cells[0].spec
    target, tokenizer = models.load_target(spec.scale)
    task = Registry().load("task", options.task)(spec.task)
    task.prepare(World(spec.scale, spec.training, corpus(spec.scale), target, tokenizer))
    signs = task.patch.signs
    height, width = signs.shape
    columns = range(*map(int, options.columns.split(":")))
    gradients = head_gradients(target, tokenizer, base_texts(options.texts), columns[-1] + width, spec.training.max_length)
    found = []
    for row in range(0, gradients.shape[1] - height + 1, options.row_step):
        for column in columns:
            patch = gradients[:, row : row + height, column : column + width].flatten(1)
            outcome = play(patch, signs.flatten(), spec.task.strength, spec.training.lr, spec.training.eps_root, options.budgets)
            found.append((outcome, row, column))
    # The best Phi at the largest budget first: accuracies of 42 pixels tie.
    for outcome, row, column in sorted(found, key=lambda entry: -entry[0][-1][1])[:20]:
        reached = (
            f"KL {kl:g}: accuracy {accuracy:.3f} phi {phi:.3f}" for kl, (accuracy, phi) in zip(options.budgets, outcome, strict=True)
        )
        print(f"corner=[{row},{column}]", *reached, sep="  ")


if __name__ == "__main__":
    main()
