"""The ablations of dpg's reward, and the oracle that scales the plots."""

from __future__ import annotations

import pytest
import torch

from dpgbench import config
from dpgbench.core.errors import UserError
from dpgbench.metagrad import ascend
from dpgbench.metagrad.training import SGD, AdamW
from dpgbench.plugins.registry import Registry


def rewards_of_a_step(work):
    """What the method named in the words pays in its first step, and for which texts."""
    snapshots = Registry().load("method", work.spec.method.name)(work.options).run(work)
    next(snapshots), next(snapshots)
    snapshots.close()
    rollouts = work.lines[0]["rollouts"]
    return rollouts["texts"], torch.tensor(rollouts["rewards"], dtype=torch.float64)


def test_without_cross_group_every_dataset_is_differentiated_alone(bench):
    """The k-th completions of all prompts are a dataset; its texts' rewards are its own metagradients, and differ from the joint ones."""
    work = bench("task=l2_norm", "method=dpg_nocross")
    texts, rewards = rewards_of_a_step(work)
    for k in range(4):
        alone = work.metagradients(texts[k::4], 0, k).rewards
        assert torch.allclose(rewards[k::4], alone.double(), rtol=1e-6, atol=0)
    joint = work.metagradients(texts, 0, 0).rewards.double()
    assert not torch.allclose(rewards / rewards.std(), joint / joint.std(), rtol=1e-3, atol=1e-3)


def test_rewards_through_sgd_are_dot_products(bench):
    """T=1, a metric that is linear along SGD's step up to curvature: dpg_sgd pays (lr / N) <-grad l_i, grad Phi(phi_T)>."""
    work = bench("task=l2_norm", "method=dpg_sgd", "inner_lr=1e-4")
    texts, rewards = rewards_of_a_step(work)
    dots = work.influences(texts).double()
    assert torch.corrcoef(torch.stack([rewards, dots]))[0, 1] > 0.9999
    assert torch.allclose(rewards, dots * 1e-4 / 16, rtol=2e-2, atol=1e-3 * rewards.abs().max().item())
    adam = work.metagradients(texts, 0, 0).rewards.double()
    assert torch.corrcoef(torch.stack([rewards, adam]))[0, 1] < 0.999, "the target's own optimizer says something else"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inner_optimizer=adam"], "method.inner_optimizer=adam: no such optimizer; did you mean 'adamw'? choose from: adamw, sgd"),
        (["inner_lr=0"], "method.inner_lr=0: a learning rate is positive; write method.inner_lr=0.1, or null for the target's own"),
    ],
)
def test_bad_options_are_one_line(words, message):
    with pytest.raises(UserError) as caught:
        config.read(["method=dpg", *words], sweep=False)
    assert str(caught.value) == message


# ---- oracle


def test_ascent_follows_phi():
    """On Phi = -(w - 3)^2 of a one-weight model: SGD at lr 0.25 halves the distance a step, AdamW's first step is lr long."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    model.eval()

    def phi(model):
        return -((model.weight - 3) ** 2).sum()

    assert ascend(model, phi, SGD(lr=0.25), 3)["weight"].item() == pytest.approx(3 - 2 / 8)
    assert ascend(model, phi, AdamW(lr=0.1, weight_decay=0.0), 1)["weight"].item() == pytest.approx(1.1)
    assert model.weight.item() == 1.0
    with pytest.raises(ValueError, match="does not depend on the trained parameters"):
        ascend(model, lambda model: torch.tensor(1.0), SGD(lr=0.1), 1)


@pytest.mark.parametrize(("task", "words", "products"), [("sixseven", (), False), ("length", ("samples=64", "fresh=64"), True)])
def test_the_oracle_of_a_task_without_references_climbs_phi(bench, task, words, products):
    """And is charged for Phi's matrix products, of which a picture in the weights has none."""
    work = bench(f"task={task}", *words, "inner_steps=4", "method=oracle")
    (snapshot,) = Registry().load("method", "oracle")(work.options).run(work)
    from dpgbench.metagrad.training import loaded

    before = work.task.signal(work.world.target).item()
    with loaded(work.world.target, snapshot.params):
        assert work.task.signal(work.world.target).item() > before
    assert (work.meter.flops["training"] > 0) == products


def test_the_oracle_of_a_language_writes_it(bench):
    """Its dev texts over and over; the cell's score is that of a target trained on them."""
    work = bench("task=language", "lang=fr", "method=oracle")
    (snapshot,) = Registry().load("method", "oracle")(work.options).run(work)
    texts = snapshot.sample(work.prompts(70, "a test"))
    assert len(texts) == 70 and texts[:6] == texts[64:] and work.task.score(texts) == [1.0] * 70 and snapshot.params is None
