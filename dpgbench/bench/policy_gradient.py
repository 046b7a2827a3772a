"""The gradient that an update of the policy would follow, for completions and advantages that are given; nothing is updated.

    g = sum_i sum_t c_it A_it grad_theta log pi_theta(x_it | q_i, x_i<t)

c_it is what the policy's `loss_type` divides by (TRL's GRPO losses at the policy that drew the completions, where every probability ratio
is 1): `dapo` and `bnpo` 1 / (the batch's completion tokens), `grpo` 1 / (N len_i), `dr_grpo` 1 / (N longest completion). Here 1 stands
for no divisor at all, with which A_i = Phi(all texts) - Phi(all but x_i) makes g an unbiased estimate of grad_theta E Phi: what the
target learns without x_i does not depend on x_i, so subtracting it costs noise and no bias (REINFORCE with a baseline). An entropy bonus,
the clipping of the gradient's norm and AdamW come after this gradient and are not part of it.

Shape suffixes: N completions, L tokens of the longest, P parameters, S entries of a sketch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpgbench.bench.workbench import Workbench
from dpgbench.core.plugin_types import Prompt
from dpgbench.core.seeds import derive, torch_seeded
from dpgbench.core.settings import LOSS_TYPES
from dpgbench.worlds.adapters import trained
from dpgbench.worlds.generator import Generator
from dpgbench.worlds.models import positions_from_the_mask

UNDIVIDED = "undivided"
SKETCH = 2**20  # entries; smaller gradients are kept as they are


@dataclass(frozen=True)
class Completions:
    """A policy step's completions as tokens and as texts; those of one prompt are adjacent."""

    prompts: list[Prompt]
    ids: list[list[int]]
    """Each with the token that ends it, if it has one."""
    texts: list[str]

    def only(self, rows: Sequence[int]) -> Completions:
        """Those at `rows`."""
        return Completions([self.prompts[row] for row in rows], [self.ids[row] for row in rows], [self.texts[row] for row in rows])


