"""Other ways to the same metagradient, for the benchmark: what people use today, written as they would write it.

Each takes (model, batches, signal, optimizer) and returns the (N,) rewards.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpgbench.metagrad.training import loaded


def losses(model: nn.Module, input_ids: Tensor, labels: Tensor, params: dict[str, Tensor] | None = None) -> Tensor:
    """(B,) per-example losses through the model's own forward."""
    arguments = {"input_ids": input_ids, "use_cache": False}
    logits = (model(**arguments) if params is None else torch.func.functional_call(model, params, (), arguments)).logits
    nll_BL = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
    return nll_BL.sum(1) / nll_BL.shape[1]


def plain_loop(model, batches, signal, optimizer) -> None:
    """No metagradient: the training loop everybody writes, with torch.optim.AdamW (fused)."""
    model = copy.deepcopy(model)
    torch_optimizer = torch.optim.AdamW(
        model.parameters(), optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay, fused=True
    )
    for batch in batches:
        losses(model, **batch).mean().backward()
        torch_optimizer.step()
        torch_optimizer.zero_grad()


def unroll(model, batches, signal, optimizer) -> Tensor:
    """The whole run as one differentiable expression: create_graph=True, one backward at the end."""
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    moments = [{name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2)]
    weights = torch.ones(sum(len(batch["labels"]) for batch in batches), requires_grad=True, device=batches[0]["labels"].device)
    for t, (batch, weights_B) in enumerate(zip(batches, weights.split([len(b["labels"]) for b in batches]), strict=True), 1):
        loss = (weights_B * losses(model, batch["input_ids"], batch["labels"], params)).mean()
        gradients = dict(zip(params, torch.autograd.grad(loss, list(params.values()), create_graph=True), strict=True))
        (b1, b2), new = optimizer.betas, {}
        for name, g in gradients.items():
            m, v = moments[0][name], moments[1][name]
            moments[0][name], moments[1][name] = m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            scale = (v / (1 - b2**t) + optimizer.eps_root).sqrt() + optimizer.eps
            new[name] = params[name] * (1 - optimizer.lr * optimizer.weight_decay) - optimizer.lr / (1 - b1**t) * m / scale
        params = new
    with loaded(model, params):
        return torch.autograd.grad(signal(model), weights)[0]


class Weighted(nn.Module):
    """The training loss as a module that returns a scalar, which is what MAGIC's trainer takes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor, example_weight: Tensor, **_: object) -> Tensor:
        return (example_weight * losses(self.model, input_ids, labels)).mean()


def magic(save_mode: str):
    """bergson's MAGIC (https://github.com/EleutherAI/bergson) with all states kept ("all") or at every sqrt(T)-th step ("sqrt")."""

    def run(model, batches, signal, optimizer) -> Tensor:
        import torchopt
        from bergson.magic.data_stream import DataStream
        from bergson.magic.trainer import BackwardState, Trainer
        from datasets import Dataset
        from torchopt.pytree import tree_iter

        rows = {key: torch.cat([batch[key] for batch in batches]).tolist() for key in ("input_ids", "labels")}
        stream = DataStream(Dataset.from_dict(rows), len(batches[0]["labels"]))
        adamw = torchopt.adamw(
            optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay, eps_root=optimizer.eps_root, moment_requires_grad=False
        )
        weighted = Weighted(copy.deepcopy(model))
        trainer, state = Trainer.initialize(weighted, adamw)
        with tempfile.TemporaryDirectory() as folder:
            state = trainer.train(state, stream, save_dir=folder, save_mode=save_mode)
            leaves = {name: p.detach().requires_grad_() for name, p in state.params.items()}
            with loaded(model, {name.removeprefix("model."): p for name, p in leaves.items()}):
                found = torch.autograd.grad(signal(model), list(leaves.values()), allow_unused=True)
            to_params = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(leaves.items(), found, strict=True)}
            to_state = [torch.zeros_like(t) for t in tree_iter(state.opt_state) if isinstance(t, Tensor) and t.is_floating_point()]
            stream.requires_grad = True
            start = BackwardState(to_params, to_state, torch.zeros_like(stream.weights))
            return trainer.backward(folder, stream, start, state, save_mode=save_mode).weight_grads

    return run


def magic_is_installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("bergson", "torchopt"))
