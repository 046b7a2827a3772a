"""Formulas evaluated a block at a time, and the two hand-written second derivatives, against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_training import relative_error, tiny_batch, tiny_gpt2

from dpgbench.metagrad import fused
from dpgbench.metagrad.training import AdamW, per_example_loss


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("size", [1, fused.BLOCK, fused.BLOCK + 1, 3 * fused.BLOCK - 5])
def test_a_block_at_a_time_is_bit_for_bit_the_same(size):
    """An AdamW step and its pull-back on a tensor of many blocks are those of its pieces."""
    optimizer, names = AdamW(0.1, eps_root=0.1), ("theta", "g", "m", "v")
    whole = {name: normal(size, seed=index, dtype=torch.float32).abs() for index, name in enumerate(names)}

    def step(theta, g, m, v):
        params, state = optimizer.update({"": theta}, {"": g}, type(optimizer.init({}))({"": m}, {"": v}), 3)
        back = optimizer.vjp({"": g}, state, 3, params, state)
        return [tree[""] for tree in (params, *state, back[0], back[1], *back[2])]

    with torch.no_grad():
        together = step(*whole.values())
        pieces = zip(*(step(*part) for part in zip(*(x.split(1000) for x in whole.values()), strict=True)), strict=True)
    for one, many in zip(together, pieces, strict=True):
        assert torch.equal(one, torch.cat(many))


def test_gelu_and_its_derivatives():
    """Value, first and second derivative equal PyTorch's, also beyond one block; gradgradcheck holds."""
    x, g, u = (normal(fused.BLOCK + 100, seed=seed) for seed in range(3))
    x = (3 * x).requires_grad_()
    found = []
    for function in (fused.gelu_tanh, lambda x: F.gelu(x, approximate="tanh")):
        g_leaf = g.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(x), x, g_leaf, create_graph=True)
        found.append([function(x), first, *torch.autograd.grad(first, [x, g_leaf], u)])
    for ours, theirs in zip(*found, strict=True):
        assert relative_error(ours, theirs) < 1e-12
    small = normal(5, 3).requires_grad_()
    assert torch.autograd.gradcheck(fused.gelu_tanh, small) and torch.autograd.gradgradcheck(fused.gelu_tanh, small)


def test_cross_entropy_and_its_derivatives():
    """Ignored rows included: value, gradient and both second-order products equal PyTorch's; gradgradcheck holds."""
    vocabulary = 3 * fused.BLOCK // 40
    logits, targets = (2 * normal(100, vocabulary)).requires_grad_(), torch.arange(100) % 7
    targets[::3] = -100
    g, u = normal(100, seed=1), normal(100, vocabulary, seed=2)
    found = []
    for function in (lambda x: fused.cross_entropy(x, targets, -100), lambda x: F.cross_entropy(x, targets, reduction="none")):
        g_leaf = g.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(logits), logits, g_leaf, create_graph=True)
        second = torch.autograd.grad(first, [logits, g_leaf], u, retain_graph=True)
        found.append([function(logits), first, *second, *torch.autograd.grad(first, g_leaf, u)])
    for ours, theirs in zip(*found, strict=True):
        assert relative_error(ours, theirs) < 1e-12
    small, few = normal(4, 5).requires_grad_(), torch.tensor([1, -100, 0, 4])
    assert torch.autograd.gradcheck(lambda x: fused.cross_entropy(x, few, -100), small)
    assert torch.autograd.gradgradcheck(lambda x: fused.cross_entropy(x, few, -100), small)


def test_the_model_gets_its_activations_back():
    """The faster GELU is in place only while a loss is computed, and changes it by rounding alone."""
    model, batch = tiny_gpt2(), tiny_batch()
    ours = per_example_loss(model, {}, **batch)
    assert all("forward" not in vars(module) for module in model.modules())
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].transpose(1, 2)
    theirs = F.cross_entropy(logits, batch["labels"][:, 1:], reduction="none").sum(1) / (batch["labels"].shape[1] - 1)
    assert relative_error(ours, theirs) < 1e-13
