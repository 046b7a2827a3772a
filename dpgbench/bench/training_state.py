"""The state of a policy's training as plain tensors and numbers: what a checkpoint keeps and a run that goes on puts back.

Tensors: the trained weights, their running mean, the optimizer's moments (by parameter index) and torch's random states. Numbers: learning
rates and the scheduler's counters. No pickle is used, so loading a checkpoint from somebody else cannot execute code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpgbench.worlds.adapters import trained

if TYPE_CHECKING:
    from dpgbench.bench.workbench import Workbench

SCHEDULE = ("last_epoch", "_step_count", "_last_lr")


def tensors_of(model: nn.Module, mean: Mapping[str, Tensor] | None, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that is a tensor, by name. Nothing is copied."""
    tensors = weights_of(model)
    tensors |= {f"mean.{name}": weight for name, weight in (mean or {}).items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    return tensors


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights alone, for training that starts each time with a new optimizer."""
    return {f"model.{name}": weight for name, weight in trained(model).items()}


def numbers_of(optimizer: torch.optim.Optimizer, schedule: Any) -> dict[str, Any]:
    """Learning rates and how far the schedule is."""
    state = schedule.state_dict()
    return {
        "learning_rates": [float(group["lr"]) for group in optimizer.param_groups],
        "schedule": {name: state[name] for name in SCHEDULE if name in state},
    }


class WayBack:
    """Back to here from a step whose answer turns out to be over the budget: the weights, and what was spent. Memory: the weights."""

    def __init__(self, bench: Workbench, model: nn.Module, mean: Mapping[str, Tensor] | None = None):
        self._bench, self._model, self._mean = bench, model, mean
        tensors = weights_of(model) | {f"mean.{name}": weight for name, weight in (mean or {}).items()}
        self._tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._spent = bench.spent()

    def take(self) -> None:
        restore_weights(self._model, self._tensors, self._mean)
        self._bench.take_back(self._spent)


@torch.no_grad()
def restore_weights(model: nn.Module, tensors: Mapping[str, Tensor], mean: Mapping[str, Tensor] | None = None) -> None:
    """Put the weights, and their running mean where there is one, back in place."""
    for name, weight in trained(model).items():
        weight.copy_(tensors[f"model.{name}"])
    for name, weight in (mean or {}).items():
        weight.copy_(tensors[f"mean.{name}"])


def restore_optimizer(optimizer: torch.optim.Optimizer, schedule: Any, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Put moments, learning rates, the schedule's counters and the random streams back."""
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            moments.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    for group, rate in zip(groups, numbers["learning_rates"], strict=True):
        group["lr"] = rate
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    schedule.load_state_dict({**schedule.state_dict(), **numbers["schedule"]})
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
