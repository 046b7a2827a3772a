"""The training of the target model: the loop that plain training and metagradients share, and Phi after one step on one text.

Everything is a pure function of a dictionary of parameters. The parts live in `dpgbench.engine` and can be imported from here:
the optimizers (SGD, AdamW), the loss (per_example_loss) and `loaded`, which puts parameters into a model for a while.

Shape suffixes: B examples in a batch, N examples in total, L tokens (fixed length).
Cost unit: F = one forward pass over the batch; a backward pass is 2F, so a training step is 3F.
Sources: DPG = arXiv 2604.08423.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpgbench.engine.inputs import (
    Batch,
    check_batch,
    check_batches,
    check_count,
    check_model,
    check_precision,
    check_reduction,
    check_scalar,
    device_of,
    micro_batches,
    split_weights,
)
from dpgbench.engine.loss import initial_parameters, loaded, per_example_loss
from dpgbench.engine.optimizers import SGD, AdamW, Moments, Optimizer, Params

__all__ = ["SGD", "AdamW", "Moments", "Optimizer", "Signal", "loaded", "mean_gradients", "one_step_values", "per_example_loss", "train"]

Signal = Callable[[nn.Module], Tensor]


def mean_gradients(
    model: nn.Module,
    params: Params,
    batch: Batch,
    weights_B: Tensor,
    micro_batch: int | None = None,
    reduction: str = "length",
    precision: str = "full",
    activation_checkpointing: bool = False,
    count: int | None = None,
) -> Params:
    """Gradient of (1/count) sum_i w_i l(x_i; phi), accumulated over micro-batches; count: B, or more where B is only a share. Cost 3F."""
    if len(weights_B) == 0:  # a process with no share of a small batch
        return {name: torch.zeros_like(theta) for name, theta in params.items()}
    leaves = {name: theta.detach().requires_grad_() for name, theta in params.items()}
    total: Sequence[Tensor] | None = None
    for rows in micro_batches(len(weights_B), micro_batch):
        with torch.enable_grad():
            ids_BL, labels_BL = batch.input_ids[rows], batch.labels[rows]
            loss_B = per_example_loss(model, leaves, ids_BL, labels_BL, reduction, precision, activation_checkpointing)
            mean = (weights_B[rows] * loss_B).sum() / (count or len(weights_B))
        parts = torch.autograd.grad(mean, list(leaves.values()), materialize_grads=True)
        total = parts if total is None else [a + b for a, b in zip(total, parts, strict=True)]
    return dict(zip(leaves, total, strict=True))


def train(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    optimizer: Optimizer,
    weights: Tensor | None = None,
    micro_batch: int | None = None,
    reduction: str = "length",
    precision: str = "full",
) -> Params:
    """phi_T: T optimizer steps from the model's parameters, one per batch; step t minimises (1/|B_t|) sum_i w_i l(x_i; phi_t).

    batches: T dicts of "input_ids" and "labels", (B, L) long, right padded; weights (N,) over the concatenated batches,
    default ones. Returns name -> tensor (trainable parameters only); the model is left unchanged. `micro_batch` bounds
    memory and changes nothing beyond rounding; precision="bf16" computes in bfloat16 with float32 parameters. Cost 3F a step.
    Raises ValueError on malformed batches, weights or micro_batch, active dropout, and non-floating parameters."""
    check_model(model)
    params = initial_parameters(model)
    check_precision(precision, params)
    steps, weights_N = check_batches(batches, params, weights, micro_batch)
    state = optimizer.init(params)
    for step, (batch, weights_B) in enumerate(zip(steps, split_weights(weights_N, steps), strict=True)):
        gradients = mean_gradients(model, params, batch, weights_B, micro_batch, reduction, precision)
        with torch.no_grad():
            params, state = optimizer.update(params, gradients, state, step)
    return params


def one_step_values(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    signal: Signal,
    optimizer: Optimizer,
    reduction: str = "length",
    chunk: int = 64,
) -> Tensor:
    """Phi after one optimizer step from phi_0 on text i alone, for each of N texts: (N,), detached.

    input_ids, labels: (N, L) long. `signal` is called on the model with the stepped parameters inside. Texts run `chunk` at a
    time through torch.func.vmap, holding about six copies of the parameters per text; where an architecture or a signal
    cannot be vectorised, one warning names the reason and the rest runs text by text. Cost: 3F over all texts plus N signals.
    Raises ValueError as `train` does, and on a signal that is not a scalar tensor."""
    check_model(model)
    check_reduction(reduction)
    check_count("chunk", chunk)
    params = initial_parameters(model)
    texts = check_batch({"input_ids": input_ids, "labels": labels}, "input", device_of(params), may_be_unlabelled=True)
    state = optimizer.init(params)

    def value(ids_L: Tensor, labels_L: Tensor) -> Tensor:
        gradients = torch.func.grad(lambda p: per_example_loss(model, p, ids_L[None], labels_L[None], reduction)[0])(params)
        stepped, _ = optimizer.update(params, gradients, state, 0)
        with loaded(model, stepped), sdpa_kernel(SDPBackend.MATH):
            return check_scalar(signal(model))

    values: list[Tensor] = []
    function = torch.func.vmap(value)
    with torch.no_grad():  # torch.func.grad is not affected; nothing else needs a tape
        for ids_BL, labels_BL in zip(texts.input_ids.split(chunk), texts.labels.split(chunk), strict=True):
            if function is not None:
                try:
                    values.append(function(ids_BL, labels_BL))
                    continue
                except RuntimeError as error:
                    function = None
                    reason = str(error).strip().split("\n")[0]
                    warnings.warn(f"one_step_values: vmap failed, going on text by text, slower but the same: {reason}", stacklevel=2)
            values.append(torch.stack([value(*text) for text in zip(ids_BL, labels_BL, strict=True)]))
    return torch.cat(values)
