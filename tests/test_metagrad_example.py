"""The example in docs/metagradients.md runs as it stands, and does what it says."""

from __future__ import annotations

import re

import torch
from conftest import ROOT

from dpgbench.metagrad.training import AdamW, loaded, train
from dpgbench.worlds import phrasebook


def test_the_documented_example_ranks_training_data():
    """On the embedded target, a dev set in German: the German text helps most, and weighing it more does lower the dev loss."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "metagradients.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    names = {
        "dev_texts": ["das kind kauft heute den roten apfel in der stadt."],
        "steps": [
            ["the child buys the red apple today in the city.", "der arzt verkauft heute das brot."],
            ["the queen sells an old book."],
        ],
        "print": lambda order: names.__setitem__("order", order),
    }
    exec(code.replace('"my-model"', repr(str(phrasebook.WEIGHTS / "target"))), names)
    assert names["order"][0] == 1
    model, batches, rewards = names["model"], [names["batch"](texts) for texts in names["steps"]], names["out"].rewards

    def phi(weights):
        with torch.no_grad(), loaded(model, train(model, batches, AdamW(lr=1e-4, eps_root=1e-6), weights=weights)):
            return -float(names["per_example_loss"](model, {}, **names["dev"]).mean())

    assert phi(torch.tensor([1.0, 1.5, 1.0])) > phi(torch.ones(3)) and rewards.shape == (3,)
