"""The training of the target model: the loop that plain training and metagradients share, and what one step on one text does.

Everything is a pure function of a dictionary of parameters. Users import training, the optimizers (SGD, AdamW), the loss
(per_example_loss) and `loaded`, which puts parameters into a model for a while, from `dpgbench.training`.

Shape suffixes: B examples in a batch, N examples in total, L tokens (fixed length). Weights have none: they are (N,) or, per token, (N, L).
Cost unit: F = one forward pass over the batch; a backward pass is 2F, so a training step is 3F.
Sources: DPG = arXiv 2604.08423.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpgbench.core.labels import IGNORED_LABEL
from dpgbench.metagrad import derivatives
from dpgbench.metagrad.derivatives import Share, StepLoss
from dpgbench.metagrad.inputs import (
    Batch,
    check_batch,
    check_batches,
    check_causal,
    check_count,
    check_model,
    check_precision,
    check_reduction,
    check_scalar,
    device_of,
    micro_batches,
    split_weights,
)
from dpgbench.metagrad.loss import initial_parameters, loaded, per_example_loss, per_token_loss
from dpgbench.metagrad.optimizers import SGD, AdamW, Moments, Optimizer, Params

__all__ = [
    "SGD", "AdamW", "Moments", "Optimizer", "Signal", "first_step_dots", "gradient_dots", "loaded", "mean_gradients",
    "one_step_values", "per_example_loss", "per_token_loss", "train", "train_with_state",
]  # fmt: skip

Signal = Callable[[nn.Module], Tensor]


def mean_gradients(
    model: nn.Module,
    params: Params,
    batch: Batch,
    weights: Tensor,
    micro_batch: int | None = None,
    reduction: str = "length",
    precision: str = "full",
    activation_checkpointing: bool = False,
    count: int | None = None,
) -> Params:
    """Gradient of (1/count) sum_i w_i l(x_i; phi), accumulated over micro-batches; count: B, or more where B is only a share. Cost 3F.

    Weights (B,), or (B, L) for the tokens' shares of the loss (`per_token_loss`).
    """
    if len(weights) == 0:  # a process with no share of a small batch
        return {name: torch.zeros_like(theta) for name, theta in params.items()}
    leaves = {name: theta.detach().requires_grad_() for name, theta in params.items()}
    total: Sequence[Tensor] | None = None
    loss = StepLoss(model, micro_batch, reduction, precision, activation_checkpointing, per_token=weights.dim() == 2)
    for rows in micro_batches(len(weights), micro_batch):
        with torch.enable_grad():
            losses = loss(leaves, Batch(batch.input_ids[rows], batch.labels[rows]))
            mean = (weights[rows] * losses).sum() / (count or len(weights))
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

    batches: T dicts of "input_ids" and "labels", (B, L) long, right padded; weights (N,) over the concatenated batches, default ones, or
    (N, L) for single tokens: column t weighs the label at position t. Returns name -> tensor (trainable parameters only); the model is
    left unchanged. `micro_batch` bounds memory and changes nothing beyond rounding; precision="bf16" computes in bfloat16 with float32
    parameters. Cost 3F a step. Raises ValueError on malformed batches, weights or micro_batch, weights per token with reduction="tokens",
    active dropout, and non-floating parameters."""
    return train_with_state(model, batches, optimizer, weights, micro_batch, reduction, precision)[0]


