"""What each method computes, against a value known some other way; that it runs on every task is test_tasks_and_methods."""

from __future__ import annotations

import pytest
import torch

from dpgbench import config
from dpgbench.errors import UserError


def linear(model):
    """A metric that is linear in all parameters, so that its gradient is the same wherever it is taken."""
    generator = torch.Generator().manual_seed(0)
    slopes = {name: torch.randn(p.shape, generator=generator).to(p) for name, p in model.named_parameters()}
    return lambda model: 1e-3 * sum((p * slopes[name]).sum() for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=influence", "estimator=dots"], "method.estimator=dots: no such estimator; did you mean 'dot'? choose from: adam, dot"),
    ],
)
def test_bad_options_are_one_line(words, message):
    with pytest.raises(UserError) as caught:
        config.read(words, sweep=False)
    assert str(caught.value) == message


# ---- influence


def test_dot_is_the_metagradient_of_one_sgd_step(bench):
    """T=1, SGD, a linear metric: tau_i = (lr / N) <-grad l_i, grad Phi>, for the same texts."""
    work = bench("task=l2_norm", "optimizer=sgd", "training.lr=0.1", "inner_steps=1")
    work.task.signal = linear(work.world.target.double())
    texts = work.sample(work.prompts(12, "a test"), "a test")
    dots, exact = work.influences(texts), work.metagradients(texts).rewards
    assert dots.std() > 0 and torch.allclose(exact, dots * 0.1 / 12, rtol=1e-6, atol=1e-6 * exact.abs().max().item())
    aware = work.influences(texts, optimizer_aware=True)
    assert torch.allclose(aware, dots * 0.1, rtol=1e-6, atol=1e-6 * aware.abs().max().item())


def test_adam_is_the_slope_of_the_one_step_utility(bench):
    """With a linear metric, Phi after AdamW's step on one text alone is Phi(phi_0) + adam, up to the decay that all texts share."""
    work = bench("task=l2_norm", "eps_root=1e-6", "weight_decay=1e-4")
    work.task.signal = linear(work.world.target.double())
    texts = work.sample(work.prompts(6, "a test"), "a test")
    gained = torch.tensor(work.one_step_utilities(texts), dtype=torch.float64)
    estimated = work.influences(texts, optimizer_aware=True)
    assert torch.allclose(gained - gained.mean(), estimated - estimated.mean(), rtol=1e-6, atol=1e-6 * estimated.std().item())


def test_influences_are_charged_three_forwards_and_the_gradient_of_phi_once(bench):
    from dpgbench.compute import forward_flops

    work = bench("task=language")
    texts = work.sample(work.prompts(6, "a test"), "a test")
    spent = []
    for aware in (False, False, True):
        before = work.meter.flops["scoring"]
        work.influences(texts, optimizer_aware=aware)
        spent.append(work.meter.flops["scoring"] - before)
    forward = forward_flops(work.world.target, 6, work.spec.training.max_length)
    assert spent[1] == spent[2] == pytest.approx(3 * forward) and spent[0] > spent[1]
