"""Log-probabilities of completions and their gradient, against plain passes over whole rows and against formulas in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import ARCHITECTURES
from transformers import AutoModelForCausalLM

from dpgbench.bench import likelihood
from dpgbench.bench.grpo import _Trainer, train_policy
from dpgbench.bench.likelihood import completion_log_probs, log_probs_and_entropies
from dpgbench.metagrad.loss import padding_computed, per_example_loss
from dpgbench.worlds.models import without_noise

SINGLE = {"mixtral", "opt"}  # in float64 transformers' Mixtral has no product of experts, and its OPT turns padding into nan


def small(name: str):
    """A model of the architecture in float64, where it has one, and how near two ways of computing the same must come."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(without_noise(copy.deepcopy(ARCHITECTURES[name])), attn_implementation="eager")
    if name in SINGLE:
        return model, {"rtol": 1e-4, "atol": 2e-5}
    return model.double(), {"rtol": 1e-5, "atol": 1e-6}  # Llama's norms are float32 whatever the model is


def ragged(seed: int = 0):
    """(ids, mask, width): 15 rows, shuffled, of 12 different ones, 3 to a prompt; prompts of 2 to 5 tokens, completions of 1 to 7."""
    noise = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(1, 32, (length,), generator=noise).tolist() for length in (5, 2, 3, 4)]
    rows = [(prompts[row // 3], torch.randint(1, 32, (1 + row % 7,), generator=noise).tolist()) for row in range(12)]
    rows = [rows[place] for place in torch.randperm(12, generator=noise).tolist()] + rows[3:6]  # some twice
    ids = torch.tensor([[0] * (5 - len(p)) + p + c + [0] * (7 - len(c)) for p, c in rows])
    mask = torch.tensor([[0] * (5 - len(p)) + [1] * (len(p) + len(c)) + [0] * (7 - len(c)) for p, c in rows])
    return ids, mask, 7


def row_by_row(model, ids, mask, width):
    """The same from each row alone, unpadded, and torch's own log_softmax."""
    log_probs, entropies = torch.zeros(len(ids), width, dtype=model.dtype), torch.zeros(len(ids), width, dtype=model.dtype)
    for row, kept in enumerate(mask.bool()):
        tokens, count = ids[row][kept], int(mask[row, -width:].sum())
        logs = model(input_ids=tokens[None]).logits[0, -count - 1 : -1].log_softmax(-1)
        log_probs[row, :count] = logs.gather(1, tokens[-count:, None])[:, 0]
        entropies[row, :count] = -(logs.exp() * logs).sum(1)
    return log_probs, entropies


def gradients(model, function, weights):
    """Of a sum of both outputs, weighted token by token, to every parameter."""
    model.zero_grad()
    log_probs, entropies = function()
    ((log_probs + 0.3 * entropies) * weights).sum().backward()
    return log_probs.detach(), entropies.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("rows_together", [64, 3], ids=["one pass", "by length"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_completions_that_share_a_reading_of_their_prompt(name, rows_together, monkeypatch):
    """Values and gradients on nine architectures, the gradient through the shared keys and values among them."""
    monkeypatch.setattr(likelihood, "ROWS_TOGETHER", rows_together)
    model, near = small(name)
    model.train()
    ids, mask, width = ragged()
    weights = torch.randn(len(ids), width, dtype=model.dtype) * mask[:, -width:]
    ours = gradients(model, lambda: completion_log_probs(model, ids, mask, width), weights)
    plain = gradients(model, lambda: row_by_row(model, ids, mask, width), weights)
    assert torch.allclose(ours[0], plain[0], **near) and torch.allclose(ours[1], plain[1], **near)
    for parameter, gradient in plain[2].items():
        assert torch.allclose(ours[2][parameter], gradient, **near), parameter


def test_the_formulas_of_log_probability_and_entropy():
    """Values against log_softmax, gradients against finite differences, each alone and both together; in float64."""
    torch.manual_seed(0)
    logits, targets = (3 * torch.randn(9, 11, dtype=torch.float64)).requires_grad_(), torch.arange(9)
    log_probs, entropies = log_probs_and_entropies(logits, targets)
    logs = logits.detach().log_softmax(-1)
    assert torch.allclose(log_probs, logs[targets, targets], atol=1e-12)
    assert torch.allclose(entropies, -(logs.exp() * logs).sum(1), atol=1e-12)
    for parts in (slice(0, 1), slice(1, 2), slice(0, 2)):
        assert torch.autograd.gradcheck(lambda z, parts=parts: log_probs_and_entropies(z, targets)[parts], (logits,))


SLOW = [("policy.lora.rank=2",), ("policy.micro_batch=4",), ("minibatch=8",)]


@pytest.mark.parametrize("words", [("entropy_bonus=0.05",), *(pytest.param(words, marks=pytest.mark.slow) for words in SLOW)])
def test_an_update_is_trls(bench, monkeypatch, words):
    """Rollouts, entropies and gradient norms of two steps are those of TRL's own pass over whole rows; so they are from tiles."""
    outcomes = []
    share = _Trainer._shares_prompts
    for shares, kept in ((share, 1 << 26), (share, 0), (lambda self, length: False, 0)):
        monkeypatch.setattr(_Trainer, "_shares_prompts", shares)
        monkeypatch.setattr(likelihood, "LOGITS_AT_MOST", kept)
        work = bench("seed=3", *words)
        for _ in train_policy(work, lambda rollouts: [float(len(text)) for text in rollouts.completions]):
            pass
        outcomes.append((work.lines, dict(work.meter.flops)))
    (*ours, (theirs, charged)) = outcomes
    assert len(theirs) == 2 and theirs[0]["gradient_norm"] > 0
    for lines, flops in ours:
        assert [line["rollouts"]["texts"] for line in lines] == [line["rollouts"]["texts"] for line in theirs] and flops == charged
        for name in ("entropy", "gradient_norm"):
            assert [line[name] for line in lines] == pytest.approx([line[name] for line in theirs], rel=1e-4)


@pytest.mark.parametrize("reduction", ["length", "tokens"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_loss_without_its_padding(name, reduction):
    """96 examples, some the same, of 0 to 9 labels in a batch 14 wide, taken by length: losses and gradients of the padded batch."""
    model, near = small(name)
    params = dict(model.eval().named_parameters())
    ids = torch.randint(0, 32, (96, 14))
    labels = torch.where(torch.arange(14) <= torch.randint(0, 10, (96, 1)), ids, -100)
    ids[::5], labels[::5] = ids[1].clone(), labels[1].clone()
    weights = torch.randn(96, dtype=model.dtype)

    def losses():
        loss = per_example_loss(model, params, ids, labels, reduction)
        return loss.detach(), torch.autograd.grad((loss * weights).sum(), list(params.values()), materialize_grads=True)

    ours = losses()
    with padding_computed():
        padded = losses()
    assert torch.allclose(ours[0], padded[0], **near) and not ours[0].isnan().any()
    for left, right in zip(ours[1], padded[1], strict=True):
        assert torch.allclose(left, right, **near)