def draw_completions(bench: Workbench, step: int) -> Completions:
    """What a run of `grpo.train_policy` would draw at that step if its policy were the generator as it is now: same prompts, same seeds.

    Cost: sampling, charged. (vLLM's rollouts have seeds of their own; here transformers draws, from the same distribution.)
    """
    policy, generator = bench.options.policy, bench.generator
    asked = bench.prompts(policy.completions // policy.group_size, "policy", step)
    prompts = [prompt for prompt in asked for _ in range(policy.group_size)]
    prompt_ids, seed = generator.token_ids(prompts), bench.seed("rollouts")
    ids: list[list[int]] = []
    size = policy.get("rollout_batch")
    for number, start in enumerate(range(0, len(prompts), size or len(prompts))):
        part = prompt_ids[start : start + (size or len(prompts))]
        update = step * (policy.completions // (policy.minibatch or policy.completions))  # the trainer counts updates, not steps
        with torch_seeded(derive(seed, update) if size is None else derive(seed, update, "part", number)):
            written = generator.write(part)
        bench.charge_generation(len(part), max(map(len, part)), max(map(len, written)))
        ids += written
    return Completions(prompts, ids, generator.texts_of(ids))


def policy_gradients(
    generator: Generator, completions: Completions, paid: Sequence[tuple[Tensor, str]], at_once: int | None = None
) -> list[Tensor]:
    """g for several ways of paying the same completions: (P,) float64 each, over the trained parameters in their order.

    paid: advantages, (N,), one per completion, or (N, L), one per token, in any unit, and the loss type that divides them, one of
    LOSS_TYPES or UNDIVIDED. at_once: completions in one forward pass, None: all; it changes nothing beyond rounding.
    Cost: F of the generator on prompts and completions, and 2F for each way of paying.
    Raises ValueError for another loss type and for advantages of another shape.
    """
    parameters, count = list(trained(generator.model).values()), len(completions.ids)
    lengths = [len(ids) for ids in completions.ids]
    divisors = [_divisors(loss_type, lengths, generator.max_completion_tokens) for _, loss_type in paid]
    width = max(lengths)
    for given, _ in paid:
        if given.shape[0] != count or given.ndim > 2 or (given.ndim == 2 and given.shape[1] < width):
            raise ValueError(f"advantages have shape {tuple(given.shape)}: it must be ({count},) or ({count}, {width}); one per completion")
    totals = [torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=torch.float64) for _ in paid]
    was_training = generator.model.training
    generator.model.eval()
    try:
        with positions_from_the_mask(generator.model):
            for start in range(0, count, at_once or count):
                rows = slice(start, start + (at_once or count))
                logps_NL, kept_NL = _log_probabilities(generator, completions.prompts[rows], completions.ids[rows])
                for number, ((given, _), divisors_N, total) in enumerate(zip(paid, divisors, totals, strict=True)):
                    per_token = given[rows, None] if given.ndim == 1 else given[rows, : logps_NL.shape[1]]
                    factors_NL = kept_NL * (per_token.double() / divisors_N[rows, None]).to(kept_NL.device)
                    parts = torch.autograd.grad(
                        (factors_NL * logps_NL).sum(), parameters,
                        retain_graph=number + 1 < len(paid), allow_unused=True, materialize_grads=True,
                    )  # fmt: skip
                    total += torch.cat([part.flatten() for part in parts]).double().cpu()
    finally:
        generator.model.train(was_training)
    return totals


def sketch(gradient_P: Tensor, seed: int) -> Tensor:
    """A gradient in SKETCH entries with inner products that are right on average: sums of its pieces under random signs.

    E <sketch(a), sketch(b)> = <a, b> over the signs, which depend on `seed` and the length alone, with an error of about
    |a| |b| / sqrt(SKETCH). A gradient of SKETCH entries or fewer is returned as it is, and its products are exact.
    """
    if len(gradient_P) <= SKETCH:
        return gradient_P
    generator = torch.Generator().manual_seed(seed % 2**63)
    total_S = torch.zeros(SKETCH, dtype=gradient_P.dtype)
    for piece in gradient_P.split(SKETCH):
        signs_S = torch.randint(0, 2, (SKETCH,), generator=generator, dtype=torch.int8) * 2 - 1
        total_S[: len(piece)] += piece * signs_S[: len(piece)]
    return total_S


def _divisors(loss_type: str, lengths: Sequence[int], longest: int) -> Tensor:
    """(N,): what each completion's tokens are divided by."""
    lengths_N, count = torch.tensor(lengths, dtype=torch.float64), len(lengths)
    if loss_type in ("dapo", "bnpo"):
        return lengths_N.sum().expand(count)
    if loss_type == "grpo":
        return count * lengths_N
    if loss_type == "dr_grpo":
        return torch.full((count,), float(count * longest), dtype=torch.float64)
    if loss_type == UNDIVIDED:
        return torch.ones(count, dtype=torch.float64)
    raise ValueError(f"loss_type={loss_type!r}: its gradient is not written down here; pass one of {', '.join((*LOSS_TYPES, UNDIVIDED))}")


def _log_probabilities(generator: Generator, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """log pi of every completion token, (N, L), and 1 where there is one, else 0."""
    device, width = generator.model.device, max(map(len, ids))
    asked = generator.tokenize(prompts)
    pad = generator.tokenizer.pad_token_id
    written_NL = torch.tensor([[*row, *[pad] * (width - len(row))] for row in ids])
    kept_NL = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    inputs = torch.cat([asked["input_ids"], written_NL], 1).to(device)
    mask = torch.cat([asked["attention_mask"], kept_NL], 1).to(device)
    with torch.enable_grad(), generator.products():
        logits_NLV = generator.model(input_ids=inputs, attention_mask=mask, use_cache=False).logits[:, -width - 1 : -1]
    logps_NL = logits_NLV.float().log_softmax(-1) if logits_NLV.dtype != torch.float64 else logits_NLV.log_softmax(-1)
    return logps_NL.gather(2, written_NL.to(device)[:, :, None])[:, :, 0], kept_NL.to(device, torch.float64)