def train_with_state(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    optimizer: Optimizer,
    weights: Tensor | None = None,
    micro_batch: int | None = None,
    reduction: str = "length",
    precision: str = "full",
) -> tuple[Params, Any]:
    """`train`, and the optimizer's state after the last step."""
    check_model(model)
    params = initial_parameters(model)
    check_precision(precision, params)
    per_token = weights is not None and weights.dim() == 2
    if per_token:
        check_causal(reduction)
    steps, weights = check_batches(batches, params, weights, micro_batch, per_token)
    state = optimizer.init(params)
    for step, (batch, of_step) in enumerate(zip(steps, split_weights(weights, steps), strict=True)):
        gradients = mean_gradients(model, params, batch, of_step, micro_batch, reduction, precision)
        with torch.no_grad():
            params, state = optimizer.update(params, gradients, state, step)
    return params, state


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
    cannot be vectorised, one warning names the reason and the rest runs text by text. Only parameters that the signal looks at are stepped.
    Cost: at most 3F over all texts plus N signals. Raises ValueError as `train` does, and on a signal that is not a scalar tensor."""
    check_reduction(reduction)
    check_count("chunk", chunk)
    params, texts = _start(model, input_ids, labels)
    stepping = _looked_at(model, params, signal)
    state = optimizer.init(stepping)

    def value(ids_L: Tensor, labels_L: Tensor) -> Tensor:
        gradients = _gradients_of_one(model, params, stepping, ids_L, labels_L, reduction)
        stepped, _ = optimizer.update(stepping, gradients, state, 0)
        with loaded(model, stepped), sdpa_kernel(SDPBackend.MATH):
            return check_scalar(signal(model))

    return _text_by_text(value, texts, chunk, "one_step_values")


def first_step_dots(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    direction: Params,
    optimizer: Optimizer,
    reduction: str = "length",
    chunk: int = 64,
    state: Any = None,
    step: int = 0,
) -> Tensor:
    """<u_i, direction> for each of N texts, u_i the optimizer's next update from phi_0 on text i alone: (N,), detached.

    The next update is the first unless the optimizer's `state` after `step` steps is given. Weight decay, the same for every text, is left
    out. direction: by parameter name; a parameter it does not name counts as zero.
    Vectorised as `one_step_values` is, with about four copies of the named parameters per text. Cost at most 3F over all texts.
    Raises ValueError as `train` does."""
    check_reduction(reduction)
    check_count("chunk", chunk)
    params, texts = _start(model, input_ids, labels)
    # From parameters of zero, what the optimizer returns is the update itself: no digits are lost against phi_0, and nothing decays.
    stepping = {name: params[name] for name in direction}
    zeros = {name: torch.zeros_like(theta) for name, theta in stepping.items()}
    before = optimizer.init(stepping) if state is None else state

    def dot(ids_L: Tensor, labels_L: Tensor) -> Tensor:
        update, _ = optimizer.update(zeros, _gradients_of_one(model, params, stepping, ids_L, labels_L, reduction), before, step)
        return torch.stack([(update[name] * along).sum() for name, along in direction.items()]).sum()

    return _text_by_text(dot, texts, chunk, "first_step_dots")


def gradient_dots(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    direction: Params,
    micro_batch: int | None = None,
    reduction: str = "length",
    precision: str = "full",
    per_token: bool = False,
) -> Tensor:
    """<grad l_i(phi_0), direction> for each of N texts: (N,), detached. One forward-mode product of the loss vector, no gradient is formed.

    With `per_token` (N, L): column t is the same of the share of l_i that the label at position t has, whatever the reduction, and a row
    sums to the text's. It costs the same, because the product of the loss vector goes through all labels' shares anyway.
    Where a model has no forward mode, or a wrong one (found on two texts, once per model), each text's gradient is formed after all, in
    full precision; for single labels it is reverse over reverse, at 5F.

    direction: by parameter name; a parameter it does not name counts as zero. `micro_batch` and `precision` as in `train`.
    Cost: 3F when the direction reaches every layer (the products of weights and activations, and both their tangents), less otherwise.
    Raises ValueError as `train` does."""
    params, texts = _start(model, input_ids, labels)
    check_precision(precision, params)
    check_reduction(reduction)
    loss = StepLoss(model, micro_batch, reduction, precision, per_token=per_token)
    like = next(iter(params.values()))
    share = Share(texts, torch.ones(input_ids.shape if per_token else input_ids.shape[:1], dtype=like.dtype, device=like.device), 1)
    way = derivatives.reverse_over_forward
    if derivatives.forward_mode_fault(loss, params, share, second_order=False):
        if not per_token:
            return -first_step_dots(model, input_ids, labels, direction, SGD(lr=1.0), reduction)
        way = derivatives.reverse_over_reverse
    dots = way(loss, params, share, dict(direction), second_order=False)[0]
    if per_token and reduction == "tokens":  # labels' shares are over L - 1; a text's divisor is a number that no parameter moves
        dots = dots * ((labels.shape[1] - 1) / (texts.labels[:, 1:] != IGNORED_LABEL).sum(1, keepdim=True).clamp(min=1))
    return dots


def _start(model: nn.Module, input_ids: Tensor, labels: Tensor) -> tuple[Params, Batch]:
    """phi_0 and the texts, both checked; a text may have no label."""
    check_model(model)
    params = initial_parameters(model)
    return params, check_batch({"input_ids": input_ids, "labels": labels}, "input", device_of(params), may_be_unlabelled=True)


def _looked_at(model: nn.Module, params: Params, signal: Signal) -> Params:
    """The parameters that the signal looks at: those with a gradient, if its value stays when all others have other values; else all.

    Cost: the signal's forward and backward, and its forward again where some have no gradient."""
    leaves = {name: theta.detach().requires_grad_() for name, theta in params.items()}
    with torch.enable_grad(), loaded(model, leaves):
        value = check_scalar(signal(model))
        if not value.requires_grad:
            return params
        slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    read = {name: theta for (name, theta), slope in zip(params.items(), slopes, strict=True) if slope is not None}
    # A signal may also look without a gradient: at the likeliest token, through detach().
    others = {name: -1 - theta for name, theta in params.items() if name not in read}
    if not others:
        return params
    with torch.no_grad(), loaded(model, others):
        return read if torch.equal(signal(model), value) else params


def _gradients_of_one(model: nn.Module, params: Params, to: Params, ids_L: Tensor, labels_L: Tensor, reduction: str) -> Params:
    """Of one text's loss to the parameters `to`, the others being what `params` has; for use under torch.func.vmap."""
    return torch.func.grad(lambda p: per_example_loss(model, {**params, **p}, ids_L[None], labels_L[None], reduction)[0])(to)


def _text_by_text(function: Callable[[Tensor, Tensor], Tensor], texts: Batch, chunk: int, caller: str) -> Tensor:
    """A scalar function of one text's input_ids and labels, on all texts, `chunk` at a time through vmap if that works: (N,)."""
    # Values go into one tensor: kept one by one, each would pin the heap above the blocks that its computation gave back.
    values_N: Tensor | None = None
    vectorised = torch.func.vmap(function)
    with torch.no_grad():  # torch.func.grad is not affected; nothing else needs a tape
        for rows in micro_batches(len(texts.input_ids), chunk):
            ids_BL, labels_BL = texts.input_ids[rows], texts.labels[rows]
            values_B = None
            if vectorised is not None:
                try:
                    values_B = vectorised(ids_BL, labels_BL)
                except RuntimeError as error:
                    vectorised = None
                    reason = str(error).strip().split("\n")[0]
                    warnings.warn(f"{caller}: vmap failed, going on text by text, slower but the same: {reason}", stacklevel=3)
            if values_B is None:
                values_B = torch.stack([function(*text) for text in zip(ids_BL, labels_BL, strict=True)])
            if values_N is None:
                values_N = values_B.new_empty(len(texts.input_ids))
            values_N[rows] = values_B
    return values_N
