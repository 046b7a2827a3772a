"""The gradient that an update of the policy would follow, for completions and advantages that are given; nothing is updated.

    g = sum_i sum_t c_it A_it grad_theta log pi_theta(x_it | q_i, x_i<t)

c_it is what the policy's `loss_type` divides by (TRL's GRPO losses at the policy that drew the completions, where every probability ratio
is 1): `dapo` and `bnpo` 1 / (the batch's completion tokens), `grpo` 1 / (N len_i), `dr_grpo` 1 / (N longest completion). Here 1 stands
for no divisor at all, with which A_i = Phi(all texts) - Phi(all but x_i) makes g an unbiased estimate of grad_theta E Phi: what the
target learns without x_i does not depend on x_i, so subtracting it costs noise and no bias (REINFORCE with a baseline). An entropy bonus,
the clipping of the gradient's norm and AdamW come after this gradient and are not part of it.

Shape suffixes: N completions, R different ones in a pass, L tokens of the longest, V vocabulary, K ways of paying, P parameters, S entries
of a sketch.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpgbench.bench.token_credit import alive
from dpgbench.bench.workbench import Workbench
from dpgbench.core.plugin_types import Prompt
from dpgbench.core.seeds import derive, torch_seeded
from dpgbench.core.settings import LOSS_TYPES
from dpgbench.worlds.adapters import trained
from dpgbench.worlds.generator import Generator
from dpgbench.worlds.models import positions_from_the_mask

UNDIVIDED = "undivided"
SKETCH = 2**20  # entries; smaller gradients are kept as they are
ROWS_TOGETHER = 128  # in one forward pass, of completions of nearly one length: more are no faster, and bring more padding


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
    LOSS_TYPES or UNDIVIDED. at_once: completions in one forward pass at most; it changes nothing beyond rounding.
    Cost: F of the generator on prompts and completions, and 2F for each way of paying. A completion that a prompt has several times is read
    once and paid the sum.
    Raises ValueError for another loss type and for advantages of another shape.
    """
    parameters, count = list(trained(generator.model).values()), len(completions.ids)
    lengths = [len(ids) for ids in completions.ids]
    divisors = [_divisors(loss_type, lengths, generator.max_completion_tokens) for _, loss_type in paid]
    width = max(lengths)
    for given, _ in paid:
        if given.shape[0] != count or given.ndim > 2 or (given.ndim == 2 and given.shape[1] < width):
            raise ValueError(f"advantages have shape {tuple(given.shape)}: it must be ({count},) or ({count}, {width}); one per completion")
    written_NL = alive(completions.ids, width)
    factors = []  # of each way, c_it A_it, (N, L)
    for (given, _), divisors_N in zip(paid, divisors, strict=True):
        per_token = given[:, None] if given.ndim == 1 else given[:, :width]
        factors.append(written_NL * per_token.double().cpu() / divisors_N[:, None])
    total_KP = torch.zeros(len(paid), sum(parameter.numel() for parameter in parameters), dtype=torch.float64)
    was_training = generator.model.training
    generator.model.eval()
    try:
        with positions_from_the_mask(generator.model):
            for piece in _pieces(generator, completions, min(at_once or count, ROWS_TOGETHER)):
                logps_RL = _log_probabilities(generator, completions.only([rows[0] for rows in piece]))
                for number, (factors_NL, total_P) in enumerate(zip(factors, total_KP, strict=True)):
                    summed = torch.stack([factors_NL[rows].sum(0) for rows in piece])[:, : logps_RL.shape[1]]
                    parts = torch.autograd.grad(
                        (summed.to(logps_RL.device) * logps_RL).sum(), parameters,
                        retain_graph=number + 1 < len(paid), allow_unused=True, materialize_grads=True,
                    )  # fmt: skip
                    total_P += torch.cat([part.flatten() for part in parts]).double().cpu()
    finally:
        generator.model.train(was_training)
    return list(total_KP)


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


def _pieces(generator: Generator, completions: Completions, size: int) -> list[list[list[int]]]:
    """The rows of each different completion of a prompt, those of nearly one length together, `size` completions at a time."""
    rows: dict[tuple, list[int]] = {}
    asked = generator.tokenize(completions.prompts)["input_ids"].tolist()
    for row, (prompt, ids) in enumerate(zip(asked, completions.ids, strict=True)):
        rows.setdefault((*prompt, *ids), []).append(row)
    shortest_first = sorted(rows.values(), key=lambda same: len(completions.ids[same[0]]))
    return [shortest_first[start : start + size] for start in range(0, len(shortest_first), size)]


def _log_probabilities(generator: Generator, completions: Completions) -> Tensor:
    """log pi of every completion token, (R, L) of the longest of these; of pads it says nothing."""
    model, ids, width = generator.model, completions.ids, max(map(len, completions.ids))
    asked = generator.tokenize(completions.prompts)
    pad = generator.tokenizer.pad_token_id
    written_RL = torch.tensor([[*row, *[pad] * (width - len(row))] for row in ids])
    inputs = torch.cat([asked["input_ids"], written_RL], 1).to(model.device)
    mask = torch.cat([asked["attention_mask"], alive(ids, width).long()], 1).to(model.device)
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model  # without adapters around it
    takes = inspect.signature(whole.forward).parameters
    only = {"logits_to_keep": width + 1} if "logits_to_keep" in takes else {}  # a prompt's are not needed
    with torch.enable_grad(), generator.products():
        logits_RLV = model(input_ids=inputs, attention_mask=mask, use_cache=False, **only).logits[:, -width - 1 : -1]
    logps_RLV = logits_RLV.float().log_softmax(-1) if logits_RLV.dtype != torch.float64 else logits_RLV.log_softmax(-1)
    return logps_RLV.gather(2, written_RL.to(model.device)[:, :, None])[:, :, 0]
